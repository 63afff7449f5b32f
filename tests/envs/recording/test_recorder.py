"""Recording: lerobot reads the result, any number of workers gives the same, and no interruption loses an episode."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogvla.envs.contract import ContractError
from cogvla.envs.perturbation.perturbation import OF_THE_SCENE, CrowdedSceneError
from cogvla.envs.recording import dataset_writer
from cogvla.envs.recording.dataset_folder import DatasetFolder
from cogvla.envs.recording.dataset_writer import DatasetWriter, features
from cogvla.envs.recording.demonstration import Demonstration, pack
from cogvla.envs.recording.demonstrator import Demonstrator, DemonstratorSettings, ExpertFailedError
from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import FIRST_TRAINING_STATE, get_suite
from cogvla.lerobot_versions import LeRobotDataset, episode_buffer
from cogvla.policy.checkpoint import FORMAT
from cogvla.scripts import console, record_demonstrations
from cogvla.scripts.command import compose, plain
from cogvla.tests.support import toy_suite
from cogvla.tests.support.console_command import ended
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.toy_suite import INSTRUCTIONS, NAME, ToyExpert

EPISODES = 7
toy_suite.register()


def toy_settings(noise: float = 1.0) -> DemonstratorSettings:
    return DemonstratorSettings(toy_suite.make, ToyExpert, INSTRUCTIONS, 40, 16, noise, seed=0)


def load(root: Path) -> LeRobotDataset:
    return LeRobotDataset(f"cogvla/{NAME}", root=root, video_backend="pyav")


def rows(root: Path) -> list[dict]:
    return pq.read_table(sorted((root / "data").glob("*/*.parquet"))).to_pylist()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(NAME, EPISODES, tmp_path_factory.mktemp("recorded") / "toy", image_size=16, expert=ToyExpert)


def test_lerobot_reads_what_was_recorded(recorded: Path) -> None:
    data = load(recorded)
    assert data.num_episodes == EPISODES
    assert data.fps == 10
    first = data[0]
    assert first["task"] == INSTRUCTIONS[0]
    assert first["observation.images.agentview"].shape == (3, 16, 16)
    assert first["observation.state"].shape == (8,)
    assert first["label.alternatives"].shape == (18,)
    assert first["label.possible"].tolist() == [True, True, False]
    np.testing.assert_array_equal(first["label.target"], toy_suite.PLACES[0])
    np.testing.assert_array_equal(first["label.alternatives"][6:9], toy_suite.PLACES[1])
    assert not first["label.alternatives"][12:].any()
    assert first["label.initial_state"] == FIRST_TRAINING_STATE
    assert set(data.meta.stats["action"]) >= {"min", "max", "mean", "std", "q01", "q99"}
    assert data.meta.stats["observation.images.wrist"]["mean"].shape == (3, 1, 1)
    assert json.loads((recorded / "meta" / "recording.json").read_text())["suite"] == NAME
    assert not recorded.with_name("toy.recording").exists()


def test_tasks_take_turns_and_evaluation_states_are_never_used(recorded: Path) -> None:
    data = load(recorded)
    starts = [data[int(i)] for i in data.meta.episodes["dataset_from_index"]]
    assert [int(row["label.task"]) for row in starts] == [0, 1, 2, 0, 1, 2, 0]
    assert [row["task"] for row in starts] == [INSTRUCTIONS[i % 3] for i in range(EPISODES)]
    assert min(int(row["label.initial_state"]) for row in starts) >= FIRST_TRAINING_STATE
    assert len({(int(row["label.task"]), int(row["label.initial_state"])) for row in starts}) == EPISODES


def test_chosen_tasks_take_turns_and_the_rest_is_not_shown(recorded: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image_size": 16, "workers": 0, "expert": ToyExpert}
    root = record(NAME, 5, tmp_path / "chosen", tasks=[2, 0], **settings)
    starts = [row for row in rows(root) if row["frame_index"] == 0]
    assert [row["label.task"] for row in starts] == [2, 0, 2, 0, 2]
    assert [row["label.initial_state"] - FIRST_TRAINING_STATE for row in starts] == [0, 0, 10, 10, 20]
    whole = [row["action"] for row in rows(recorded) if row["episode_index"] == 2]
    assert whole == [row["action"] for row in rows(root) if row["episode_index"] == 0], "as in the whole suite"
    assert record(NAME, 5, root, tasks=[2, 0], **settings) == root
    with pytest.raises(ValueError, match=r"was recorded with chosen_tasks=\[2, 0\]; choose another output"):
        record(NAME, 5, root, **settings)
    settings_of = replace(toy_settings(), counterfactual=0.3, tasks=(2, 0))
    shown = np.array([settings_of.turn(slot) is not None for slot in range(200)]).reshape(100, 2)
    assert (np.abs(shown.cumsum(0) - 0.3 * np.arange(1, 101)[:, None]) < 1 + 1e-6).all()


@pytest.mark.parametrize("tasks", [[], [3], [-1], ["0"], [True], "0", 1.0])
def test_tasks_that_do_not_exist(tasks: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"has tasks 0 to 2, got tasks={re.escape(repr(tasks))}"):
        record(NAME, 1, tmp_path / "toy", image_size=16, workers=0, expert=ToyExpert, tasks=tasks)
    assert not list(tmp_path.iterdir())


def test_the_label_is_the_clean_action_and_the_noisy_one_was_executed(recorded: Path) -> None:
    episode = [row for row in rows(recorded) if row["episode_index"] == 0]
    positions = np.array([row["observation.state"][:3] for row in episode])
    executed = np.array([row["label.executed_action"][:3] for row in episode])
    clean = np.array([row["action"][:3] for row in episode])
    np.testing.assert_allclose(np.diff(positions, axis=0), 0.1 * executed[:-1], atol=1e-6)
    np.testing.assert_allclose(clean, np.clip(3 * (toy_suite.PLACES[0] - positions), -0.5, 0.5), atol=1e-5)
    assert np.abs(clean - executed).max() > 0.01


def test_images_are_lossless_and_belong_to_their_step(recorded: Path) -> None:
    for row in rows(recorded)[:40:3]:
        with Image.open(io.BytesIO(row["observation.images.agentview"]["bytes"])) as image:
            picture = np.asarray(image)
        place = (np.clip(np.array(row["observation.state"][:2]) + 0.5, 0, 0.99) * 16).astype(int)
        assert picture[tuple(place)].tolist() == [255] * 3
        assert (picture == 255).sum() == 3


def test_one_worker_records_the_same_as_two(recorded: Path, tmp_path: Path) -> None:
    assert rows(record(NAME, EPISODES, tmp_path / "one", image_size=16, workers=1, expert=ToyExpert)) == rows(recorded)


def test_another_seed_records_something_else(recorded: Path, tmp_path: Path) -> None:
    other = record(NAME, 1, tmp_path / "other", image_size=16, workers=0, seed=1, expert=ToyExpert)
    assert rows(other)[0]["label.initial_state"] != rows(recorded)[0]["label.initial_state"]
    assert rows(other)[0]["observation.state"] != rows(recorded)[0]["observation.state"]


def test_a_recording_whose_labels_meant_something_else_is_not_reused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image_size": 32, "workers": 1}
    suite = replace(get_suite("tabletop_object"), labels=None)
    root = record(suite, 1, tmp_path / "set", **settings)
    about = root / "meta" / "recording.json"
    older = json.loads(about.read_text())
    del older["labels"]  # as before there was this key
    about.write_text(json.dumps(older))
    assert record(suite, 1, root, **settings) == root
    with pytest.raises(ValueError, match="was recorded with labels=None; choose another output, or delete it"):
        record(replace(suite, labels=2), 1, root, **settings)


def test_randomised_scenes(tmp_path: Path) -> None:
    """An episode differs in what was drawn for it and in nothing else; without a draw, it is the clean one."""
    settings: dict[str, Any] = {"image_size": 32, "noise": 0.0, "workers": 0}
    clean = rows(record("tabletop_object", 8, tmp_path / "clean", **settings))
    changed = {name: tmp_path / name for name in ("light", "robot")}
    for name, root in changed.items():
        record("tabletop_object", 8, root, randomise=[name], **settings)
    drawn = replace(toy_settings(), randomise=OF_THE_SCENE)
    levels = []
    for name, root in changed.items():
        for episode in range(8):
            before, after = ([r for r in data if r["episode_index"] == episode] for data in (clean, rows(root)))
            task, state = before[0]["label.task"], before[0]["label.initial_state"]
            level = {each.dimension: each.level for each in drawn.perturbations(task, state)}.get(name, 0)
            levels.append(level)
            pictures, states = ("observation.images.agentview", "observation.state")
            assert (before[0][pictures] == after[0][pictures]) is (level == 0), (name, episode)
            assert (before[0][states] == after[0][states]) is (level == 0 or name == "light"), (name, episode)
    assert set(levels) == {0, 1, 2, 3}
    one = record("tabletop_object", 3, tmp_path / "one", randomise=["light"], **{**settings, "workers": 1})
    assert rows(one) == [row for row in rows(changed["light"]) if row["episode_index"] < 3]
    assert json.loads((one / "meta" / "recording.json").read_text())["randomise"] == ["light"]
    for there, asked, said in ((one, [], r"\['light'\]"), (tmp_path / "clean", ["light"], "None")):
        with pytest.raises(ValueError, match=f"was recorded with randomise={said}; choose another output"):
            record("tabletop_object", 3 if asked == [] else 8, there, randomise=asked, **settings)


def first_rows(root: Path) -> list[dict]:
    return [row for row in rows(root) if row["frame_index"] == 0]


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def test_counterfactual_episodes_show_other_possible_tasks(recorded: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image_size": 16, "workers": 0, "expert": ToyExpert}
    root = record(NAME, 12, tmp_path / "half", counterfactual=0.5, **settings)
    data, starts = load(root), first_rows(root)
    scenes, done = ([row[f"label.{name}"] for row in starts] for name in ("scene_task", "task"))
    assert scenes == [0, 1, 2] * 4
    swapped = [i for i in range(12) if scenes[i] != done[i]]
    assert len(swapped) == 6
    assert [scenes[i] for i in swapped].count(0) == [scenes[i] for i in swapped].count(1) == 2
    assert len({(scenes[i], done[i]) for i in swapped}) >= 5, "the other tasks take turns"
    for start, number in zip(starts, range(12), strict=True):
        task, scene = start["label.task"], start["label.scene_task"]
        assert data[start["index"]]["task"] == INSTRUCTIONS[task], "the instruction is that of the task that is done"
        np.testing.assert_array_equal(start["label.target"], toy_suite.PLACES[task])
        assert start["label.possible"][task]
        assert start["label.possible"][scene]
        last = [row for row in rows(root) if row["episode_index"] == number][-1]
        assert np.linalg.norm(np.array(last["observation.state"][:3]) - toy_suite.PLACES[task]) < 0.15
    names = ("label.scene_task", "task_index", "index")
    for number in set(range(EPISODES)) - set(swapped):
        episodes = ([row for row in rows(which) if row["episode_index"] == number] for which in (root, recorded))
        one, plain = ([without(row, *names) for row in episode] for episode in episodes)
        assert one == plain, "an episode of the scene's own task is that of a recording without counterfactual ones"
    assert "label.scene_task" not in rows(recorded)[0]
    assert json.loads((root / "meta/recording.json").read_text())["counterfactual"] == 0.5
    assert json.loads((recorded / "meta/recording.json").read_text())["counterfactual"] is None
    shorter = record(NAME, 5, tmp_path / "grows", counterfactual=0.5, **{**settings, "workers": 2})
    record(NAME, 12, shorter, counterfactual=0.5, grow=True, **settings)
    assert rows(shorter) == rows(root)
    with pytest.raises(ValueError, match=r"was recorded with counterfactual=0\.5; choose another output"):
        record(NAME, 12, root, **settings)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.29, 0.3, 0.5, 0.7, 1.0])
def test_the_share_holds_in_every_scene_and_in_all(share: float) -> None:
    settings = replace(toy_settings(), counterfactual=share)
    shown = np.array([settings.turn(slot) is not None for slot in range(300)]).reshape(100, 3)
    assert abs(shown.sum() - 300 * share) < 1 + 1e-6
    assert (np.abs(shown.cumsum(0) - share * np.arange(1, 101)[:, None]) < 1 + 1e-6).all()
    turns = [settings.turn(slot) for slot in range(0, 300, 3)]
    assert [turn for turn in turns if turn is not None] == list(range(shown[:, 0].sum())), "no turn is left out"


def test_a_rate_that_data_sets_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toy_suite.ToyEnv.metadata, "render_fps", 12.5)
    with pytest.raises(ContractError, match=r"a whole number of control steps per second, render_fps is 12\.5"):
        record(toy_suite.suite(), 1, tmp_path / "toy", image_size=16, workers=0)


def test_a_full_disk_while_a_video_is_written_is_said(tmp_path: Path) -> None:
    pictures = list(np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8))
    episode = pack("go", 10, {"action": [np.zeros(7, np.float32)] * 40, "observation.images.a": pictures})
    writer = DatasetWriter(tmp_path / "videos", "toy", episode, "toy", video=True)
    with files_limited_to(20_000), pytest.raises(OSError, match="File too large"):
        writer.add(episode)


def test_a_scene_shows_its_own_task_if_no_other_can_be_shown(tmp_path: Path) -> None:
    suite = toy_suite.suite()
    for name, changed in (
        ("alone", replace(suite, make=toy_suite.Alone)),
        ("beyond", replace(suite, expert=toy_suite.OwnTaskExpert)),
    ):
        starts = first_rows(record(changed, 3, tmp_path / name, image_size=16, workers=0, counterfactual=1.0))
        assert [row["label.task"] for row in starts] == [0, 1, 2], name
        assert [row["label.scene_task"] for row in starts] == [0, 1, 2], name


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (toy_suite.Unasked, "`reset` of Unasked does not return `alternative_tasks`"),
        (toy_suite.Deaf, "`reset` of Deaf was given asked=1 and returns the instruction 'go right'"),
    ],
)
def test_environments_that_cannot_be_asked(make: Any, said: str, workers: int, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=f"^counterfactual=1.0 needs an environment that .*{said}$"):
        record(replace(toy_suite.suite(), make=make), 1, tmp_path / "t", workers=workers, counterfactual=1.0)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), "half", True, None])
def test_shares_that_are_none(share: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^counterfactual must be a share of the episodes, 0 to 1, got "):
        record(NAME, 1, tmp_path / "t", counterfactual=share)


def test_a_scene_without_room_is_a_failed_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    demonstrator = Demonstrator(toy_settings())
    reset, states = demonstrator.env.reset, []

    def crowded(*, seed: int, options: dict[str, int]) -> tuple[Any, dict[str, Any]]:
        states.append(options["initial_state"])
        if len(states) < 3:
            raise CrowdedSceneError("no room for the brown ball")
        return reset(seed=seed, options=options)

    monkeypatch.setattr(demonstrator.env, "reset", crowded)
    assert demonstrator.record(0)[1] == 3
    assert len(set(states)) == 3


@pytest.mark.parametrize(
    ("randomise", "said"),
    [
        (["fog"], "tabletop_object cannot be randomised in 'fog'; one of camera, light, background, layout, robot"),
        (["wording"], "wording changes no scene; train with augmentation=light wordings=paraphrased"),
        ("light", r"randomise must be a list of dimensions, got 'light': write randomise=\[light\]"),
    ],
)
def test_what_cannot_be_randomised(randomise: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        record("tabletop_object", 1, tmp_path / "none", randomise=randomise)
    with pytest.raises(ValueError, match="toy cannot be randomised in 'light'; its scenes cannot be changed"):
        record(NAME, 1, tmp_path / "none", randomise=["light"], expert=ToyExpert)


def test_the_files_equal_those_of_lerobots_own_writer(tmp_path: Path) -> None:
    demonstrator = Demonstrator(toy_settings())
    episodes = [demonstrator.record(slot)[0] for slot in range(4)]
    ours = DatasetWriter(tmp_path / "ours", "cogvla/toy", episodes[0], "toy")
    theirs = LeRobotDataset.create(
        "cogvla/toy",
        10,
        features(episodes[0], video=False),
        tmp_path / "theirs",
        "toy",
        use_videos=False,
        video_backend="pyav",
    )
    for episode in episodes:
        ours.add(episode)
        for step in range(len(episode)):
            frame = {name: array[step] for name, array in episode.arrays.items()}
            frame |= {camera: Image.open(io.BytesIO(files[step])) for camera, files in episode.images.items()}
            theirs.add_frame(frame | {"task": episode.instruction})
        for name, array in episode.arrays.items():
            if array.shape[1:] == (1,):
                episode_buffer(theirs)[name] = [value.item() for value in episode_buffer(theirs)[name]]
        theirs.save_episode()
    ours.close()
    theirs.finalize()
    written = [pq.read_table(tmp_path / who / "data/chunk-000/file-000.parquet") for who in ("ours", "theirs")]
    assert written[0].schema.equals(written[1].schema)
    described = [json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] for table in written]
    assert described[0] == described[1]
    for ours_row, theirs_row in zip(*(table.to_pylist() for table in written), strict=True):
        for camera in episodes[0].images:
            one, other = (np.asarray(Image.open(io.BytesIO(r.pop(camera)["bytes"]))) for r in (ours_row, theirs_row))
            np.testing.assert_array_equal(one, other)
        assert ours_row == theirs_row
    for name in ("meta/info.json", "meta/tasks.parquet"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    statistics = [json.loads((tmp_path / who / "meta/stats.json").read_text()) for who in ("ours", "theirs")]
    assert statistics[0].keys() == statistics[1].keys()
    for name in statistics[0]:
        if name in episodes[0].images:
            assert statistics[0][name].keys() == statistics[1][name].keys()
            np.testing.assert_allclose(statistics[0][name]["mean"], statistics[1][name]["mean"], atol=0.05)
        else:
            assert statistics[0][name] == statistics[1][name], name
    episode_tables = [
        pq.read_table(tmp_path / who / "meta/episodes/chunk-000/file-000.parquet") for who in ("ours", "theirs")
    ]
    kept = [name for name in episode_tables[1].column_names if "images" not in name]
    assert episode_tables[0].select(kept).to_pylist() == episode_tables[1].select(kept).to_pylist()


def test_large_data_sets_go_on_in_further_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_writer, "BYTES_PER_MB", 10)
    demonstrator = Demonstrator(toy_settings())
    episodes = [demonstrator.record(slot)[0] for slot in range(3)]
    writer = DatasetWriter(tmp_path / "many", "cogvla/toy", episodes[0], "toy")
    for episode in episodes:
        writer.add(episode)
    writer.close()
    assert len(list((tmp_path / "many" / "data").glob("*/*.parquet"))) == 3
    data = load(tmp_path / "many")
    assert len(data) == sum(len(episode) for episode in episodes)
    assert data[len(data) - 1]["task"] == episodes[-1].instruction


def test_videos(tmp_path: Path) -> None:
    root = record(NAME, 3, tmp_path / "videos", image_size=64, workers=0, video=True, expert=ToyExpert)
    assert len(list(root.glob("videos/*/*/*.mp4"))) == 2
    data = load(root)
    assert data.num_episodes == 3
    last = data[len(data) - 1]
    assert last["task"] == INSTRUCTIONS[2]
    assert abs(last["observation.images.agentview"].median().item() - 80 / 255) < 0.05


def test_what_else_is_possible_is_still_known_after_things_settled() -> None:
    settled = replace(toy_settings(), settling_steps=2)
    possible = [Demonstrator(settings).record(0)[0].arrays["label.possible"] for settings in (settled, toy_settings())]
    np.testing.assert_array_equal(possible[0][0], [True, True, False])
    np.testing.assert_array_equal(possible[1][0], possible[0][0])


def test_a_demonstration_survives_its_file(tmp_path: Path) -> None:
    episode, attempts = Demonstrator(toy_settings()).record(5)
    assert attempts == 1
    episode.save(tmp_path / "5.npz")
    again = Demonstration.load(tmp_path / "5.npz")
    assert (again.instruction, again.fps, again.images) == (episode.instruction, episode.fps, episode.images)
    assert again.arrays.keys() == episode.arrays.keys()
    for name, array in episode.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
        assert again.arrays[name].dtype == array.dtype
    assert Demonstration.is_complete(tmp_path / "5.npz")
    (tmp_path / "5.npz").write_bytes((tmp_path / "5.npz").read_bytes()[:-30])
    assert not Demonstration.is_complete(tmp_path / "5.npz")


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_after_kill_9_or_ctrl_c_the_same_command_goes_on(kill: signal.Signals, recorded: Path, tmp_path: Path) -> None:
    output = tmp_path / "toy"
    code = f"from cogvla.tests.support.toy_suite import record_slowly; record_slowly({str(output)!r}, {EPISODES})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    finished = output.with_name("toy.recording") / "episodes"
    deadline = time.monotonic() + 120
    while len(list(finished.glob("[0-9]*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(kill)
    _, message = process.communicate()
    assert process.returncode == -kill
    if kill == signal.SIGINT:
        assert re.search(r"recording stopped: \d finished episodes are kept in .*toy\.recording", message)
    assert 3 <= len(list(finished.glob("[0-9]*"))) < EPISODES
    assert not output.exists()
    for torn in (finished / ".000009.npz.1", finished / "000006.npz"):
        torn.write_bytes(b"PK")
    record(NAME, EPISODES, output, image_size=16, workers=0, expert=toy_suite.SlowExpert)
    assert rows(output) == rows(recorded)
    assert load(output).num_episodes == EPISODES


@pytest.fixture
def shorter(tmp_path: Path) -> Path:
    return record(NAME, 3, tmp_path / "shorter", image_size=16, workers=0, expert=ToyExpert)


def test_a_finished_data_set_grows(shorter: Path, recorded: Path) -> None:
    assert record(NAME, EPISODES, shorter, image_size=16, workers=0, grow=True, expert=ToyExpert) == shorter
    assert rows(shorter) == rows(recorded)
    for name in ("meta/info.json", "meta/stats.json", "meta/recording.json"):
        assert (shorter / name).read_bytes() == (recorded / name).read_bytes()
    assert [path.name for path in shorter.parent.iterdir()] == ["shorter"]


def test_growing_plays_only_what_is_missing(shorter: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows(shorter)
    monkeypatch.setattr(ToyExpert, "act", toy_suite.BrokenExpert.act)
    with pytest.raises(ZeroDivisionError):
        record(NAME, EPISODES, shorter, image_size=16, workers=0, grow=True, expert=ToyExpert)
    monkeypatch.undo()
    assert rows(shorter) == before, "it is there until the longer one is"
    waiting = shorter.with_name("shorter.recording") / "episodes"
    assert len(list(waiting.iterdir())) == 3
    demonstrator = Demonstrator(toy_settings())
    for slot in range(3, EPISODES):
        demonstrator.record(slot)[0].save(waiting / f"{slot:06d}.npz")
    monkeypatch.setattr(ToyExpert, "act", toy_suite.BrokenExpert.act)
    record(NAME, EPISODES, shorter, image_size=16, workers=0, grow=True, expert=ToyExpert)
    assert rows(shorter) == rows(recorded)


def test_killed_between_the_two_renames(shorter: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target == shorter:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record(NAME, EPISODES, shorter, image_size=16, workers=0, grow=True, expert=ToyExpert)
    monkeypatch.undo()
    assert not shorter.exists()
    monkeypatch.setattr(ToyExpert, "act", toy_suite.BrokenExpert.act)
    record(NAME, EPISODES, shorter, image_size=16, workers=0, grow=True, expert=ToyExpert)
    assert rows(shorter) == rows(recorded)


def test_what_does_not_grow(shorter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = record(NAME, 1, tmp_path / "videos", image_size=16, workers=0, video=True, expert=ToyExpert)
    with pytest.raises(ValueError, match=r"videos, which are not lossless.*grow=false"):
        record(NAME, 2, videos, image_size=16, workers=0, video=True, grow=True, expert=ToyExpert)
    with pytest.raises(ValueError, match=r"was recorded with episodes=3; choose another output"):
        record(NAME, EPISODES, shorter, image_size=16, workers=0, expert=ToyExpert)
    with monkeypatch.context() as patch:
        patch.setattr("cogvla.envs.recording.recorder.version", lambda _: "2.0")
        with pytest.raises(ValueError, match=r"was recorded with simulation=\{'mujoco': '3"):
            record(NAME, EPISODES, shorter, image_size=16, workers=0, grow=True, expert=ToyExpert)
    data = shorter / "data" / "chunk-000" / "file-000.parquet"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot be read .*it is damaged"):
        record(NAME, EPISODES, shorter, image_size=16, workers=0, grow=True, expert=ToyExpert)


def test_finished_episodes_are_not_played_again(tmp_path: Path) -> None:
    work = tmp_path / "toy.recording"
    with pytest.raises(RuntimeError, match="ZeroDivisionError: the expert's bug"):
        record(NAME, 1, tmp_path / "toy", image_size=16, workers=1, expert=toy_suite.BrokenExpert)
    episode, _ = Demonstrator(toy_settings()).record(0)
    episode.save(work / "episodes" / "000000.npz")
    root = record(NAME, 1, tmp_path / "toy", image_size=16, workers=0, expert=toy_suite.BrokenExpert)
    assert len(rows(root)) == len(episode)


def test_a_recording_goes_on_only_with_the_same_simulation_and_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(expert: Any = None) -> Path:
        return record(NAME, 2, tmp_path / "toy", image_size=16, workers=0, expert=expert)

    def forget(path: Path) -> None:
        """Make it a file of a version that did not note these."""
        known = json.loads(path.read_text())
        path.write_text(json.dumps({key: known[key] for key in known.keys() - {"simulation", "expert"}}))

    monkeypatch.setattr(ToyExpert, "act", toy_suite.BrokenExpert.act)
    with pytest.raises(ZeroDivisionError):
        again()
    monkeypatch.setattr("cogvla.envs.recording.recorder.version", lambda _: "2.0")
    with pytest.raises(ValueError, match=r"with another simulation; .*resume=false"):
        again()
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"unfinished recording with another expert; .*resume=false"):
        again(toy_suite.SlowExpert)
    forget(tmp_path / "toy.recording" / "settings.json")
    again(toy_suite.SlowExpert)
    with pytest.raises(ValueError, match=r"was recorded with expert='cogvla\.tests\..*SlowExpert'; choose another"):
        again()
    forget(tmp_path / "toy" / "meta" / "recording.json")
    again()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_the_environment_misses_is_not_taken_for_the_output(workers: int, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the environment failed: .*the-experts-file\.npy"):
        record(NAME, 1, tmp_path / "t", image_size=16, workers=workers, expert=toy_suite.MissingFileExpert)


def test_a_full_disk_while_playing_loses_nothing(
    tmp_path: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, full = tmp_path / "toy", toy_suite.FullDiskExpert
    with pytest.raises(OSError, match=r"cannot write to .*Free.*\d finished episodes are kept in .*the same command"):
        record(NAME, EPISODES, output, image_size=16, workers=1, expert=full)
    assert not output.exists()
    finished = list((tmp_path / "toy.recording" / "episodes").iterdir())
    assert finished
    assert not [path for path in finished if path.name.startswith(".")]
    monkeypatch.setattr(full, "act", ToyExpert.act)
    assert rows(record(NAME, EPISODES, output, image_size=16, workers=0, expert=full)) == rows(recorded)


def test_a_full_disk_while_writing_loses_nothing(
    tmp_path: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = DatasetWriter.add

    def full(writer: DatasetWriter, episode: Demonstration) -> None:
        if writer._dataset.meta.total_episodes == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(writer, episode)

    monkeypatch.setattr(DatasetWriter, "add", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        record(NAME, EPISODES, tmp_path / "toy", image_size=16, workers=0, expert=ToyExpert)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert rows(record(NAME, EPISODES, tmp_path / "toy", image_size=16, workers=0, expert=ToyExpert)) == rows(recorded)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="recording cannot write to"):
        record(NAME, 1, tmp_path / "file" / "toy", image_size=16, workers=0, expert=ToyExpert)


def test_failed_attempts_are_left_out(tmp_path: Path) -> None:
    root = record(NAME, 6, tmp_path / "toy", image_size=16, workers=0, expert=toy_suite.SometimesLostExpert)
    states = {row["label.initial_state"] for row in rows(root)}
    assert states == {1001, 1010}  # 1000 % 3 == 1: lost, and the next one is taken


def test_an_expert_that_cannot_do_a_task(tmp_path: Path) -> None:
    with pytest.raises(ExpertFailedError, match=r"1000 to 1009 of task 0 \('go right'\)"):
        record(NAME, 1, tmp_path / "toy", image_size=16, workers=0, expert=toy_suite.NeverExpert)


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    folder = DatasetFolder(tmp_path / "data", "recording", "recorded", "record.json")
    folder.prepare({}, resume=True)
    again = (
        "from pathlib import Path; from cogvla.envs.recording.dataset_folder import DatasetFolder; "
        f"DatasetFolder(Path({str(tmp_path / 'data')!r}), 'recording', 'recorded', 'record.json').prepare({{}}, True)"
    )
    other = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True)
    assert "ValueError: another process works in" in other.stderr
    folder.dataset.mkdir()
    folder.publish({})
    shutil.rmtree(folder.output)
    assert subprocess.run([sys.executable, "-c", again]).returncode == 0


def test_a_finished_data_set_is_left_alone_and_another_request_refused(recorded: Path) -> None:
    before = rows(recorded)
    assert record(NAME, EPISODES, recorded, image_size=16, expert=ToyExpert) == recorded
    for episodes, grow in ((EPISODES + 1, False), (EPISODES - 1, True)):
        with pytest.raises(ValueError, match=r"was recorded with episodes=7; choose another output"):
            record(NAME, episodes, recorded, image_size=16, grow=grow, expert=ToyExpert)
    with pytest.raises(ValueError, match=r"was recorded with seed=0, episodes=7; choose another output"):
        record(NAME, EPISODES + 1, recorded, image_size=16, seed=1, expert=ToyExpert)
    with pytest.raises(ValueError, match=r"image_size=16, noise=1.0"):
        record(NAME, EPISODES, recorded, image_size=32, noise=0.5, expert=ToyExpert)
    assert rows(recorded) == before


def test_what_somebody_else_put_there_meanwhile_is_kept(tmp_path: Path) -> None:
    folder = DatasetFolder(tmp_path / "data", "recording", "recorded", "record.json")
    folder.prepare({}, resume=True)
    folder.dataset.mkdir()
    folder.output.mkdir()
    (folder.output / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        folder.publish({})
    assert (folder.output / "notes.txt").read_text() == "mine"
    assert folder.dataset.is_dir()


def test_episodes_without_their_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deletion that is interrupted leaves either, but never episodes that another request would take over."""
    folder = DatasetFolder(tmp_path / "data", "recording", "recorded", "record.json")
    folder.prepare({"noise": 1.0}, resume=True)
    (folder.episodes / "000000.npz").touch()

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    again = DatasetFolder(folder.output, "recording", "recorded", "record.json")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            again.prepare({"noise": 0.5}, resume=False)
    with pytest.raises(ValueError, match="unfinished recording with another noise"):
        again.prepare({"noise": 0.5}, resume=True)
    (folder.work / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds episodes of an unknown request, .* \(resume=false\)"):
        again.prepare({"noise": 0.5}, resume=True)
    again.prepare({"noise": 0.5}, resume=False)
    assert not list(again.episodes.iterdir())


def test_what_cannot_be_deleted_afterwards_does_not_fail_a_finished_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network disk, the file of the lock stays until it is closed."""
    folder = DatasetFolder(tmp_path / "data", "recording", "recorded", "record.json")
    folder.prepare({"noise": 1.0}, resume=True)
    folder.dataset.mkdir()
    remove = shutil.rmtree

    def kept(path: Path, *given: Any, **options: Any) -> None:
        if path == folder.work:
            raise OSError(39, "Directory not empty")
        remove(path, *given, **options)

    monkeypatch.setattr("shutil.rmtree", kept)
    folder.publish({"noise": 1.0})
    assert folder.is_finished({"noise": 1.0})
    assert [each.name for each in folder.work.iterdir()] == ["lock"]


def test_folders_with_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not recorded by this command, or another tool has edited it"):
        record(NAME, 1, tmp_path, image_size=16, workers=0, expert=ToyExpert)
    work = tmp_path / "toy.recording"
    work.mkdir()
    (work / "settings.json").write_text(json.dumps({"suite": "another"}))
    with pytest.raises(ValueError, match="unfinished recording with another suite"):
        record(NAME, 1, tmp_path / "toy", image_size=16, workers=0, expert=ToyExpert)
    root = record(NAME, 1, tmp_path / "toy", image_size=16, workers=0, resume=False, expert=ToyExpert)
    with pytest.raises(ValueError, match=r"toy is finished, and resume=false deletes only what is unfinished"):
        record(NAME, 1, tmp_path / "toy", image_size=16, workers=0, resume=False, expert=ToyExpert)
    assert load(root).num_episodes == 1


@pytest.mark.parametrize(
    "wrong",
    [
        *({"episodes": 0}, {"workers": -1}, {"seed": -1}, {"noise": -1.0}, {"image_size": 0}),
        *({"episodes": 2.0}, {"seed": 0.5}, {"noise": float("nan")}, {"noise": "much"}),
    ],
)
def test_requests_that_make_no_sense(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        record(**{"suite": NAME, "episodes": 1, "output": tmp_path / "toy", "expert": ToyExpert, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        *("episodes=0", "noise=-1", "tasks=[10]", "randomise=[light,fog]", "counterfactual=2"),
        *("patience=0", "execute_steps=0", "execute_steps=2.5"),
    ],
)
def test_mistakes_come_before_the_policy(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_demonstrations, "open_any_policy", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=wrong.partition("=")[0]):
        record_demonstrations.main(compose("record_demonstrations", ["policy=x", f"output={tmp_path / 'x'}", wrong]))


@pytest.mark.parametrize(
    ("robot", "words", "said"),
    [
        (
            {},
            ["image_size=64"],
            "the policy sees agentview 128 x 128, wrist 128 x 128 pixels, and the recording has 64",
        ),
        ({}, ["execute_steps=99"], "execute_steps is 99, but the policy predicts 8"),
        ({"control_hz": 10}, [], "the policy acts 10 times per second, suite 'tabletop_object' takes 20"),
        ({"state_dim": 9}, [], r"the policy has state \[9\] and action \[7\], suite 'tabletop_object' has"),
        ({"cameras": [{"name": "top", "height": 128, "width": 128}]}, [], r"the policy needs the cameras \['top'\]"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_before_its_weights_are_loaded(
    robot: dict[str, Any], words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_demonstrations, "open_any_policy", lambda *_, **__: pytest.fail("loaded"))
    for name in ("model.safetensors", "statistics.json"):
        (tmp_path / name).touch()
    config = compose("record_demonstrations", [f"policy={tmp_path}", f"output={tmp_path / 'x'}", *words])
    body = {"format": FORMAT, "embodiment": plain(config.embodiment) | robot}
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=said):
        record_demonstrations.main(config)


def test_an_expert_that_processes_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="function or class of a module"):
        record(NAME, 1, tmp_path / "toy", image_size=16, expert=lambda env, rng, noise: ToyExpert(env, rng, noise))


def test_the_command_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = ended(console.record_demonstrations, "suite=nothing", f"output={tmp_path / 'x'}")
    assert str(said).startswith("error: unknown suite 'nothing'; one of")
    assert not list(tmp_path.iterdir())
