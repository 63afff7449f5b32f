"""The frame cache: killed, simultaneous and failing builds, damaged files, and the limit of the folder."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cogvla.policy.data.frame_cache import open_frames
from cogvla.policy.data.frame_file import FrameFile
from cogvla.policy.data.frames import Frames
from cogvla.policy.data.reader import LeRobotReader, Mapping
from cogvla.policy.data.streaming import GB
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.lerobot_files import (
    CAMERA,
    LENGTHS,
    SIZE,
    colour,
    open_data,
    picture,
    png,
    refused,
    rows,
    write,
    write_v2,
    write_video,
)

KEYS = Mapping((CAMERA,), ("observation.state",), ("action",), (), "task", 2, 3)
COUNT = sum(LENGTHS)
EXPECTED = [colour(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
CHILD = """
import os, signal, sys
from pathlib import Path
from cogvla.policy.data import frame_cache
from cogvla.tests.policy.data.test_frame_cache import check, open_cache
finish = frame_cache.FrameWriter.finish
def changed(writer):
    print("finishing", flush=True)
    {then}
    finish(writer)
frame_cache.FrameWriter.finish = changed
check(open_cache(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def open_cache(root: Path, folder: Path, limit: float | None = None, size: int = SIZE) -> Frames:
    return open_frames(LeRobotReader(root, KEYS), (size, size), folder, limit, progress=False)


def check(frames: Frames) -> None:
    found = frames.take(np.arange(len(frames)))[:, 0, :2].mean((2, 3))
    assert [tuple(pair) for pair in found.astype(int).tolist()] == EXPECTED


def child(root: Path, folder: Path, then: str) -> subprocess.Popen[str]:
    """Start a process that opens the cache, and does `then` just before its file would be complete."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD.format(then=then), str(root), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def files(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def used_long_ago(folder: Path, name: str, size: int, days: int) -> Path:
    """A file of the cache that was last used days ago."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    at = path.stat().st_mtime - 86400 * days
    os.utime(path, (at, at))
    return path


def noisy(root: Path) -> Path:
    """A data set whose pictures cannot be compressed."""
    generator = np.random.default_rng(0)
    pictures = [png(generator.integers(0, 256, (SIZE, SIZE, 3), np.uint8)) for _ in range(COUNT)]
    given = [row | {CAMERA: {"bytes": data, "path": None}} for row, data in zip(rows(), pictures, strict=True)]
    return write(root, given=given)


def test_a_killed_build_is_never_taken_for_complete(tmp_path: Path) -> None:
    root, folder = write(tmp_path / "toy"), tmp_path / "cache"
    killed = child(root, folder, "os.kill(os.getpid(), signal.SIGKILL)")
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL, output
    (left,) = files(folder)
    assert left.endswith(".partial")
    check(open_cache(root, folder))
    (whole,) = files(folder)
    assert whole.endswith(".frames")


def test_leftovers_of_other_builds_are_removed(tmp_path: Path) -> None:
    root, folder = write(tmp_path / "toy"), tmp_path / "cache"
    dead = subprocess.Popen(["true"])
    dead.wait()
    used_long_ago(folder, ".other-0123456789abcdef.partial", 10, 0)
    used_long_ago(folder, f".other-0123456789abcdef.u8.{dead.pid}", 10, 0)
    alive = used_long_ago(folder, f".other-0123456789abcdef.u8.{os.getpid()}", 10, 0)
    others = [used_long_ago(folder, name, 10, 0) for name in ("my.journal", ".thesis.partial")]
    check(open_cache(root, folder))
    assert len(files(folder)) == 4
    assert all(path.is_file() for path in (alive, *others))


@pytest.mark.parametrize("linked", ["videos", f"videos/{CAMERA}", f"videos/{CAMERA}/chunk-000", "data"])
def test_pictures_on_another_disk_are_decoded_again_if_they_change(linked: str, tmp_path: Path) -> None:
    root, folder, disk = write(tmp_path / "toy", video=linked != "data"), tmp_path / "cache", tmp_path / "disk"
    (root / linked).rename(disk)
    (root / linked).symlink_to(disk)
    before = open_cache(root, folder).take(np.arange(COUNT))
    assert np.array_equal(open_cache(root, folder).take(np.arange(COUNT)), before)
    assert len(list(folder.glob("*.frames"))) == 1
    if linked == "data":
        shutil.copytree(noisy(tmp_path / "new") / "data", disk, dirs_exist_ok=True)
    else:
        write_video(next(disk.rglob("*.mp4")), [picture(3, 3)] * COUNT)
    assert not np.array_equal(open_cache(root, folder).take(np.arange(COUNT)), before)


def test_frames_are_not_taken_for_those_of_other_episodes(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "toy", video=True)
    open_data(root)
    other = write_v2(tmp_path / "other", lengths=(3, 4, 5), video=True)
    for folder in ("data", "meta"):
        shutil.copytree(other / folder, root / folder, dirs_exist_ok=True)
    refused(root, "episode 0 has 3 frames in the data files, but 4 in the video")


def test_a_cache_inside_of_the_data_set_is_found_again(tmp_path: Path) -> None:
    root = write(tmp_path / "toy")
    for _ in range(2):
        check(open_cache(root, root / "cache"))
        assert len(list((root / "cache").glob("*.frames"))) == 1


def test_of_several_processes_one_decodes_and_the_others_wait(tmp_path: Path) -> None:
    root, folder = write(tmp_path / "toy"), tmp_path / "cache"
    children = [child(root, folder, "pass") for _ in range(3)]
    outputs = [process.communicate(timeout=300)[0] for process in children]
    assert [process.returncode for process in children] == [0] * 3, outputs
    assert sum("finishing" in output for output in outputs) == 1
    assert len(files(folder)) == 1


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_full_disk_leaves_nothing(tmp_path: Path, size: int) -> None:
    root, folder = noisy(tmp_path / "toy"), tmp_path / "cache"
    with (
        files_limited_to(size),
        pytest.raises(OSError, match=r"cannot keep decoded frames in .*: .*Free space, or set"),
    ):
        open_cache(root, folder)
    assert not files(folder)
    open_cache(root, folder)


def test_too_little_free_space_is_said_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of this machine cannot be filled in a test: only its free space is given."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"toy needs about \S+ GB, 1e-06 GB are free. Free space, or set data.cache"):
        open_cache(noisy(tmp_path / "toy"), tmp_path / "cache")
    assert not files(tmp_path / "cache")


@pytest.mark.parametrize("change", ["index", "trailer", "cut", "empty", "another size"])
def test_a_damaged_file_is_decoded_again(tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = write(tmp_path / "toy"), tmp_path / "cache"
    open_cache(root, folder)
    (path,) = folder.glob("*.frames")
    content = bytearray(path.read_bytes())
    if change == "another size":
        open_cache(root, folder, size=8)
        (small,) = set(folder.glob("*.frames")) - {path}
        content = bytearray(small.read_bytes())
        small.unlink()
    content[{"index": -100, "trailer": -20}.get(change, -1)] ^= {"index": 16, "trailer": 16}.get(change, 0)
    path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(change)])
    check(open_cache(root, folder))
    said = capsys.readouterr().out
    assert said.startswith("note: ")
    assert said.endswith("; its frames are decoded again\n")
    assert str(path) in said
    check(open_cache(root, folder))
    assert not capsys.readouterr().out


def test_a_damaged_picture_ends_in_one_line(tmp_path: Path) -> None:
    root, folder = write(tmp_path / "toy"), tmp_path / "cache"
    open_cache(root, folder)
    (path,) = folder.glob("*.frames")
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    frames = open_cache(root, folder)
    with pytest.raises(ValueError, match=r"\.frames is damaged \(frame \d+, view 0\); delete it, and the same [^\n]*$"):
        frames.take(np.arange(COUNT))
    path.unlink()
    check(open_cache(root, folder))


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    root, folder = write(tmp_path / "toy"), tmp_path / "cache"
    open_cache(root, folder)
    (path,) = folder.glob("*.frames")
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"cannot keep decoded frames in .*: Is a directory"):
        open_cache(root, folder)


def test_a_limit_deletes_what_was_not_used_for_the_longest_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, folder = noisy(tmp_path / "toy"), tmp_path / "cache"
    oldest = used_long_ago(folder, "a-0123456789abcdef.u8", 20_000, 3)
    old = used_long_ago(folder, "b-0123456789abcdef.frames", 20_000, 2)
    new = used_long_ago(folder, "c-0123456789abcdef.frames", 20_000, 1)
    mine = used_long_ago(folder, "my-notes.frames", 20_000, 9)
    mine_too = used_long_ago(folder, "raw.u8", 20_000, 9)
    open_cache(root, folder, 45_000 / GB)
    (path,) = folder.glob("toy-*.frames")
    assert not oldest.exists()
    assert not old.exists()
    assert new.exists()
    assert mine.exists(), "no file of the cache"
    assert mine_too.exists(), "no file of the cache"
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[2].split(" (")[0] for line in said] == [f"deleted {oldest}", f"deleted {old}"]
    open_cache(root, folder, (path.stat().st_size + 19_999) / GB)
    assert not new.exists(), "a smaller limit also holds if the frames are there"
    assert path.exists()


def test_using_a_file_keeps_it(tmp_path: Path) -> None:
    first, second, third = (noisy(tmp_path / name) for name in ("first", "second", "third"))
    folder = tmp_path / "cache"
    for root in (first, second):
        open_cache(root, folder)
    for days, path in enumerate(sorted(folder.glob("*.frames"), reverse=True), 1):  # the first is the oldest
        os.utime(path, (path.stat().st_mtime - 86400 * days,) * 2)
    open_cache(first, folder)
    size = next(folder.glob("*.frames")).stat().st_size
    gc.collect()
    open_cache(third, folder, 2.5 * size / GB)
    assert {path.name.split("-")[0] for path in folder.glob("*.frames")} == {"first", "third"}


def test_frames_in_use_are_not_deleted(tmp_path: Path) -> None:
    first, second, folder = noisy(tmp_path / "first"), noisy(tmp_path / "second"), tmp_path / "cache"
    used = open_cache(first, folder)
    assert isinstance(used, FrameFile)
    limit = 1.5 * used.path.stat().st_size / GB
    with pytest.raises(
        ValueError,
        match=r"the frames of second take .* GB, and .* GB in .* are in use by .*; choose smaller .*, or wait",
    ):
        open_cache(second, folder, limit)
    assert files(folder) == [used.path.name]
    used.take(np.arange(3))
    del used
    gc.collect()
    open_cache(second, folder, limit)
    assert [name.split("-")[0] for name in files(folder)] == ["second"]


@pytest.mark.parametrize("there", [False, True])
def test_one_data_set_beyond_the_limit(tmp_path: Path, there: bool) -> None:
    root, folder = noisy(tmp_path / "toy"), tmp_path / "cache"
    if there:
        open_cache(root, folder)
    other = used_long_ago(folder, "a-0123456789abcdef.u8", 1000, 3)
    with pytest.raises(ValueError, match=r"the frames of toy take \S+ GB, data.cache_gb is 5e-06; .*data.ep"):
        open_cache(root, folder, 5e-6)
    assert other.exists(), "deleting it would not help"
    assert len(files(folder)) == 1 + there


def test_a_file_that_is_deleted_while_it_is_opened_is_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, folder = write(tmp_path / "toy"), tmp_path / "cache"
    open_cache(root, folder)
    read_index = FrameFile._read_index

    def deleting(self: FrameFile) -> tuple[tuple[int, ...], np.ndarray]:
        monkeypatch.undo()
        self.path.unlink()
        return read_index(self)

    monkeypatch.setattr(FrameFile, "_read_index", deleting)
    check(open_cache(root, folder))
    assert len(files(folder)) == 1
