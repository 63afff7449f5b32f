"""Columns of parquet files as arrays; whatever an array cannot hold is refused with file, column and row.

Files of one data set may store a column as different types (float and double, lists of fixed and of variable size);
they become the same array. Missing values and lists of changing length are refused.

Shape legend: n rows of a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cogvla.errors import first_line

AGAIN = "record or download the data set again"


def parquet(
    path: Path,
    columns: Sequence[str] | None = None,
    row_group: int | None = None,
    footer: pq.FileMetaData | None = None,
    optional: Sequence[str] = (),
) -> pa.Table:
    """Read columns of a parquet file, or of one of its row groups.

    Args:
        path: the file.
        columns: names of the columns; None: all.
        row_group: number of the row group; None: the whole file.
        footer: metadata of the file, if it is known.
        optional: columns to read, too, where the file has them.

    Raises:
        ValueError: the file is missing or damaged, or has no such column, or has it twice.
    """
    try:
        with pq.ParquetFile(path, metadata=footer) as file:
            has = file.schema_arrow.names
            for name in columns or ():
                if has.count(name) != 1:
                    problem = "has no" if name not in has else "has more than one"
                    raise ValueError(f"{path} {problem} column {name!r}; it has {', '.join(has)}")
            chosen = None if columns is None else [*columns, *(name for name in optional if has.count(name) == 1)]
            return file.read(chosen) if row_group is None else file.read_row_group(row_group, chosen)
    except (pa.ArrowException, OSError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is missing or damaged ({first_line(error)}); {AGAIN}") from error


def numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Convert a column of numbers, or of lists of numbers, to an array [n,...] of the type in the file.

    Args:
        column: the column.
        where: file and column, for messages.

    Raises:
        ValueError: a value is missing, lists differ in length, or there are no numbers; the message gives the row.
    """
    values = _plain(column)
    shape = [len(values)]
    while True:
        per_row = int(np.prod(shape[1:]))
        _check_complete(values, where, per_row)
        kind = values.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            break
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        changes = np.flatnonzero(lengths != lengths[:1])
        if len(changes):
            raise ValueError(
                f"{where}: the lists differ in length: {lengths[0]} numbers in row 0, {lengths[changes[0]]} in row "
                f"{changes[0] // per_row}; all rows need the same numbers, so remove these rows or fill them up"
            )
        shape.append(int(lengths[0]) if len(lengths) else 0)
        values = _plain(values.flatten())
    if pa.types.is_decimal(kind):
        values, kind = values.cast(pa.float64()), pa.float64()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"{where} holds {column.type}, not numbers; choose another column")
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def whole_numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Convert a column of whole numbers to int64 [n]; floats without a fraction and lists of one number are accepted.

    Raises:
        ValueError: see `numbers`; or a number has a fraction or is negative.
    """
    array = numbers(column, where)
    if array.ndim > 1 and array.size == len(array):
        array = array.reshape(-1)
    if array.ndim > 1 or array.dtype == bool:
        raise ValueError(f"{where} holds {column.type}, not one whole number per row; {AGAIN}")
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
        fit = np.isfinite(array) & (array == np.floor(array)) & (np.abs(array) < 2**53)
    else:
        fit = array <= np.iinfo(np.int64).max
    fit &= array >= 0
    if not fit.all():
        row = int(np.flatnonzero(~fit)[0])
        raise ValueError(f"{where} holds {array[row]} in row {row}, which is no whole number from 0 up; {AGAIN}")
    return array.astype(np.int64)


def texts(column: pa.ChunkedArray, where: str) -> list[str]:
    """Convert a column of texts to a list [n]; lists of one text are accepted.

    Raises:
        ValueError: a text is missing, or there are no texts.
    """
    values = _plain(column)
    _check_complete(values, where, 1)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        if len(wrong := np.flatnonzero(lengths != 1)):
            raise ValueError(f"{where} holds {lengths[wrong[0]]} texts in row {wrong[0]}; it must be one per row")
        values = _plain(values.flatten())
        _check_complete(values, where, 1)
    if not is_text(values.type):
        raise ValueError(f"{where} holds {column.type}, not texts; choose another column")
    return [str(text) for text in values.to_pylist()]


def is_text(kind: pa.DataType) -> bool:
    """Return True for the types of texts, plain or as a dictionary."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)


def _plain(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return one array without dictionaries and extension types (`datasets` stores matrices as such)."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
        values = values.chunk(0) if isinstance(values, pa.ChunkedArray) else values
    while isinstance(values, pa.ExtensionArray):
        values = values.storage
    return values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values


def _check_complete(values: pa.Array, where: str, per_row: int) -> None:
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // max(per_row, 1)
        raise ValueError(f"{where} has no value in row {row} ({values.null_count} values are missing); {AGAIN}")
