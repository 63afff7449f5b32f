"""Gymnasium environment for any task of any tabletop suite.

Observation: `agentview` and `wrist` uint8 [H,W,3]; `state` float32 [8] = position of the gripper centre in the world
frame (3, metres), axis-angle of the gripper *relative to the nominal top-down grasp pose* in the world frame (3,
radians; it is zero when the gripper points straight down and the fingers open along y, so the discontinuity at pi is
never near), positions of the two fingers (2, metres; 0 closed, 0.04 open).

Action: float32 [7] in [-1,1] = position delta (1.0 is 0.05 m), axis-angle delta in the world frame (1.0 is 0.2 rad),
gripper (> 0 closes, otherwise opens). Values outside are clipped; NaN, infinity or another shape is a ValueError.
`cogvla.envs.tabletop.control` explains how deltas add up.

`agentview` looks at the table from the front, towards the robot: the robot is at the top, image right is world +y.
`wrist` looks down past the fingers: image up is world +x (away from the robot), image right is world -y.

Initial states are drawn from `np.random.default_rng([suite_seed, task, initial_state])`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np

from cogvla.envs.contract import CAMERAS
from cogvla.envs.perturbation.perturbation import (
    BACKGROUND,
    CAMERA,
    LAYOUT,
    LIGHT,
    ROBOT,
    Perturbation,
    Values,
    changes,
)
from cogvla.envs.rendering import SceneRenderer
from cogvla.envs.rotations import rotation_vector
from cogvla.envs.suite import chosen_start
from cogvla.envs.tabletop.arm import FINGER_JOINTS, FINGER_OPEN, NOMINAL_ROTATION
from cogvla.envs.tabletop.control import CONTROL_HZ, ArmController
from cogvla.envs.tabletop.family import Family
from cogvla.envs.tabletop.goals import Goal, Layout, holds, labels, pushes_on
from cogvla.envs.tabletop.perturbations import (
    PERTURBATIONS,
    PIVOT,
    Start,
    agentview_orbits,
    change_light,
    change_table,
    crowd,
    move_furniture,
    move_start,
    move_wrist_camera,
)
from cogvla.envs.tabletop.scene import TIMESTEP, Scene

START_REGION = np.array([[0.40, -0.20, 0.15], [0.60, 0.20, 0.30]])
"""Lowest and highest position of the gripper centre in initial states, in metres."""
START_YAW = 0.3
SIDE_MARGIN = 0.015
"""Least difference between the leftmost and the next thing after a perturbation, in widths of `agentview`."""
START_TILT = 0.08


class TabletopEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """Environment for all tasks of one family; see `cogvla.envs.suite.Suite` for the contract.

    Attributes:
        skip_images: True: observations repeat the last images, to save the time of rendering.
        watch: function that `step` calls a hundred times per simulated second; for robots in real time.
        scene: the model, its data and the items; another one after a reset that changes the layout.
        perturbations: how the next resets differ from training, see `envs.tabletop.perturbations`.
        goals: goals of the current instruction.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": int(CONTROL_HZ)}

    def __init__(self, family: Family, image_size: int = 128, render: bool = True) -> None:
        if image_size < 16:
            raise ValueError(f"image_size must be at least 16 pixels, got {image_size}")
        self.family = family
        self._nominal_scene = self.scene = Scene(family.items)
        self.perturbations: tuple[Perturbation, ...] = ()
        self.skip_images = False
        self.watch: Callable[[], None] | None = None
        self.render_mode = "rgb_array"
        self._image_size = image_size
        self._rendering = render
        self._renderers: dict[Scene, SceneRenderer] = {}
        self._images = {name: np.zeros((image_size, image_size, 3), dtype=np.uint8) for name in CAMERAS}
        self._arm = ArmController(TIMESTEP)
        self._site = self.scene.model.site("tcp").id
        self._fingers = [int(self.scene.model.joint(name).qposadr[0]) for name in FINGER_JOINTS]
        self._finger_velocities = [int(self.scene.model.joint(name).dofadr[0]) for name in FINGER_JOINTS]
        self._layout: Layout | None = None
        self._task = self._asked = 0
        self._steps = 0
        image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {**dict.fromkeys(CAMERAS, image), "state": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32)}
        )
        self.action_space = gym.spaces.Box(-1.0, 1.0, (7,), np.float32)

    # --- what the gripper is doing -----------------------------------------------------------------------------------

    @property
    def gripper_position(self) -> np.ndarray:
        """The gripper centre [3] in metres, world frame."""
        return self.scene.data.site_xpos[self._site].copy()

    @property
    def gripper_rotation(self) -> np.ndarray:
        """The gripper's axis-angle [3] relative to the nominal grasp pose, world frame."""
        return rotation_vector(self._gripper_matrix() @ NOMINAL_ROTATION.T)

    @property
    def fingers(self) -> np.ndarray:
        """The positions of the two fingers [2] in metres."""
        return self.scene.data.qpos[self._fingers]

    @property
    def state(self) -> np.ndarray:
        """The state of the observation, float32 [8]."""
        return np.concatenate([self.gripper_position, self.gripper_rotation, self.fingers]).astype(np.float32)

    @property
    def finger_speed(self) -> float:
        """The faster finger's speed in m/s."""
        return float(np.abs(self.scene.data.qvel[self._finger_velocities]).max())

    def _gripper_matrix(self) -> np.ndarray:
        return self.scene.data.site_xmat[self._site].reshape(3, 3)

    # --- tasks -------------------------------------------------------------------------------------------------------

    @property
    def goals(self) -> tuple[Goal, ...]:
        return self.goals_for(self._asked)

    def goals_for(self, task_index: int) -> tuple[Goal, ...]:
        """Return the goals of a task in the current scene.

        Raises:
            ValueError: the task is not possible in this scene; the message lists the possible tasks.
        """
        goals = self._current_layout().goals
        if task_index not in goals:
            raise ValueError(f"task {task_index} cannot be carried out in this scene; possible: {sorted(goals)}")
        return goals[task_index]

    def _current_layout(self) -> Layout:
        if self._layout is None:
            raise ValueError("call reset() first")
        return self._layout

    def current_goal(self, task_index: int | None = None) -> Goal:
        """Return the first goal of a task that does not hold yet or is still pushed to, or the last goal if all hold.

        `task_index`: index of the task; None: the task of the instruction.
        """
        goals = self.goals if task_index is None else self.goals_for(task_index)
        for goal in goals[:-1]:
            if not self._holds(goal) or pushes_on(self.scene, goal, self.gripper_position):
                return goal
        return goals[-1]

    def _holds(self, goal: Goal) -> bool:
        return holds(self.scene, goal, self.fingers, self.gripper_position)

    def task_success(self, task_index: int) -> bool:
        """Return True if the given task is done now in the current scene."""
        return all(self._holds(goal) for goal in self.goals_for(task_index))

    def labels(self) -> dict[str, np.ndarray]:
        """Return where the gripper manipulates an object and where the object should go, for the current task.

        Returns:
            `target`: the object's position (or where the hand comes down to push it); `goal`: where it should go.
            Both float32 [3], in metres, world frame.
        """
        return self.labels_for(self._asked)

    def labels_for(self, task_index: int) -> dict[str, np.ndarray]:
        """Return `labels` for any task that is possible in this scene."""
        return labels(self.scene, self.current_goal(task_index))

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
            instructions of the other tasks that are possible here and have other goals. With a perturbation,
            `perturbation`: what was drawn.
        """
        super().reset(seed=seed)
        options = options or {}
        task, state = chosen_start(options, len(self.family.tasks), self.np_random)
        change = changes(self.perturbations, PERTURBATIONS, self.family.name, task, state)
        rng = np.random.default_rng([self.family.seed, task, state])
        moved = move_furniture(self.family, *change[LAYOUT]) if LAYOUT in change else {}
        layout = self.family.draw(rng, task, moved)
        asked = options.get("asked")
        self._layout, self._task, self._asked, self._steps = layout, task, task, 0
        if asked is not None:
            self.goals_for(int(asked))
            self._asked = int(asked)
        self._forget_crowd()
        drawn: dict[str, Any] = {}
        if LAYOUT in change:
            crowded = crowd(self.family, layout, moved, *change[LAYOUT])
            self.scene, self._layout, drawn = Scene(crowded.items), crowded.layout, crowded.drawn
        self.scene.place(self._layout.poses)
        turn = np.append(rng.uniform(-START_TILT, START_TILT, 2), rng.uniform(-START_YAW, START_YAW))
        start = Start(np.zeros(3), rng.uniform(*START_REGION), turn)
        if ROBOT in change:
            start, moves = move_start(start.position, START_REGION, *change[ROBOT])
            drawn |= moves
        self.scene.stand(start.base)
        self._arm.stand(start.base)
        data = self.scene.data
        data.qpos[:7] = self._arm.reset(start.position, start.turn)
        data.qpos[self._fingers] = data.ctrl[7:9] = FINGER_OPEN
        mujoco.mj_forward(self.scene.model, data)
        drawn |= self._change_look(change)
        # Two instructions may mean the same object ("leftmost", "on the red mat"); the second is then no alternative.
        others = [i for i in sorted(layout.goals) if layout.goals[i] != layout.goals[self._asked]]
        if CAMERA in change:
            others = [i for i in others if self._sides_are_right(i)]
        info = self._info()
        info["alternative_tasks"] = others
        info["alternatives"] = [self.family.tasks[i].instruction for i in others]
        if change:
            info["perturbation"] = drawn
        return self._observe(), info

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Make one control step of 50 ms. The reward is 1 on success, else 0."""
        self._current_layout()
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (7,):
            raise ValueError(f"an action is 7 numbers (position, rotation, gripper), got shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"action holds NaN or infinite values: {values}")
        self._arm.command(
            np.clip(values, -1.0, 1.0), self.gripper_position, self._gripper_matrix(), float(self.fingers.max())
        )
        self._arm.run(self.scene.model, self.scene.data, self.watch)
        self.scene.latch_buttons()
        self._steps += 1
        info = self._info()
        success = info["success"]
        return self._observe(), float(success), success, self._steps >= self.family.max_steps, info

    def _info(self) -> dict[str, Any]:
        success = self.task_success(self._asked)
        return {
            "success": success,
            "scene_task_success": success if self._task == self._asked else self.task_success(self._task),
            "instruction": self.family.tasks[self._asked].instruction,
            "task": self._asked,
        }

    def _observe(self) -> dict[str, np.ndarray]:
        if self._rendering and not self.skip_images:
            size = self._image_size
            self._images = {name: self.render_camera(name, size, size) for name in CAMERAS}
        return {**{name: image.copy() for name, image in self._images.items()}, "state": self.state}

    def render_camera(self, name: str, height: int, width: int) -> np.ndarray:
        """Render the current state at any size, uint8 [H,W,3], e.g. for videos."""
        return self._renderer().render(self.scene.data, name, height, width)

    def _renderer(self) -> SceneRenderer:
        if self.scene not in self._renderers:
            self._renderers[self.scene] = SceneRenderer(self.scene.model)
        renderer, appearance = self._renderers[self.scene], self.scene.appearance
        renderer.show(appearance.shadows, appearance.repainted)
        appearance.repainted.clear()
        return renderer

    def target_mask(self, name: str, height: int, width: int) -> np.ndarray:
        """Return the mask of the pixels that show the item of the current goal, bool [H,W]."""
        bodies_HW = self._renderer().bodies(self.scene.data, name, height, width)
        return np.isin(bodies_HW, self.scene.bodies(self.current_goal().item))

    def camera_projection(self, name: str) -> np.ndarray:
        """Return the projection matrix float32 [3,4] of a camera: homogeneous world point -> `(u*d, v*d, d)`.

        u (right) and v (down) are in [0,1] over a square image. d is the depth in metres, negative behind the camera.
        """
        camera = self.scene.model.camera(name).id
        rotation = self.scene.data.cam_xmat[camera].reshape(3, 3).T  # rows: right, up, backward
        extrinsic = np.column_stack([rotation, -rotation @ self.scene.data.cam_xpos[camera]])
        scale = 0.5 / np.tan(np.deg2rad(self.scene.model.cam_fovy[camera]) / 2)
        intrinsic = np.array([[scale, 0.0, -0.5], [0.0, -scale, -0.5], [0.0, 0.0, -1.0]])
        return (intrinsic @ extrinsic).astype(np.float32)

    def render(self) -> np.ndarray:
        """Render the agentview image at 256x256."""
        return self.render_camera("agentview", 256, 256)

    # --- perturbations -----------------------------------------------------------------------------------------------

    def _forget_crowd(self) -> None:
        """Go back from the scene of a changed layout, which is compiled for one episode, to the nominal one."""
        if self.scene is not self._nominal_scene:
            if self.scene in self._renderers:
                self._renderers.pop(self.scene).close()
            self.scene = self._nominal_scene

    def _change_look(self, change: Mapping[str, tuple[np.random.Generator, Values]]) -> dict[str, Any]:
        """Change cameras, lights and surfaces; return what was drawn."""
        appearance, model = self.scene.appearance, self.scene.model
        drawn: dict[str, Any] = {}
        if LIGHT in change:
            drawn |= change_light(appearance, *change[LIGHT])
        if BACKGROUND in change:
            items = [self.scene.items[name] for name in sorted(self.scene.placed)]
            table = model.geom("table").rgba[:3].copy()
            drawn |= change_table(appearance, *change[BACKGROUND], table, items)
        if CAMERA in change:
            drawn |= move_wrist_camera(appearance, *change[CAMERA])
            for orbit in agentview_orbits(*change[CAMERA]):
                appearance.orbit("agentview", PIVOT, **orbit)
                mujoco.mj_forward(model, self.scene.data)
                if self._sides_are_right(self._asked):
                    break
            drawn |= orbit
        if drawn:
            mujoco.mj_forward(model, self.scene.data)
        return drawn

    def _sides_are_right(self, task: int) -> bool:
        """Return True if what the instruction of a task calls leftmost or rightmost is that in `agentview`."""
        side = self.family.sides.get(task)
        if side is None:
            return True
        items, named = self.scene.items, self.goals_for(task)[0].item
        alike = sorted(name for name in self.scene.placed if items[name].kind == items[named].kind)
        projected = self.camera_projection("agentview") @ np.array([[*self.scene.position(n), 1.0] for n in alike]).T
        along = dict(zip(alike, side * projected[0] / projected[2], strict=True))
        return bool(along.pop(named) > max(along.values()) + SIDE_MARGIN)

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
