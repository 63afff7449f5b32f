"""Write demonstrations as a LeRobotDataset v3, with lerobot's own metadata, schema and statistics.

Images do not pass through the disk here. lerobot's `add_frame` writes a PNG file for each image; `save_episode` reads
all files for the statistics, and again to embed them: 1.0 s of one core for an episode of 60 frames and two views. Here
the workers encode the PNG files, and they go into the table unchanged, in 0.05 s. A test compares the two ways. Videos
are written by lerobot.

Shape legend: T steps.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.features.features import numpy_to_pyarrow_listarray
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from PIL import Image

from cogvla.envs.recording.demonstration import Demonstration
from cogvla.envs.recording.label_names import label_names
from cogvla.lerobot_versions import (
    DEFAULT_FEATURES,
    LeRobotDataset,
    compute_episode_stats,
    encoding,
    episode_buffer,
    get_hf_features_from_features,
    update_chunk_file_indices,
)

VIDEO_CODEC = "h264"  # decodes everywhere; libsvtav1, lerobot's default, takes three times as long to encode
BYTES_PER_MB = 1024**2


def features(
    episode: Demonstration, video: bool, names: Mapping[str, Sequence[str]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return lerobot's description of an episode's features; `names` are those of the numbers of some features."""
    names = names or {}
    kind = "video" if video else "image"
    return {
        camera: {"dtype": kind, "shape": episode.image_shape(camera), "names": ["height", "width", "channels"]}
        for camera in episode.images
    } | {
        name: {
            "dtype": str(array.dtype),
            "shape": array.shape[1:],
            "names": list(names[name]) if name in names else label_names(name, array.shape[1]),
        }
        for name, array in episode.arrays.items()
    }


class DatasetWriter:
    """Writer that appends episodes to a new data set.

    Args:
        root: folder of the data set; must not exist yet.
        repo_id: name of the data set.
        example: episode with the features and the control rate of all episodes.
        robot_type: name of the robot.
        video: True stores the cameras as videos, False as images.
        names: feature -> names of its numbers, such as those of joints; labels have names already.
    """

    def __init__(
        self,
        root: Path,
        repo_id: str,
        example: Demonstration,
        robot_type: str,
        video: bool = False,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.video = video
        self._bars_were_enabled = is_progress_bar_enabled()
        disable_progress_bar()  # a bar for each episode would disturb ours
        self._dataset = LeRobotDataset.create(
            repo_id,
            example.fps,
            features(example, video, names),
            root=root,
            robot_type=robot_type,
            use_videos=video,
            **encoding(VIDEO_CODEC),
            streaming_encoding=video,
            encoder_queue_maxsize=0,  # unbounded: lerobot drops frames when the queue is full
            video_backend="pyav",
        )
        self._schema: pa.Schema = get_hf_features_from_features(self._dataset.features).arrow_schema
        self._writer: pq.ParquetWriter | None = None
        self._chunk = self._file = self._bytes = 0

    def add(self, episode: Demonstration) -> None:
        """Append one episode; OSError if it cannot be written."""
        if self.video:
            self._add_video(episode)
        else:
            self._add_images(episode)

    def close(self) -> None:
        """Write buffered data and the footers. Without this call the data set cannot be read."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._dataset.finalize()
        if self._bars_were_enabled:
            enable_progress_bar()

    def _add_images(self, episode: Demonstration) -> None:
        meta = self._dataset.meta
        meta.save_episode_tasks([episode.instruction])
        task = meta.get_task_index(episode.instruction)
        length, index, first = len(episode), meta.total_episodes, meta.total_frames
        numeric: dict[str, Any] = {
            name: array[:, 0] if array.shape[1:] == (1,) else array for name, array in episode.arrays.items()
        } | {
            "timestamp": np.arange(length) / meta.fps,
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": np.arange(first, first + length),
            "task_index": np.full(length, task),
        }
        images = {
            camera: [{"bytes": file, "path": f"frame-{i:06d}.png"} for i, file in enumerate(files)]
            for camera, files in episode.images.items()
        }
        columns = images | numeric
        table = pa.Table.from_arrays([_column(f.type, columns[f.name]) for f in self._schema], schema=self._schema)
        size = sum(len(file) for files in episode.images.values() for file in files)
        if self._bytes and self._bytes + size > meta.data_files_size_in_mb * BYTES_PER_MB:
            assert self._writer is not None
            self._writer.close()
            self._writer, self._bytes = None, 0
            self._chunk, self._file = update_chunk_file_indices(self._chunk, self._file, meta.chunks_size)
        if self._writer is None:
            path = meta.root / meta.data_path.format(chunk_index=self._chunk, file_index=self._file)
            path.parent.mkdir(parents=True, exist_ok=True)
            # As in lerobot, but without statistics of images, which would put two images per episode into the footer.
            self._writer = pq.ParquetWriter(
                path,
                table.schema,
                compression="snappy",
                use_dictionary=list(DEFAULT_FEATURES),
                write_statistics=list(DEFAULT_FEATURES),
            )
        self._writer.write_table(table)
        self._bytes += size
        counted = {name: array.astype(np.uint8) if array.dtype == bool else array for name, array in numeric.items()}
        statistics = compute_episode_stats(counted, meta.features)
        for camera, values in episode.image_statistics.items():
            statistics[camera] = {k: v if k == "count" else (v / 255.0)[:, None, None] for k, v in values.items()}
        where = {
            "data/chunk_index": self._chunk,
            "data/file_index": self._file,
            "dataset_from_index": first,
            "dataset_to_index": first + length,
        }
        meta.save_episode(index, length, [episode.instruction], statistics, where)

    def _add_video(self, episode: Demonstration) -> None:
        for step in range(len(episode)):
            frame: dict[str, Any] = {name: array[step] for name, array in episode.arrays.items()}
            for camera, files in episode.images.items():
                with Image.open(io.BytesIO(files[step])) as image:
                    frame[camera] = np.asarray(image.convert("RGB"))
            self._dataset.add_frame(frame | {"task": episode.instruction})
        buffer = episode_buffer(self._dataset)
        for name, array in episode.arrays.items():
            if array.shape[1:] == (1,):  # lerobot 0.4.4 cannot turn one-element arrays into numbers with numpy 2.4
                buffer[name] = [value.item() for value in buffer[name]]
        try:
            self._dataset.save_episode()
        except RuntimeError as error:  # of lerobot's thread that encodes
            raise OSError(errno.EIO, f"a video cannot be written: {error}") from error


def _column(kind: pa.DataType, values: Any) -> pa.Array:
    """Convert images (dicts) or an array [T] or [T,D] to a column of the given type."""
    if not isinstance(values, np.ndarray):
        return pa.array(values, kind)
    return (numpy_to_pyarrow_listarray(values) if values.ndim > 1 else pa.array(values)).cast(kind)
