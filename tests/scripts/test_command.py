"""How console commands end, and how they read their configuration."""

from __future__ import annotations

import os
import signal

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from cogvla.scripts.command import mistakes_in_one_line, plain, stop_event


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


def test_a_group_is_plain_data() -> None:
    config = OmegaConf.create({"size": 3, "group": {"twice": "${size}", 4: [{"a": None}]}})
    found = plain(config.group)
    assert found == {"twice": 3, "4": [{"a": None}]}
    assert type(found["4"]) is list
    assert plain({"a": 1}) == {"a": 1}
    with pytest.raises(MissingMandatoryValue, match="checkpoint"):
        plain(OmegaConf.create({"checkpoint": "???"}))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = stop_event()
        os.kill(os.getpid(), number)
        assert stop.wait(10)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
