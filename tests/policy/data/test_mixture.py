"""Mixtures: nothing of a data set changes, shares and epochs are exact, and wrong entries end in one line."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cogvla.configs.build import build
from cogvla.policy.data.config import DataConfig, DataEntry
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.mixture.mixture import Place, joined, open_data
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.data_checks import check_instructions
from cogvla.tests.support import lerobot_files as files
from cogvla.tests.support.small_data import LABELLED, small_data, small_preprocessor

OTHERS = ("lift the blue cube", "open the drawer")


def config(mixture: Any, **more: Any) -> DataConfig:
    """What a YAML file gives."""
    values = {"cameras": {"front": files.CAMERA}, "root": "/nowhere", "mixture": mixture, **more}
    return build(DataConfig, values, "data")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets: one with images, one with a video and one with other tasks."""
    root = tmp_path_factory.mktemp("sets")
    files.write(root / "first")
    files.write(root / "filmed", (6, 2), video=True)
    files.write(root / "other", (5, 5, 5))
    files.write_tasks(root / "other", {"task_index": [0, 1], "__index_level_0__": list(OTHERS)})
    return root


def mixed(folders: Path, *entries: dict[str, Any], **more: Any) -> DemonstrationData:
    given = [{**entry, "root": str(folders / entry["root"])} for entry in entries]
    return open_data(config(given, cache=str(folders / "cache"), **more), files.ROBOT, progress=False)


def refused(folders: Path, message: str, *entries: Any, **more: Any) -> None:
    given = [{**e, "root": str(folders / e["root"])} if isinstance(e, dict) and "root" in e else e for e in entries]

    def attempt() -> None:
        open_data(config(given, cache=str(folders / "cache"), **more), files.ROBOT, progress=False)

    with pytest.raises((ValueError, OSError), match=message) as caught:
        attempt()
    assert "\n" not in str(caught.value)


def test_a_mixture_holds_what_its_data_sets_hold(folders: Path) -> None:
    data = mixed(folders, {"root": "first"}, {"root": "filmed"}, {"root": "other", "episodes": [1]})
    wanted: list[tuple[str, Any]] = [("first", None), ("filmed", None), ("other", (1,))]
    alone = [files.what_is_read(files.open_data(folders / name, episodes=chosen)) for name, chosen in wanted]
    assert files.what_is_read(data) == [frame for frames in alone for frame in frames]
    assert data.instructions == sorted({*files.TASKS, *OTHERS})
    files.assert_read(data, [frame for frames in alone for frame in frames], (4, 3, 5, 6, 2, 5))
    assert data.episode_name(0) == "episode 0 of first"
    assert data.episode_name(len(data) - 1) == "episode 1 of other"
    assert data.describe()["sets"]["filmed"]["frames"] == 8
    assert data.describe()["frames"] == len(data) == 25


def test_frames_may_be_asked_for_in_any_order(folders: Path) -> None:
    data = mixed(folders, {"root": "first"}, {"root": "filmed"}, {"root": "other"})
    whole = data.frames.take(np.arange(len(data)))
    assert data.frames.shape == whole.shape == (35, 1, 3, files.SIZE, files.SIZE)
    rows = np.random.default_rng(0).integers(0, len(data), 100)
    assert np.array_equal(data.frames.take(rows), whole[rows])
    assert data.frames.take(np.array([], np.int64)).shape == (0, *whole.shape[1:])


def test_entries_take_what_they_do_not_name_from_the_whole() -> None:
    given = config(
        [{"root": "A"}, {"repo_id": "some/one", "revision": "v1", "state": ["a", "b"]}, {"episodes": 0.5, "weight": 2}],
        root="W",
        episodes=[1, 2],
        gripper={"index": 2, "open": 1, "close": 0},
        cache="C",
    )
    first, hub, same = given.entries()
    assert [e.config.root for e in (first, hub, same)] == ["A", None, "W"]
    assert [e.config.repo_id for e in (first, hub, same)] == [None, "some/one", None]
    assert [e.config.episodes for e in (first, hub, same)] == [(1, 2), (1, 2), 0.5]
    assert [e.config.state_keys for e in (first, hub, same)] == [
        ("observation.state",),
        ("a", "b"),
        ("observation.state",),
    ]
    assert all(e.config.gripper == given.gripper and e.config.cache == "C" for e in (first, hub, same))
    assert [e.weight for e in (first, hub, same)] == [1, 1, 2]
    other = config([{"root": "A"}], root=None, repo_id="some/one", revision="v1").entries()[0]
    assert (other.config.repo_id, other.config.revision) == (None, None)


def test_one_entry_is_that_data_set(folders: Path) -> None:
    alone = files.open_data(folders / "first")
    assert mixed(folders, {"root": "first"}).describe() == alone.describe()
    assert not mixed(folders, {"root": "first"}).parts


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 3, 0.5), (0.1, 7, 2)])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_each_data_set_is_drawn_in_epochs_of_its_own(folders: Path, weights: tuple[float, ...], batch: int) -> None:
    names = ("first", "filmed", "other")
    data = mixed(folders, *({"root": name, "weight": w} for name, w in zip(names, weights, strict=True)))
    batches = TrainingBatches(data, batch, seed=3)
    steps = 600 // batch
    order = torch.cat([batches.rows(step).sort().values for step in range(steps)])
    set_P = data.part_of(order)
    shares = torch.tensor(weights) * torch.tensor([p.end - p.start for p in data.parts])
    for number, part in enumerate(data.parts):
        mine, size = order[set_P == number], part.end - part.start
        assert abs(len(mine) - len(order) * float(shares[number] / shares.sum())) <= 1
        seen = Counter(mine.tolist())
        assert set(seen.values()) <= {len(mine) // size, math.ceil(len(mine) / size)}, "epochs without repeats"
        drawn = batches.drawn(steps)[part.name]
        assert drawn == {"samples": len(mine), "epochs": len(mine) / size}


def test_the_order_is_a_function_of_seed_and_step(folders: Path) -> None:
    data = mixed(folders, {"root": "first"}, {"root": "filmed", "weight": 2})
    forward = [TrainingBatches(data, 6, 3).rows(step).tolist() for step in range(20)]
    again = TrainingBatches(data, 6, 3)
    assert [again.rows(step).tolist() for step in reversed(range(20))][::-1] == forward
    assert [TrainingBatches(data, 6, 4).rows(step).tolist() for step in range(20)] != forward
    resumed = TrainingBatches(data, 6, 3)
    resumed.load_state_dict({**again.state_dict(), "step": 7})
    assert torch.equal(next(resumed)["state"], again.columns(again.rows(7))["state"])
    other = mixed(folders, {"root": "first"}, {"root": "filmed", "weight": 3})
    with pytest.raises(ValueError, match=r"weights was \{'first': 1.0, 'filmed': 2.0\}, is .*3\.0"):
        TrainingBatches(other, 6, 3).load_state_dict(again.state_dict())
    turned = mixed(folders, {"root": "filmed", "weight": 2}, {"root": "first"})
    with pytest.raises(ValueError, match=r"weights was \{'first': 1.0, 'filmed': 2.0\}, is \{'filmed'"):
        TrainingBatches(turned, 6, 3).load_state_dict(again.state_dict())
    with pytest.raises(ValueError, match="weights was None"):
        TrainingBatches(data, 6, 3).load_state_dict(
            TrainingBatches(files.open_data(folders / "first"), 6, 3).state_dict()
        )


def test_no_place_in_a_batch_belongs_to_one_data_set(folders: Path) -> None:
    data = mixed(folders, {"root": "first"}, {"root": "other", "weight": 12 / 15})  # in turn
    batches = TrainingBatches(data, 4, 0)
    set_SB = torch.stack([data.part_of(batches.rows(step)) for step in range(40)])
    assert (set_SB.sum(1) == 2).all()
    assert ((set_SB.float().mean(0) > 0.2) & (set_SB.float().mean(0) < 0.8)).all()


def test_every_data_set_is_validated(folders: Path) -> None:
    data = mixed(folders, {"root": "first"}, {"root": "other"}, {"root": "filmed", "episodes": [0]})
    training, held_out = data.split(0.1, seed=0)
    assert Counter(held_out.part_of(held_out.all_rows).tolist()).keys() == {0, 1}, "a single episode is for training"
    assert len(training) + len(held_out) == len(data)
    assert not set(training.episode_N[training.all_rows].tolist()) & set(held_out.episode_N[held_out.all_rows].tolist())
    rows = TrainingBatches(held_out.evenly(), 8, 0).rows(0)
    assert Counter(data.part_of(rows).tolist()) == {0: 4, 1: 4}


def test_joint_statistics_are_over_all_frames_whatever_the_weights(folders: Path) -> None:
    data = mixed(folders, {"root": "first", "weight": 9}, {"root": "filmed"})
    both = [files.open_data(folders / name) for name in ("first", "filmed")]
    assert data.statistics()["state"] == Statistics.of(torch.cat([d.state_NS for d in both]).numpy())


def test_what_changes_a_run_changes_its_identity(folders: Path) -> None:
    entries: list[dict[str, Any]] = [{"root": "first"}, {"root": "filmed", "weight": 2}]
    changes: list[list[dict[str, Any]]] = [
        [{"root": "first"}, {"root": "filmed"}],
        [{"root": "first"}, {"root": "filmed", "weight": 2, "name": "x"}],
        [{"root": "first", "episodes": [0, 1]}, {"root": "filmed", "weight": 2}],
    ]
    base = mixed(folders, *entries)
    assert mixed(folders, *entries).content() == base.content()
    for changed in changes:
        other = mixed(folders, *changed)
        assert other.content() != base.content()
        assert other.describe()["fingerprint"] != base.describe()["fingerprint"]


@pytest.mark.parametrize(
    ("entries", "more", "said"),
    [
        ([{"root": "first"}, {"root": "filmed", "weight": 0}], {}, r"data\.mixture\[1\]\.weight must be .* got 0; to"),
        (
            [{"root": "first"}, {"root": "filmed", "weight": -1}],
            {},
            r"\[1\]\.weight must be a positive number, .* got -1",
        ),
        ([{"root": "first", "weight": math.nan}], {}, r"\[0\]\.weight must be a positive number, .* got nan"),
        ([{"root": "first", "weight": math.inf}], {}, r"\[0\]\.weight must be a positive number, .* got inf"),
        ([{"root": "first", "weight": 10**400}], {}, r"\[0\]\.weight must be a positive number, .* got 1000"),
        ([{"root": "first", "weight": 1e300}], {}, r"\[0\]\.weight must be a positive number, .* got 1e\+300"),
        (
            [{"root": "first"}],
            {"cache_gb": math.inf},
            r"data\.cache_gb must be positive, .* or null for no limit; got inf",
        ),
        ([{"root": "first", "weight": "2"}], {}, r"\[0\]\.weight must be a positive number, .* got '2'"),
        ([{"root": "first", "weight": True}], {}, r"\[0\]\.weight must be a positive number, .* got True"),
        ([], {}, r"data\.mixture must be a list of data sets, .* got \(\)"),
        ([{"root": "first"}, {"root": "./first"}], {}, r"data\.mixture has the data set .*first twice: give it once"),
        ([{"root": "first", "wait": 2}], {}, r"unknown key wait in data\.mixture\[0\]; valid keys are name, weight, "),
        (["first", "filmed"], {}, r"data\.mixture\[0\] must be a mapping such as \{root: FOLDER\}.* got 'first'"),
        ([{"root": "first"}, 3], {}, r"data\.mixture\[1\] must be a mapping"),
        (
            [{"root": "first", "paraphrases": "a.yaml"}],
            {},
            r"\[0\]\.paraphrases is of the whole mixture: give",
        ),
        ([{"root": "first", "mixture": [{}]}], {}, r"\[0\]\.mixture is of the whole mixture"),
        ([{"root": "first", "cache": "c"}], {}, r"\[0\]\.cache is of the whole mixture"),
        ([{"root": "first", "name": ""}], {}, r"\[0\]\.name must be a text, got ''"),
        ([{"root": "first", "name": "x"}, {"root": "filmed", "name": "x"}], {}, "two data sets have the name 'x'"),
        ([{"root": "first", "episodes": 2.5}], {}, r"data\.mixture\[0\]: data\.episodes: cannot understand 2\.5"),
        ([{"root": "first"}, {"root": "filmed", "episodes": [9]}], {}, r"data\.mixture, filmed: .*\[9\] is not in the"),
        ([{"root": "first"}, {"root": "missing"}], {}, r"data\.mixture, .*missing: there is no LeRobotDataset in"),
        ([{"root": "first"}, {"root": "filmed", "state": "x"}], {}, r"data\.mixture, filmed: .* has no 'x'; it has"),
        ([{"root": "first"}, {"root": "filmed", "cameras": {"front": "x"}}], {}, r"mixture, filmed: .* no camera 'x'"),
        (
            [{"root": "first"}, {"root": "filmed", "cameras": {}}],
            {},
            r"filmed: data\.cameras has no key for front",
        ),
        ([{"root": "first"}], {"statistics": "both"}, r"data\.statistics is 'both'; it must be one of joint"),
    ],
)
def test_wrong_entries_end_in_one_line(folders: Path, entries: list[Any], more: dict[str, Any], said: str) -> None:
    refused(folders, said, *entries, **more)


def test_mistakes_are_said_before_anything_is_decoded(folders: Path, tmp_path: Path) -> None:
    entries = [{"root": str(folders / "first")}, {"root": str(folders / "other"), "cameras": {"front": "x"}}]
    settings = config(entries, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="no camera 'x'"):
        open_data(settings, files.ROBOT, progress=False)
    labels = {"target": "timestamp"}
    with pytest.raises(ValueError, match="label 'target' must have 3 values"):
        files.open_data(folders / "first", cache=str(tmp_path / "cache"), labels=labels)
    assert not list(tmp_path.rglob("*.frames"))


def named(root: Path, **names: Any) -> Path:
    info = json.loads((root / "meta/info.json").read_text())
    for key, given in names.items():
        info["features"][key.replace("_", ".")]["names"] = given
    files.edit_info(root, features=info["features"])
    return root


@pytest.mark.parametrize("given", [["x", "y", "z"], {"axes": ["x", "y", "z"]}, {"z": 2, "x": 0, "y": 1}])
def test_entries_in_another_order_are_refused(folders: Path, tmp_path: Path, given: Any) -> None:
    one, other = named(files.write(tmp_path / "one"), action=given), files.write(tmp_path / "two", (2, 2))
    entries = [{"root": str(one)}, {"root": str(named(other, action=["x", "z", "y"]))}]
    refused(folders, "action is x, y, z in one and x, z, y in two: the same entries in another order", *entries)
    named(other, action=["x", "gripper", "y"], observation_state=["a", "b"])
    notes = mixed(folders, *entries).notes
    assert "action 1 is 'y' in one and 'gripper' in two; check that both mean the same" in notes
    assert not any(note.startswith("state") for note in notes), "one does not name its states"
    named(one, action=["joints"]), named(other, action=["joints"], observation_state=["both"])
    named(one, observation_state=["b"])
    assert not [note for note in mixed(folders, *entries).notes if "check that both" in note], "too few names"


def test_labels_may_be_of_other_types(folders: Path, tmp_path: Path) -> None:
    other = files.write(tmp_path / "unsigned")
    files.edit_table(other / "data/chunk-000/file-000.parquet", index=lambda numbers: pa.array(numbers, pa.uint32()))
    data = mixed(folders, {"root": "first"}, {"root": str(other)}, labels={"number": "index"})
    assert data.labels["number"].dtype == torch.int64


@pytest.mark.parametrize("given", ["A", {"root": "A"}, 3])
def test_a_mixture_is_a_list(given: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.mixture must be a list of data sets"):
        config(given)


def test_other_rates_are_mixed_only_if_asked_for(folders: Path, tmp_path: Path) -> None:
    slow = files.write(tmp_path / "slow")
    files.edit_info(slow, fps=5)
    entries = [{"root": "first"}, {"root": str(slow)}]
    refused(folders, "first has 10 frames per second, .*slow 5: an action would mean another speed", *entries)
    data = mixed(folders, *entries, mixed_rates=True)
    assert any("5 frames per second" in note for note in data.notes)


def test_folders_of_one_name_are_told_apart(folders: Path, tmp_path: Path) -> None:
    files.write(tmp_path / "first", (3, 3))
    data = mixed(folders, {"root": "first"}, {"root": str(tmp_path / "first")})
    assert [part.name for part in data.parts] == [str(folders / "first"), str(tmp_path / "first")]


def test_the_same_demonstrations_and_other_units_are_noted(folders: Path, tmp_path: Path) -> None:
    files.write(tmp_path / "copy")
    data = mixed(folders, {"root": "first"}, {"root": str(tmp_path / "copy")})
    assert "first and copy hold the same demonstrations (3 episodes)" in data.notes
    files.write(tmp_path / "longer", (4, 3, 5, 2))
    data = mixed(folders, {"root": "first", "episodes": "0:2"}, {"root": str(tmp_path / "longer")})
    assert "first and longer hold the same demonstrations (2 episodes)" in data.notes
    files.write(tmp_path / "darker", given=[{**r, files.CAMERA: files.rows()[0][files.CAMERA]} for r in files.rows()])
    data = mixed(folders, {"root": "first", "episodes": "1:"}, {"root": str(tmp_path / "darker")})
    assert not [note for note in data.notes if "same demonstrations" in note]
    given = [{**row, "action": [1000 * x for x in row["action"]]} for row in files.rows()]
    files.write(tmp_path / "millimetres", given=given)
    data = mixed(folders, {"root": "first"}, {"root": str(tmp_path / "millimetres")})
    said = [note for note in data.notes if "very different ranges" in note]
    assert [note.split(" has ")[0] for note in said] == ["action 0", "action 1"]
    assert "first 0 to 0.2, millimetres 0 to 200" in said[0]


# Labels, with data sets in memory.


def place(name: str, suite: str | None = None, weight: float = 1.0) -> Place:
    entry = DataEntry(DataConfig({}, root=name), weight=weight)
    return Place(name, entry, Path(name), None, 10, suite)


def both(first: DemonstrationData, second: DemonstrationData, *suites: str | None) -> DemonstrationData:
    given = suites or (None, None)
    return joined([place("A", given[0]), place("B", given[1])], [first, second], DataConfig({}, root="A"))


def other_suite() -> DemonstrationData:
    """Another suite of two tasks: one instruction is also one of the first suite, of another number."""
    data = small_data(seed=1)
    task_N = (data.frame_labels["task"] == 0).long()
    labels = {
        **data.frame_labels,
        "task": task_N,
        "possible": torch.ones(len(data), 2, dtype=torch.bool),
        "alternatives": data.frame_labels["alternatives"][:, :2] + 5,
    }
    return replace(
        data, frame_labels=labels, instruction_N=task_N, instructions=["touch the green square", "ring the bell"]
    )


def test_tasks_of_two_suites_are_different_tasks() -> None:
    first, second = small_data(), other_suite()
    data = both(first, second)
    n = len(first)
    assert data.labels["possible"].shape == (len(data), 5)
    assert not data.labels["possible"][:n, 3:].any()
    assert not data.labels["possible"][n:, :3].any()
    assert torch.equal(data.labels["possible"][:n, :3], first.labels["possible"])
    assert torch.equal(data.labels["alternatives"][n:, 3:], second.labels["alternatives"])
    assert torch.equal(data.labels["task"][n:], second.labels["task"] + 3)
    tokenizer = WordTokenizer.from_instructions(data.instructions)
    preprocessor = small_preprocessor(first)
    preprocessor.tokenizer = tokenizer
    builder = BatchBuilder(data, preprocessor, LABELLED)
    texts = [data.instructions[i] for i in builder.instruction_of_task.tolist()]
    assert texts == [*first.instructions, "touch the green square", "ring the bell"]
    samples = TrainingBatches(data, len(data), 0).columns(torch.arange(len(data)))
    task_N, allowed_N = builder.alternatives(samples, torch.Generator().manual_seed(0))
    assert (task_N[:n][allowed_N[:n]] < 3).all()
    assert (task_N[n:][allowed_N[n:]] >= 3).all()
    asked = builder.choose(samples, torch.Generator().manual_seed(0)).instruction_B[n:].unique()
    assert {data.instructions[i] for i in asked.tolist()} == {"touch the green square", "ring the bell"}


def test_recordings_of_one_suite_share_its_tasks() -> None:
    first, more = small_data(), small_data(seed=2)
    assert both(first, more, "tabletop_x", "tabletop_x").labels["possible"].shape[1] == 3
    assert both(first, more, "tabletop_x", "tabletop_y").labels["possible"].shape[1] == 6
    assert both(first, more).labels["possible"].shape[1] == 6, "nothing says that the suites are the same"
    renamed = replace(more, instructions=["a", "b", "c"])
    assert both(first, renamed, "tabletop_x", "tabletop_x").labels["possible"].shape[1] == 6, "their tasks disagree"


@pytest.mark.parametrize(
    ("lost", "objective", "said"),
    [
        (("target",), {}, r"grounding needs the labels target, .*\(target: B has none\): map"),
        (
            ("possible", "task"),
            {},
            r"counterfactual needs the labels .*\(alternatives: it means nothing without",
        ),
        (("phase",), {"phase_weights": (1, 1, 1)}, r"phase_weights needs the labels phase, .*\(phase: B has none\)"),
    ],
)
def test_a_label_that_a_set_lacks_is_left_out(lost: tuple[str, ...], objective: dict[str, Any], said: str) -> None:
    first, second = small_data(), small_data(seed=1)
    labels = {name: values for name, values in second.frame_labels.items() if name not in lost}
    data = both(first, replace(second, frame_labels=labels))
    assert not set(lost) & data.labels.keys()
    assert any(note.startswith(f"label {', '.join(sorted(lost))} is left out: B has none") for note in data.notes)
    with pytest.raises(ValueError, match=said):
        BatchBuilder(data, small_preprocessor(), replace(LABELLED, **objective))


def test_other_shapes_and_wrong_tasks_are_left_out_too() -> None:
    first, second = small_data(), small_data(seed=1)
    odd = replace(second, frame_labels={**second.frame_labels, "goal": torch.zeros(len(second), 2)})
    assert both(first, odd).lacking["goal"] == "its shape is [3] in A, [2] in B"
    wrong = replace(second, instruction_N=second.instruction_N.roll(1))
    assert "B: task" in both(first, wrong).lacking["possible"]
    with pytest.raises(ValueError, match=r"counterfactual needs .* B: task \d of label `task` has two instructions"):
        BatchBuilder(both(first, wrong), small_preprocessor(), LABELLED)


@pytest.mark.parametrize("older", [0, 1])
def test_labels_of_another_meaning_are_left_out(older: int) -> None:
    places = [replace(place(name, "tabletop_x"), labels=3) for name in "AB"]
    places[older] = replace(places[older], labels=2)
    data = joined(places, [small_data(), small_data(seed=1)], DataConfig({}, root="A"))
    assert data.labels == {}
    old, new = "AB"[older], "BA"[older]
    why = f"meant something else when {old} was recorded than for {new} (2 and 3); record {old} again"
    assert [note for note in data.notes if why in note] == list(data.notes), "one line for all labels"
    with pytest.raises(ValueError, match=f"grounding needs the labels .* record {old} again"):
        BatchBuilder(data, small_preprocessor(), LABELLED)
    places[older] = replace(places[older], suite="tabletop_y")
    assert joined(places, [small_data(), small_data(seed=1)], DataConfig({}, root="A")).labels


def test_phases_of_other_families_are_noted() -> None:
    def notes(*suites: str | None) -> list[str]:
        return [note for note in both(small_data(), small_data(seed=1), *suites).notes if "label phase" in note]

    assert not notes("tabletop_goal", "tabletop_long")
    assert "A is from tabletop, B is from libero" in notes("tabletop_goal", "libero_goal")[0]
    assert "B is from an unknown suite" in notes("tabletop_goal", None)[0]


def test_mistakes_name_the_episode_of_its_data_set() -> None:
    second = replace(small_data(seed=1), instructions=["touch the red square", "touch the green square", "!"])
    data = both(small_data(), second)
    with pytest.raises(ValueError, match=r"episode 2 of B of the data has the instruction '!'"):
        check_instructions(WordTokenizer.from_instructions(data.instructions), data)
    late = second.frame_labels["phase"].clone()
    late[-1] = 7
    data = both(small_data(), replace(small_data(seed=1), frame_labels={**second.frame_labels, "phase": late}))
    with pytest.raises(ValueError, match=r"2 entries, the data has phases 0 to 7; .* \(episode 7 of B has"):
        BatchBuilder(data, small_preprocessor(), replace(LABELLED, phase_weights=(1, 1)))


def test_a_recording_that_is_damaged_is_named(folders: Path, tmp_path: Path) -> None:
    root = files.write(tmp_path / "set")
    (root / "meta" / "recording.json").write_text("{")
    refused(folders, r"data\.mixture, .*set: .*recording\.json", {"root": "first"}, {"root": str(root)})
    (root / "meta" / "recording.json").write_text(json.dumps({"suite": 3}))
    assert len(mixed(folders, {"root": "first"}, {"root": str(root)}).parts) == 2
