"""Journal of a file of pictures that is being written, so that a killed process loses only the files in work.

    records, one after the other: header | name of the decoded file | its pictures (`RECORD`)

A record is written when all pictures of a file are on the disk. A cut or damaged record ends the journal.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from cogvla.policy.data.frame_file import ENTRY

HEADER = struct.Struct("<IQI")
"""Size of the name, number of pictures, checksum of all else."""
RECORD = np.dtype([("row", "<i8"), ("view", "<i8"), ("entry", ENTRY)])


class FrameJournal:
    """The journal of one file of pictures.

    Args:
        path: the journal.
        pictures: the file of pictures; without it, or where it is too short, the journal does not count.
        shape: (N, V, 3, H, W).

    Attributes:
        index_NV: the pictures that are there, as `FrameWriter` wants them.
        done: names of the files that are decoded.

    Raises:
        OSError: the journal cannot be read or written.
    """

    def __init__(self, path: Path, pictures: Path, shape: Sequence[int]) -> None:
        self.index_NV = np.zeros(shape[:2], ENTRY)
        self.done: set[str] = set()
        content = path.read_bytes() if path.is_file() and pictures.is_file() else b""
        end = self._read(content, pictures.stat().st_size if content else 0)
        self._lock = threading.Lock()
        self._file = path.open("ab")
        self._file.truncate(end)

    def add(self, name: str, rows: np.ndarray, views: np.ndarray, index_NV: np.ndarray) -> None:
        """Note that the pictures of a file are on the disk: frames and cameras, and the index of all pictures."""
        records = np.empty(len(rows), RECORD)
        records["row"], records["view"], records["entry"] = rows, views, index_NV[rows, views]
        text = name.encode()
        body = text + records.tobytes()
        start = HEADER.pack(len(text), len(records), 0)[:-4]
        with self._lock:
            self._file.write(start + struct.pack("<I", zlib.crc32(body, zlib.crc32(start))) + body)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the journal."""
        with suppress(OSError):  # what was left to be written does not fit on the disk
            self._file.close()

    def _read(self, content: bytes, size: int) -> int:
        """Read all whole records of pictures within the first `size` bytes; return where they end."""
        at = 0
        while at + HEADER.size <= len(content):
            start = content[at : at + HEADER.size]
            length, count, checksum = HEADER.unpack(start)
            end = at + HEADER.size + length + count * RECORD.itemsize
            body = content[at + HEADER.size : end]
            if end > len(content) or zlib.crc32(body, zlib.crc32(start[:-4])) != checksum:
                break
            records = np.frombuffer(body[length:], RECORD)
            entries, rows, views = records["entry"], records["row"], records["view"]
            if (entries["offset"] + entries["size"] > size).any():
                break
            self.index_NV[rows, views] = entries
            self.done.add(body[:length].decode())
            at = end
        return at
