"""The forecast that `train_policy` adds to its policy: saved only where it is no guess.

Shape legend: as in `policy.inputs.forecast`.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvla.policy.checkpoint import FORECAST
from cogvla.policy.data.config import DataConfig, DataEntry
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.mixture.mixture import Place, joined
from cogvla.policy.inputs.forecast import Forecast
from cogvla.scripts.training.forecast import add_forecast, fit, poorly_explained
from cogvla.tests.support.small_data import ROBOT, small_data

S, A, K = ROBOT.state_dim, ROBOT.action_dim, ROBOT.chunk


def data(episodes: int = 60, walk: int | None = None) -> DemonstrationData:
    """A robot whose state is the sum of what was executed, which is not what is taught; `walk`: this entry is not."""
    found = small_data(episodes)
    rng = np.random.default_rng(0)
    executed_NA = rng.normal(0, 1, (len(found), A))
    state_NS = np.zeros((len(found), S))
    state_NS[1:] = executed_NA[:-1, :S].cumsum(0)
    if walk is not None:
        state_NS[:, walk] = rng.normal(0, 1, len(found)).cumsum()
    tensors = [torch.from_numpy(each.astype(np.float32)) for each in (state_NS, executed_NA)]
    return replace(found, state_NS=tensors[0], executed_NA=tensors[1], provenance={"name": "sums"})


def robots_of_other_units() -> DemonstrationData:
    """The same robot in metres and, twice as often, in millimetres: one map explains most, and is wrong for metres."""
    one = replace(data(), provenance={"episodes": 60})
    parts = [replace(one, state_NS=unit * one.state_NS) for unit in (1, 1000, 1000)]
    places = [Place(str(i), DataEntry(DataConfig({}, root=str(i))), Path(str(i)), None, 10, None) for i in range(3)]
    return joined(places, parts, DataConfig({}, root="0", statistics="each"))


def test_a_robot_that_obeys(tmp_path: Path) -> None:
    line = add_forecast(tmp_path, data(), K)
    assert "explains 100% or more of the change" in line
    assert json.loads((tmp_path / FORECAST).read_text()) == json.loads(json.dumps(fit(data(), K).to_dict()))
    assert b'"name": "sums"' in (tmp_path / FORECAST).read_bytes()


def test_what_is_taught_is_not_what_was_executed() -> None:
    known = data()
    assert min(map(min, fit(known, K).explained)) > 0.999
    assert max(map(max, fit(replace(known, executed_NA=None), K).explained)) < 0.5


@pytest.mark.parametrize(
    ("given", "chunk", "said"),
    [
        (
            data(walk=1),
            K,
            r"less than 50% of the change of entries \[1\]; `fit_forecast checkpoint=",
        ),
        (data(episodes=4), K, r"the data set has \d+ frames .* needs \d+: record more"),
        (data(), 1, "a chunk is one action"),
        (robots_of_other_units(), K, "with data.statistics=each, robots or units differ"),
    ],
)
def test_no_guess_is_saved(tmp_path: Path, given: DemonstrationData, chunk: int, said: str) -> None:
    with np.errstate(all="raise"):
        line = add_forecast(tmp_path, given, chunk)
    assert line.startswith("no forecast of the state for late chunks: ")
    assert "\n" not in line
    assert re.search(said, line), line
    assert not (tmp_path / FORECAST).exists()


def test_a_chunk_of_one_action_has_no_poor_entries() -> None:
    assert poorly_explained(Forecast(np.zeros((1, A + S + 1, S)), (), {})) == []
