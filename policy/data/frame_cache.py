"""Cache of decoded frames in one memory-mapped file, so that frames are decoded once and not in every epoch.

    CACHE/NAME-FINGERPRINT.u8      uint8 [N,V,3,H,W]

Only frames are cached: everything else is read from the data set each time. The file is written under another name and
renamed when it is complete. A lock makes other processes (DDP) wait for the one that decodes. Frames are decoded by
threads, because PNG and video decoders release the interpreter's lock.

Shape legend: N frames, V views, H, W image; f frames decoded at once.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cogvla.policy.data.frames import ArrayFrames, Frames
from cogvla.policy.data.reader import FrameGroup, LeRobotReader
from cogvla.policy.inputs.resize import resize

FORMAT = 2
MAX_THREADS = 16


def open_frames(reader: LeRobotReader, image_size: tuple[int, int], folder: Path, progress: bool = True) -> Frames:
    """Open the decoded frames of a data set, memory-mapped; decode them if they are not there.

    Args:
        reader: reader of the data set.
        image_size: H and W; frames are resized to it as the policy's preprocessor resizes images.
        folder: folder of all caches.
        progress: show a progress bar while decoding.

    Raises:
        ValueError: the data set is damaged.
        OSError: the decoded frames cannot be written.
    """
    shape = (len(reader), len(reader.mapping.cameras), 3, *image_size)
    path = folder / f"{reader.root.resolve().name}-{reader.fingerprint(f'{FORMAT} {image_size}')}.u8"
    size = int(np.prod(shape))
    if not _is_complete(path, size):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not _is_complete(path, size):
                    _build(reader, shape, path, progress)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write decoded frames to {folder}: {error.strerror or error}. "
                "Free space, or set data.cache to another folder",
            ) from error
    return ArrayFrames(np.memmap(path, np.uint8, "r", shape=shape))


def _is_complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)


def _build(reader: LeRobotReader, shape: tuple[int, ...], path: Path, progress: bool) -> None:
    parts = list(reader.parts())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            # Reserve the space now: writing to a memory map on a full disk would kill the process without a message.
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
        frames_NVCHW = np.memmap(temporary, np.uint8, "r+", shape=shape)
        _decode(reader, parts, frames_NVCHW, progress)
        frames_NVCHW.flush()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _decode(reader: LeRobotReader, parts: list[FrameGroup], frames_NVCHW: np.ndarray, progress: bool) -> None:
    """Decode all parts; every frame of every view must be in one of them."""
    filled_NV = np.zeros(frames_NVCHW.shape[:2], bool)

    def work(part: FrameGroup) -> int:
        for rows, frames_fCHW in reader.decode(part):
            resized = resize(torch.from_numpy(np.ascontiguousarray(frames_fCHW)), frames_NVCHW.shape[-2:])
            frames_NVCHW[rows, part.view] = resized.numpy()
            filled_NV[rows, part.view] = True
        return len(part.rows)

    threads = min(MAX_THREADS, os.cpu_count() or 1)
    total = sum(len(part.rows) for part in parts)
    with (
        tqdm(total=total, desc="decoding frames, once", unit="frame", disable=not progress) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        futures = [pool.submit(work, part) for part in parts]
        try:
            for future in futures:  # in order, so that the first of several damaged files is reported
                bar.update(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not filled_NV.all():
        row, view = np.argwhere(~filled_NV)[0]
        raise ValueError(
            f"{reader.root}: {int((~filled_NV).sum())} frames have no picture, first frame {row} of the data set of "
            f"{reader.mapping.cameras[view]!r}; record or download the data set again"
        )
