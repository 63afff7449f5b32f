"""Predict what the cameras show at the end of the chunk, as in Seer and VLA-JEPA; needs no labels of a simulator.

A head reads the policy's vision tokens and the state, but not the actions: what the actions say would not have to be
in the tokens. It predicts the principal components z' of the patches of the frame that is K steps later. They are
computed once from the data and stay frozen, so that nothing collapses:

    prediction = z + head(tokens, state)           loss = mean over patches of w |prediction - z'|

where patches whose pixels change have half of the weight of their view, the others the other half.
`objective.foresight_target=present` is the control: the same head draws the present frame from the tokens, prediction =
head(tokens, state) of z, with the same weights. What only the control reaches is no use of looking ahead.

The state is never hidden here. Samples whose episode ends before, or whose instruction was swapped, do not count.

Shape legend: as in docs/architecture.md, with E numbers of a patch's latent, P patches of a view.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.inputs.patch_pca import PatchPCA

TARGETS = ("future", "present")
PATCH, LATENT = 16, 32
FRAMES = 256
"""Frames whose patches give the principal components."""


@dataclass(frozen=True)
class Seen:
    """Frozen latents of the pictures of a batch, now and at the end of the chunk.

    Attributes:
        now_BVPE: latents of the pictures.
        later_BVPE: latents of the pictures at the end of the chunk.
        weight_BVP: weight of each patch, with mean 1 over the step.
        state_BS: normalised state, never hidden.
    """

    now_BVPE: Tensor
    later_BVPE: Tensor
    weight_BVP: Tensor
    state_BS: Tensor


class FrozenLatents:
    """Principal components of the patches of a data set.

    Args:
        data: the data set, the same whenever a run resumes.

    Raises:
        ValueError: its images cannot be cut into patches.
    """

    def __init__(self, data: DemonstrationData) -> None:
        self.pca = PatchPCA(PATCH, LATENT)
        rows = torch.linspace(0, len(data.episode_N) - 1, min(FRAMES, len(data.episode_N))).long()
        try:
            self.pca.fit(torch.from_numpy(data.frames.take(rows.numpy())).flatten(0, 1))
        except ValueError as error:
            raise ValueError(f"objective.foresight: {error}; set it to 0") from error

    @torch.no_grad()
    def __call__(self, now_BVCHW: Tensor, later_BVCHW: Tensor, state_BS: Tensor, weight_B: Tensor) -> Seen:
        """Return the latents of pictures, uint8 [B,V,3,H,W], which are changed in the same way."""
        pca, views = self.pca.to(now_BVCHW.device), now_BVCHW.shape[1]
        now_XCHW, later_XCHW = now_BVCHW.flatten(0, 1), later_BVCHW.flatten(0, 1)
        changed_BVP = pca.changed(now_BVCHW, later_BVCHW)
        now_BVPE, later_BVPE = (pca.encode(x_XCHW).unflatten(0, (-1, views)) for x_XCHW in (now_XCHW, later_XCHW))
        weight_BVP = patch_weights(changed_BVP) * weight_B[:, None, None].to(now_BVPE)
        return Seen(now_BVPE, later_BVPE, weight_BVP, state_BS)


def patch_weights(changed_BVP: Tensor) -> Tensor:
    """Return weights with mean 1 over the patches of a view, half of it on those that change, where some do."""
    share_BV1 = changed_BVP.float().mean(dim=-1, keepdim=True)
    weight_BVP = torch.where(changed_BVP, 0.5 / share_BV1, 0.5 / (1 - share_BV1))
    return torch.where((share_BV1 > 0) & (share_BV1 < 1), weight_BVP, 1.0)


def when(samples: dict[str, Any], instruction_B: Tensor) -> Tensor:
    """Return the weight of each sample [B], with mean 1; 0 where there is no later frame or the instruction is other's.

    Args:
        samples: columns of a step, with `later_is_pad`.
        instruction_B: index of the instruction that the policy gets.
    """
    weight_B = (~samples["later_is_pad"] & (instruction_B == samples["instruction_id"])).float()
    return weight_B / weight_B.mean().clamp(min=1e-6)


class ForesightHead(nn.Module):
    """Predict latents from vision tokens [B,N,D] and the state; used in training only.

    Args:
        tokens: N.
        width: D.
        state: S.
        views: V.
        patches: P.
        target: one of `TARGETS`.
        hidden: width of the hidden layer.
    """

    def __init__(
        self, tokens: int, width: int, state: int, views: int, patches: int, target: str, hidden: int = 128
    ) -> None:
        super().__init__()
        self.views, self.patches, self.target = views, patches, target
        self.tokens = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 32), nn.Flatten(), nn.GELU(), nn.Linear(32 * tokens, hidden)
        )
        self.state = nn.Linear(state, hidden)
        self.write = nn.Linear(hidden, views * patches * LATENT)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, vision_BND: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """Return the loss, and for comparison that of copying the present frame."""
        written = self.write(nn.functional.gelu(self.tokens(vision_BND) + self.state(seen.state_BS)))
        found_BVPE = rearrange(written, "b (v p e) -> b v p e", v=self.views, p=self.patches)
        copied = latent_l1(seen.now_BVPE, seen.later_BVPE, seen.weight_BVP)
        if self.target == "present":
            return latent_l1(found_BVPE, seen.now_BVPE, seen.weight_BVP), copied
        return latent_l1(seen.now_BVPE + found_BVPE, seen.later_BVPE, seen.weight_BVP), copied


def latent_l1(found_BVPE: Tensor, target_BVPE: Tensor, weight_BVP: Tensor) -> Tensor:
    """Return the weighted mean absolute error."""
    return ((found_BVPE.float() - target_BVPE).abs().mean(dim=-1) * weight_BVP).mean()
