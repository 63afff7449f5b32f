"""Roll-outs for a monitor: what one error among many costs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

import pytest

from cogvla.envs.analysis.monitor_rollouts import play
from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.evaluation.protocol import EvaluationProtocol
from cogvla.policy.foresight.monitored_policy import MonitoredPolicy
from cogvla.tests.support.point_suite import ToyPolicy, toy_suite


class Watcher(ToyPolicy):
    def noticed(self, slot: Hashable) -> Mapping[str, Any]:
        return {"highest": {"agentview": {}}, "alarm": None}


def test_one_error_of_many_episodes_does_not_lose_the_others(caplog: pytest.LogCaptureFixture) -> None:
    suite, specs = toy_suite(fault="raise", at=(1, 0)), [EpisodeSpec(n % 3, n // 3) for n in range(36)]
    policy = cast(MonitoredPolicy, Watcher())
    assert len(play(policy, suite, EvaluationProtocol("toy"), specs, 0)) == 35
    assert "1 of 36 episodes ended in an error: RuntimeError: the toy is broken; they are left out" in caplog.text
    with pytest.raises(ValueError, match=r"^1 of 30 episodes ended in an error: RuntimeError: the toy is broken$"):
        play(policy, suite, EvaluationProtocol("toy"), specs[:30], 0)
