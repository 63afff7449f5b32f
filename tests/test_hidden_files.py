"""Hidden files, such as those that macOS writes into folders, are neither data nor in the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogvla.envs.recording.dataset_folder import DatasetFolder
from cogvla.envs.recording.recorded_dataset import recorded_episodes
from cogvla.envs.recording.recorder import record
from cogvla.files import visible
from cogvla.policy.weights.safetensor_files import SafetensorFiles
from cogvla.real_robot.recording.recorder import RecordingFolder
from cogvla.tests.support import toy_suite
from cogvla.tests.support.libero_assets import needs_libero
from cogvla.tests.support.planearm import PLANE
from cogvla.tests.support.toy_suite import NAME, ToyExpert

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"
toy_suite.register()


def litter(folder: Path) -> None:
    """What macOS leaves in every folder: one file for the folder, one for each file."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            (path / ".DS_Store").write_bytes(b"Bud1")
        if path != folder:
            path.with_name(f"._{path.name}").write_bytes(APPLE_DOUBLE)


def test_hidden_files_and_those_in_hidden_folders_are_not_listed(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "data"  # what is above does not count
    for name in ("b.txt", "a.txt", "._a.txt", ".DS_Store", "in/c.txt", "in/._c.txt", ".trash/d.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert visible(root, "*.txt") == [root / "a.txt", root / "b.txt"]
    assert visible(root, "*/*.txt") == [root / "in" / "c.txt"]
    assert [path.name for path in visible(root, "**/*") if path.is_file()] == ["a.txt", "b.txt", "c.txt"]
    assert visible(tmp_path / "nothing", "*") == []


def test_recordings_with_them_are_read_and_grow(tmp_path: Path) -> None:
    root = record(NAME, 2, tmp_path / "toy", image_size=16, workers=0, expert=ToyExpert)
    litter(root)
    assert len(list(recorded_episodes(root))) == 2
    record(NAME, 3, root, image_size=16, workers=0, grow=True, expert=ToyExpert)
    assert len(list(recorded_episodes(root))) == 3


@pytest.mark.parametrize("name", [".DS_Store", "._toy"])
def test_a_folder_with_nothing_else_is_empty(name: str, tmp_path: Path) -> None:
    output = tmp_path / "toy"
    output.mkdir()
    (output / name).write_bytes(APPLE_DOUBLE)
    RecordingFolder(output, PLANE, "plane_arm", resume=False)
    (tmp_path / "toy.recording" / "settings.json").unlink()
    assert record(NAME, 1, output, image_size=16, workers=0, expert=ToyExpert) == output
    assert len(list(recorded_episodes(output))) == 1


def test_a_folder_with_a_file_of_the_user_is_not_empty(tmp_path: Path) -> None:
    for name in (".DS_Store", ".config", "notes.txt"):
        (tmp_path / name).touch()
        if name == ".DS_Store":
            continue
        with pytest.raises(ValueError, match="is there already"):
            RecordingFolder(tmp_path, PLANE, "plane_arm")
        with pytest.raises(ValueError, match="was not recorded by this command"):
            _ = DatasetFolder(tmp_path, "recording", "recorded", "meta/recording.json").existing
        (tmp_path / name).unlink()


def test_weights_with_them_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    litter(tmp_path)
    assert list(SafetensorFiles(tmp_path)) == ["a"]


@needs_libero
def test_assets_with_them_are_the_same_assets(tmp_path: Path) -> None:
    from cogvla.libero.suites import _digest

    mesh = tmp_path / "scenes" / "mesh.obj"
    mesh.parent.mkdir()
    mesh.write_text("v 0 0 0")
    before = _digest.__wrapped__(tmp_path)
    litter(tmp_path)
    assert _digest.__wrapped__(tmp_path) == before
    mesh.with_name("more.obj").touch()
    assert _digest.__wrapped__(tmp_path) != before
