"""`calibrate_monitor` as a user calls it, with the shipped policy, and the evaluation that uses the monitor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cogvla.envs.analysis.monitor_rollouts import compare
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.foresight.monitor import SCORES
from cogvla.policy.foresight.monitored_policy import open_monitor
from cogvla.scripts import eval_libero
from cogvla.scripts.command import compose
from cogvla.scripts.foresight import calibrate_monitor
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.small_foresight import calibrate, fit, recorded


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = recorded(tmp_path_factory.mktemp("calibrate"))
    fit(root, root / "foresight")
    return root / "foresight"


def test_it_takes_thresholds_and_measures_them(
    fitted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare_later(*arguments: Any) -> dict[str, Any]:
        assert (fitted / "monitor.json").exists(), "a measurement that fails loses no thresholds"
        return compare(*arguments)

    monkeypatch.setattr(calibrate_monitor, "compare", compare_later)
    measured = calibrate(fitted, "measured=2", "disturbances=[covered]")
    said = capsys.readouterr().out
    assert "false alarms: " in said
    assert measured["false_alarms"]["trials"] == 2
    assert measured["covered"]["auroc"]["all"] == 1.0, "covered cameras show nothing of what is expected"
    assert measured["covered"]["alarms"] == 1.0
    body = json.loads((fitted / "monitor.json").read_text())
    assert body["about"]["measured"] == measured
    assert body["about"]["calibration"]["episodes"] == 14
    assert body["thresholds"]["alpha"] == 0.9
    assert body["thresholds"]["execute_steps"] == 4
    monitor = open_monitor(fitted, load_policy(SHIPPED).embodiment)
    assert monitor.thresholds is not None
    assert monitor.thresholds.episodes == body["about"]["calibration"]["successful"] >= 11
    for camera in monitor.cameras:
        for name in SCORES:
            assert 0 <= monitor.thresholds.median[camera][name] <= monitor.thresholds.limit[camera][name]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alpha=0.5", "alpha=0.5 of 2 cameras needs 19 successful episodes, and episodes=14; raise episodes or alpha"),
        ("alpha=1", "alpha must be above 0 and below 1, got 1"),
        ("alpha=high", "alpha must be a number, got 'high'"),
        ("episodes=0", "episodes must be at least 1"),
        ("first_state=0,measured=11", r"first_state=0 measures .* give first_state=\d or more, or measured=0"),
        ("disturbances=[fire]", "unknown disturbance 'fire'; disturbances are"),
        ("foresight=nowhere", "nowhere holds no foresight"),
        ("checkpoint=nowhere", "nowhere"),
        ("suite=tabletop_nothing", "tabletop_nothing"),
    ],
)
def test_mistakes_are_said_before_the_policy_and_leave_the_thresholds_alone(
    fitted: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate_monitor, "open_policy", lambda *_: pytest.fail("loaded"))
    before = (fitted / "monitor.json").read_bytes() if (fitted / "monitor.json").exists() else None
    with pytest.raises(ValueError, match=message) as error:
        calibrate(fitted, *override.split(","))
    assert "\n" not in str(error.value)
    assert ((fitted / "monitor.json").read_bytes() if (fitted / "monitor.json").exists() else None) == before


@pytest.mark.parametrize(
    ("thresholds", "more", "message"),
    [
        (None, "seed=0", r"has no thresholds \(monitor.json is missing\); calibrate it"),
        ("{}", "seed=0", "monitor.json is damaged"),
        ("{}", "latency=100", "a monitor must know what is executed"),
    ],
)
def test_an_evaluation_reads_the_monitor_before_the_policy(
    fitted: Path, tmp_path: Path, thresholds: str | None, more: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_libero, "open_any_policy", lambda *_, **__: pytest.fail("loaded"))
    shutil.copytree(fitted, tmp_path / "monitor", ignore=shutil.ignore_patterns("monitor.json"))
    if thresholds is not None:
        (tmp_path / "monitor" / "monitor.json").write_text(thresholds)
    with pytest.raises(ValueError, match=message):
        eval_libero.run(compose("eval_libero", ["checkpoint=x", f"monitor={tmp_path / 'monitor'}", more]), "")


def test_foresight_of_another_robot_is_refused(fitted: Path, tmp_path: Path) -> None:
    shutil.copytree(fitted, tmp_path / "other")
    body = json.loads((tmp_path / "other" / "foresight.json").read_text())
    body["embodiment"]["control_hz"] = 10.0
    (tmp_path / "other" / "foresight.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"is for another robot: its control_hz is 10\.0, the policy's 20\.0; fit one"):
        calibrate(tmp_path / "other")
