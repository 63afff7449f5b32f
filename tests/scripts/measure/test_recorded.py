"""What commands that measure on recorded frames check before they load a policy."""

from __future__ import annotations

from types import ModuleType

import pytest

from cogvla.scripts.command import compose
from cogvla.scripts.measure import calibrate_policy, calibrate_router, fit_forecast, search_schedule
from cogvla.tests.support.paths import SHIPPED

ROUTER = ["router.name=late_exit", "router.layers=[1]"]


@pytest.mark.parametrize(
    ("command", "more"),
    [(calibrate_policy, []), (calibrate_router, ROUTER), (search_schedule, ROUTER), (fit_forecast, [])],
)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("data.root=nowhere", "there is no LeRobotDataset in nowhere"),
        ("data.mixture=[{root: nowhere},{root: neither}]", "there is no LeRobotDataset in nowhere"),
        ("data.statistics=both", "data.statistics is 'both'"),
    ],
)
def test_the_data_are_looked_up_before_the_policy(
    command: ModuleType, more: list[str], wrong: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_policy", lambda *_, **__: pytest.fail("loaded"))
    config = compose(command.__name__.rpartition(".")[2], [f"checkpoint={SHIPPED}", wrong, *more])
    with pytest.raises(ValueError, match=said):
        command.main(config) if command is fit_forecast else command.run(config, "")
