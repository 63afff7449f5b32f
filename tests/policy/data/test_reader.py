"""Data sets of others: what is read is what was recorded, or one line says what is wrong and where."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from cogvla.policy.interface import Camera, Embodiment
from cogvla.tests.support.lerobot_files import (
    CAMERA,
    CHUNK,
    FPS,
    ROBOT,
    SIZE,
    TASKS,
    assert_read,
    edit_info,
    open_data,
    picture,
    png,
    rows,
    table,
    video_file,
    what_is_read,
    what_is_recorded,
    write,
    write_v2,
    write_video,
)

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
Spoil = Callable[[Path], object]


def refused(root: Path, message: str, **settings: Any) -> None:
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


def data_file(root: Path, number: int = 0) -> Path:
    return root / f"data/chunk-000/file-{number:03d}.parquet"


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_all_versions_are_read(tmp_path: Path, version: str, video: bool) -> None:
    root = tmp_path / "toy"
    write(root, video=video) if version == "v3.0" else write_v2(root, version, video=video)
    data = open_data(root)
    assert_read(data, what_is_recorded())
    assert not data.notes


@pytest.mark.parametrize("version", ["v1.6", "v4.0", "None"])
def test_other_versions_are_refused(tmp_path: Path, version: str) -> None:
    edit_info(write(tmp_path / "toy"), codebase_version=version)
    refused(tmp_path / "toy", f"is a LeRobotDataset {version}; this package reads v2.0 to v3: convert it with lerobot")


# Videos and the list of episodes


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
            r"video_path must be a path with places for video_key, chunk_ind",
        ),
        (lambda root: edit_info(root, video_path="{nothing}.mp4"), r"info.json: video_path must be a path with places"),
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


# Rows, episodes and frames


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("order", ["index restarts", "interleaved", "backwards", "shuffled"])
def test_rows_are_ordered_by_episode_and_frame(tmp_path: Path, order: str, video: bool) -> None:
    given = rows(video=video)
    if order == "index restarts":
        given = [row | {"index": row["frame_index"]} for row in given]
    elif order == "interleaved":
        given = sorted(given, key=lambda row: (row["frame_index"], row["episode_index"]))
    elif order == "backwards":
        given = given[::-1]
    else:
        given = [given[i] for i in np.random.default_rng(0).permutation(len(given))]
    data = open_data(write(tmp_path / "toy", given=given, video=video, files=3))
    assert_read(data, what_is_recorded())


def _numbered(**changes: Mapping[int, int]) -> list[dict[str, Any]]:
    """Rows with other numbers: column -> row -> number."""
    given = rows()
    for column, numbers in changes.items():
        for row, number in numbers.items():
            given[row][column] = number
    return given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            _numbered(episode_index=dict.fromkeys(range(4, 7), 0)),
            "episode 0 has frame 0 twice: two episodes have the same",
        ),
        (_numbered(episode_index=dict.fromkeys(range(7, 12), 1)), "episode 1 has frame 0 twice"),
        (_numbered(frame_index={2: 1}), "episode 0 has frame 1 twice"),
        (_numbered(frame_index={2: 7}), "episode 0 has no frame 2, the next one is 3"),
        (_numbered(frame_index=dict(enumerate(range(1, 5)))), "episode 0 has no frame 0, the next one is 1"),
        (_numbered(frame_index={5: -1}), "'frame_index' holds -1 in row 5, which is no whole number from 0 up"),
        (rows()[:-1], "should have 12 frames, its files have 11: files are missing"),
        ([*rows(), rows()[-1]], "should have 12 frames, its files have 13"),
    ],
)
def test_frames_are_there_once(tmp_path: Path, given: list[dict[str, Any]], message: str) -> None:
    root = write(tmp_path / "toy", given=given, files=1)
    edit_info(root, total_frames=12)
    refused(root, message)


def test_old_files_beside_new_ones_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "toy")
    shutil.copy(data_file(root), data_file(root, 7))
    refused(root, "should have 12 frames, its files have 18: files are missing, or old and new ones are mixed")
    edit_info(root, total_frames=18)
    refused(root, "episode 0 has frame 0 twice: two episodes have the same number, or a file is there twice")


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    root = write(tmp_path / "toy", video=True)
    for path in [p for p in root.rglob("*") if p.suffix in (".parquet", ".mp4")]:
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    (root / ".cache").mkdir()
    shutil.copy(data_file(root), root / ".cache")
    assert_read(open_data(root), what_is_recorded())


@pytest.mark.parametrize(
    ("stamps", "said"),
    [
        (lambda row: row["timestamp"] * 0.8, "episode 0, frame 3: 0.240 s after the first one instead of 0.300 s"),
        (
            lambda row: row["frame_index"] / 30,
            "3 episodes do not fit the data set's 10 frames per second .episode 0, fra",
        ),
        (lambda row: float("nan"), "the time stamps of 3 episodes do not fit"),
        (lambda row: 5.0, "the time stamps of 3 episodes do not fit"),
    ],
)
@pytest.mark.parametrize("video", [False, True])
def test_frames_are_taken_by_number_not_by_stamp(
    tmp_path: Path, video: bool, stamps: Callable[[dict[str, Any]], float], said: str
) -> None:
    given = [row | {"timestamp": stamps(row)} for row in rows(video=video)]
    data = open_data(write(tmp_path / "toy", given=given, video=video))
    assert_read(data, what_is_recorded())
    assert len(data.notes) == 1

    assert re.search(said, data.notes[0])
    assert data.notes[0].endswith("frames are taken by their number")


def test_stamps_that_count_from_another_time_are_fine(tmp_path: Path) -> None:
    given = [row | {"timestamp": row["timestamp"] + 1000.01} for row in rows()]
    assert not open_data(write(tmp_path / "toy", given=given)).notes


def test_another_control_rate_is_said(tmp_path: Path) -> None:
    robot = Embodiment("arm", (Camera("front", SIZE, SIZE),), 2, 3, CHUNK, 20.0)
    (said,) = open_data(write(tmp_path / "toy"), robot).notes
    assert "has 10 frames per second, the embodiment's control_hz is 20: the policy will move faster or slower" in said


def test_one_picture_for_two_cameras_is_said(tmp_path: Path) -> None:
    cameras = (Camera("front", SIZE, SIZE), Camera("wrist", SIZE, SIZE))
    robot = Embodiment("arm", cameras, 2, 3, CHUNK, float(FPS))
    (said,) = open_data(write(tmp_path / "toy"), robot, cameras={"front": CAMERA, "wrist": CAMERA}).notes
    assert "data.cameras gives several cameras the same key" in said


# Instructions


def _tasks(root: Path, columns: Mapping[str, Any], pandas_index: list[str] | None = None) -> None:
    whole = pa.table(dict(columns))
    if pandas_index is not None:
        whole = whole.replace_schema_metadata({"pandas": json.dumps({"index_columns": pandas_index})})
    pq.write_table(whole, root / "meta/tasks.parquet")


NUMBERS, KIND, LEVEL = [0, 1], ["push", "lift"], ["easy", "hard"]


@pytest.mark.parametrize(
    ("columns", "pandas_index"),
    [
        ({"task_index": NUMBERS, "category": KIND, "task": TASKS}, None),
        ({"category": KIND, "task": TASKS, "task_index": NUMBERS, "__index_level_0__": LEVEL}, ["__index_level_0__"]),
        ({"task_index": NUMBERS, "difficulty": LEVEL, "__index_level_0__": TASKS}, None),
        ({"difficulty": LEVEL, "task_index": NUMBERS, "instruction": TASKS}, ["instruction"]),
        ({"task_index": pa.array(NUMBERS, pa.uint8()), "task": pa.array(TASKS).dictionary_encode()}, None),
        ({"task_index": [1.0, 0.0], "task": pa.array(TASKS[::-1], pa.large_string())}, None),
    ],
)
def test_the_text_of_a_task_is_found(
    tmp_path: Path, columns: Mapping[str, Any], pandas_index: list[str] | None
) -> None:
    root = write(tmp_path / "toy")
    _tasks(root, columns, pandas_index)
    assert_read(open_data(root), what_is_recorded())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"task_index": NUMBERS, "category": KIND, "level": LEVEL},
            r"it has task_index \(int64\), category \(string\), l",
        ),
        ({"task_index": NUMBERS, "category": KIND}, r"must have the columns task_index \(numbers\) and task \(texts\)"),
        ({"task_index": NUMBERS, "task": [5, 6], "__index_level_0__": TASKS}, r"task \(int64\), __index_level_0__"),
        ({"task": TASKS}, r"must have the columns task_index"),
        ({"task_index": [0, 0], "task": TASKS}, r"gives task_index 0 two texts"),
        ({"task_index": [0, 5], "task": TASKS}, r"no text for task_index 1"),
        ({"task_index": [0, None], "task": TASKS}, r"'task_index' has no value in row 1"),
        ({"task_index": NUMBERS, "task": [TASKS[0], None]}, r"'task' has no value in row 1"),
        ({"task_index": NUMBERS, "task": [TASKS[0], "  "]}, r"episode 1 has an empty instruction"),
        ({"task_index": [0.5, 1], "task": TASKS}, r"'task_index' holds 0.5 in row 0, which is no whole number"),
    ],
)
def test_doubtful_tasks_are_refused(tmp_path: Path, columns: Mapping[str, Any], message: str) -> None:
    root = write(tmp_path / "toy")
    _tasks(root, columns)
    refused(root, message)


def test_tasks_that_the_list_of_episodes_gives_otherwise_are_said(tmp_path: Path) -> None:
    root = write(tmp_path / "toy")
    _tasks(root, {"task_index": NUMBERS, "task": ["put the red cube away", TASKS[1]]})
    data = open_data(root)
    assert sorted(data.instructions) == [TASKS[1], "put the red cube away"]
    assert (
        "gives 2 episodes another task than meta/tasks, which decides (episode 0: ['push the red cube']"
        in data.notes[0]
    )


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.string())]
)
def test_a_column_of_texts_as_instruction(tmp_path: Path, kind: pa.DataType) -> None:
    root = write(tmp_path / "toy", files=1)
    said = [TASKS[row["task_index"]].upper() for row in rows()]
    edit_table(data_file(root), language=pa.array([[text] for text in said] if pa.types.is_list(kind) else said, kind))
    known = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=known | {"language": {"dtype": "string", "shape": [1]}})
    data = open_data(root, instruction_key="language")
    assert data.instructions == sorted({text.upper() for text in TASKS})
    assert [data.instructions[i] for i in data.instruction_N] == said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(range(12)), "'language' holds int64, not texts; choose another column"),
        (pa.array(["go"] * 11 + [None]), "'language' has no value in row 11"),
        (pa.array([["go"]] * 11 + [["go", "on"]]), "'language' holds 2 texts in row 11"),
        (pa.array(["go"] * 11 + [" "]), "episode 2 has an empty instruction"),
    ],
)
def test_doubtful_texts_are_refused(tmp_path: Path, values: pa.Array, message: str) -> None:
    root = write(tmp_path / "toy", files=1)
    edit_table(data_file(root), language=values)
    known = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=known | {"language": {"dtype": "string", "shape": [1]}})
    refused(root, message, instruction_key="language")


# Pictures


@pytest.mark.parametrize(
    "stored",
    [
        lambda image: png(image, format="BMP"),
        lambda image: png(np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])),
        lambda image: png(image[::-1, ::-1], format="TIFF", tiffinfo={274: 3}),
    ],
    ids=["bmp", "with alpha", "stored upside down"],
)
def test_pictures_of_eight_bits(tmp_path: Path, stored: Callable[[np.ndarray], bytes]) -> None:
    image = picture(0, 0).copy()
    image[: SIZE // 2] = 200
    given = [row | {CAMERA: {"bytes": stored(image), "path": None}} for row in rows()]
    data = open_data(write(tmp_path / "toy", given=given))
    assert np.array_equal(data.pixels_NVCHW[3, 0].permute(1, 2, 0), image)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (
            png(np.full((SIZE, SIZE), 1200, np.uint16)),
            r"'observation.images.front' at frame 5 .* no 8-bit picture \(mode I;16",
        ),
        (png(np.full((SIZE, SIZE), 0.5, np.float32), format="TIFF"), r"no 8-bit picture \(mode F,"),
        (png(np.full((SIZE, SIZE), 70000, np.int32), format="TIFF"), r"no 8-bit picture \(mode I,"),
        (png(picture(0, 0))[:50], r"the image of .* at frame 5 of the data set is damaged"),
        (b"", r"the image of .* at frame 5 .* is damaged"),
        (None, r"the image of .* at frame 5 of the data set is missing"),
    ],
)
def test_other_pictures_are_refused(tmp_path: Path, stored: bytes | None, message: str) -> None:
    given = rows()
    given[5][CAMERA] = {"bytes": stored, "path": None}
    refused(write(tmp_path / "toy", given=given), message)


def test_pictures_in_files_of_their_own(tmp_path: Path) -> None:
    given = rows()
    root = tmp_path / "toy"
    for number, row in enumerate(given):
        name = f"images/{number:03d}.png"
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(row[CAMERA]["bytes"])
        row[CAMERA] = {"bytes": None, "path": name}
    write(root, given=given)
    assert_read(open_data(root), what_is_recorded())
    (root / "images/004.png").unlink()
    refused(root, r"at frame 4 of the data set is damaged \(.*No such file")


# Numbers


@pytest.mark.parametrize(
    "types",
    [
        {"action": pa.list_(pa.float64())},
        {"action": pa.large_list(pa.float32()), "observation_state": pa.list_(pa.int64())},
        {"action": pa.list_(pa.float16(), 3), "episode_index": pa.int32(), "frame_index": pa.float64()},
        {"task_index": pa.uint8(), "timestamp": pa.float64(), "observation_state": pa.list_(pa.list_(pa.float32(), 1))},
        {"index": pa.string(), "observation_state": pa.list_(pa.decimal128(9, 2), 2)},
    ],
)
def test_files_of_other_types_are_read_alike(tmp_path: Path, types: Mapping[str, pa.DataType]) -> None:
    root = write(tmp_path / "toy", files=3)
    given = rows()[4:8]
    for row in given:
        row["index"] = str(row["index"]) if types.get("index") == pa.string() else row["index"]
        if "observation_state" in types and pa.types.is_nested(types["observation_state"].value_type):
            row["observation.state"] = [[value] for value in row["observation.state"]]
        if types.get("action") == pa.list_(pa.float16(), 3):
            row["action"] = [np.float16(value) for value in row["action"]]
        if "observation_state" in types and pa.types.is_decimal(types["observation_state"].value_type):
            row["observation.state"] = [int(value) for value in row["observation.state"]]
    pq.write_table(table(given, **types), data_file(root, 1))
    data = open_data(root)
    assert [frame.colour for frame in what_is_read(data)] == [frame.colour for frame in what_is_recorded()]
    np.testing.assert_allclose(data.action_NA, [frame.action for frame in what_is_recorded()], rtol=1e-3)
    np.testing.assert_allclose(data.state_NS, [frame.state for frame in what_is_recorded()])


def _action(row: int, value: Any, kind: pa.DataType) -> pa.Array:
    values = [list(r["action"]) for r in rows()]
    values[row] = value
    return pa.array(values, kind)


LIST = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_action(5, [0.0, 0.0], LIST), "'action': the lists differ in length: 3 numbers in row 0, 2 in row 5"),
        (_action(11, [], LIST), "'action': the lists differ in length: 3 numbers in row 0, 0 in row 11"),
        (_action(2, None, LIST), "'action' has no value in row 2"),
        (_action(7, None, pa.list_(pa.float32(), 3)), "'action' has no value in row 7"),
        (_action(3, [0.0, None, 0.0], LIST), r"'action' has no value in row 3 \(1 values are missing\)"),
        (pa.array([[0.0, 0.0]] * 12, LIST), r"'action' has 2 numbers per row, meta/info.json says shape \[3\]"),
        (pa.array(["0.1"] * 12), "'action' holds string, not numbers; choose another column"),
        (pa.array([["a", "b", "c"]] * 12), "'action' holds list<.*: string>, not numbers"),
        (pa.array([{"x": 1.0}] * 12), "'action' holds struct<x: double>, not numbers"),
        (pa.array([[1e300] * 3] * 12, pa.list_(pa.float64())), "action has NaN or infinite values in 12 frames"),
        (
            _action(8, [0.0, np.nan, 0.0], LIST),
            "action has NaN or infinite values in 1 frames .* first in episode 2, frame 1",
        ),
    ],
)
def test_doubtful_numbers_are_refused(tmp_path: Path, values: pa.Array, message: str) -> None:
    root = write(tmp_path / "toy", files=1)
    edit_table(data_file(root), action=values)
    refused(root, message)


@pytest.mark.parametrize(
    "column", ["action", "observation.state", "episode_index", "frame_index", "task_index", CAMERA]
)
def test_a_column_that_a_file_lacks(tmp_path: Path, column: str) -> None:
    root = write(tmp_path / "toy")
    whole = pq.read_table(data_file(root, 1))
    pq.write_table(whole.drop_columns([column]), data_file(root, 1))
    refused(root, rf"file-001.parquet has no column '{column}'; it has ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "info.json: fps must be a number, it is null; correct it, or record"),
        ({"fps": "fast"}, 'fps must be a number, it is "fast"'),
        ({"fps": 0}, "fps must be positive, it is 0"),
        ({"fps": [10]}, r"fps must be a number, it is \[10\]"),
        ({"total_frames": None}, "total_frames must be a whole number, it is null"),
        ({"total_frames": 12.5}, "total_frames must be a whole number, it is 12.5"),
        ({"total_frames": True}, "total_frames must be a whole number, it is true"),
        ({"total_frames": 99}, "should have 99 frames, its files have 12"),
        ({"total_episodes": 4}, "should have 4 episodes, its files have 3"),
        ({"total_episodes": "many"}, "total_episodes must be a whole number"),
        ({"features": None}, "features must be a mapping of columns, it is null"),
        ({"features": []}, r"features must be a mapping of columns, it is \[\]"),
        ({"features": {"action": None}}, "features.action must be a mapping with dtype and shape"),
        ({"features": {"action": {"shape": [3]}}}, "features.action must be a mapping with dtype and shape"),
        (
            {"features": {"action": {"dtype": "float32", "shape": None}}},
            "features.action.shape must be a list of whole nu",
        ),
        (
            {"features": {"action": {"dtype": "float32", "shape": ["x"]}}},
            r"action.shape must be a list .* is \[\"x\"\]",
        ),
        ({"features": {"action": {"dtype": "float32", "shape": {"n": 3}}}}, "features.action.shape must be a list"),
    ],
)
def test_doubtful_metadata_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    edit_info(write(tmp_path / "toy"), **changes)
    refused(tmp_path / "toy", message)


@pytest.mark.parametrize("changes", [{"fps": "10"}, {"fps": 10.0}, {"total_frames": "12"}, {"total_frames": 12.0}])
def test_numbers_of_another_type_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    edit_info(write(tmp_path / "toy"), **changes)
    assert_read(open_data(tmp_path / "toy"), what_is_recorded())


# Parts of a data set, and several columns


def test_several_columns_in_a_row(tmp_path: Path) -> None:
    robot = Embodiment("arm", ROBOT.cameras, 5, 4, CHUNK, float(FPS))
    root = write(tmp_path / "toy", files=1)
    edit_table(data_file(root), gripper=pa.array([row["frame_index"] % 2 for row in rows()]))
    known = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=known | {"gripper": {"dtype": "int64", "shape": [1]}})
    data = open_data(root, robot, state=("action", "observation.state"), action=("action", "gripper"))
    expected = what_is_recorded()
    np.testing.assert_allclose(data.state_NS, [frame.action + frame.state for frame in expected], rtol=1e-6)
    np.testing.assert_allclose(data.action_NA, [(*frame.action, frame.state[1] % 2) for frame in expected], rtol=1e-6)
    refused(
        root,
        r"'action' has shape \(3,\) and 'gripper' has shape \(1,\) .* action_dim is 3",
        action=("action", "gripper"),
    )
    refused(root, "has no 'nothing'", state=("observation.state", "nothing"))
    for wrong in ((), ("action", 3), {"a": "b"}):
        refused(root, "data.state must be a key of the data set, or a list of keys", state=wrong)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize(
    ("wanted", "episodes"),
    [((0, 2), [0, 2]), ((5, 1), [1, 5]), ("1:3", [1, 2]), (":2", [0, 1]), ("4:", [4, 5]), (1.0, list(range(6)))],
)
def test_chosen_episodes(tmp_path: Path, wanted: Any, episodes: list[int], video: bool) -> None:
    lengths = (4, 3, 5, 2, 3, 4)
    data = open_data(write(tmp_path / "toy", lengths, video=video), episodes=wanted)
    expected = [frame for frame in what_is_recorded(lengths) if frame.state[0] in episodes]
    assert_read(data, expected, [lengths[episode] for episode in episodes])
    assert data.provenance["episodes"] == len(episodes)


def test_shares_are_parts_of_larger_shares(tmp_path: Path) -> None:
    root = write(tmp_path / "toy", (2,) * 6)
    chosen = [set(open_data(root, episodes=share).episode_N.tolist()) for share in (0.1, "34%", 0.5, 1.0)]
    assert [len(part) for part in chosen] == [1, 2, 3, 6]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((0, 3), r"data.episodes=\[0, 3\] is not in the data set, which has 3 episodes, 0 to 2"),
        ("0:9", "data.episodes=0:9 is not in the data set"),
        ("3:", "data.episodes=3: is not in the data set"),
        ((1, 1), r"names an episode twice: \[1, 1\]"),
        (2, r"cannot understand 2; give a list such as \[0,3,5\], a range such as 0:50, or a share such as 0.1 or 10%"),
        ("2:1", "cannot understand '2:1'"),
        (1.5, "cannot understand 1.5"),
        ("half", "cannot understand 'half'"),
        ((), "cannot understand"),
        ((-1,), "cannot understand"),
        (True, "cannot understand True"),
    ],
)
def test_episodes_that_are_not_there(tmp_path: Path, wanted: Any, message: str) -> None:
    refused(write(tmp_path / "toy"), message, episodes=wanted)


# The cache


@pytest.mark.parametrize("spoil", ["tasks", "episodes", "action", "picture", "cut"])
def test_only_frames_are_kept(tmp_path: Path, spoil: str) -> None:
    """Whatever is corrected in a data set is seen, also if the file keeps its size and its time."""
    root = write(tmp_path / "toy", files=1)
    pq.write_table(pq.read_table(data_file(root)), data_file(root), compression="none", use_dictionary=False)
    assert_read(open_data(root), what_is_recorded())
    stat = data_file(root).stat()
    if spoil == "tasks":
        _tasks(root, {"task_index": NUMBERS, "task": ["corrected", TASKS[1]]})
        assert open_data(root).instructions == ["corrected", TASKS[1]]
    elif spoil == "episodes":
        edit_table(root / EPISODES, length=[4, 3, 6])
        refused(root, "episode 2 has 6 frames")
    elif spoil == "action":
        edit_table(data_file(root), action=_action(0, [9.0, 9.0, 9.0], pa.list_(pa.float32(), 3)))
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
        (frames,) = (tmp_path / "cache").glob("*.u8")
        frames.write_bytes(frames.read_bytes()[:1000])
        assert_read(open_data(root), what_is_recorded())


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a" / "toy"), write_v2(tmp_path / "b" / "toy")
    other = write(tmp_path / "c" / "toy", given=[row | {"action": [0.0, 0.0, 0.0]} for row in rows()])
    prints = [open_data(root).provenance["fingerprint"] for root in (first, second, other)]
    assert prints[0] == prints[1] != prints[2]


# The hub


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

    def offline(self: HfApi, repo_id: str, **_: object) -> Answer:
        raise OSError("no network")

    monkeypatch.setattr(HfApi, "repo_info", offline)
    assert open_data(root, repo_id="someone/toy").provenance["revision"] == "a" * 40
    assert open_data(root, repo_id="someone/toy", revision="a" * 40).provenance["revision"] == "a" * 40
    refused(
        root, "cannot get the data set 'someone/toy' from the hub: no network", repo_id="someone/toy", revision="b" * 40
    )
    refused(tmp_path / "nothing", "cannot get the data set 'someone/toy'", repo_id="someone/toy")
    assert_read(open_data(source, repo_id="someone/toy"), what_is_recorded())


def test_a_hub_that_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(
        tmp_path / "nothing", "cannot get the data set 'someone/toy' from the hub: .*[Oo]ffline", repo_id="someone/toy"
    )
    assert issubclass(HfHubHTTPError, OSError)
