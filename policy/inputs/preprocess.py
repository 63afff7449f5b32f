"""Preprocessing of observations, for training and inference alike.

Shape legend: B batch, V views, H, W image, S state, K chunk, A action, T text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.chunk_queue import soft_mask
from cogvla.policy.inputs.augmentation import centre, change, check_crop_area
from cogvla.policy.inputs.forecast import Forecast
from cogvla.policy.inputs.normalise import Normaliser, normalisers, of_each
from cogvla.policy.inputs.resize import check_kernel, resize
from cogvla.policy.inputs.tokenizer import Tokenizer
from cogvla.policy.interface import Committed, Embodiment, Observation
from cogvla.policy.model.cogvla import ModelInput
from cogvla.policy.model.heads.committed import CommittedInput

INSTRUCTION_CACHE = 4096
INSTRUCTION_CACHE_NUMBERS = 2**24
"""Most instructions that are cached, and most numbers of their ids or states."""


class Preprocessor(nn.Module):
    """Convert observations to `ModelInput`, and normalised actions back to physical units.

    Args:
        embodiment: cameras, sizes and normalisation kinds.
        tokenizer: tokenizer of the instructions, or a text encoder.
        statistics: `{"state": Statistics, "action": Statistics}` of the training data; or such a mapping for each of
            several data sets, by their names.
        crop_area: area of the centre crop as a share of each view, for a policy that was trained with random crops of
            that area; 1: no crop. Saved with the weights.
        resize_kernel: kernel that resizes views to the policy's image size, see `policy.inputs.resize`. Saved with the
            weights.

    Attributes:
        sets: names of the data sets with statistics of their own; (): one set of statistics.
        chosen: the data set whose statistics observations get; None: not chosen, or one set of statistics.
        forecast: forecast of the state while chunks are late; None: none was fitted.

    Raises:
        ValueError: the cameras have different sizes, or a value does not fit.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        tokenizer: Tokenizer,
        statistics: dict[str, Any],
        crop_area: float = 1.0,
        resize_kernel: str = "bilinear",
    ) -> None:
        super().__init__()
        check_crop_area(crop_area)
        check_kernel(resize_kernel)
        sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
        if len(sizes) != 1:
            raise ValueError(
                f"all cameras of a policy must have the same image size; embodiment {embodiment.name!r} has {sizes}"
            )
        self.embodiment, self.tokenizer = embodiment, tokenizer
        self.crop_area, self.resize_kernel = crop_area, resize_kernel
        self.image_size = sizes.pop()
        by_name = of_each(statistics)
        self.sets = tuple(name for name in by_name if name is not None)
        self.chosen: str | None = None
        self.forecast: Forecast | None = None
        pairs = [normalisers(embodiment, values) for values in by_name.values()]
        self._states, self._actions = (nn.ModuleList(each) for each in zip(*pairs, strict=True))
        self._text: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        return self.normalisers()[0].shift_D.device

    def normalisers(self) -> list[Normaliser]:
        """Return all normalisers, of states and then of actions."""
        return [cast(Normaliser, each) for each in (*self._states, *self._actions)]

    @property
    def state_normaliser(self) -> Normaliser:
        """The normaliser of observed states; ValueError if it must be chosen first."""
        return cast(Normaliser, self._states[self._index()])

    @property
    def action_normaliser(self) -> Normaliser:
        """The normaliser of the policy's actions; ValueError if it must be chosen first."""
        return cast(Normaliser, self._actions[self._index()])

    def choosing(self, name: str | None) -> Preprocessor:
        """Return the same preprocessor with the statistics of one data set for observations; None: not chosen.

        Raises:
            ValueError: there are no statistics of that name.
        """
        if name is not None and name not in self.sets:
            known = f"one of {', '.join(self.sets)}" if self.sets else "leave it out: there is one set of statistics"
            raise ValueError(f"the policy has no statistics named {name!r}; {known}")
        other = copy.copy(self)
        other.chosen, other._text = name, {}
        return other

    def normalised_state(self, state_BS: Tensor, set_B: Tensor | None = None) -> Tensor:
        """Normalise states [B,S], each by the statistics of its data set; `set_B` None: by the chosen ones."""
        return self.state_normaliser(state_BS) if set_B is None else _by_set(self._states, state_BS, set_B)

    def normalised_actions(self, actions_BKA: Tensor, set_B: Tensor | None = None) -> Tensor:
        """Normalise actions [B,K,A] like `normalised_state`."""
        return self.action_normaliser(actions_BKA) if set_B is None else _by_set(self._actions, actions_BKA, set_B)

    def _index(self) -> int:
        if self.sets and self.chosen is None:
            raise ValueError(
                "the policy has statistics of several data sets; choose those of the robot with statistics=NAME: "
                + ", ".join(self.sets)
            )
        return 0 if self.chosen is None else self.sets.index(self.chosen)

    def text(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids [B,T] (with a text encoder: its states [B,T,E]) and mask [B,T] of B instructions.

        They are padded to the longest; known instructions are cached.
        """
        new = set(instructions) - self._text.keys()
        cached = sum(words_1T.numel() for words_1T, _ in self._text.values()) if new else 0
        if len(self._text) + len(new) > INSTRUCTION_CACHE or cached > INSTRUCTION_CACHE_NUMBERS:
            self._text.clear()
            new = set(instructions)
        for text in new:
            words_1T, mask_1T = self.tokenizer.inputs([text])
            self._text[text] = (words_1T[0], mask_1T[0])
        rows = [self._text[text] for text in instructions]
        words_BT = nn.utils.rnn.pad_sequence([words_T for words_T, _ in rows], batch_first=True)
        mask_BT = nn.utils.rnn.pad_sequence([mask_T for _, mask_T in rows], batch_first=True)
        return words_BT.to(self.device), mask_BT.to(self.device)

    def pixels(self, images_BHWC: Sequence[Tensor]) -> Tensor:
        """Resize and crop V camera images uint8 [B,H,W,3] to uint8 [B,V,3,H,W] at the policy's size."""
        whole = [rearrange(image_BHWC, "b h w c -> b c h w") for image_BHWC in images_BHWC]
        views = [resize(view_BCHW, self.image_size, self.resize_kernel) for view_BCHW in whole]
        pixels_BVCHW = torch.stack(views, dim=1)
        return change(pixels_BVCHW, self.crop_area, centre(self.crop_area, *pixels_BVCHW.shape[:2]))

    def observation(self, observation: Observation) -> ModelInput:
        """Check an observation and convert it to model input on the policy's device, without `committed`.

        Raises:
            ValueError: see `Observation.validate`.
        """
        observation.validate(self.embodiment)
        images = [_tensor(observation.images[name]).to(self.device) for name in self.embodiment.camera_names]
        state_BS = _tensor(observation.state).to(self.device, torch.float32)
        return self.model_input(self.pixels(images), state_BS, observation.instruction)

    def committed(self, given: Sequence[Committed | None] | None, longest: int | None = None) -> CommittedInput | None:
        """Convert the committed actions of B observations to model input, normalised and padded to a chunk.

        Args:
            given: `Observation.committed`, already checked.
            longest: largest number that counts as certain; None: all.

        Returns:
            None if no observation has any.
        """
        if given is None or all(each is None for each in given):
            return None
        actions_BKA, delay_B, count_B = padded(given, self.embodiment)
        delay_B = delay_B if longest is None else np.minimum(delay_B, longest)
        chunk = self.embodiment.chunk
        weight_BK = np.stack([soft_mask(chunk, *pair) for pair in zip(delay_B, count_B, strict=True)])
        weight = torch.from_numpy(weight_BK).to(self.device, torch.float32)
        normalised_BKA = self.action_normaliser(torch.from_numpy(actions_BKA).to(self.device))
        return CommittedInput(torch.where(weight[..., None] > 0, normalised_BKA, 0.0), weight)

    def model_input(self, pixels_BVCHW: Tensor, state_BS: Tensor, instructions: Sequence[str]) -> ModelInput:
        """Build model input from cropped pixels uint8 [B,V,3,H,W], states [B,S] in physical units, B instructions."""
        text_ids_BT, text_mask_BT = self.text(instructions)
        return ModelInput(pixels_BVCHW, text_ids_BT, text_mask_BT, self.state_normaliser(state_BS))

    def actions(self, normalised_BKA: Tensor) -> Tensor:
        """Convert normalised actions [B,K,A] to physical units."""
        return self.action_normaliser.inverse(normalised_BKA)


def padded(given: Sequence[Committed | None], embodiment: Embodiment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return committed actions in fixed shapes.

    Returns:
        Actions float32 [B,K,A], 0 where there are none; the number of certain ones, int64 [B]; and of all, int64 [B].
    """
    actions_BKA = np.zeros((len(given), embodiment.chunk, embodiment.action_dim), np.float32)
    delay_B, count_B = np.zeros((2, len(given)), np.int64)
    for row, each in enumerate(given):
        if each is not None:
            count_B[row] = min(len(each.actions), embodiment.chunk)
            actions_BKA[row, : count_B[row]] = each.actions[: count_B[row]]
            delay_B[row] = each.delay
    return actions_BKA, delay_B, count_B


def _by_set(normalisers: nn.ModuleList, values_BX: Tensor, set_B: Tensor) -> Tensor:
    """Normalise values [B,...], each with the normaliser of its data set; `set_B` is on the CPU."""
    found_BX = torch.empty_like(values_BX)
    for number in set_B.unique().tolist():
        rows_b = (set_B == number).nonzero().flatten().to(values_BX.device)  # found on the CPU, where `set_B` is
        found_BX[rows_b] = normalisers[number](values_BX[rows_b])
    return found_BX


def _tensor(array: np.ndarray) -> Tensor:
    """Convert an array to a tensor.

    It is copied if needed: torch refuses negative strides (a flipped image) and warns about read-only arrays.
    """
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
