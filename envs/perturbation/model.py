"""Change cameras, lights and colours of a compiled MuJoCo model, and bring the nominal model back.

A model outlives an episode, so every reset restores the nominal arrays before it perturbs: nothing leaks from one
episode into the next. None of these changes needs a new rendering context.
"""

from __future__ import annotations

import mujoco
import numpy as np

from cogvla.envs.perturbation.perturbation import Perturbation, away

ARRAYS = ("cam_pos", "cam_quat", "cam_fovy", "light_dir", "light_diffuse", "geom_rgba", "mat_rgba")
HEADLIGHT = ("ambient", "diffuse")
LUMINANCE = np.array([0.299, 0.587, 0.114])


class NominalModel:
    """The cameras, lights and colours of a model as it was compiled."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model
        self._arrays = {name: getattr(model, name).copy() for name in ARRAYS}
        self._headlight = {name: np.copy(getattr(model.vis.headlight, name)) for name in HEADLIGHT}

    def restore(self) -> None:
        """Undo all changes."""
        for name, array in self._arrays.items():
            getattr(self._model, name)[:] = array
        for name, array in self._headlight.items():
            getattr(self._model.vis.headlight, name)[:] = array


def orbit(
    model: mujoco.MjModel,
    camera: int,
    pivot: np.ndarray,
    azimuth: float,
    elevation: float,
    distance: float,
    roll: float,
) -> None:
    """Move a camera of the world about a point that it keeps in view.

    Args:
        model: model to change.
        camera: index of the camera.
        pivot: the point [3] in the world.
        azimuth: angle about the vertical axis, in radians.
        elevation: angle upwards, in radians.
        distance: factor on the distance to the pivot.
        roll: angle about the line of sight, in radians.
    """
    sight = model.cam_pos[camera] - pivot
    side = np.cross([0.0, 0.0, 1.0], sight)
    turn = _product(_turn([0, 0, 1], azimuth), _turn(side / np.linalg.norm(side), -elevation))
    moved = np.zeros(3)
    mujoco.mju_rotVecQuat(moved, sight * distance, turn)
    model.cam_pos[camera] = pivot + moved
    model.cam_quat[camera] = _product(_product(turn, model.cam_quat[camera]), _turn([0, 0, 1], roll))


def shake(model: mujoco.MjModel, camera: int, shift: np.ndarray, axis: np.ndarray, angle: float) -> None:
    """Move a camera on its body by `shift` [3] in metres, and turn it about an axis [3] of its own by `angle`."""
    model.cam_pos[camera] += shift
    model.cam_quat[camera] = _product(model.cam_quat[camera], _turn(axis, angle))


def relight(model: mujoco.MjModel, perturbation: Perturbation, rng: np.random.Generator) -> None:
    """Change strength, colour and direction of all lights, and of the light at the camera."""
    low, high = ((0.8, 1.1), (0.65, 1.2), (0.45, 1.3))[perturbation.level - 1]
    tint = 1 + rng.uniform(-1, 1, 3) * perturbation.pick(0.08, 0.20, 0.35)
    gain = rng.uniform(low, high) * tint / (tint @ LUMINANCE)  # the tint keeps the luminance
    model.light_diffuse[:] *= gain
    for name in HEADLIGHT:
        getattr(model.vis.headlight, name)[:] *= gain
    angle = np.deg2rad(rng.uniform(*((10, 25), (25, 45), (45, 65))[perturbation.level - 1]))
    about = rng.uniform(-np.pi, np.pi)
    turn = _turn([np.cos(about), np.sin(about), 0.0], angle)
    for light in range(model.nlight):
        turned = np.zeros(3)
        mujoco.mju_rotVecQuat(turned, model.light_dir[light], turn)
        turned[2] = min(turned[2], -0.2)  # a light from below would show nothing
        model.light_dir[light] = turned / np.linalg.norm(turned)


def recolour(colours: np.ndarray, perturbation: Perturbation, rng: np.random.Generator, named: np.ndarray) -> None:
    """Change the colour of background surfaces in place.

    Level 1 changes the brightness, level 2 adds a pale hue, level 3 any colour that is not near a named one.

    Args:
        colours: colours [n,4] of the surfaces, in [0,1]; all get the same change.
        perturbation: gives the level.
        rng: source of the draws.
        named: colours [m,3] of things that instructions name.
    """
    if perturbation.level == 3:
        drawn = rng.uniform(0.1, 0.9, (256, 3))
        apart = np.linalg.norm(drawn[:, None] - named[None], axis=-1).min(axis=1) > 0.35
        far = np.linalg.norm(drawn - colours[0, :3], axis=-1) > 0.2
        colours[:, :3] = drawn[np.flatnonzero(apart & far)[0]]
        return
    colours[:, :3] += away(rng, 0.04, 0.10)
    if perturbation.level == 2:
        hue = rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3
        colours[:, :3] += 0.10 * np.cos(hue)
    np.clip(colours, 0, 1, out=colours)


def _turn(axis: object, angle: float) -> np.ndarray:
    quat = np.zeros(4)
    mujoco.mju_axisAngle2Quat(quat, np.asarray(axis, np.float64), angle)
    return quat


def _product(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    result = np.zeros(4)
    mujoco.mju_mulQuat(result, first, second)
    return result
