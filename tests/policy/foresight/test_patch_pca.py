"""Principal components of patches: what they keep, and what they lose."""

from __future__ import annotations

import pytest
import torch

from cogvla.policy.foresight.patch_pca import PatchPCA


def pictures(count: int = 12, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_all_components_lose_nothing_and_fewer_lose_the_smallest() -> None:
    pixels_XCHW, patch = pictures(40), 4
    whole, part = PatchPCA(patch, 3 * patch**2), PatchPCA(patch, 10)
    whole.fit(pixels_XCHW)
    part.fit(pixels_XCHW)
    drawn = whole.decode(whole.encode(pixels_XCHW), rows=4)
    torch.testing.assert_close(drawn, pixels_XCHW / 255, atol=1e-4, rtol=0)
    torch.testing.assert_close(part.basis_ED.T @ part.basis_ED, torch.eye(10), atol=1e-5, rtol=0)
    z_XND = whole.encode(pixels_XCHW)
    variance_D = z_XND.flatten(0, 1).var(dim=0)
    assert (variance_D.diff() <= 1e-5).all(), "components are in falling order"
    lost = part.change(pixels_XCHW, part.decode(part.encode(pixels_XCHW), rows=4)).mean()
    torch.testing.assert_close(lost, variance_D[10:].sum() * whole.scale**2 / 48, rtol=0.02, atol=0)


def test_what_is_lost_is_known_without_drawing() -> None:
    fitted, others = pictures(40), pictures(7, size=32, seed=1)
    for width in (1, 10, 48):
        pca = PatchPCA(4, width)
        pca.fit(fitted)
        z_XND = pca.encode(others)
        wanted_X = (others / 255 - pca.decode(z_XND, rows=8)).square().mean((-1, -2, -3))
        torch.testing.assert_close(pca.lost(others, z_XND), wanted_X, atol=1e-6, rtol=1e-4)


def test_latents_have_mean_zero_and_variance_one() -> None:
    pca = PatchPCA(4, 48)
    pca.fit(pictures())
    z_XND = pca.encode(pictures())
    assert z_XND.shape == (12, 16, 48)
    torch.testing.assert_close(z_XND.mean(dim=(0, 1)), torch.zeros(48), atol=1e-3, rtol=0)
    assert float(z_XND.square().mean()) == pytest.approx(1, abs=1e-3)


def test_patches_are_where_they_are_in_the_image() -> None:
    before, pca = pictures(1), PatchPCA(4, 48)
    after = before.clone()
    after[:, :, 4:8, 12:16] = 255 - after[:, :, 4:8, 12:16]
    assert (pca.change(before, after) > 0).nonzero().tolist() == [[0, 7]]
    assert (pca.encode(before) != pca.encode(after)).any(-1).nonzero().tolist() == [[0, 7]]


def test_other_image_sizes_and_impossible_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="images of 18 x 18 cannot be cut into patches of 4 x 4"):
        PatchPCA(4, 8).encode(pictures(size=18))
    for width in (0, 49):
        with pytest.raises(ValueError, match="has 1 to 48 components"):
            PatchPCA(4, width)
