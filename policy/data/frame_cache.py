"""Cache of decoded frames at the policy's image size, so that frames are decoded once and not in every epoch.

    CACHE/NAME-FINGERPRINT.frames      one data set at one image size (`frame_file`)
    CACHE/.NAME-FINGERPRINT.partial    a file that is being written
    CACHE/NAME-FINGERPRINT.streaming   the same for a streamed data set: it stays if the build ends early
    CACHE/NAME-FINGERPRINT.journal     what that file has already, so that the next build goes on (`frame_journal`)
    CACHE/.lock                        locked by the process that writes or deletes files

Only frames are cached: everything else is read from the data set each time. A file gets its name when it is complete.
The others wait for the process that writes (DDP, several runs). Frames are decoded by threads, because the decoders of
PNG and video release the interpreter's lock.

A file is locked (shared) while somebody has it open, and the time of its last use is that of its content. So a limit on
the folder deletes what was not used for the longest time, and nothing that is in use. Files of versions before this one
(`.u8`) count, too.

Shape legend: N frames, V views, H, W image; f frames decoded at once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cogvla.policy.data.frame_file import FORMAT, DamagedError, FrameFile, FrameWriter
from cogvla.policy.data.frame_journal import FrameJournal
from cogvla.policy.data.frames import Frames
from cogvla.policy.data.reader import FrameGroup, LeRobotReader
from cogvla.policy.data.streaming import FETCHED, GB, locked
from cogvla.policy.inputs.resize import resize

HASH = "[0-9a-f]" * 16
FILES = tuple(f"*-{HASH}.{ending}" for ending in ("frames", "streaming", "u8"))
"""Names of files, of this version and of earlier ones, that a limit may delete."""
MAX_THREADS = 16
SAMPLED_PARTS = 16
"""Number of parts, evenly spread, that are decoded first, and from which the size of the file is estimated."""
FETCHED_AT_ONCE = 4
"""Number of files of a streamed data set that are on the disk at the same time."""
MARGIN = 1.05
"""The estimate is multiplied by this."""


class CacheLimitError(ValueError):
    """The frames do not fit into the limit of the cache."""


def open_frames(
    reader: LeRobotReader,
    image_size: tuple[int, int],
    folder: Path,
    limit_gb: float | None = None,
    progress: bool = True,
) -> Frames:
    """Open the frames of a data set; decode them if they are not in the cache, or damaged.

    Args:
        reader: reader of the data set.
        image_size: H and W; frames are resized to it as the policy's preprocessor resizes images.
        folder: folder of all caches.
        limit_gb: largest size of that folder in GB (1e9 bytes); None: no limit.
        progress: show a progress bar while decoding.

    Raises:
        ValueError: the data set is damaged, or its frames do not fit into the limit.
        OSError: the frames cannot be written or read.
    """
    shape = (len(reader), len(reader.mapping.cameras), 3, *image_size)
    path = folder / f"{reader.root.resolve().name}-{reader.fingerprint(f'{FORMAT} {image_size}')}.frames"
    name = reader.root.name if reader.hub is None else reader.hub.repo_id
    try:
        found = _open(path, shape)
        if found is not None and limit_gb is None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            found = found or _open(path, shape)
            if found is not None:
                if limit_gb is not None:
                    _make_room(folder, limit_gb, path.stat().st_size, name, path)
                return found
            _remove_leftovers(folder)
            _build(reader, shape, path, partial(_check_room, folder, limit_gb, name, path), progress)
            return FrameFile(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot keep decoded frames in {folder}: {error.strerror or error}. "
            "Free space, or set data.cache to another folder",
        ) from error


def _open(path: Path, shape: tuple[int, ...]) -> FrameFile | None:
    """Open a file that is there, complete and not damaged, and note that it is used now."""
    try:
        frames = FrameFile(path)
        if not frames.is_at_its_path():  # deleted while it was being opened
            return None
        if frames.shape != shape:
            raise DamagedError(f"{path} has frames of another shape")
    except FileNotFoundError:
        return None
    except DamagedError as error:
        print(f"note: {error}; its frames are decoded again", flush=True)
        return None
    with suppress(OSError):  # a folder that cannot be written to
        os.utime(path)
    return frames


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes have left; only to be called with the lock."""
    shutil.rmtree(folder / FETCHED, ignore_errors=True)
    for path in folder.glob(f".*-{HASH}.partial"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"*-{HASH}.journal"):
        if not path.with_suffix(".streaming").is_file():
            path.unlink(missing_ok=True)
    for path in folder.glob(f".*-{HASH}.u8.*"):  # of earlier versions, which had no lock for the folder
        number = path.suffix.removeprefix(".")
        if number.isdecimal() and not Path("/proc", number).exists():
            path.unlink(missing_ok=True)


def _check_room(folder: Path, limit_gb: float | None, name: str, path: Path, size: int, written: int) -> None:
    """Make room for a file that will have `size` bytes, of which some are written."""
    if limit_gb is not None:
        _make_room(folder, limit_gb, size, name, path)
    free = shutil.disk_usage(folder).free
    if size - written > free:
        raise OSError(28, f"{name} needs about {size / GB:.3g} GB, {free / GB:.3g} GB are free")


def _make_room(folder: Path, limit_gb: float, size: int, name: str, path: Path) -> None:
    """Delete files that are not in use, the longest unused first, until one of `size` bytes fits into the limit.

    Raises:
        CacheLimitError: it does not fit.
    """
    limit = int(limit_gb * GB)
    less = "choose smaller images or fewer episodes (data.episodes), or a larger data.cache_gb"
    if size > limit:
        raise CacheLimitError(f"the frames of {name} take {size / GB:.3g} GB, data.cache_gb is {limit_gb:g}; {less}")
    others = [other for pattern in FILES for other in folder.glob(pattern) if other.stem != path.stem]
    sizes = {other: other.stat().st_size for other in others}
    for other in sorted(others, key=lambda other: other.stat().st_mtime_ns):
        if sum(sizes.values()) + size <= limit:
            return
        if _deleted(other):
            other.with_suffix(".journal").unlink(missing_ok=True)
            print(f"note: data.cache_gb is {limit_gb:g}: deleted {other} ({sizes.pop(other) / GB:.3g} GB)", flush=True)
    used = sum(sizes.values())
    if used + size > limit:
        raise CacheLimitError(
            f"the frames of {name} take {size / GB:.3g} GB, and {used / GB:.3g} GB in {folder} are in use by other "
            f"data sets of this command or by other processes; data.cache_gb is {limit_gb:g}; {less}, or wait for the "
            "processes"
        )


def _deleted(path: Path) -> bool:
    """Delete a file unless somebody has it open; return whether it was deleted."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:
        return False
    return True


def _build(
    reader: LeRobotReader, shape: tuple[int, ...], path: Path, check: Callable[[int, int], None], progress: bool
) -> None:
    """Decode all frames into a file, and then give it its name.

    Args:
        reader: reader of the data set.
        shape: (N, V, 3, H, W).
        path: the file.
        check: function that gets the size that the file will have, and what it has, in bytes; it makes room, or raises
            an error.
        progress: show a progress bar.
    """
    if reader.hub is not None:
        _stream(reader, shape, path, check, progress)
        return
    partly = path.with_name(f".{path.stem}.partial")
    try:
        with closing(FrameWriter(partly, shape)) as writer:
            jobs = [partial(_decode, reader, writer, part) for part in reader.parts()]
            _run(jobs, writer, check, min(MAX_THREADS, os.cpu_count() or 1), SAMPLED_PARTS, progress)
            _finish(reader, writer)
        os.replace(partly, path)
    finally:
        partly.unlink(missing_ok=True)


def _stream(
    reader: LeRobotReader, shape: tuple[int, ...], path: Path, check: Callable[[int, int], None], progress: bool
) -> None:
    """Do the same, but fetch each file from the hub, and delete it when it is decoded; what is decoded stays."""
    hub, cache = reader.hub, path.parent
    assert hub is not None
    partly, noted = path.with_suffix(".streaming"), path.with_suffix(".journal")
    with (
        closing(FrameJournal(noted, partly, shape)) as journal,
        closing(FrameWriter(partly, shape, journal.index_NV)) as writer,
    ):

        def stream(source: Path) -> int:
            with hub.fetched(source, cache) as local:
                parts = list(reader.parts_of(source, local))
                count = sum(_decode(reader, writer, part) for part in parts)
            writer.sync()
            rows = np.concatenate([part.rows for part in parts])
            views = np.repeat([part.view for part in parts], [len(part.rows) for part in parts])
            journal.add(hub.name(source), rows, views, writer.index_NV)
            return count

        jobs = [partial(stream, source) for source in reader.sources if hub.name(source) not in journal.done]
        if writer.count:
            check(writer.expected(), writer.stored())
        try:
            _run(jobs, writer, check, FETCHED_AT_ONCE, FETCHED_AT_ONCE, progress)
        finally:
            shutil.rmtree(cache / FETCHED, ignore_errors=True)
        _finish(reader, writer)
    os.replace(partly, path)
    noted.unlink()


def _decode(reader: LeRobotReader, writer: FrameWriter, part: FrameGroup) -> int:
    """Decode the frames of a part; return their number."""
    height, width = writer.shape[-2:]
    episode_N = reader.episode_numbers
    key: tuple[int, np.ndarray] | None = None
    episode = None
    for rows, frames_fCHW in reader.decode(part):
        resized = resize(torch.from_numpy(np.ascontiguousarray(frames_fCHW)), (height, width)).numpy()
        for row, pixels_CHW in zip(rows.tolist(), resized, strict=True):
            if episode_N[row] != episode:  # the first picture of an episode is the key of its others
                key, episode = None, episode_N[row]
            writer.add(row, part.view, pixels_CHW, key)
            key = key or (row, pixels_CHW)
    return len(part.rows)


def _run(
    jobs: list[partial[int]],
    writer: FrameWriter,
    check: Callable[[int, int], None],
    threads: int,
    sampled: int,
    progress: bool,
) -> None:
    """Run all jobs, first some that are evenly spread.

    Args:
        jobs: functions that decode frames and return their number.
        writer: what gets the pictures.
        check: see `_build`.
        threads: number of jobs at once.
        sampled: number of jobs after which the size is estimated.
        progress: show a progress bar.
    """
    first = sorted(set(np.linspace(0, len(jobs) - 1, sampled).astype(int).tolist())) if jobs else []
    jobs = [jobs[number] for number in first] + [job for number, job in enumerate(jobs) if number not in set(first)]
    granted = 0
    with (
        tqdm(
            total=writer.index_NV.size,
            initial=writer.count,
            desc="decoding frames, once",
            unit="frame",
            disable=not progress,
        ) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        futures = [pool.submit(job) for job in jobs]
        try:
            for number, future in enumerate(futures, 1):
                bar.update(future.result())
                if number >= len(first) and (expected := writer.expected()) > granted:
                    granted = int(expected * MARGIN) if number < len(futures) else expected
                    check(granted, writer.stored())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            writer.close()  # jobs that are being done end at their next picture
            raise


def _finish(reader: LeRobotReader, writer: FrameWriter) -> None:
    """Check that every frame of every view was decoded, and make the file complete."""
    filled_NV = writer.filled()
    if not filled_NV.all():
        row, view = np.argwhere(~filled_NV)[0]
        raise ValueError(
            f"{reader.root}: {int((~filled_NV).sum())} frames have no picture, first frame {row} of the data set of "
            f"{reader.mapping.cameras[view]!r}; record or download the data set again"
        )
    writer.finish()
