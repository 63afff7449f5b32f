"""One random change to the files of a valid data set: it is read as its files say, or one line says what is wrong."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogvla.tests.support.lerobot_files import (
    CAMERA,
    LENGTHS,
    TASKS,
    Frame,
    assert_read,
    colour,
    open_data,
    picture,
    png,
    what_is_recorded,
    write,
    write_v2,
)

CHANGES = 500
"""Number of changes to each of the four data sets."""
VALUES: list[Any] = [None, "", "x", "7", -1, 0, 1, 2, 3, 7, 10.0, 1.5, math.nan, math.inf, 10**30, True, [], {}, [None]]
VALUES += [
    [1],
    [2],
    [3],
    [1, 2],
    [16, 16, 3],
    ["2"],
    {"dtype": "float32"},
    "v2.1",
    "v3.1",
    "v1.6",
    "image",
    "video",
    "{x}",
]
KINDS = [pa.float64(), pa.float32(), pa.int32(), pa.int64(), pa.uint8(), pa.string(), pa.large_string(), pa.bool_()]
KINDS += [pa.dictionary(pa.int32(), pa.string()), pa.list_(pa.float32()), pa.list_(pa.float64()), pa.float16()]
KINDS += [pa.large_list(pa.float32()), pa.list_(pa.float32(), 2), pa.list_(pa.float64(), 3), pa.list_(pa.string())]
FREE = {"observation.state", "action", CAMERA, "task_index"}
"""Columns whose values only the data files know."""


@pytest.fixture(scope="module", params=["images", "videos", "images of v2", "videos of v2"])
def valid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    video, old = request.param.startswith("videos"), request.param.endswith("v2")
    return (write_v2 if old else write)(tmp_path_factory.mktemp("valid") / "toy", video=video)


def test_it_is_read_as_its_files_say_or_refused(valid: Path, tmp_path: Path) -> None:
    read = refused = 0

    @settings(
        max_examples=CHANGES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.randoms(use_true_random=False))
    def change_one_thing(draw: random.Random) -> None:
        nonlocal read, refused
        root = tmp_path / "changed"
        for folder in (root, tmp_path / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(valid, root)
        expected = what_is_recorded()
        draw.choice([change_json, change_table, change_table, change_table, change_files])(draw, root, expected)
        data = said = None
        try:
            data = open_data(root)
        except (ValueError, OSError) as error:
            said = str(error)
        if data is not None:
            read += 1
            assert_read(data, expected)
        else:
            refused += 1
            assert said
            assert "\n" not in said
            assert len(said) < 700

    change_one_thing()
    assert read > CHANGES // 10, "many changes do not matter"
    assert refused > CHANGES // 10, "many changes do"


def change_json(draw: random.Random, root: Path, expected: list[Frame]) -> None:
    """Change one value of info.json or of a line of a .jsonl file, or take it out."""
    path = draw.choice(sorted(p for p in (root / "meta").iterdir() if p.suffix in (".json", ".jsonl")))
    if path.suffix == ".json":
        body = json.loads(path.read_text())
        _change_value(draw, body)
        path.write_text(json.dumps(body))
        return
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = draw.randrange(len(lines))
    how = draw.choice(["value", "value", "value", "text", "twice", "without"])
    if how == "text" and path.stem == "tasks":
        lines[number]["task"] = "another text"
        _rename(expected, TASKS[number], "another text")
    elif how == "twice":
        lines.append(lines[number])
    elif how == "without":
        del lines[number]
    else:
        before = lines[number].get("task")
        _change_value(draw, lines[number])
        after = lines[number].get("task")
        if isinstance(after, str) and before is not None:
            _rename(expected, before, after)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _change_value(draw: random.Random, body: dict[str, Any]) -> None:
    while True:
        key = draw.choice(sorted(body))
        if isinstance(body[key], dict) and body[key] and draw.random() < 0.8:
            body = body[key]
            continue
        if draw.random() < 0.2:
            del body[key]
        else:
            body[key] = draw.choice(VALUES)
        return


def change_table(draw: random.Random, root: Path, expected: list[Frame]) -> None:
    """Change one parquet file: a value, a column or a row."""
    path = draw.choice(sorted(root.rglob("*.parquet")))
    table = pq.read_table(path)
    change = draw.choice([_cell, _cell, _cell, _null, _column, _type, _rows])
    pq.write_table(change(draw, table, expected, path), path, row_group_size=draw.choice([1, 2, 100]))


def _cell(draw: random.Random, table: pa.Table, expected: list[Frame], path: Path) -> pa.Table:
    """Change one value to another one of the same type."""
    name, row = draw.choice(table.column_names), draw.randrange(len(table))
    values = table[name].to_pylist()
    data = "data" in path.parts
    if name == CAMERA:
        kind = draw.choice(["another", "damaged", "grey", "depth", "float", "missing"])
        images = {
            "another": png(picture(0, 6)),
            "damaged": values[row]["bytes"][: draw.randrange(40, 60)],
            "grey": png(picture(0, 6)[..., 1]),
            "depth": png(picture(0, 6)[..., 1].astype("uint16") * 200),
            "float": png(picture(0, 6)[..., 1].astype("float32"), format="TIFF"),
            "missing": None,
        }
        values[row] = {"bytes": images[kind], "path": None}
        _frame(expected, table, row, colour=colour(0, 6) if kind == "another" else (200, 200))
    elif isinstance(values[row], list):
        values[row] = list(values[row])
        if values[row] and isinstance(values[row][0], float):
            place, number = draw.randrange(len(values[row])), draw.choice([0.75, -3.0, math.nan, math.inf])
            values[row][place] = number
            key = {"observation.state": "state", "action": "action"}.get(name)
            if data and key:
                _frame(expected, table, row, **{key: tuple(values[row])})
        else:
            values[row] = ["another text"]
    elif isinstance(values[row], str):
        if path.stem == "tasks":
            _rename(expected, values[row], "another text")
        values[row] = "another text"
    elif isinstance(values[row], int | float):
        values[row] = draw.choice([0, 1, 2, 3, 4, 7, -1, values[row] + 1])
        if data and name == "task_index" and values[row] in range(len(TASKS)):
            _frame(expected, table, row, text=TASKS[values[row]])
        if path.stem == "tasks" and values[row] in range(len(TASKS)) and values[row] != row:
            expected.clear()  # two texts for one number: it must be refused
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


def _null(draw: random.Random, table: pa.Table, expected: list[Frame], path: Path) -> pa.Table:
    name, row = draw.choice(table.column_names), draw.randrange(len(table))
    values = table[name].to_pylist()
    values[row] = None
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


def _column(draw: random.Random, table: pa.Table, expected: list[Frame], path: Path) -> pa.Table:
    """Leave out, rename, add or reorder columns."""
    name = draw.choice(table.column_names)
    place = table.column_names.index(name)
    how = draw.choice(["drop", "rename", "add", "twice", "reorder"])
    if how == "drop":
        return table.drop_columns([name])
    if how == "rename":
        return table.rename_columns(["other" if n == name else n for n in table.column_names])
    if how == "add":
        return table.add_column(draw.randrange(2), "category", pa.array(["pick"] * len(table)))
    if how == "twice":
        return table.append_column(name, table[name])
    order = table.column_names
    draw.shuffle(order)
    return table.select([n for n in order if n != name]).add_column(0, name, table.column(place))


def _type(draw: random.Random, table: pa.Table, expected: list[Frame], path: Path) -> pa.Table:
    """Store a column as another type, where its values can be."""
    name, kind = draw.choice(table.column_names), draw.choice(KINDS)
    try:
        changed = pa.array(table[name].to_pylist(), kind)
        if changed.to_pylist() != table[name].to_pylist() and name in FREE:
            return table  # rounded: that is another data set
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return table
    return table.set_column(table.column_names.index(name), name, changed)


def _rows(draw: random.Random, table: pa.Table, expected: list[Frame], path: Path) -> pa.Table:
    """Leave out, repeat or exchange rows."""
    row, other = draw.randrange(len(table)), draw.randrange(len(table))
    order = list(range(len(table)))
    how = draw.choice(["drop", "repeat", "exchange", "shuffle", "none"])
    if how == "drop":
        del order[row]
    elif how == "repeat":
        order.insert(other, row)
    elif how == "exchange":
        order[row], order[other] = order[other], order[row]
    elif how == "shuffle":
        draw.shuffle(order)
    else:
        order = []
    return table.take(pa.array(order, pa.int64()))


def change_files(draw: random.Random, root: Path, expected: list[Frame]) -> None:
    """Leave out, cut off, copy, move or hide a file."""
    path = draw.choice(sorted(p for p in root.rglob("*") if p.is_file()))
    how = draw.choice(["leave out", "cut", "copy", "move", "hidden", "empty", "text"])
    if how == "leave out":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])
    elif how == "copy":
        shutil.copy(path, path.with_name(f"{path.stem} copy{path.suffix}"))
    elif how == "move":
        path.parent.with_name("other").mkdir()
        path.rename(path.parent.with_name("other") / path.name)
    elif how == "hidden":
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07macOS")
    else:
        path.write_text("" if how == "empty" else "version https://git-lfs.github.com/spec/v1\n")


def _frame(expected: list[Frame], table: pa.Table, row: int, **changes: Any) -> None:
    """Change what is expected of the frame in this row of a data file."""
    episode, frame = table["episode_index"][row].as_py(), table["frame_index"][row].as_py()
    place = sum(LENGTHS[:episode]) + frame
    expected[place] = replace(expected[place], **changes)


def _rename(expected: list[Frame], before: str, after: str) -> None:
    for place, frame in enumerate(expected):
        if frame.text == before:
            expected[place] = replace(frame, text=after)
