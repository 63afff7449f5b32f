"""Read the poses of fixtures from a recorded model: a simulator's state does not hold them."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

JOINTS = ("joint", "freejoint")
TURNS = ("axisangle", "xyaxes", "zaxis", "euler")
"""Attributes of a body that turn it in another way than `quat`, which MuJoCo and robosuite write."""


def fixtures_of(model: str, where: str) -> dict[str, np.ndarray]:
    """Return body -> position (m) and quaternion (w, x, y, z) [7] of a model's fixtures.

    Fixtures are bodies NAME_main without a joint.

    Args:
        model: XML of the model. Its assets need not exist.
        where: file and demonstration, for messages.

    Raises:
        ValueError: it is no XML, or the pose of a fixture is no pose.
    """
    try:
        root = ElementTree.fromstring(model)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{where}: the attribute model_file is no XML ({error}): download the file again") from error
    found = {}
    for body in root.iterfind("worldbody/body"):
        name = str(body.get("name"))
        if not name.endswith("_main") or any(part.tag in JOINTS for part in body):
            continue
        if other := [key for key in TURNS if body.get(key)]:
            raise ValueError(
                f"{where}: model_file turns the fixture {name} by {other[0]}: load the model and save it with MuJoCo, "
                "which writes quat"
            )
        pose = f"{body.get('pos', '0 0 0')} {body.get('quat', '1 0 0 0')}"
        try:
            values_7 = np.array(pose.split(), np.float64)
        except ValueError:
            values_7 = np.empty(0)
        if values_7.shape != (7,) or not np.isfinite(values_7).all() or not np.linalg.norm(values_7[3:]) > 0:
            raise ValueError(f"{where}: in model_file, pos and quat of the fixture {name} are no pose: {pose}")
        found[name] = values_7
    return found
