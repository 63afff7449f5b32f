"""Pictures in one compressed file, without loss, each of which can be read by itself.

    pictures, one after the other | index [N,V]: where each picture is | trailer

A picture is stored as differences: of red and blue to green, of each row to the row above it, and, where the camera
stands still, of the picture to an earlier one of its episode (its key). zstd compresses what is left. Every part has a
checksum, so that a damaged file gives an error and no wrong picture.

Shape legend: N frames, B frames of a batch, V views, H, W image.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa

FORMAT = 3
MAGIC = b"frames\0" + bytes([FORMAT])
TRAILER = struct.Struct("<8s5QI")
"""Magic; N, V, H, W; size of the pictures in bytes; checksum of index and trailer."""
ENTRY = np.dtype([("offset", "<u8"), ("size", "<u4"), ("checksum", "<u4"), ("key", "<i8")])
NO_KEY = -1
LEVEL = 1
"""Compression level of zstd; higher ones take up to 20 times as long for 5 % less."""
GAIN = 0.75
"""Largest share of the bytes without a key at which a picture gets one, since two pictures are then decoded."""
KEYS_IN_MEMORY = 256


class DamagedError(ValueError):
    """A file is not what was written."""


class FrameFile:
    """The pictures of a finished file (a `Frames`). While it is open, it is locked against being deleted.

    Args:
        path: the file, which `FrameWriter` has written.

    Raises:
        DamagedError: it is damaged, or no such file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH)
            self.shape, self._index_NV = self._read_index()
        except BaseException:
            self._file.close()
            raise
        self._codec = pa.Codec("zstd")
        self._keys: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows_B: np.ndarray) -> np.ndarray:
        """Return the pictures of these frames, see `Frames`.

        Raises:
            DamagedError: a picture is damaged.
            OSError: the file cannot be read.
        """
        pixels_BVCHW = np.empty((len(rows_B), *self.shape[1:]), np.uint8)
        rows = np.arange(len(self))[rows_B].tolist()  # indices from the end become usual ones, others an IndexError
        for place, row in enumerate(rows):
            for view in range(self.shape[1]):
                self._decode(row, view, pixels_BVCHW[place, view])
        return pixels_BVCHW

    def is_at_its_path(self) -> bool:
        """Return False if the file was deleted or replaced after it was opened."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _decode(self, row: int, view: int, out_CHW: np.ndarray | None = None) -> np.ndarray:
        offset, size, checksum, key = self._index_NV[row, view].item()
        stored = os.pread(self._file.fileno(), size, offset)
        if len(stored) != size or zlib.crc32(stored) != checksum:
            raise DamagedError(
                f"{self.path} is damaged (frame {row}, view {view}); delete it, and the same command decodes the "
                "frames again"
            )
        shape = self.shape[2:]
        rest_CHW = np.frombuffer(self._codec.decompress(stored, int(np.prod(shape))), np.uint8).reshape(shape)
        pixels_CHW = np.add.accumulate(rest_CHW, axis=1, dtype=np.uint8, out=out_CHW)
        pixels_CHW[0] += pixels_CHW[1]
        pixels_CHW[2] += pixels_CHW[1]
        if key != NO_KEY:
            pixels_CHW += self._key(key, view)
        return pixels_CHW

    def _key(self, row: int, view: int) -> np.ndarray:
        """Return a picture that is the key of others; some stay in memory."""
        found = self._keys.get((row, view))
        if found is None:
            found = self._decode(row, view)
            with self._lock:
                if len(self._keys) >= KEYS_IN_MEMORY:
                    del self._keys[next(iter(self._keys))]
                self._keys[row, view] = found
        return found

    def _read_index(self) -> tuple[tuple[int, ...], np.ndarray]:
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(max(0, size - TRAILER.size))
        trailer = self._file.read()
        if len(trailer) != TRAILER.size or not trailer.startswith(MAGIC):
            raise DamagedError(f"{self.path} is cut, or of another version")
        _, frames, views, height, width, end, checksum = TRAILER.unpack(trailer)
        self._file.seek(min(end, size))
        index = self._file.read()[: -TRAILER.size]
        if len(index) != frames * views * ENTRY.itemsize or zlib.crc32(trailer[:-4], zlib.crc32(index)) != checksum:
            raise DamagedError(f"the index of {self.path} is damaged")
        return (frames, views, 3, height, width), np.frombuffer(index, ENTRY).reshape(frames, views)


class FrameWriter:
    """Writes a file of pictures. Several threads may add pictures.

    Args:
        path: the file, which becomes complete with `finish`.
        shape: (N, V, 3, H, W).
        known_NV: entries of the index for pictures that are in the file already; None: it is a new file.

    Raises:
        OSError: the file cannot be written; methods also raise it.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], known_NV: np.ndarray | None = None) -> None:
        self.shape = shape
        self.index_NV = np.zeros(shape[:2], ENTRY) if known_NV is None else known_NV.copy()
        self.count = int(self.filled().sum())
        self.written = int((self.index_NV["offset"] + self.index_NV["size"]).max(initial=0))
        self._file = path.open("r+b" if self.count else "wb")
        self._file.truncate(self.written)
        self._file.seek(self.written)
        self._lock = threading.Lock()
        self._codec = pa.Codec("zstd", LEVEL)

    def filled(self) -> np.ndarray:
        """Return True where a picture was added, bool [N,V]."""
        return self.index_NV["size"] > 0

    def expected(self) -> int:
        """Return the size of the finished file in bytes, if the pictures to come are like those that were added."""
        return self.index_NV.size * self.written // max(1, self.count) + self.index_NV.nbytes + TRAILER.size

    def add(self, row: int, view: int, pixels_CHW: np.ndarray, key: tuple[int, np.ndarray] | None) -> None:
        """Add one picture, uint8 [3,H,W].

        Args:
            row: index of the frame.
            view: index of the camera.
            pixels_CHW: the picture.
            key: index and picture of an earlier frame of this view that was added without a key; None: no key.
        """
        chosen, stored = NO_KEY, self._compress(pixels_CHW)
        if key is not None:
            difference = self._compress(pixels_CHW - key[1])
            if len(difference) <= GAIN * len(stored):
                chosen, stored = key[0], difference
        with self._lock:
            self.index_NV[row, view] = (self.written, len(stored), zlib.crc32(stored), chosen)
            self._file.write(stored)
            self.written += len(stored)
            self.count += 1

    def stored(self) -> int:
        """Return the size of the file so far; the last pictures may still be in memory."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Wait until all pictures that were added are on the disk."""
        with self._lock:
            self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write index and trailer, and wait until all is on the disk."""
        frames, views, _, height, width = self.shape
        index = self.index_NV.tobytes()
        trailer = TRAILER.pack(MAGIC, frames, views, height, width, self.written, 0)[:-4]
        checksum = zlib.crc32(trailer, zlib.crc32(index))
        self._file.write(index + trailer + struct.pack("<I", checksum))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close the file, which then takes no more pictures; without `finish` it is of no use."""
        with self._lock, suppress(OSError):  # what was left to be written does not fit on the disk
            self._file.close()

    def _compress(self, pixels_CHW: np.ndarray) -> bytes:
        rest_CHW = pixels_CHW.copy()
        rest_CHW[0] -= pixels_CHW[1]
        rest_CHW[2] -= pixels_CHW[1]
        rest_CHW[:, 1:] -= rest_CHW[:, :-1].copy()
        return self._codec.compress(rest_CHW, asbytes=True)
