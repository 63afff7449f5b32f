"""Read the original LIBERO demonstrations: one HDF5 file for each task, as the LIBERO project distributes them.

    TASK_demo.hdf5
      data                    problem_info (JSON), bddl_file_name, env_args (JSON), num_demos, total
        demo_N                num_samples, model_file (XML), init_state
          actions [T,7]       position, rotation, gripper (-1 open, +1 close)
          states [T,D]        time, positions, velocities, *before* the action of the same row
          robot_states [T,9]  fingers (2), position (3), quaternion x, y, z, w (4)
          rewards, dones [T]
          obs                 each row was observed *after* the action of the same row
            agentview_rgb, eye_in_hand_rgb [T,128,128,3]  rows from the bottom up
            ee_pos [T,3], ee_ori [T,3], ee_states [T,6], gripper_states [T,2], joint_states [T,7]

This module also reads the files of the published regeneration. They have no attributes, images of 256 x 256 pixels,
observations from before the action, and ten waiting steps between the first state and the first action.

Shape legend: T steps, D numbers of the flattened MuJoCo state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

SUFFIX = "_demo.hdf5"
ACTIONS, STATES = "actions", "states"
IMAGES = {"agentview": "obs/agentview_rgb", "wrist": "obs/eye_in_hand_rgb"}
POSITION, ROTATION, FINGERS = "obs/ee_pos", "obs/ee_ori", "obs/gripper_states"
VERSION_ATTRIBUTES = {"mujoco": "mujoco_version", "robosuite": "robosuite_version"}
"""Package -> attribute with the version that recorded the file. The original files do not have these attributes."""


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations of one task.

    Attributes:
        path: the file.
        task: name of the task in its suite.
        suite: name of the suite, or None if the file does not name it.
        keys: `demo_0`, `demo_1`, ...
        regenerated: True for a file of the published regeneration, see above.
        versions: package -> version of the simulator; empty if the file does not say.
    """

    path: Path
    task: str
    suite: str | None
    keys: tuple[str, ...]
    regenerated: bool
    versions: dict[str, str]


@dataclass(frozen=True)
class Recording:
    """One demonstration without its images.

    Attributes:
        actions_TA: float64 [T,7].
        states_TD: float64 [T,D].
        observed_TS: float32 [T,8], position, axis-angle and fingers as stored; None if one of them is missing.
        fixtures: body -> position and quaternion (w, x, y, z) [7] of fixtures, from the recorded model; the state does
            not hold them. Empty if the file has no model.
    """

    actions_TA: np.ndarray
    states_TD: np.ndarray
    observed_TS: np.ndarray | None
    fixtures: dict[str, np.ndarray]


def is_hdf5(source: Path) -> bool:
    """Return True if this is an HDF5 file, or a folder with LIBERO demonstrations."""
    return source.name.endswith(".hdf5") if source.is_file() else any(source.glob(f"*{SUFFIX}"))


def demonstrations(source: Path) -> list[Demonstrations]:
    """List the demonstrations in a file, or in all files of a folder.

    Raises:
        ValueError: there is no file of demonstrations, or one cannot be read.
    """
    files = [source] if source.is_file() else sorted(source.glob(f"*{SUFFIX}"))
    if not files:
        raise ValueError(f"there are no LIBERO demonstrations (TASK{SUFFIX}) in {source}")
    return [_demonstrations(path) for path in files]


def _demonstrations(path: Path) -> Demonstrations:
    with _opened(path) as file:
        data = file["data"]
        keys = [key for key in data if key.startswith("demo_") and key.removeprefix("demo_").isdigit()]
        if not keys:
            raise ValueError(f"{path} holds no demonstrations (demo_0, demo_1, ...)")
        return Demonstrations(
            path=path,
            task=path.name.removesuffix(".hdf5").removesuffix("_demo"),
            suite=_suite(str(data.attrs.get("bddl_file_name", ""))),
            keys=tuple(sorted(keys, key=lambda key: int(key.removeprefix("demo_")))),
            regenerated="problem_info" not in data.attrs,
            versions=_versions(dict(data.attrs)),
        )


def _suite(bddl_file: str) -> str | None:
    """`.../bddl_files/libero_object/pick_up_the_milk.bddl` -> `libero_object`."""
    parts = Path(bddl_file).parts
    return parts[-2] if len(parts) > 1 and parts[-2].startswith("libero_") else None


def _versions(attributes: dict[str, Any]) -> dict[str, str]:
    found = {package: str(attributes[key]) for package, key in VERSION_ATTRIBUTES.items() if key in attributes}
    try:
        recorded = json.loads(attributes.get("env_args", "{}")).get("env_version")  # robomimic's files have this key
    except (ValueError, AttributeError):
        recorded = None
    return ({"robosuite": str(recorded)} if recorded else {}) | found


def read(path: Path, key: str) -> Recording:
    """Read one demonstration without its images.

    Raises:
        ValueError: the file is damaged, a part is missing, lengths differ, or values are not finite.
    """
    with _opened(path) as file:
        demo = file["data"][key]
        actions_TA, states_TD = (np.asarray(demo[name][()], np.float64) for name in (ACTIONS, STATES))
        named = [name for name in (POSITION, ROTATION, FINGERS) if name in demo]
        observed_TS = None
        if len(named) == 3:
            observed_TS = np.concatenate([demo[name][()] for name in named], axis=1).astype(np.float32)
        model = demo.attrs.get("model_file")
    if actions_TA.ndim != 2 or actions_TA.shape[1] != 7 or not len(actions_TA):
        raise ValueError(f"{path}: {key} must have actions of shape [T,7], got {actions_TA.shape}")
    for name, values in (("states", states_TD), ("observations", observed_TS)):
        if values is not None and len(values) != len(actions_TA):
            raise ValueError(f"{path}: {key} has {len(actions_TA)} actions and {len(values)} {name}")
    if not (np.isfinite(actions_TA).all() and np.isfinite(states_TD).all()):
        raise ValueError(f"{path}: {key} holds NaN or infinite values: delete this demonstration from the file")
    return Recording(actions_TA, states_TD, observed_TS, {} if model is None else _fixtures(model))


def read_images(path: Path, key: str, camera: str, rows: list[int]) -> np.ndarray:
    """Read some images of `agentview` or `wrist` as stored, uint8 [F,H,W,3].

    Raises:
        ValueError: the file has no images of this camera.
    """
    with _opened(path) as file:
        return np.stack([file["data"][key][IMAGES[camera]][row] for row in rows])


def _fixtures(model: str | bytes) -> dict[str, np.ndarray]:
    """Return body -> pose [7] of the fixtures in a model's XML: bodies NAME_main without a joint."""
    found = {}
    for body in ElementTree.fromstring(model).iterfind("worldbody/body"):
        name, joints = str(body.get("name")), [part for part in body if part.tag in ("joint", "freejoint")]
        if name.endswith("_main") and not joints:
            found[name] = np.array(f"{body.get('pos', '0 0 0')} {body.get('quat', '1 0 0 0')}".split(), np.float64)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError("HDF5 files need h5py: install the extra `libero`") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError) as error:  # h5py raises both for files that are damaged or have other contents
        raise ValueError(f"{path} is damaged or is not a file of LIBERO demonstrations ({error})") from error
