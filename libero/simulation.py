"""Simulate LIBERO's scenes with robosuite and MuJoCo.

What is unusual here, and why:

- We build scenes directly, not through LIBERO's `ControlEnv`: its `reset` catches every exception and tries for ever.
- `cogvla.envs.rendering` renders the images. robosuite never makes its own OpenGL context: physics alone needs no
  OpenGL, and no context is left to free when the interpreter ends. Cameras are still observables of robosuite, because
  robosuite samples all observables one physics step before the end of a control step, and published data was made so.
- A reset keeps the compiled model (0.1 s instead of 1 to 2) and seeds numpy's global generator: the sampler moves
  fixtures, and no saved state holds their poses. A reset here also resets what robosuite's reset forgets.
- This module does not import torch, so that environment processes stay small.
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

from cogvla.envs.perturbation.appearance import Appearance
from cogvla.libero.installation import Predicate, Problem, libero_module

CONTROL_HZ = 20
PLACEMENT_TRIES = 200
POSTURE_NOISE = {"magnitude": 0.02, "type": "gaussian"}
"""Noise on each joint angle in radians. The fixed initial states were made with it."""
_STATE = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def lighter_meshes(xml: str, folder: Path) -> str:
    """Return the model's XML with the robot's visual meshes replaced by the lighter ones of `folder`.

    `map.json` in `folder` maps robosuite's mesh files to the files in `folder`.
    """
    replacements = json.loads((folder / "map.json").read_text())
    root = str(Path(importlib.util.find_spec("robosuite").origin).parent / "models" / "assets")  # type: ignore

    def replaced(match: re.Match[str]) -> str:
        lite = replacements.get(match[1])
        return f'file="{folder / lite}"' if lite else match[0]

    return re.sub(rf'file="{re.escape(root)}/([^"]*)"', replaced, xml)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which robosuite draws from, and restore its state afterwards for other users."""
    before = np.random.get_state()  # noqa: NPY002
    # It takes 32 bits, and the states of recordings with a large seed have more.
    np.random.seed(seed if seed < 1 << 32 else np.random.SeedSequence(seed).generate_state(8))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def one_pass_simulation(sim: Any) -> Any:
    """Return a robosuite simulation that computes the dynamics once for each physics step inside `control_step()`.

    robosuite makes three forward passes for each physics step: one before its controller, one in its controller, and
    one in the step. Nothing moves between them, so one pass is enough: `forward` does the first half of a step, and
    `step` does the second half. Trajectories differ only through the contact solver, which then starts from the
    solution of the last step and not of the same step: the last digits differ, and more digits after hundreds of steps
    with contacts.
    """
    from robosuite.utils.binding_utils import MjSim

    class OnePassSim(MjSim):
        begun: bool | None = None  # None: outside control steps, where anything may change between two calls

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


class LiberoScene:
    """A compiled scene with the robot, shared by all tasks of that scene.

    Args:
        task: any task of this scene.
        assets: folder with meshes and textures, see `assets_folder`.
        robot_meshes: folder for `lighter_meshes`, or None.
        extra_passes: True makes three forward passes for each physics step, as robosuite does; False makes one.
        cameras: cameras of the observation, by their names in the model.
        bodies: XML of further bodies of the world, each with a free joint. States that are given need not hold them.
        render: function of a camera's name, called when robosuite samples that camera; returns the image. None: no
            images.
    """

    def __init__(
        self,
        task: Problem,
        assets: Path,
        robot_meshes: Path | None,
        extra_passes: bool = True,
        cameras: Sequence[str] = (),
        render: Callable[[str], np.ndarray] | None = None,
        bodies: Sequence[str] = (),
    ) -> None:
        libero = libero_module()
        libero._assets_path_cache = str(assets)  # hf-libero has no public way to set the folder
        from libero.libero.envs import TASK_MAPPING
        from robosuite.controllers import load_controller_config
        from robosuite.utils.observables import Observable, sensor

        place: Any = TASK_MAPPING[task.kind]

        class Place(place):
            """LIBERO's class of the scene, without its own check of success: `LiberoScene.holds` does that."""

            sim: Any

            def _assert_problem_name(self) -> None:
                """Do nothing: we chose the class by that name."""

            def _check_success(self) -> bool:
                return False

            def _initialize_sim(self, xml_string: str | None = None) -> None:
                xml = xml_string or self.model.get_xml()
                if bodies:
                    xml = xml.replace("</worldbody>", "".join(bodies) + "</worldbody>")
                super()._initialize_sim(lighter_meshes(xml, robot_meshes) if robot_meshes else xml)
                if not extra_passes:
                    self.sim = one_pass_simulation(self.sim)
                self.compiled = self.sim.model.body_pos.copy(), self.sim.model.body_quat.copy()

            def _reset_internal(self) -> None:
                # LIBERO's sampler puts objects on fixtures as if the fixtures still stood where they were compiled.
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

        self.appearance = Appearance(self.model)
        self._bodies = len(bodies)

    @property
    def surface_height(self) -> float:
        """Height of the table or floor that the objects stand on, in metres."""
        return float(self.env.workspace_offset[2])

    @property
    def model(self) -> mujoco.MjModel:
        """MuJoCo's model, without robosuite's wrapper."""
        return self.env.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        """MuJoCo's data, without robosuite's wrapper."""
        return self.env.sim.data._data

    @property
    def fixtures(self) -> list[str]:
        """Names of the bodies whose poses a state does not hold: NAME_main in the world, without joint."""
        model = self.model
        bodies = (model.body(index) for index in range(model.nbody))
        fixed = (body for body in bodies if body.parentid[0] == 0 and body.jntnum[0] == 0)
        return [body.name for body in fixed if body.name.endswith("_main")]

    @property
    def loose(self) -> list[str]:
        """Names of the things that stand free on the table or floor, with nothing on them."""
        env = self.env
        told = [fact for fact in env.parsed_problem["initial_state"] if len(fact) == 3]
        regions = env.parsed_problem["regions"]
        on_table = [
            name
            for _, name, where in told
            if name in env.objects_dict and where in regions and regions[where]["target"] == env.workspace_name
        ]
        return [name for name in on_table if all(where != name for _, _, where in told)]

    def reset(
        self, state: np.ndarray | None, seed: int = 0, change: Callable[[], None] | None = None
    ) -> dict[str, np.ndarray]:
        """Start an episode.

        Args:
            state: a row of `initial_states`. None: the task's own sampler places the objects, and the arm's posture
                gets a little noise, as in the fixed states.
            seed: seed of the sampler, which also places the fixtures when a state is given.
            change: function that changes the scene further, before anything is observed.

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
        # Place with a given state too: the seed decides the fixtures, and the controller keeps a posture without noise.
        robot.gripper.current_action = np.zeros(robot.gripper.dof)  # robosuite keeps the last episode's action
        self._place(seed)
        return self.restore(self.with_bodies(state), change=change)

    def with_bodies(self, state: np.ndarray) -> np.ndarray:
        """Return a state with the further bodies, where the model puts them; unchanged if it holds them already."""
        model = self.model
        positions, velocities = model.nq - 7 * self._bodies, model.nv - 6 * self._bodies
        if not self._bodies or len(state) != 1 + positions + velocities:
            return state
        split = 1 + positions
        return np.concatenate([state[:split], model.qpos0[positions:], state[split:], np.zeros(6 * self._bodies)])

    def restore(
        self,
        state: np.ndarray,
        fixtures: Mapping[str, np.ndarray] | None = None,
        change: Callable[[], None] | None = None,
    ) -> dict[str, np.ndarray]:
        """Put the scene into a recorded state. Does not reset the controller; `reset` does.

        Args:
            state: time, positions and velocities.
            fixtures: body -> position and quaternion (w, x, y, z) [7] of fixtures; the state does not hold them. None:
                fixtures stay where they are.
            change: as in `reset`.

        Returns:
            the observation, as from `reset`.

        Raises:
            ValueError: the state or the fixtures are of another scene.
        """
        model = self.env.sim.model
        if len(state) != 1 + model.nq + model.nv:
            raise ValueError(
                f"a state of this scene has {1 + model.nq + model.nv} numbers, the recorded state has {len(state)}: "
                "it was recorded in another scene, or with another version of LIBERO"
            )
        for name, pose in (fixtures or {}).items():
            body = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_BODY, name)
            if body < 0:
                raise ValueError(
                    f"the recorded scene has a fixture {name}, this scene has not: they are different scenes"
                )
            self.model.body_pos[body], self.model.body_quat[body] = pose[:3], pose[3:]
        self.env.sim.set_state_from_flattened(np.asarray(state, np.float64))
        self.env.sim.forward()
        if change is not None:
            change()
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
        """Make one control step of 50 ms; return the observation, as from `reset`."""
        with self._control_step():
            return self.env.step(action_A)[0]

    def position(self, name: str) -> np.ndarray:
        """Return the position [3] of a name in a predicate, in metres, world frame.

        That is the centre of a region, the first joint of an object that has joints (knob, hinge), or else the origin
        of the body.
        """
        body = self.env.obj_body_id.get(name)
        if body is None:
            return self.data.site(name).xpos.copy()
        joints = self.env.get_object(name).joints
        return (self.data.joint(joints[0]).xanchor if joints else self.data.xpos[body]).copy()

    def holds(self, goal: Sequence[Predicate]) -> bool:
        """Return True if all these predicates hold now."""
        return all(self.env._eval_predicate(list(predicate)) for predicate in goal)
