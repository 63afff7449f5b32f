"""`share_dataset`: publish a recorded data set with a card on the Hugging Face hub, or as a folder.

    share_dataset root=outputs/demonstrations/tabletop_goal repo_id=USER/NAME license=cc-by-4.0
    share_dataset root=FOLDER repo_id=USER/NAME dry_run=true             says what would be uploaded, and shows the card
    share_dataset root=FOLDER folder=DIR                                 writes the same files to a folder
    train_policy data.repo_id=USER/NAME                                   trains on what was shared

The data set is checked first, and uploaded in one commit with the tag of its version, by which lerobot finds it. The
same command again uploads only what has changed. Log in with `hf auth login`.
"""

from __future__ import annotations

from omegaconf import DictConfig

from cogvla.policy.data.files.card import dataset_publication
from cogvla.policy.hub.upload import move_tag
from cogvla.scripts import console
from cogvla.scripts.command import plain
from cogvla.scripts.sharing.share_policy import place_name, share


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    values = plain(config)
    what, version = dataset_publication(values["root"], place_name(values), values["license"])
    changes = share(what, values)
    commit = changes[-1].commit
    if values["repo_id"] is not None and not values["dry_run"] and commit is not None:
        moved = move_tag(values["repo_id"], "dataset", version, commit)
        print(f"tag {version} {'now names' if moved else 'names'} this commit")


if __name__ == "__main__":
    console.share_dataset()
