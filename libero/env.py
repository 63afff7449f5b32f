"""Gymnasium environment for any task of any LIBERO suite.

Observation: `agentview` and `wrist` uint8 [H,W,3], in the orientation of the training data of OpenVLA, CogVLA and
LeRobot; `state` float32 [8] = gripper position in the world frame in metres (3), axis-angle of the gripper's quaternion
as robosuite gives it in radians (3; the angle is in [0, 2 pi], not folded into [0, pi]), two finger joints in metres
(2).
Action: float32 [7] in [-1,1] at 20 Hz = position delta (1.0 is 0.05 m), rotation delta (axis-angle, 1.0 is 0.5 rad),
gripper (-1 open, +1 close).

Initial states 0..49 of a task are LIBERO's fixed states. Higher numbers are seeds of the task's own sampler, which also
made the fixed states; recorders use those.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np

from cogvla.envs.perturbation.perturbation import CAMERA, LAYOUT, ROBOT, Perturbation, Values, changes
from cogvla.envs.suite import EVALUATION_STATES, chosen_start
from cogvla.libero.installation import Predicate, Problem, assets_folder, goal_in_scene, initial_states, problem
from cogvla.libero.perturbations import PERTURBATIONS, change_look
from cogvla.libero.rearrangement import move_start, rearrange, says_where
from cogvla.libero.spares import Spare, spares_for
from cogvla.libero.tasks import MAX_STEPS, place, tasks

if TYPE_CHECKING:
    from cogvla.envs.rendering import SceneRenderer
    from cogvla.libero.simulation import LiberoScene

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Name of the image in the observation -> name of the camera in the model."""
Changes = Mapping[str, tuple[np.random.Generator, Values]]
KEPT_SCENES = 2
"""Number of compiled scenes that an environment keeps. Building one takes about as long as 20 control steps."""
_BORDER = 0.05
"""Width of the image's border, as a fraction, where a thing does not count as seen."""


@dataclass(frozen=True)
class LiberoSettings:
    """Settings of LIBERO's simulation. Published numbers were measured with the defaults.

    Attributes:
        assets: folder with meshes and textures; None: the folder in COGVLA_LIBERO_ASSETS, or a download from the hub.
        lean: render without multisampling and shadows, several times faster on a CPU; the next three settings need it.
        reflections: draw reflecting surfaces; False needs `lean`.
        robot_meshes: folder with lighter meshes of the robot and a `map.json`; needs `lean`.
        extra_passes: make robosuite's three forward passes per physics step; False makes one and needs `lean`.
            One pass is a third faster; trajectories then differ in the last digits of the contact solver.
    """

    assets: str | None = None
    lean: bool = False
    reflections: bool = True
    robot_meshes: str | None = None
    extra_passes: bool = True

    def __post_init__(self) -> None:
        if not self.lean and (self.robot_meshes is not None or not self.reflections or not self.extra_passes):
            raise ValueError(
                "libero.robot_meshes, libero.reflections=false and libero.extra_passes=false need libero.lean=true"
            )
        if self.robot_meshes is not None and not (Path(self.robot_meshes) / "map.json").is_file():
            raise ValueError(f"libero.robot_meshes: {Path(self.robot_meshes) / 'map.json'} does not exist")


def axis_angle(quat_4: np.ndarray) -> np.ndarray:
    """Convert a quaternion (x, y, z, w) to axis times angle [3] in radians.

    The angle is 2 acos(w), in [0, 2 pi], so that q and -q give different results, as in robosuite.
    """
    w = float(np.clip(quat_4[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if sine < 1e-12 else quat_4[:3] * (2.0 * np.arccos(w) / sine)


class LiberoEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Environment for all tasks of one LIBERO suite; see `cogvla.envs.suite.Suite` for the contract.

    Args:
        suite: one of `LIBERO_SUITES`.
        settings: settings of the simulation; None: the defaults.
        image_size: height and width of the images in pixels.
        render: False: images stay black, and OpenGL is not used.

    Attributes:
        perturbations: how the next resets differ from training, see `libero.perturbations`.
        scene: simulation of the scene of the last reset; experts read the true state there.
        problem: contents of the BDDL file of that scene's task.
        goal: goal predicates of the task that the instruction asks for, in this scene.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self, suite: str, settings: LiberoSettings | None = None, image_size: int = 128, render: bool = True
    ) -> None:
        if image_size < 16:
            raise ValueError(f"image_size must be at least 16 pixels, got {image_size}")
        self.suite = suite
        self.settings = settings or LiberoSettings()
        self.tasks = tasks(suite)
        self.skip_images = False
        self.perturbations: tuple[Perturbation, ...] = ()
        self.render_mode = "rgb_array"
        self._assets = assets_folder(self.settings.assets)
        self._image_size = image_size
        self._rendering = render
        self._scenes: OrderedDict[str, LiberoScene] = OrderedDict()
        self._renderers: dict[str, SceneRenderer] = {}
        self._images = {name: np.zeros((image_size, image_size, 3), np.uint8) for name in CAMERAS}
        self._states: dict[int, np.ndarray] = {}
        self._goals: dict[int, tuple[Predicate, ...]] = {}
        self._task = self._asked = -1
        self._current = ""
        self._steps = 0
        image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {**dict.fromkeys(CAMERAS, image), "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)}
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)

    # --- tasks -------------------------------------------------------------------------------------------------------

    @property
    def scene(self) -> LiberoScene:
        if self._task < 0:
            raise ValueError("call reset() first")
        return self._scenes[self._current]

    @property
    def problem(self) -> Problem:
        if self._task < 0:
            raise ValueError("call reset() first")
        return self._problem(self._task)

    @property
    def goal(self) -> tuple[Predicate, ...]:
        return self._goals[self._asked]

    def goals_for(self, task: int) -> tuple[Predicate, ...]:
        """Return the goal predicates of a task in the current scene.

        Raises:
            ValueError: the task is not possible in this scene; the message lists the possible tasks.
        """
        if task not in self._goals:
            raise ValueError(f"task {task} cannot be carried out in this scene; possible: {sorted(self._goals)}")
        return self._goals[task]

    def task_success(self, task: int) -> bool:
        """Return True if the given task is done now in the current scene."""
        return self.scene.holds(self.goals_for(task))

    def fixed_states(self) -> np.ndarray:
        """Return the fixed initial states of the present scene's task [50, S]: time, positions and velocities."""
        return np.stack([self.scene.with_bodies(state) for state in self._fixed_states(self._task)])

    def labels(self) -> dict[str, np.ndarray]:
        """Return the positions of the object to manipulate and of its goal, for the current task.

        Returns:
            `target`: position of the object to manipulate; `goal`: position where it should go. Both float32 [3], in
            metres, world frame.
        """
        return self.labels_for(self._asked)

    def labels_for(self, task: int) -> dict[str, np.ndarray]:
        """Return `labels` for any task that is possible in this scene, for its first predicate that does not hold."""
        goals = self.goals_for(task)
        predicate = next((p for p in goals if not self.scene.holds([p])), goals[-1])
        target, goal = self.scene.position(predicate[1]), self.scene.position(predicate[-1])
        return {"target": target.astype(np.float32), "goal": goal.astype(np.float32)}

    def _problem(self, task: int) -> Problem:
        return problem(self.suite, self.tasks[task].name)

    def _possible_goals(self, task: int) -> dict[int, tuple[Predicate, ...]]:
        """Return task -> goal for all tasks that are possible in this task's scene (see `goal_in_scene`)."""
        own = self._problem(task)
        goals = {task: own.goal}
        for other, asked in enumerate(self.tasks):
            if other == task or place(asked.name) != place(self.tasks[task].name):
                continue
            goal = goal_in_scene(own, self._problem(other))
            if goal is not None:
                goals[other] = goal
        return goals

    def _prepare(self, task: int, spares: Sequence[Spare] = ()) -> LiberoScene:
        """Return the scene of a task: a kept one, or a new one, which replaces the least recently used."""
        from cogvla.libero.simulation import LiberoScene

        problem = self._problem(task)
        key = self._current = " ".join([problem.scene, *(spare.name for spare in spares)])
        if key in self._scenes:
            self._scenes.move_to_end(key)
            return self._scenes[key]
        while len(self._scenes) >= KEPT_SCENES:
            oldest = next(iter(self._scenes))
            del self._scenes[oldest]
            if oldest in self._renderers:
                self._renderers.pop(oldest).close()
            gc.collect()  # robosuite's objects form reference cycles, and Python does not know how large a scene is
        meshes = None if self.settings.robot_meshes is None else Path(self.settings.robot_meshes)
        render = partial(self._sampled_image, key) if self._rendering else None
        bodies = [spare.xml for spare in spares]
        self._scenes[key] = LiberoScene(
            problem, self._assets, meshes, self.settings.extra_passes, tuple(CAMERAS), render, bodies
        )
        return self._scenes[key]

    # --- gymnasium ---------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode in an initial state.

        Args:
            seed: seed of the random choice of a missing option.
            options: "task" and "initial_state" (random where missing). "asked" swaps the instruction: the scene is that
                of "task", but instruction and success are those of task "asked", which must be possible in the scene.

        Returns:
            the observation, and the info of `step` with `alternative_tasks` and `alternatives`: indices and
            instructions of the other tasks that are possible here and not done yet.
        """
        super().reset(seed=seed)
        options = options or {}
        task, state = chosen_start(options, len(self.tasks), self.np_random)
        change = changes(self.perturbations, PERTURBATIONS, self.suite, task, state)
        goals = self._possible_goals(task)
        spares = spares_for(self.suite, task, change[LAYOUT][1]["distractors"]) if LAYOUT in change else ()
        scene = self._prepare(task, spares)
        self._task, self._asked, self._goals, self._steps = task, task, goals, 0
        asked = options.get("asked")
        if asked is not None:
            self.goals_for(int(asked))
            self._asked = int(asked)
        scene.appearance.restore()
        drawn: dict[str, Any] = {}
        changed = (lambda: drawn.update(self._change(change, spares))) if change else None
        if state < EVALUATION_STATES:
            observation = scene.reset(self._fixed_states(task)[state], change=changed)
        else:
            observation = scene.reset(None, seed=state, change=changed)
        others = [i for i in sorted(goals) if i != self._asked and not self.task_success(i)]
        if CAMERA in change or LAYOUT in change:  # what they say about places may no longer be true
            others = [i for i in others if not says_where(self.tasks[i].instruction)]
        info = self._info()
        info["alternative_tasks"] = others
        info["alternatives"] = [self.tasks[i].instruction for i in others]
        if change:
            info["perturbation"] = drawn
        return self._observation(observation), info

    def _change(self, change: Changes, spares: Sequence[Spare]) -> dict[str, Any]:
        """Change the scene, which is in its initial state and looks as it was built; return what was drawn."""
        scene, instruction = self.scene, self.tasks[self._asked].instruction
        drawn: dict[str, Any] = {}
        if LAYOUT in change:
            first, goal = PERTURBATIONS[LAYOUT][0], self._goals[self._task]
            forbidden = sorted({predicate for goal in self._goals.values() for predicate in goal})
            drawn |= rearrange(scene, *change[LAYOUT], first, spares, goal, forbidden, instruction, self._seen)
        if ROBOT in change:
            drawn |= move_start(scene, *change[ROBOT])
        for dimension in (name for name in change if name not in (LAYOUT, ROBOT)):
            height = scene.surface_height
            drawn |= change_look(scene.model, scene.appearance, dimension, *change[dimension], height, instruction)
        mujoco.mj_camlight(scene.model, scene.data)
        return drawn

    def _seen(self, point: np.ndarray) -> bool:
        """Return True if a point [3] is well inside of the policy's image."""
        u, v, depth = self.camera_projection("agentview") @ np.append(point, 1.0)
        return bool(depth > 0 and max(abs(u / depth - 0.5), abs(v / depth - 0.5)) < 0.5 - _BORDER)

    def restore(
        self, state: np.ndarray, task: int | None = None, fixtures: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Put the scene into a recorded state and return the observation.

        Args:
            state: time, positions and velocities, as MuJoCo flattens them.
            task: reset to this task first, so that actions can follow; None: only the state changes.
            fixtures: body -> position and quaternion (w, x, y, z) [7] of fixtures; the state does not hold them. None:
                fixtures stay as in evaluations.
        """
        if task is not None:
            before = self.skip_images, self.perturbations
            self.skip_images, self.perturbations = True, ()  # only the clean scene has such states
            try:
                self.reset(options={"task": task, "initial_state": 0})
                self.scene.reset(state)
            finally:
                self.skip_images, self.perturbations = before
        return self._observation(self.scene.restore(state, fixtures))

    def _fixed_states(self, task: int) -> np.ndarray:
        if task not in self._states:
            self._states[task] = initial_states(self.suite, self.tasks[task].name)
        return self._states[task]

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Make one control step of 50 ms. The reward is 1 on success, else 0."""
        scene = self.scene
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (7,):
            raise ValueError(f"an action is 7 numbers (position, rotation, gripper), got shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"action holds NaN or infinite values: {values}")
        observation = scene.step(np.clip(values, -1.0, 1.0))
        self._steps += 1
        info = self._info()
        success = info["success"]
        return self._observation(observation), float(success), success, self._steps >= MAX_STEPS[self.suite], info

    def _info(self) -> dict[str, Any]:
        success = self.task_success(self._asked)
        return {
            "success": success,
            "scene_task_success": success if self._task == self._asked else self.task_success(self._task),
            "instruction": self.tasks[self._asked].instruction,
            "task": self._asked,
        }

    def _observation(self, sampled: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = [sampled["robot0_eef_pos"], axis_angle(sampled["robot0_eef_quat"]), sampled["robot0_gripper_qpos"]]
        images = {name: np.array(sampled.get(name, blank)) for name, blank in self._images.items()}
        return {**images, "state": np.concatenate(parts).astype(np.float32)}

    # --- images ------------------------------------------------------------------------------------------------------

    def _sampled_image(self, scene: str, name: str) -> np.ndarray:
        """Return the image when robosuite samples a camera: a new one, or the last one while images are skipped."""
        if not self.skip_images and scene in self._scenes:
            self._images[name] = self._image(scene, name, self._image_size, self._image_size)
        return self._images[name]

    def render_camera(self, name: str, height: int, width: int) -> np.ndarray:
        """Render the current state at any size, uint8 [H,W,3], in the orientation of the observations."""
        return self._image(self._current, name, height, width)

    def _image(self, scene: str, name: str, height: int, width: int) -> np.ndarray:
        if scene not in self._renderers:
            self._renderers[scene] = self._renderer(self._scenes[scene])
        renderer, appearance = self._renderers[scene], self._scenes[scene].appearance
        renderer.show(appearance.shadows, appearance.repainted)
        appearance.repainted.clear()
        upright = renderer.render(self._scenes[scene].data, CAMERAS[name], height, width)
        # robosuite returns rows from the bottom up, and all published data turns that by 180 degrees. Compared with the
        # upright image, left and right are mirrored.
        return np.ascontiguousarray(upright[:, ::-1])

    def _renderer(self, scene: LiberoScene) -> SceneRenderer:
        from cogvla.envs.rendering import EVERYTHING, SceneRenderer

        quality, buffers = scene.model.vis.quality, scene.model.vis.global_
        buffers.offwidth = buffers.offheight = self._image_size
        effects = set(EVERYTHING)
        if self.settings.lean:
            quality.offsamples = quality.shadowsize = 0
            effects.discard("shadow")
            if not self.settings.reflections:
                effects.discard("reflection")
        return SceneRenderer(scene.model, effects, hidden_groups=(0,), sites=True)  # group 0: collision geometry

    def camera_projection(self, name: str) -> np.ndarray:
        """Return the projection matrix float32 [3,4] of a camera: homogeneous world point -> `(u*d, v*d, d)`.

        u (right) and v (down) are in [0,1] over the square, mirrored image. d is the depth in metres, negative behind
        the camera.
        """
        model, data = self.scene.model, self.scene.data
        camera = model.camera(CAMERAS[name]).id
        rotation = data.cam_xmat[camera].reshape(3, 3).T  # rows: right, up, backward
        extrinsic = np.column_stack([rotation, -rotation @ data.cam_xpos[camera]])
        scale = 0.5 / np.tan(np.deg2rad(model.cam_fovy[camera]) / 2)
        intrinsic = np.array([[-scale, 0.0, -0.5], [0.0, -scale, -0.5], [0.0, 0.0, -1.0]])
        return (intrinsic @ extrinsic).astype(np.float32)

    def render(self) -> np.ndarray:
        """Render the agentview image at 256x256."""
        return self.render_camera("agentview", 256, 256)

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._scenes.clear()
        self._task = -1
