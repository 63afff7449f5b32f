"""Clients over real sockets: answers, deadlines, and what happens when the server or the network goes away."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from cogvla.policy.interface import ActionChunk, Camera, Committed, Observation
from cogvla.real_robot.serving.async_client import (
    Answer,
    AsyncPolicyClient,
    ClientSettings,
    RefusedError,
    UnavailableError,
)
from cogvla.real_robot.serving.client import PolicyClient, ReconnectingPolicyClient
from cogvla.real_robot.serving.reconnecting import Backoff, ReconnectingClient
from cogvla.real_robot.serving.remote_policy import RemotePolicy
from cogvla.real_robot.serving.request import ImageOffer
from cogvla.real_robot.serving.server_info import ServerInfo
from cogvla.real_robot.serving.wire import FrameError, pack
from cogvla.tests.support.policy_servers import (
    LIBERO_KEYS,
    ROBOT,
    ServerProcess,
    StallingProxy,
    SumPolicy,
    free_port,
    observation,
    serving,
)
from cogvla.tests.support.waiting import until

OLD_METADATA: dict[str, Any] = {
    "server": "cogvla",
    "protocol_version": 1,
    "embodiment": {
        "name": "toy_arm",
        "cameras": [{"name": "agentview", "height": 8, "width": 8}, {"name": "wrist", "height": 8, "width": 8}],
        "state_dim": 4,
        "action_dim": 3,
        "chunk": 5,
        "control_hz": 20.0,
        "state_normalisation": "q99",
        "action_normalisation": "q99",
        "action_normalise_mask": [True, True, True],
        "gripper_index": 2,
        "gripper_open": -1.0,
        "gripper_close": 1.0,
    },
    "request": {
        "state": "observation/state",
        "prompt": "prompt",
        "images": {"agentview": "observation/image", "wrist": "observation/wrist_image"},
        "layout": "hwc",
        "default_prompt": None,
        "ignored": [],
        "optional": {"observation_id": "whole number that the answer repeats"},
    },
    "policy": {"preset": "circle", "parameters": 0},
    "limits": {"max_message_bytes": 16777216, "max_batch": 8},
}
"""As the server sent it before it took compressed images."""

FAST = ClientSettings(answer_s=10.0, connect_s=10.0)
PATIENT = ClientSettings(answer_s=1e6, connect_s=10.0)
"""Only the deadline of a call ends the wait for its answer."""


def expected(seed: int, instruction: str = "pick up the red cube") -> np.ndarray:
    return SumPolicy().act(observation(seed, instruction)).actions[0]


def test_sync_client() -> None:
    with serving(SumPolicy()) as (uri, server), PolicyClient(uri, replace(FAST, robot=ROBOT)) as client:
        assert client.info == server.info
        assert client.info.embodiment == ROBOT
        for seed in range(3):
            before = time.monotonic()
            answer = client.infer(observation(seed), observation_id=40 + seed)
            np.testing.assert_array_equal(answer.actions, expected(seed))
            assert before <= answer.sent_s < answer.received_s <= time.monotonic()
            assert answer.observation_id == 40 + seed
            assert answer.timing["batch"] == 1
            assert 0 < answer.timing["infer_ms"] < answer.timing["round_trip_ms"]


def test_async_client_of_many_robots() -> None:
    async def robots(uri: str) -> None:
        clients = [await AsyncPolicyClient.connect(uri, FAST) for _ in range(4)]
        answers = await asyncio.gather(*(c.infer(observation(seed)) for seed, c in enumerate(clients)))
        for seed, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.actions, expected(seed))
        with pytest.raises(RuntimeError, match="a client of its own"):
            await asyncio.gather(*(clients[0].infer(observation(seed)) for seed in range(2)))
        await asyncio.gather(*(c.close() for c in clients))
        assert not any(c.open for c in clients)

    with serving(SumPolicy()) as (uri, _):
        asyncio.run(robots(uri))


def test_a_robot_that_the_policy_does_not_fit_is_told_all_differences() -> None:
    other = replace(
        ROBOT,
        cameras=(Camera("front", 8, 8),),
        action_dim=7,
        action_normalise_mask=(),
        gripper_close=0.0,
        control_hz=50,
    )
    with serving(SumPolicy()) as (uri, _), pytest.raises(ValueError, match="does not fit") as caught:
        PolicyClient(uri, replace(FAST, robot=other))
    for part in ("action_dim: robot 7, policy 3", "cameras", "gripper_close", "control_hz"):
        assert part in str(caught.value)
    ServerInfo(ROBOT, LIBERO_KEYS, {}, 1, 1).check(replace(ROBOT, name="its twin", cameras=ROBOT.cameras[::-1]))


def test_wrong_observations_are_not_sent() -> None:
    with serving(SumPolicy()) as (uri, _), PolicyClient(uri, FAST) as client:
        seen = observation()
        for wrong in (
            replace(seen, state=np.full((1, 4), np.nan, np.float32)),
            replace(seen, images={"agentview": seen.images["agentview"]}),
            Observation.stack([seen, seen]),
        ):
            with pytest.raises(ValueError, match=r"NaN|camera|batch"):
                client.infer(wrong)
        np.testing.assert_array_equal(client.infer(seen).actions, expected(0))


def test_a_refused_request_says_why_and_is_not_sent_again() -> None:
    policy = SumPolicy()
    with serving(policy) as (uri, _), ReconnectingPolicyClient(uri, FAST) as client:
        with pytest.raises(RefusedError, match="1 to 1000 characters"):
            client.infer(observation(instruction=" "))
        assert client.connections == 1
        np.testing.assert_array_equal(client.infer(observation()).actions, expected(0))


def test_nobody_there_and_no_address() -> None:
    uri = f"ws://127.0.0.1:{free_port()}"
    with pytest.raises(UnavailableError, match="cannot be reached"):
        PolicyClient(uri, FAST)
    with pytest.raises(ValueError, match="no address"):
        PolicyClient("127.0.0.1:8000", FAST)
    with ReconnectingPolicyClient(uri) as client:
        started = time.monotonic()
        with pytest.raises(UnavailableError, match="cannot be reached"):
            client.infer(observation(), timeout_s=0.3)
        assert time.monotonic() - started > 0.25, "it tries until its time is up"


def test_the_last_reason_is_named_at_the_deadline() -> None:
    with serving(SumPolicy()) as (uri, _), ReconnectingPolicyClient(uri, FAST) as client:
        for _ in range(5):
            with pytest.raises(UnavailableError, match="the policy server says"):
                client.infer(observation(instruction="raise"), timeout_s=0.3)


def test_other_servers_are_recognised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="did not answer in time"):
            PolicyClient(uri, replace(FAST, connect_s=0.2))
    with pytest.raises(ValueError, match="no cogvla policy server"):
        ServerInfo.from_dict({"reset_pose": [0.0]})
    values = ServerInfo(ROBOT, LIBERO_KEYS, {}, 1, 1).to_dict()
    with pytest.raises(ValueError, match="version 2"):
        ServerInfo.from_dict({**values, "protocol_version": 2})
    with pytest.raises(ValueError, match="incomplete"):
        ServerInfo.from_dict({key: value for key, value in values.items() if key != "embodiment"})


class Counted(SumPolicy):
    """Counts its answers."""

    answered = 0

    def act(self, observation: Observation) -> ActionChunk:
        chunk = super().act(observation)
        self.answered += 1
        return chunk


def test_a_late_answer_is_never_taken_for_another() -> None:
    policy = Counted()
    with serving(policy) as (uri, _), ReconnectingPolicyClient(uri, FAST) as client:
        client.infer(observation(1))
        policy.go.clear()
        with pytest.raises(UnavailableError, match="in time"):
            client.infer(observation(2), timeout_s=0.2)
        policy.go.set()
        until(lambda: policy.answered == len(policy.batches))  # the late answer is there
        np.testing.assert_array_equal(client.infer(observation(3)).actions, expected(3))
        assert client.connections == 2


def test_a_lost_connection_stays_lost_for_a_plain_client() -> None:
    with serving(SumPolicy()) as (uri, _):
        client = PolicyClient(uri, FAST)
        client.infer(observation())
    for _ in range(2):
        with pytest.raises(UnavailableError, match="closed the connection"):
            client.infer(observation())
    client.close()


def test_killed_and_restarted_server() -> None:
    port = free_port()
    server = ServerProcess(port)
    try:
        with ReconnectingPolicyClient(server.uri, FAST) as client:
            np.testing.assert_array_equal(client.infer(observation(1)).actions, expected(1))
            server.kill()
            with pytest.raises(UnavailableError):
                client.infer(observation(2), timeout_s=0.5)
            starter = threading.Thread(target=lambda: servers.append(ServerProcess(port)))
            servers: list[ServerProcess] = []
            starter.start()
            answer = client.infer(observation(3), timeout_s=60)  # asked before the server is back
            np.testing.assert_array_equal(answer.actions, expected(3))
            assert client.connections == 2
            starter.join()
            servers[0].kill()
    finally:
        server.kill()


def test_a_restarted_server_for_another_robot_is_not_obeyed() -> None:
    async def check() -> None:
        client = ReconnectingClient(uri, FAST)
        assert (await client.info()).embodiment == ROBOT
        await client.close()
        client.uri = other
        with pytest.raises(ValueError, match="chunk: robot 5, policy 6"):
            await client.infer(observation())

    with serving(SumPolicy()) as (uri, _), serving(SumPolicy(replace(ROBOT, chunk=6))) as (other, _):
        asyncio.run(check())


def test_a_restarted_server_with_another_policy_does_not_answer_for_the_first() -> None:
    class Other(SumPolicy):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "preset": "other"}

    class Elsewhere(SumPolicy):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "device": "cuda:0"}

    async def check() -> None:
        client = ReconnectingClient(uri, FAST, policy=SumPolicy().describe())
        for address in (uri, elsewhere):
            client.uri = address
            np.testing.assert_array_equal((await client.infer(observation(1))).actions, expected(1))
            await client.close()
        client.uri = other
        for _ in range(2):  # no connection is left that a later call would use
            with pytest.raises(ValueError, match=r"another policy than at the start .* \(another preset\)"):
                await client.infer(observation())
        assert (await ReconnectingClient(other, FAST).info()).policy["preset"] == "other", "any, where none is named"

    with serving(SumPolicy()) as (uri, _), serving(Other()) as (other, _), serving(Elsewhere()) as (elsewhere, _):
        asyncio.run(check())


def test_slow_server() -> None:
    policy = SumPolicy()
    with serving(policy) as (uri, server), ReconnectingPolicyClient(uri, PATIENT) as client:
        client.infer(observation())
        policy.go.clear()
        for _ in range(3):
            with pytest.raises(UnavailableError):  # the server would never answer
                client.infer(observation(), timeout_s=0.1)
        policy.go.set()
        np.testing.assert_array_equal(client.infer(observation(1)).actions, expected(1))
        assert 'cogvla_requests_total{outcome="ok"} 2.0' in server.metrics.text().decode()


@pytest.mark.parametrize("size", [8, 1500], ids=["small", "larger_than_the_buffers_of_a_socket"])
def test_stalled_network(size: int) -> None:
    robot = replace(ROBOT, cameras=(Camera("agentview", size, size), Camera("wrist", 8, 8)))
    with serving(SumPolicy(robot)) as (uri, _):
        proxy = StallingProxy(uri)
        with ReconnectingPolicyClient(proxy.uri, replace(PATIENT, connect_s=0.2)) as client:
            client.infer(observation(robot=robot))
            proxy.stall()
            for _ in range(2):
                with pytest.raises(UnavailableError):  # nothing would ever arrive
                    client.infer(observation(robot=robot), timeout_s=0.3)
            proxy.resume()
            answer = client.infer(observation(7, robot=robot))
            np.testing.assert_array_equal(answer.actions, SumPolicy(robot).act(observation(7, robot=robot)).actions[0])
        proxy.close()


def test_a_half_open_connection_is_noticed_while_nobody_asks() -> None:
    async def check() -> None:
        client = await AsyncPolicyClient.connect(proxy.uri, replace(FAST, ping_s=0.5))
        connection = client._connection
        connection.ping_timeout = 60.0  # a busy machine may answer late
        async with asyncio.timeout(60):
            while connection.latency == 0:  # no ping has been answered
                await asyncio.sleep(0.01)
        assert client.open
        connection.ping_timeout = 0.5
        proxy.stall()
        async with asyncio.timeout(60):
            while client.open:
                await asyncio.sleep(0.01)

    with serving(SumPolicy()) as (uri, _):
        proxy = StallingProxy(uri)
        asyncio.run(check())
        proxy.close()


def test_backoff() -> None:
    backoff = Backoff(first_s=0.1, most_s=1.0, jitter=0.5)
    assert [round(backoff.pause_s(n, 0.0), 3) for n in (1, 2, 3, 4, 5, 1000)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert backoff.pause_s(1, 1.0) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="jitter"):
        Backoff(jitter=2)


def test_remote_policy_is_a_policy() -> None:
    policy = SumPolicy()
    with serving(policy) as (uri, _):
        remote = RemotePolicy(uri)
        assert remote.embodiment == ROBOT
        assert remote.describe() == policy.describe()
        batch = ROBOT.fake_observation(batch=6)
        chunk = remote.act(batch)
        np.testing.assert_array_equal(chunk.actions, policy.act(batch).actions)
        assert chunk.timing["inference_ms"] > 0
        np.testing.assert_array_equal(remote.act(observation(3)).actions, policy.act(observation(3)).actions)
        remote.close()


def test_a_batch_with_one_failure_leaves_no_connection_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    infer, done = AsyncPolicyClient.infer, list[Observation]()

    async def asked(client: AsyncPolicyClient, row: Observation, **more: Any) -> Answer:
        if row.instruction == ["fail"]:
            raise UnavailableError("the policy server closed the connection")
        await asyncio.sleep(0.1)
        done.append(row)
        return await infer(client, row, **more)

    monkeypatch.setattr(AsyncPolicyClient, "infer", asked)
    with serving(SumPolicy()) as (uri, _):
        remote = RemotePolicy(uri)
        with pytest.raises(UnavailableError, match="closed the connection"):
            remote.act(Observation.stack([observation(0, "fail"), observation(1), observation(2)]))
        assert len(done) == 2
        assert not any(client._busy for client in remote._clients)
        remote.close()


def with_plan(seed: int = 0, delay: int = 2) -> Observation:
    return replace(observation(seed), committed=[Committed(np.full((4, 3), 2.0, np.float32), delay)])


def test_committed_actions_reach_a_policy_that_reads_them_in_another_process() -> None:
    reading = SumPolicy(reads_committed=True)
    server = ServerProcess(free_port(), reads_committed=True)
    try:
        remote = RemotePolicy(server.uri)
        assert remote.reads_committed
        np.testing.assert_array_equal(remote.act(with_plan()).actions, reading.act(with_plan()).actions)
        assert not np.array_equal(remote.act(with_plan()).actions, reading.act(observation()).actions)
        # one of a batch, and a client that knows nothing of them
        both = Observation.stack([observation(1), with_plan(2, delay=1)])
        np.testing.assert_array_equal(remote.act(both).actions, reading.act(both).actions)
        np.testing.assert_array_equal(remote.act(observation()).actions[0], expected(0))
        remote.close()
    finally:
        server.kill()


def test_committed_actions_are_not_sent_to_a_policy_that_ignores_them(caplog: pytest.LogCaptureFixture) -> None:
    with serving(SumPolicy()) as (uri, _), PolicyClient(uri, FAST) as client:
        assert not client.info.committed
        for seed in range(2):
            np.testing.assert_array_equal(client.infer(with_plan(seed)).actions, expected(seed))
    assert [r.message for r in caplog.records if "committed" in r.message] == [
        "the server is older, or its policy ignores committed actions: they are not sent"
    ]
    assert not ServerInfo.from_dict(OLD_METADATA).committed


def test_clients_need_no_torch() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'hydra', 'mujoco', 'prometheus_client'): sys.modules[name] = None\n"
        "import cogvla.real_robot.serving.client, cogvla.real_robot.serving.remote_policy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_numbers_that_are_none_in_float32_are_no_answer(value: float) -> None:
    client = AsyncPolicyClient(cast(Any, None), ServerInfo.from_dict(OLD_METADATA), ClientSettings())
    actions = np.zeros((5, 3))
    assert client._read(pack({"actions": actions, "observation_id": 1}), 1, 0.0).actions.dtype == np.float32
    actions[2, 1] = value
    with pytest.raises(FrameError, match="no finite float actions"):
        client._read(pack({"actions": actions, "observation_id": 1}), 1, 0.0)


def test_metadata_of_an_older_server_are_read_and_of_a_newer_one_what_is_known() -> None:
    info = ServerInfo.from_dict(OLD_METADATA)
    info.check(ROBOT)
    assert info.images == ImageOffer()
    more = {"limits": OLD_METADATA["limits"] | {"rate": 9}, "request": OLD_METADATA["request"] | {"x": 1}, "new": {}}
    assert ServerInfo.from_dict(OLD_METADATA | more) == info


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol_version": 2}, "version 2, this client version 1: update cogvla on this computer"),
        ({"protocol_version": 0}, "version 0, this client version 1: update cogvla on the server's computer"),
        ({"protocol_version": None}, "update cogvla on the server's computer"),
        (
            {"embodiment": OLD_METADATA["embodiment"] | {"legs": 4}},
            "the policy's embodiment has 'legs', which this client does not know: update cogvla on this computer",
        ),
        ({"embodiment": {"name": "toy_arm"}}, "incomplete: .*update cogvla on the server's computer"),
        ({"limits": {}}, "incomplete: .*update cogvla on the server's computer"),
        ({"request": None}, "incomplete: .*update cogvla on the server's computer"),
    ],
)
def test_metadata_that_do_not_fit_say_which_side_to_update(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerInfo.from_dict(OLD_METADATA | changes)
