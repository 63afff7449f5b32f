"""LIBERO's HDF5 demonstrations and LeRobotDatasets v2.1: reading, replaying, converting.

They need the extra `libero`; those that replay also need its assets.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogvla.libero.env import LiberoEnv, LiberoSettings
from cogvla.libero.hdf5.conversion import CONVERSION, INITIAL_STATES
from cogvla.libero.hdf5.reader import demonstrations, is_hdf5, read, read_images
from cogvla.libero.hdf5.replay import ReplaySettings, is_noop, kept_steps
from cogvla.policy.data.reader import LeRobotReader, Mapping
from cogvla.scripts import convert_libero as command
from cogvla.scripts.command import compose
from cogvla.tests.support.extras import needs
from cogvla.tests.support.libero_assets import ASSETS, LEAN, MESHES, needs_assets

pytest.importorskip("h5py", reason=needs("libero"))

import h5py

from cogvla.tests.support.libero_files import Demo, made_up, write

STOVE = "turn_on_the_stove"
CAMERAS = ("observation.images.agentview", "observation.images.wrist")


def actions(*grippers: float, moving: bool = True) -> np.ndarray:
    rows = np.zeros((len(grippers), 7))
    rows[:, 0], rows[:, 6] = 0.1 * moving, grippers
    return rows


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_file_of_demonstrations_is_read(tmp_path: Path) -> None:
    demo = made_up(actions(-1, -1, 1))
    path = write(tmp_path / f"{STOVE}_demo.hdf5", [demo] * 11, suite="libero_goal")
    assert is_hdf5(tmp_path)
    assert is_hdf5(path)
    (found,) = demonstrations(tmp_path)
    assert (found.task, found.suite, found.regenerated, found.versions) == (STOVE, "libero_goal", False, {})
    assert found.keys == tuple(f"demo_{i}" for i in range(11)), "in the order of their numbers"
    recording = read(path, "demo_10")
    assert np.array_equal(recording.actions_TA, demo.actions)
    assert np.array_equal(recording.states_TD, demo.states)
    assert recording.observed_TS is not None
    np.testing.assert_allclose(recording.observed_TS, demo.seen, atol=1e-6)
    assert np.array_equal(read_images(path, "demo_3", "wrist", [2, 0]), demo.images["eye_in_hand"][[2, 0]])
    assert {name: pose.tolist() for name, pose in recording.fixtures.items()} == {
        "wooden_cabinet_1_main": [0.1, -0.2, 0.9, 0, 0, 0, 1],
        "flat_stove_1_main": [-0.4, 0.2, 0.9, 1, 0, 0, 0],
    }, "what has a joint of its own is part of the state"


def test_versions_are_read_where_a_file_has_them(tmp_path: Path) -> None:
    path = write(tmp_path / f"{STOVE}_demo.hdf5", [made_up(actions(1))], mujoco_version="2.3.7")
    assert demonstrations(path)[0].versions == {"mujoco": "2.3.7"}


def test_a_regenerated_file_has_fewer_attributes(tmp_path: Path) -> None:
    path = tmp_path / f"{STOVE}_demo.hdf5"
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_4")
        demo["actions"], demo["states"] = actions(1, 1), np.ones((2, 5))
    (found,) = demonstrations(path)
    assert (found.suite, found.keys, found.regenerated) == ("libero_goal", ("demo_4",), True)
    recording = read(path, "demo_4")
    assert (recording.observed_TS, recording.fixtures) == (None, {})


# --- what is no action -----------------------------------------------------------------------------------------------


def test_the_published_rule_for_steps_without_action() -> None:
    still, moving = actions(-1, moving=False)[0], actions(-1)[0]
    closing = actions(1, moving=False)[0]
    tiny = still + np.array([6e-5, 6e-5, 0, 0, 0, 0, 0])
    large = still + np.array([8e-5, 8e-5, 0, 0, 0, 0, 0])
    assert is_noop(still, None)
    assert is_noop(closing, None), "the first action is judged by its motion alone"
    assert not is_noop(moving, None)
    assert is_noop(still, moving)
    assert not is_noop(closing, moving), "the gripper's command changes"
    assert is_noop(tiny, moving)
    assert not is_noop(large, moving), "the norm of the six counts"
    # still | moves | still, closes | still, still closed | moves, opens: compared with the last one that was kept
    rows = np.stack([still, moving, closing, closing, moving])
    assert kept_steps(rows) == [1, 2, 4]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="replay must be one of states, actions"):
        ReplaySettings("libero_goal", LiberoSettings(), replay="frames")  # type: ignore[arg-type]


# --- the command -----------------------------------------------------------------------------------------------------


def run(source: Path, output: Path, *overrides: str) -> Path:
    settings = ["libero.lean=true", "libero.reflections=false", f"libero.assets={ASSETS}"]
    settings += [f"libero.robot_meshes={MESHES}"] if MESHES else []
    config = compose("convert_libero", [f"source={source}", f"output={output}", *settings, *overrides])
    return command.run(config)


def dataset(root: Path) -> tuple[dict[str, np.ndarray], list[str], LeRobotReader]:
    reader = LeRobotReader(
        root, Mapping(CAMERAS, ("observation.state",), ("action",), (("task", "label.task"),), "task", 8, 7)
    )
    return *reader.columns(), reader


@needs_assets
def test_mistakes_of_the_user_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no"):
        run(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match=r"neither TASK_demo\.hdf5 files nor a LeRobotDataset v2\.1; it holds nothing"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "below").mkdir()
    (tmp_path / "image.hdf5").touch()
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(ValueError, match=r"; it holds below, image\.hdf5$"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "below" / f"{STOVE}_demo.hdf5").touch()
    with pytest.raises(ValueError, match=r"give one of its folders: below$"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"its name must end in \.hdf5$"):
        run(tmp_path / ".DS_Store", tmp_path / "out")
    write(tmp_path / "fly_to_the_moon_demo.hdf5", [made_up(actions(1))])
    with pytest.raises(ValueError, match=r"has no task for fly_to_the_moon_demo\.hdf5 \(a task of no suite\)"):
        run(tmp_path, tmp_path / "out")
    (tmp_path / "fly_to_the_moon_demo.hdf5").unlink()
    with pytest.raises(ValueError, match=r"_stove_demo\.hdf5 \(a task of libero_goal\): give another suite=NAME"):
        run(write(tmp_path / f"{STOVE}_demo.hdf5", [made_up(actions(1))]), tmp_path / "out", "suite=libero_object")
    other = write(tmp_path / "pick_up_the_milk_and_place_it_in_the_basket_demo.hdf5", [made_up(actions(1))], "other")
    with pytest.raises(ValueError, match="are not all of the same LIBERO suite: give suite=NAME"):
        run(tmp_path, tmp_path / "out")
    other.unlink()
    path = tmp_path / f"{STOVE}_demo.hdf5"
    with pytest.raises(ValueError, match=r"demo_0: a state of this scene has \d+ numbers, the recorded state has 20"):
        run(path, tmp_path / "out", "suite=libero_goal", "workers=0", "image_size=32")


@pytest.fixture(scope="module")
def stove(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of one task: 0 and 2 end with the stove on, in 1 nothing happens to it.

    In 0 the knob is turned by hand: its states end in success, its actions do not. In 2 it is turned from the start.
    """
    env = LiberoEnv("libero_goal", LEAN, image_size=32, render=False)
    task = [task.name for task in env.tasks].index(STOVE)
    rng, demos = np.random.default_rng(0), []
    for number in range(3):
        rows = rng.uniform(-0.3, 0.3, (8, 7))
        rows[:, 6] = -1
        rows[[2, 5], :6] = 0  # no-ops
        env.reset(options={"task": task, "initial_state": number})
        (knob,) = env.scene.env.get_object("flat_stove_1").joints
        states, seen = [], []
        for step, row in enumerate(rows):
            if number == 2 or (number == 0 and step == 6):
                env.scene.data.joint(knob).qpos = 1.5
            states.append(env.scene.env.sim.get_state().flatten())
            seen.append(env.step(row)[0]["state"])
        blank = {name: np.zeros((8, 16, 16, 3), np.uint8) for name in ("agentview", "eye_in_hand")}
        demos.append(Demo(rows, np.stack(states), np.stack(seen), blank, env.scene.env.sim.model.get_xml()))
    env.close()
    folder = tmp_path_factory.mktemp("stove")
    write(folder / f"{STOVE}_demo.hdf5", demos)
    return folder


@needs_assets
def test_states_are_shown_again(stove: Path, tmp_path: Path) -> None:
    root = run(stove, tmp_path / "out", "workers=0", "image_size=64")
    columns, instructions, reader = dataset(root)
    assert instructions == ["turn on the stove"]
    assert np.bincount(columns["episode"]).tolist() == [6, 6], "0 and 2, without their two no-ops"
    original = [read(stove / f"{STOVE}_demo.hdf5", f"demo_{number}") for number in (0, 2)]
    kept = [0, 1, 3, 4, 6, 7]
    np.testing.assert_allclose(
        columns["action"], np.concatenate([demo.actions_TA[kept] for demo in original]), atol=1e-6
    )
    # what was seen after one action is what is seen before the next; robosuite samples 2 ms before the step ends
    assert original[0].observed_TS is not None
    np.testing.assert_allclose(columns["state"][1], original[0].observed_TS[0], atol=5e-3)
    frames = {
        int(rows[0]): images[0] for part in reader.parts() if part.view == 0 for rows, images in reader.decode(part)
    }
    assert frames[0].shape == (3, 64, 64)
    assert np.abs(frames[0].astype(float) - frames[5]).mean() > 0.5, "the arm has moved"

    conversion = json.loads((root / CONVERSION).read_text())
    assert (conversion["total"]["kept"], conversion["total"]["dropped"], conversion["total"]["noops"]) == (2, 1, 4)
    assert conversion["episodes"][1] == {"source": f"{STOVE}_demo.hdf5", "demonstration": "demo_2"}
    assert conversion["simulation"]["mujoco"]
    assert conversion["features"]["action"]["max"][6] == -1
    starts = json.loads((root / INITIAL_STATES).read_text())["episodes"]
    assert np.array_equal(starts[1]["state"], original[1].states_TD[0])
    assert "flat_stove_1_main" in starts[0]["fixtures"]
    text = (root / "README.md").read_text()
    assert "| 7 | turn on the stove | 2 | 1 | 12 | 6 / 6 / 6 | 4 |" in text
    assert "- 1: the goal does not hold at the end of its states" in text
    assert not (tmp_path / "out.converting").exists()
    assert run(stove, tmp_path / "out", "workers=0", "image_size=64") == root, "it is there already"
    with pytest.raises(ValueError, match="was converted with image_size=64"):
        run(stove, tmp_path / "out", "workers=0", "image_size=32")


@needs_assets
def test_actions_are_executed_as_published_data_was_made(stove: Path, tmp_path: Path) -> None:
    root = run(stove, tmp_path / "out", "replay=actions", "workers=0", "image_size=32")
    columns, _, _ = dataset(root)
    assert np.bincount(columns["episode"]).tolist() == [6], "turning the knob by hand is no action"
    conversion = json.loads((root / CONVERSION).read_text())
    assert conversion["total"]["reasons"] == {"the goal does not hold at the end of its actions": 2}
    assert json.loads((root / INITIAL_STATES).read_text())["episodes"][0]["waiting_steps"] == 10

    demo = read(stove / f"{STOVE}_demo.hdf5", "demo_2")
    env = LiberoEnv("libero_goal", LEAN, image_size=32, render=False)
    env.restore(demo.states_TD[0], task=7)
    for _ in range(10):
        seen, *_ = env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    for number, step in enumerate([0, 1, 3]):
        np.testing.assert_array_equal(columns["state"][number], seen["state"])
        seen, *_ = env.step(demo.actions_TA[step])
    env.close()


@needs_assets
def test_an_interrupted_conversion_goes_on(stove: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first demonstration; the second start does the others only, and with workers."""
    from cogvla.libero.hdf5 import jobs as hdf5_jobs

    original = hdf5_jobs._replay
    seen: list[Any] = []

    def once(*arguments: Any) -> bool:
        if seen:
            raise KeyboardInterrupt
        seen.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(hdf5_jobs, "_replay", once)
    with pytest.raises(KeyboardInterrupt):
        run(stove, tmp_path / "out", "workers=0", "image_size=32")
    monkeypatch.undo()
    work = tmp_path / "out.converting"
    first = work / "episodes" / "000000.npz"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"another keep_noops.*delete that folder"):
        run(stove, tmp_path / "out", "workers=0", "image_size=32", "keep_noops=true")
    assert first.stat().st_mtime_ns == before
    root = run(stove, tmp_path / "out", "workers=2", "image_size=32")
    whole = run(stove, tmp_path / "whole", "workers=0", "image_size=32")
    for name, values in dataset(root)[0].items():
        assert np.array_equal(values, dataset(whole)[0][name]), name


@needs_assets
def test_files_that_have_changed_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogvla.libero.hdf5.conversion.play", stopped)
    path, out = tmp_path / f"{STOVE}_demo.hdf5", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(write(path, [made_up(actions(1, 1))]), out)
    size = path.stat().st_size
    with pytest.raises(KeyboardInterrupt):
        run(write(path, [made_up(actions(1, 1))]), out)
    write(path, [made_up(actions(1, 1), seed=1)])
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match=r"unfinished converting with another content; .*resume=false"):
        run(path, out)
    begun = tmp_path / "out.converting" / "settings.json"
    begun.write_text(
        json.dumps({key: value for key, value in json.loads(begun.read_text()).items() if key != "content"})
    )
    with pytest.raises(KeyboardInterrupt):  # of a version that did not note it
        run(path, out)


@needs_assets
def test_nothing_to_keep_is_an_error(stove: Path, tmp_path: Path) -> None:
    folder = tmp_path / "failed"
    folder.mkdir()
    demo = read(stove / f"{STOVE}_demo.hdf5", "demo_1")
    assert demo.observed_TS is not None
    blank = {name: np.zeros((8, 16, 16, 3), np.uint8) for name in ("agentview", "eye_in_hand")}
    write(folder / f"{STOVE}_demo.hdf5", [Demo(demo.actions_TA, demo.states_TD, demo.observed_TS, blank)])
    with pytest.raises(ValueError, match="none of the 1 demonstrations can be kept"):
        run(folder, tmp_path / "out", "workers=0", "image_size=32")


# --- LeRobotDataset v2.1 ---------------------------------------------------------------------------------------------


def old_lerobot(root: Path, version: str = "v2.1") -> Path:
    """Two episodes of three frames, with the keys of physical-intelligence/libero."""
    steps, size = 3, 8
    shapes = {"image": [size, size, 3], "wrist_image": [size, size, 3], "state": [8], "actions": [7]}
    index = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    features = {key: {"dtype": "image" if "image" in key else "float32", "shape": shapes[key]} for key in shapes}
    features |= {key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1]} for key in index}
    info = {
        "codebase_version": version, "robot_type": "panda", "total_episodes": 2, "total_frames": 2 * steps,
        "total_tasks": 1, "total_videos": 0, "total_chunks": 1, "chunks_size": 1000, "fps": 10,
        "splits": {"train": "0:2"}, "video_path": None,
        "features": {key: {**values, "names": None} for key, values in features.items()},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }  # fmt: skip
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    (root / "meta" / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "turn on the stove"}) + "\n")
    episodes, statistics = [], []
    for episode in range(2):
        rng = np.random.default_rng(episode)
        frames = rng.integers(0, 256, (2, steps, size, size, 3), np.uint8)
        numbers = {"state": rng.normal(size=(steps, 8)), "actions": rng.normal(size=(steps, 7))}
        first = episode * steps
        columns = {
            "timestamp": np.arange(steps) / 10, "frame_index": np.arange(steps), "episode_index": [episode] * steps,
            "index": np.arange(first, first + steps), "task_index": [0] * steps,
        }  # fmt: skip
        table = {
            "image": [{"bytes": png(frame), "path": None} for frame in frames[0]],
            "wrist_image": [{"bytes": png(frame), "path": None} for frame in frames[1]],
            **{key: [row.astype(np.float32).tolist() for row in rows] for key, rows in numbers.items()},
            **columns,
        }
        pq.write_table(pa.table(table), root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
        episodes.append({"episode_index": episode, "tasks": ["turn on the stove"], "length": steps})
        whole = {key: np.asarray(values, float).reshape(steps, -1) for key, values in (numbers | columns).items()}
        stats: dict[str, dict[str, Any]] = {key: described(rows) for key, rows in whole.items()}
        for view, key in enumerate(("image", "wrist_image")):
            pixels = frames[view].reshape(-1, 3) / 255
            stats[key] = {k: v if k == "count" else [[[x]] for x in v] for k, v in described(pixels).items()}
        statistics.append({"episode_index": episode, "stats": stats})
    for name, rows in (("episodes", episodes), ("episodes_stats", statistics)):
        (root / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def described(rows: np.ndarray) -> dict[str, list[float]]:
    numbers = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
    return {key: value.tolist() for key, value in numbers.items()} | {"count": [len(rows)]}


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_version_2_1_is_converted_by_lerobot(tmp_path: Path) -> None:
    source = old_lerobot(tmp_path / "old")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    root = run(source, tmp_path / "new")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before, "the source is kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    assert not root.is_symlink()
    reader = LeRobotReader(root, Mapping(("image", "wrist_image"), ("state",), ("actions",), (), "task", 8, 7))
    columns, instructions = reader.columns()
    assert instructions == ["turn on the stove"]
    assert columns["episode"].tolist() == [0, 0, 0, 1, 1, 1]
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (2, 3, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(columns["state"][3:], rng.normal(size=(3, 8)), atol=1e-6)
    seen = {
        (part.view, int(rows[0])): images[0].transpose(1, 2, 0)
        for part in reader.parts()
        for rows, images in reader.decode(part)
    }
    assert np.array_equal(seen[1, 4], frames[1, 1])
    with pytest.raises(ValueError, match="exists: choose another output"):
        run(source, tmp_path / "new")
    with pytest.raises(ValueError, match=r"is a LeRobotDataset v3\.0 already: train on it with data\.root="):
        run(root, tmp_path / "newer")


@pytest.mark.parametrize("key", ["suite=libero_10", "replay=actions", "image_size=64", "keep_noops=true", "video=true"])
def test_keys_of_a_replay_are_refused_where_nothing_is_replayed(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{key.partition('=')[0]}=.* changes nothing for .*/old, a LeRobotDataset"):
        run(old_lerobot(tmp_path / "old"), tmp_path / "new", key)


def test_what_lerobot_cannot_convert_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"v2\.0: lerobot converts only v2\.1 with .*\. Train on it as it is, with data\.ro"
    ):
        run(old_lerobot(tmp_path / "older", "v2.0"), tmp_path / "new")
    with pytest.raises(ValueError, match=r"v1\.6: convert it to v2\.1 with an old lerobot first"):
        run(old_lerobot(tmp_path / "oldest", "v1.6"), tmp_path / "new")
    (old_lerobot(tmp_path / "less") / "meta/episodes_stats.jsonl").unlink()
    with pytest.raises(ValueError, match=r"v2\.1: lerobot converts only v2\.1 with meta/episodes_stats\.jsonl\. Train"):
        run(tmp_path / "less", tmp_path / "new")
    damaged = old_lerobot(tmp_path / "damaged")
    (damaged / "meta" / "episodes.jsonl").unlink()
    with pytest.raises(ValueError, match=r"lerobot's converter .*could not convert .*episodes\.jsonl"):
        run(damaged, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "less", "older", "oldest"]
