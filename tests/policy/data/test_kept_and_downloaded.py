"""Only frames are kept from before, and a folder of the hub is brought to its revision."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from cogvla.tests.support.lerobot_files import (
    CAMERA,
    EPISODES,
    TASKS,
    assert_read,
    data_file,
    edit_table,
    open_data,
    refused,
    rows,
    what_is_read,
    what_is_recorded,
    with_action,
    write,
    write_tasks,
    write_v2,
)


@pytest.mark.parametrize("spoil", ["tasks", "episodes", "action", "picture", "cut"])
def test_only_frames_are_kept(tmp_path: Path, spoil: str) -> None:
    """Whatever is corrected in a data set is seen, also if the file keeps its size and its time."""
    root = write(tmp_path / "toy", files=1)
    pq.write_table(pq.read_table(data_file(root)), data_file(root), compression="none", use_dictionary=False)
    assert_read(open_data(root), what_is_recorded())
    stat = data_file(root).stat()
    if spoil == "tasks":
        write_tasks(root, {"task_index": [0, 1], "task": ["corrected", TASKS[1]]})
        assert open_data(root).instructions == ["corrected", TASKS[1]]
    elif spoil == "episodes":
        edit_table(root / EPISODES, length=[4, 3, 6])
        refused(root, "episode 2 has 6 frames")
    elif spoil == "action":
        edit_table(data_file(root), action=with_action(0, [9.0, 9.0, 9.0], pa.list_(pa.float32(), 3)))
        os.utime(data_file(root), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert open_data(root).action_NA[0].tolist() == [9, 9, 9]
    elif spoil == "picture":
        content = data_file(root).read_bytes()
        first, second = (row[CAMERA]["bytes"] for row in rows()[:2])
        assert len(first) == len(second)
        assert content.count(first) == 1
        data_file(root).write_bytes(content.replace(first, second))
        os.utime(data_file(root), ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert what_is_read(open_data(root))[0].colour == what_is_recorded()[1].colour
    else:
        (frames,) = (tmp_path / "cache").glob("*.frames")
        frames.write_bytes(frames.read_bytes()[:1000])
        assert_read(open_data(root), what_is_recorded())


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a" / "toy"), write_v2(tmp_path / "b" / "toy")
    other = write(tmp_path / "c" / "toy", given=[row | {"action": [0.0, 0.0, 0.0]} for row in rows()])
    prints = [open_data(root).provenance["fingerprint"] for root in (first, second, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_folder_of_the_hub_is_brought_to_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself cannot be reached in tests: its two answers are given, the rest is real."""
    asked: list[Any] = []
    root, source = tmp_path / "toy", write(tmp_path / "source")
    tags = ["v2.1", "v3.0", "v1.6", "mine"]

    class Ref:
        def __init__(self, name: str) -> None:
            self.name = name

    class Answer:
        sha = "a" * 40

        def __init__(self) -> None:
            self.tags = [Ref(tag) for tag in tags]

    def info(self: HfApi, repo_id: str, *, repo_type: str, revision: str | None) -> Answer:
        asked.append((repo_id, repo_type, revision))
        return Answer()

    def download(repo_id: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        shutil.copytree(source, local_dir, dirs_exist_ok=True)
        noted = local_dir / ".cache/huggingface/download/meta/info.json.metadata"
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(f"{revision}\netag\n0.0\n")
        return str(local_dir)

    monkeypatch.setattr(HfApi, "list_repo_refs", lambda self, repo_id, *, repo_type: Answer())
    monkeypatch.setattr(HfApi, "repo_info", info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    data = open_data(root, repo_id="someone/toy")
    assert_read(data, what_is_recorded())
    assert data.provenance["revision"] == "a" * 40
    assert asked == [("someone/toy", "dataset", "v3.0")]
    (root / "data/chunk-000/file-001.parquet").unlink()  # as if the download had been killed
    assert_read(open_data(root, repo_id="someone/toy", revision="a" * 40), what_is_recorded())

    def offline(self: HfApi, repo_id: str, **_: object) -> Answer:
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "repo_info", offline)
    assert open_data(root, repo_id="someone/toy").provenance["revision"] == "a" * 40
    assert open_data(root, repo_id="someone/toy", revision="a" * 40).provenance["revision"] == "a" * 40
    for other in ("b" * 40, "v3.0"):  # a tag can have moved since
        kept = f"no network; .*toy has revision {'a' * 40}, which data.revision={'a' * 40} uses as it is"
        refused(root, kept, repo_id="someone/toy", revision=other)
    refused(root, f"has revision {'a' * 40}, so it cannot be checked that it is 'v3.0'", revision="v3.0")
    assert open_data(root, revision="a" * 40).provenance["revision"] == "a" * 40
    refused(source, "was not downloaded from the hub, so it cannot be checked that it is 'mine'", revision="mine")
    refused(tmp_path / "nothing", "cannot get the data set 'someone/toy'", repo_id="someone/toy")
    assert open_data(root, repo_id="someone/toy").provenance["revision"] == "a" * 40
    # huggingface_hub only warns if the hub stops answering between its requests, and returns the folder as it was.
    Answer.sha = "c" * 40
    monkeypatch.setattr(HfApi, "repo_info", info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **_: str(root))
    refused(root, f"stopped answering before .*toy had revision {'c' * 40}", repo_id="someone/toy", revision="mine")
    assert open_data(root, repo_id="someone/toy").provenance["revision"] == "a" * 40, "it is as it was"
    assert_read(open_data(source, repo_id="someone/toy"), what_is_recorded())


def test_a_hub_that_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        tmp_path / "nothing", "cannot get the data set 'someone/toy' from the hub: .*[Oo]ffline", repo_id="someone/toy"
    )
    assert issubclass(HfHubHTTPError, OSError)
