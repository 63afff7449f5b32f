"""`engine.dtype=auto`: which precisions are measured, and which of them is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from cogvla.policy.engine import precision
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.engine.precision import Choice, Measured
from cogvla.tests.policy.engine.test_engine import observation, random_policy

AUTO = EngineConfig("eager", dtype="auto", smallest=16)
WIDE = {"language": {"width": 32, "intermediate": 64}}


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Tests say whether the machine has bfloat16 units; at first it has."""

    def say(has: bool) -> None:
        monkeypatch.setattr(precision, "has_bfloat16_units", lambda device: has)

    say(True)
    return say


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the milliseconds that engines take, in the order of the candidates."""

    def take(*milliseconds: float) -> None:
        def in_turns(calls: Sequence[Callable[[], object]]) -> list[float]:
            assert len(calls) == len(milliseconds)
            for call in calls:
                call()
            return list(milliseconds)

        monkeypatch.setattr(precision, "_in_turns", in_turns)

    return take


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ((10, 5, 8), "bfloat16"),
        ((10, 8, 5), "int8"),
        ((10, 20, 30), "float32"),
        ((10, 9.5, 9.6), "float32"),  # not worth another precision
    ],
)
def test_the_fastest_is_taken(clock: Callable[..., None], milliseconds: tuple[float, ...], chosen: str) -> None:
    clock(*milliseconds)
    policy = random_policy(WIDE).with_engine(replace(AUTO, bound=1.0))  # rounding moves random weights far
    assert policy.choice is not None
    assert policy.choice.dtype == policy.describe()["dtype"] == chosen
    assert [one.dtype for one in policy.choice.measured] == ["float32", "bfloat16", "int8"]
    assert [one.milliseconds for one in policy.choice.measured] == list(milliseconds)
    own, *others = policy.choice.measured
    assert own.deviation == 0
    assert all(one.deviation is not None and one.deviation > 0 for one in others)
    assert policy.act(observation(2)).actions.shape == random_policy(WIDE).act(observation(2)).actions.shape


def test_actions_that_deviate_too_much_are_refused(clock: Callable[..., None]) -> None:
    clock(10, 1, 1)
    choice = random_policy(WIDE).with_engine(replace(AUTO, bound=1e-9)).choice
    assert choice is not None
    assert choice.dtype == "float32"
    assert all("deviate by more" in str(one.refused) for one in choice.measured[1:])
    assert "refused: actions deviate" in str(choice)
    with pytest.raises(ValueError, match=r"engine\.bound must be positive"):
        EngineConfig(bound=0)


def test_without_bfloat16_units_it_is_not_measured(clock: Callable[..., None], units: Callable[[bool], None]) -> None:
    units(False)
    clock(10, 5)
    choice = random_policy(WIDE).with_engine(AUTO).choice
    assert choice is not None
    assert [one.dtype for one in choice.measured] == ["float32", "int8"]


def test_a_precision_that_cannot_run_is_named_with_its_reason(clock: Callable[..., None]) -> None:
    clock(10, 5)
    choice = random_policy().with_engine(EngineConfig("eager", dtype="auto", smallest=4096)).choice
    assert choice is not None
    assert choice.measured[-1] == Measured("int8", refused="no layer of this model has 4096 or more inputs and outputs")
    assert str(choice).startswith("engine.dtype=auto: bfloat16 (float32 10.00 ms; bfloat16 5.00 ms, deviation 0.0")
    assert str(choice).endswith("int8 not measured: no layer of this model has 4096 or more inputs and outputs)")


def test_the_model_keeps_its_weights_until_the_choice(clock: Callable[..., None]) -> None:
    clock(10, 5, 8)
    policy = random_policy(WIDE)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    policy.with_engine(AUTO)
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    released = random_policy(WIDE).with_engine(AUTO, release=True)
    assert released.engine is not None
    assert released.engine.precision == "bfloat16"


def test_real_times_are_positive_and_every_candidate_is_called() -> None:
    calls: list[int] = []
    times = precision._in_turns([lambda: calls.append(0), lambda: calls.append(1)])
    assert calls == [0, 1] * precision.CALLS, "in turns"
    assert all(time > 0 for time in times)


def test_a_model_without_engine_stays_as_it_is() -> None:
    plain = random_policy()
    plain.model.decoder.llm.layers[0].mlp.up_proj = torch.nn.Sequential(torch.nn.Linear(16, 16))
    policy = plain.with_engine(EngineConfig(dtype="auto"))
    assert policy.engine is None
    assert policy.choice is None
    assert policy.describe()["dtype"] == "float32"


def test_a_float16_checkpoint_may_stay_as_it_is(clock: Callable[..., None]) -> None:
    clock(1, 2, 3, 4)
    policy = random_policy(WIDE)
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.half()
    fast = policy.with_engine(replace(AUTO, bound=1.0))
    assert fast.choice is not None
    assert fast.choice.dtype == fast.describe()["dtype"] == "float16"


def test_plain_runs_as_saved() -> None:
    with pytest.raises(ValueError, match=r"engine\.kind=plain runs the model as it was saved"):
        EngineConfig("plain", dtype="auto")
    EngineConfig(dtype="auto").check_trained()
    with pytest.raises(ValueError, match=r"unknown engine\.dtype 'fast'; one of null, auto, float32"):
        EngineConfig(dtype="fast")


def test_a_choice_is_one_line() -> None:
    choice = Choice("int8", (Measured("float32", 10.0, 0.0), Measured("int8", 4.0, 0.004)))
    assert str(choice) == "engine.dtype=auto: int8 (float32 10.00 ms; int8 4.00 ms, deviation 0.0040)"
