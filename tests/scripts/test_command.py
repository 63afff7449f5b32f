"""How console commands end, and how they read their configuration."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from cogvla.scripts.command import as_typed, compose, mistakes_in_one_line, plain, stop_event


@pytest.mark.parametrize("error", [ValueError("give 3"), FileNotFoundError("no 3"), ConnectionError("3 is gone")])
def test_a_mistake_is_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit) as ended, mistakes_in_one_line():
        raise error
    assert ended.value.code == f"error: {error}"
    assert ended.value.__cause__ is error


def test_a_command_names_its_own_mistakes() -> None:
    with pytest.raises(SystemExit, match="error: loss is not finite"), mistakes_in_one_line(FloatingPointError):
        raise FloatingPointError("loss is not finite")
    with pytest.raises(FloatingPointError), mistakes_in_one_line():
        raise FloatingPointError("loss is not finite")


@pytest.mark.parametrize("said", ["stopped; go on", None])
def test_ctrl_c_is_no_mistake(capsys: pytest.CaptureFixture[str], said: str | None) -> None:
    with pytest.raises(SystemExit) as ended, mistakes_in_one_line(stopped=said):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == ("" if said is None else "\nstopped; go on\n")


def test_the_key_of_a_server_is_in_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    words = OmegaConf.create(["checkpoint=ws://arm:8000", "api_key=secret", "++api_key=secret", "suite=[a,b]"])
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(overrides=SimpleNamespace(task=words)))
    assert as_typed("eval_libero") == "eval_libero checkpoint=ws://arm:8000 'suite=[a,b]'"


def test_a_group_is_plain_data() -> None:
    config = OmegaConf.create({"size": 3, "group": {"twice": "${size}", 4: [{"a": None}]}})
    found = plain(config.group)
    assert found == {"twice": 3, "4": [{"a": None}]}
    assert type(found["4"]) is list
    assert plain({"a": 1}) == {"a": 1}
    with pytest.raises(MissingMandatoryValue, match="checkpoint"):
        plain(OmegaConf.create({"checkpoint": "???"}))


@pytest.mark.parametrize(
    ("command", "word", "key"),
    [
        ("eval_libero", "resume=Off", "resume"),
        ("train_policy", "forecast=flase", "forecast"),
        ("run_trials", "video=0", "video"),
        ("share_policy", "dry_run=null", "dry_run"),
    ],
)
def test_what_is_true_or_false_is_nothing_else(command: str, word: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be true or false"):
        compose(command, [word])


@pytest.mark.parametrize(
    ("command", "word", "said"),
    [
        ("eval_libero", "workers=two", "workers must be a whole number, got 'two'"),
        ("eval_libero", "videos=1.5", "videos must be a whole number, got 1.5"),
        ("eval_libero", "seed=-1", "seed must not be negative, got -1"),
        ("calibrate_router", "seed=-1", "seed must not be negative, got -1"),
        ("search_schedule", "seed=null", "seed must be a whole number, got null"),
        ("record_demonstrations", "episodes=1e3", "episodes must be a whole number, got 1000.0"),
        ("train_policy", "evaluation.videos=true", "evaluation.videos must be a whole number, got True"),
        ("run_trials", "countdown_s=2.5", "countdown_s must be a whole number, got 2.5"),
        ("run_trials", "limit_s=30s", "limit_s must be a number, got '30s'"),
        ("count_flops", "gpu=h200", r"gpu must be a list, got 'h200': write gpu=\[h200\]"),
        ("compare_routers", "budgets=0.5", r"budgets must be a list, got 0.5: write budgets=\[0.5\]"),
        ("eval_libero", "output=5", "output must be text, got 5"),
        ("search_schedule", "output=null", "output must be a folder or file, got null"),
        ("eval_libero", "cameras=front", "cameras must be a mapping, got 'front'"),
        ("train_policy", "evaluation=no", "evaluation must be a mapping, got 'no'"),
        ("train_policy", "output=2024", "output must be text, got 2024: put it in quotes twice, 'output=\"2024\"'"),
    ],
)
def test_every_key_keeps_its_kind(command: str, word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compose(command, [word])


def test_kinds_that_fit() -> None:
    words = ["limit_s=30", "attempts=null", "trials=${countdown_s}", 'output="2024"']
    assert plain(compose("run_trials", words))["trials"] == 3
    assert compose("eval_libero", ["protocol.max_steps=3", "cameras=null", "imports=json"]).protocol.max_steps == 3


ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ENDS)
def test_signals_stop(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in ENDS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run below `nohup`
    try:
        stop = stop_event()
        os.kill(os.getpid(), number)
        assert stop.wait(10)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
