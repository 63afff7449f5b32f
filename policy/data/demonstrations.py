"""Training data: a LeRobotDataset, mapped to an `Embodiment` by its keys, and batches of it.

Frames are in a cache on disk (`frame_cache`); everything else is in memory. A batch is built by a few array operations,
without a Python loop over samples and without loader processes. pyarrow and lerobot are imported
only to open a data set: training from demonstrations in memory (`packed.py`) works without them.

Shape legend: N frames of the data set, B batch, V views, H, W image, S state, A action, K chunk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvla.configs.build import build
from cogvla.policy.data.episodes import check_choice
from cogvla.policy.data.frames import Frames
from cogvla.policy.data.gripper import GripperConvention, convert_grippers
from cogvla.policy.data.labels import shaped
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.interface import Embodiment

SAMPLED_FRAMES = 64
"""Number of frames that the fingerprint of the pictures looks at."""


@dataclass(frozen=True)
class DataConfig:
    """The place of a data set and the meaning of its keys.

    Attributes:
        cameras: camera name of the embodiment -> key of the data set.
        state: key of the proprioceptive state, or several, whose values are put one after the other.
        action: key of the action, or several.
        repo_id: name on the hub; None: use the folder `root`.
        root: folder of the data set; with a `repo_id`, the download folder (None: lerobot's own cache).
        revision: revision of the hub repository.
        labels: label name in a batch -> key of the data set; labels are supervised in addition to the action.
        gripper: gripper values of the data set (index, open, close), or a list of them for several grippers; None:
            those of the embodiment.
        instruction_key: key of the instruction: `task` (lerobot's task strings), or a string feature.
        episodes: episodes to use: a list of numbers, a range `FIRST:END`, or a share (0.1 or `10%`); None: all.
        paraphrases: YAML or JSON file of your own wordings, instruction -> list of sentences, which training uses
            (docs/training.md); None: none.
        cache: folder for decoded frames; runs with the same data and image size share it.
    """

    cameras: Mapping[str, str]
    state: str | tuple[str, ...] = "observation.state"
    action: str | tuple[str, ...] = "action"
    repo_id: str | None = None
    root: str | None = None
    revision: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    gripper: tuple[GripperConvention, ...] | None = None
    instruction_key: str = "task"
    episodes: tuple[int, ...] | str | float | None = None
    paraphrases: str | None = None
    cache: str = "outputs/cache"

    def __post_init__(self) -> None:
        if self.repo_id is None and self.root is None:
            raise ValueError("data needs a root (a folder) or a repo_id (a data set on the hub)")
        check_choice(self.episodes)
        for name in ("state", "action"):
            keys = getattr(self, name)
            keys = (keys,) if isinstance(keys, str) else keys
            if not (isinstance(keys, tuple) and keys and all(isinstance(key, str) for key in keys)):
                raise ValueError(f"data.{name} must be a key of the data set, or a list of keys; got {keys!r}")
        given: Any = self.gripper
        grippers = given if isinstance(given, list | tuple) else () if given is None else (given,)
        parsed = (
            g if isinstance(g, GripperConvention) else build(GripperConvention, g, "data.gripper") for g in grippers
        )
        object.__setattr__(self, "gripper", tuple(parsed))

    @property
    def state_keys(self) -> tuple[str, ...]:
        return (self.state,) if isinstance(self.state, str) else self.state

    @property
    def action_keys(self) -> tuple[str, ...]:
        return (self.action,) if isinstance(self.action, str) else self.action


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

    def __post_init__(self) -> None:
        lengths = {len(x) for x in (self.frames, self.state_NS, self.action_NA, self.episode_N)}
        assert lengths == {len(self.instruction_N)}, "all arrays have one entry per frame"

    @classmethod
    def open(cls, config: DataConfig, embodiment: Embodiment, progress: bool = True) -> DemonstrationData:
        """Read a data set; decode its frames if they are not in the cache.

        Raises:
            ValueError: the data set does not exist, does not fit the embodiment, contains NaN, or is damaged.
            OSError: the decoded frames cannot be written.
        """
        from cogvla.policy.data.download import local_root
        from cogvla.policy.data.frame_cache import open_frames
        from cogvla.policy.data.paraphrases import read_paraphrases
        from cogvla.policy.data.reader import LeRobotReader
        from cogvla.policy.data.reader import Mapping as ReaderMapping

        missing = [name for name in embodiment.camera_names if name not in config.cameras]
        if missing:
            raise ValueError(
                f"data.cameras has no key for {', '.join(missing)}; it must give the data set's key for each of "
                f"the embodiment's cameras: {', '.join(embodiment.camera_names)}"
            )
        sizes = {(camera.height, camera.width) for camera in embodiment.cameras}
        if len(sizes) != 1:
            raise ValueError(f"all cameras must have the same image size; embodiment {embodiment.name!r} has {sizes}")
        mapping = ReaderMapping(
            cameras=tuple(config.cameras[name] for name in embodiment.camera_names),
            state=config.state_keys,
            action=config.action_keys,
            labels=tuple(sorted(config.labels.items())),
            instruction=config.instruction_key,
            state_dim=embodiment.state_dim,
            action_dim=embodiment.action_dim,
        )
        root, revision = local_root(config.root, config.repo_id, config.revision)
        reader = LeRobotReader(root, mapping, config.episodes)
        arrays, instructions = reader.columns()
        own = {} if config.paraphrases is None else read_paraphrases(config.paraphrases, instructions)
        columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
        actions = convert_grippers(columns.pop("action"), config.gripper, embodiment)
        notes = reader.notes
        if reader.metadata.fps != embodiment.control_hz:
            notes.append(
                f"the data set has {reader.metadata.fps:g} frames per second, the embodiment's control_hz is "
                f"{embodiment.control_hz:g}: the policy will move faster or slower than the demonstrations, unless "
                "meta/info.json is wrong"
            )
        if len(set(mapping.cameras)) < len(mapping.cameras):
            notes.append(f"data.cameras gives several cameras the same key: {dict(config.cameras)}")
        data = cls(
            frames=open_frames(reader, sizes.pop(), Path(config.cache), progress),
            state_NS=columns.pop("state"),
            action_NA=actions,
            episode_N=columns.pop("episode"),
            instruction_N=columns.pop("instruction"),
            instructions=instructions,
            frame_labels={name: shaped(name, key, columns[f"label/{name}"]) for name, key in config.labels.items()},
            chunk=embodiment.chunk,
            notes=tuple(f"{root}: {note}" for note in notes),
            paraphrases=own,
        )
        provenance = {
            "name": config.repo_id or root.name,
            "revision": revision,
            "fingerprint": _digest(*data.content().values()),
            "episodes": int(data.episode_N.unique().numel()),
            "frames": len(data),
        }
        return replace(data, provenance=provenance)

    def content(self) -> dict[str, str]:
        """Return a fingerprint of each part of the content; that of the pictures looks at `SAMPLED_FRAMES` frames."""
        frames = torch.linspace(0, len(self.episode_N) - 1, min(SAMPLED_FRAMES, len(self.episode_N))).long().numpy()
        parts: dict[str, list[str | np.ndarray]] = {
            "pictures": [self.frames.take(frames)],
            "states": [self.state_NS.numpy()],
            "actions": [self.action_NA.numpy()],
            "episodes": [self.episode_N.numpy()],
            "instructions": [self.instruction_N.numpy(), json.dumps(self.instructions)],
            "labels": [part for name, v in sorted(self.frame_labels.items()) for part in (name, v.numpy())],
        }
        return {name: _digest(*values) for name, values in parts.items()}

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

    def statistics(self) -> dict[str, Statistics]:
        """Return statistics of states and actions over this part's frames."""
        return {
            "state": Statistics.of(self._part(self.state_NS).numpy()),
            "action": Statistics.of(self._part(self.action_NA).numpy()),
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
        rows = torch.arange(len(self.episode_N)) if self.rows is None else self.rows
        episodes = self.episode_N[rows].unique()
        count = max(1, round(len(episodes) * validation_fraction)) if validation_fraction else 0
        if count >= len(episodes):
            raise ValueError(
                f"{len(episodes)} episode(s) cannot be split with validation_fraction {validation_fraction}; "
                "record more, or set it to 0"
            )
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed))
        held_out = torch.isin(self.episode_N[rows], episodes[order[:count]])
        return replace(self, rows=rows[~held_out]), replace(self, rows=rows[held_out])

    def _part(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]


class TrainingBatches:
    """Batches in an order that depends on (seed, step) only, so that training resumes exactly at any step.

    An epoch is a permutation of the data's frames; its last batch is filled with the first frames of the next epoch.
    Iteration increments `step`; `rows(step)` and `gather(rows)` do not change it.
    """

    def __init__(self, data: DemonstrationData, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        if not len(data):
            raise ValueError("there are no demonstrations to draw batches from")
        self.data, self.batch_size, self.seed, self.step = data, batch_size, seed, 0
        self._rows = torch.arange(len(data)) if data.rows is None else data.rows
        changes = data.episode_N.diff().nonzero().flatten() + 1
        ends = torch.cat([changes, torch.tensor([len(data.episode_N)])])
        self._end_N = ends[torch.searchsorted(ends, torch.arange(len(data.episode_N)), right=True)]
        self._epochs: dict[int, Tensor] = {}

    def rows(self, step: int) -> Tensor:
        """Return the frames of batch number `step`, int64 [B]."""
        size = len(self._rows)
        position_B = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch_B = position_B // size
        epochs = range(int(epoch_B[0]), int(epoch_B[-1]) + 1)
        self._epochs = {epoch: self._epochs.get(epoch, None) for epoch in epochs}  # type: ignore[misc]
        parts = [self._permutation(epoch)[position_B[epoch_B == epoch] % size] for epoch in epochs]
        return self._rows[torch.cat(parts)]

    def gather(self, rows_B: Tensor) -> dict[str, Any]:
        """Return the samples that start at these frames.

        Returns:
            `pixels` uint8 [B,V,3,H,W], `state` float32 [B,S], `actions` float32 [B,K,A] (the episode's last action is
            repeated), `action_is_pad` bool [B,K] (True after the end of the episode), `instruction_id` int64 [B], and
            `labels`, name -> [B,...].
        """
        return {"pixels": torch.from_numpy(self.data.frames.take(rows_B.numpy())), **self.columns(rows_B)}

    def columns(self, rows_B: Tensor) -> dict[str, Any]:
        """Return the samples of `gather` without the pixels."""
        data = self.data
        index_BK = rows_B[:, None] + torch.arange(data.chunk)
        end_B1 = self._end_N[rows_B][:, None]
        return {
            "state": data.state_NS[rows_B],
            "actions": data.action_NA[torch.minimum(index_BK, end_B1 - 1)],
            "action_is_pad": index_BK >= end_B1,
            "instruction_id": data.instruction_N[rows_B],
            "labels": {name: values[rows_B] for name, values in data.frame_labels.items()},
        }

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = self.gather(self.rows(self.step))
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return the state that is needed to resume."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a result of `state_dict`.

        Raises:
            ValueError: it is from other data, another batch size or another seed.
        """
        changed = [f"{k} was {state[k]}, is {v}" for k, v in self._identity().items() if state[k] != v]
        if changed:
            raise ValueError(f"cannot resume with another order of the data: {'; '.join(changed)}")
        self.step = state["step"]

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "frames": len(self._rows)}

    def _permutation(self, epoch: int) -> Tensor:
        order = self._epochs.get(epoch)
        if order is None:
            seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
            order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed))
            self._epochs[epoch] = order
        return order


def _digest(*values: str | np.ndarray) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() if isinstance(value, str) else value.tobytes())
    return digest.hexdigest()[:16]
