"""Read a LeRobotDataset v2.0, v2.1 or v3: its columns as arrays, and its frames one part at a time.

The files are read directly (parquet with pyarrow, videos with PyAV): lerobot takes seconds to import, and `datasets`
copies all images. Nothing is believed that can be checked: frames are ordered by episode and frame number, and the
metadata must agree with the files.

Shape legend: N chosen frames of the data set, F frames of a part.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from cogvla.policy.data.files import video
from cogvla.policy.data.files.columns import AGAIN, numbers, parquet, texts, whole_numbers
from cogvla.policy.data.files.episodes import EpisodeChoice
from cogvla.policy.data.files.frame_index import FrameIndex, frame_index, places_in_video, some
from cogvla.policy.data.files.metadata import EpisodeEntry, Metadata

if TYPE_CHECKING:
    from cogvla.policy.data.streaming import HubFiles

T = TypeVar("T")
PICTURE_MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr")
"""PIL's modes with 8 bits per channel or less."""


@dataclass(frozen=True)
class Mapping:
    """The keys to read, and the sizes that the embodiment expects.

    Attributes:
        cameras: keys of the images, in the order of the embodiment's cameras.
        state: keys whose values, one after the other, are the state.
        action: keys whose values, one after the other, are the action.
        labels: (name, key) of each label.
        instruction: `task`, or the key of a string feature.
        state_dim: S.
        action_dim: A.
    """

    cameras: tuple[str, ...]
    state: tuple[str, ...]
    action: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    instruction: str
    state_dim: int
    action_dim: int


@dataclass(frozen=True)
class FrameGroup:
    """Frames that are decoded together: a row group of images, or one episode of a video.

    Attributes:
        view: index of the camera.
        rows: indices of the frames in the data set, [F].
        source: file to decode.
        places: rows in the row group, or frames of the video, ascending, [F].
        row_group: index in the parquet file; None for a video.
    """

    view: int
    rows: np.ndarray
    source: Path
    places: np.ndarray
    row_group: int | None


class LeRobotReader:
    """Reads one data set.

    Args:
        root: folder of the data set.
        mapping: keys to read.
        episodes: the episodes to read; None: all.
        hub: where the files with pictures are, if they are not in the folder.

    Raises:
        ValueError: keys or sizes do not fit the data set; methods also raise it for missing or damaged files.
    """

    def __init__(
        self, root: Path, mapping: Mapping, episodes: EpisodeChoice = None, hub: HubFiles | None = None
    ) -> None:
        self.root, self.mapping, self.wanted, self.hub = root, mapping, episodes, hub
        self.metadata = Metadata(root)
        self._check_keys()

    @property
    def notes(self) -> list[str]:
        """Lines about what is unusual, but was read correctly."""
        return [*self._index.rate_notes, *self._task_notes()]

    @property
    def _videos(self) -> list[str]:
        return [key for key in self.mapping.cameras if self._is_video(key)]

    def __len__(self) -> int:
        return len(self._index.order)

    @cached_property
    def episode_numbers(self) -> np.ndarray:
        """Number of each frame's episode, int64 [N]."""
        return self._index.episode[self._index.order]

    def fingerprint(self, extra: str) -> str:
        """Return a fingerprint of the files with pictures, of the frames' order and episodes, of cameras and `extra`.

        Raises:
            ValueError: a file is missing.
        """
        kinds = [(self.metadata.features[key].dtype, self.metadata.features[key].shape) for key in self.mapping.cameras]
        parts = [
            [entry.number, key, str(part.path.relative_to(self.root)), part.start]
            for entry in self._entries
            for key, part in sorted(entry.videos.items())
        ]
        digest = hashlib.sha256(json.dumps([self.mapping.cameras, kinds, parts, self.metadata.fps, extra]).encode())
        digest.update(self._index.order.tobytes())
        digest.update(self.episode_numbers.tobytes())
        if self.hub is not None:  # the files of a commit do not change
            digest.update(f"{self.hub.repo_id}@{self.hub.commit}".encode())
            return digest.hexdigest()[:16]
        for path in (*self.sources, *self._pictures_aside()):
            if not path.is_file():
                raise ValueError(f"{path} is missing; {AGAIN}")
            stat = path.stat()
            # programs that copy a file may keep the time of its content, but not that of its entry in the folder
            said = f"{os.path.relpath(path, self.root)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"
            digest.update(said.encode())
        return digest.hexdigest()[:16]

    def columns(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """Read state, action, episode, instruction and labels as arrays [N,...], and the distinct instructions.

        Returns:
            Arrays by name: `state` and `action` float32, `episode` int64, `instruction` int64 (index of the distinct
            instruction), `label/NAME`; and the distinct instructions.

        Raises:
            ValueError: a column is missing, incomplete, no number or text, or not of the declared shape.
        """
        mapping, order = self.mapping, self._index.order
        read = self._read((*mapping.state, *mapping.action, *(key for _, key in mapping.labels)), numbers)
        values = {key: self._shaped(key, parts)[order] for key, parts in read.items()}
        columns = {
            "state": self._joined("state", [values[key] for key in mapping.state]),
            "action": self._joined("action", [values[key] for key in mapping.action]),
            "episode": self._index.episode[order],
            **{f"label/{name}": _signed(self._finite(repr(key), values[key]), key) for name, key in mapping.labels},
        }
        said = self._instructions()
        distinct = sorted(set(said))
        known = {text: number for number, text in enumerate(distinct)}
        columns["instruction"] = np.array([known[text] for text in said], np.int64)
        return columns, distinct

    def parts(self) -> Iterator[FrameGroup]:
        """Yield the frames of all cameras, in parts.

        Raises:
            ValueError: a frame is in no part of a video, or the parts do not agree with the videos.
        """
        for path in self.sources:
            yield from self.parts_of(path, path)

    @cached_property
    def sources(self) -> dict[Path, list[int]]:
        """The files with pictures of chosen frames, each with the indices of its cameras."""
        found: dict[Path, list[int]] = defaultdict(list)
        chosen = set(self.episode_numbers.tolist())
        for view, key in enumerate(self.mapping.cameras):
            if self._is_video(key):
                files = self._videos_of(key)
                if missing := [path for path in files if not self._is_there(path)]:
                    where = missing[0] if self.hub is None else self.hub.address(missing[0])
                    raise ValueError(f"{where} is missing; {AGAIN}")
                paths = [path for path, entries in files.items() if any(entry.number in chosen for entry in entries)]
            else:
                paths = [path for path, rows in self._rows_of.items() if (self._index.row[rows] >= 0).any()]
            for path in paths:
                found[path].append(view)
        return dict(found)

    def parts_of(self, source: Path, local: Path) -> Iterator[FrameGroup]:
        """Yield the frames of one of the `sources`, in parts.

        Args:
            source: the file.
            local: where it is now.

        Raises:
            ValueError: see `parts`.
        """
        for view in self.sources[source]:
            key = self.mapping.cameras[view]
            if self._is_video(key):
                yield from self._video_parts(view, key, self._videos_of(key)[source], local)
            else:
                yield from self._image_parts(view, self._rows_of[source], local)

    def decode(self, part: FrameGroup, only: Collection[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Decode the frames of a part.

        Args:
            part: part from `parts`.
            only: indices of the wanted frames in the data set; None: all frames of the part.

        Yields:
            Indices [f] in the data set, and frames uint8 [f,3,H,W] at their recorded size.

        Raises:
            ValueError: a frame cannot be decoded.
        """
        if only is not None:
            wanted = np.isin(part.rows, list(only))
            part = replace(part, rows=part.rows[wanted], places=part.places[wanted])
        if not len(part.rows):
            return
        key = self.mapping.cameras[part.view]
        if part.row_group is None:
            for places, frames_FHWC in video.frames(part.source, self._times(part.source), part.places):
                self._check_size(key, frames_FHWC[0], str(part.source))
                yield part.rows[places], frames_FHWC.transpose(0, 3, 1, 2)
            return
        table = parquet(part.source, [key], part.row_group, self._footer(part.source))
        for row, value in zip(part.rows, table[key].take(pa.array(part.places)), strict=True):
            yield np.array([row]), self._picture(value.as_py(), part.source, key, int(row)).transpose(2, 0, 1)[None]

    def _picture(self, value: Any, source: Path, key: str, row: int) -> np.ndarray:
        """Decode one picture of a parquet file, uint8 [H,W,3]."""
        where = f"{source}: the image of {key!r} at frame {row} of the data set"
        try:
            stored = value if isinstance(value, dict) else {"bytes": value}
            if isinstance(stored.get("bytes"), bytes):
                opened = Image.open(io.BytesIO(stored["bytes"]))
            elif isinstance(stored.get("path"), str) and self.hub is not None:
                raise ValueError(f"{where} is a file of its own, {stored['path']}; leave data.streaming out")
            elif isinstance(stored.get("path"), str):
                opened = Image.open(self.root / stored["path"])
            else:
                raise ValueError(f"{where} is missing; {AGAIN}")
            with opened:
                if opened.mode not in PICTURE_MODES:
                    raise ValueError(
                        f"{where} is no 8-bit picture (mode {opened.mode}, as of depth or floats); choose another "
                        "camera, or store it with 8 bits per channel"
                    )
                upright = ImageOps.exif_transpose(opened)  # as `datasets` and lerobot show it
                picture = np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
        except (OSError, TypeError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises all of these
            raise ValueError(f"{where} is damaged ({error}); {AGAIN}") from error
        self._check_size(key, picture, where)
        return picture

    def _check_size(self, key: str, picture_HWC: np.ndarray, where: str) -> None:
        """Raise a ValueError if a picture has not the declared size: it would be stretched unlike the others."""
        declared = tuple(self.metadata.features[key].shape)
        height, width = picture_HWC.shape[:2]
        if (height, width) not in (declared[:2], declared[1:]):
            raise ValueError(
                f"{where} has {height} x {width} pixels, meta/info.json says shape {list(declared)} for {key!r}; "
                f"correct its shape, or {AGAIN}"
            )

    def _pictures_aside(self) -> list[Path]:
        """Return the pictures that are files of their own, to which data files refer, and that are there."""
        found: set[str] = set()
        for source, views in self.sources.items():
            for key in (self.mapping.cameras[view] for view in views):
                if not self._is_video(key) and _has_references(self._footer(source), key):
                    with pq.ParquetFile(source) as file:
                        said = pc.struct_field(file.read([f"{key}.path"])[key], "path")
                    found |= {path for path in said.to_pylist() if path is not None}
        return [self.root / path for path in sorted(found) if (self.root / path).is_file()]

    @cached_property
    def _data_files(self) -> list[Path]:
        found = self.metadata.files("data", ".parquet")
        if not found:
            raise ValueError(f"the data set in {self.root} is empty: it has no data files; {AGAIN}")
        return found

    @cached_property
    def _numbered(self) -> dict[str, list[np.ndarray]]:
        """`episode_index` and `frame_index` of the rows of each data file."""
        return self._read(("episode_index", "frame_index"), whole_numbers)

    @cached_property
    def _index(self) -> FrameIndex:
        columns = {key: np.concatenate(parts) for key, parts in self._numbered.items()}
        if "timestamp" in self.metadata.features:
            columns["timestamp"] = self._shaped("timestamp", self._read(("timestamp",), numbers)["timestamp"])
        return frame_index(self.metadata, self._entries, bool(self._videos), columns, self.wanted)

    @cached_property
    def _entries(self) -> list[EpisodeEntry]:
        return self.metadata.episodes(self.mapping.cameras)

    def _task_notes(self) -> list[str]:
        """Compare the tasks that the list of episodes repeats with those of the frames, which decide."""
        if self.mapping.instruction != "task":
            return []
        pairs = np.unique(np.stack([self.episode_numbers, self._task_numbers]), axis=1).T.tolist()
        said: dict[int, set[str]] = defaultdict(set)
        for number, task in pairs:
            said[number].add(self.metadata.tasks[task])
        other = [e for e in self._entries if e.tasks and e.number in said and not said[e.number] <= set(e.tasks)]
        if not other:
            return []
        number, listed, used = other[0].number, list(other[0].tasks), sorted(said[other[0].number])
        return [
            f"meta/episodes gives {len(other)} episodes another task than meta/tasks, which decides (episode {number}: "
            f"{listed}; used: {used})"
        ]

    def _image_parts(self, view: int, rows: slice, local: Path) -> Iterator[FrameGroup]:
        start = rows.start
        for group in range(self._footer(local).num_row_groups):
            chosen = self._index.row[start : start + self._footer(local).row_group(group).num_rows]
            places = np.flatnonzero(chosen >= 0)
            if len(places):
                yield FrameGroup(view, chosen[places], local, places, group)
            start += len(chosen)

    def _video_parts(self, view: int, key: str, entries: Sequence[EpisodeEntry], local: Path) -> Iterator[FrameGroup]:
        first = places_in_video(local, key, entries, len(self._times(local)), self.metadata.fps)
        for number in (entry.number for entry in entries):
            start, end = np.searchsorted(self.episode_numbers, [number, number + 1])
            if end > start:
                yield FrameGroup(view, np.arange(start, end), local, first[number] + np.arange(end - start), None)

    def _is_there(self, path: Path) -> bool:
        return path.is_file() if self.hub is None else self.hub.has(path)

    def _is_video(self, key: str) -> bool:
        return self.metadata.features[key].dtype == "video"

    @cached_property
    def _rows_of(self) -> dict[Path, slice]:
        """The rows of each data file, among those of all."""
        ends = np.cumsum([len(rows) for rows in self._numbered["frame_index"]]).tolist()
        return {path: slice(*place) for path, *place in zip(self._data_files, [0, *ends[:-1]], ends, strict=True)}

    @cache  # noqa: B019
    def _videos_of(self, key: str) -> dict[Path, list[EpisodeEntry]]:
        """Return the videos of a camera, each with its episodes."""
        files: dict[Path, list[EpisodeEntry]] = defaultdict(list)
        for entry in self._entries:
            files[entry.videos[key].path].append(entry)
        return files

    @cached_property
    def _task_numbers(self) -> np.ndarray:
        """`task_index` of each chosen frame; each has a text."""
        (parts,) = self._read(("task_index",), whole_numbers).values()
        numbers_N = np.concatenate(parts)[self._index.order]
        if unknown := sorted(set(np.unique(numbers_N).tolist()) - self.metadata.tasks.keys()):
            raise ValueError(f"{self.root}/meta/tasks has no text for task_index {some(unknown)}; add it, or {AGAIN}")
        return numbers_N

    def _instructions(self) -> list[str]:
        """Return the instruction of each chosen frame."""
        key = self.mapping.instruction
        if key == "task":
            return [self.metadata.tasks[number] for number in self._task_numbers.tolist()]
        said = [text for part in self._read((key,), texts)[key] for text in part]
        return [said[row] for row in self._index.order]

    def _joined(self, name: str, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return these values one after the other, float32 [N,D]."""
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            values_ND = np.concatenate([v.reshape(len(v), -1).astype(np.float32) for v in values], axis=1)
        return self._finite(name, values_ND)

    def _finite(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return these values [N,...]; ValueError if some are NaN, or infinite in float32."""
        with np.errstate(over="ignore"):
            bad = np.flatnonzero(~np.isfinite(values.astype(np.float32)).reshape(len(values), -1).all(axis=1))
        if len(bad):
            row = self._index.order[bad[0]]
            raise ValueError(
                f"{name} has NaN or infinite values in {len(bad)} frames of {self.root}, first in episode "
                f"{self._index.episode[row]}, frame {self._index.frame[row]}; remove them or record them anew"
            )
        return values

    def _shaped(self, key: str, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Return all rows of a column, in the order of the files and the declared shape; (1,) becomes ()."""
        shape = self.metadata.features[key].shape
        for path, part in zip(self._data_files, parts, strict=True):
            if len(part) and int(np.prod(part.shape[1:])) != int(np.prod(shape)):
                raise ValueError(
                    f"{path}: {key!r} has {int(np.prod(part.shape[1:]))} numbers per row, meta/info.json says shape "
                    f"{list(shape)}; correct its shape, or {AGAIN}"
                )
        return np.concatenate([part.reshape(len(part), *(() if shape == (1,) else shape)) for part in parts])

    def _read(self, keys: Sequence[str], convert: Callable[[pa.ChunkedArray, str], T]) -> dict[str, list[T]]:
        """Read columns of all data files, and convert each file's part of each column."""
        keys = list(dict.fromkeys(keys))
        tables = [parquet(path, keys) for path in self._data_files]
        return {
            key: [convert(table[key], f"{path}: {key!r}") for path, table in zip(self._data_files, tables, strict=True)]
            for key in keys
        }

    @lru_cache(maxsize=64)  # noqa: B019  the reader lives no longer than its cache is needed
    def _footer(self, path: Path) -> pq.FileMetaData:
        """Read the footer once: a file has a row group per episode, and each is read separately."""
        return pq.read_metadata(path)

    @cache  # noqa: B019
    def _times(self, path: Path) -> np.ndarray:
        return video.frame_times(path, self.metadata.fps)

    def _check_keys(self) -> None:
        mapping, features, cameras = self.mapping, self.metadata.features, self.metadata.cameras()
        for key in mapping.cameras:
            if key not in cameras:
                raise ValueError(f"the data set in {self.root} has no camera {key!r}; it has {', '.join(cameras)}")
        others = [key for key in features if key not in cameras]
        text = [] if mapping.instruction == "task" else [mapping.instruction]
        for key in (*mapping.state, *mapping.action, *(key for _, key in mapping.labels), *text):
            if key not in others:
                raise ValueError(f"the data set in {self.root} has no {key!r}; it has {', '.join(others)}")
        for name, keys, dim in (
            ("state", mapping.state, mapping.state_dim),
            ("action", mapping.action, mapping.action_dim),
        ):
            shapes = [features[key].shape for key in keys]
            if sum(int(np.prod(shape)) for shape in shapes) != dim:
                said = " and ".join(f"{key!r} has shape {shape}" for key, shape in zip(keys, shapes, strict=True))
                raise ValueError(
                    f"{said} in the data set in {self.root}, the embodiment's {name}_dim is {dim}; "
                    "choose the embodiment that was recorded, or another key"
                )


def _signed(values: np.ndarray, key: str) -> np.ndarray:
    """Return unsigned numbers as int64: torch can neither join nor compare the larger ones."""
    if values.dtype.kind != "u" or values.dtype.itemsize == 1:
        return values
    if values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{key!r} has the number {values.max()}, too large for int64; choose another feature")
    return values.astype(np.int64)


def _has_references(footer: pq.FileMetaData, key: str) -> bool:
    """Return whether pictures of a camera may be files of their own: some rows may hold no bytes, but a path."""
    for group in range(footer.num_row_groups):
        rows = footer.row_group(group)
        named = {column.path_in_schema: column for column in map(rows.column, range(rows.num_columns))}
        if f"{key}.path" in named:
            stored = named.get(f"{key}.bytes")
            if stored is None or stored.statistics is None or stored.statistics.null_count:
                return True
    return False
