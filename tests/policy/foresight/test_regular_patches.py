"""The patches of a view that always look alike."""

from __future__ import annotations

import math

import torch

from cogvla.policy.foresight.regular_patches import MOST, SMALL, RegularPatches


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """Latents [Z,1,12,8]: the last patches vary along one direction each, the first ones everywhere."""
    generator = torch.Generator().manual_seed(seed)
    z_ZVND = torch.randn(count, 1, 12, 8, generator=generator)
    z_ZVND[:, :, 4:] = 2.0 + z_ZVND[:, :, 4:, :1] * torch.eye(8)[3]
    return z_ZVND


def test_the_most_regular_patches_are_found_and_measured_outside_their_directions() -> None:
    regular = RegularPatches(1, 12, 8)
    regular.fit(pictures(200))
    assert sorted(regular.place_VM[0].tolist()) == list(range(4, 12)), "those that vary along one direction"
    assert regular.place_VM.shape == (1, MOST)
    fresh_ZVND = pictures(50, seed=1)
    torch.testing.assert_close(regular(fresh_ZVND), torch.full((50, 1, MOST), math.log(SMALL)), atol=0.05, rtol=0)
    moved_ZVND = fresh_ZVND.clone()
    moved_ZVND[:, :, 4:] += 2.0 * torch.eye(8)[5] + 7.0 * torch.eye(8)[3]
    found = regular(moved_ZVND)
    inside = regular.basis_VMDk[..., 5, :].square().sum(-1)  # part of the step along other kept directions, of noise
    wanted = ((4.0 * (1 - inside) / 8) + SMALL).log()
    torch.testing.assert_close(found, wanted.expand(50, 1, MOST), atol=0.2, rtol=0)


def test_few_patches_and_a_saved_state() -> None:
    regular = RegularPatches(2, 3, 4)
    assert regular.place_VM.shape == (2, 3)
    z_BVND = torch.randn(5, 2, 3, 4)
    regular.fit(torch.randn(50, 2, 3, 4))
    kept = regular.state_dict()
    other = RegularPatches(2, 3, 4)
    other.load_state_dict(kept)
    assert torch.equal(other(z_BVND), regular(z_BVND))
    assert torch.isfinite(regular(z_BVND)).all()
