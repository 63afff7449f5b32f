"""Define an environment suite of your own: a ring moves over a board and touches the disc that the instruction names.

    python examples/own_suite.py        plays the expert and a random policy, and writes outputs/examples/own_suite.png

Every command knows the suite after it has imported this file, whose folder is on PYTHONPATH:

    export PYTHONPATH=examples
    uv run expert_table 'imports=[own_suite]' suite=reach
    uv run record_demonstrations 'imports=[own_suite]' suite=reach episodes=300
    uv run train_policy 'imports=[own_suite]' suite=reach demonstrations.episodes=300 training.steps=1000
    uv run eval_libero 'imports=[own_suite]' suite=reach checkpoint=outputs/train_policy/reach/seed0/policy
    uv run eval_libero 'imports=[own_suite]' suite=reach checkpoint=random

The training takes 1.4 minutes on two cores, and its policy then solves every episode.

`SuiteEnv` of envs/contract.py is all that evaluation needs. The other parts are optional: here `Labels` and an `Expert`
to record, `Cameras` for videos, and `TargetMasks` for `analyse_routing`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.recording.execution_noise import ExecutionNoise
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.rollout.video import contact_sheet
from cogvla.envs.suite import Suite, Task, chosen_start, get_suite, register_suite
from cogvla.policy.baselines import RandomPolicy
from cogvla.policy.interface import Embodiment

COLOURS = {"red": (214, 64, 52), "green": (52, 168, 83), "blue": (66, 103, 222)}
TASKS = tuple(Task(f"touch_{colour}", f"touch the {colour} disc") for colour in COLOURS)
MAX_STEPS = 50
BOARD, RADIUS, REACH, STEP = 0.5, 0.03, 0.02, 0.05
"""In metres: width of the board, radius of a disc, distance at which it counts as touched, motion of action 1.0."""
VIEWS = {"agentview": BOARD, "wrist": 0.2}
"""Camera -> width of its picture in metres. `agentview` looks down on the board, `wrist` follows the ring."""


class ReachEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """A board of 0.5 m with three discs, seen from above: image right is +x, image up is +y.

    The actions move the ring by 5 cm along x and y; the other entries of action and state are there because the
    contract has an arm's numbers, and nothing moves with them.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "render_fps": 20}

    def __init__(self, image_size: int = 128, render: bool = True) -> None:
        self._size, self._render = image_size, render
        image = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        state = gym.spaces.Box(-1, 1, (8,), np.float32)
        self.observation_space = gym.spaces.Dict({**dict.fromkeys(VIEWS, image), "state": state})
        self.action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    # --- SuiteEnv ---

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        options = options or {}
        self._scene, state = chosen_start(options, len(TASKS), self.np_random)
        self._asked = self._scene if options.get("asked") is None else int(options["asked"])
        if not 0 <= self._asked < len(TASKS):
            raise ValueError(f"task {self._asked} cannot be carried out in this scene")
        # Task and initial state decide the scene, whatever was played before.
        rng = np.random.default_rng([self._scene, state])
        self.ring, *self.discs = _apart(rng, 1 + len(TASKS))
        self._steps = 0
        others = [task for task in range(len(TASKS)) if task != self._asked]
        return self._observe(), {**self._info(), "alternative_tasks": others}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        if np.shape(action) != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers, got {action}")
        edge = BOARD / 2
        self.ring = np.clip(self.ring + STEP * np.clip(action[:2], -1, 1), -edge, edge)
        self._steps += 1
        info = self._info()
        return self._observe(), float(info["success"]), info["success"], self._steps >= MAX_STEPS, info

    def _info(self) -> dict[str, Any]:
        return {
            "success": self._touches(self._asked),
            "scene_task_success": self._touches(self._scene),
            "instruction": TASKS[self._asked].instruction,
        }

    def _touches(self, task: int) -> bool:
        return bool(np.linalg.norm(self.ring - self.discs[task]) < REACH)

    def _observe(self) -> dict[str, np.ndarray]:
        black = np.zeros((self._size, self._size, 3), np.uint8)
        images = {name: self.render_camera(name, self._size, self._size) if self._render else black for name in VIEWS}
        state = np.zeros(8, np.float32)
        state[:2] = self.ring
        return {**images, "state": state}

    # --- Cameras ---

    def render_camera(self, name: str, height: int, width: int) -> np.ndarray:
        x, y = self._points(name, height, width)
        image = np.full((height, width, 3), (226, 222, 214), np.uint8)
        image[np.maximum(abs(x), abs(y)) > BOARD / 2] = (70, 72, 78)
        for disc, colour in zip(self.discs, COLOURS.values(), strict=True):
            image[np.hypot(x - disc[0], y - disc[1]) < RADIUS] = colour
        distance = np.hypot(x - self.ring[0], y - self.ring[1])
        image[(distance > 0.010) & (distance < 0.018)] = (20, 20, 24)
        return image

    def _points(self, name: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y of every pixel in metres, [H,W] each."""
        centre = self._centre(name)
        u = (np.arange(width) + 0.5) / width - 0.5
        v = (np.arange(height) + 0.5) / height - 0.5
        x, y = np.meshgrid(centre[0] + VIEWS[name] * u, centre[1] - VIEWS[name] * v)
        return x, y

    def _centre(self, name: str) -> np.ndarray:
        return self.ring if name == "wrist" else np.zeros(2)

    # --- Labels ---

    def labels(self) -> dict[str, np.ndarray]:
        return self.labels_for(self._asked)

    def labels_for(self, task: int) -> dict[str, np.ndarray]:
        place = np.append(self.discs[task], 0.0).astype(np.float32)
        return {"target": place, "goal": place}

    def camera_projection(self, name: str) -> np.ndarray:
        """Return the projection of a camera straight above, without perspective: d is 1 everywhere."""
        (x, y), view = self._centre(name), VIEWS[name]
        rows = [[1 / view, 0, 0, 0.5 - x / view], [0, -1 / view, 0, 0.5 + y / view], [0, 0, 0, 1]]
        return np.array(rows, np.float32)

    # --- TargetMasks ---

    def target_mask(self, name: str, height: int, width: int) -> np.ndarray:
        x, y = self._points(name, height, width)
        disc = self.discs[self._asked]
        return np.hypot(x - disc[0], y - disc[1]) < RADIUS


class ReachExpert:
    """Go straight to the disc, at half speed at most."""

    def __init__(self, env: gym.Env, rng: np.random.Generator, noise: float = 0.0) -> None:
        self._env: Any = env.unwrapped
        self._noise = ExecutionNoise(rng, noise)
        self.phase = 0

    def act(self) -> np.ndarray:
        toward = (self._env.labels()["target"][:2] - self._env.ring) / STEP
        toward *= min(1.0, 0.5 / max(float(np.abs(toward).max()), 1e-6))
        return np.array([*toward, 0, 0, 0, 0, -1], np.float32)

    def noisy(self, action: np.ndarray, /) -> np.ndarray:
        return self._noise(action)


def _apart(rng: np.random.Generator, count: int, least: float = 0.1) -> list[np.ndarray]:
    """Draw points on the board, each two of them at least `least` metres apart."""
    points: list[np.ndarray] = []
    while len(points) < count:
        point = rng.uniform(-BOARD / 2 + RADIUS, BOARD / 2 - RADIUS, 2)
        if all(np.linalg.norm(point - other) >= least for other in points):
            points.append(point)
    return points


def reach() -> Suite:
    """Build the suite. Environments and experts are built in other processes, so both are classes of a module."""
    return Suite("reach", TASKS, MAX_STEPS, ReachEnv, expert=ReachExpert)


register_suite("reach", reach)


def main() -> None:
    """Play the expert, then a random policy, and draw one of its episodes."""
    suite = get_suite("reach")
    env = ReachEnv()
    steps: list[int] = []
    for task in range(len(suite.tasks)):
        for state in range(10):
            env.reset(options={"task": task, "initial_state": state})
            expert, done, count = ReachExpert(env, np.random.default_rng(state), noise=1.0), False, 0
            while not done and count < suite.max_steps:
                _, _, done, _, _ = env.step(expert.noisy(expert.act()))
                count += 1
            steps += [count] if done else []
    print(f"expert: {len(steps)} of {10 * len(suite.tasks)} episodes, {np.mean(steps):.0f} steps on average")

    # The policies of the tabletop suites have the cameras, state and actions of this one.
    policy = RandomPolicy(build(Embodiment, load("embodiment", "tabletop"), "embodiment"))
    specs = [EpisodeSpec(task, state) for task in range(len(suite.tasks)) for state in range(10)]
    output = Path("outputs", "examples")
    film, picture = output / "own_suite.mp4", output / "own_suite.png"
    # In this process (workers=0): another one could not import a suite of the script that was started.
    results = list(
        rollout(policy, suite, specs, choose_video=lambda r: film if (r.task, r.initial_state) == (0, 0) else None)
    )
    errors = [result.error for result in results if result.error is not None]
    print(f"random policy: {sum(r.success for r in results)} of {len(results)} episodes, {len(errors)} errors")
    picture.write_bytes(contact_sheet(film))
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
