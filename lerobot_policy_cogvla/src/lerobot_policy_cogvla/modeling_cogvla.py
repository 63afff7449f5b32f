"""The policy `cogvla` of lerobot's commands: our network, with lerobot's methods.

Shape legend: B batch, K chunk, A action, R random draws.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from cogvla.policy.checkpoint import load_weights
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.heads.interface import DRAWS
from cogvla.policy.training.optimisation import parameter_groups
from lerobot_policy_cogvla.configuration_cogvla import CogVLAConfig
from lerobot_policy_cogvla.processor_cogvla import AGAIN, OBS_PIXELS, check_processors, network_and_words
from lerobot_policy_cogvla.start import check_data, start

PREFIX = "model."
"""Prefix of our names in `model.safetensors` of lerobot's checkpoints."""


class CogVLAPolicy(PreTrainedPolicy):
    """CogVLA behind lerobot's interface. Batches come from `make_cogvla_pre_post_processors`.

    Args:
        config: configuration; `config.cogvla` is filled in here if it is empty.
        dataset_stats: not used, see `make_cogvla_pre_post_processors`.
        dataset_meta: metadata of the data set to train on; None: no training.
        **kwargs: for other versions of lerobot; not used.

    Raises:
        ValueError: the data set does not fit the configuration or the checkpoint, or there is neither.
    """

    config_class = CogVLAConfig
    name = "cogvla"

    def __init__(
        self,
        config: CogVLAConfig,
        dataset_stats: dict[str, dict[str, Tensor]] | None = None,
        dataset_meta: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self.config: CogVLAConfig
        if config.cogvla:
            if dataset_meta is not None:
                check_data(config, dataset_meta)
            model_config, preprocessor = network_and_words(config.cogvla)
            self.model = CogVLA(model_config, preprocessor.embodiment)
        elif dataset_meta is not None:
            self.model = start(config, dataset_meta)
        else:
            raise ValueError(
                "a new policy needs a data set, which says what the robot is: lerobot-train --policy.type=cogvla, or "
                "--policy.path=FOLDER for one that was trained"
            )
        robot = self.model.embodiment
        for feature, key, width in (
            (config.robot_state_feature, OBS_STATE, robot.state_dim),
            (config.action_feature, ACTION, robot.action_dim),
        ):
            if feature is not None and tuple(feature.shape) != (width,):
                raise ValueError(
                    f"config.json declares {key} of shape {list(feature.shape)}, but the policy for {robot.name} has "
                    f"[{width}]; {AGAIN}"
                )
        if robot.chunk != config.chunk_size:
            raise ValueError(
                f"chunk_size is {config.chunk_size}, but the checkpoint predicts {robot.chunk} actions "
                f"at once: give --policy.chunk_size={robot.chunk} and n_action_steps up to that"
            )
        self.reset()

    @classmethod
    def _load_as_safetensor(cls, model: CogVLAPolicy, model_file: str, map_location: str, strict: bool) -> CogVLAPolicy:
        """Load all weights, each in its precision; lerobot's own loader only logs that some are missing."""
        check_processors(Path(model_file).parent, model.config.cogvla)
        weights = {name.removeprefix(PREFIX): x.clone() for name, x in load_weights(Path(model_file).parent).items()}
        try:
            model.model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            raise ValueError(f"{model_file} does not fit its config.json ({said}); use another checkpoint") from error
        return model.to(map_location)

    def get_optim_params(self) -> list[dict[str, Any]]:
        """Return groups of parameters: matrices with weight decay, all others without."""
        return parameter_groups(self, self.config.optimizer_weight_decay)

    def reset(self) -> None:
        """Forget the actions of an episode."""
        self._actions: deque[Tensor] = deque()

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict[str, float]]:
        """Return the loss of imitation, and its parts for the log.

        Args:
            batch: observations, `action` normalised [B,K,A] and `action_is_pad` [B,K].
            reduction: "mean" for a scalar, "none" for the loss [B] of each sample.
        """
        actions_BKA = batch[ACTION]
        size, (chunk, width) = len(actions_BKA), actions_BKA.shape[1:]
        device = actions_BKA.device
        draw_B2 = torch.randint(2**62, (size, 2), device=device)
        draw_B2[:, 1] = draw_B2[0, 1]
        output = self.model(self._inputs(batch, draw_B2), decode=False)
        error_BK = self.model.head.error(
            output.states,
            actions_BKA,
            torch.randn(size, DRAWS, chunk, width, device=device),
            torch.rand(size, DRAWS, device=device),
        )
        weight_BK = torch.ones_like(error_BK)
        if batch.get("action_is_pad") is not None:
            weight_BK = (~batch["action_is_pad"]).to(error_BK)
        loss_B = (error_BK * weight_BK / weight_BK.mean().clamp(min=1e-6)).mean(dim=1)
        others = sum(output.losses.values(), torch.zeros((), device=device))
        said = {f"action_{self.model.head.error_name}": float(loss_B.detach().mean())}
        said |= {f"router_{name}": float(value.detach()) for name, value in output.losses.items()}
        return (loss_B if reduction == "none" else loss_B.mean()) + others, said

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int = 0,
        prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Predict normalised actions [B,K,A], from the time of the observation on.

        With what is left of the previous chunk, as lerobot's real-time chunking gives it, the new chunk begins with the
        actions that are executed while it is computed, and then turns to the new actions step by step.

        Args:
            batch: observations.
            inference_delay: number of actions that are executed until the chunk is there.
            prev_chunk_left_over: normalised actions [H,A] or [B,H,A], filled up with zeros; None: the first chunk.
            **kwargs: for other versions of lerobot; not used.
        """
        self.eval()
        actions_BKA = self.model(self._inputs(batch)).actions.float()
        if prev_chunk_left_over is None:
            return actions_BKA
        return _continued(actions_BKA, prev_chunk_left_over.to(actions_BKA), inference_delay)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Return the next action [B,A], normalised; a chunk is predicted every `n_action_steps` steps."""
        if not self._actions:
            chunk_BKA = self.predict_action_chunk(batch)
            self._actions.extend(chunk_BKA[:, : self.config.n_action_steps].unbind(dim=1))
        return self._actions.popleft()

    def supports_rtc(self) -> bool:
        """Return True: `predict_action_chunk` takes what is left of the previous chunk."""
        return True

    def _inputs(self, batch: dict[str, Any], draw_B2: Tensor | None = None) -> ModelInput:
        if OBS_PIXELS not in batch:
            raise ValueError("the batch was not preprocessed: use the policy's own preprocessor")
        return ModelInput(
            batch[OBS_PIXELS],
            batch[OBS_LANGUAGE_TOKENS],
            batch[OBS_LANGUAGE_ATTENTION_MASK],
            batch[OBS_STATE],
            draw_B2,
        )


def _continued(new_BKA: Tensor, left_HA: Tensor, delay: int) -> Tensor:
    """Return the chunk that goes on from a previous one: its actions first, then a linear change to the new ones.

    The new chunk begins at the observation. The action of that step is sent already when lerobot's thread takes what is
    left, so what is left begins one step later. lerobot drops the first `delay` actions of the result.
    """
    left_BHA = left_HA if left_HA.ndim == 3 else left_HA[None]
    real_H = left_BHA.abs().sum(dim=(0, 2)).ne(0)
    steps = min(int(real_H.nonzero().max()) + 1 if real_H.any() else 0, new_BKA.shape[1] - 1)
    kept = min(max(delay - 1, 0), steps)
    step_K = torch.arange(new_BKA.shape[1], device=new_BKA.device)
    share_K = (1 - (step_K - kept) / (steps - kept + 1)).clamp(0, 1).to(new_BKA)
    share_K[0], share_K[steps + 1 :] = 0.0, 0.0
    padded_BKA = torch.zeros_like(new_BKA)
    padded_BKA[:, 1 : steps + 1] = left_BHA[:, :steps]
    return torch.lerp(new_BKA, padded_BKA, share_K[None, :, None])
