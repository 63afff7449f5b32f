"""The folder of a checkpoint on the hub, downloaded once and pinned to a commit."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvla.policy.checkpoint_folder import CONFIG, STATISTICS, WEIGHTS, check_checkpoint_folder
from cogvla.policy.hub.connection import COMMIT, REPO_ID, HubError, give_up_waiting, hub_says, same_content

UNUSED = ("training.pt", "README.md", ".*", "*/.*")
"""Files of a repository that no policy needs."""
WHOLE = ".cogvla_whole"
"""File in a downloaded folder that says that all others are there; others than we may leave it half downloaded."""
_SOURCE = re.compile(rf"(?:https?:/+(?:huggingface|hf)\.co/)?({REPO_ID.pattern})/?(?:@([\w./-]+))?")


class NoCheckpointError(ValueError):
    """A repository of the hub holds no checkpoint of this package."""


def hub_source(source: Path | str) -> tuple[str, str | None] | None:
    """Return repository and revision of USER/NAME[@REVISION] or its address; None: it is no id, or is a path here.

    `outputs/policy` is a path if there is a folder `outputs`, so that a mistyped path is not asked for on the hub.
    """
    if isinstance(source, Path):
        return None
    found = _SOURCE.fullmatch(source)
    if found is None or (not source.startswith("http") and Path(source.partition("/")[0]).exists()):
        return None
    return found[1], found[2]


def find_checkpoint(source: Path | str, otherwise: str = "train one with `train_policy`") -> Path:
    """Return the folder of a checkpoint: the given one, or the downloaded one of a repository of the hub.

    Args:
        source: folder, or USER/NAME[@REVISION] on the hub.
        otherwise: advice for a checkpoint that does not exist.

    Raises:
        ValueError: see `check_checkpoint_folder` and `load_from_hub`.
    """
    hub = None if Path(source).is_dir() else hub_source(source)
    if hub is None:
        check_checkpoint_folder(source, otherwise)
        return Path(source)
    try:
        return load_from_hub(*hub)
    except HubError as error:
        raise ValueError(
            f"no checkpoint folder at {source}, and {error}; or {otherwise}; for published weights, run "
            f"`import_checkpoint {hub[0]} output=FOLDER` first"
        ) from error


def load_from_hub(repo_id: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint of the hub; what is missing in huggingface_hub's cache is downloaded.

    The folder belongs to one commit, and never changes. A commit that is downloaded already needs no network; a branch
    or tag does, since it may have moved.

    Args:
        repo_id: USER/NAME.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        HubError: the hub has no such repository or revision, does not let us read it, or cannot be reached.
        NoCheckpointError: it holds something else.
        ValueError: a file came damaged.
        OSError: the cache cannot be written.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import filter_repo_objects

    given = revision if revision is not None and COMMIT.fullmatch(revision) else None
    if given is not None and (_snapshot(repo_id, given) / WHOLE).is_file():
        return _snapshot(repo_id, given)
    give_up_waiting()
    try:
        with hub_says(repo_id, "read"):
            commit = str(HfApi().model_info(repo_id, revision=revision).sha)
    except HubError as error:
        kept = [] if error.answered else _cached_commits(repo_id)
        if given is not None and given in kept:
            folder = _snapshot(repo_id, given)
            print(f"note: {folder} was downloaded by other means, and without a network nobody knows if it is whole")
            return folder
        advice = f"; checkpoint={repo_id}@{kept[-1]} is downloaded, and needs no network" if kept else ""
        raise HubError(f"{error}{advice}", error.answered) from error
    if (_snapshot(repo_id, commit) / WHOLE).is_file():
        return _snapshot(repo_id, commit)
    with hub_says(repo_id, "read"):
        entries = HfApi().list_repo_tree(repo_id, recursive=True, revision=commit)
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        if missing := [name for name in (CONFIG, WEIGHTS, STATISTICS) if name not in files]:
            raise NoCheckpointError(
                f"{repo_id} on the hub is no checkpoint of this package: it has no {', '.join(missing)}; for published "
                f"weights, run `import_checkpoint {repo_id} output=FOLDER` first"
            )
        others = [CONFIG, *UNUSED]
        folder = Path(snapshot_download(repo_id, revision=commit, ignore_patterns=others))
        needed = list(filter_repo_objects(files, ignore_patterns=others))
        if any(not (folder / name).is_file() for name in needed):  # huggingface_hub only warns
            raise HubError(f"the hub stopped answering before {repo_id} was there: run the same command again", False)
        for name in needed:
            _check(folder / name, files[name], name, repo_id)
        _check(Path(hf_hub_download(repo_id, CONFIG, revision=commit)), files[CONFIG], CONFIG, repo_id)
        with suppress(OSError):  # a cache that only others may write
            (folder / WHOLE).touch()
        return folder


def _check(path: Path, listed: Any, name: str, repo_id: str) -> None:
    """Remove a downloaded file from the cache, and say so, if it is not the one that the hub lists."""
    if not same_content(path, listed):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(f"{name} of {repo_id} came damaged (its hash differs): run the same command again")


def checkpoint_name(folder: Path) -> str:
    """Return a checkpoint's name for reports: USER/NAME@COMMIT in huggingface_hub's cache, else the folder's name."""
    kind, *parts = folder.parent.parent.name.split("--")
    if kind == "models" and len(parts) == 2 and folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name):
        return f"{'/'.join(parts)}@{folder.name}"
    return folder.name


def _snapshot(repo_id: str, commit: str) -> Path:
    """Return the folder of a commit in huggingface_hub's cache, whether it is there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit


def _cached_commits(repo_id: str) -> list[str]:
    """Return the commits of a repository of which all that every policy needs is there, the newest download last."""
    needed = CONFIG, WEIGHTS, STATISTICS
    found = [
        folder
        for folder in _snapshot(repo_id, "").glob("*")
        if COMMIT.fullmatch(folder.name) and all((folder / name).is_file() for name in needed)
    ]
    return [folder.name for folder in sorted(found, key=lambda folder: folder.stat().st_mtime)]
