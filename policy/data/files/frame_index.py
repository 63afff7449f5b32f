"""The order of all frames of a data set, checked against its metadata.

Shape legend: N chosen frames, M rows of all data files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogvla.policy.data.files.columns import AGAIN
from cogvla.policy.data.files.episodes import EpisodeChoice, choose
from cogvla.policy.data.files.metadata import EpisodeEntry, Metadata

BETWEEN_FRAMES = 0.1
"""Fraction of a frame: a part of a video that starts further than this from a frame must follow the part before it."""


@dataclass(frozen=True)
class FrameIndex:
    """The rows of all data files.

    Attributes:
        episode, frame: numbers of each row's episode and frame, in the order of the files, [M].
        order: the chosen rows, ordered by episode and frame, [N].
        row: the place of each row in `order`, [M]; -1: not chosen.
        rate_notes: lines for the user about time stamps that do not fit the rate.
    """

    episode: np.ndarray
    frame: np.ndarray
    order: np.ndarray
    row: np.ndarray
    rate_notes: tuple[str, ...]


def frame_index(
    metadata: Metadata,
    entries: Sequence[EpisodeEntry],
    has_videos: bool,
    columns: Mapping[str, np.ndarray],
    wanted: EpisodeChoice,
) -> FrameIndex:
    """Order the rows by episode and frame, and choose episodes.

    Args:
        metadata: metadata of the data set.
        entries: its list of episodes.
        has_videos: pictures are in videos, so every episode must be in that list.
        columns: `episode_index` and `frame_index` of all rows, and `timestamp` if the data set has it, [M].
        wanted: the episodes to choose.

    Raises:
        ValueError: a frame is missing or there twice, or the metadata does not agree with the rows.
    """
    root, episode, frame = metadata.root, columns["episode_index"], columns["frame_index"]
    if not len(episode):
        raise ValueError(f"the data set in {root} is empty; {AGAIN}")
    if len(episode) != metadata.total_frames:
        raise ValueError(
            f"{root} should have {metadata.total_frames} frames, its files have {len(episode)}: files are missing, or "
            f"old and new ones are mixed; {AGAIN}"
        )
    order = np.lexsort((frame, episode))
    starts = np.flatnonzero(np.diff(episode[order], prepend=-1))
    length = np.diff(starts, append=len(order))
    count = np.arange(len(order)) - np.repeat(starts, length)  # the number that each frame should have
    if len(wrong := np.flatnonzero(frame[order] != count)):
        number, at, expected = episode[order][wrong[0]], frame[order][wrong[0]], count[wrong[0]]
        problem = (
            f"has frame {at} twice: two episodes have the same number, or a file is there twice; number them anew"
            if at < expected
            else f"has no frame {expected}, the next one is {at}; {AGAIN}"
        )
        raise ValueError(f"{root}: episode {number} {problem}")
    lengths = dict(zip(episode[order][starts].tolist(), length.tolist(), strict=True))
    _check_entries(metadata, entries, has_videos, lengths)
    notes: list[str] = []
    if "timestamp" in columns and columns["timestamp"].ndim == 1:
        stamp = columns["timestamp"][order]
        notes = _rate_notes(metadata.fps, stamp - np.repeat(stamp[starts], length), episode[order], count)
    order = order[np.isin(episode[order], choose(np.array(list(lengths), np.int64), wanted))]
    row = np.full(len(episode), -1)
    row[order] = np.arange(len(order))
    return FrameIndex(episode, frame, order, row, tuple(notes))


def _check_entries(
    metadata: Metadata, entries: Sequence[EpisodeEntry], has_videos: bool, lengths: Mapping[int, int]
) -> None:
    """Check that the metadata and the data files have the same episodes; `lengths`: those of the files."""
    root, total = metadata.root, metadata.total_episodes
    if total is not None and total != len(lengths):
        raise ValueError(f"{root} should have {total} episodes, its files have {len(lengths)}; {AGAIN}")
    if not entries and not has_videos:
        return  # images are in the data files, so nothing depends on the list
    listed = {entry.number: entry.length for entry in entries}
    for number, length in lengths.items():
        if number not in listed:
            missing = [n for n in lengths if n not in listed]
            place = f", so no part of a video has its frames 0 to {length - 1}" if has_videos else ""
            raise ValueError(
                f"{root}/meta lists no episode {number}{place} ({len(missing)} of {len(lengths)} episodes are not "
                f"listed: {some(missing)}; {sum(lengths[n] for n in missing)} frames); {AGAIN}"
            )
        if listed[number] != length:
            raise ValueError(
                f"{root}/meta says that episode {number} has {listed[number]} frames, the data files have {length}; "
                f"{AGAIN}"
            )
    if extra := sorted(listed.keys() - lengths.keys()):
        raise ValueError(f"{root}/meta lists episodes without data: {some(extra)}; {AGAIN}")


def _rate_notes(fps: float, passed: np.ndarray, episode: np.ndarray, count: np.ndarray) -> list[str]:
    """Compare the seconds that have passed in each episode with the frame rate, which alone decides."""
    off = np.flatnonzero(~(np.abs(passed * fps - count) <= 0.5))
    if not len(off):
        return []
    first = off[0]
    return [
        f"the time stamps of {len(np.unique(episode[off]))} episodes do not fit the data set's {fps:g} frames per "
        f"second (episode {episode[first]}, frame {count[first]}: {passed[first]:.3f} s after the first one instead of "
        f"{count[first] / fps:.3f} s); frames are taken by their number"
    ]


def some(values: Sequence[int]) -> str:
    """Return the first few of some numbers as text."""
    return ", ".join(map(str, values[:5])) + (" ..." if len(values) > 5 else "")


def places_in_video(path: Path, key: str, entries: Sequence[EpisodeEntry], frames: int, fps: float) -> dict[int, int]:
    """Return the first frame in a video of each of its episodes, where the metadata leaves no doubt.

    Args:
        path: the video, for messages.
        key: key of the camera.
        entries: the episodes that have their frames in this video.
        frames: number of frames of the video.
        fps: frames per second.

    Raises:
        ValueError: a part has another length than its episode, does not begin with a frame, overlaps another one, or is
            not in the video.
    """
    found: dict[int, int] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.videos[key].start or 0, entry.number)):
        part, length, where = entry.videos[key], entry.length, f"{path}: episode {entry.number}"
        start, stop = (0.0, frames / fps) if part.start is None or part.end is None else (part.start, part.end)
        first = round(start * fps)
        if abs((stop - start) * fps - length) > 0.5:
            raise ValueError(
                f"{where} has {length} frames in the data files, but {(stop - start) * fps:.4g} in the video "
                f"({start:.3f} to {stop:.3f} s at {fps:g} frames per second); {AGAIN}"
            )
        if first < end or first + length > frames:
            raise ValueError(
                f"{where} would have frames {first} to {first + length - 1} of the video, which has {frames}, "
                f"{end} of them of earlier episodes; {AGAIN}"
            )
        if first != end and abs(start * fps - first) > BETWEEN_FRAMES:
            raise ValueError(f"{where} starts between two frames, at {start:.4f} s ({fps:g} per second); {AGAIN}")
        found[entry.number], end = first, first + length
    return found
