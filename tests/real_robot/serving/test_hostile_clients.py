"""Some thousand hostile messages beside a good client; `tests/benchmarks/bench_hostile.py` measures 100,000."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from cogvla.real_robot.serving.async_client import ClientSettings
from cogvla.real_robot.serving.client import PolicyClient
from cogvla.tests.support.hostile_clients import HostileClient, memory_bytes
from cogvla.tests.support.policy_servers import ServerProcess, SumPolicy, free_port, observation

MESSAGES, CLIENTS = 2000, 2
PATIENT = ClientSettings(answer_s=60.0, connect_s=60.0)


def test_a_good_client_does_not_notice_hostile_ones(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        server = ServerProcess(free_port(), log=log)
    try:
        with PolicyClient(server.uri, PATIENT) as good:
            for seed in range(20):
                good.infer(observation(seed))
            start = memory_bytes(server.process.pid)
            hostile = [HostileClient(server.uri, good.info, seed) for seed in range(CLIENTS)]
            threads = [threading.Thread(target=send, args=(one, MESSAGES // CLIENTS)) for one in hostile]
            for thread in threads:
                thread.start()
            seed = 0
            while any(thread.is_alive() for thread in threads):
                answer = good.infer(observation(seed))
                np.testing.assert_array_equal(answer.actions, SumPolicy().act(observation(seed)).actions[0])
                seed += 1
            assert seed > 0
        assert server.process.poll() is None
        assert memory_bytes(server.process.pid, "VmHWM") <= 2 * start
        written = (tmp_path / "log").read_text()
        assert "Traceback" not in written
        assert len(written) < 100_000
        assert "invalid request from 127.0.0.1" in written
    finally:
        server.kill()


def send(client: HostileClient, messages: int) -> None:
    for _ in range(messages):
        client.send_one()
