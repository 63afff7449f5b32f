"""Any policy of lerobot (ACT, diffusion, SmolVLA, pi0, a plugin's) as a `Policy`: `checkpoint=lerobot:PATH`.

Each call stands alone: the policy is reset, reads one observation and answers with the actions that it would execute
until it looks again. What needs more, such as several observations, is refused.

Shape legend: B batch, K chunk, A action, H, W image, C colours.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import ActionChunk, Embodiment, Observation

IMAGES, STATE = "observation.images.", "observation.state"
LETTERBOXING = ("resize_imgs_with_padding", "image_resolution")
"""Fields of configurations whose policies bring images to their size themselves, and keep the aspect ratio."""


@dataclass(frozen=True)
class Parts:
    """The parts of a policy that lerobot loads from a checkpoint.

    Attributes:
        policy: the policy, on its device.
        before: preprocessor.
        after: postprocessor.
        cameras: camera of the embodiment -> key of the policy's image.
        description: facts for reports.
    """

    policy: Any
    before: Any
    after: Any
    cameras: Mapping[str, str]
    description: Mapping[str, Any] = field(default_factory=dict)


class LeRobotPolicy:
    """Run a policy of lerobot. The same observation gives the same actions, in any batch.

    Args:
        parts: what was loaded.
        embodiment: the robot; its chunk is what the policy executes before it looks again.
        seed: seed of a policy that draws random numbers, as diffusion and flow policies do.
    """

    def __init__(self, parts: Parts, embodiment: Embodiment, seed: int = 0) -> None:
        self._parts, self._embodiment, self._seed = parts, embodiment, seed
        self._draws = self._draws_numbers()

    @property
    def embodiment(self) -> Embodiment:
        return self._embodiment

    def describe(self) -> dict[str, Any]:
        """See `Policy.describe`."""
        parameters = list(self._parts.policy.parameters())
        return {
            "policy": f"lerobot {self._parts.policy.config.type}",
            "parameters": sum(p.numel() for p in parameters),
            "device": str(self._parts.policy.config.device),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "engine": "plain",
            **({"seed": self._seed} if self._draws else {}),
            **self._parts.description,
        }

    def reset(self) -> None:
        """Forget what the policy keeps of an episode."""
        for part in (self._parts.policy, self._parts.before, self._parts.after):
            part.reset()

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """See `Policy.warm_up`."""
        for _ in range(2):
            self.act(self._embodiment.fake_observation(batch))
        self.reset()

    def act(self, observation: Observation) -> ActionChunk:
        """See `Policy.act`. Policies that draw numbers see one observation after the other, each with its own seed."""
        observation.validate(self._embodiment)
        if not self._draws:
            return self._act(observation)
        rows = []
        for row in range(observation.batch_size):
            one = Observation(
                {name: image[row : row + 1] for name, image in observation.images.items()},
                observation.state[row : row + 1],
                observation.instruction[row : row + 1],
            )
            with torch.random.fork_rng(devices=_devices(self._parts.policy)):
                torch.manual_seed(zlib.crc32(one.state.tobytes() + one.instruction[0].encode(), self._seed))
                rows.append(self._act(one))
        timing = {name: sum(row.timing[name] for row in rows) for name in rows[0].timing}
        return ActionChunk(np.concatenate([row.actions for row in rows]), timing)

    @torch.inference_mode()
    def _act(self, observation: Observation) -> ActionChunk:
        start = time.perf_counter()
        self.reset()
        batch = self._parts.before(self._batch(observation))
        ready = time.perf_counter()
        # `predict_action_chunk` returns more than is executed, and needs what `select_action` has prepared.
        steps = [self._parts.policy.select_action(dict(batch)) for _ in range(self._embodiment.chunk)]
        actions_BKA = self._parts.after(torch.stack(steps, dim=1)).float().cpu().numpy()
        end = time.perf_counter()
        expected = (observation.batch_size, self._embodiment.chunk, self._embodiment.action_dim)
        if actions_BKA.shape != expected:
            raise ValueError(f"the policy returned actions of shape {list(actions_BKA.shape)}, not {list(expected)}")
        return ActionChunk(actions_BKA, {"preprocess_ms": 1e3 * (ready - start), "inference_ms": 1e3 * (end - ready)})

    def _batch(self, observation: Observation) -> dict[str, Any]:
        sizes = {camera.name: (camera.height, camera.width) for camera in self._embodiment.cameras}
        letterboxes = any(hasattr(self._parts.policy.config, name) for name in LETTERBOXING)
        batch: dict[str, Any] = {"task": list(observation.instruction)}
        for name, key in self._parts.cameras.items():
            image_BHWC = torch.from_numpy(np.require(observation.images[name], requirements=["C", "W"]))
            image_BCHW = rearrange(image_BHWC, "b h w c -> b c h w")
            if image_BCHW.shape[-2:] != sizes[name] and not letterboxes:
                image_BCHW = resize(image_BCHW, sizes[name])
            batch[key] = image_BCHW.float() / 255
        if STATE in self._parts.policy.config.input_features:
            batch[STATE] = torch.from_numpy(np.array(observation.state, np.float32))
        return batch

    def _draws_numbers(self) -> bool:
        """Return True if the policy has moved on torch's random numbers."""
        devices = _devices(self._parts.policy)
        with torch.random.fork_rng(devices=devices):
            before = _random_states(devices)
            self._act(self._embodiment.fake_observation(1))
            after = _random_states(devices)
        self.reset()
        return any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def _devices(policy: Any) -> list[torch.device]:
    device = torch.device(policy.config.device)
    return [device] if device.type == "cuda" else []


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
