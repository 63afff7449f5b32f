"""The folder of a data set, downloaded from the hub if it has to be."""

from __future__ import annotations

import re
from pathlib import Path

from cogvla.errors import first_line
from cogvla.policy.hub.connection import COMMIT, give_up_waiting, hub_errors

READABLE = re.compile(r"v[23]\.\d+")
"""Tags of the hub's LeRobotDatasets that can be read."""


def local_root(root: str | None, repo_id: str | None, revision: str | None) -> tuple[Path, str | None]:
    """Return the data set's folder and its revision, if it is known; download what is missing if `repo_id` is given.

    A folder that was not downloaded from the hub is used as it is, without a revision. One that was is brought to the
    revision; without a network it is used if no revision or its own commit is asked for.

    Args:
        root: folder of the data set; with a `repo_id`, the download folder (None: lerobot's own).
        repo_id: name on the hub; None: only use the folder.
        revision: branch, tag or commit on the hub; None: the newest tag that can be read, else the main branch.

    Raises:
        ValueError: there is no data set in the folder, or it cannot be downloaded.
    """
    if root is None and repo_id is not None:
        from lerobot.utils.constants import HF_LEROBOT_HOME

        root = str(HF_LEROBOT_HOME / repo_id)
    folder = Path(root or ".")
    there = root is not None and (folder / "meta" / "info.json").is_file()
    commit = _downloaded_commit(folder)
    if there and (repo_id is None or commit is None) and revision in (None, commit):
        return folder, commit
    if there and (repo_id is None or commit is None):
        found = "was not downloaded from the hub" if commit is None else f"has revision {commit}"
        raise ValueError(
            f"{root} {found}, so it cannot be checked that it is {revision!r}: leave data.revision out, or choose "
            "another root"
        )
    if repo_id is None:
        raise ValueError(
            f"there is no LeRobotDataset in {root}: record one with `record_demonstrations suite=... output={root}`, "
            "or set data.root to another folder or data.repo_id to a data set of the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = commit_of(repo_id, revision)
        snapshot_download(repo_id, repo_type="dataset", revision=wanted, local_dir=folder)
        if _downloaded_commit(folder) != wanted:  # huggingface_hub only warns, and returns the folder as it was
            raise OSError(f"it stopped answering before {folder} had revision {wanted}")
    except hub_errors() as error:
        if there and revision in (None, commit):
            return folder, commit
        kept = f"; {folder} has revision {commit}, which data.revision={commit} uses as it is" if there else ""
        raise ValueError(f"cannot get the data set {repo_id!r} from the hub: {first_line(error)}{kept}") from error
    return folder, wanted


def commit_of(repo_id: str, revision: str | None) -> str:
    """Return the commit of a revision on the hub; None: of the newest tag that can be read, else of the main branch.

    Raises:
        OSError, HFValidationError: the hub cannot be reached, or says no.
    """
    from huggingface_hub import HfApi

    give_up_waiting()
    if revision is None:
        tags = [ref.name for ref in HfApi().list_repo_refs(repo_id, repo_type="dataset").tags]
        readable = [[int(part) for part in tag[1:].split(".")] for tag in tags if READABLE.fullmatch(tag)]
        revision = "v{}.{}".format(*max(readable)) if readable else None
    return str(HfApi().repo_info(repo_id, repo_type="dataset", revision=revision).sha)


def _downloaded_commit(folder: Path) -> str | None:
    """Return the commit that huggingface_hub noted when it downloaded a folder; None: it did not download it."""
    noted = folder / ".cache" / "huggingface" / "download" / "meta" / "info.json.metadata"
    first = noted.read_text().split("\n")[0].strip() if noted.is_file() else ""
    return first if COMMIT.fullmatch(first) else None
