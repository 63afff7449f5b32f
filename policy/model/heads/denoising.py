"""Heads that start from noise: diffusion and flow matching, which differ in the path from noise to action.

Time runs from 1 (noise) to 0 (action); between them a chunk is a mixture of both. The network learns to predict the
velocity along this path from the mixture, the time and the states of the action tokens. Following the velocity from
noise gives an action.

- `DiffusionHead`: the path is an arc, `cos(p) action + sin(p) noise` with `p = t pi/2`, which is the cosine schedule.
  The velocity is the v of Salimans and Ho (2022). A step of DDIM (Song et al. 2021, eta 0) is a rotation. Actions by
  diffusion: Chi et al. 2023.
- `FlowHead`: the path is a straight line, followed by Euler's method (Lipman et al. 2023; Liu et al. 2023). Training
  times are more often near the noise, as in pi0 (Black et al. 2024).

The rest of the policy runs once per chunk, only the `Denoiser` runs in every step. Decoding always starts from the same
noise. So actions depend on the observation only, not on the rest of the batch, and consecutive chunks choose the same
way if there are several.

Committed actions guide the decoding (real-time chunking, Black et al. 2025): in each step the chunk that the velocity
leads to is pulled towards them, and the velocity is the one that leads there. The strength follows the paper, without
its gradient through the network, so that a pass costs nothing more and can be recorded. Actions that will certainly be
executed are set to that value in every step.

Shape legend: as in `heads.interface`; S steps, E features of time. `...` is B when decoding, B R in training.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.model.heads.committed import CommittedInput
from cogvla.policy.model.heads.interface import ActionHead, HeadSizes

TIME_FEATURES = 32
NOISE_SEED = 0
GUIDANCE = 5.0
"""Largest guidance weight (beta in the paper)."""


def time_features(time: Tensor) -> Tensor:
    """Convert times [...] to sines and cosines [...,E] with periods from 8 down to 1/8, float32."""
    frequency_e = torch.logspace(-3, 3, TIME_FEATURES // 2, base=2.0, device=time.device)
    angle = 2 * math.pi * time[..., None].float() * frequency_e
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def pull(time: float) -> float:
    """Return the share in [0,1] by which guidance of weight 1 moves the chunk at a time, from 1 (noise) to 0.

    The guidance weight of the paper with s = 1 - t is min(beta, (1 - s) / s (s^2 + (1 - s)^2) / (1 - s)^2); a velocity
    that changes by so much moves the chunk by t times as much.
    """
    done = 1.0 - time
    weight = GUIDANCE if done == 0 else min(GUIDANCE, (done**2 + time**2) / (done * time))
    return min(1.0, time * weight)


class DenoisingBlock(nn.Module):
    """`x + Linear(GELU(Linear(LayerNorm(x))))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class Denoiser(nn.Module):
    """Predict the velocity of a noisy chunk from the states of the action tokens.

    The same MLP runs for each step of the chunk. It also reads the whole noisy chunk, so that all steps are consistent.
    """

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__()
        width = sizes.width
        self.see = nn.Sequential(nn.LayerNorm(sizes.joined), nn.Linear(sizes.joined, width))
        self.action = nn.Linear(sizes.action_dim, width)
        self.chunk = nn.Linear(sizes.chunk * sizes.action_dim, width)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(*(DenoisingBlock(width) for _ in range(sizes.blocks)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sizes.action_dim))

    def embed_time(self, time: Tensor) -> Tensor:
        """Embed times [...] as [...,D]."""
        return self.time(time_features(time).to(self.action.weight.dtype))

    def forward(self, seen: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """Predict velocities [...,K,A] from `see` [...,K,D], noisy actions and `embed_time` [...,D]."""
        noisy = noisy.to(self.action.weight.dtype)
        whole = self.chunk(rearrange(noisy, "... k a -> ... 1 (k a)"))
        return self.out(self.blocks(seen + self.action(noisy) + whole + time[..., None, :])).float()


class DenoisingHead(ActionHead):
    """Base of heads that follow a path from noise to action with a `Denoiser`."""

    error_name: ClassVar[str] = "mse"
    guided: ClassVar[bool] = True
    noise_KA: Tensor
    left_S: Tensor

    def __init__(self, sizes: HeadSizes) -> None:
        super().__init__(sizes)
        self.denoiser = Denoiser(sizes)
        self.times = [step / sizes.steps for step in range(sizes.steps, -1, -1)]
        generator = torch.Generator("cpu").manual_seed(NOISE_SEED)
        noise_KA = torch.randn(sizes.chunk, sizes.action_dim, generator=generator, device="cpu")
        self.register_buffer("noise_KA", noise_KA.to(torch.get_default_device()), persistent=False)
        # Integers stay exact when the model is converted to bfloat16.
        self.register_buffer("left_S", torch.arange(sizes.steps, 0, -1), persistent=False)

    @staticmethod
    @abstractmethod
    def training_time(uniform: Tensor) -> Tensor:
        """Convert uniform draws from [0,1) to training times."""

    @staticmethod
    @abstractmethod
    def mixture(action: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noisy action at a time, and its velocity."""

    @staticmethod
    @abstractmethod
    def follow(noisy: Tensor, velocity: Tensor, time: float, until: float) -> Tensor:
        """Step from the noisy action at `time` to the noisy action at `until`, an earlier time."""

    @staticmethod
    @abstractmethod
    def towards(noisy: Tensor, velocity: Tensor, time: float) -> tuple[Tensor, float]:
        """Return the actions to which a velocity leads, and its change when they change by 1, the noisy ones fixed."""

    def forward(self, states_BJD: Tensor, committed: CommittedInput | None = None) -> Tensor:
        """See `decode`."""
        return self.decode(states_BJD, committed=committed)

    def decode(
        self, states_BJD: Tensor, noise_BKA: Tensor | None = None, committed: CommittedInput | None = None
    ) -> Tensor:
        """Decode actions float32 [B,K,A].

        Args:
            states_BJD: states of the action tokens.
            noise_BKA: noise to start from; None: the head's fixed noise.
            committed: actions that guide the chunk; None: none. Weights of 0 give the same bits as None.
        """
        seen_BKD = self.denoiser.see(self.join(states_BJD))
        time_SD = self.denoiser.embed_time(self.left_S / self.sizes.steps)
        x_BKA = self.noise_KA.float().expand(len(seen_BKD), -1, -1) if noise_BKA is None else noise_BKA
        for time_D, time, until in zip(time_SD, self.times, self.times[1:], strict=False):
            velocity_BKA = self.denoiser(seen_BKD, x_BKA, time_D)
            if committed is not None:
                found_BKA, slope = self.towards(x_BKA, velocity_BKA, time)
                share_BK1 = torch.where(committed.sure, 1.0, pull(time) * committed.weight[..., None])
                velocity_BKA = velocity_BKA + slope * (share_BK1 * (committed.actions.float() - found_BKA))
            x_BKA = self.follow(x_BKA, velocity_BKA, time, until)
        return x_BKA

    def error(
        self, states_BJD: Tensor, expert_BKA: Tensor, noise_BRKA: Tensor | None = None, time_BR: Tensor | None = None
    ) -> Tensor:
        """Return the mean squared error of the velocity [B,K], over draws and the action's dimensions."""
        assert noise_BRKA is not None
        assert time_BR is not None
        time_BR = self.training_time(time_BR)
        seen_B1KD = self.denoiser.see(self.join(states_BJD))[:, None]
        noisy_BRKA, velocity_BRKA = self.mixture(expert_BKA[:, None], noise_BRKA, time_BR[..., None, None])
        found_BRKA = self.denoiser(seen_B1KD, noisy_BRKA, self.denoiser.embed_time(time_BR))
        return (found_BRKA - velocity_BRKA).square().mean(dim=(1, 3))


class DiffusionHead(DenoisingHead):
    """Diffusion: follow an arc by DDIM."""

    @staticmethod
    def training_time(uniform: Tensor) -> Tensor:
        return uniform

    @staticmethod
    def mixture(action: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (time * math.pi / 2).cos(), (time * math.pi / 2).sin()
        return cos * action + sin * noise, cos * noise - sin * action

    @staticmethod
    def follow(noisy: Tensor, velocity: Tensor, time: float, until: float) -> Tensor:
        angle = (time - until) * math.pi / 2
        return math.cos(angle) * noisy - math.sin(angle) * velocity

    @staticmethod
    def towards(noisy: Tensor, velocity: Tensor, time: float) -> tuple[Tensor, float]:
        cos, sin = math.cos(time * math.pi / 2), math.sin(time * math.pi / 2)
        return cos * noisy - sin * velocity, -1 / sin


class FlowHead(DenoisingHead):
    """Flow matching: follow a straight line by Euler's method."""

    @staticmethod
    def training_time(uniform: Tensor) -> Tensor:
        """Sample Beta(1.5, 1) by the inverse of its distribution function."""
        return uniform ** (1 / 1.5)

    @staticmethod
    def mixture(action: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - time) * action + time * noise, noise - action

    @staticmethod
    def follow(noisy: Tensor, velocity: Tensor, time: float, until: float) -> Tensor:
        return noisy - (time - until) * velocity

    @staticmethod
    def towards(noisy: Tensor, velocity: Tensor, time: float) -> tuple[Tensor, float]:
        return noisy - time * velocity, -1 / time
