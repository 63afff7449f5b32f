"""The policy server over real sockets, mostly with openpi's own client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from cogvla.policy.interface import ActionChunk, Camera, Observation
from cogvla.real_robot.serving.async_client import ClientSettings
from cogvla.real_robot.serving.batching import Batcher, BatchSettings, ExpiredError, PolicyError
from cogvla.real_robot.serving.client import PolicyClient
from cogvla.real_robot.serving.remote_policy import RemotePolicy
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.serving.server import PolicyServer, ServerSettings, TlsFiles
from cogvla.real_robot.serving.server_metrics import Outcome, ServerMetrics
from cogvla.tests.support.extras import NEEDS_TEST_GROUP
from cogvla.tests.support.policy_servers import (
    LIBERO_KEYS,
    ROBOT,
    SumPolicy,
    get,
    libero_request,
    observation,
    serving,
)
from cogvla.tests.support.waiting import until

pytest.importorskip("trustme", reason=NEEDS_TEST_GROUP)
pytest.importorskip("openpi_client", reason=NEEDS_TEST_GROUP)

import trustme
from openpi_client import msgpack_numpy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

PATIENT = ClientSettings(answer_s=60.0, connect_s=20.0)


def expected(seed: int = 0) -> np.ndarray:
    return SumPolicy().act(observation(seed)).actions[0]


def openpi(uri: str, api_key: str | None = None) -> WebsocketClientPolicy:
    return WebsocketClientPolicy(uri, api_key=api_key)


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    """One server for the tests that only ask."""
    with serving(SumPolicy()) as (uri, _):
        yield uri


def metric(uri: str, name: str) -> float:
    lines = get(uri, "/metrics")[1].splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).rpartition(" ")[2])


def test_openpi_client_as_in_its_libero_example(toy: str) -> None:
    client = openpi(toy)
    metadata = client.get_server_metadata()
    assert metadata["embodiment"]["action_dim"] == 3
    assert metadata["embodiment"]["cameras"][0] == {"name": "agentview", "height": 8, "width": 8}
    assert metadata["request"]["images"] == {"agentview": "observation/image", "wrist": "observation/wrist_image"}
    assert metadata["policy"] == {"preset": "sum", "parameters": 0}
    for seed in range(3):
        request = libero_request(seed)
        request["observation/state"] = request["observation/state"].astype(np.float64)  # as np.concatenate makes it
        answer = client.infer(request)
        np.testing.assert_array_equal(answer["actions"], expected(seed))
        assert answer["actions"].dtype == np.float32
        assert answer["policy_timing"]["infer_ms"] > 0
        assert ("prev_total_ms" in answer["server_timing"]) == (seed > 0)
    client.reset()


def test_openpi_action_chunk_broker(toy: str) -> None:
    broker = ActionChunkBroker(openpi(toy), action_horizon=4)
    played = [broker.infer(libero_request(seed)) for seed in (1, 1, 1, 1, 2)]
    np.testing.assert_array_equal(np.stack([step["actions"] for step in played[:4]]), expected(1)[:4])
    np.testing.assert_array_equal(played[4]["actions"], expected(2)[0])


def test_openpi_client_as_in_its_aloha_example() -> None:
    robot = replace(ROBOT, cameras=tuple(Camera(name, 6, 8) for name in ("front", "left_wrist", "right_wrist")))
    seen = observation(robot=robot)
    names = {"front": "cam_high", "left_wrist": "cam_left_wrist", "right_wrist": "cam_right_wrist"}
    keys = RequestKeys(
        images={camera: f"images/{name}" for camera, name in names.items()},
        layout="chw",
        default_prompt=seen.instruction[0],
        ignored=("images/cam_low",),
    )
    request: dict[str, Any] = {"state": seen.state[0], "images": {"cam_low": np.zeros((3, 2, 2), np.uint8)}}
    for camera, name in names.items():
        request["images"][name] = np.moveaxis(seen.images[camera][0], -1, 0)
    policy = SumPolicy(robot)
    with serving(policy, keys=keys) as (uri, _):
        np.testing.assert_array_equal(openpi(uri).infer(request)["actions"], policy.act(seen).actions[0])
        own = PolicyClient(uri, PATIENT)
        np.testing.assert_array_equal(own.infer(seen).actions, policy.act(seen).actions[0])
        own.close()


def test_openpi_client_shows_the_error(toy: str) -> None:
    with pytest.raises(RuntimeError, match="Error in inference server:\ninvalid request: prompt must be"):
        openpi(toy).infer(libero_request(prompt=3))


def test_oversized() -> None:
    with serving(SumPolicy(), ServerSettings(max_message_mb=0.01)) as (uri, _):
        client = openpi(uri)
        assert client.get_server_metadata()["limits"]["max_message_bytes"] == 10485
        with pytest.raises(ConnectionClosed, match="1009"):
            client.infer(libero_request(**{"observation/image": np.zeros((100, 100, 3), np.uint8)}))
        np.testing.assert_array_equal(openpi(uri).infer(libero_request())["actions"], expected())
        until(lambda: metric(uri, 'cogvla_requests_total{outcome="oversized"}') == 1)


def test_a_failing_policy_fails_one_client_only(caplog: pytest.LogCaptureFixture) -> None:
    policy = SumPolicy()
    with serving(policy, batching=BatchSettings(4, batch_wait_ms=60_000)) as (uri, _):
        prompts = ["pick", "raise", "nan", "place"]
        clients = [openpi(uri) for _ in prompts]
        policy.batches.clear()
        with ThreadPoolExecutor(4) as pool:
            futures = [
                pool.submit(client.infer, libero_request(prompt=prompt))
                for client, prompt in zip(clients, prompts, strict=True)
            ]
        assert policy.batches == [4, 1, 1, 1, 1]
        for row in (0, 3):
            actions = policy.act(observation(instruction=prompts[row])).actions[0]
            np.testing.assert_array_equal(futures[row].result()["actions"], actions)
        with pytest.raises(RuntimeError, match="failed: the policy failed") as caught:
            futures[1].result()
        assert "secret" not in str(caught.value)
        assert "a secret of this machine" in caplog.text, "the server's log says what happened"
        with pytest.raises(RuntimeError, match="NaN or infinite actions"):
            futures[2].result()
        assert metric(uri, 'cogvla_requests_total{outcome="failed"}') == 2


def test_a_policy_of_another_shape_is_an_error() -> None:
    class Short(SumPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            return ActionChunk(super().act(observation).actions[:, :2])

    with serving(Short()) as (uri, _), pytest.raises(RuntimeError, match="failed"):
        openpi(uri).infer(libero_request())


def test_requests_that_arrive_together_share_forward_passes() -> None:
    policy = SumPolicy()
    with serving(policy, batching=BatchSettings(8, batch_wait_ms=60_000)) as (uri, _):
        clients = [openpi(uri) for _ in range(8)]
        policy.batches.clear()
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                answers = list(pool.map(lambda i: clients[i].infer(libero_request(i)), range(8)))
                for seed, answer in enumerate(answers):
                    np.testing.assert_array_equal(answer["actions"], expected(seed))
        assert policy.batches == [8, 8, 8]
        assert answers[0]["server_timing"]["batch"] == 8
        assert metric(uri, "cogvla_batch_size_count") == 3


def test_one_client_does_not_wait_for_others() -> None:
    hours = BatchSettings(8, batch_wait_ms=1e7)  # if it waited, the test would never end
    with serving(SumPolicy(), batching=hours) as (uri, _):
        assert openpi(uri).infer(libero_request())["server_timing"]["batch"] == 1


def test_images_of_other_sizes_are_not_stacked() -> None:
    policy = SumPolicy()
    images = [np.full((size, size, 3), 7, np.uint8) for size in (8, 20, 8)]
    with serving(policy, batching=BatchSettings(8, 0)) as (uri, _), ThreadPoolExecutor(4) as pool:
        busy, *clients = (openpi(uri) for _ in range(4))
        policy.batches.clear()
        policy.go.clear()
        running = pool.submit(busy.infer, libero_request())
        until(lambda: policy.batches == [1])
        requests = [libero_request(**{"observation/image": image}) for image in images]
        futures = [pool.submit(client.infer, one) for client, one in zip(clients, requests, strict=True)]
        until(lambda: metric(uri, "cogvla_queue_length") == 3)
        policy.go.set()
        answers = [future.result() for future in futures]
        np.testing.assert_array_equal(running.result()["actions"], expected())
        assert policy.batches[0] == 1
        assert sorted(policy.batches[1:]) == [1, 2]
        for image, answer in zip(images, answers, strict=True):
            seen = replace(observation(), images={**observation().images, "agentview": image[None]})
            np.testing.assert_array_equal(answer["actions"], policy.act(seen).actions[0])


def test_what_nobody_waits_for_is_not_computed() -> None:
    policy = SumPolicy()
    batcher = Batcher(policy, BatchSettings(1, 0), ServerMetrics())
    batcher.start()
    batcher.ready.result(10)
    policy.batches.clear()
    policy.go.clear()
    running = batcher.submit(observation())
    until(lambda: policy.batches == [1])
    late = batcher.submit(observation(), deadline=time.monotonic() + 0.01)
    left = batcher.submit(observation())
    asked = batcher.submit(observation(3), deadline=time.monotonic() + 60)
    left.cancel()
    time.sleep(0.02)
    policy.go.set()
    running.result(10)
    with pytest.raises(ExpiredError):
        late.result(10)
    np.testing.assert_array_equal(asked.result(10).actions_KA, expected(3))
    assert policy.batches == [1, 1]
    batcher.close()
    with pytest.raises(PolicyError, match="shutting down"):
        batcher.submit(observation())


def test_a_client_that_leaves_or_is_late_costs_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = SumPolicy()

    def count(metrics: ServerMetrics, outcome: Outcome) -> None:
        counted(metrics, outcome)
        if outcome == "abandoned":  # from here on nothing may compute it, even if the event loop stands still
            policy.go.set()
            time.sleep(0.1)

    counted = ServerMetrics.count
    monkeypatch.setattr(ServerMetrics, "count", count)
    with serving(policy, batching=BatchSettings(1, 0)) as (uri, _):
        busy, leaving, late = (connect(uri, compression=None) for _ in range(3))
        policy.batches.clear()
        policy.go.clear()
        for client in (busy, leaving, late):
            client.recv()
        busy.send(msgpack_numpy.packb(libero_request()))
        until(lambda: policy.batches == [1])
        leaving.send(msgpack_numpy.packb(libero_request()))
        late.send(msgpack_numpy.packb(libero_request(deadline_ms=1)))
        until(lambda: metric(uri, "cogvla_queue_length") == 2)
        time.sleep(0.002)
        leaving.close()
        assert isinstance(busy.recv(10), bytes)
        assert str(late.recv(10)).startswith("expired: ")
        assert policy.batches == [1]
        busy.close()


def test_pings_are_answered_while_the_policy_computes() -> None:
    policy = SumPolicy()
    with serving(policy) as (uri, _), connect(uri, compression=None) as client:
        client.recv()
        policy.go.clear()
        client.send(msgpack_numpy.packb(libero_request()))
        assert client.ping().wait(60)
        assert get(uri, "/healthz") == (200, "OK\n")
        policy.go.set()
        assert isinstance(client.recv(10), bytes)


def test_healthy_after_the_warm_up() -> None:
    policy = SumPolicy()
    policy.go.clear()
    with serving(policy, batching=BatchSettings(6, 1), wait=False) as (uri, _):
        assert get(uri, "/healthz")[0] == 503
        with ThreadPoolExecutor(1) as pool:
            early = pool.submit(lambda: openpi(uri).infer(libero_request(4)))  # waits for the warm-up
            policy.go.set()
            until(lambda: get(uri, "/healthz")[0] == 200)
            np.testing.assert_array_equal(early.result(10)["actions"], expected(4))
        assert policy.batches[:4] == [1, 2, 4, 6]


def test_a_policy_that_cannot_warm_up_ends_the_server() -> None:
    class Broken(SumPolicy):
        def act(self, observation: Observation) -> ActionChunk:
            raise ValueError("no kernel for this GPU")

    server = PolicyServer(Broken(), ServerSettings(port=0), keys=LIBERO_KEYS)
    with pytest.raises(ValueError, match="no kernel"):
        asyncio.run(server.run(asyncio.Event()))


def test_metrics(toy: str) -> None:
    before = metric(toy, "cogvla_request_seconds_count")
    client = openpi(toy)
    for _ in range(5):
        client.infer(libero_request())
    until(lambda: metric(toy, "cogvla_request_seconds_count") == before + 5)
    text = get(toy, "/metrics")[1]
    for name in ("queue_length", "clients", "ready", "batch_size_bucket", "inference_seconds_sum", "requests_total"):
        assert f"cogvla_{name}" in text
    assert metric(toy, "cogvla_ready") == 1
    assert "gpu" not in text
    assert b"cogvla_gpu_memory_bytes 123.0" in ServerMetrics(lambda: 123.0).text()


def test_api_key() -> None:
    with serving(SumPolicy(), ServerSettings(api_key="sesame")) as (uri, _):
        np.testing.assert_array_equal(openpi(uri, "sesame").infer(libero_request())["actions"], expected())
        for wrong in (None, "sesam", "sesamee", "Sesame"):
            with pytest.raises(InvalidStatus, match="401"):
                openpi(uri, wrong)
        with pytest.raises(ValueError, match="refuses the API key"):
            PolicyClient(uri, replace(PATIENT, api_key="x"))
        assert get(uri, "/healthz")[0] == 200
        assert get(uri, "/metrics")[0] == 401
        assert get(uri, "/metrics", {"Authorization": "Api-Key sesame"})[0] == 200
        assert "sesame" not in repr(ServerSettings(api_key="sesame")) + repr(ClientSettings(api_key="sesame"))


def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    settings = ServerSettings(tls=TlsFiles(cert=str(tmp_path / "server.pem"), key=str(tmp_path / "server.pem")))
    with serving(SumPolicy(), settings) as (uri, _):
        assert uri.startswith("wss://")
        with PolicyClient(uri, replace(PATIENT, certificate=tmp_path / "ca.pem")) as client:
            np.testing.assert_array_equal(client.infer(observation()).actions, expected())
        with pytest.raises(ValueError, match="not trusted"):
            PolicyClient(uri, PATIENT)
    with pytest.raises(ValueError, match="cannot use"):
        TlsFiles(cert=str(tmp_path / "ca.pem"), key=str(tmp_path / "ca.pem")).context()
    with pytest.raises(ValueError, match="both"):
        TlsFiles(cert=str(tmp_path / "ca.pem"))


def test_web_pages_and_too_many_clients_are_turned_away() -> None:
    with serving(SumPolicy(), ServerSettings(max_clients=1)) as (uri, _):
        with pytest.raises(InvalidStatus, match="403"):
            connect(uri, origin=Origin("https://evil.example"))
        first = openpi(uri)
        with pytest.raises(InvalidStatus, match="503"):
            openpi(uri)
        assert get(uri, "/nothing")[0] == 503
        first.infer(libero_request())


def test_it_binds_to_this_machine_unless_told_otherwise() -> None:
    assert ServerSettings().host == "127.0.0.1"


def test_shutdown_answers_what_was_asked() -> None:
    policy = SumPolicy()
    with ThreadPoolExecutor(1) as pool:
        with serving(policy) as (uri, _):
            client, idle = openpi(uri), openpi(uri)
            policy.batches.clear()
            policy.go.clear()
            asked = pool.submit(client.infer, libero_request(2))
            until(lambda: policy.batches == [1])
            threading.Timer(0.2, policy.go.set).start()
        np.testing.assert_array_equal(asked.result(10)["actions"], expected(2))
        with pytest.raises(ConnectionClosed, match="1001"):
            idle.infer(libero_request())
        assert get(uri, "/healthz")[0] == 0


class CountingPolicy(SumPolicy):
    """Actions that count the decisions of an episode, and what it was told about episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: dict[Any, int] = {}

    def warm_up(self, batch: int, instructions: Any = ()) -> None:
        """Nothing to prepare."""

    def begin(self, slots: Sequence[Hashable]) -> None:
        self.decisions |= dict.fromkeys(slots, 0)

    def end(self, slots: Sequence[Hashable]) -> None:
        for slot in slots:
            del self.decisions[slot]

    def act(self, observation: Observation) -> ActionChunk:
        assert observation.slots is not None
        for slot in observation.slots:
            self.decisions[slot] += 1
        shape = (self.embodiment.chunk, self.embodiment.action_dim)
        counts = [np.full(shape, self.decisions[slot], np.float32) for slot in observation.slots]
        return ActionChunk(np.stack(counts))


def test_every_connection_has_a_memory_of_its_own() -> None:
    policy = CountingPolicy()
    with serving(policy) as (uri, _), PolicyClient(uri, PATIENT) as one:
        with PolicyClient(uri, PATIENT) as other:

            def ask(client: PolicyClient, episode: int | None = None) -> float:
                return float(client.infer(observation(), episode_id=episode).actions[0, 0])

            assert [ask(one), ask(one), ask(other), ask(one), ask(other)] == [1, 2, 1, 3, 2]
            assert [ask(one, 7), ask(other), ask(one, 7), ask(one, 8), ask(one, 7)] == [1, 3, 2, 1, 1]
            assert len(policy.decisions) == 2
        until(lambda: len(policy.decisions) == 1 if ask(one, 7) else False)
    with serving(CountingPolicy()) as (uri, _):
        client = openpi(uri)
        assert [client.infer(libero_request())["actions"][0, 0] for _ in range(3)] == [1, 2, 3]
        with pytest.raises(RuntimeError, match="episode_id must be a whole number"):
            client.infer(libero_request(episode_id="first"))


def test_robots_of_a_remote_policy_keep_their_connections() -> None:
    with serving(CountingPolicy()) as (uri, _):
        policy = RemotePolicy(uri)
        try:
            policy.reset()

            def ask(*slots: str) -> list[float]:
                seen = Observation.stack([observation()] * len(slots))
                return policy.act(replace(seen, slots=list(slots))).actions[:, 0, 0].tolist()

            policy.begin(["a", "b"])
            assert [ask("a"), ask("b", "a"), ask("a", "b")] == [[1], [1, 2], [3, 2]]
            policy.begin(["b"])
            assert [ask("a", "b"), ask("b")] == [[4, 1], [2]]
            policy.reset()
            assert policy.act(observation()).actions[0, 0, 0] == 1
        finally:
            policy.close()
