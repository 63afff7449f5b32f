"""lerobot's own commands work on what we record, and what they write can be trained on."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.datasets.dataset_tools import add_features
from PIL import Image

from cogvla.envs.recording.dataset_writer import DatasetWriter, features
from cogvla.envs.recording.demonstration import encode_png
from cogvla.envs.recording.recorded_dataset import recorded_episodes
from cogvla.envs.recording.recorder import record
from cogvla.lerobot_versions import OLD, LeRobotDataset, episode_buffer
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.mixture.task_labels import TASK_LABELS
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.training.batches import POSITION_LABELS, BatchBuilder
from cogvla.real_robot.recording.recorder import RecordingFolder
from cogvla.scripts import train_policy
from cogvla.scripts.command import compose
from cogvla.tests.support import toy_suite
from cogvla.tests.support.planearm import PLANE, SETTINGS
from cogvla.tests.support.small_data import LABELLED
from cogvla.tests.support.toy_suite import NAME, PLACES, ToyExpert

EPISODES, SIZE = 4, 32
KINDS = ("simulated", "videos", "robot")
TOY = Embodiment("toy", (Camera("agentview", SIZE, SIZE), Camera("wrist", SIZE, SIZE)), 8, 7, chunk=4, control_hz=10)
toy_suite.register()


def edit(operation: str, **arguments: str) -> list[str]:
    own = {key: value for key, value in arguments.items() if key.endswith("repo_id")}
    given = [f"--{key}={value}" for key, value in own.items()]
    given += [f"--operation.{key}={value}" for key, value in arguments.items() if key not in own]
    return ["lerobot.scripts.lerobot_edit_dataset", f"--operation.type={operation}", *given]


def commands(kind: str) -> dict[str, list[str]]:
    """All commands of lerobot that edit a data set, and some that use one, for the data set of this kind."""
    merged, codec = ("repo_id", "vcodec") if OLD else ("new_repo_id", "rgb_encoder.vcodec")
    removed = "observation.images.wrist" if kind == "robot" else "label.phase"
    found = {
        "info": edit("info", repo_id=kind, show_features="true"),
        "delete": edit("delete_episodes", repo_id=kind, new_repo_id=f"{kind}_delete", episode_indices="[1]"),
        "split": edit("split", repo_id=kind, splits='{"a": [0, 2], "b": [1, 3]}'),
        "merge": edit("merge", **{merged: f"{kind}_merge"}, repo_ids=f"['{kind}_a', '{kind}_b']"),
        "remove": edit("remove_feature", repo_id=kind, new_repo_id=f"{kind}_remove", feature_names=f"['{removed}']"),
        "modify": edit("modify_tasks", repo_id=f"{kind}_modify", episode_tasks='{"0": "push the button"}'),
        "show": [
            "lerobot.scripts.lerobot_dataset_viz",
            *(f"--repo-id={kind}", f"--root={kind}", "--episode-index=1", "--save=1", "--num-workers=0"),
            f"--output-dir={kind}_show",
        ],
        "transforms": ["lerobot.scripts.lerobot_imgtransform_viz", f"--repo_id={kind}", "--video_backend=pyav"],
    }
    if kind == "videos" or find_spec("rerun") is None:
        del found["show"]  # reads videos with torchcodec only, which needs a system FFmpeg; 0.6 has it with `viz` only
    if kind != "videos":
        found["film"] = edit("convert_image_to_video", repo_id=kind, new_repo_id=f"{kind}_film", **{codec: "h264"})
    if kind == "robot":
        found["replay"] = [
            "lerobot.scripts.lerobot_replay",
            *(
                "--robot.type=plane_arm",
                "--robot.attended=true",
                f"--dataset.repo_id={kind}",
                "--dataset.episode=1",
                "--play_sounds=false",
            ),
        ]
    if kind == "simulated":
        small = ("dim_model=16", "n_heads=2", "dim_feedforward=16", "n_encoder_layers=1", "n_vae_encoder_layers=1")
        found["train"] = [
            "lerobot.scripts.lerobot_train",
            *("--policy.type=act", "--policy.device=cpu", "--policy.push_to_hub=false", f"--dataset.repo_id={kind}"),
            *(f"--policy.{value}" for value in (*small, "chunk_size=4", "n_action_steps=4")),
            *("--policy.pretrained_backbone_weights=null", "--steps=2", "--batch_size=2", "--num_workers=0"),
            *("--save_checkpoint=false", "--output_dir=trained"),
        ]
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a data set of each kind: a suite's with images and with videos, and a robot's."""
    home = tmp_path_factory.mktemp("lerobot")
    for kind in ("simulated", "videos"):
        record(NAME, EPISODES, home / kind, image_size=SIZE, workers=0, video=kind == "videos", expert=ToyExpert)
    folder = RecordingFolder(home / "robot", PLANE, "plane_arm", names=SETTINGS.names)
    rng = np.random.default_rng(0)
    for number in range(EPISODES):
        images = {
            camera.name: [
                encode_png(rng.integers(0, 256, (camera.height, camera.width, 3), np.uint8)) for _ in range(5)
            ]
            for camera in PLANE.cameras
        }
        folder.save(number, "push", list(rng.random((5, 3))), list(rng.random((5, 3))), images)
    folder.assemble()
    return home


@pytest.fixture(scope="module")
def results(home: Path) -> dict[str, str | None]:
    """What each command says: KIND/COMMAND -> its error or None."""
    for kind in KINDS:
        shutil.copytree(home / kind, home / f"{kind}_modify")
    asked = {f"{kind}/{name}": command for kind in KINDS for name, command in commands(kind).items()}
    environment = os.environ | {"HF_LEROBOT_HOME": str(home), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-m", "cogvla.tests.support.lerobot_commands", str(home / "results.json")],
        input=json.dumps(asked),
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((home / "results.json").read_text())


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in commands(kind)])
def test_lerobots_command_works(kind: str, name: str, results: dict[str, str | None]) -> None:
    assert results[f"{kind}/{name}"] is None


def data_of(root: Path, **labels: str) -> DemonstrationData:
    cameras = {name: f"observation.images.{name}" for name in TOY.camera_names}
    config = DataConfig(cameras, root=str(root), labels=labels, cache=str(root.parent / "cache"))
    return DemonstrationData.open(config, TOY, progress=False)


@pytest.mark.parametrize("edited", ["delete", "a", "merge", "modify", "film"])
def test_what_was_edited_trains_again(edited: str, home: Path, results: dict[str, str | None], tmp_path: Path) -> None:
    cameras = f"[{{name:agentview,height:{SIZE},width:{SIZE}}},{{name:wrist,height:{SIZE},width:{SIZE}}}]"
    labels = "objective.counterfactual=0" if edited == "modify" else "objective=grounded"
    config = compose(
        "train_policy",
        [
            *("suite=null", "data=tabletop", f"data.root={home}/simulated_{edited}", f"embodiment.cameras={cameras}"),
            *("demonstrations=null", "evaluation=null", "training.steps=2", "training.batch_size=2", "threads=1"),
            *("training.validation_fraction=0", "wandb.mode=disabled", "training.cpu_parts=1", labels),
            *(f"output={tmp_path}/run", f"data.cache={tmp_path}/cache", "objective.phase_weights=[]"),
        ],
    )
    train_policy.run(config, "train_policy")
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


def test_new_instructions_for_some_episodes_contradict_counterfactual_samples(
    home: Path, results: dict[str, str | None]
) -> None:
    labels = {name: f"label.{name}" for name in (*POSITION_LABELS, *TASK_LABELS)}
    data = data_of(home / "simulated_modify", **labels)
    preprocessor = Preprocessor(TOY, WordTokenizer.from_instructions(data.instructions), data.statistics())
    config = replace(LABELLED, pointing=0.0)
    with pytest.raises(ValueError, match=r"task 0 .* two instructions, 'go right' and 'push the button'.*counterfact"):
        BatchBuilder(data, preprocessor, config)
    assert not BatchBuilder(data, preprocessor, replace(config, counterfactual=0.0)).has_alternatives
    BatchBuilder(data_of(home / "simulated_merge", **labels), preprocessor, config)


def test_tables_are_flat_in_the_file_and_have_their_shape_in_training(home: Path) -> None:
    features = json.loads((home / "simulated" / "meta" / "info.json").read_text())["features"]
    assert all(len(feature["shape"]) == 1 for name, feature in features.items() if "images" not in name)
    for name, feature in features.items():
        assert feature["names"] is None or len(feature["names"]) == feature["shape"][0] or "images" in name, name
    assert features["label.alternatives"]["names"][6:8] == ["task1_target_x", "task1_target_y"]
    assert features["label.projection.wrist"]["names"][4:6] == ["v_x", "v_y"]
    labels = data_of(
        home / "simulated", alternatives="label.alternatives", projection_wrist="label.projection.wrist"
    ).labels
    assert labels["alternatives"].shape[1:] == (3, 6)
    np.testing.assert_array_equal(labels["alternatives"][0, 1, :3], PLACES[1])
    np.testing.assert_array_equal(labels["alternatives"][0, 1, 3:], PLACES[1] + 1)
    assert labels["projection_wrist"].shape[1:] == (3, 4)
    with pytest.raises(ValueError, match=r"'projection_wrist' must have 3 x 4 values .*'label\.target'.*shape \(3,\)"):
        data_of(home / "simulated", projection_wrist="label.target")
    with pytest.raises(ValueError, match=r"'alternatives' must have any number x 6 values .*'action'.*shape \(7,\)"):
        data_of(home / "simulated", alternatives="action")
    with pytest.raises(ValueError, match=r"'goal' must have 3 values .*'label\.phase'"):
        data_of(home / "simulated", goal="label.phase")


def test_the_numbers_of_a_robot_have_the_names_of_its_keys(home: Path) -> None:
    features = json.loads((home / "robot" / "meta" / "info.json").read_text())["features"]
    assert features["action"]["names"] == list(SETTINGS.action)
    assert features["observation.state"]["names"] == list(SETTINGS.state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_feature_has_statistics_and_time_windows(kind: str, home: Path) -> None:
    info = json.loads((home / kind / "meta" / "info.json").read_text())
    assert (type(info["fps"]), info["splits"]) == (int, {"train": f"0:{EPISODES}"})
    stored = json.loads((home / kind / "meta" / "stats.json").read_text())
    assert stored.keys() == info["features"].keys()
    for name, statistics in stored.items():
        assert statistics.keys() >= {"min", "max", "mean", "std", "count", "q01", "q50", "q99"}, name
    [episodes] = [pq.read_schema(path).names for path in (home / kind / "meta" / "episodes").glob("*/*.parquet")]
    assert {f"stats/{name}/q99" for name in info["features"]} <= set(episodes)
    windows = {
        name: [0.0, 1 / info["fps"]] for name, values in info["features"].items() if name.startswith(("label", "act"))
    }
    data = LeRobotDataset(kind, root=home / kind, delta_timestamps=windows, video_backend="pyav")
    frame = data[len(data) - 1]
    for name in windows:
        assert frame[name].shape[0] == 2, name
        assert frame[f"{name}_is_pad"].tolist() == [False, True]


def test_features_are_added(home: Path, tmp_path: Path) -> None:
    data = LeRobotDataset("simulated", root=home / "simulated")
    quality = {"quality": (np.ones((len(data), 1), np.float32), {"dtype": "float32", "shape": (1,), "names": None})}
    more = add_features(data, quality, tmp_path / "more", "more")
    assert more[0]["quality"] == 1
    assert torch.equal(more[3]["label.alternatives"], data[3]["label.alternatives"])


def grow(root: Path) -> Any:
    return record(NAME, EPISODES + 1, root, image_size=SIZE, workers=0, grow=True, expert=ToyExpert)


def test_what_was_edited_does_not_grow(home: Path, results: dict[str, str | None], tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(home / "simulated_modify", edited)
    with pytest.raises(ValueError, match=r"edited was edited .* so it cannot grow; record more episodes into another"):
        grow(edited)
    shutil.rmtree(tmp_path / "edited.recording")
    with pytest.raises(ValueError, match=r"another tool has edited it .*demonstrations=null"):
        grow(home / "simulated_delete")
    record_file = "meta/recording.json"
    shutil.copy(home / "simulated" / record_file, home / "simulated_delete" / record_file)
    with pytest.raises(ValueError, match=r"was edited .* so it cannot grow"):
        grow(home / "simulated_delete")


@pytest.mark.parametrize("change", ["instruction", "order", "state", "feature"])
def test_other_episodes_than_those_that_were_recorded_do_not_grow(change: str, home: Path, tmp_path: Path) -> None:
    """Edited by a tool that writes a row group for each episode, as we do."""
    episodes = list(recorded_episodes(home / "simulated"))
    if change == "instruction":
        episodes[2] = replace(episodes[2], instruction="push the button")
    elif change == "order":
        del episodes[:3]  # the next ones have the same tasks
    elif change == "state":
        arrays = episodes[1].arrays
        episodes[1] = replace(episodes[1], arrays=arrays | {"label.initial_state": arrays["label.initial_state"] + 10})
    else:
        for episode in episodes:
            del episode.arrays["label.initial_state"]
    root = tmp_path / "edited"
    writer = DatasetWriter(root, "cogvla/toy", episodes[0], "panda")
    for episode in episodes:
        writer.add(episode)
    writer.close()
    record_file = "meta/recording.json"
    shutil.copy(home / "simulated" / record_file, root / record_file)
    with pytest.raises(ValueError, match=r"was edited after it was recorded: .* so it cannot grow"):
        grow(root)


def test_older_recordings_with_tables_are_read_and_grow(home: Path, tmp_path: Path) -> None:
    """Written by lerobot, with two-dimensional labels as in earlier versions."""
    root = tmp_path / "old"
    episodes = list(recorded_episodes(home / "simulated"))
    described = features(episodes[0], video=False)
    shapes = {"label.alternatives": (3, 6), "label.projection.agentview": (3, 4), "label.projection.wrist": (3, 4)}
    for name, shape in shapes.items():
        described[name] |= {"shape": shape, "names": None}
    old = LeRobotDataset.create("cogvla/toy", 10, described, root, "panda", use_videos=False, video_backend="pyav")
    for episode in episodes:
        for step in range(len(episode)):
            frame = {n: array[step].reshape(shapes.get(n, array[step].shape)) for n, array in episode.arrays.items()}
            frame |= {camera: Image.open(io.BytesIO(files[step])) for camera, files in episode.images.items()}
            old.add_frame(frame | {"task": episode.instruction})
        for name, array in episode.arrays.items():
            if array.shape[1:] == (1,):
                episode_buffer(old)[name] = [value.item() for value in episode_buffer(old)[name]]
        old.save_episode()
    old.finalize()
    shutil.copy(home / "simulated" / "meta" / "recording.json", root / "meta" / "recording.json")

    labels = {"alternatives": "label.alternatives", "projection_wrist": "label.projection.wrist"}
    for name, values in data_of(root, **labels).labels.items():
        assert torch.equal(values, data_of(home / "simulated", **labels).labels[name])
    grow(root)
    whole = record(NAME, EPISODES + 1, tmp_path / "whole", image_size=SIZE, workers=0, expert=ToyExpert)
    for grown, direct in zip(recorded_episodes(root), recorded_episodes(whole), strict=True):
        assert all(np.array_equal(values, direct.arrays[name]) for name, values in grown.arrays.items())
    assert (root / "meta" / "info.json").read_bytes() == (whole / "meta" / "info.json").read_bytes()
