"""What a camera always shows at the same place, such as the fingers in the picture of a wrist camera.

At each place of a view, the latents of normal pictures vary within a few directions: those of the fingers as they open,
say. The patches whose latents keep to them most regularly are the ones to look at: if the camera is turned or covered,
they show something else, for as long as it is so. No prediction is needed, and the picture before it may be wrong, too.

Shape legend: as in docs/architecture.md, with N patches of a view, M of them regular, D numbers of a latent, k kept
directions, Z pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST = 8
"""Patches of a view that are looked at."""
KEPT = 1 / 4
"""Share of the directions of a latent in which a patch may vary."""
SMALL = 1e-3


class RegularPatches(nn.Module):
    """Measure how far the most regular patches of each view are from what they normally show.

    Args:
        views: number V of views.
        patches: number N of patches of a view.
        latent: numbers D of a latent.
    """

    place_VM: Tensor
    mean_VMD: Tensor
    basis_VMDk: Tensor

    def __init__(self, views: int, patches: int, latent: int) -> None:
        super().__init__()
        most, self.kept = min(MOST, patches), int(KEPT * latent)
        self.register_buffer("place_VM", torch.arange(most).repeat(views, 1))
        self.register_buffer("mean_VMD", torch.zeros(views, most, latent))
        self.register_buffer("basis_VMDk", torch.eye(latent)[:, : self.kept].repeat(views, most, 1, 1))

    def fit(self, z_ZVND: Tensor) -> None:
        """Find the most regular patches of normal pictures: those whose `forward` varies least."""
        mean_VND = z_ZVND.mean(0)
        x_ZVND = (z_ZVND - mean_VND).double()
        _, basis_VNDD = torch.linalg.eigh(torch.einsum("zvnd,zvne->vnde", x_ZVND, x_ZVND))  # in rising order
        basis_VNDk = basis_VNDD[..., basis_VNDD.shape[-1] - self.kept :].to(z_ZVND.dtype)
        place_VM = _outside(z_ZVND, mean_VND, basis_VNDk).std(0).argsort(-1)[:, : self.place_VM.shape[1]]
        view_V1 = torch.arange(len(place_VM))[:, None]
        self.place_VM.copy_(place_VM)
        self.mean_VMD.copy_(mean_VND[view_V1, place_VM])
        self.basis_VMDk.copy_(basis_VNDk[view_V1, place_VM])

    def forward(self, z_BVND: Tensor) -> Tensor:
        """Return the logarithm [B,V,M] of the mean square of each regular patch outside its normal directions."""
        index_BVMD = self.place_VM[None, :, :, None].expand(len(z_BVND), -1, -1, z_BVND.shape[-1])
        return _outside(z_BVND.gather(2, index_BVMD), self.mean_VMD, self.basis_VMDk)


def _outside(z_BVND: Tensor, mean_VND: Tensor, basis_VNDk: Tensor) -> Tensor:
    """Return the logarithm [B,V,N] of the mean square of what lies outside the directions."""
    x_BVND = z_BVND - mean_VND
    along_BVNk = torch.einsum("bvnd,vndk->bvnk", x_BVND, basis_VNDk)
    left_BVN = x_BVND.square().sum(-1) - along_BVNk.square().sum(-1)
    return (left_BVN.clamp(min=0) / x_BVND.shape[-1] + SMALL).log()
