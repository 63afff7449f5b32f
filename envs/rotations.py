"""Convert rotations between axis-angle vectors and matrices, with MuJoCo's own functions."""

from __future__ import annotations

import mujoco
import numpy as np


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Convert a rotation matrix [3,3] to an axis-angle vector [3] with an angle in [0, pi]."""
    quat = np.empty(4)
    vector = np.empty(3)
    mujoco.mju_mat2Quat(quat, rotation.reshape(9))
    mujoco.mju_quat2Vel(vector, quat, 1.0)
    return vector


def rotation_matrix(vector: np.ndarray) -> np.ndarray:
    """Convert an axis-angle vector [3] to a rotation matrix [3,3]."""
    angle = float(np.sqrt(vector @ vector))
    quat = np.array([1.0, 0.0, 0.0, 0.0])
    if angle > 1e-12:
        mujoco.mju_axisAngle2Quat(quat, vector / angle, angle)
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, quat)
    return matrix.reshape(3, 3)
