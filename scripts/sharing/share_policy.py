"""`share_policy`: publish a checkpoint with a card on the Hugging Face hub, or as a folder.

    share_policy checkpoint=FOLDER repo_id=USER/NAME license=mit report=FOLDER/report.json
    share_policy checkpoint=FOLDER repo_id=USER/NAME 'report=[A/report.json,B_robustness.json]' private=true
    share_policy checkpoint=FOLDER repo_id=USER/NAME dry_run=true        says what would be uploaded, and shows the card
    share_policy checkpoint=FOLDER folder=DIR                            writes the same files to a folder
    eval_libero checkpoint=USER/NAME@COMMIT                              any command runs what was shared

Everything is uploaded in one commit. The same command again uploads only what has changed. Log in with `hf auth login`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogvla.policy.hub.policy_card import policy_publication
from cogvla.policy.hub.upload import CARD, Change, Publication, to_folder, to_hub
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    values = plain(config)
    import_modules(values["imports"])
    given = values["report"] or []
    reports = [given] if isinstance(given, str) else given
    name = place_name(values)
    share(policy_publication(values["checkpoint"], reports, name, values["license"]), values)


def place_name(values: dict[str, Any]) -> str:
    """Return the name for the card; ValueError without a place, or with a key that changes nothing there."""
    if values["repo_id"] is None and values["folder"] is None:
        raise ValueError("give repo_id=USER/NAME, folder=DIR, or both")
    if values["private"] and values["repo_id"] is None:
        raise ValueError("private=true changes nothing for folder=DIR: give repo_id=USER/NAME, or leave it out")
    return str(values["repo_id"] or Path(values["folder"]).resolve().name)


def share(what: Publication, values: dict[str, Any]) -> list[Change]:
    """Publish to `folder` and `repo_id` of the configuration, and print what was done, or would be."""
    dry_run, replace = values["dry_run"], values["replace_card"]
    changes = []
    if values["folder"] is not None:
        changes.append(to_folder(what, Path(values["folder"]), replace, dry_run))
    if values["repo_id"] is not None:
        changes.append(to_hub(what, values["repo_id"], values["private"], replace, dry_run))
    for change in changes:
        print("\n".join(_lines(change, what, dry_run)))
    if dry_run:
        print(f"\n{what.content(CARD).decode()}")
    return changes


def _lines(change: Change, what: Publication, dry_run: bool) -> list[str]:
    place = change.place + (f"@{change.commit}" if change.commit else "") + (" (private)" if change.private else "")
    if change.empty:
        return [f"{place}: everything is there already"]
    lines = [f"{place}: {'would be changed, nothing is written' if dry_run else 'written'}"]
    for word, names in (("new", change.new), ("changed", change.changed)):
        lines += [f"  {word:<8} {name} ({_bytes(what, name):,} bytes)" for name in names]
    lines += [f"  {'removed':<8} {name}" for name in change.removed]
    return lines + [f"  {'left out':<8} {name}" for name in _some(what.left_out)]


def _some(names: Sequence[str], most: int = 10) -> list[str]:
    return [*names[:most], f"and {len(names) - most} others"] if len(names) > most else list(names)


def _bytes(what: Publication, name: str) -> int:
    file = what.files[name]
    return len(file) if isinstance(file, bytes) else file.stat().st_size


if __name__ == "__main__":
    console.share_policy()
