"""Streaming from a hub on this machine: the same data, resumed after any interruption, and never fewer frames."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest

from cogvla.policy.data import frame_cache, streaming
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frame_journal import FrameJournal
from cogvla.policy.data.mixture.mixture import open_data as open_mixture
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.lerobot_files import (
    CAMERA,
    LENGTHS,
    ROBOT,
    SIZE,
    assert_read,
    data_file,
    edit_info,
    edit_table,
    features,
    open_data,
    png,
    rows,
    what_is_recorded,
    write,
    write_v2,
    write_video,
)
from cogvla.tests.support.pixels import pixels_of
from cogvla.tests.support.stub_hub import COMMIT, REPO, StubHub, stub_hub

KINDS = [("v3", True), ("v3", False), ("v2", True), ("v2", False)]
CHILD = """
import sys
from pathlib import Path
from cogvla.tests.policy.data.test_streaming import streamed
streamed(Path(sys.argv[1]))
"""


def source(root: Path, version: str, video: bool) -> Path:
    return write(root, video=video) if version == "v3" else write_v2(root, video=video)


def settings(folder: Path, **changes: Any) -> DataConfig:
    given = {"cameras": {"front": CAMERA}, "repo_id": REPO, "streaming": True, "cache": str(folder / "cache")}
    return DataConfig(**{**given, **changes})


def streamed(folder: Path, **changes: Any) -> DemonstrationData:
    return DemonstrationData.open(settings(folder, **changes), ROBOT, progress=False)


def refused(folder: Path, message: str, **changes: Any) -> None:
    with pytest.raises((ValueError, OSError), match=message) as caught:
        streamed(folder, **changes)
    assert "\n" not in str(caught.value)


def video(episode: int) -> str:
    return f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A hub with a data set of version 2, whose episodes have a video each."""
    with stub_hub(write_v2(tmp_path / "source", video=True), monkeypatch) as started:
        yield started


@pytest.mark.parametrize(("version", "has_videos"), KINDS)
def test_streamed_data_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, has_videos: bool
) -> None:
    whole = open_data(source(tmp_path / "source", version, has_videos))
    with stub_hub(tmp_path / "source", monkeypatch) as hub:
        data = streamed(tmp_path)
        assert_read(data, what_is_recorded())
        assert data.content() == whole.content()
        assert np.array_equal(pixels_of(data), pixels_of(whole))
        assert data.provenance == {**whole.provenance, "name": REPO, "revision": COMMIT}
        cache = tmp_path / "cache"
        assert not list(cache.rglob("*.mp4"))
        assert not [path for path in cache.iterdir() if path.suffix in (".streaming", ".journal", ".partial")]
        assert not (cache / ".fetched").exists()
        for path in (cache / "streamed").rglob("*.parquet"):
            assert CAMERA not in pq.read_schema(path).names
        before = list(hub.fetched)
        if has_videos:
            assert len(before) == len(set(before))
        part = streamed(tmp_path, episodes=(1,))
        assert len(part) == 3
        again = streamed(tmp_path)
        assert np.array_equal(pixels_of(again), pixels_of(whole))
        used = ["data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"]  # episode 1 is in both of v3
        used = used if version == "v3" else ["data/chunk-000/episode_000001.parquet"]
        assert sorted(hub.fetched[len(before) :]) == (
            [video(1) if version == "v2" else f"videos/{CAMERA}/chunk-000/file-000.mp4"] if has_videos else used
        )
    offline = streamed(tmp_path)  # the hub is gone
    assert np.array_equal(pixels_of(offline), pixels_of(whole))
    streamed(tmp_path, revision=COMMIT)
    refused(tmp_path, "cannot get the data set 'someone/toy' from the hub", revision="v3.0")
    refused(tmp_path / "new", "cannot get the data set 'someone/toy' from the hub")


def test_of_pictures_in_parquet_files_the_numbers_come_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    given = [
        row | {CAMERA: {"bytes": png(generator.integers(0, 256, (200, 200, 3), np.uint8)), "path": None}}
        for row in rows()
    ]
    root = write(tmp_path / "source", given=given, row_group=100)
    edit_info(root, features=features(video=False) | {CAMERA: {"dtype": "image", "shape": [200, 200, 3]}})
    size = sum(path.stat().st_size for path in root.rglob("*.parquet"))
    with stub_hub(root, monkeypatch) as hub:
        streamed(tmp_path)
        assert size < hub.sent < 1.1 * size  # each picture once


WRONG: list[tuple[str, str, set[int]]] = [  # attempts: from version 1 on, huggingface_hub itself repeats more often
    ("gone", r"from the hub: 404 Client Error", {1}),
    ("error", r"from the hub: .*(500 Server Error|Server error '500)", {6, 21}),
    ("dropped", r"from the hub: .*(Connection broken|peer closed connection)", {3}),
    ("cut", r"from the hub: it came with \d+ bytes, the hub lists \d+", {3}),
    ("flipped", r"from the hub: it came damaged: its checksum is not the one", {3}),
]


@pytest.mark.parametrize(("wrong", "message", "attempts"), WRONG)
def test_a_file_that_does_not_come(tmp_path: Path, hub: StubHub, wrong: str, message: str, attempts: set[int]) -> None:
    hub.wrong = {video(1): wrong}
    refused(tmp_path, rf"^cannot get someone/toy@aaaaaaaa/{video(1)} {message}.*; the same command goes on from there$")
    assert not list((tmp_path / "cache").rglob("*.mp4"))
    assert hub.asked.count(video(1)) in attempts
    first = hub.pictures()
    hub.wrong = {}
    assert_read(streamed(tmp_path), what_is_recorded())
    later = hub.pictures()[len(first) :]
    assert video(1) in later
    assert {video(0), video(2)} - set(later) <= set(first)


@pytest.mark.parametrize("wrong", ["error", "dropped", "flipped", "held"])
@pytest.mark.parametrize("name", [video(1), "data/chunk-000/episode_000001.parquet", "meta/episodes.jsonl"])
def test_a_file_that_comes_at_the_second_attempt(
    tmp_path: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.wrong, hub.times = {name: wrong}, {name: 1}
    assert_read(streamed(tmp_path), what_is_recorded())
    assert hub.asked.count(name) + hub.fetched.count(name) in (3, 4)


@pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) > 0,
    reason="huggingface_hub 1 asks a silent hub for minutes before it gives up; it has no setting for that",
)
def test_a_hub_that_stops_answering(tmp_path: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvla.policy.hub.connection.ANSWER_S", 0.2)
    hub.silent = True
    refused(tmp_path, r"^cannot get the data set 'someone/toy' from the hub: .*timed? ?out")
    hub.silent = False
    assert_read(streamed(tmp_path), what_is_recorded())
    hub.silent = True
    assert_read(streamed(tmp_path), what_is_recorded())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no video" * 100, "is missing or no video"),
        (b"", "is missing or no video"),
        (video(0), "episode 1 has 3 frames in the data files, but 4 in the video"),
    ],
)
def test_wrong_content_is_named_as_on_the_hub(tmp_path: Path, hub: StubHub, content: bytes | str, message: str) -> None:
    (hub.root / video(1)).write_bytes(content if isinstance(content, bytes) else (hub.root / content).read_bytes())
    refused(tmp_path, rf"^someone/toy@aaaaaaaa/{video(1)}:? {message}")
    assert not list((tmp_path / "cache").rglob("*.mp4"))


def test_numbers_that_were_read_alone_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "source")
    edit_table(data_file(root), timestamp=[float("nan"), *(0.1 * step for step in range(1, 6))])
    with stub_hub(root, monkeypatch):
        data = streamed(tmp_path)
        kept = data_file(next((tmp_path / "cache/streamed").glob("*/*")))
        edit_table(kept, action=lambda values: [[9.0, 9.0, 9.0], *values[1:]])
        assert data.frames.take(np.array([0])).any(), "frames that are there are not fetched again"
        (path,) = (tmp_path / "cache").glob("*.frames")
        path.unlink()
        refused(tmp_path, r"000.parquet has other numbers than someone/toy@aaaaaaaa/data/\S+; delete the folder .*@a+,")
        shutil.rmtree(kept.parents[2])
        assert_read(streamed(tmp_path), what_is_recorded())


@pytest.mark.parametrize("content", ["", "[]", '{"files": [1]}', '{"files": {"meta/info.json": 7}}', "{}"])
def test_a_damaged_listing_is_refused(tmp_path: Path, hub: StubHub, content: str) -> None:
    streamed(tmp_path)
    next((tmp_path / "cache/streamed").glob("*/*/hub.json")).write_text(content)
    refused(tmp_path, r"hub.json is damaged.*; delete the folder .*@a+, and the same command fetches it again")


@pytest.mark.parametrize("name", ["meta/episodes.jsonl", "data/chunk-000/episode_000001.parquet"])
@pytest.mark.parametrize("wrong", ["gone", "cut"])
def test_metadata_and_numbers_that_do_not_come(tmp_path: Path, hub: StubHub, name: str, wrong: str) -> None:
    hub.wrong = {name: wrong}
    refused(tmp_path, "the same command goes on")
    assert not hub.pictures()
    hub.wrong = {}
    assert_read(streamed(tmp_path), what_is_recorded())


def test_a_video_that_the_hub_does_not_list(tmp_path: Path, hub: StubHub) -> None:
    (hub.root / video(2)).unlink()
    refused(tmp_path, r"^someone/toy@aaaaaaaa/videos/.*000002.mp4 is missing")
    assert not hub.pictures()


def test_a_killed_process_goes_on(tmp_path: Path, hub: StubHub) -> None:
    """Files that were decoded before `kill -9` are not fetched again; the one in work is."""
    hub.wrong = {video(2): "held"}
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    killed = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=environment)
    try:
        assert hub.holding.wait(120)
        for _ in range(1200):
            names = [name for path in (tmp_path / "cache").glob("*.journal") for name in _done(path)]
            if len(names) == 2:
                break
            time.sleep(0.1)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    assert sorted(names) == [video(0), video(1)]
    assert list((tmp_path / "cache/.fetched").iterdir())
    hub.wrong = {}
    hub.release.set()
    before = len(hub.fetched)
    assert_read(streamed(tmp_path), what_is_recorded())
    assert hub.fetched[before:] == [video(2)]
    assert not (tmp_path / "cache/.fetched").exists()


def _done(journal: Path) -> set[str]:
    """Read a copy of a journal, because opening one cuts what is not whole."""
    copy = journal.parent.parent / "journal"
    copy.write_bytes(journal.read_bytes())
    opened = FrameJournal(copy, journal.with_suffix(".streaming"), (12, 1, 3, SIZE, SIZE))
    opened.close()
    return opened.done


@pytest.mark.parametrize("change", ["cut", "flipped", "no pictures", "short pictures"])
def test_a_damaged_journal_is_not_believed(tmp_path: Path, hub: StubHub, change: str) -> None:
    hub.wrong = {video(2): "gone"}
    refused(tmp_path, "000002.mp4")
    (journal,) = (tmp_path / "cache").glob("*.journal")
    pictures = journal.with_suffix(".streaming")
    content = journal.read_bytes()
    if change == "cut":
        journal.write_bytes(content[:-3])
    elif change == "flipped":
        journal.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:] if content else b"x")
    elif change == "no pictures":
        pictures.unlink()
    else:
        pictures.write_bytes(b"")
    hub.wrong = {}
    assert_read(streamed(tmp_path), what_is_recorded())


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of each file stands for it: numbers, a video and the decoded frames are too large in turn."""
    monkeypatch.setattr(frame_cache, "FETCHED_AT_ONCE", 1)
    root, generator = write_v2(tmp_path / "source", video=True), np.random.default_rng(0)
    for episode, length in enumerate(LENGTHS):
        write_video(root / video(episode), list(generator.integers(0, 256, (length, SIZE, SIZE, 3), np.uint8)))
    whole = open_data(root)
    frames = max(path.stat().st_size for path in tmp_path.glob("cache/*.frames"))
    largest = max((root / video(episode)).stat().st_size for episode in range(len(LENGTHS)))
    assert largest < 0.8 * frames
    with stub_hub(root, monkeypatch) as hub:
        again = "too large. Free space, or set data.cache to another folder$"
        for size in (0, 1000):
            with files_limited_to(size):
                refused(tmp_path, f"cannot keep the numbers of someone/toy in .*{again}")
        hub.wrong = {video(episode): "gone" for episode in range(len(LENGTHS))}
        refused(tmp_path, "404")
        hub.wrong = {}
        for size in (0, 3000, (largest + frames) // 2):
            with files_limited_to(size):
                refused(tmp_path, f"cannot keep decoded frames in .*{again}")
        before = len(hub.fetched)
        data = streamed(tmp_path)
        assert len(hub.fetched) - before < len(LENGTHS)
    assert data.content() == whole.content()
    assert np.array_equal(pixels_of(data), pixels_of(whole))


def test_no_room_for_a_file(tmp_path: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of this machine cannot be filled in a test: only its free space is given."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as given:
        given.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        message = r"cannot keep {} in .*: .* ha\w+ \S+ GB, 1e-08 GB are free. Free space, or set data.cache"
        refused(tmp_path, message.format("the numbers of someone/toy"))
        given.undo()
        hub.wrong = dict.fromkeys((video(0), video(1), video(2)), "gone")
        refused(tmp_path, "404")
        hub.wrong = {}
        given.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
        refused(tmp_path, message.format("decoded frames"))
    assert_read(streamed(tmp_path), what_is_recorded())


def test_a_limit_that_is_too_small(tmp_path: Path, hub: StubHub) -> None:
    refused(tmp_path, r"take \S+ GB, data.cache_gb is 1e-07", cache_gb=1e-7)
    before = len(hub.fetched)
    assert_read(streamed(tmp_path, cache_gb=1.0), what_is_recorded())
    assert len(hub.fetched) == before  # all files were decoded


def test_a_limit_deletes_what_others_left(tmp_path: Path, hub: StubHub) -> None:
    """A file of an earlier commit that was never finished is not in the way."""
    left = tmp_path / "cache" / "toy@b-0123456789abcdef.streaming"
    left.parent.mkdir()
    left.write_bytes(bytes(100_000))
    left.with_suffix(".journal").write_bytes(b"x")
    assert_read(streamed(tmp_path, cache_gb=1e-4), what_is_recorded())
    assert not left.exists()
    assert not left.with_suffix(".journal").exists()


@pytest.mark.parametrize("revision", [None, "v3.0", "main"])
def test_a_hub_that_has_changed(tmp_path: Path, hub: StubHub, revision: str | None) -> None:
    """Another commit is another data set, which is only taken if it is asked for."""
    hub.wrong = {video(2): "gone"}
    refused(tmp_path, "000002.mp4", revision=revision)
    hub.wrong, first, hub.commit = {}, hub.commit, "d" * 40
    message = f"of someone/toy on the hub is commit d+, .* is {first}: give data.revision={first} to stay .*=d+ for"
    refused(tmp_path, message, revision=revision)
    hub.commit = first
    assert streamed(tmp_path, revision=first).provenance["revision"] == first
    hub.commit = "d" * 40
    assert streamed(tmp_path, revision=first).provenance["revision"] == first
    before = len(hub.pictures())
    assert streamed(tmp_path, revision="d" * 40).provenance["revision"] == "d" * 40
    assert len(hub.pictures()) == before + 3
    assert streamed(tmp_path, revision=revision).provenance["revision"] == "d" * 40


@pytest.mark.parametrize("first", [{"repo_id": REPO, "name": "hub"}, {"name": "hub"}])
def test_a_mixture_with_a_streamed_set(tmp_path: Path, hub: StubHub, first: dict[str, Any]) -> None:
    local = write(tmp_path / "local", lengths=(2, 2))
    place = {} if "repo_id" in first else {"repo_id": REPO}
    config = settings(tmp_path, **{"repo_id": None, **place}, mixture=(first, {"root": str(local)}))
    data = open_mixture(config, ROBOT, progress=False)
    assert [part.name for part in data.parts] == ["hub", "local"]
    assert len(data) == 16
    assert np.array_equal(pixels_of(data)[:12], pixels_of(streamed(tmp_path)))
    assert not list((tmp_path / "cache").rglob("*.mp4"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repo_id": None, "root": "there"}, "data.streaming is for data sets of the hub.*are None and there"),
        ({"root": "there"}, "give data.repo_id and data.root=null .they are someone/toy and there., or leave"),
        ({"streaming": "yes"}, "data.streaming must be true or false, got 'yes'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"revision": "nothing"}, "cannot get the data set 'someone/toy' from the hub"),
        ({"revision": "e" * 40}, "cannot get the data set 'someone/toy' from the hub"),
        ({"repo_id": "someone/else"}, "cannot get the data set 'someone/else' from the hub"),
        ({"repo_id": "../../toy"}, "cannot get the data set '../../toy' from the hub"),
    ],
)
def test_names_that_the_hub_does_not_know(tmp_path: Path, hub: StubHub, given: dict[str, Any], message: str) -> None:
    refused(tmp_path, message, **given)
    assert not hub.fetched
