"""The text of a task is found where others store it; doubtful ones are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cogvla.tests.support.lerobot_files import (
    TASKS,
    assert_read,
    data_file,
    edit_info,
    edit_table,
    open_data,
    refused,
    rows,
    what_is_recorded,
    write,
    write_tasks,
)

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
    write_tasks(root, columns, pandas_index)
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
        ({"task_index": [0.5, 1], "task": TASKS}, r"'task_index' holds 0.5 in row 0, which is no whole number"),
    ],
)
def test_doubtful_tasks_are_refused(tmp_path: Path, columns: Mapping[str, Any], message: str) -> None:
    root = write(tmp_path / "toy")
    write_tasks(root, columns)
    refused(root, message)


def test_tasks_that_the_list_of_episodes_gives_otherwise_are_said(tmp_path: Path) -> None:
    root = write(tmp_path / "toy")
    write_tasks(root, {"task_index": NUMBERS, "task": ["put the red cube away", TASKS[1]]})
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
    ],
)
def test_doubtful_texts_are_refused(tmp_path: Path, values: pa.Array, message: str) -> None:
    root = write(tmp_path / "toy", files=1)
    edit_table(data_file(root), language=values)
    known = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=known | {"language": {"dtype": "string", "shape": [1]}})
    refused(root, message, instruction_key="language")
