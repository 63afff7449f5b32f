"""The metadata of a LeRobotDataset v2.0, v2.1 or v3, checked against itself.

    meta/info.json                                features, frame rate, number of frames
    meta/episodes/*/*.parquet, episodes.jsonl     (v3, v2) length and tasks of each episode, its part of the videos
    meta/tasks.parquet, tasks.jsonl               (v3, v2) texts of the tasks

Numbers may be stored as another type if they are the same numbers; anything else is refused by file and key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from cogvla.files import read_object, visible
from cogvla.policy.data.files.columns import AGAIN, is_text, numbers, parquet, texts, whole_numbers

PANDAS_INDEX = "__index_level_0__"
CHUNK_SIZE = 1000
"""Episodes per folder of a v2 data set that does not say."""


@dataclass(frozen=True)
class Feature:
    """One column of a data set.

    Attributes:
        dtype: its lerobot type (`float32`, `image`, `video`, ...).
        shape: shape of one value.
        names: what its entries are, such as joints; (): not said.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_camera(self) -> bool:
        return self.dtype in ("image", "video")


@dataclass(frozen=True)
class VideoPart:
    """The frames of one episode in a video: from `start` to `end` seconds; None: the whole video."""

    path: Path
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class EpisodeEntry:
    """One episode in the metadata.

    Attributes:
        number: its `episode_index`.
        length: number of frames.
        tasks: texts of its tasks; empty if they are not given.
        videos: key of a camera -> its part of a video.
    """

    number: int
    length: int
    tasks: tuple[str, ...] = ()
    videos: Mapping[str, VideoPart] = field(default_factory=dict)


class Metadata:
    """The metadata of one data set.

    Attributes:
        root: folder of the data set.
        version: 2 or 3.
        features: its columns by name.
        fps: frames per second.
        total_frames: number of frames.

    Args:
        root: folder of the data set.

    Raises:
        ValueError: `meta/info.json` is damaged or incomplete, or of another version; attributes and methods raise it
            for the other files.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "meta" / "info.json"
        self._info = info = read_object(self.path, AGAIN)
        version = str(info.get("codebase_version"))
        if version.split(".")[0] not in ("v2", "v3"):
            raise ValueError(
                f"{root} is a LeRobotDataset {version}; this package reads v2.0 to v3: convert it with lerobot"
            )
        self.version = int(version[1])
        features = info.get("features")
        if not isinstance(features, dict):
            raise self._wrong("features", "must be a mapping of columns")
        self.features = {str(key): self._feature(key, value) for key, value in features.items()}
        self.fps = self._number("fps")
        if not self.fps > 0:
            raise self._wrong("fps", "must be positive")
        self.total_frames = self._whole("total_frames")
        self.total_episodes = self._whole("total_episodes") if "total_episodes" in info else None

    def files(self, folder: str, ending: str) -> list[Path]:
        """Return the files below a folder whose names have this ending; hidden files, as of macOS, are left out."""
        return visible(self.root / folder, f"**/*{ending}")

    def entry_names(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Return what the entries of these features are, in order; () if a feature does not name all of its own."""
        chosen = [self.features[key] for key in keys if key in self.features]
        named = len(chosen) == len(keys) and all(len(each.names) == math.prod(each.shape) for each in chosen)
        return tuple(name for each in chosen for name in each.names) if named else ()

    def cameras(self) -> list[str]:
        """Return the keys of the cameras."""
        return [key for key, feature in self.features.items() if feature.is_camera]

    @cached_property
    def tasks(self) -> dict[int, str]:
        """Text of each `task_index`."""
        path = self.root / "meta" / ("tasks.parquet" if self.version == 3 else "tasks.jsonl")
        pairs = _tasks_of_table(path) if self.version == 3 else _tasks_of_lines(path)
        tasks: dict[int, str] = {}
        for number, text in pairs:
            if tasks.setdefault(number, text) != text:
                raise ValueError(
                    f"{path} gives task_index {number} two texts, {tasks[number]!r} and {text!r}; keep one"
                )
        return tasks

    def episodes(self, cameras: Sequence[str]) -> list[EpisodeEntry]:
        """Read the list of episodes, with the parts of these cameras' videos; an image data set may have no list.

        Raises:
            ValueError: the list is damaged or incomplete, or has an episode twice.
        """
        videos = [key for key in cameras if self.features[key].dtype == "video"]
        entries = list(self._entries_v3(videos) if self.version == 3 else self._entries_v2(videos))
        seen: set[int] = set()
        for entry in entries:
            if entry.number in seen:
                raise ValueError(f"{self.root}/meta lists episode {entry.number} twice; {AGAIN}")
            seen.add(entry.number)
        return entries

    def _entries_v3(self, videos: Sequence[str]) -> Iterable[EpisodeEntry]:
        places = {key: [f"videos/{key}/{name}" for name in ("chunk_index", "file_index")] for key in videos}
        times = {key: [f"videos/{key}/{name}_timestamp" for name in ("from", "to")] for key in videos}
        needed = ["episode_index", "length", *(c for key in videos for c in (*places[key], *times[key]))]
        for path in self.files("meta/episodes", ".parquet"):
            table = parquet(path, needed, optional=["tasks"])  # the other columns are statistics, and large
            number, length = (whole_numbers(table[c], f"{path}: {c!r}").tolist() for c in needed[:2])
            said = _task_lists(table, path)
            where = {
                key: [whole_numbers(table[c], f"{path}: {c!r}").tolist() for c in places[key]]
                + [_seconds(table[c], f"{path}: {c!r}") for c in times[key]]
                for key in videos
            }
            for row in range(len(number)):
                parts = {}
                for key, (chunk, file, start, end) in where.items():
                    name = self._video_name(video_key=key, chunk_index=chunk[row], file_index=file[row])
                    parts[key] = VideoPart(name, start[row], end[row])
                yield EpisodeEntry(number[row], length[row], said[row], parts)

    def _entries_v2(self, videos: Sequence[str]) -> Iterable[EpisodeEntry]:
        path = self.root / "meta" / "episodes.jsonl"
        size = self._whole("chunks_size") if "chunks_size" in self._info else CHUNK_SIZE
        for line, entry in _lines(path) if path.is_file() or videos else ():
            number, length = (_line_number(entry, key, f"{path}, line {line}") for key in ("episode_index", "length"))
            said = entry.get("tasks") or ()
            chunk = number // max(size, 1)
            parts = {
                key: VideoPart(self._video_name(video_key=key, episode_chunk=chunk, episode_index=number))
                for key in videos
            }
            yield EpisodeEntry(number, length, tuple(map(str, said)) if isinstance(said, list) else (str(said),), parts)

    def _video_name(self, **place: Any) -> Path:
        template = self._info.get("video_path")
        try:
            assert isinstance(template, str)
            found = Path(template.format(**place))
            assert not {found.anchor, ".."} & {*found.parts}
            return self.root / found
        except (AssertionError, LookupError, ValueError, AttributeError, TypeError):
            should = f"must be a path inside of the data set with places for {', '.join(place)}"
            raise self._wrong("video_path", should) from None

    def _feature(self, key: Any, value: Any) -> Feature:
        if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
            raise self._wrong(f"features.{key}", "must be a mapping with dtype and shape", value)
        shape = value.get("shape")
        sizes = shape if isinstance(shape, list) else [shape]
        try:
            return Feature(value["dtype"], tuple(_whole(size) for size in sizes), _names(value.get("names")))
        except (TypeError, ValueError):
            raise self._wrong(f"features.{key}.shape", "must be a list of whole numbers", shape) from None

    def _number(self, key: str) -> float:
        try:
            return _number(self._info.get(key))
        except (TypeError, ValueError):
            raise self._wrong(key, "must be a number") from None

    def _whole(self, key: str) -> int:
        try:
            return _whole(self._info.get(key))
        except (TypeError, ValueError):
            raise self._wrong(key, "must be a whole number") from None

    def _wrong(self, key: str, should: str, value: Any = None) -> ValueError:
        found = self._info.get(key) if value is None else value
        return ValueError(f"{self.path}: {key} {should}, it is {json.dumps(found)[:80]}; correct it, or {AGAIN}")


def _names(given: Any) -> tuple[str, ...]:
    """Return the names of a feature's entries: a list, a mapping of lists, or a mapping from each to its place."""
    if isinstance(given, Mapping):
        parts = list(given.values())
        if parts and all(isinstance(place, int) for place in parts):
            given = sorted(given, key=given.__getitem__)
        else:
            given = [name for part in parts for name in (part if isinstance(part, list) else [part])]
    return tuple(given) if isinstance(given, list) and all(isinstance(name, str) for name in given) else ()


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number) or number < 0:
        raise ValueError
    return int(number)


def _seconds(column: pa.ChunkedArray, where: str) -> list[float]:
    values = numbers(column, where)
    if values.ndim != 1 or values.dtype == bool or not all(math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(f"{where} must hold times in seconds from 0 up; {AGAIN}")
    return [float(v) for v in values]


def _task_lists(table: pa.Table, path: Path) -> list[tuple[str, ...]]:
    """Return the texts of the tasks of each episode; they are for a comparison only, so they may be absent."""
    if "tasks" not in table.column_names:
        return [()] * len(table)
    found: list[tuple[str, ...]] = []
    for row, value in enumerate(table["tasks"].to_pylist()):
        given = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in given):
            raise ValueError(f"{path}: 'tasks' must hold texts, row {row} holds {value!r}; {AGAIN}")
        found.append(tuple(given))
    return found


def _tasks_of_table(path: Path) -> Iterable[tuple[int, str]]:
    """Read `task_index` and the texts: the column `task`, else the index of the table as pandas saved it."""
    table = parquet(path)
    names = table.column_names
    saved = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    index = [name for name in (*saved, PANDAS_INDEX) if isinstance(name, str) and name in names]
    found = [name for name in ("task", *index) if names.count(name) == 1 and is_text(table.schema.field(name).type)]
    if names.count("task_index") != 1 or not found or ("task" in names and found[0] != "task"):
        raise ValueError(
            f"{path} must have the columns task_index (numbers) and task (texts), or the texts as its pandas index; it "
            f"has {', '.join(f'{field.name} ({field.type})' for field in table.schema)}"
        )
    given = texts(table[found[0]], f"{path}: {found[0]!r}")
    return zip(whole_numbers(table["task_index"], f"{path}: 'task_index'").tolist(), given, strict=True)


def _tasks_of_lines(path: Path) -> Iterable[tuple[int, str]]:
    for line, entry in _lines(path):
        number, text = _line_number(entry, "task_index", f"{path}, line {line}"), entry.get("task")
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {line}: task must be a text, it is {text!r}; {AGAIN}")
        yield number, text


def _lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); {AGAIN}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}); {AGAIN}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, line {number} is no JSON object; {AGAIN}")
            yield number, entry


def _line_number(entry: Mapping[str, Any], key: str, where: str) -> int:
    try:
        return _whole(entry.get(key))
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {key} must be a whole number, it is {entry.get(key)!r}; {AGAIN}") from None
