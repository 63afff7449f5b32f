"""A tiny LeRobotDataset written by hand, so that a test can spoil one thing, and what must be read from it.

Red and green of each frame's picture, its state and its action are made of the numbers of its episode and frame, so
that a picture, an instruction or a chunk of another frame is seen.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from av.video.stream import VideoStream
from PIL import Image

from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.interface import Camera, Embodiment
from cogvla.tests.support.pixels import pixels_of

CAMERA = "observation.images.front"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
SIZE, FPS, CHUNK = 16, 10, 3
LENGTHS = (4, 3, 5)
TASKS = ("push the red cube", "lift the blue cube")
ROBOT = Embodiment("arm", (Camera("front", SIZE, SIZE),), 2, 3, CHUNK, float(FPS))


@dataclass(frozen=True)
class Frame:
    """What a frame must be read as: episode, frame, colour of its picture, state, action, instruction."""

    colour: tuple[int, int]
    state: tuple[float, ...]
    action: tuple[float, ...]
    text: str


def colour(episode: int, frame: int) -> tuple[int, int]:
    return 40 * episode + 20, 30 * frame + 20


def picture(episode: int, frame: int) -> np.ndarray:
    red, green = colour(episode, frame)
    return np.full((SIZE, SIZE, 3), (red, green, 100), np.uint8)


def png(image: np.ndarray, **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, how.pop("format", "PNG"), **how)
    return buffer.getvalue()


def task_of(episode: int) -> int:
    return episode % len(TASKS)


def what_is_recorded(lengths: Sequence[int] = LENGTHS) -> list[Frame]:
    """Return all frames in the order of episode and frame."""
    return [
        Frame(colour(e, f), (e, f), (e / 10, f / 100, 0.5), TASKS[task_of(e)])
        for e, n in enumerate(lengths)
        for f in range(n)
    ]


def rows(lengths: Sequence[int] = LENGTHS, video: bool = False) -> list[dict[str, Any]]:
    """Return the rows of the data files, one after the other."""
    found: list[dict[str, Any]] = []
    for episode, length in enumerate(lengths):
        for frame in range(length):
            row = {} if video else {CAMERA: {"bytes": png(picture(episode, frame)), "path": None}}
            found.append(
                row
                | {
                    "observation.state": [float(episode), float(frame)],
                    "action": [episode / 10, frame / 100, 0.5],
                    "timestamp": frame / FPS,
                    "frame_index": frame,
                    "episode_index": episode,
                    "index": len(found),
                    "task_index": task_of(episode),
                }
            )
    return found


SCHEMA = {
    CAMERA: pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "observation.state": pa.list_(pa.float32(), 2),
    "action": pa.list_(pa.float32(), 3),
    "timestamp": pa.float32(),
    "frame_index": pa.int64(),
    "episode_index": pa.int64(),
    "index": pa.int64(),
    "task_index": pa.int64(),
}


def table(given: Sequence[dict[str, Any]], **types: pa.DataType) -> pa.Table:
    """Return rows as a table; `types`: other types of columns, with `_` for `.`."""
    known = {name.replace(".", "_"): name for name in SCHEMA}
    chosen = SCHEMA | {known[name]: kind for name, kind in types.items()}
    return pa.table({name: pa.array([row[name] for row in given], chosen[name]) for name in given[0]})


def write_video(path: Path, pictures: Sequence[np.ndarray], fps: float = FPS, **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1000))
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "rgb24"
        stream.options = {"crf": "0", "g": "2", **options}
        for image in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())


def video_file(root: Path, number: int = 0) -> Path:
    return root / f"videos/{CAMERA}/chunk-000/file-{number:03d}.mp4"


def write(
    root: Path,
    lengths: Sequence[int] = LENGTHS,
    video: bool = False,
    given: Sequence[dict[str, Any]] | None = None,
    files: int = 2,
    row_group: int = 3,
) -> Path:
    """Write a data set of version 3; `given`: the rows, instead of those of `rows`."""
    given = rows(lengths, video) if given is None else given
    for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / folder).mkdir(parents=True)
    for number, part in enumerate(np.array_split(np.arange(len(given)), files)):
        path = root / f"data/chunk-000/file-{number:03d}.parquet"
        pq.write_table(table([given[i] for i in part]), path, row_group_size=row_group)
    tasks = {"task_index": list(range(len(TASKS))), "__index_level_0__": list(TASKS)}
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")
    starts = np.cumsum([0, *lengths])
    episodes: dict[str, Any] = {
        "episode_index": list(range(len(lengths))),
        "length": list(lengths),
        "tasks": [[TASKS[task_of(e)]] for e in range(len(lengths))],
    }
    if video:
        episodes |= {
            f"videos/{CAMERA}/chunk_index": [0] * len(lengths),
            f"videos/{CAMERA}/file_index": [0] * len(lengths),
            f"videos/{CAMERA}/from_timestamp": (starts[:-1] / FPS).tolist(),
            f"videos/{CAMERA}/to_timestamp": (starts[1:] / FPS).tolist(),
        }
        write_video(video_file(root), [picture(e, f) for e, n in enumerate(lengths) for f in range(n)])
    pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    info = {
        "codebase_version": "v3.0",
        "robot_type": "arm",
        "total_episodes": len(lengths),
        "total_frames": len(given),
        "total_tasks": len(TASKS),
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(lengths)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features(video),
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=1))
    return root


def write_v2(root: Path, version: str = "v2.0", lengths: Sequence[int] = LENGTHS, video: bool = False) -> Path:
    """Write a data set of version 2: a file per episode, and lists as lines of JSON."""
    for folder in ("data/chunk-000", "meta"):
        (root / folder).mkdir(parents=True)
    given = rows(lengths, video)
    for episode in range(len(lengths)):
        mine = [row for row in given if row["episode_index"] == episode]
        pq.write_table(table(mine), root / f"data/chunk-000/episode_{episode:06d}.parquet")
        if video:
            path = root / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4"
            write_video(path, [picture(episode, f) for f in range(lengths[episode])])
    lines = [{"episode_index": e, "tasks": [TASKS[task_of(e)]], "length": n} for e, n in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {
        "codebase_version": version,
        "total_episodes": len(lengths),
        "total_frames": len(given),
        "chunks_size": 1000,
        "fps": FPS,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features(video),
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def features(video: bool) -> dict[str, Any]:
    sizes = {"observation.state": [2], "action": [3]}
    numbers = {
        name: {"dtype": "float32" if name in sizes or name == "timestamp" else "int64", "shape": sizes.get(name, [1])}
        for name in SCHEMA
        if name != CAMERA
    }
    return {CAMERA: {"dtype": "video" if video else "image", "shape": [SIZE, SIZE, 3]}, **numbers}


def edit_info(root: Path, **changes: Any) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def open_data(root: Path, robot: Embodiment = ROBOT, **changes: Any) -> DemonstrationData:
    """Open it as training does."""
    settings = {"cameras": {"front": CAMERA}, "root": str(root), "cache": str(root.parent / "cache")}
    return DemonstrationData.open(DataConfig(**{**settings, **changes}), robot, progress=False)


def what_is_read(data: DemonstrationData) -> list[Frame]:
    """Return all frames as training sees them."""
    colours = pixels_of(data)[:, 0, :2].float().mean((2, 3)).round().int().tolist()
    columns = zip(colours, data.state_NS.tolist(), data.action_NA.tolist(), data.instruction_N.tolist(), strict=True)
    return [
        Frame((red, green), tuple(state), tuple(action), data.instructions[text])
        for (red, green), state, action, text in columns
    ]


def assert_read(data: DemonstrationData, expected: Sequence[Frame], lengths: Sequence[int] = LENGTHS) -> None:
    """Check that these frames are read, and that chunks end where the episodes end."""
    found = what_is_read(data)
    assert len(found) == len(expected)
    for mine, wanted in zip(found, expected, strict=True):
        assert mine.text == wanted.text
        assert mine.colour == wanted.colour
        np.testing.assert_allclose(mine.state + mine.action, wanted.state + wanted.action, rtol=1e-6)
    batch = TrainingBatches(data, 1, 0).columns(torch.arange(len(data)))
    places = [(n, frame) for n in lengths for frame in range(n)]
    for row, (length, frame) in enumerate(places):
        left = min(CHUNK, length - frame)
        chunk = [expected[row + min(step, left - 1)].action for step in range(CHUNK)]
        np.testing.assert_allclose(batch["actions"][row], chunk, rtol=1e-6)
        assert batch["action_is_pad"][row].tolist() == [step >= left for step in range(CHUNK)]


def refused(root: Path, message: str, **settings: Any) -> None:
    """Check that a data set is refused in one line that matches."""
    with pytest.raises((ValueError, OSError), match=message) as caught:
        open_data(root, **settings)
    assert "\n" not in str(caught.value)


def edit_table(path: Path, **columns: Any) -> None:
    """Change columns of a parquet file: values, a function of the values, or None to drop the column; `_` for `/`."""
    whole = pq.read_table(path)
    for given, change in columns.items():
        name = next((n for n in whole.column_names if n.replace("/", "_").replace(".", "_") == given), given)
        if change is None:
            whole = whole.drop_columns([name])
            continue
        values = change(whole[name].to_pylist()) if callable(change) else change
        array = values if isinstance(values, pa.Array) else pa.array(values)
        if name in whole.column_names:
            whole = whole.set_column(whole.column_names.index(name), name, array)
        else:
            whole = whole.append_column(name, array)
    pq.write_table(whole, path)


def write_tasks(root: Path, columns: Mapping[str, Any], pandas_index: list[str] | None = None) -> None:
    """Replace the file of the tasks by one with these columns and this index as pandas notes it."""
    whole = pa.table(dict(columns))
    if pandas_index is not None:
        whole = whole.replace_schema_metadata({"pandas": json.dumps({"index_columns": pandas_index})})
    pq.write_table(whole, root / "meta/tasks.parquet")


def with_action(row: int, value: Any, kind: pa.DataType) -> pa.Array:
    """Return the column of actions with another value in one row."""
    values = [list(r["action"]) for r in rows()]
    values[row] = value
    return pa.array(values, kind)


def data_file(root: Path, number: int = 0) -> Path:
    return root / f"data/chunk-000/file-{number:03d}.parquet"
