"""Read a LeRobotDataset v3: its columns as arrays, and its frames one part at a time.

The files are read directly (parquet with pyarrow): lerobot takes seconds to import, and `datasets` copies all images.
lerobot is used to download data sets and to find frames in videos (with pyav, which does not need a system FFmpeg).

Shape legend: N frames of the data set, F frames of a part.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

VERSION = "v3"
VIDEO_CHUNK = 64
"""Frames decoded at once: lerobot returns float32, 3.7 MB per frame of 640x480."""


@dataclass(frozen=True)
class Mapping:
    """The keys to read, and the sizes that the embodiment expects.

    Attributes:
        cameras: keys of the images, in the order of the embodiment's cameras.
        state: key of the state.
        action: key of the action.
        labels: (name, key) of each label.
        instruction: `task`, or the key of a string feature.
        state_dim: S.
        action_dim: A.
    """

    cameras: tuple[str, ...]
    state: str
    action: str
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
        row_group: index in the parquet file; None for a video.
        timestamps: times of the frames in the video, in seconds; None for images.
        episode: index of the (first) episode, for messages.
    """

    view: int
    rows: np.ndarray
    source: Path
    row_group: int | None
    timestamps: tuple[float, ...] | None
    episode: int


def local_root(root: str | None, repo_id: str | None, revision: str | None) -> Path:
    """Return the data set's folder; download it if `repo_id` is given and the folder is empty.

    Raises:
        ValueError: there is no data set in the folder, or it cannot be downloaded.
    """
    if repo_id is not None:
        return _from_hub(root, repo_id, revision)
    if root is not None and (Path(root) / "meta" / "info.json").is_file():
        return Path(root)
    raise ValueError(
        f"there is no LeRobotDataset in {root}: record one with `record_demonstrations suite=... output={root}`, "
        "or set data.root to another folder or data.repo_id to a data set of the hub"
    )


def _from_hub(root: str | None, repo_id: str, revision: str | None) -> Path:
    """Return the folder of a data set on the hub; download only the files that are missing."""
    from huggingface_hub.errors import HfHubHTTPError
    from lerobot.datasets.backward_compatibility import CompatibilityError
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    try:
        meta = LeRobotDatasetMetadata(repo_id, root=root, revision=revision)
        episodes = range(meta.total_episodes)
        files = {meta.get_data_file_path(episode) for episode in episodes}
        files |= {meta.get_video_file_path(episode, key) for episode in episodes for key in meta.video_keys}
        if not all((meta.root / file).is_file() for file in files):
            meta.pull_from_repo()
    except (HfHubHTTPError, CompatibilityError, OSError) as error:
        raise ValueError(f"cannot get the data set {repo_id!r} from the hub: {error}") from error
    return Path(meta.root)


class LeRobotReader:
    """Reads one data set.

    Args:
        root: folder of the data set.
        mapping: keys to read.

    Raises:
        ValueError: keys or sizes do not fit the data set; methods also raise it for missing or damaged files.
    """

    def __init__(self, root: Path, mapping: Mapping) -> None:
        self.root, self.mapping = root, mapping
        path = root / "meta" / "info.json"
        try:
            self.info: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); record or download the data set again") from error
        version = str(self.info.get("codebase_version"))
        if not version.startswith(VERSION):
            raise ValueError(
                f"{root} is a LeRobotDataset {version}; convert it with `convert_libero source={root} output=FOLDER`, "
                "which runs lerobot's `python -m lerobot.datasets.v30.convert_dataset_v21_to_v30`"
            )
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self._check_keys()

    def fingerprint(self, extra: str) -> str:
        """Return a fingerprint that changes with any file of the data set, the mapping, and `extra`."""
        files = [self.root / "meta" / "info.json", *self._data_files(), *sorted((self.root / "videos").rglob("*.mp4"))]
        digest = hashlib.sha256(json.dumps([asdict(self.mapping), extra]).encode())
        for path in files:
            stat = path.stat()
            digest.update(f"{path.relative_to(self.root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def index(self) -> dict[str, np.ndarray]:
        """`episode`, `frame`, `timestamp` and `row` (index in the data set) of all frames, in order of the files."""
        keys = {"episode": "episode_index", "frame": "frame_index", "timestamp": "timestamp", "row": "index"}
        columns = self._read(list(keys.values()))
        index = {name: columns[key] for name, key in keys.items()}
        total = int(self.info["total_frames"])
        if not len(index["row"]) or not total:
            raise ValueError(f"the data set in {self.root} is empty; record or download it again")
        index["row"] = np.argsort(np.argsort(index["row"], kind="stable"), kind="stable")
        if len(index["row"]) != total:
            raise ValueError(
                f"{self.root} should have {total} frames, its files have {len(index['row'])}: "
                "some are missing; record or download it again"
            )
        return index

    def columns(self) -> tuple[dict[str, np.ndarray], list[str]]:
        """Read state, action, episode, instruction and labels as arrays [N,...], and the distinct instructions.

        Returns:
            Arrays by name: `state` and `action` float32, `episode` int64, `instruction` int64 (index of the distinct
            instruction), `label/NAME`; and the distinct instructions.
        """
        mapping = self.mapping
        text_key = "task_index" if mapping.instruction == "task" else mapping.instruction
        keys = {"state": mapping.state, "action": mapping.action, "instruction": text_key}
        keys |= {f"label/{name}": key for name, key in mapping.labels}
        values = self._read(list(dict.fromkeys(keys.values())))
        order = np.argsort(self.index["row"])
        columns = {name: np.ascontiguousarray(values[key][order]) for name, key in keys.items()}
        columns["episode"] = self.index["episode"][order].astype(np.int64)
        for name, dim in (("state", mapping.state_dim), ("action", mapping.action_dim)):
            columns[name] = columns[name].reshape(-1, dim).astype(np.float32)
            self._check_finite(name, columns[name], order)
        distinct, ids = np.unique(columns["instruction"], return_inverse=True)
        columns["instruction"] = ids.astype(np.int64).reshape(-1)
        instructions = (
            [self._tasks[int(i)] for i in distinct] if text_key == "task_index" else [str(t) for t in distinct]
        )
        return columns, instructions

    def parts(self) -> Iterator[FrameGroup]:
        """Yield the frames of all cameras, in parts."""
        for view, key in enumerate(self.mapping.cameras):
            yield from self._video_parts(view, key) if self._kind(key) == "video" else self._image_parts(view)

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
        if part.timestamps is not None:
            chosen = np.ones(len(part.rows), bool) if only is None else np.isin(part.rows, list(only))
            timestamps = tuple(t for t, wanted in zip(part.timestamps, chosen, strict=True) if wanted)
            yield from self._decode_video(replace(part, rows=part.rows[chosen], timestamps=timestamps))
            return
        key = self.mapping.cameras[part.view]
        table = _parquet(part.source, [key], part.row_group, self._footer(part.source))
        for row, value in zip(part.rows, table.column(key), strict=True):
            if only is not None and row not in only:
                continue
            image = value.as_py()
            try:
                source = io.BytesIO(image["bytes"]) if image["bytes"] else self.root / image["path"]
                with Image.open(source) as opened:
                    frame_HWC = np.asarray(opened if opened.mode == "RGB" else opened.convert("RGB"))
            except (OSError, TypeError, SyntaxError) as error:  # PIL raises all of these on damaged files
                raise ValueError(
                    f"{part.source}: an image of {key!r} at frame {row} of the data set is damaged ({error}); "
                    "record or download it again"
                ) from error
            yield np.array([row]), frame_HWC.transpose(2, 0, 1)[None]

    def _decode_video(self, part: FrameGroup) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from lerobot.datasets.video_utils import decode_video_frames

        assert part.timestamps is not None
        tolerance = 0.5 / self.info["fps"]
        for start in range(0, len(part.rows), VIDEO_CHUNK):
            chosen = slice(start, start + VIDEO_CHUNK)
            try:
                frames = decode_video_frames(part.source, list(part.timestamps[chosen]), tolerance, backend="pyav")
            except Exception as error:  # pyav, torchvision and lerobot raise their own errors
                raise ValueError(
                    f"{part.source}: cannot decode episode {part.episode} ({type(error).__name__}: {error}); "
                    "record or download it again"
                ) from error
            yield part.rows[chosen], (frames * 255).round().byte().numpy()

    def _image_parts(self, view: int) -> Iterator[FrameGroup]:
        start = 0
        for path in self._data_files():
            metadata = self._footer(path)
            for group in range(metadata.num_row_groups):
                rows = self.index["row"][start : start + metadata.row_group(group).num_rows]
                yield FrameGroup(view, rows, path, group, None, int(self.index["episode"][start]) if len(rows) else 0)
                start += len(rows)

    def _video_parts(self, view: int, key: str) -> Iterator[FrameGroup]:
        names = ["episode_index", *(f"videos/{key}/{c}" for c in ("chunk_index", "file_index", "from_timestamp"))]
        for path in sorted((self.root / "meta" / "episodes").glob("*/*.parquet")):
            for episode, chunk, file, first in zip(*_parquet(path, names).to_pydict().values(), strict=True):
                source = self.root / self.info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
                if not source.is_file():
                    raise ValueError(f"{source} is missing; record or download the data set again")
                here = np.flatnonzero(self.index["episode"] == episode)
                timestamps = tuple(float(first + t) for t in self.index["timestamp"][here])
                yield FrameGroup(view, self.index["row"][here], source, None, timestamps, int(episode))

    def _kind(self, key: str) -> str:
        return str(self.features[key]["dtype"])

    @cached_property
    def _tasks(self) -> dict[int, str]:
        table = _parquet(self.root / "meta" / "tasks.parquet").to_pydict()
        text = next(name for name in table if name != "task_index")
        return dict(zip(table["task_index"], table[text], strict=True))

    @lru_cache(maxsize=64)  # noqa: B019  the reader lives no longer than its cache is needed
    def _footer(self, path: Path) -> pq.FileMetaData:
        """Read the footer once: a file has a row group per episode, and each is read separately."""
        return pq.read_metadata(path)

    def _data_files(self) -> list[Path]:
        return sorted((self.root / "data").glob("*/*.parquet"))

    def _read(self, keys: Sequence[str]) -> dict[str, np.ndarray]:
        tables = [_parquet(path, list(keys)) for path in self._data_files()]
        if not tables:
            raise ValueError(f"the data set in {self.root} is empty: it has no data files; record or download it again")
        table = pa.concat_tables(tables)
        return {key: self._array(table.column(key), key) for key in keys}

    def _array(self, column: pa.ChunkedArray, key: str) -> np.ndarray:
        shape = tuple(self.features[key]["shape"])
        values = column.combine_chunks()
        if self._kind(key) == "string":
            return np.asarray(values.to_pylist(), dtype=str)
        while not pa.types.is_primitive(values.type):
            values = values.storage if isinstance(values, pa.ExtensionArray) else values.flatten()
        array = values.to_numpy(zero_copy_only=False)
        if array.size != len(column) * int(np.prod(shape)):
            raise ValueError(f"{self.root}: {key!r} does not have shape {shape} in every frame")
        return array.reshape(len(column), *shape) if shape != (1,) else array

    def _check_keys(self) -> None:
        mapping, cameras = self.mapping, [k for k in self.features if self._kind(k) in ("image", "video")]
        for key in mapping.cameras:
            if key not in cameras:
                raise ValueError(f"the data set in {self.root} has no camera {key!r}; it has {', '.join(cameras)}")
        others = [key for key in self.features if key not in cameras]
        text = [] if mapping.instruction == "task" else [mapping.instruction]
        for key in (mapping.state, mapping.action, *(key for _, key in mapping.labels), *text):
            if key not in others:
                raise ValueError(f"the data set in {self.root} has no {key!r}; it has {', '.join(others)}")
        for name, key, dim in (
            ("state", mapping.state, mapping.state_dim),
            ("action", mapping.action, mapping.action_dim),
        ):
            shape = tuple(self.features[key]["shape"])
            if int(np.prod(shape)) != dim:
                raise ValueError(
                    f"{key!r} has shape {shape} in the data set in {self.root}, the embodiment's {name}_dim is {dim}; "
                    "choose the embodiment that was recorded, or another key"
                )

    def _check_finite(self, name: str, values_ND: np.ndarray, order: np.ndarray) -> None:
        bad = np.flatnonzero(~np.isfinite(values_ND).all(axis=1))
        if len(bad):
            episode, frame = self.index["episode"][order][bad[0]], self.index["frame"][order][bad[0]]
            raise ValueError(
                f"{name} has NaN or infinite values in {len(bad)} frames of {self.root}, first in episode {episode}, "
                f"frame {frame}; remove such episodes, or record them again"
            )


def _parquet(
    path: Path,
    columns: list[str] | None = None,
    row_group: int | None = None,
    footer: pq.FileMetaData | None = None,
) -> pa.Table:
    """Read columns of a parquet file, or of one of its row groups.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        file = pq.ParquetFile(path, metadata=footer)
        return file.read(columns) if row_group is None else file.read_row_group(row_group, columns)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); record or download the data set again") from error
