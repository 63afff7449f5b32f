"""LIBERO's scenes as robosuite and MuJoCo simulate them.

What is unusual here, and why:

- Scenes are made directly, not through LIBERO's `ControlEnv`: its `reset` swallows every exception and tries for ever.
- Images are rendered by `cogvla.envs.rendering`. robosuite's own OpenGL context is never made, so that physics alone
  needs none and nothing is left to be freed when the interpreter ends. Cameras are observables of robosuite all the
  same: it samples all of them one physics step before the end of a control step, and published data has that.
- A reset keeps the compiled model (0.1 s instead of 1 to 2) and starts numpy's global generator at a fixed seed: the
  sampler moves fixtures, which are part of no saved state. What robosuite forgets to reset is reset here.
- torch is not imported: environment processes stay small.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from cogvla.libero.installation import Predicate, Problem, libero_module

CONTROL_HZ = 20
PLACEMENT_TRIES = 200
POSTURE_NOISE = {"magnitude": 0.02, "type": "gaussian"}
"""Radians at each joint: what the fixed initial states were made with."""
_STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def lighter_meshes(xml: str, folder: Path) -> str:
    """The model with the robot's visual meshes replaced by those of `folder`, whose `map.json` says which by which."""
    replacements = json.loads((folder / "map.json").read_text())
    root = str(Path(importlib.util.find_spec("robosuite").origin).parent / "models" / "assets")  # type: ignore

    def replaced(match: re.Match[str]) -> str:
        lite = replacements.get(match[1])
        return f'file="{folder / lite}"' if lite else match[0]

    return re.sub(rf'file="{re.escape(root)}/([^"]*)"', replaced, xml)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws of robosuite come from numpy's global generator: whoever else uses it must not notice."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def one_pass_simulation(sim: Any) -> Any:
    """The simulation of robosuite, which within `control_step()` goes through the dynamics once for each physics step.

    robosuite asks for a forward pass before its controller, its controller asks for another, and the step makes a
    third. Nothing moves in between, so a step can be finished where it was begun. Trajectories are equal but for the
    solver, which starts from the last step's solution and not from the same step's: the last digits differ, and after
    hundreds of steps with contacts more than these.
    """
    from robosuite.utils.binding_utils import MjSim

    class OnePassSim(MjSim):
        begun: bool | None = None  # None: outside of control steps, where anything may change between two calls

        @contextmanager
        def control_step(self) -> Iterator[None]:
            self.begun = False
            try:
                yield
            finally:
                self.begun = None

        def forward(self) -> None:
            if self.begun is None:
                super().forward()
            elif not self.begun:
                mujoco.mj_step1(self.model._model, self.data._data)
                self.begun = True

        def step(self, with_udd: bool = True) -> None:
            if self.begun:
                mujoco.mj_step2(self.model._model, self.data._data)
                self.begun = False
            else:
                super().step(with_udd)

    one_pass = OnePassSim(sim.model._model)
    one_pass.forward()
    return one_pass


class Scene:
    """A compiled scene with the robot in it, for all tasks that happen in it.

    Args:
        task: any task of this scene.
        assets: see `assets_folder`.
        robot_meshes: a folder for `lighter_meshes`, or None.
        extra_passes: simulate as robosuite does, with three forward passes for each physics step; False: with one.
        cameras: of the observation, by their names in the model; each is asked of `render(camera)`.
        render: called when robosuite samples an image.
    """

    def __init__(
        self,
        task: Problem,
        assets: Path,
        robot_meshes: Path | None,
        extra_passes: bool = True,
        cameras: Sequence[str] = (),
        render: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        libero = libero_module()
        libero._assets_path_cache = str(assets)  # hf-libero has no other way to be told
        from libero.libero.envs import TASK_MAPPING
        from robosuite.controllers import load_controller_config
        from robosuite.utils.observables import Observable, sensor

        place: Any = TASK_MAPPING[task.kind]

        class Place(place):
            """LIBERO's class of the place; success is asked for from outside."""

            sim: Any

            def _assert_problem_name(self) -> None:
                """The class was chosen by that name."""

            def _check_success(self) -> bool:
                return False

            def _initialize_sim(self, xml_string: str | None = None) -> None:
                xml = xml_string or self.model.get_xml()
                super()._initialize_sim(lighter_meshes(xml, robot_meshes) if robot_meshes else xml)
                if not extra_passes:
                    self.sim = one_pass_simulation(self.sim)
                self.compiled = self.sim.model.body_pos.copy(), self.sim.model.body_quat.copy()

            def _reset_internal(self) -> None:
                # Its sampler puts objects on fixtures as if those stood where they were compiled, at the origin.
                self.sim.model.body_pos[:], self.sim.model.body_quat[:] = self.compiled
                super()._reset_internal()

        self.env: Any
        self._control_step = nullcontext if extra_passes else lambda: self.env.sim.control_step()
        with _seeded(0):
            self.env = Place(
                str(task.file),
                robots=["Panda"],
                controller_configs=load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                use_camera_obs=False,
                has_renderer=False,
                has_offscreen_renderer=False,
                control_freq=CONTROL_HZ,
                ignore_done=True,
                hard_reset=False,
            )
        for name in self.env.observation_names:
            self.env.modify_observable(name, "enabled", name in _STATE)
            self.env.modify_observable(name, "active", name in _STATE)
        if render is not None:
            for camera in cameras:
                draw = partial(render, camera)
                image = sensor(modality="image")(lambda _, draw=draw: draw())
                self.env.add_observable(Observable(name=camera, sensor=image, sampling_rate=CONTROL_HZ))

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's own model, without robosuite's wrapper."""
        return self.env.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's own data, without robosuite's wrapper."""
        return self.env.sim.data._data

    def reset(self, state: np.ndarray | None, seed: int = 0) -> dict[str, np.ndarray]:
        """Start anew.

        Args:
            state: a row of `initial_states`; None: the objects are placed by the task's own sampler, and the arm is a
                little off its usual posture, as in the fixed states.
            seed: of the sampler, which places the fixtures even where a state is given.

        Returns:
            robosuite's observation: `robot0_eef_pos` [3], `robot0_eef_quat` [4] (x, y, z, w), `robot0_gripper_qpos`
            [2], and the images.
        """
        (robot,) = self.env.robots
        if state is None:
            still = robot.initialization_noise
            robot.initialization_noise = POSTURE_NOISE
            self._place(seed)
            robot.initialization_noise = still
            state = self.env.sim.get_state().flatten()
        # With a state too: the seed decides the fixtures, and the controller remembers the posture without noise.
        robot.gripper.current_action = np.zeros(robot.gripper.dof)  # robosuite keeps the last episode's
        self._place(seed)
        return self.restore(state)

    def restore(self, state: np.ndarray, fixtures: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Put everything where a recorded state says; the controller is not told (`reset` does that).

        Args:
            state: time, positions and velocities.
            fixtures: body -> position and quaternion w, x, y, z [7]: they are no part of the state. None: as they are.

        Returns:
            the observation, as from `reset`.
        """
        model = self.env.sim.model
        if len(state) != 1 + model.nq + model.nv:
            raise ValueError(
                f"a state of this scene has {1 + model.nq + model.nv} numbers, the recorded one has {len(state)}: "
                "it was recorded with another scene, or with another version of LIBERO"
            )
        for name, pose in (fixtures or {}).items():
            body = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, name)
            if body < 0:
                raise ValueError(
                    f"this scene has no {name}, which the recorded one has: it was recorded with another one"
                )
            self.model.body_pos[body], self.model.body_quat[body] = pose[:3], pose[3:]
        self.env.sim.set_state_from_flattened(np.asarray(state, np.float64))
        self.env.sim.forward()
        self.env._post_process()
        self.env._update_observables(force=True)
        return self.env._get_observations()

    def _place(self, seed: int) -> None:
        from robosuite.utils.errors import RandomizationError

        with _seeded(seed):
            for _ in range(PLACEMENT_TRIES):
                try:
                    self.env.reset()
                except RandomizationError:
                    continue
                return
        raise RuntimeError(f"no room for the objects of {self.env.bddl_file_name} in {PLACEMENT_TRIES} tries")

    def step(self, action_A: np.ndarray) -> dict[str, np.ndarray]:
        """One control step of 50 ms; the observation as from `reset`."""
        with self._control_step():
            return self.env.step(action_A)[0]

    def position(self, name: str) -> np.ndarray:
        """Where something that predicates speak of is [3]: a region's centre, a knob or hinge, or a body's origin."""
        body = self.env.obj_body_id.get(name)
        if body is None:
            return self.data.site(name).xpos.copy()
        joints = self.env.get_object(name).joints
        return (self.data.joint(joints[0]).xanchor if joints else self.data.xpos[body]).copy()

    def holds(self, goal: Sequence[Predicate]) -> bool:
        """Whether all of these predicates are true now."""
        return all(self.env._eval_predicate(list(predicate)) for predicate in goal)
