"""Rotations as axis-angle vectors and as matrices, by MuJoCo's own conversions."""

from __future__ import annotations

import mujoco
import numpy as np


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis-angle [3] of a rotation matrix [3,3]; angle in [0, pi]."""
    quat = np.empty(4)
    vector = np.empty(3)
    mujoco.mju_mat2Quat(quat, rotation.reshape(9))
    mujoco.mju_quat2Vel(vector, quat, 1.0)
    return vector


def rotation_matrix(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3,3] of an axis-angle vector [3]."""
    angle = float(np.sqrt(vector @ vector))
    quat = np.array([1.0, 0.0, 0.0, 0.0])
    if angle > 1e-12:
        mujoco.mju_axisAngle2Quat(quat, vector / angle, angle)
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)
