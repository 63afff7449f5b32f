"""Cache of decoded frames in one memory-mapped file, so that frames are decoded once and not in every epoch.

    CACHE/NAME-FINGERPRINT/frames.u8      uint8 [N,V,3,H,W]
    CACHE/NAME-FINGERPRINT/columns.npz    everything that is not an image
    CACHE/NAME-FINGERPRINT/contents.json  shapes and instructions

The folder is written under another name and renamed when it is complete. A lock makes other processes (DDP) wait for
the one that decodes. Frames are decoded by threads, because PNG and video decoders release the interpreter's lock.

Shape legend: N frames, V views, H, W image; f frames decoded at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cogvla.policy.data.reader import FrameGroup, LeRobotReader, Mapping
from cogvla.policy.inputs.resize import resize

FORMAT = 1
MAX_THREADS = 16


@dataclass(frozen=True)
class FrameCache:
    """An open cache.

    Attributes:
        frames_NVCHW: memory-mapped frames, uint8.
        columns: arrays with one entry per frame, see `LeRobotReader.columns`.
        instructions: distinct instructions.
        fingerprint: fingerprint of the data set, the mapping and the image size.
    """

    frames_NVCHW: np.ndarray
    columns: dict[str, np.ndarray]
    instructions: list[str]
    fingerprint: str


def open_cache(
    root: Path, mapping: Mapping, image_size: tuple[int, int], folder: Path, progress: bool = True
) -> FrameCache:
    """Open the cache of a data set; build it if it does not exist.

    Args:
        root: folder of the data set.
        mapping: keys to read.
        image_size: H and W; frames are resized to it as the policy's preprocessor resizes images.
        folder: folder of all caches.
        progress: show a progress bar while decoding.

    Raises:
        ValueError: the data set does not fit the mapping, or is damaged.
        OSError: the decoded frames cannot be written.
    """
    reader = LeRobotReader(root, mapping)
    fingerprint = reader.fingerprint(f"{FORMAT} {image_size}")
    path = folder / f"{root.resolve().name}-{fingerprint}"
    if not path.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{path.name}.lock"):
                if not path.is_dir():
                    _build(reader, image_size, path, progress)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write decoded frames to {folder}: {error.strerror or error}. "
                "Free space, or set data.cache to another folder",
            ) from error
    contents = json.loads((path / "contents.json").read_text())
    with np.load(path / "columns.npz", allow_pickle=False) as stored:
        columns = {name: stored[name] for name in stored.files}
    frames_NVCHW = np.memmap(path / "frames.u8", np.uint8, "c", shape=tuple(contents["shape"]))
    return FrameCache(frames_NVCHW, columns, contents["instructions"], fingerprint)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)


def _build(reader: LeRobotReader, image_size: tuple[int, int], path: Path, progress: bool) -> None:
    columns, instructions = reader.columns()
    parts = list(reader.parts())
    shape = (len(columns["episode"]), len(reader.mapping.cameras), 3, *image_size)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with (temporary / "frames.u8").open("wb") as file:
            # Reserve the space now: writing to a memory map on a full disk would kill the process without a message.
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
        frames_NVCHW = np.memmap(temporary / "frames.u8", np.uint8, "r+", shape=shape)
        _decode(reader, parts, frames_NVCHW, progress)
        frames_NVCHW.flush()
        np.savez(temporary / "columns.npz", **columns)  # type: ignore[arg-type]
        contents = {"shape": shape, "instructions": instructions}
        (temporary / "contents.json").write_text(json.dumps(contents, indent=1))
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _decode(reader: LeRobotReader, parts: list[FrameGroup], frames_NVCHW: np.ndarray, progress: bool) -> None:
    def work(part: FrameGroup) -> int:
        for rows, frames_fCHW in reader.decode(part):
            resized = resize(torch.from_numpy(np.ascontiguousarray(frames_fCHW)), frames_NVCHW.shape[-2:])
            frames_NVCHW[rows, part.view] = resized.numpy()
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
