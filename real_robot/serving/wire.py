"""Wire format of the policy server: msgpack with numpy arrays, byte for byte that of openpi-client 0.1.2.

    array    {b"__ndarray__": True, b"data": raw bytes, b"dtype": dtype.str, b"shape": [...]}
    scalar   {b"__npgeneric__": True, b"data": value, b"dtype": dtype.str}

The dialect of the package msgpack-numpy is read and written, too:

    array    {b"nd": True, b"type": dtype.str, b"kind": b"", b"shape": [...], b"data": raw bytes}
    scalar   {b"nd": False, b"type": dtype.str, b"data": raw bytes}

Anyone who can connect can send a frame, so `unpack` checks everything: it accepts arrays of numbers only (no objects,
no pickles), the shape must match the number of bytes, and a small frame cannot expand into much memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any, Literal

import msgpack
import numpy as np

from cogvla.errors import first_line

MAX_DIMENSIONS = 8
MAX_CONTAINERS = 256
MAX_LENGTH = 1024
MAX_ENTRIES = 4096
"""Most entries of one list or map, and of all together. Large data travels in arrays, so real frames have far fewer."""
MAX_TEXT_BYTES = 8192

Dialect = Literal["openpi", "msgpack_numpy"]
OPENPI: Dialect = "openpi"
MSGPACK_NUMPY: Dialect = "msgpack_numpy"

_ND = b"nd"
_ND_ARRAY_KEYS = {_ND, b"type", b"kind", b"shape", b"data"}
_ND_SCALAR_KEYS = {_ND, b"type", b"data"}
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_ARRAY_KEYS = {_ARRAY, b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {_SCALAR, b"data", b"dtype"}
_NUMBER = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")


class FrameError(ValueError):
    """A frame violates the protocol. The message is one line and safe to send to the other side."""


def shown(value: object, length: int = 60) -> str:
    """Format a value from the other side for an error message: one short line without control characters."""
    text = repr(value) if isinstance(value, str | bytes | int | float | bool | None) else type(value).__name__
    return text if len(text) <= length else text[:length] + "..."


def pack(value: Any, dialect: Dialect = OPENPI) -> bytes:
    """Encode a dict with arrays of numbers as one frame.

    Raises:
        ValueError: an array of another kind, or text that UTF-8 cannot encode.
    """
    return msgpack.packb(value, default=_pack_numpy if dialect == OPENPI else _pack_nd)


def unpack(frame: bytes) -> Any:
    """Decode a frame of either dialect, see `unpack_any`."""
    return unpack_any(frame)[0]


def unpack_any(frame: bytes) -> tuple[Any, Dialect]:
    """Decode a frame, and say in which dialect its arrays are. They are read-only views of one copy of the data.

    Raises:
        FrameError: `pack` would not write such a frame, or it exceeds the limits of this module.
    """
    hooks = _Hooks()
    try:
        value = msgpack.unpackb(
            frame,
            object_hook=hooks.map,
            list_hook=hooks.list,
            max_str_len=MAX_TEXT_BYTES,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_ext_len=0,
        )
    except FrameError:
        raise
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise FrameError(f"the frame is not valid msgpack: {shown(first_line(error), 100)}") from None
    return value, hooks.dialect


def _pack_numpy(value: Any) -> Any:
    _check_numbers(value)
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}


def _pack_nd(value: Any) -> Any:
    _check_numbers(value)
    if isinstance(value, np.ndarray):
        about = {b"type": value.dtype.str, b"kind": b"", b"shape": value.shape}
        return {_ND: True, **about, b"data": value.tobytes()}
    return {_ND: False, b"type": value.dtype.str, b"data": value.tobytes()}


def _check_numbers(value: Any) -> None:
    if not isinstance(value, np.ndarray | np.generic):
        raise ValueError(f"cannot send a {type(value).__name__}")
    if not _NUMBER.fullmatch(value.dtype.str):
        raise ValueError(f"cannot send an array of dtype {value.dtype}; send numbers only")


class _Hooks:
    """Callbacks of msgpack for every map and list of one frame, innermost first."""

    def __init__(self) -> None:
        self._containers = self._entries = 0
        self.dialect: Dialect = OPENPI

    def map(self, value: dict[Any, Any]) -> Any:
        self._count(value)
        if _ARRAY in value:
            return _array(value)
        if _SCALAR in value:
            return _scalar(value)
        if _ND in value:
            self.dialect = MSGPACK_NUMPY
            return _nd(value)
        return value

    def list(self, value: list[Any]) -> list[Any]:
        self._count(value)
        return value

    def _count(self, value: Collection[Any]) -> None:
        self._containers += 1
        self._entries += len(value)
        if self._containers > MAX_CONTAINERS:
            raise FrameError(f"the frame has more than {MAX_CONTAINERS} lists and maps")
        if self._entries > MAX_ENTRIES:
            raise FrameError(f"the lists and maps of the frame have more than {MAX_ENTRIES} entries")


def _nd(value: dict[Any, Any]) -> np.ndarray | np.generic:
    """Read an array or scalar in the dialect of msgpack-numpy."""
    is_array = value[_ND] is True
    if value.get(b"kind", b"") not in (b"", ""):
        raise FrameError("an array of msgpack-numpy has objects or fields; only plain numbers are accepted")
    keys = value.keys() | {b"kind"} if is_array else value.keys()  # old versions send no kind
    if not isinstance(value[_ND], bool) or keys != (_ND_ARRAY_KEYS if is_array else _ND_SCALAR_KEYS):
        raise FrameError("an array of msgpack-numpy needs nd, type, kind, shape and data; a scalar nd, type and data")
    dtype = value[b"type"].decode("ascii", "replace") if isinstance(value[b"type"], bytes) else value[b"type"]
    shape = value[b"shape"] if is_array else [1]
    array = _array({_ARRAY: True, b"data": value[b"data"], b"dtype": dtype, b"shape": shape})
    return array if is_array else array[0]


def _dtype(value: Any) -> np.dtype[Any]:
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        raise FrameError(f"an array has dtype {shown(value)}; only plain numbers are accepted")
    return np.dtype(value)


def _array(value: dict[Any, Any]) -> np.ndarray:
    if value.keys() != _ARRAY_KEYS or value[_ARRAY] is not True:
        raise FrameError("an array needs exactly __ndarray__ = true, data, dtype and shape")
    dtype, shape, data = _dtype(value[b"dtype"]), value[b"shape"], value[b"data"]
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise FrameError("the shape of an array must be a list of positive whole numbers")
    if len(shape) > MAX_DIMENSIONS:
        raise FrameError(f"an array has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are accepted")
    if not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
        size = f"{len(data)} bytes" if isinstance(data, bytes) else shown(data)
        raise FrameError(f"an array of {dtype} with shape {shown(str(shape), 100)} has {size} of data")
    return np.frombuffer(data, dtype).reshape(shape)


def _scalar(value: dict[Any, Any]) -> np.generic:
    if value.keys() != _SCALAR_KEYS or value[_SCALAR] is not True:
        raise FrameError("a numpy scalar needs exactly __npgeneric__ = true, data and dtype")
    dtype, number = _dtype(value[b"dtype"]), value[b"data"]
    kinds = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}[dtype.kind]
    if not isinstance(number, kinds) or (isinstance(number, bool) and dtype.kind != "b"):
        raise FrameError(f"a scalar of {dtype} has the value {shown(number)}")
    try:
        return dtype.type(number)
    except OverflowError:
        raise FrameError(f"a scalar of {dtype} has the value {shown(number)}") from None
