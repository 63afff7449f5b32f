"""LIBERO's HDF5 files as the project distributes them, written by tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

MODEL = """<mujoco><worldbody>
<body name="table"/>
<body name="wooden_cabinet_1_main" pos="0.1 -0.2 0.9" quat="0 0 0 1"><body name="drawer"><joint/></body></body>
<body name="flat_stove_1_main" pos="-0.4 0.2 0.9"/>
<body name="plate_1_main" pos="0 0 0"><freejoint/></body>
</worldbody></mujoco>"""


@dataclass(frozen=True)
class Demo:
    """One demonstration: actions [T,7], states [T,D], seen [T,8], images [T,H,W,3] by camera."""

    actions: np.ndarray
    states: np.ndarray
    seen: np.ndarray
    images: Mapping[str, np.ndarray]
    model: str | None = MODEL


def made_up(actions: np.ndarray, size: int = 16, numbers: int = 20, seed: int = 0) -> Demo:
    """A demonstration of these actions with random states and images."""
    rng, steps = np.random.default_rng(seed), len(actions)
    images = {name: rng.integers(0, 256, (steps, size, size, 3), np.uint8) for name in ("agentview", "eye_in_hand")}
    return Demo(np.asarray(actions, float), rng.normal(size=(steps, numbers)), rng.normal(size=(steps, 8)), images)


def write(path: Path, demos: Sequence[Demo], suite: str = "libero_goal", **attributes: str) -> Path:
    """The file of one task: all groups, data sets and attributes of the original ones."""
    task = path.name.removesuffix("_demo.hdf5")
    bddl = f"libero/libero/bddl_files/{suite}/{task}.bddl"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Tabletop_Manipulation"
        data.attrs["problem_info"] = json.dumps(
            {"problem_name": "libero_tabletop_manipulation", "domain_name": "robosuite", "language_instruction": task}
        )
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["bddl_file_name"], data.attrs["bddl_file_content"] = bddl, "(define ...)"
        data.attrs["env_args"] = json.dumps(
            {
                "type": 1,
                "env_name": "Libero_Tabletop_Manipulation",
                "bddl_file": bddl,
                "env_kwargs": {"control_freq": 20},
            }
        )
        data.attrs["num_demos"], data.attrs["total"] = len(demos), sum(len(demo.actions) for demo in demos)
        data.attrs.update(attributes)
        for index, demo in enumerate(demos):
            group, steps = data.create_group(f"demo_{index}"), len(demo.actions)
            group.attrs["num_samples"] = steps
            if demo.model is not None:
                group.attrs["model_file"] = demo.model
            group.attrs["init_state"] = demo.states[0]
            done = np.zeros(steps, np.uint8)
            done[-1] = 1
            group["actions"], group["states"], group["rewards"], group["dones"] = demo.actions, demo.states, done, done
            group["robot_states"] = np.zeros((steps, 9))
            group["obs/agentview_rgb"] = demo.images["agentview"]
            group["obs/eye_in_hand_rgb"] = demo.images["eye_in_hand"]
            group["obs/ee_pos"], group["obs/ee_ori"] = demo.seen[:, :3], demo.seen[:, 3:6]
            group["obs/ee_states"], group["obs/gripper_states"] = demo.seen[:, :6], demo.seen[:, 6:]
            group["obs/joint_states"] = np.zeros((steps, 7))
    return path
