"""Publish a set of files as a repository of the hub, in one commit, or as a folder.

Nothing is written that is there already; files of earlier uploads that no longer belong to the set are removed; other
files stay. A README.md that was written by hand is not replaced unasked, see `cards.is_ours`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cogvla.files import is_left_by_macos
from cogvla.policy.checkpoint import atomic_folder
from cogvla.policy.hub.cards import is_ours
from cogvla.policy.hub.connection import REPO_ID, HubError, give_up_waiting, hub_errors, hub_says, same_content

CARD = "README.md"
WRITE_S = 600.0
"""Seconds that the hub may take to take files and to make a commit."""
Kind = Literal["model", "dataset"]


@dataclass(frozen=True)
class Publication:
    """A set of files to publish.

    Attributes:
        kind: what the hub calls it.
        files: path in the repository -> its content, or the file that holds it; with the card.
        left_out: files of the source that are not published, for the user.
        ours: tells for a path whether an upload of this kind may remove it.
    """

    kind: Kind
    files: Mapping[str, Path | bytes]
    left_out: Sequence[str]
    ours: Callable[[str], bool]

    def content(self, name: str) -> bytes:
        """Return the content of a file."""
        file = self.files[name]
        return file if isinstance(file, bytes) else file.read_bytes()


@dataclass(frozen=True)
class Change:
    """Changes that publishing makes at one place.

    Attributes:
        place: folder or repository, for messages.
        new, changed, removed: paths of files.
        commit: the commit that is there, before or after the upload; None: a folder, or a new repository.
        private: whether only its owner sees it.
    """

    place: str
    new: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    commit: str | None = None
    private: bool = False

    @property
    def empty(self) -> bool:
        return not (self.new or self.changed or self.removed)


def to_folder(what: Publication, folder: Path, replace_card: bool, dry_run: bool = False) -> Change:
    """Write the files to a folder, all or nothing.

    Raises:
        ValueError: the folder holds other files, or a card that was written by hand.
        OSError: the folder cannot be written.
    """
    there = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    there = {name: path for name, path in there.items() if not is_left_by_macos(path)}
    if foreign := [name for name in there if name not in what.files and not what.ours(name)]:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}): choose another folder")
    if CARD in there:
        _check_card(there[CARD].read_bytes(), str(folder), replace_card)
    same = {name for name, path in there.items() if name in what.files and same_content(what.files[name], path)}
    change = _change(str(folder), what, there, same)
    if not (dry_run or change.empty):
        with atomic_folder(folder) as draft:
            for name, file in what.files.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                _write(draft / name, file)
    return change


def to_hub(what: Publication, repo_id: str, private: bool, replace_card: bool, dry_run: bool = False) -> Change:
    """Upload the files to a repository in one commit, which it makes if there is none.

    Args:
        what: the files.
        repo_id: USER/NAME.
        private: only the owner may see it.
        replace_card: replace a card that was written by hand.
        dry_run: only say what would be changed.

    Raises:
        HubError: the hub does not let us, or cannot be reached.
        ValueError: the id is wrong, the repository is public and should be private, or its card was written by hand.
        OSError: a file cannot be read.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id} is no id of the hub: give USER/NAME")
    give_up_waiting()
    api = HfApi()
    info = _repository(api, repo_id, what.kind)
    if info is not None and private and not info.private:
        raise ValueError(f"{repo_id} is public, and private=true does not change that: do so on its page, or leave it")
    if info is None and not dry_run:
        with hub_says(repo_id, "write"):
            api.create_repo(repo_id, repo_type=what.kind, private=private, exist_ok=True)
        info = _repository(api, repo_id, what.kind)
        if info is None:
            raise HubError(f"the hub did not make {repo_id}: run the same command again", True)
    commit = None if info is None else str(info.sha)
    there = {} if commit is None else _listing(api, repo_id, what.kind, commit)
    if commit is not None and CARD in there and not same_content(what.files[CARD], there[CARD]):
        with hub_says(repo_id, "read"):
            held = api.hf_hub_download(repo_id, CARD, repo_type=what.kind, revision=commit)
        _check_card(Path(held).read_bytes(), repo_id, replace_card)
    same = {name for name, file in there.items() if name in what.files and same_content(what.files[name], file)}
    change = _change(repo_id, what, there, same, commit, private if info is None else bool(info.private))
    if dry_run or change.empty:
        return change
    give_up_waiting(WRITE_S)
    add = [CommitOperationAdd(name, _source(what.files[name])) for name in (*change.new, *change.changed)]
    remove = [CommitOperationDelete(name, is_folder=False) for name in change.removed]
    with hub_says(repo_id, "write"):
        try:
            made = api.create_commit(
                repo_id,
                [*add, *remove],
                commit_message="Upload by cogvla",
                repo_type=what.kind,
                parent_commit=commit,
            )
        except RuntimeError as error:  # of huggingface_hub below version 1, around the reason
            if isinstance(error.__cause__, hub_errors()):
                raise error.__cause__ from error
            raise
    return Change(repo_id, change.new, change.changed, change.removed, str(made.oid), change.private)


def move_tag(repo_id: str, kind: Kind, tag: str, commit: str) -> bool:
    """Let a tag name this commit; return False if it does already.

    Raises:
        HubError: see `to_hub`.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_says(repo_id, "write"):
        tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=kind).tags}
        if tags.get(tag) == commit:
            return False
        if tag in tags:
            api.delete_tag(repo_id, tag=tag, repo_type=kind)
        api.create_tag(repo_id, tag=tag, revision=commit, repo_type=kind)
    return True


def _repository(api: Any, repo_id: str, kind: Kind) -> Any:
    """Return what the hub says about a repository; None: it has none that we may see."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with hub_says(repo_id, "read"):
        try:
            return api.repo_info(repo_id, repo_type=kind)
        except RepositoryNotFoundError as error:
            if isinstance(error, GatedRepoError):
                raise
            return None


def _listing(api: Any, repo_id: str, kind: Kind, commit: str) -> dict[str, Any]:
    from huggingface_hub.hf_api import RepoFile

    with hub_says(repo_id, "read"):
        entries = api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=kind)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _change(
    place: str,
    what: Publication,
    there: Mapping[str, Any],
    same: set[str],
    commit: str | None = None,
    private: bool = False,
) -> Change:
    new = tuple(name for name in what.files if name not in there)
    changed = tuple(name for name in what.files if name in there and name not in same)
    removed = tuple(name for name in there if name not in what.files and what.ours(name))
    return Change(place, new, changed, removed, commit, private)


def _check_card(there: bytes, place: str, replace: bool) -> None:
    if not replace and not is_ours(there.decode(errors="replace")):
        raise ValueError(
            f"{CARD} of {place} was written or changed by hand: replace_card=true replaces it; keep a copy first"
        )


def _source(file: Path | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else str(file)


def _write(path: Path, file: Path | bytes) -> None:
    if isinstance(file, bytes):
        path.write_bytes(file)
        return
    with file.open("rb") as source, path.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
