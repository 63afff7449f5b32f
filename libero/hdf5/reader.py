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

Everything in a file is checked against itself.

Shape legend: T steps, D numbers of the flattened MuJoCo state.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cogvla.files import visible
from cogvla.libero.hdf5.fixtures import fixtures_of
from cogvla.libero.hdf5.hdf5_file import contents, count, json_object, numbers, opened, text
from cogvla.libero.tasks import LIBERO_SUITES, suites_of

SUFFIX = "_demo.hdf5"
ACTIONS, STATES = "actions", "states"
IMAGES = {"agentview": "obs/agentview_rgb", "wrist": "obs/eye_in_hand_rgb"}
POSITION, ROTATION, FINGERS = "obs/ee_pos", "obs/ee_ori", "obs/gripper_states"
POSE = "obs/ee_states"
CONTROL_HZ, CONTROLLER, ROBOT = 20, "OSC_POSE", "Panda"
ACTION_SCALE = {
    "control_delta": True,
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05] * 3 + [0.5] * 3,
    "output_min": [-0.05] * 3 + [-0.5] * 3,
}
"""Settings of the controller that say what a number of an action is: a share of these steps (m, rad)."""
VERSION_ATTRIBUTES = {"mujoco": "mujoco_version", "robosuite": "robosuite_version"}
"""Package -> attribute with the version that recorded the file. The original files do not have these attributes."""


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations of one task.

    Attributes:
        path: the file.
        task: name of the task in its suite.
        suite: name of the LIBERO suite: the one that the file names, or the only one with this task; or None.
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
    return source.name.endswith(".hdf5") if source.is_file() else bool(visible(source, f"*{SUFFIX}"))


def demonstrations(source: Path) -> list[Demonstrations]:
    """List the demonstrations in a file, or in all files of a folder that are not hidden.

    Raises:
        ValueError: there is no file of demonstrations, or one cannot be read or contradicts itself.
    """
    files = [source] if source.is_file() else visible(source, f"*{SUFFIX}")
    if not files:
        raise ValueError(f"there are no LIBERO demonstrations (TASK{SUFFIX}) in {source}")
    return [_demonstrations(path) for path in files]


def _demonstrations(path: Path) -> Demonstrations:
    where, task = str(path), path.name.removesuffix(".hdf5").removesuffix("_demo")
    with opened(path) as file:
        data = _group(file, "data", where)
        attributes, keys = data.attrs, list(data)
        numbered = [key for key in keys if key.startswith("demo_") and key.removeprefix("demo_").isdigit()]
        if not numbered:
            there = ", ".join(keys) or "nothing"
            raise ValueError(f"{where} holds no demonstrations (data/demo_0, ...); its data has {there}")
        if other := sorted(set(keys) - set(numbered)):
            raise ValueError(f"{where}: data has {', '.join(other)} beside its demonstrations (demo_0, ...): remove it")
        stated = count(attributes, "num_demos", where)
        if stated is not None and stated != len(numbered):
            raise ValueError(
                f"{where}: the attribute num_demos is {stated}, the file has {len(numbered)} demonstrations: download "
                "it again, or correct the attribute if you have removed some"
            )
        suite, named = _origin(text(attributes, "bddl_file_name", where) or "", task)
        if named != task and suites_of(named):
            raise ValueError(f"{where} is of the task {named}, says its bddl_file_name: name it {named}{SUFFIX}")
        problem = json_object(attributes, "problem_info", where)
        if problem is not None and not _words(problem.get("language_instruction")):
            raise ValueError(f"{where}: the attribute problem_info has no language_instruction")
        environment = json_object(attributes, "env_args", where) or {}
        _check_environment(environment, where)
        versions = {"robosuite": str(environment["env_version"])} if environment.get("env_version") else {}
        for package, name in VERSION_ATTRIBUTES.items():
            if version := text(attributes, name, where):
                versions[package] = version
    ordered = tuple(sorted(numbered, key=lambda key: int(key.removeprefix("demo_"))))
    return Demonstrations(path, task, suite, ordered, problem is None, versions)


def _words(instruction: Any) -> bool:
    """Return True for text, or a list of words."""
    words = [instruction] if isinstance(instruction, str) else instruction
    return isinstance(words, list) and all(isinstance(word, str) for word in words) and bool("".join(words).strip())


def _group(parent: Any, name: str, where: str) -> Any:
    """Return a group; ValueError if it is missing."""
    import h5py

    group = parent.get(name)
    if not isinstance(group, h5py.Group):
        raise ValueError(
            f"{where} has no group {name!r}, so it is no file of LIBERO demonstrations; it has {contents(parent)}"
        )
    return group


def _origin(bddl_file: str, task: str) -> tuple[str | None, str]:
    """`.../bddl_files/libero_object/pick_the_milk.bddl` -> `libero_object`, `pick_the_milk`.

    Published files have names of suites and tasks from before they were published, such as `libero_100` or these words
    for `pick_up_the_milk`. Then the suite is the one that has the task that the file is named after.
    """
    path = Path(bddl_file.replace("\\", "/"))
    homes = suites_of(task)
    suite = path.parent.name if path.parent.name in LIBERO_SUITES else homes[0] if len(homes) == 1 else None
    return suite, path.stem if path.suffix == ".bddl" else task


def _check_environment(environment: dict[str, Any], where: str) -> None:
    """Check that actions have the meaning of LIBERO's; ValueError if the file says otherwise."""
    settings = environment.get("env_kwargs") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: env_kwargs in the attribute env_args must be a JSON object")
    controller = settings.get("controller_configs") or {}
    kind = controller.get("type") if isinstance(controller, dict) else controller
    given = controller if isinstance(controller, dict) else {}
    robots = settings.get("robots") or ROBOT
    for name, found, expected in (
        ("control_freq", settings.get("control_freq", CONTROL_HZ), CONTROL_HZ),
        ("controller_configs", CONTROLLER if kind is None else kind, CONTROLLER),
        ("robots", ROBOT if ROBOT in str(robots) else robots, ROBOT),
        *((f"controller_configs.{name}", given.get(name, value), value) for name, value in ACTION_SCALE.items()),
    ):
        if found != expected:
            raise ValueError(
                f"{where}: env_args has {name} {found}, LIBERO's is {expected}: its actions have another meaning"
            )


def read(path: Path, key: str) -> Recording:
    """Read one demonstration without its images.

    Raises:
        ValueError: a part is missing or damaged, has no numbers or another shape, lengths differ, or values are not
            finite.
    """
    where = f"{path}: {key}"
    with opened(path) as file:
        demo = _group(_group(file, "data", str(path)), key, str(path))
        actions_TA, states_TD = numbers(demo, ACTIONS, 7, where), numbers(demo, STATES, None, where)
        _check_lengths(demo, len(actions_TA), where)
        observed_TS = _observed(demo, where)
        model = text(demo.attrs, "model_file", where)
    return Recording(actions_TA, states_TD, observed_TS, {} if model is None else fixtures_of(model, where))


def digest(file: Demonstrations) -> str:
    """Hash all that a replay does: actions, states and models, but not the images, which are nearly all of the file.

    Raises:
        ValueError: a part is damaged.
    """
    found = hashlib.sha256()
    with opened(file.path) as opened_file:
        for key in file.keys:
            demo = _group(_group(opened_file, "data", str(file.path)), key, str(file.path))
            found.update(f"{key} {demo.attrs.get('model_file')}".encode())
            for name in (ACTIONS, STATES):
                found.update(numbers(demo, name, None, f"{file.path}: {key}").tobytes())
    return found.hexdigest()[:16]


def _check_lengths(demo: Any, steps: int, where: str) -> None:
    """Check that everything in a demonstration has one row for each action."""
    import h5py

    lengths: dict[str, int] = {}

    def measure(name: str, part: Any) -> None:
        if isinstance(part, h5py.Dataset) and part.ndim:
            lengths[name] = len(part)

    demo.visititems(measure)
    stated = count(demo.attrs, "num_samples", where)
    lengths |= {} if stated is None else {"num_samples": stated}
    other = [f"{length} {name}" for name, length in lengths.items() if length != steps]
    if other:
        raise ValueError(f"{where} has {steps} actions, but {', '.join(other)}: download the file again")


def _observed(demo: Any, where: str) -> np.ndarray | None:
    """Return position, axis-angle and fingers [T,8], or None if one of them is missing."""
    pose_T6 = numbers(demo, POSE, 6, where) if POSE in demo else None
    if POSITION in demo and ROTATION in demo:
        parts_T6 = np.concatenate([numbers(demo, POSITION, 3, where), numbers(demo, ROTATION, 3, where)], axis=1)
        if pose_T6 is not None and not np.allclose(pose_T6, parts_T6, atol=1e-5):
            raise ValueError(f"{where}: {POSE} is not {POSITION} with {ROTATION}: download the file again")
        pose_T6 = parts_T6
    if pose_T6 is None or FINGERS not in demo:
        return None
    return np.concatenate([pose_T6, numbers(demo, FINGERS, 2, where)], axis=1).astype(np.float32)


def lacks(path: Path, key: str) -> tuple[list[str], str]:
    """Return the names of the images and observed states that a demonstration lacks, and in words what it has."""
    with opened(path) as file:
        demo = file["data"][key]
        wanted = [*IMAGES.values(), *([] if POSE in demo else [POSITION, ROTATION]), FINGERS]
        return [name for name in wanted if name not in demo], contents(demo)


def read_images(path: Path, key: str, camera: str, rows: list[int]) -> np.ndarray:
    """Read some images of `agentview` or `wrist` as stored, uint8 [F,H,W,3].

    Raises:
        ValueError: the file has no images of this camera, or they have another type or shape.
    """
    where, name = f"{path}: {key}", IMAGES[camera]
    with opened(path) as file:
        demo = file["data"][key]
        if name not in demo:
            raise ValueError(f"{where} has no images {name!r} of {camera}; it has {contents(demo)}")
        images = demo[name]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"{where}: {name} must hold images uint8 [T,H,W,3], it holds {images.dtype} {images.shape}"
            )
        return np.stack([images[row] for row in rows])
