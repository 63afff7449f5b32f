"""Data sets of the hub that do not fit on the disk: their numbers are kept, each file with pictures is only decoded.

    CACHE/streamed/OWNER/NAME@COMMIT/hub.json      the files of the commit, with sizes and checksums
    CACHE/streamed/OWNER/NAME@COMMIT/meta, data    metadata, and the data files without their pictures
    CACHE/.fetched                                 files that are being decoded

The frame cache gets the pictures (`frame_cache`). Everything else is read from that folder as from any data set.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from tqdm import tqdm

from cogvla.errors import first_line
from cogvla.files import read_object, write_atomic
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.download import commit_of, local_root
from cogvla.policy.data.files.columns import parquet
from cogvla.policy.data.files.metadata import Metadata
from cogvla.policy.hub.connection import give_up_waiting, hub_errors

T = TypeVar("T")
GB = 1e9
LISTING = "hub.json"
FETCHED = ".fetched"
"""Folder of the files of streamed data sets that are being decoded."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
THREADS = 8
"""Number of files with numbers that are fetched at once."""
PAUSES_S: Sequence[float] = (5.0, 30.0)
"""Seconds to wait before each further attempt; huggingface_hub makes some of its own within each."""
BUSY = (408, 425, 429)
"""HTTP errors of the 400s that may be over at the next attempt."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process writes to the folder of a cache, and keep others from it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that writes frames to {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class HubFiles:
    """The files of one commit of a data set of the hub.

    Attributes:
        root: folder with its metadata, and its data files without their pictures.
        repo_id: name on the hub.
        commit: the commit.
        files: path of each file -> its size in bytes and its checksum: SHA-256 of large files, git's of others.
    """

    root: Path
    repo_id: str
    commit: str
    files: Mapping[str, tuple[int, str]]

    def name(self, path: Path) -> str:
        """Return the name on the hub of a file, which is given by its path below `root`."""
        return Path(os.path.relpath(path, self.root)).as_posix()

    def has(self, path: Path) -> bool:
        """Return whether the hub has a file."""
        return self.name(path) in self.files

    def address(self, path: Path) -> str:
        """Return where a file is, for messages."""
        return f"{self.repo_id}@{self.commit[:8]}/{self.name(path)}"

    @contextmanager
    def fetched(self, path: Path, cache: Path) -> Iterator[Path]:
        """Fetch a file, and delete it at the end.

        Args:
            path: its path below `root`.
            cache: folder of the cache, which gets the file.

        Yields:
            The path of the fetched file.

        Raises:
            ValueError: it cannot be fetched, has not the numbers that were read from it before, or the code inside
                finds it damaged.
            OSError: there is no room for it.
        """
        address, (size, _) = self.address(path), self.files[self.name(path)]
        (cache / FETCHED).mkdir(exist_ok=True)
        if size > (free := shutil.disk_usage(cache).free):
            raise OSError(errno.ENOSPC, f"{address} has {size / GB:.3g} GB, {free / GB:.3g} GB are free")
        with tempfile.TemporaryDirectory(dir=cache / FETCHED) as folder:
            local = _asked(address, lambda: self._download(self.name(path), Path(folder) / "attempt"))
            try:
                if path.is_file():  # its numbers were read alone, for which the hub has no checksum
                    kept = parquet(path)
                    came = parquet(local, kept.column_names)
                    if not came.equals(kept) and repr(came.to_pylist()) != repr(kept.to_pylist()):  # NaN equals nothing
                        raise ValueError(f"{path} has other numbers than {address}; {_anew(self.root)}")
                yield local
            except ValueError as error:
                raise ValueError(str(error).replace(str(local), address)) from error

    def keep(self, cache: Path, progress: bool) -> None:
        """Fetch the metadata and the data files that are not in `root` yet, the latter without their pictures.

        Raises:
            ValueError: a file cannot be fetched, or the metadata is damaged.
            OSError: a file cannot be written.
        """
        hub = HfFileSystem(skip_instance_cache=True)
        for kind in ("meta", "data"):  # the metadata says which columns are pictures
            features = Metadata(self.root).features if kind == "data" else {}
            pictures = [key for key, feature in features.items() if feature.dtype == "image"]

            def get(name: str, pictures: Sequence[str] = pictures) -> None:
                target = self.root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if pictures:
                    write_atomic(target, _asked(self.address(target), lambda: self._numbers(hub, name, pictures)))
                else:
                    with self.fetched(target, cache) as local:
                        os.replace(local, target)

            names = [name for name in self.missing() if name.startswith(kind)]
            with (
                ThreadPoolExecutor(THREADS) as pool,
                tqdm(total=len(names), desc=f"fetching {kind}, once", unit="file", disable=not progress) as bar,
            ):
                try:
                    for _ in pool.map(get, names):
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def missing(self) -> list[str]:
        """Return the names of the metadata and data files that are not in `root` yet."""
        kept = [name for name in self.files if name.startswith("meta/") or _is_data(name)]
        return [name for name in kept if not (self.root / name).is_file()]

    def _download(self, name: str, folder: Path) -> Path:
        """Fetch a file into a folder that is emptied first."""
        shutil.rmtree(folder, ignore_errors=True)
        local = Path(hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.commit, local_dir=folder))
        size, checksum = self.files[name]
        if (came := local.stat().st_size) != size:
            raise OSError(f"it came with {came} bytes, the hub lists {size}")
        with local.open("rb") as file:
            known = hashlib.sha256 if len(checksum) == 64 else lambda: hashlib.sha1(b"blob %d\0" % size)
            if hashlib.file_digest(file, known).hexdigest() != checksum:
                raise OSError("it came damaged: its checksum is not the one that the hub lists")
        return local

    def _numbers(self, hub: HfFileSystem, name: str, pictures: Sequence[str]) -> bytes:
        """Fetch a data file without its pictures: only these parts of it are asked for."""
        with hub.open(f"datasets/{self.repo_id}@{self.commit}/{name}", "rb", cache_type="none") as stream:
            if stream.size != (size := self.files[name][0]):
                raise OSError(f"it has {stream.size} bytes, the hub listed {size}")
            with pq.ParquetFile(stream, pre_buffer=True) as file:
                table = file.read([column for column in file.schema_arrow.names if column not in pictures])
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        return buffer.getvalue().to_pybytes()


def locate(config: DataConfig, progress: bool = True) -> tuple[Path, str | None, HubFiles | None]:
    """Return the folder of a data set, its commit if known, and its files on the hub if it is streamed.

    What is missing in the folder is downloaded.

    Raises:
        ValueError: there is no such data set, or it cannot be downloaded.
        OSError: it cannot be written.
    """
    if not config.streaming or config.repo_id is None:
        return *local_root(config.root, config.repo_id, config.revision), None
    hub = open_hub(config.repo_id, config.revision, Path(config.cache), progress)
    return hub.root, hub.commit, hub


def open_hub(repo_id: str, revision: str | None, cache: Path, progress: bool = True) -> HubFiles:
    """Find a commit of a data set of the hub; fetch its metadata and numbers if they are not in the cache.

    A commit that is in the cache needs no network. A branch, a tag or no revision must still be the commit that was
    streamed before; without a network and without a revision, it is taken to be.

    Args:
        repo_id: name on the hub.
        revision: branch, tag or commit; None: the newest tag that can be read, else the main branch.
        cache: folder of the cache.
        progress: show a bar.

    Raises:
        ValueError: the data set cannot be fetched, is none, or has changed on the hub.
        OSError: it cannot be written.
    """
    for bar in ("huggingface_hub.http_get", "huggingface_hub.xet_get"):  # there is one for all files
        disable_progress_bars(bar)
    folder = cache / "streamed"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"cannot get the data set {repo_id!r} from the hub: {first_line(error)}") from error
    commit = _commit(repo_id, revision, folder)
    root = folder / f"{repo_id}@{commit}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        hub = HubFiles(root, repo_id, commit, _listing(repo_id, commit, root))
        if hub.missing():
            with locked(cache):
                shutil.rmtree(cache / FETCHED, ignore_errors=True)
                hub.keep(cache, progress)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot keep the numbers of {repo_id} in {cache}: {error.strerror or error}. "
            "Free space, or set data.cache to another folder",
        ) from error
    return hub


def _commit(repo_id: str, revision: str | None, folder: Path) -> str:
    listings = sorted(folder.glob(f"{glob.escape(repo_id)}@*/{LISTING}"), key=lambda path: path.stat().st_mtime_ns)
    before = [path.parent.name.rpartition("@")[2] for path in listings]
    if revision in before:
        return str(revision)
    try:
        found = _asked(f"the data set {repo_id!r}", lambda: commit_of(repo_id, revision), () if before else None)
    except ValueError:
        if revision is not None or not before:
            raise
        return before[-1]
    if before and found not in before and found != revision:
        raise ValueError(
            f"{revision or 'the newest version'} of {repo_id} on the hub is commit {found}, the one that was streamed "
            f"before is {before[-1]}: give data.revision={before[-1]} to stay with it, or data.revision={found} for "
            "the other one"
        )
    return found


def _listing(repo_id: str, commit: str, root: Path) -> dict[str, tuple[int, str]]:
    path = root / LISTING
    if not path.is_file():
        files = {
            entry.path: (entry.size, entry.blob_id if entry.lfs is None else entry.lfs.sha256)
            for entry in _asked(f"the data set {repo_id!r}", lambda: list(_tree(repo_id, commit)))
            if isinstance(entry, RepoFile)
        }
        if "meta/info.json" not in files:
            raise ValueError(f"{repo_id} on the hub is no LeRobotDataset: it has no meta/info.json at {commit}")
        write_atomic(path, json.dumps({"files": files}))
    with suppress(OSError):  # a folder that cannot be written to
        path.touch()  # the last one is taken without a network
    listed = read_object(path, _anew(root)).get("files")
    try:
        assert isinstance(listed, dict)
        return {name: (int(size), str(checksum)) for name, (size, checksum) in listed.items()}
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged; {_anew(root)}") from error


def _tree(repo_id: str, commit: str) -> Iterator[object]:
    return iter(HfApi().list_repo_tree(repo_id, repo_type="dataset", revision=commit, recursive=True))


def _is_data(name: str) -> bool:
    return name.startswith("data/") and name.endswith(".parquet") and "/." not in name


def _anew(root: Path) -> str:
    return f"delete the folder {root}, and the same command fetches it again"


def _asked(address: str, ask: Callable[[], T], pauses: Sequence[float] | None = None) -> T:
    """Return the hub's answer; ask again where that may help.

    Raises:
        ValueError: the hub says no, or does not answer, or the answer is damaged.
        OSError: the disk is full.
    """
    for pause in (*(PAUSES_S if pauses is None else pauses), None):
        give_up_waiting()
        try:
            return ask()
        except (*hub_errors(), RuntimeError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            reason = error.__cause__ or error if isinstance(error, LocalEntryNotFoundError) else error
            if pause is None or _is_final(reason):
                raise ValueError(
                    f"cannot get {address} from the hub: {first_line(reason)}; the same command goes on from there"
                ) from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _is_final(error: BaseException) -> bool:
    """Return True if asking again cannot help."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code < 500 and error.response.status_code not in BUSY
    return constants.HF_HUB_OFFLINE or isinstance(error, HFValidationError)
