"""Frames of videos are found by their number, and the list of episodes must agree with the videos."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cogvla.tests.support.lerobot_files import (
    CAMERA,
    EPISODES,
    assert_read,
    edit_info,
    edit_table,
    open_data,
    picture,
    refused,
    rows,
    video_file,
    what_is_read,
    what_is_recorded,
    write,
    write_v2,
    write_video,
)

Spoil = Callable[[Path], object]


def _leave_out(root: Path, *numbers: int) -> None:
    whole = pq.read_table(root / EPISODES)
    kept = [row for row in range(len(whole)) if row not in numbers]
    pq.write_table(whole.take(kept), root / EPISODES)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: shutil.rmtree(root / "meta/episodes"),
            r"no episode 0, so no part of a video has its frames 0 to 3 ",
        ),
        (lambda root: _leave_out(root, 2), r"no episode 2, so no .* frames 0 to 4 \(1 of 3 episodes .*: 2; 5 frames\)"),
        (
            lambda root: _leave_out(root, 0, 1),
            r"lists no episode 0, .* 0 to 3 \(2 of 3 episodes are not listed: 0, 1; 7",
        ),
        (lambda root: edit_table(root / EPISODES, episode_index=[1, 2, 3]), r"lists no episode 0.* \(1 of 3 "),
        (lambda root: edit_table(root / EPISODES, episode_index=[0, 1, 1]), r"meta lists episode 1 twice"),
        (lambda root: edit_table(root / EPISODES, episode_index=[1, 0, 2]), r"episode 0 has 3 frames, the data .* 4;"),
        (lambda root: edit_table(root / EPISODES, length=[4, 3, 6]), r"episode 2 has 6 frames, the data files have 5"),
        (lambda root: edit_table(root / EPISODES, length=[4, None, 5]), r"'length' has no value in row 1"),
        (lambda root: edit_table(root / EPISODES, length=None), r"has no column 'length'; it has episode_index, tasks"),
    ],
)
def test_every_frame_of_a_video_is_listed(tmp_path: Path, spoil: Spoil, message: str) -> None:
    root = write(tmp_path / "toy", video=True)
    spoil(root)
    refused(root, message)


def _shift(name: str, episode: int, seconds: float) -> Spoil:
    def spoil(root: Path) -> None:
        def moved(values: list[float]) -> list[float]:
            return [value + seconds * (place == episode) for place, value in enumerate(values)]

        edit_table(root / EPISODES, **{f"videos_{CAMERA}_{name}_timestamp".replace(".", "_"): moved})

    return spoil


def _shift_both(episode: int, seconds: float) -> Spoil:
    def spoil(root: Path) -> None:
        _shift("from", episode, seconds)(root)
        _shift("to", episode, seconds)(root)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_shift("from", 1, 0.1), r"episode 1 has 3 frames in the data files, but 2 in the video \(0.500 to 0.700 s"),
        (_shift("to", 2, 0.3), r"episode 2 has 5 frames in the data files, but 8 in the video"),
        (
            _shift_both(1, -0.1),
            r"episode 1 would have frames 3 to 5 of the video, which has 12, 4 of them of earlier epi",
        ),
        (_shift_both(2, 0.1), r"episode 2 would have frames 8 to 12 of the video, which has 12"),
        (_shift_both(2, -0.25), r"episode 2 would have frames \d to \d of the video"),
        (lambda root: write_video(video_file(root), [picture(0, 0)] * 11), "frames 7 to 11 of the video, which has 11"),
        (
            lambda root: write_video(video_file(root), [picture(0, 0)] * 12, fps=9),
            r"frame 5 comes after 0.556 s, with 10",
        ),
        (
            lambda root: write_video(video_file(root), [picture(0, 0)] * 12, fps=30),
            r"frame 1 comes after 0.033 s, with ",
        ),
        (
            lambda root: edit_info(root, fps=30),
            r"frame 1 comes after 0.100 s, with 30 frames .* should .* after 0.033 s",
        ),
        (lambda root: edit_info(root, fps=9.5), r"frame 11 comes after 1.100 s, with 9.5 frames per second it should"),
        (lambda root: video_file(root).write_bytes(b"not a video"), r"mp4 is missing or no video"),
        (lambda root: video_file(root).unlink(), r"file-000.mp4 is missing; record or download"),
        (
            lambda root: edit_info(root, video_path=None),
            r"video_path must be a path inside of the data set with places for video_key, chunk_ind",
        ),
        (lambda root: edit_info(root, video_path="{nothing}.mp4"), r"info.json: video_path must be a path inside"),
        (lambda root: edit_info(root, video_path="/nowhere/{video_key}.mp4"), r"video_path must be a path inside of"),
        (lambda root: edit_info(root, video_path="../{video_key}.mp4"), r"video_path must be a path inside of"),
    ],
)
def test_parts_of_videos_agree_with_the_videos(tmp_path: Path, spoil: Spoil, message: str) -> None:
    root = write(tmp_path / "toy", video=True)
    spoil(root)
    refused(root, message)


def test_drift_over_many_episodes_is_refused(tmp_path: Path) -> None:
    """Each part begins a third of a frame later than it should, so the nearest frame is soon another one."""
    root = write(tmp_path / "toy", (3,) * 6, video=True)
    starts = np.arange(6) * (0.3 + 0.034)
    name = f"videos_{CAMERA}_".replace(".", "_")
    edit_table(root / EPISODES, **{f"{name}from_timestamp": list(starts), f"{name}to_timestamp": list(starts + 0.3)})
    refused(root, r"episode 2 starts between two frames, at 0.6680 s .10 per second.")


def test_frames_between_parts_are_left_out(tmp_path: Path) -> None:
    """The rows of an episode were taken out, and its frames are still in the video."""
    given = [row for row in rows(video=True) if row["episode_index"] != 1]
    root = write(tmp_path / "toy", given=given, video=True)
    _leave_out(root, 1)
    edit_info(root, total_episodes=2)
    expected = [frame for frame in what_is_recorded() if frame.state[0] != 1]
    assert_read(open_data(root), expected, (4, 5))


def test_videos_with_frames_that_depend_on_later_ones(tmp_path: Path) -> None:
    root = write(tmp_path / "toy", (20, 15), video=True)
    pictures = [picture(e, f % 8) for e, n in enumerate((20, 15)) for f in range(n)]
    write_video(video_file(root), pictures, g="12", bf="3", preset="slow")
    found = [frame.colour for frame in what_is_read(open_data(root))]
    assert found == [tuple(image[0, 0, :2].tolist()) for image in pictures]


def test_a_video_that_ends_early(tmp_path: Path) -> None:
    root = write_v2(tmp_path / "toy", video=True)
    path = root / f"videos/chunk-000/{CAMERA}/episode_000002.mp4"
    write_video(path, [picture(2, f) for f in range(4)])
    refused(root, r"episode_000002.mp4: episode 2 has 5 frames in the data files, but 4 in the video")
