"""Training data: a LeRobotDataset, mapped to an `Embodiment` by its keys.

Frames are in a cache on disk (`frame_cache`); everything else is in memory. pyarrow and lerobot are imported only to
open a data set: training from demonstrations in memory (`packed.py`) works without them.

Shape legend: N frames of the data set, V views, H, W image, S state, A action.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvla.policy.data.config import INTERVENTION, DataConfig
from cogvla.policy.data.frames import Frames
from cogvla.policy.data.gripper import convert_grippers, map_grippers
from cogvla.policy.data.interventions import EXECUTED, Teaching, acted
from cogvla.policy.data.labels import shaped
from cogvla.policy.data.mixture.parts import DataPart
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.interface import Embodiment

SAMPLED_FRAMES = 64
"""Number of frames that the fingerprint of the pictures looks at."""


@dataclass(frozen=True)
class DemonstrationData:
    """Demonstrations in memory (frames on disk), or a part of their episodes.

    Attributes:
        frames: images, uint8 [N,V,3,H,W], at the policy's image size.
        state_NS: states, float32, in physical units.
        action_NA: actions, float32, in physical units.
        episode_N: index of the episode, int64, never decreasing.
        instruction_N: index into `instructions`, int64.
        instructions: distinct instructions.
        frame_labels: labels by name, [N,...].
        chunk: K, number of actions of one sample.
        provenance: description of the data for reports.
        rows: indices of the frames of this part, int64; None: all frames.
        notes: lines for the user about what is unusual in the data set.
        paraphrases: the user's own wordings of instructions.
        parts: the data sets of a mixture, in the order of their frames; (): one data set.
        each: True if each data set of a mixture is normalised by its own statistics.
        lacking: labels that not all data sets of a mixture have -> why they are left out.
        teaching: what each frame teaches; None: everything.
        executed_NA: actions that were executed where they may differ from those to learn, which are without the
            expert's noise, float32; None: the same.
    """

    frames: Frames = field(repr=False)
    state_NS: Tensor = field(repr=False)
    action_NA: Tensor = field(repr=False)
    episode_N: Tensor = field(repr=False)
    instruction_N: Tensor = field(repr=False)
    instructions: list[str]
    frame_labels: dict[str, Tensor] = field(repr=False)
    chunk: int
    provenance: dict[str, Any] = field(default_factory=dict)
    rows: Tensor | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()
    paraphrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[DataPart, ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)
    each: bool = False
    teaching: Teaching | None = field(default=None, repr=False)
    executed_NA: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        lengths = {len(x) for x in (self.frames, self.state_NS, self.action_NA, self.episode_N)}
        assert lengths == {len(self.instruction_N)}, "all arrays have one entry per frame"

    @classmethod
    def open(cls, config: DataConfig, embodiment: Embodiment, progress: bool = True) -> DemonstrationData:
        """Read one data set; decode its frames if they are not in the cache. `open_data` also reads mixtures.

        Raises:
            ValueError: see `checked`.
            OSError: see `checked`.
        """
        return cls.checked(config, embodiment, progress)()

    @classmethod
    def checked(
        cls, config: DataConfig, embodiment: Embodiment, progress: bool = True
    ) -> Callable[[], DemonstrationData]:
        """Read and check all of one data set but its frames.

        Returns:
            Function that decodes the frames if they are not in the cache, and returns the data; it raises the same
            errors.

        Raises:
            ValueError: the data set does not exist, does not fit the embodiment, contains NaN, or is damaged; or the
                configuration is a mixture.
            OSError: the decoded frames cannot be written.
        """
        from cogvla.policy.data.files.metadata import Metadata
        from cogvla.policy.data.frame_cache import open_frames
        from cogvla.policy.data.paraphrases import read_paraphrases
        from cogvla.policy.data.reader import LeRobotReader
        from cogvla.policy.data.reader import Mapping as ReaderMapping
        from cogvla.policy.data.streaming import locate

        if config.mixture is not None:
            raise ValueError(
                "this command reads one data set: leave data.mixture out, and give data.root or data.repo_id"
            )
        missing = [name for name in embodiment.camera_names if name not in config.cameras]
        if missing:
            raise ValueError(
                f"data.cameras has no key for {', '.join(missing)}; it must give the data set's key for each of "
                f"the embodiment's cameras: {', '.join(embodiment.camera_names)}"
            )
        sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
        if len(sizes) != 1:
            raise ValueError(f"all cameras must have the same image size; embodiment {embodiment.name!r} has {sizes}")
        root, revision, hub = locate(config, progress)
        features, who = Metadata(root).features, config.intervention
        who = None if who == INTERVENTION and who not in features else who
        aside = {**({} if who is None else {"": who}), **({EXECUTED: EXECUTED} if EXECUTED in features else {})}
        mapping = ReaderMapping(
            cameras=tuple(config.cameras[name] for name in embodiment.camera_names),
            state=config.state_keys,
            action=config.action_keys,
            labels=(*sorted(config.labels.items()), *aside.items()),
            instruction=config.instruction_key,
            state_dim=embodiment.state_dim,
            action_dim=embodiment.action_dim,
        )
        reader = LeRobotReader(root, mapping, config.episodes, hub)
        arrays, instructions = reader.columns()
        own = {} if config.paraphrases is None else read_paraphrases(config.paraphrases, instructions)
        columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
        actions = convert_grippers(columns.pop("action"), config.gripper, embodiment)
        executed = columns.pop(f"label/{EXECUTED}", None)
        if executed is not None:
            if executed[0].numel() != actions.shape[1]:
                raise ValueError(
                    f"{EXECUTED!r} of {root} has {executed[0].numel()} numbers in each frame, data.action has "
                    f"{actions.shape[1]}: give the action that was recorded with it, or remove this feature"
                )
            executed = map_grippers(executed.reshape(actions.shape).float(), config.gripper, embodiment)
        notes = reader.notes
        if reader.metadata.fps != embodiment.control_hz:
            notes.append(
                f"the data set has {reader.metadata.fps:g} frames per second, the embodiment's control_hz is "
                f"{embodiment.control_hz:g}: the policy will move faster or slower than the demonstrations, unless "
                "meta/info.json is wrong"
            )
        teaching = None
        if who is not None:
            acted_N = acted(columns["label/"], who)
            teaching = Teaching.of(acted_N, EXECUTED in features, config.intervention_weight)
            if untaught := int((teaching.actions_N == 0).sum()):
                notes.append(
                    f"a policy acted in {untaught} of {len(acted_N)} frames ({who} is false), which are not learned; "
                    "data.intervention=null learns them, too"
                )
        if len(set(mapping.cameras)) < len(mapping.cameras):
            notes.append(f"data.cameras gives several cameras the same key: {dict(config.cameras)}")
        labels = {name: shaped(name, key, columns[f"label/{name}"]) for name, key in config.labels.items()}
        (size,) = sizes

        def decode() -> DemonstrationData:
            data = cls(
                frames=open_frames(reader, size, Path(config.cache), config.cache_gb, progress),
                state_NS=columns["state"],
                action_NA=actions,
                episode_N=columns["episode"],
                instruction_N=columns["instruction"],
                instructions=instructions,
                frame_labels=labels,
                chunk=embodiment.chunk,
                notes=tuple(f"{root}: {note}" for note in notes),
                paraphrases=own,
                teaching=teaching,
                executed_NA=executed,
            )
            provenance = {
                "name": config.repo_id or root.name,
                "revision": revision,
                "fingerprint": _digest(*data.content().values()),
                "episodes": int(data.episode_N.unique().numel()),
                "frames": len(data),
            }
            return replace(data, provenance=provenance)

        return decode

    def content(self) -> dict[str, Any]:
        """Return a fingerprint of each part of the content; that of the pictures looks at `SAMPLED_FRAMES` frames.

        That of a mixture has these of each data set, by its name, with its weight. Executed actions are not in it, as
        few trainings read them: see `executed_content`.
        """
        if self.parts:
            return {part.name: {**part.content, "weight": part.weight} for part in self.parts}
        frames = torch.linspace(0, len(self.episode_N) - 1, min(SAMPLED_FRAMES, len(self.episode_N))).long().numpy()
        parts: dict[str, list[str | np.ndarray]] = {
            "pictures": [self.frames.take(frames)],
            "states": [self.state_NS.numpy()],
            "actions": [self.action_NA.numpy()],
            "episodes": [self.episode_N.numpy()],
            "instructions": [self.instruction_N.numpy(), json.dumps(self.instructions)],
            "labels": [part for name, v in sorted(self.frame_labels.items()) for part in (name, v.numpy())],
        }
        if self.teaching is not None:
            parts["interventions"] = [self.teaching.actions_N.numpy(), self.teaching.weight_N.numpy()]
        return {name: _digest(*values) for name, values in parts.items()}

    def executed_content(self) -> str:
        """Return the fingerprint of the actions that were executed."""
        return _digest((self.action_NA if self.executed_NA is None else self.executed_NA).numpy())

    def __len__(self) -> int:
        return len(self.episode_N) if self.rows is None else len(self.rows)

    @property
    def labels(self) -> dict[str, Tensor]:
        """Labels of this part's frames, by name."""
        return {name: self._part(values) for name, values in self.frame_labels.items()}

    @property
    def instruction_ids(self) -> Tensor:
        """Index into `instructions` of each of this part's frames."""
        return self._part(self.instruction_N)

    def describe(self) -> dict[str, Any]:
        """Return the provenance for reports and checkpoints."""
        return dict(self.provenance)

    def statistics(self) -> dict[str, Any]:
        """Return statistics of states and actions over this part's frames; with `each`, by the name of the data set.

        Raises:
            ValueError: a data set has no frames here.
        """
        rows = self.all_rows
        if not self.each:
            return self._statistics(rows)
        return {p.name: self._statistics(rows[p.holds(rows)]) for p in self.parts}

    def _statistics(self, rows: Tensor) -> dict[str, Statistics]:
        return {
            "state": Statistics.of(self.state_NS[rows].numpy()),
            "action": Statistics.of(self.action_NA[rows].numpy()),
        }

    def split(self, validation_fraction: float, seed: int) -> tuple[DemonstrationData, DemonstrationData]:
        """Split by whole episodes into a training part and a held-out part.

        Args:
            validation_fraction: share of held-out episodes in [0,1); at least one episode unless it is 0.
            seed: seed of the choice.

        Raises:
            ValueError: no episode would be left for training.
        """
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
        rows = self.all_rows
        held_out = torch.zeros(len(rows), dtype=torch.bool)
        for part in self.parts:
            mine = part.holds(rows)
            held_out[mine] = self._held_out(rows[mine], validation_fraction, seed)
        if not self.parts:
            held_out = self._held_out(rows, validation_fraction, seed)
        return replace(self, rows=rows[~held_out]), replace(self, rows=rows[held_out])

    def _held_out(self, rows: Tensor, validation_fraction: float, seed: int) -> Tensor:
        """Return True for the held-out ones among these frames of one data set.

        Episodes that teach nothing are not held out, because nothing could be measured on them.
        """
        episodes = self.episode_N[self._taught(rows)].unique()
        if not len(episodes):  # `TrainingBatches` says so
            return torch.zeros(len(rows), dtype=torch.bool)
        count = max(1, round(len(episodes) * validation_fraction)) if validation_fraction else 0
        if self.parts:  # a single episode of one of them is for training
            count = min(count, len(episodes) - 1)
        if count >= len(episodes):
            raise ValueError(
                f"{len(episodes)} episode(s) to learn from cannot be split with validation_fraction "
                f"{validation_fraction}; record more, or set it to 0 (in train_policy)"
            )
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed))
        return torch.isin(self.episode_N[rows], episodes[order[:count]])

    def evenly(self) -> DemonstrationData:
        """Return the same data, with weights that draw as many samples from each of its data sets."""
        rows = self.taught_rows
        counts = [int(part.holds(rows).sum()) for part in self.parts]
        return replace(
            self, parts=tuple(replace(p, weight=1 / max(1, n)) for p, n in zip(self.parts, counts, strict=True))
        )

    def part_of(self, rows_B: Tensor) -> Tensor:
        """Return the index of each frame's data set among `parts`, int64 [B]."""
        return torch.searchsorted(torch.tensor([part.end for part in self.parts]), rows_B, right=True)

    def episode_name(self, row: int) -> str:
        """Return `episode 3`, or `episode 3 of NAME` in a mixture, for the episode of a frame."""
        number = int(self.episode_N[row])
        for part in self.parts:
            if part.start <= row < part.end:
                return f"episode {number - part.first_episode} of {part.name}"
        return f"episode {number}"

    @property
    def all_rows(self) -> Tensor:
        """Indices of the frames of this part, int64."""
        return torch.arange(len(self.episode_N)) if self.rows is None else self.rows

    @property
    def taught_rows(self) -> Tensor:
        """Indices of the frames of this part whose actions are learned, int64."""
        return self._taught(self.all_rows)

    def _taught(self, rows: Tensor) -> Tensor:
        return rows if self.teaching is None else rows[self.teaching.actions_N[rows] > 0]

    def _part(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]


def _digest(*values: str | np.ndarray) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() if isinstance(value, str) else value.tobytes())
    return digest.hexdigest()[:16]
