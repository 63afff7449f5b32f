"""A data set as it is published: its files, and a card made of its metadata and of what its recording says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from cogvla.files import read_object, visible
from cogvla.policy.data import reader
from cogvla.policy.data.files.columns import AGAIN
from cogvla.policy.data.files.metadata import Metadata
from cogvla.policy.hub.cards import card, check_license, cleaned, license_lines, table, without_paths
from cogvla.policy.hub.upload import CARD, Publication

PUBLISHED = ("meta/*", "data/*", "videos/*", "images/*", "recording.json", CARD)
RECORDINGS = ("meta/recording.json", "recording.json")
"""Where `record_demonstrations`, and recordings of robots, say how they were made."""
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def dataset_publication(root: Path | str, name: str, license: str | None = None) -> tuple[Publication, str]:
    """Return a data set as it is published, after checking its numbers and files, and its version, for the tag.

    Args:
        root: folder of a LeRobotDataset.
        name: USER/NAME or the folder, for the card.
        license: identifier of its licence on the hub; None: none is given.

    Raises:
        ValueError: there is no data set, it is damaged, or the licence is no identifier.
    """
    check_license(license)
    root = Path(root)
    if not (root / "meta" / "info.json").is_file():
        raise ValueError(f"there is no LeRobotDataset in {root}: it has no meta/info.json")
    metadata = Metadata(root)
    _check(metadata)
    named = {p.relative_to(root).as_posix(): p for p in visible(root, "**/*") if p.is_file()}
    files: dict[str, Path | bytes] = {n: path for n, path in named.items() if n != CARD and _is_published(n)}
    recording: dict[str, Any] = {}
    for one in RECORDINGS:
        if one in named:
            recording = without_paths(read_object(named[one], AGAIN))
            files[one] = cleaned(named[one].read_bytes())
    files[CARD] = dataset_card(metadata, recording, name, license).encode()
    version = str(read_object(root / "meta" / "info.json", AGAIN)["codebase_version"])
    return Publication("dataset", files, [n for n in named if n not in files], _is_published), version


def _is_published(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PUBLISHED)


def _check(metadata: Metadata) -> None:
    """Check that rows, episodes, tasks and videos agree; see `LeRobotReader`."""
    keys = ("action",) if "action" in metadata.features else ()
    size = sum(metadata.features[key].shape[0] for key in keys)
    mapping = reader.Mapping(tuple(metadata.cameras()), keys, keys, (), "task", size, size)
    whole = reader.LeRobotReader(metadata.root, mapping)
    whole.columns()
    _ = whole.sources, whole.notes


def dataset_card(metadata: Metadata, recording: Mapping[str, Any], name: str, license: str | None) -> str:
    """Return the card of a data set.

    Args:
        metadata: its metadata.
        recording: how it was recorded, without paths of this machine; empty: not known.
        name: USER/NAME, or its folder.
        license: identifier of its licence; None: none is given.
    """
    info = read_object(metadata.path, AGAIN)
    owner, _, short = name.rpartition("/")
    suite = recording.get("suite")
    front = {
        "license": license,
        "task_categories": ["robotics"],
        "tags": ["LeRobot", "robotics", *([suite] if isinstance(suite, str) else [])],
        "configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}],
    }
    robot = recording.get("robot") or info.get("robot_type")
    facts = [
        ("format", f"LeRobotDataset {info['codebase_version']}"),
        ("robot", robot),
        ("episodes", info.get("total_episodes")),
        ("frames", metadata.total_frames),
        ("frames per second", f"{metadata.fps:g}"),
    ]
    columns = [
        (f"`{key}`", feature.dtype, "x".join(map(str, feature.shape)))
        for key, feature in metadata.features.items()
        if key not in BOOKKEEPING
    ]
    tasks = [(number, text) for number, text in sorted(metadata.tasks.items())]
    parts = [
        f"# {short}",
        f"{'Demonstrations' if recording else 'Episodes'} for training robot policies. This card was made by "
        "`share_dataset` from the metadata of the data set.",
        f"## Use\n\n```bash\ntrain_policy data.repo_id={name} ...\n```\n\nor any program that reads LeRobotDatasets.",
        "## Content\n\n" + table(("", ""), [fact for fact in facts if fact[1] is not None]),
        table(("feature", "type", "shape"), columns),
        "Instructions:\n\n" + table(("task", "instruction"), tasks),
        "## Recording\n\n" + _recording(recording),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(metadata, recording)),
        license_lines(license, owner or "its owner"),
    ]
    return card(front, "\n\n".join(part.strip() for part in parts))


def _recording(recording: Mapping[str, Any]) -> str:
    if not recording:
        return "The data set does not say how it was recorded."
    shown = {key: value for key, value in recording.items() if key not in ("tasks", "embodiment") and value is not None}
    return table(("", ""), [(key.replace("_", " "), _said(value)) for key, value in shown.items()])


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_said, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _limits(metadata: Metadata, recording: Mapping[str, Any]) -> list[str]:
    found = []
    if "suite" in recording:
        who = "by a policy that the suite's scripted expert corrects" if recording.get("policy") else "by a script"
        found.append(f"Recorded in simulation {who}; no real robot is in it.")
        if not recording.get("randomise"):
            found.append("Camera, light and background are the same in all episodes.")
    if any(feature.dtype == "video" for feature in metadata.features.values()):
        found.append("Pictures are in compressed videos, not as they were recorded.")
    return found or ["The data set does not say any."]
