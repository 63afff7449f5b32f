"""Latents of image patches: their principal components, which need no training and can be drawn again.

Frozen, so that a predictor cannot make its task easier by making the latents say less, and one fixed space in which
predictors are compared.

Shape legend: X images, N patches of an image, E numbers of a patch, D components, f patches of all images,
F numbers of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CHANGED = 1e-3
"""Mean squared difference of the pixels of a patch (0 to 1) above which it changes."""


class PatchPCA(nn.Module):
    """z = W (x - mean) / scale for each patch x of an image, with orthonormal rows W; drawn again by its transpose.

    Args:
        patch: height and width of a patch in pixels.
        width: number D of components; with all 3 * patch² of them nothing is lost.

    Raises:
        ValueError: there are not that many components.
    """

    mean_E: Tensor
    basis_ED: Tensor
    scale: Tensor

    def __init__(self, patch: int = 16, width: int = 32) -> None:
        super().__init__()
        numbers = 3 * patch**2
        if patch < 1 or not 1 <= width <= numbers:
            raise ValueError(f"a patch of {patch} x {patch} pixels has 1 to {numbers} components, got {width}")
        self.patch, self.width = patch, width
        self.register_buffer("mean_E", torch.zeros(numbers))
        self.register_buffer("basis_ED", torch.eye(numbers)[:, :width].contiguous())
        self.register_buffer("scale", torch.ones(()))

    def fit(self, pixels_XCHW: Tensor) -> None:
        """Compute mean, components and scale from images, uint8 [X,3,H,W]; the scale makes the variance of z 1."""
        self._check(pixels_XCHW)
        x_fE = rearrange(pixels_XCHW / 255, "x c (h p) (w q) -> (x h w) (c p q)", p=self.patch, q=self.patch)
        mean_E = x_fE.mean(dim=0)
        centred_fE = x_fE - mean_E
        _, basis_EE = torch.linalg.eigh((centred_fE.T @ centred_fE).double())  # in rising order
        self.mean_E.copy_(mean_E)
        self.basis_ED.copy_(basis_EE.flip(1)[:, : self.width])
        self.scale.copy_((centred_fE @ self.basis_ED).square().mean().sqrt().clamp(min=1e-6))

    def encode(self, pixels_XCHW: Tensor) -> Tensor:
        """Return the latents [X,N,D] of images uint8 [X,3,H,W].

        Raises:
            ValueError: height or width is no multiple of the patch size.
        """
        self._check(pixels_XCHW)
        z_XDHW = F.conv2d(pixels_XCHW.to(self.scale.dtype), self._kernel / 255, stride=self.patch)
        return (z_XDHW.flatten(2).mT - self.mean_E @ self.basis_ED) / self.scale

    def decode(self, z_XND: Tensor, rows: int) -> Tensor:
        """Draw latents with so many rows of patches: float32 [X,3,H,W], about 0 to 1."""
        z_XDHW = (z_XND * self.scale).mT.unflatten(2, (rows, -1))
        return F.conv_transpose2d(z_XDHW, self._kernel, stride=self.patch) + self._mean(rows, z_XDHW.shape[3])

    def lost(self, pixels_XCHW: Tensor, z_XND: Tensor) -> Tensor:
        """Return the mean squared difference [X] of images, uint8, and their latents drawn again, without drawing them.

        The components are orthonormal, so what they keep and what they lose add up.
        """
        height, width = pixels_XCHW.shape[-2:]
        mean_F = self._mean(height // self.patch, width // self.patch).flatten()
        x_XF = pixels_XCHW.to(mean_F.dtype).flatten(1)
        square_X = torch.linalg.vector_norm(x_XF, dim=1).square() / 255**2
        far_X = square_X - x_XF @ (mean_F * (2 / 255)) + mean_F @ mean_F
        return ((far_X - (z_XND * self.scale).square().sum((-1, -2))) / len(mean_F)).clamp(min=0)

    def change(self, before_XCHW: Tensor, after_XCHW: Tensor) -> Tensor:
        """Return the mean squared difference [X,N] of the pixels of patches; both 0 to 1, or uint8."""
        before, after = (x / 255 if x.dtype == torch.uint8 else x for x in (before_XCHW, after_XCHW))
        return F.avg_pool2d((after - before).square().mean(1), self.patch).flatten(1)

    def changed(self, before_BVCHW: Tensor, after_BVCHW: Tensor) -> Tensor:
        """Return which patches of all views change, bool [B,V,N]; see `change` and `CHANGED`."""
        change_XN = self.change(before_BVCHW.flatten(0, 1), after_BVCHW.flatten(0, 1))
        return change_XN.unflatten(0, before_BVCHW.shape[:2]) > CHANGED

    def _mean(self, rows: int, columns: int) -> Tensor:
        return self.mean_E.view(3, self.patch, self.patch).repeat(1, rows, columns)

    @property
    def _kernel(self) -> Tensor:
        return self.basis_ED.T.reshape(self.width, 3, self.patch, self.patch)

    def _check(self, pixels_XCHW: Tensor) -> None:
        height, width = pixels_XCHW.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height} x {width} cannot be cut into patches of {self.patch} x {self.patch}")
