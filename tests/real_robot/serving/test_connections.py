"""Clients that take places, time or memory and give nothing: they are cut off, and others do not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from cogvla.real_robot.serving import connections
from cogvla.real_robot.serving.async_client import ClientSettings
from cogvla.real_robot.serving.batching import BatchSettings
from cogvla.real_robot.serving.client import PolicyClient, ReconnectingPolicyClient
from cogvla.real_robot.serving.server import PolicyServer, ServerSettings
from cogvla.real_robot.serving.wire import pack
from cogvla.tests.support.policy_servers import SumPolicy, libero_request, observation, serving
from cogvla.tests.support.raw_websocket import (
    BINARY,
    CONTINUATION,
    PING,
    TEXT,
    UPGRADE,
    frame,
    is_cut_off,
    raw_socket,
    raw_websocket,
    sends_until_cut_off,
)
from cogvla.tests.support.waiting import until

PATIENT = ClientSettings(answer_s=60.0, connect_s=20.0)
HOURS = 1e5


def expected(seed: int = 0) -> np.ndarray:
    return SumPolicy().act(observation(seed)).actions[0]


def closed(client: Any) -> str:
    """Why the server closed a connection."""
    try:
        while True:
            client.recv(60)
    except ConnectionClosed as error:
        return "" if error.rcvd is None else f"{error.rcvd.code} {error.rcvd.reason}"


def test_idle_connections_are_closed_and_busy_ones_are_not() -> None:
    policy = SumPolicy()
    with serving(policy, ServerSettings(idle_s=0.2)) as (uri, _), ThreadPoolExecutor(1) as pool:
        policy.batches.clear()
        policy.go.clear()
        with PolicyClient(uri, PATIENT) as busy:
            asked = pool.submit(busy.infer, observation(3))
            until(lambda: policy.batches == [1])
            idle = [connect(uri, compression=None) for _ in range(3)]
            assert [closed(client) for client in idle] == ["1001 no request for 0.2 s"] * 3
            policy.go.set()
            np.testing.assert_array_equal(asked.result(60).actions, expected(3))


def test_a_robot_that_rested_asks_again() -> None:
    with (
        serving(SumPolicy(), ServerSettings(idle_s=0.2)) as (uri, server),
        ReconnectingPolicyClient(uri, PATIENT) as client,
    ):
        for seed in range(2):
            np.testing.assert_array_equal(client.infer(observation(seed)).actions, expected(seed))
            until(lambda: not server._guard.clients())
        assert client.connections == 2


def test_idle_connections_give_way_to_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "NEW_S", 0.0)
    monkeypatch.setattr(connections, "SPARE_S", HOURS)
    with serving(SumPolicy(), ServerSettings(max_clients=4)) as (uri, _):
        working = PolicyClient(uri, PATIENT)
        working.infer(observation())
        idle = [connect(uri, compression=None) for _ in range(20)]
        with PolicyClient(uri, PATIENT) as another:
            np.testing.assert_array_equal(another.infer(observation(1)).actions, expected(1))
        np.testing.assert_array_equal(working.infer(observation(2)).actions, expected(2))
        assert [closed(client) for client in idle[:17]] == ["1001 idle while others wait for a place"] * 17
        working.close()


def test_working_clients_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SPARE_S", HOURS)
    policy = SumPolicy()
    with serving(policy, ServerSettings(max_clients=3)) as (uri, _), ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(PolicyClient(uri, PATIENT)).infer(observation())
        for _ in range(3):
            with pytest.raises(InvalidStatus, match="503"):
                connect(uri)


def test_one_address_does_not_get_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_network", lambda address: address)  # count loopback like other addresses
    monkeypatch.setattr(connections, "NEW_S", HOURS)
    with serving(SumPolicy(), ServerSettings(max_clients=8, max_per_address=3)) as (uri, _):
        first = [connect(uri, compression=None) for _ in range(3)]
        with pytest.raises(InvalidStatus, match="503"):
            connect(uri)
        first[0].close()
        others = [connect(uri, compression=None, source_address=("127.0.0.2", 0)) for _ in range(3)]
        for client in [*first[1:], *others]:
            client.recv(60)
            client.send(pack(libero_request(1)))
            assert isinstance(client.recv(60), bytes)


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.168.1.7", "192.168.1.7"),
        ("::ffff:192.168.1.7", "192.168.1.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("127.0.0.1", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("a local socket", None),
    ],
)
def test_addresses_of_one_client(address: str, network: str | None) -> None:
    assert connections._network(address) == network


def before_the_handshake(data: bytes) -> Callable[[str], Any]:
    def start(uri: str) -> Any:
        client = raw_socket(uri)
        client.sendall(data)
        return client

    return start


def after_the_handshake(*data: bytes) -> Callable[[str], Any]:
    def start(uri: str) -> Any:
        client = raw_websocket(uri)
        for part in data:
            client.sendall(part)
        return client

    return start


UNFINISHED = {
    "nothing": before_the_handshake(b""),
    "half a request line": before_the_handshake(b"GET /"),
    "half a handshake": before_the_handshake(UPGRADE[:60]),
    "half a frame header": after_the_handshake(b"\x82"),
    "a frame without data": after_the_handshake(frame(BINARY, b"", length=1000)),
    "a large frame without its end": after_the_handshake(frame(BINARY, bytes(500_000), length=10**6)),
    "a message without its last fragment": after_the_handshake(frame(BINARY, b"\x80", last=False)),
    "an empty first fragment": after_the_handshake(frame(TEXT, b"", last=False)),
    "a ping without data, after a good one": after_the_handshake(frame(PING, b"a"), frame(PING, b"", length=9)),
}


@pytest.fixture(scope="module")
def hasty() -> Iterator[str]:
    with serving(SumPolicy(), ServerSettings(message_s=0.5)) as (uri, _):
        yield uri


@pytest.mark.parametrize("name", UNFINISHED)
def test_what_does_not_end_is_cut_off(name: str, hasty: str) -> None:
    assert is_cut_off(UNFINISHED[name](hasty))


def test_a_message_that_trickles_in_is_cut_off(hasty: str) -> None:
    client = raw_websocket(hasty)
    client.sendall(frame(BINARY, b"", length=10**6))
    assert sends_until_cut_off(client, b"\0"), "it always moves, and never ends"


FLOODS = {
    "a handshake without an end": before_the_handshake(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000),
    "pings": after_the_handshake(frame(PING, b"") * 50_000),
    "empty fragments": after_the_handshake(
        frame(BINARY, b"", last=False), frame(CONTINUATION, b"", last=False) * 50_000
    ),
    "small messages": after_the_handshake(frame(TEXT, b"") * 50_000),
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_are_cut_off(name: str) -> None:
    with serving(SumPolicy(), ServerSettings(message_s=HOURS)) as (uri, _), PolicyClient(uri, PATIENT) as good:
        try:
            client = FLOODS[name](uri)
        except ConnectionError:  # cut off while it was sending
            client = None
        assert client is None or is_cut_off(client)
        np.testing.assert_array_equal(good.infer(observation()).actions, expected())


def test_a_client_that_does_not_read_its_pongs_is_cut_off() -> None:
    with serving(SumPolicy(), ServerSettings(message_s=1.0, ping_s=HOURS)) as (uri, server):
        client = raw_websocket(uri)
        sends_until_cut_off(client, frame(PING, bytes(125)) * 15)
        until(lambda: not server._guard.clients())


def test_slow_messages_do_not_take_the_memory_of_others() -> None:
    settings = ServerSettings(max_message_mb=1, message_s=HOURS)
    with serving(SumPolicy(), settings) as (uri, server), PolicyClient(uri, PATIENT) as good:
        slow = [raw_websocket(uri) for _ in range(12)]
        for client in slow:
            client.sendall(frame(BINARY, bytes(900_000), length=1_000_000))
            until(lambda: server._guard.held > 0)
        # an aborted connection leaves in the server's next round, and gives back its memory then
        until(lambda: len(server._guard.clients()) <= 5 and server._guard.held <= server._guard.limits.held_bytes)
        assert is_cut_off(slow[0]), "the oldest goes first"
        np.testing.assert_array_equal(good.infer(observation()).actions, expected())
        for client in slow:
            client.close()
        until(lambda: server._guard.held == 0)


def test_handshakes_that_wait_do_not_take_all_sockets() -> None:
    settings = ServerSettings(max_clients=4, message_s=HOURS)
    with serving(SumPolicy(), settings) as (uri, _):
        waiting = [raw_socket(uri) for _ in range(30)]
        with PolicyClient(uri, PATIENT) as good:
            np.testing.assert_array_equal(good.infer(observation()).actions, expected())
        assert all(is_cut_off(client) for client in waiting[:25])


def test_settings_are_checked() -> None:
    wrong: list[dict[str, Any]] = [{"max_clients": 0}, {"max_per_address": -1}, {"idle_s": 0}, {"message_s": np.nan}]
    for one in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(one))} must be positive"):
            replace(ServerSettings(), **one)
    with pytest.raises(ValueError, match="max_message_mb must be a finite number"):
        ServerSettings(max_message_mb=np.inf)
    for wait in (np.inf, np.nan, -1.0, 1e13):
        with pytest.raises(ValueError, match="batch_wait_ms 0 to 1e"):
            BatchSettings(batch_wait_ms=wait)
    assert PolicyServer(SumPolicy(), ServerSettings(max_clients=1))._guard.limits.per_address == 1


def test_msgpack_of_the_metadata_is_plain() -> None:
    with serving(SumPolicy()) as (uri, _), connect(uri, compression=None) as client:
        metadata = msgpack.unpackb(client.recv(30))
    assert metadata["images"] == {"formats": ["raw", "jpeg", "png"], "resize": None}
    assert set(metadata["limits"]) == {"max_message_bytes", "max_batch"}, "older clients know no others"
