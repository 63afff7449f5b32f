"""Mixtures: several data sets, of the same shapes, as one.

Columns are put one after the other, frames stay where they are. Episodes and tasks get numbers of their own,
instructions that several sets have are one, and labels that a set lacks are left out.

Shape legend: N frames, D state or action dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvla.files import read_object
from cogvla.policy.data.config import DataConfig, DataEntry
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frames import ConcatenatedFrames
from cogvla.policy.data.interventions import concatenated
from cogvla.policy.data.mixture.parts import DataPart
from cogvla.policy.data.mixture.task_labels import TASK_LABELS, TaskColumns, contradiction, spread
from cogvla.policy.interface import Embodiment

SMALL = 0.02
"""A set whose values fill less than this share of the common range is noted: it may have another unit."""


@dataclass(frozen=True)
class Place:
    """A data set of a mixture that was found: name, folder, commit, rate, and how it was recorded, if known.

    `suite` is that of the recording, `labels` the number of the meaning of its labels (`envs.suite.Suite.labels`),
    `states` and `actions` what their entries are, if it says so.
    """

    name: str
    entry: DataEntry
    root: Path
    revision: str | None
    fps: float
    suite: str | None
    labels: int | None = None
    states: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()


def open_data(
    config: DataConfig, embodiment: Embodiment, entries: Sequence[DataEntry] | None = None, progress: bool = True
) -> DemonstrationData:
    """Open the data set of a configuration, or its mixture.

    Args:
        config: the data set; for a mixture, what holds for all sets.
        embodiment: the robot.
        entries: the data sets; None: those of the configuration.
        progress: show a bar while frames are decoded.

    Raises:
        ValueError: see `DemonstrationData.open`; or two data sets are the same one, have one name, or different rates.
        OSError: see `DemonstrationData.open`.
    """
    entries = config.entries() if entries is None else entries
    if len(entries) == 1:
        own = replace(entries[0].config, paraphrases=config.paraphrases)
        return DemonstrationData.open(own, embodiment, progress)
    places = _places(entries, progress)
    if not config.mixed_rates:
        for place in places[1:]:
            if place.fps != places[0].fps:
                raise ValueError(
                    f"data.mixture: {places[0].name} has {places[0].fps:g} frames per second, {place.name} "
                    f"{place.fps:g}: an action would mean another speed in each. Leave one out, or mix them as they "
                    "are with data.mixed_rates=true"
                )
    opened = []
    for place in places:  # all are checked before the frames of one are decoded, which may take hours
        with _named(place.name):
            own = replace(place.entry.config, revision=place.revision)
            opened.append(DemonstrationData.checked(own, embodiment, progress))
    sets = []
    for place, decode in zip(places, opened, strict=True):
        with _named(place.name):
            sets.append(decode())
    return joined(places, sets, config)


def _places(entries: Sequence[DataEntry], progress: bool) -> list[Place]:
    """Find all data sets before anything slow starts."""
    from cogvla.policy.data.files.metadata import Metadata
    from cogvla.policy.data.streaming import locate

    found = []
    for entry in entries:
        said = entry.name or entry.config.repo_id or entry.config.root or ""
        with _named(said):
            root, revision, _ = locate(entry.config, progress)
            metadata = Metadata(root)
            states, actions = map(metadata.entry_names, (entry.config.state_keys, entry.config.action_keys))
            recording = root / "meta" / "recording.json"
            made = read_object(recording, "delete it") if recording.is_file() else {}
        suite, labels = made.get("suite"), made.get("labels")
        recorded = suite if isinstance(suite, str) else None, labels if isinstance(labels, int) else None
        found.append(Place(said, entry, root, revision, metadata.fps, *recorded, states, actions))
    folders = [place.root.resolve() for place in found]
    if twice := [place for place in found if folders.count(place.root.resolve()) > 1]:
        raise ValueError(
            f"data.mixture has the data set {twice[0].root} twice: give it once, with a weight to draw it more often"
        )
    short = [place.entry.name or place.entry.config.repo_id or place.root.resolve().name for place in found]
    names = [
        place.name if short.count(name) > 1 and place.entry.name is None else name
        for place, name in zip(found, short, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"data.mixture: two data sets have the name {name!r}; give each entry another name")
    found = [replace(place, name=name) for place, name in zip(found, names, strict=True)]
    for one, other in combinations(found, 2):
        for what, mine, its in (("state", one.states, other.states), ("action", one.actions, other.actions)):
            if mine != its and sorted(mine) == sorted(its):
                raise ValueError(
                    f"data.mixture: {what} is {', '.join(mine)} in {one.name} and {', '.join(its)} in {other.name}: "
                    "the same entries in another order. Write one of them again in the order of the other, or correct "
                    "the names in its meta/info.json"
                )
    return found


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.mixture, {name}: {error}") from error


def joined(places: Sequence[Place], sets: Sequence[DemonstrationData], config: DataConfig) -> DemonstrationData:
    """Return data sets as one.

    Args:
        places: what is known of each.
        sets: the data sets, in the same order.
        config: what holds for the whole mixture.

    Raises:
        ValueError: `data.paraphrases` does not fit the instructions.
        OSError: `data.paraphrases` cannot be read.
    """
    from cogvla.policy.data.paraphrases import read_paraphrases

    names = [place.name for place in places]
    ends = np.cumsum([len(data) for data in sets]).tolist()
    counts = [int(data.episode_N[-1]) + 1 for data in sets]
    first_episodes = [sum(counts[:i]) for i in range(len(sets))]
    instructions = sorted({text for data in sets for text in data.instructions})
    number = {text: i for i, text in enumerate(instructions)}
    parts = tuple(
        DataPart(
            name=place.name,
            start=end - len(data),
            end=end,
            first_episode=first,
            weight=place.entry.weight,
            content=data.content(),
            provenance={**data.provenance, "name": place.name, "weight": place.entry.weight},
        )
        for place, data, end, first in zip(places, sets, ends, first_episodes, strict=True)
    )
    labels, lacking = _labels(places, sets)
    own = {} if config.paraphrases is None else read_paraphrases(config.paraphrases, instructions)
    digest = hashlib.sha256(json.dumps([[p.name, p.weight, dict(p.content)] for p in parts]).encode())
    notes = [note for data in sets for note in data.notes]
    notes += [
        f"label {', '.join(sorted(name for name in lacking if lacking[name] == why))} is left out: {why}"
        for why in dict.fromkeys(lacking.values())
    ]
    notes += _twice(names, sets) + _phases(places, labels) + _other_names(places)
    if config.statistics == "joint":
        notes += _units("state", names, [data.state_NS for data in sets])
        notes += _units("action", names, [data.action_NA for data in sets])
    return DemonstrationData(
        frames=ConcatenatedFrames(tuple(data.frames for data in sets)),
        state_NS=torch.cat([data.state_NS for data in sets]),
        action_NA=torch.cat([data.action_NA for data in sets]),
        episode_N=torch.cat([data.episode_N + first for data, first in zip(sets, first_episodes, strict=True)]),
        instruction_N=torch.cat(
            [torch.tensor([number[t] for t in data.instructions])[data.instruction_N] for data in sets]
        ),
        instructions=instructions,
        frame_labels=labels,
        chunk=sets[0].chunk,
        provenance={
            "name": " + ".join(names),
            "revision": None,
            "fingerprint": digest.hexdigest()[:16],
            "episodes": sum(int(part.provenance["episodes"]) for part in parts),
            "frames": ends[-1],
            "sets": {part.name: dict(part.provenance) for part in parts},
        },
        notes=tuple(notes),
        paraphrases=own,
        parts=parts,
        lacking=lacking,
        each=config.statistics == "each",
        executed_NA=None
        if all(data.executed_NA is None for data in sets)
        else torch.cat([data.action_NA if data.executed_NA is None else data.executed_NA for data in sets]),
        teaching=concatenated([data.teaching for data in sets], [len(data) for data in sets], sets[0].chunk),
    )


def _labels(places: Sequence[Place], sets: Sequence[DemonstrationData]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the labels that all sets have, and why the others are left out."""
    lacking: dict[str, str] = {}
    names = dict.fromkeys(name for data in sets for name in data.frame_labels)
    for one, other in combinations(sorted(places, key=lambda place: place.labels or 0), 2):
        if one.suite is not None and one.suite == other.suite and one.labels != other.labels:
            why = (
                f"the labels of {one.suite} meant something else when {one.name} was recorded than for {other.name} "
                f"({one.labels or 1} and {other.labels}); record {one.name} again"
            )
            return {}, dict.fromkeys(names, why)
    for name in names:
        without = [place.name for place, data in zip(places, sets, strict=True) if name not in data.frame_labels]
        shapes = {
            tuple(data.frame_labels[name].shape[1:]): place.name
            for place, data in zip(places, sets, strict=True)
            if name in data.frame_labels
        }
        if without:
            lacking[name] = f"{', '.join(without)} {'has' if len(without) == 1 else 'have'} none"
        elif len(shapes) > 1 and name not in TASK_LABELS:
            lacking[name] = "its shape is " + ", ".join(f"{list(shape)} in {who}" for shape, who in shapes.items())
    first: list[int] = []
    total = 0
    if all(name not in lacking and name in sets[0].frame_labels for name in TASK_LABELS):
        columns: list[TaskColumns] = []
        for place, data in zip(places, sets, strict=True):
            if wrong := contradiction(data.frame_labels, data.instruction_N, data.instructions):
                lacking |= dict.fromkeys(TASK_LABELS, f"{place.name}: {wrong}")
                break
            pairs = torch.stack([data.frame_labels["task"].flatten(), data.instruction_N], dim=1).unique(dim=0)
            texts = {task: data.instructions[i] for task, i in pairs.tolist()}
            count = data.frame_labels["possible"].shape[-1]
            same = next((c for c in columns if c.same_tasks(place.suite, texts, count)), None)
            begin = total if same is None else same.first
            known = texts if same is None else {**same.instruction_of, **texts}
            columns = [c for c in columns if c is not same] + [TaskColumns(place.suite, begin, known, count)]
            first.append(begin)
            total = max(total, begin + count)
    elif some := [name for name in TASK_LABELS if name in sets[0].frame_labels and name not in lacking]:
        without_all = f"it means nothing without all of {', '.join(TASK_LABELS)}"
        lacking |= dict.fromkeys(some, without_all)
    kept = {name: [data.frame_labels[name] for data in sets] for name in sets[0].frame_labels if name not in lacking}
    joint = {
        name: spread(name, values, first, total) if name in TASK_LABELS else torch.cat(values)
        for name, values in kept.items()
    }
    return joint, lacking


def _twice(names: Sequence[str], sets: Sequence[DemonstrationData]) -> list[str]:
    """Return a note for every two sets that share episodes: frames count twice then, and held-out ones are trained."""
    notes = []
    for (one, a, first), (other, b, second) in combinations(zip(names, sets, map(_episodes, sets), strict=True), 2):
        rows = [(first[key], second[key]) for key in first.keys() & second.keys()]
        if count := sum(np.array_equal(a.frames.take(np.array([i])), b.frames.take(np.array([j]))) for i, j in rows):
            notes.append(f"{one} and {other} hold the same demonstrations ({count} episodes)")
    return notes


def _episodes(data: DemonstrationData) -> dict[int, int]:
    """Return the first frame of each episode by a hash of its instruction, states and actions."""
    starts = np.flatnonzero(np.diff(data.episode_N.numpy(), prepend=-1)).tolist()
    found = {}
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        numbers = (values[start:end].numpy().tobytes() for values in (data.state_NS, data.action_NA))
        found[hash((data.instructions[int(data.instruction_N[start])], *numbers))] = start
    return found


def _units(what: str, names: Sequence[str], values: Sequence[Tensor]) -> list[str]:
    """Return a note for each dimension in which one set's values may have another unit than the others'."""
    quantiles = [np.quantile(x_ND.numpy(), [0.01, 0.99], axis=0) for x_ND in values]
    notes = []
    for d in range(values[0].shape[1]):
        ranges = [(float(low[d]), float(high[d])) for low, high in quantiles]
        common = max(high for _, high in ranges) - min(low for low, _ in ranges)
        small = [i for i, (low, high) in enumerate(ranges) if 0 < high - low < SMALL * common]
        if small:
            wide = max(range(len(ranges)), key=lambda i: ranges[i][1] - ranges[i][0])
            said = (f"{names[i]} {ranges[i][0]:.4g} to {ranges[i][1]:.4g}" for i in (small[0], wide))
            notes.append(f"{what} {d} has very different ranges: {', '.join(said)}; check the units of both")
    return notes


def _other_names(places: Sequence[Place]) -> list[str]:
    """Return a note for each data set whose states or actions have other names than those of the first."""
    notes = []
    for place in places[1:]:
        pairs = ("state", places[0].states, place.states), ("action", places[0].actions, place.actions)
        for what, mine, its in pairs:
            other = [number for number, pair in enumerate(zip(mine, its, strict=False)) if pair[0] != pair[1]]
            if other:
                number = other[0]
                notes.append(
                    f"{what} {number} is {mine[number]!r} in {places[0].name} and {its[number]!r} in {place.name}; "
                    "check that both mean the same"
                )
    return notes


def _phases(places: Sequence[Place], labels: dict[str, Tensor]) -> list[str]:
    families = {None if place.suite is None else place.suite.partition("_")[0]: place.name for place in places}
    if "phase" not in labels or len(families) == 1:
        return []
    said = ", ".join(f"{who} is from {family or 'an unknown suite'}" for family, who in families.items())
    return [
        f"label phase may mean other things in other sets ({said}), and objective.phase_weights goes by its number; "
        "objective.phase_weights=[] weights all phases alike"
    ]
