"""Execution noise of scripted experts (DART, Laskey et al. 2017)."""

from __future__ import annotations

import numpy as np


class ExecutionNoise:
    """Small Gaussian noise at each step and, sometimes, a burst of a constant offset or an opened gripper.

    The data then shows how to recover from errors like those of a policy. The clean action remains the label.

    Args:
        rng: generator of the noise.
        scale: strength of the noise: 0 is none, 1 is the noise of recorded demonstrations.
    """

    def __init__(self, rng: np.random.Generator, scale: float) -> None:
        if scale < 0:
            raise ValueError(f"noise must be at least 0, got {scale}")
        self._rng = rng
        self._scale = scale
        self._burst = 0
        self._offset = np.zeros(7)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Return the noisy action to execute, float32 [7], for a clean action."""
        if self._scale == 0.0:
            return action
        rng, scale = self._rng, self._scale
        if self._burst > 0:
            self._burst -= 1
        else:
            self._offset = np.zeros(7)
            if rng.random() < 0.03 * scale:
                self._burst = int(rng.integers(2, 6))
                self._offset[:3] = rng.uniform(-0.5, 0.5, 3) * scale
                self._offset[3:6] = rng.uniform(-0.2, 0.2, 3) * scale
                if rng.random() < 0.05:
                    self._offset[6] = -2.0  # opens the gripper in any case
        executed = action + self._offset
        executed[:6] += rng.normal(0.0, 0.05 * scale, 6)
        return np.clip(executed, -1.0, 1.0).astype(np.float32)
