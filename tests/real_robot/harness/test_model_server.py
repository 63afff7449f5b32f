"""The model server for vla-eval, asked by vla-eval's own client: actions, sessions, and what it refuses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.envs.rollout.rollout import RolloutSettings
from cogvla.policy.chunking import TemporalEnsemble
from cogvla.policy.interface import Camera, Embodiment, Observation
from cogvla.real_robot.serving.batching import BatchSettings
from cogvla.real_robot.serving.resize import resize_image
from cogvla.tests.support.extras import needs
from cogvla.tests.support.policy_servers import ROBOT, SumPolicy, observation

pytest.importorskip("vla_eval", reason=needs("harness"))

from vla_eval.api import serve_background
from vla_eval.connection import Connection
from vla_eval.model_servers.base import ModelServer
from vla_eval.protocol.messages import MessageType
from vla_eval.specs import GRIPPER_CLOSE_NEG, GRIPPER_CLOSE_POS, POSITION_ABSOLUTE, ROTATION_EULER

from cogvla.envs.harness.specs import SUITE_ACTION, check_fit, listed, policy_action, suite_observation
from cogvla.real_robot.harness.model_server import PolicyModelServer

TABLETOP = build(Embodiment, load("embodiment", "tabletop"), "embodiment")


class ResizingPolicy(SumPolicy):
    """Says, as trained policies do, how images of other sizes become its own."""

    resize_kernel = "bilinear"


def sent(seen: Observation | None = None, /, **changes: Any) -> dict[str, Any]:
    """What a benchmark sends for an observation; None removes a key."""
    seen = seen or observation()
    message = {
        "images": {name: image[0] for name, image in seen.images.items()},
        "task_description": seen.instruction[0],
        "state": seen.state[0],
    }
    return {key: value for key, value in (message | changes).items() if value is not None}


def pictures(**changes: Any) -> dict[str, Any]:
    """The images of `sent` with others; None removes one."""
    return {key: value for key, value in (sent()["images"] | changes).items() if value is not None}


async def told(uri: str, messages: Sequence[Any], task: dict[str, Any] | None = None) -> list[Any]:
    """The answers to observations of one episode: actions, or the text of the error."""
    async with Connection(uri, max_retries=1) as client:
        await client.start_episode({"task": task or {"name": "a task"}})
        return [await answered(client, message) for message in messages]


async def answered(client: Connection, message: Any) -> Any:
    number = await client.send(MessageType.OBSERVATION, message)
    answer = await client.recv(timeout=300)
    assert answer.seq == number, "each observation has one answer of its own"
    return answer.payload["actions"] if answer.type is MessageType.ACTION else answer.payload["error"]


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    with serve_background(PolicyModelServer(SumPolicy())) as server:
        yield server.url


def served(policy: Any, messages: Sequence[Any], **settings: Any) -> list[Any]:
    with serve_background(PolicyModelServer(policy, **settings)) as server:
        return asyncio.run(told(server.url, messages))


def chunk(seed: int = 0) -> np.ndarray:
    return SumPolicy().act(observation(seed)).actions[0]


def test_chunks_are_executed_as_in_eval_libero() -> None:
    messages = [sent(observation(seed)) for seed in range(7)]
    whole = served(SumPolicy(), messages)
    np.testing.assert_array_equal(whole, [*chunk(0), *chunk(5)[:2]])
    part = served(SumPolicy(), messages, execution=RolloutSettings(execute_steps=3))
    np.testing.assert_array_equal(part, [*chunk(0)[:3], *chunk(3)[:3], chunk(6)[0]])
    averaged = served(SumPolicy(), messages, execution=RolloutSettings(temporal_ensemble=0.5))
    ensemble = TemporalEnsemble(0.5)
    expected = [ensemble.plan([0], chunk(seed)[None])[0, 0] for seed in range(7)]
    np.testing.assert_array_equal(averaged, expected)


def test_episodes_do_not_share_chunks() -> None:
    policy = SumPolicy()

    async def together(uri: str) -> None:
        async with Connection(uri) as one, Connection(uri) as two:
            for client in (one, two):  # with the same names, as shards of one run may have
                await client.start_episode({"task": {}, "recording": {"sid": "same", "eid": "same"}})
                assert "needs `images`" in await answered(client, [])  # after it, the server knows of the episode
            for index in range(3):
                answers = await asyncio.gather(*(answered(c, sent(observation(s))) for s, c in enumerate((one, two))))
                np.testing.assert_array_equal(answers, [chunk(0)[index], chunk(1)[index]])
            await one.end_episode({})
            await one.start_episode({"task": {}})  # the rest of its chunk is forgotten, not that of the other one
            np.testing.assert_array_equal(await answered(two, sent(observation(2))), chunk(1)[3])
            await two.end_episode({})  # nobody else is waited for
            np.testing.assert_array_equal(await answered(one, sent(observation(2))), chunk(2)[0])

    with serve_background(PolicyModelServer(policy, BatchSettings(max_batch=2, batch_wait_ms=60_000))) as server:
        policy.batches.clear()
        asyncio.run(together(server.url))
    assert policy.batches[0] == 2, "both asked at once"


def test_images_of_other_sizes_are_resized_as_by_the_policy_server() -> None:
    large = observation(3, robot=replace(ROBOT, cameras=tuple(Camera(c.name, 24, 32) for c in ROBOT.cameras)))
    small = replace(large, images={n: resize_image(i[0], (8, 8), "bilinear")[None] for n, i in large.images.items()})
    (answer,) = served(ResizingPolicy(), [sent(large)])
    np.testing.assert_array_equal(answer, SumPolicy().act(small).actions[0, 0])


def test_names_of_benchmarks() -> None:
    state = observation().state[0]
    (answer,) = served(SumPolicy(), [sent(state=None, states=state.astype(float), controller_states=state)])  # LIBERO
    np.testing.assert_array_equal(answer, chunk()[0])
    seen = sent()["images"]
    others = {"front": seen["agentview"], "hand": seen["wrist"], "top": np.zeros((4, 4), np.uint8)}
    cameras = {"agentview": "front", "wrist": "hand"}
    (answer,) = served(SumPolicy(), [sent(images=others)], cameras=cameras)
    np.testing.assert_array_equal(answer, chunk()[0])


BAD: dict[str, tuple[Any, str]] = {
    "no map": ([1, 2], "needs `images`"),
    "text": ("go", "needs `images`"),
    "no images": (sent(images=None), "needs `images`"),
    "list of images": (sent(images=[np.zeros((8, 8, 3), np.uint8)]), "needs `images`"),
    "no wrist": (sent(images=pictures(wrist=None)), "no image wrist; it has 'agentview'"),
    "other camera": (sent(images={"front": np.zeros((8, 8, 3), np.uint8)}), "no image agentview, wrist"),
    "empty images": (sent(images={}), "it has none"),
    "float image": (sent(images=pictures(wrist=np.zeros((8, 8, 3), np.float32))), "images/wrist must be a uint8"),
    "16 bits": (sent(images=pictures(wrist=np.zeros((8, 8, 3), np.uint16))), "images/wrist must be a uint8"),
    "grey": (sent(images=pictures(agentview=np.zeros((8, 8), np.uint8))), "images/agentview must be a uint8"),
    "channels first": (sent(images=pictures(wrist=np.zeros((3, 8, 8), np.uint8))), "images/wrist must be a uint8"),
    "transparent": (sent(images=pictures(wrist=np.zeros((8, 8, 4), np.uint8))), "images/wrist must be a uint8"),
    "batch": (sent(images=pictures(wrist=np.zeros((1, 8, 8, 3), np.uint8))), "images/wrist must be a uint8"),
    "text as image": (sent(images=pictures(wrist="black")), "images/wrist must be a uint8"),
    "map as image": (sent(images=pictures(wrist={"rgb": 0})), "images/wrist"),
    "huge": (sent(images=pictures(wrist=np.zeros((8, 900, 3), np.uint8))), "8 rows and 900 columns"),
    "no state": (sent(state=None), "neither of state and states"),
    "two states": (sent(states=np.zeros(4)), "both of state and states"),
    "wide state": (sent(state=np.zeros(8)), "state must be an array of 4 numbers, got float64 [8]"),
    "state of text": (sent(state="0 0 0 0"), "state must be an array of 4 numbers"),
    "NaN": (sent(state=np.full(4, np.nan)), "state has NaN"),
    "no instruction": (sent(task_description=None), "task_description must be the instruction as text, got None"),
    "empty instruction": (sent(task_description=""), "task_description must have 1 to 1000 characters, got 0"),
    "blank instruction": (sent(task_description=" \n"), "task_description must have 1 to 1000 characters, got 0"),
    "number": (sent(task_description=7), "task_description must be the instruction as text, got 7"),
    "list of words": (sent(task_description=["go", "up"]), "task_description must be the instruction as text"),
    "array as instruction": (sent(task_description=np.zeros(3)), "task_description must be the instruction as text"),
    "control character": (sent(task_description="go\x00up"), "task_description has the character '\\x00'"),
    "unreadable": (sent(task_description="\u200b"), "the instruction has no words"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_observations_get_one_line_and_the_episode_goes_on(
    name: str, toy: str, caplog: pytest.LogCaptureFixture
) -> None:
    message, said = BAD[name]
    refused, answer = asyncio.run(told(toy, [message, sent()]))
    assert said in refused
    assert len(refused.splitlines()) == 1
    assert not any(record.exc_info for record in caplog.records), "no traceback"
    np.testing.assert_array_equal(answer, chunk()[0])


@pytest.mark.parametrize(("instruction", "said"), [("raise", "the policy failed"), ("nan", "NaN or infinite")])
def test_a_failing_policy_is_an_error(instruction: str, said: str, toy: str) -> None:
    refused, answer = asyncio.run(told(toy, [sent(task_description=instruction), sent()]))
    assert said in refused
    assert "secret" not in refused
    np.testing.assert_array_equal(answer, chunk()[0])


def test_an_observation_outside_of_an_episode_is_refused(toy: str) -> None:
    async def ask() -> list[Any]:
        async with Connection(toy) as client:
            before = await answered(client, sent())
            await client.start_episode({})
            during = await answered(client, sent())
            await client.end_episode({})
            return [before, during, await answered(client, sent())]

    before, during, after = asyncio.run(ask())
    assert "before the start of its episode" in before
    assert "before the start of its episode" in after
    np.testing.assert_array_equal(during, chunk()[0])


def task(action: Any = SUITE_ACTION, seen: Any = None) -> dict[str, Any]:
    return {"name": "a task", "action_spec": listed(action), "observation_spec": listed(seen or suite_observation())}


MISFITS: dict[str, tuple[Embodiment, dict[str, Any], str]] = {
    "gripper the other way": (TABLETOP, task({**SUITE_ACTION, "gripper": GRIPPER_CLOSE_NEG}), "close_positive vs"),
    "policy's gripper": (replace(TABLETOP, gripper_open=1.0, gripper_close=-1.0), task(), "binary_close_negative vs"),
    "absolute positions": (
        TABLETOP,
        task({**SUITE_ACTION, "position": POSITION_ABSOLUTE}),
        "delta_xyz vs absolute_xyz",
    ),
    "other rotations": (TABLETOP, task({**SUITE_ACTION, "rotation": ROTATION_EULER}), "axis_angle vs euler_xyz"),
    "no wrist": (TABLETOP, task(seen=suite_observation(wrist=False)), "[wrist]: server expects it"),
    "no state": (TABLETOP, task(seen=suite_observation(state=False)), "[state]: server expects it"),
    "other robot": (build(Embodiment, load("embodiment", "aloha"), ""), task(), "'aloha'"),
    "joints": (build(Embodiment, load("embodiment", "six_joints"), ""), task(), "no overlapping keys"),
    "no specification": (TABLETOP, task() | {"action_spec": [{"dims": 7}]}, "cannot be read"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_benchmark_that_does_not_fit_is_refused(name: str, caplog: pytest.LogCaptureFixture) -> None:
    robot, about, said = MISFITS[name]
    with serve_background(PolicyModelServer(SumPolicy(robot))) as server:
        seen = sent(observation(robot=robot))
        answers = asyncio.run(told(server.url, [seen, seen], about))
        (fits,) = asyncio.run(told(server.url, [seen]))  # another benchmark, that does not say what it needs
    for answer in answers:
        assert said in answer
        assert len(answer.splitlines()) == 1
    assert not any(record.exc_info for record in caplog.records)
    assert fits.shape == (robot.action_dim,)


def test_the_conventions_of_libero() -> None:
    libero = pytest.importorskip("vla_eval.benchmarks.libero.benchmark").LIBEROBenchmark
    for name in ("tabletop", "libero", "libero_small"):
        robot = build(Embodiment, load("embodiment", name), "")
        server = PolicyModelServer(SumPolicy(robot))
        assert policy_action(robot)["gripper"] == GRIPPER_CLOSE_POS
        benchmark = libero(**server.get_observation_params())
        check_fit(robot, server.cameras, benchmark.get_action_spec(), benchmark.get_observation_spec())
        with pytest.raises(ValueError, match=r"\[wrist\]"):
            check_fit(robot, server.cameras, libero().get_action_spec(), libero().get_observation_spec())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"cameras": {"agentview": "front"}}, "cameras must give an image for each"),
        ({"cameras": {"agentview": "a", "wrist": "b", "top": "c"}}, "cameras must give an image for each"),
        ({"cameras": ["agentview"]}, "cameras must give an image for each"),
        ({"cameras": {"agentview": "front", "wrist": "front"}}, "one image to two"),
        ({"execution": RolloutSettings(execute_steps=6)}, "the policy predicts 5 actions at once"),
    ],
)
def test_settings_that_do_not_fit_the_policy(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PolicyModelServer(SumPolicy(), **settings)


def test_it_is_a_model_server_and_leaves_the_log_as_it_was() -> None:
    carrier = logging.getLogger("vla_eval.model_servers.serve")
    before = list(carrier.filters)
    server = PolicyModelServer(SumPolicy())
    assert isinstance(server, ModelServer)
    for _ in range(2):  # one after the other
        with serve_background(server) as running:
            np.testing.assert_array_equal(asyncio.run(told(running.url, [sent()])), [chunk()[0]])
    assert carrier.filters == before
