"""What frames teach where a policy acted: known answers, a slow rule for random ones, and real recordings."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvla.envs.recording.correction_pool import Corrected
from cogvla.envs.recording.recorder import record
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.interventions import Teaching, acted, concatenated
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.data.mixture.parts import DataPart
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.tests.support import toy_suite
from cogvla.tests.support.small_data import small_data, small_preprocessor
from cogvla.tests.support.toy_suite import NAME, ToyPolicy

toy_suite.register()
PATIENCE, CHUNK = 6, ToyPolicy.embodiment.chunk
CAMERAS = {name: f"observation.images.{name}" for name in ("agentview", "wrist")}


def bools(text: str) -> torch.Tensor:
    return torch.tensor([mark == "e" for mark in text])


@pytest.mark.parametrize(
    ("who", "advised", "actions"),
    [
        ("ppp", True, [1, 1, 1]),
        ("ppp", False, [0, 0, 0]),
        ("eee", True, [4, 3, 2]),
        ("ppee", True, [1, 1, 3, 2]),
        ("eepe", True, [3, 2, 1, 2]),
        ("eepe", False, [2, 1, 0, 1]),
    ],
)
def test_a_chunk_teaches_up_to_the_first_action_that_was_not_carried_out(
    who: str, advised: bool, actions: list[int]
) -> None:
    """p: the policy acted, e: the expert."""
    assert Teaching.of(bools(who), advised, 1.0).actions_N.tolist() == actions


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.booleans())
def test_it_is_the_slow_rule(who: list[bool], advised: bool) -> None:
    def taught(start: int) -> int:
        count = 0
        for place in range(start, len(who)):
            if not who[place]:
                return count + advised
            count += 1
        return count + advised

    found = Teaching.of(torch.tensor(who), advised, 2.0)
    assert found.actions_N.tolist() == [taught(start) for start in range(len(who))]
    assert found.weight_N.tolist() == [2.0 if expert else 1.0 for expert in who]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Corrections of a hovering policy, and demonstrations."""
    root = tmp_path_factory.mktemp("corrections")
    corrected = Corrected(ToyPolicy(0.0), patience=PATIENCE)
    return {
        "corrected": record(NAME, 4, root / "corrected", image_size=16, workers=0, corrected=corrected),
        "plain": record(NAME, 3, root / "plain", image_size=16, workers=0),
    }


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(cameras=CAMERAS, root=str(root), cache=str(root.with_name("cache")), **changes)


def open_toy(root: Path, **changes: Any) -> DemonstrationData:
    return DemonstrationData.open(config(root, **changes), ToyPolicy.embodiment, progress=False)


def pads(data: DemonstrationData, row: int) -> list[bool]:
    return TrainingBatches(data, 1, 0).columns(torch.tensor([row]))["action_is_pad"][0].tolist()


def test_corrections_teach_one_action_where_the_policy_acted_and_chunks_where_the_expert_did(
    roots: dict[str, Path],
) -> None:
    data = open_toy(roots["corrected"])
    for row in range(PATIENCE):
        assert pads(data, row) == [False, *[True] * (CHUNK - 1)]
    assert pads(data, PATIENCE) == [False] * CHUNK
    last = int((data.episode_N == 0).sum()) - 1
    assert pads(data, last) == [False, *[True] * (CHUNK - 1)], "the end of the episode counts as before"
    assert open_toy(roots["plain"]).teaching is None
    assert open_toy(roots["corrected"], intervention=None).teaching is None
    different = [open_toy(roots["corrected"], intervention_weight=w).provenance["fingerprint"] for w in (1.0, 2.0)]
    assert different[0] != different[1], "training does not go on with another weight unnoticed"


def test_recordings_of_robots_teach_what_the_person_did_only(roots: dict[str, Path], tmp_path: Path) -> None:
    """Without `label.executed_action`, actions are those that were executed."""
    root = tmp_path / "robot"
    shutil.copytree(roots["corrected"], root)
    info = (root / "meta/info.json").read_text()
    (root / "meta/info.json").write_text(info.replace("label.executed_action", "label.something"))
    for file in root.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        names = [name.replace("label.executed_action", "label.something") for name in table.column_names]
        pq.write_table(table.rename_columns(names), file)
    data = open_toy(root)
    batches = TrainingBatches(data, 8, 0)
    drawn = torch.cat([batches.rows(step) for step in range(20)]).unique()
    assert data.teaching is not None
    assert (data.teaching.actions_N[drawn] > 0).all()
    assert len(drawn) == int((data.teaching.actions_N > 0).sum()) < len(data)
    assert PATIENCE - 1 not in drawn
    assert PATIENCE in drawn
    untaught = len(data) - len(drawn)
    (note,) = (note for note in data.notes if "intervention" in note)
    assert f"a policy acted in {untaught} of {len(data)} frames (intervention is false), which are not learned" in note
    assert not open_toy(roots["corrected"]).notes, "there the expert said in every frame what to do"


@pytest.mark.parametrize("seed", range(6))
def test_only_episodes_that_teach_something_are_held_out(seed: int) -> None:
    data = small_data()
    acted_N = data.episode_N == 2
    data = replace(data, teaching=Teaching.of(acted_N, False, 1.0))
    with pytest.raises(ValueError, match="cannot be split"):
        data.split(0.1, seed)
    nothing = replace(data, teaching=Teaching.of(torch.zeros_like(acted_N), False, 1.0))
    with pytest.raises(ValueError, match="a policy acted in all frames, so that there is nothing to learn"):
        TrainingBatches(nothing.split(0.1, seed)[0], 4, 0)
    data = replace(data, teaching=Teaching.of(acted_N | (data.episode_N == 0), False, 1.0))
    training, held_out = data.split(0.1, seed)
    assert set(held_out.episode_N[held_out.all_rows].tolist()) <= {0, 2}
    assert len(held_out.taught_rows) > 0
    assert len(training.taught_rows) > 0


def test_validation_draws_as_many_taught_samples_of_each_set() -> None:
    data = small_data()
    half = int(data.episode_N.max()) // 2
    first = int((data.episode_N < half).sum())
    parts = tuple(
        DataPart(name, start, end, episode, 1.0, {}, {})
        for name, start, end, episode in (("a", 0, first, 0), ("b", first, len(data), half))
    )
    few = (data.episode_N >= half) | (torch.arange(len(data)) < 4)
    mixed = replace(data, parts=parts, teaching=Teaching.of(few, False, 1.0)).evenly()
    batches = TrainingBatches(mixed, 8, 0)
    assert (torch.cat([mixed.part_of(batches.rows(step)) for step in range(4)]) == 0).sum() == 16


def test_executed_actions_of_another_size_are_refused(roots: dict[str, Path]) -> None:
    robot = replace(
        ToyPolicy.embodiment, action_dim=ToyPolicy.embodiment.state_dim, gripper_index=None, action_normalise_mask=()
    )
    config_ = config(roots["corrected"], action="observation.state")
    with pytest.raises(ValueError, match=r"'label.executed_action' of .* numbers in each frame, data.action has"):
        DemonstrationData.open(config_, robot, progress=False)


def test_a_mixture_weighs_interventions_and_nothing_else(roots: dict[str, Path]) -> None:
    mixture = tuple({"root": str(root)} for root in roots.values())
    data = open_data(config(roots["plain"], mixture=mixture, intervention_weight=3.0), ToyPolicy.embodiment)
    assert data.teaching is not None
    whole = [open_toy(root, intervention_weight=3.0) for root in roots.values()]
    first = whole[0].teaching
    assert first is not None
    n = len(whole[0])
    assert torch.equal(data.teaching.weight_N[:n], first.weight_N)
    assert sorted(first.weight_N.unique().tolist()) == [1.0, 3.0]
    assert (data.teaching.weight_N[n:] == 1).all()
    assert pads(data, n) == [False] * CHUNK
    assert concatenated([None, None], [3, 4], CHUNK) is None


def test_weights_reach_the_loss_with_a_mean_of_one() -> None:
    plain = small_data()
    weight_N = torch.where(torch.arange(len(plain)) % 2 == 0, 3.0, 1.0)
    data = replace(plain, teaching=Teaching(torch.full((len(plain),), plain.chunk), weight_N))
    builder = BatchBuilder(data, small_preprocessor(data), ObjectiveConfig(counterfactual=0.0, phase_weights=()))
    rows = torch.arange(16)
    weight_BK = builder.choose(TrainingBatches(data, 16, 0).columns(rows), torch.Generator().manual_seed(0)).weight_BK
    assert float(weight_BK.mean()) == pytest.approx(1.0)
    full = weight_BK[:, 0]
    assert full[::2].tolist() == pytest.approx((3 * full[1]).repeat(8).tolist())


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), "much", True])
def test_weights_that_are_none(weight: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.intervention_weight must be a positive number, .* got"):
        config(tmp_path, intervention_weight=weight)


@pytest.mark.parametrize("values", [[0.0, 0.5], [2, 1], [float("nan"), 1.0], [[0, 1], [1, 1]]])
def test_columns_that_do_not_say_who_acted(values: list[Any]) -> None:
    with pytest.raises(ValueError, match="'who' must say in each frame with one value, 0 or 1"):
        acted(torch.tensor(values), "who")
    assert acted(torch.tensor([[0.0], [1.0]]), "who").tolist() == [False, True]


def test_a_feature_that_is_not_there(roots: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="has no 'who'"):
        open_toy(roots["corrected"], intervention="who")
    np.testing.assert_array_equal(open_toy(roots["plain"], intervention="intervention").episode_N.unique(), [0, 1, 2])
