"""Our suites as benchmarks of vla-eval, played by the unmodified package: the same episodes as in `eval_libero`."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cogvla.envs import suite as registry
from cogvla.envs.evaluation.protocol import protocol_for
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import EVALUATION_STATES, get_suite, register_suite
from cogvla.policy.checkpoint import load_policy
from cogvla.tests.support import point_suite
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.point_suite import ToyPolicy, solvable, toy_suite

pytest.importorskip("vla_eval", reason=needs("harness"))

import vla_eval
from vla_eval.rotation import matrix_to_quat, quat_to_axisangle

from cogvla.envs.harness.benchmark import ParameterError, SuiteBenchmark, TabletopBenchmark
from cogvla.envs.rotations import rotation_vector
from cogvla.real_robot.harness.model_server import PolicyModelServer

POINT: dict[str, Any] = {"suite": "point", "image_size": 32, "imports": [point_suite.__name__]}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> str:
    """A suite whose second task raises in its first episode."""
    monkeypatch.setattr(registry, "_SUITES", dict(registry._SUITES))
    register_suite("faulty", partial(toy_suite, fault="raise"))
    return "faulty"


def played(policy: Any, execution: Any = None, **entry: Any) -> dict[str, Any]:
    """What vla-eval reports of one benchmark."""
    config = {"benchmarks": [{"benchmark": f"{TabletopBenchmark.__module__}:TabletopBenchmark", **entry}]}
    server = PolicyModelServer(policy, execution=execution)
    (result,) = vla_eval.evaluate(server, config, docker=False, no_save=True)
    return result


def outcomes(result: dict[str, Any]) -> dict[tuple[str, int], tuple[bool, int]]:
    """(Task, episode) -> success and steps."""
    return {
        (task["task"], episode["episode_id"]): (episode["metrics"]["success"], episode["steps"])
        for task in result["tasks"]
        for episode in task["episodes"]
    }


def test_the_known_outcomes_of_a_toy_come_out() -> None:
    result = played(ToyPolicy(), episodes_per_task=6, params=POINT)
    found = outcomes(result)
    assert len(found) == 18
    assert result["num_errors"] == 0
    for (_, episode), (success, steps) in found.items():
        assert success == solvable(episode)
        assert (steps == point_suite.MAX_STEPS) != success
    later = played(ToyPolicy(), episodes_per_task=2, params={**POINT, "changes": {"first_initial_state": 4}})
    assert {key: found[key[0], 4 + key[1]] for key in outcomes(later)} == outcomes(later)


def test_the_same_episodes_as_in_eval_libero() -> None:
    policy, suite = load_policy(SHIPPED), get_suite("tabletop_object")
    protocol = protocol_for(suite, None, {"episodes_per_task": 2}).for_suite(suite)
    settings = protocol.rollout_settings()
    names = [suite.tasks[task].name for task in (0, 5)]
    ours = {
        (suite.tasks[r.task].name, r.initial_state): (r.success, r.steps)
        for r in rollout(policy, suite, protocol.episodes(suite, [0, 5]), settings=settings)
    }
    result = played(policy, settings, episodes_per_task=2, tasks=names)
    assert outcomes(result) == ours
    assert result["num_errors"] == 0


def test_an_exception_in_an_episode_is_an_error(faulty: str) -> None:
    result = played(ToyPolicy(), episodes_per_task=2, params={"suite": faulty, "image_size": 32})
    assert result["num_errors"] == 1
    (failed,) = [e for task in result["tasks"] for e in task["episodes"] if e.get("failure_reason")]
    assert failed["failure_reason"] == "env_step"
    assert "the toy is broken" in failed["failure_detail"]
    assert len(outcomes(result | {"tasks": [t for t in result["tasks"] if t["task"] != "left"]})) == 4


def benchmark(**params: Any) -> SuiteBenchmark:
    made = SuiteBenchmark(**{**POINT, **params})
    asyncio.run(made.start_episode(made.get_tasks()[0] | {"episode_idx": 1}))
    return made


BAD_ACTIONS: dict[str, Any] = {
    "none": {},
    "other key": {"action": np.zeros(7)},
    "six": {"actions": np.zeros(6)},
    "two arms": {"actions": np.zeros(14)},
    "a chunk": {"actions": np.zeros((4, 7))},
    "NaN": {"actions": np.full(7, np.nan)},
    "infinite": {"actions": [np.inf] * 7},
    "text": {"actions": ["left"] * 7},
    "one number": {"actions": 0.5},
    "no map": [0.0] * 7,
}


@pytest.mark.parametrize("name", BAD_ACTIONS)
def test_other_actions_are_refused(name: str) -> None:
    made = benchmark()
    with pytest.raises(ValueError, match="`actions` must be 7 finite numbers") as error:
        asyncio.run(made.apply_action(BAD_ACTIONS[name]))
    assert len(str(error.value).splitlines()) == 1
    asyncio.run(made.apply_action({"actions": [0.0] * 7}))
    assert not asyncio.run(made.is_done())


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"suite": "tabletop_objects"}, "unknown suite 'tabletop_objects'; one of .*did you mean tabletop_object"),
        ({"suite": None}, "unknown suite"),
        ({"suite": 3}, "unknown suite"),
        ({"suite": "tabletop_object", "protocol": "openvla_otf"}, "openvla_oft"),
        ({"changes": {"episodes": 3}}, "unknown key episodes in protocol"),
        ({"changes": {"max_steps": -3}}, "max_steps must be positive"),
        ({"changes": "seed"}, "changes must be a mapping"),
        ({"libero": "lean"}, "libero must be a mapping"),
        ({"image_size": 0}, "image_size must be a whole number of pixels"),
        ({"image_size": 64.0}, "image_size must be a whole number of pixels"),
        ({"image_size": "128"}, "image_size must be a whole number of pixels"),
        ({"imports": ["no_such_module"]}, "imports: cannot import no_such_module"),
        ({"imports": "no_such_module"}, "imports: cannot import no_such_module"),
    ],
)
def test_wrong_parameters_are_one_line(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said) as error:
        SuiteBenchmark(**params)
    assert len(str(error.value).splitlines()) == 1
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, SystemExit)
    assert error.value.code == str(error.value), "what Python writes to the terminal"


@pytest.mark.parametrize("first", [0, 10, EVALUATION_STATES - 1])
def test_there_are_no_more_episodes_than_initial_states(first: int) -> None:
    made = SuiteBenchmark(**POINT, changes={"first_initial_state": first, "episodes_per_task": 1})
    last = made.get_metadata()["max_episodes_per_task"] - 1
    assert first + last == EVALUATION_STATES - 1
    task = made.get_tasks()[2]
    asyncio.run(made.start_episode(task | {"episode_idx": last}))
    with pytest.raises(ValueError, match="has the initial states 0 to 49 for evaluation, not 50: lower"):
        asyncio.run(made.start_episode(task | {"episode_idx": last + 1}))


@pytest.mark.parametrize(
    ("params", "keys"),
    [
        ({}, {"agentview", "wrist", "state", "language"}),
        ({"send_state": False}, {"agentview", "wrist", "language"}),
        ({"send_wrist_image": False}, {"agentview", "state", "language"}),
        ({"send_state": False, "send_wrist_image": False}, {"agentview", "language"}),
    ],
)
def test_it_sends_what_it_says(params: dict[str, Any], keys: set[str]) -> None:
    made = benchmark(**params)
    assert made.get_observation_spec().keys() == keys
    seen = asyncio.run(made.get_observation())
    assert {*seen["images"], *({"state"} if "state" in seen else ()), "language"} == keys
    assert all(image.dtype == np.uint8 and image.shape == (32, 32, 3) for image in seen["images"].values())
    assert seen["task_description"] == point_suite.TASKS[0].instruction


def test_rests_in_real_time_until_an_action_comes() -> None:
    made = benchmark()

    async def live(answers: int) -> dict[str, Any]:
        await made.start_episode(made.get_tasks()[0] | {"episode_idx": 1})
        last = None
        for _ in range(point_suite.MAX_STEPS):
            await made.apply_action(made.get_hold_action(last))
            if answers:
                last = {"actions": np.array([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1.0])}
        assert await made.is_done()
        return await made.get_result()

    assert made.get_hold_action(None)["actions"].tolist() == [0, 0, 0, 0, 0, 0, -1]
    closed = {"actions": np.array([0.3] * 6 + [1.0])}
    assert made.get_hold_action(closed)["actions"].tolist() == [0, 0, 0, 0, 0, 0, 1], "what it holds is not dropped"
    assert asyncio.run(live(answers=1)) == {"success": False}
    with pytest.raises(RuntimeError, match="no action came in the whole episode"):
        asyncio.run(live(answers=0))


def test_rotations_are_those_of_libero() -> None:
    """vla-eval's axis-angle of a rotation is ours."""
    for vector in ([0.3, 0, 0], [0, -0.7, 0.2], [1.0, 1.0, -1.0]):
        angle = float(np.linalg.norm(vector))
        x, y, z = np.asarray(vector) / angle
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        matrix = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        np.testing.assert_allclose(rotation_vector(matrix), vector, atol=1e-6)
        np.testing.assert_allclose(quat_to_axisangle(matrix_to_quat(matrix)), vector, atol=1e-5)


def test_results_are_recorded(tmp_path: Path) -> None:
    config = {"benchmarks": [{"benchmark": f"{SuiteBenchmark.__module__}:SuiteBenchmark", "params": POINT}]}
    (result,) = vla_eval.evaluate(PolicyModelServer(ToyPolicy()), config, docker=False, output_dir=tmp_path)
    assert result["num_errors"] == 0
    assert result["num_episodes_total"] == 3
    assert result["mean_success"] == 0, "the first initial state of each task cannot succeed"
    assert list(tmp_path.glob("*_aggregate.json"))
