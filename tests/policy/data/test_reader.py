"""Data sets of others: rows, pictures and numbers are those of the files, or one line says what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cogvla.policy.interface import Camera, Embodiment
from cogvla.tests.support.lerobot_files import (
    CAMERA,
    CHUNK,
    FPS,
    ROBOT,
    SIZE,
    assert_read,
    data_file,
    edit_info,
    edit_table,
    open_data,
    picture,
    png,
    refused,
    rows,
    table,
    what_is_read,
    what_is_recorded,
    with_action,
    write,
    write_v2,
)
from cogvla.tests.support.pixels import pixels_of


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


@pytest.mark.parametrize("per_row", [0, 2])
def test_lists_of_stamps_are_refused(tmp_path: Path, per_row: int) -> None:
    root = write(tmp_path / "toy", files=1)
    lists = pa.array([[row["timestamp"]] * per_row for row in rows()], pa.list_(pa.float32()))
    edit_table(data_file(root), timestamp=lists)
    refused(root, rf"'timestamp' has {per_row} numbers per row, meta/info.json says shape \[1\]")


def test_stamps_in_lists_of_one_are_checked(tmp_path: Path) -> None:
    root = write(tmp_path / "toy", files=1)
    edit_table(data_file(root), timestamp=[[row["timestamp"] * 0.8] for row in rows()])
    assert "do not fit the data set's 10 frames per second" in open_data(root).notes[0]


def test_another_control_rate_is_said(tmp_path: Path) -> None:
    robot = Embodiment("arm", (Camera("front", SIZE, SIZE),), 2, 3, CHUNK, 20.0)
    (said,) = open_data(write(tmp_path / "toy"), robot).notes
    assert "has 10 frames per second, the embodiment's control_hz is 20: the policy will move faster or slower" in said


def test_one_picture_for_two_cameras_is_said(tmp_path: Path) -> None:
    cameras = (Camera("front", SIZE, SIZE), Camera("wrist", SIZE, SIZE))
    robot = Embodiment("arm", cameras, 2, 3, CHUNK, float(FPS))
    (said,) = open_data(write(tmp_path / "toy"), robot, cameras={"front": CAMERA, "wrist": CAMERA}).notes
    assert "data.cameras gives several cameras the same key" in said


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
    assert np.array_equal(pixels_of(data)[3, 0].permute(1, 2, 0), image)


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
        (
            png(np.zeros((SIZE, 2 * SIZE, 3), np.uint8)),
            rf"at frame 5 .* has {SIZE} x {2 * SIZE} pixels, meta/info.json says",
        ),
    ],
)
def test_other_pictures_are_refused(tmp_path: Path, stored: bytes | None, message: str) -> None:
    given = rows()
    given[5][CAMERA] = {"bytes": stored, "path": None}
    refused(write(tmp_path / "toy", given=given), message)


def test_a_video_of_another_size_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "toy", video=True)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][CAMERA]["shape"] = [SIZE, 2 * SIZE, 3]
    (root / "meta/info.json").write_text(json.dumps(info))
    refused(root, rf"file-000.mp4 has {SIZE} x {SIZE} pixels, meta/info.json says shape \[{SIZE}, {2 * SIZE}, 3\]")


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


LIST = pa.list_(pa.float32())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (with_action(5, [0.0, 0.0], LIST), "'action': the lists differ in length: 3 numbers in row 0, 2 in row 5"),
        (with_action(11, [], LIST), "'action': the lists differ in length: 3 numbers in row 0, 0 in row 11"),
        (with_action(2, None, LIST), "'action' has no value in row 2"),
        (with_action(7, None, pa.list_(pa.float32(), 3)), "'action' has no value in row 7"),
        (with_action(3, [0.0, None, 0.0], LIST), r"'action' has no value in row 3 \(1 values are missing\)"),
        (pa.array([[0.0, 0.0]] * 12, LIST), r"'action' has 2 numbers per row, meta/info.json says shape \[3\]"),
        (pa.array(["0.1"] * 12), "'action' holds string, not numbers; choose another column"),
        (pa.array([["a", "b", "c"]] * 12), "'action' holds list<.*: string>, not numbers"),
        (pa.array([{"x": 1.0}] * 12), "'action' holds struct<x: double>, not numbers"),
        (pa.array([[1e300] * 3] * 12, pa.list_(pa.float64())), "action has NaN or infinite values in 12 frames"),
        (
            with_action(8, [0.0, np.nan, 0.0], LIST),
            "action has NaN or infinite values in 1 frames .* first in episode 2, frame 1",
        ),
    ],
)
def test_doubtful_numbers_are_refused(tmp_path: Path, values: pa.Array, message: str) -> None:
    root = write(tmp_path / "toy", files=1)
    edit_table(data_file(root), action=values)
    refused(root, message)


def test_a_label_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "toy", files=1)
    robot = replace(ROBOT, action_dim=2, action_normalise_mask=())
    open_data(root, labels={"any": "action"})
    edit_table(data_file(root), action=with_action(8, [0.0, np.nan, 0.0], LIST))
    with pytest.raises(ValueError, match=r"'action' has NaN or infinite values in 1 frames .* episode 2, frame 1"):
        open_data(root, action="observation.state", labels={"any": "action"}, robot=robot)


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
