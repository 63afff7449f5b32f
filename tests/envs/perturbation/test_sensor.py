"""Faults of cameras: each one, the same each time, stronger with the level, and apart for each camera."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from cogvla.envs.perturbation.perturbation import LEVELS, Perturbation
from cogvla.envs.perturbation.sensor import FAULTS, FaultySensor

RNG = np.random.default_rng(0)
SMOOTH = np.kron(RNG.integers(40, 200, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
IMAGES = {"agentview": SMOOTH, "wrist": SMOOTH.copy()}


def sensor(fault: str, level: int) -> FaultySensor:
    """The first episode with this fault."""
    for state in count():
        perturbation = Perturbation("sensor", level)
        found = FaultySensor(perturbation, perturbation.seed("toy", 0, state))
        if found.fault == fault:
            return found
    raise AssertionError


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "late"])
def test_faults_grow_with_the_level_and_repeat(fault: str) -> None:
    changes = []
    for level in LEVELS:
        seen = sensor(fault, level)(IMAGES, 3)
        again = sensor(fault, level)(IMAGES, 3)
        assert all(np.array_equal(seen[name], again[name]) for name in IMAGES)
        assert all(image.dtype == np.uint8 and image.shape == SMOOTH.shape for image in seen.values())
        changes.append(np.abs(seen["agentview"].astype(float) - SMOOTH).mean())
    assert changes[0] > 0
    if fault != "exposure":  # its gain is drawn, and may be near 1 at any level
        assert changes[0] < changes[1] < changes[2]


def test_noise_differs_between_cameras_and_steps() -> None:
    faulty = sensor("noise", 2)
    first, later = faulty(IMAGES, 0), faulty(IMAGES, 1)
    assert not np.array_equal(first["agentview"], first["wrist"])
    assert not np.array_equal(first["agentview"], later["agentview"])


def test_late_frames_are_frames_of_before() -> None:
    faulty = sensor("late", 3)
    sent = [{"agentview": np.full((4, 4, 3), step, np.uint8)} for step in range(60)]
    shown = [int(faulty(images, step)["agentview"][0, 0, 0]) for step, images in enumerate(sent)]
    late = [step for step in range(60) if shown[step] != step]
    assert shown[0] == 0
    assert all(shown[step] == shown[step - 1] for step in late)
    assert 15 < len(late) < 45


def test_motion_blur_keeps_flat_areas() -> None:
    flat = {"agentview": np.full((32, 32, 3), 90, np.uint8)}
    assert np.array_equal(sensor("motion", 3)(flat, 0)["agentview"], flat["agentview"])
