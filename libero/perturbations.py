"""The perturbations of LIBERO's suites: magnitudes of each level, and changes of looks. `docs/robustness.md` shows it.

Objects keep their colours and sizes. `rearrangement.py` moves them, adds things and moves the arm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import mujoco
import numpy as np

from cogvla.envs.perturbation.appearance import (
    Appearance,
    draw_camera,
    draw_jolt,
    draw_light,
    draw_pale,
    draw_pattern,
)
from cogvla.envs.perturbation.perturbation import BACKGROUND, CAMERA, LAYOUT, LIGHT, ROBOT, Values, by_level, signed
from cogvla.envs.suite import EVERYWHERE

PERTURBATIONS: Mapping[str, Sequence[Values]] = MappingProxyType(
    {
        # as in the tabletop suites
        CAMERA: by_level(
            azimuth=([5, 15], [15, 30], [30, 50]),
            elevation=([3, 6], [6, 10], [10, 15]),
            roll=([0.3, 1], [1, 3], [3, 6]),
            distance=([1, 1.1], [1.1, 1.2], [1.2, 1.4]),
            width=([1, 1.05], [1.05, 1.12], [1.12, 1.25]),
            wrist_mm=([2, 5], [5, 10], [10, 20]),
            wrist_degrees=([0.5, 2], [2, 5], [5, 10]),
        ),
        LIGHT: by_level(
            dark=([0.8, 0.92], [0.62, 0.8], [0.4, 0.62]),
            bright=([1.05, 1.15], [1.15, 1.3], [1.3, 1.5]),
            degrees=([10, 25], [25, 40], [40, 55]),
            tint=([0.03, 0.08], [0.08, 0.2], [0.2, 0.3]),
            shadows=(False, False, False),  # walls would shade the room: lights turn through them
        ),
        # of table, walls and floor: relative change of the brightness, colour, difference of a pattern's brightnesses
        BACKGROUND: by_level(
            lightness=([0.1, 0.2], [0.1, 0.25], [0, 0.1]),
            saturation=([0, 0], [0.15, 0.35], [0.15, 0.35]),
            contrast=([0, 0], [0, 0], [0.1, 0.25]),
        ),
        **EVERYWHERE,
        # things that no instruction names; shift and turn of each thing that stands free on the table
        LAYOUT: by_level(
            distractors=(1, 2, 3),
            moved_mm=([8, 15], [15, 25], [25, 40]),
            turned_degrees=([0, 5], [5, 12], [12, 25]),
        ),
        # of the joints' start: length of the offset in radians; of the arm's base
        ROBOT: by_level(
            joints=([0.08, 0.15], [0.15, 0.25], [0.25, 0.4]),
            base_mm=([5, 15], [15, 30], [30, 50]),
        ),
    }
)
"""Dimension -> ranges of the levels 1, 2 and 3."""

SURFACES = {
    "table": ("table_texture", "table_mat", "living_room_table", "desk"),
    "walls": ("walls_mat",),
    "floor": ("floorplane",),
}
"""Surface -> names that its material has in one scene or another."""
_SIDES = re.compile(r"\b(left|right|front|back)\b|\bmiddle (?!drawer|layer)")
"""Words that say which one by its place on the table; the middle drawer is one of a stack."""
_PATTERN_SIZE = 256
_GREY = 0.55


def change_look(
    model: mujoco.MjModel,
    appearance: Appearance,
    dimension: str,
    rng: np.random.Generator,
    values: Values,
    height: float,
    instruction: str,
) -> dict[str, Any]:
    """Change cameras, lights or surfaces; return what was drawn.

    Args:
        model: the model of the scene.
        appearance: how it looks.
        dimension: one of `PERTURBATIONS` that changes the scene.
        rng: source of the draws.
        values: magnitudes of the level.
        height: of the table or floor that the objects stand on, in metres.
        instruction: what the policy is told. If it says left, right, front or back, the camera stays at the azimuth of
            level 1, so that this is still true in the picture.
    """
    pivot = _looked_at(model, height)
    if dimension == CAMERA:
        shift, turn = draw_jolt(rng, values)
        appearance.jolt("robot0_eye_in_hand", shift, turn)
        first = PERTURBATIONS[CAMERA][0]
        sides = {"azimuth": first["azimuth"], "roll": first["roll"]} if _SIDES.search(instruction) else {}
        orbit = draw_camera(rng, {**values, **sides})
        appearance.orbit("agentview", pivot, **orbit)
        degrees = float(np.rad2deg(np.linalg.norm(turn)))
        return {"wrist_mm": 1000 * float(np.linalg.norm(shift)), "wrist_degrees": degrees, **orbit}
    if dimension == LIGHT:
        light = draw_light(rng, values)
        appearance.light(pivot, **light)
        return {"gain": light["gain"], "degrees": light["angle"], "tint": light["tint"].tolist()}
    return {name: _repaint(model, appearance, rng, values, SURFACES[name]) for name in SURFACES}


def _looked_at(model: mujoco.MjModel, height: float) -> np.ndarray:
    """Return the point [3] at this height in the middle of `agentview`, as the model was built."""
    camera = model.camera("agentview")
    back = np.zeros(3)
    mujoco.mju_rotVecQuat(back, np.array([0.0, 0.0, 1.0]), camera.quat)
    return camera.pos - back * (camera.pos[2] - height) / back[2]


def _repaint(
    model: mujoco.MjModel, appearance: Appearance, rng: np.random.Generator, values: Values, names: Sequence[str]
) -> dict[str, Any]:
    lightness, contrast = signed(rng, values["lightness"]), signed(rng, values["contrast"])
    colour = draw_pale(rng, values["saturation"], _GREY)
    other = np.clip(colour + contrast, 0.0, 1.0)
    kind, pixels = draw_pattern(rng, _PATTERN_SIZE, (1 + lightness) * colour, (1 + lightness) * other)
    for name in names:
        if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_MATERIAL, name) < 0:
            continue
        if contrast:
            appearance.fill(name, pixels)
        else:
            appearance.tint(name, (1 + lightness) * colour / _GREY)
    drawn: dict[str, Any] = {"lightness": lightness}
    if values["saturation"][1]:
        drawn["rgb"] = colour.tolist()
    return drawn | ({"pattern": kind} if contrast else {})
