"""Any suite of the registry as a benchmark of vla-eval, with the episodes and limits of `eval_libero`.

    benchmarks:
      - benchmark: cogvla.envs.harness.benchmark:TabletopBenchmark
        episodes_per_task: 10
        params: {suite: tabletop_object}

Episode i of a task starts at the protocol's i-th initial state. Its steps are played by the `Player` of
`eval_libero`, so only the policy's side differs.

Shape legend: A action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import DimSpec

from cogvla.envs.contract import ACTION_DIM, CAMERAS, GRIPPER, OPEN, resting_action
from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.evaluation.protocol import protocol_for
from cogvla.envs.harness.specs import SUITE_ACTION, listed, suite_observation
from cogvla.envs.rollout.player import Advance, Failed, Finished, Observed, Play, Player, PlayerRequest, PlayerSettings
from cogvla.envs.suite import get_suite
from cogvla.plugins import import_plugin


class ParameterError(SystemExit, ValueError):
    """A parameter of a benchmark is wrong: a ValueError that `vla-eval run`, which catches none, shows as one line."""


class SuiteBenchmark(StepBenchmark):
    """A suite as a benchmark. Its keywords are the `params` of vla-eval's configuration.

    Args:
        suite: name of a registered suite.
        protocol: name of the evaluation protocol; None: the suite's own. Only what concerns the environment is taken
            from it: initial states, waiting steps, step limit, seed. The chunks are the model server's business.
        changes: keys of the protocol with other values.
        image_size: rows and columns of the images, in pixels.
        send_state: send the state; a model server that needs it says so by itself.
        send_wrist_image: send the view of the wrist, likewise.
        imports: Python modules to import first, which register suites.
        libero: settings of the suites of LIBERO, keys of `LiberoSettings`.

    Raises:
        ParameterError: there is no such suite, protocol or key, or a value makes no sense.
    """

    _ALL_RECORD_FIELDS = frozenset({"action", "state", "success"})

    def __init__(
        self,
        suite: str = "tabletop_object",
        protocol: str | None = None,
        changes: Mapping[str, Any] | None = None,
        image_size: int = 128,
        send_state: bool = True,
        send_wrist_image: bool = True,
        imports: Sequence[str] = (),
        libero: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            for name, value in (("changes", changes), ("libero", libero)):
                if value is not None and not isinstance(value, Mapping):
                    raise ValueError(f"{name} must be a mapping of keys to values, got {value!r}")
            if type(image_size) is not int or image_size < 16:
                raise ValueError(f"image_size must be a whole number of pixels from 16, got {image_size!r}")
            for module in [imports] if isinstance(imports, str) else imports:
                import_plugin(module, "imports")
            self._suite = get_suite(suite, {"libero": libero or {}})
            self._protocol = protocol_for(self._suite, protocol, changes or {}).for_suite(self._suite)
        except (ValueError, OSError, TypeError) as error:
            raise ParameterError(f"error: {error}") from error
        self._observation = suite_observation(send_wrist_image, send_state)
        limit = self._protocol.max_steps
        assert isinstance(limit, int), "`for_suite` has chosen the limit"
        self._limit = limit
        self._steps = self._untold = 0  # of the episode: all, and those before the first answer
        self._player = Player(
            PlayerSettings(
                make=self._suite.make,
                image_size=image_size,
                cameras=CAMERAS,
                max_steps=limit,
                waiting_steps=self._protocol.waiting_steps,
                waiting_action=resting_action(),
                suite=self._suite.name,
                instructions=tuple(task.instruction for task in self._suite.tasks),
            )
        )

    def get_tasks(self) -> list[dict[str, Any]]:
        """Return the tasks. What they say about action and observation travels to the model server."""
        specs = {"action_spec": listed(SUITE_ACTION), "observation_spec": listed(self._observation)}
        return [
            {"name": task.name, "suite": self._suite.name, "task_id": index, "instruction": task.instruction, **specs}
            for index, task in enumerate(self._suite.tasks)
        ]

    def reset(self, task: Mapping[str, Any]) -> Observed:
        """Set up the scene of an episode; ValueError if the suite has no such initial state."""
        state = self._protocol.first_initial_state + int(task.get("episode_idx", 0))
        if state >= self._suite.initial_states:
            raise ValueError(
                f"suite {self._suite.name!r} has the initial states 0 to {self._suite.initial_states - 1} for "
                f"evaluation, not {state}: lower episodes_per_task"
            )
        observed = self._played(Play(EpisodeSpec(task["task_id"], state, seed=self._protocol.seed)))
        assert isinstance(observed, Observed)
        self._steps = self._untold = 0
        self._recorder.record_video(observed.images[CAMERAS[0]])
        return observed

    def step(self, action: Mapping[str, Any]) -> StepResult:
        """Carry out one action; ValueError if it is none of a suite."""
        action_A = _action(action)
        reply = self._played(Advance(action_A[None]))
        self._steps += 1
        if isinstance(reply, Finished):
            self._recorder.record_step(action=action_A, success=reply.success)
            return StepResult(obs=None, reward=reply.reward, done=True, info={"success": reply.success})
        self._recorder.record_video(reply.images[CAMERAS[0]])
        self._recorder.record_step(action=action_A, state=reply.state, success=False)
        return StepResult(obs=reply, reward=0.0, done=False, info={})

    def make_obs(self, raw_obs: Observed, task: Mapping[str, Any]) -> dict[str, Any]:
        """Return images uint8 [H,W,3], upright, the instruction, and the state float32 [8]."""
        return {
            "images": {name: raw_obs.images[name] for name in CAMERAS if name in self._observation},
            "task_description": raw_obs.instruction,
            **({"state": raw_obs.state} if "state" in self._observation else {}),
        }

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        """Return whether the task of the instruction succeeded.

        Raises:
            RuntimeError: in real time, the model server has never answered; that is an error, no failure of a policy.
        """
        if self._steps and self._untold == self._steps:
            raise RuntimeError("no action came in the whole episode; the model server's log says why")
        return {"success": bool(step_result.info.get("success", False))}

    def get_hold_action(self, last_action: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what to do in real time while no new action is there: rest, with the hand as it was last told."""
        self._untold += last_action is None
        return {"actions": resting_action(OPEN if last_action is None else _action(last_action)[GRIPPER])}

    def get_metadata(self) -> dict[str, Any]:
        """Return the limits of the protocol."""
        episodes = self._suite.initial_states - self._protocol.first_initial_state
        return {"max_steps": self._limit, "max_episodes_per_task": episodes, "suite": self._suite.name}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return dict(SUITE_ACTION)

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return dict(self._observation)

    def cleanup(self) -> None:
        """Free the simulator."""
        self._player.close()

    def _played(self, request: PlayerRequest) -> Observed | Finished:
        reply = self._player.handle(request)
        if isinstance(reply, Failed):
            raise RuntimeError(reply.text)
        assert isinstance(reply, Observed | Finished)
        return reply


class TabletopBenchmark(SuiteBenchmark):
    """`SuiteBenchmark` by the name that stands in the results of the tabletop suites."""


def _action(action: Mapping[str, Any]) -> np.ndarray:
    """Return the numbers of an answer of a model server as float32 [A]; ValueError if there are other ones."""
    values = action.get("actions") if isinstance(action, Mapping) else None
    numbers = np.asarray(values) if isinstance(values, np.ndarray | list) else np.empty(0)
    if numbers.shape != (ACTION_DIM,) or numbers.dtype.kind not in "fiu" or not np.isfinite(numbers).all():
        got = f"{numbers.dtype} {list(numbers.shape)}" if isinstance(values, np.ndarray | list) else repr(values)[:60]
        hint = "; let the model server send the actions of a chunk one by one" if numbers.ndim == 2 else ""
        raise ValueError(
            f"`actions` must be {ACTION_DIM} finite numbers (position, rotation, gripper), got {got}{hint}"
        )
    return numbers.astype(np.float32)
