"""Configuration of the training data: the place of a data set, or of several, and the meaning of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cogvla.configs.build import build
from cogvla.policy.data.files.episodes import check_choice
from cogvla.policy.data.gripper import GripperConvention

INTERVENTION = "intervention"
"""Feature that is true where the demonstrator acted, and false where the policy did."""
STATISTICS = ("joint", "each")
MOST = 1e9
"""Largest size in GB and weight; 1 / MOST is the smallest weight."""
OF_THE_MIXTURE = ("mixture", "statistics", "mixed_rates", "paraphrases", "cache", "cache_gb")
"""Keys of `DataConfig` that hold for all data sets of a mixture."""


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
        streaming: True for a data set of the hub (`repo_id`) that does not fit on the disk: each file with pictures is
            fetched, decoded into `cache`, and deleted (docs/data.md).
        labels: label name in a batch -> key of the data set; labels are supervised in addition to the action.
        gripper: gripper values of the data set (index, open, close), or a list of them for several grippers; None:
            those of the embodiment.
        instruction_key: key of the instruction: `task` (lerobot's task strings), or a string feature.
        episodes: episodes to use: a list of numbers, a range `FIRST:END`, or a share (0.1 or `10%`); None: all.
        paraphrases: YAML or JSON file of your own wordings, instruction -> list of sentences, which training uses
            (docs/training.md); None: none.
        cache: folder for decoded frames; runs with the same data and image size share it.
        cache_gb: largest size of that folder in GB (1e9 bytes): before it grows beyond, the frames that were not used
            for the longest time are deleted (docs/data.md); None: no limit.
        intervention: feature that is true where the demonstrator acted and false where a policy did, whose actions are
            not learned (docs/data.md); data sets may lack `intervention`. None: everything is learned.
        intervention_weight: weight in the loss of frames in which the demonstrator acted, in data sets with that
            feature; other frames have weight 1.
        mixture: several data sets: a list of entries, each with keys of this group that differ for it, and `name` and
            `weight` (docs/data.md); None: one data set.
        statistics: what normalises a mixture: `joint`, statistics over the frames of all its sets; `each`, those of
            the own data set, which must then be named when the policy runs.
        mixed_rates: True to mix data sets with different frame rates as they are.
    """

    cameras: Mapping[str, str]
    state: str | tuple[str, ...] = "observation.state"
    action: str | tuple[str, ...] = "action"
    repo_id: str | None = None
    root: str | None = None
    revision: str | None = None
    streaming: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    gripper: tuple[GripperConvention, ...] | None = None
    instruction_key: str = "task"
    episodes: tuple[int, ...] | str | float | None = None
    paraphrases: str | None = None
    cache: str = "outputs/cache"
    cache_gb: float | None = None
    intervention: str | None = INTERVENTION
    intervention_weight: float = 1.0
    mixture: tuple[Mapping[str, Any], ...] | None = None
    statistics: str = "joint"
    mixed_rates: bool = False

    def __post_init__(self) -> None:
        if self.repo_id is None and self.root is None and self.mixture is None:
            raise ValueError("data needs a root (a folder) or a repo_id (a data set on the hub)")
        if not isinstance(self.streaming, bool):
            raise ValueError(f"data.streaming must be true or false, got {self.streaming!r}")
        if self.streaming and self.mixture is None and (self.repo_id is None or self.root is not None):
            raise ValueError(
                "data.streaming is for data sets of the hub, and keeps what it needs in data.cache; give data.repo_id "
                f"and data.root=null (they are {self.repo_id} and {self.root}), or leave data.streaming out"
            )
        if self.statistics not in STATISTICS:
            raise ValueError(f"data.statistics is {self.statistics!r}; it must be one of {', '.join(STATISTICS)}")
        check_choice(self.episodes)
        if self.cache_gb is not None and not 0 < self.cache_gb <= MOST:
            raise ValueError(f"data.cache_gb must be positive, at most 1e9, or null for no limit; got {self.cache_gb}")
        weight: Any = self.intervention_weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1 / MOST <= weight <= MOST:
            raise ValueError(f"data.intervention_weight must be a positive number, 1e-9 to 1e9, got {weight!r}")
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
        self.entries()

    def entries(self) -> tuple[DataEntry, ...]:
        """Return the data sets of the mixture, or this one.

        Raises:
            ValueError: the mixture is empty, or an entry is wrong.
        """
        if self.mixture is None:
            return (DataEntry(self),)
        given: Any = self.mixture
        if not isinstance(given, tuple) or not given:
            raise ValueError(
                f"data.mixture must be a list of data sets, such as [{{root: A}}, {{root: B}}]; got {given!r}"
            )
        return tuple(self._entry(f"data.mixture[{number}]", values) for number, values in enumerate(given))

    def _entry(self, where: str, values: Any) -> DataEntry:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OF_THE_MIXTURE}
        valid = ("name", "weight", *own)
        own |= {"cache": self.cache, "cache_gb": self.cache_gb}
        if not isinstance(values, Mapping):
            raise ValueError(
                f"{where} must be a mapping such as {{root: FOLDER}}, with keys of {', '.join(valid)}; got {values!r}"
            )
        if whole := [key for key in values if key in OF_THE_MIXTURE]:
            raise ValueError(f"{where}.{whole[0]} is of the whole mixture: give data.{whole[0]} instead")
        if unknown := sorted(str(key) for key in values if key not in valid):
            raise ValueError(f"unknown key {', '.join(unknown)} in {where}; valid keys are {', '.join(valid)}")
        name, weight = values.get("name"), values.get("weight")
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise ValueError(f"{where}.name must be a text, got {name!r}")
        weight = 1.0 if weight is None else weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 1 / MOST <= weight <= MOST:
            raise ValueError(
                f"{where}.weight must be a positive number, 1e-9 to 1e9, got {weight!r}; to leave a data set out, "
                "remove its entry"
            )
        if any(values.get(key) is not None for key in ("root", "repo_id")):
            own |= {"root": None, "repo_id": None, "revision": None}
        own |= {key: value for key, value in values.items() if key in own}
        if "streaming" not in values:
            own["streaming"] = self.streaming and own["root"] is None  # a folder is read where it is
        try:
            config = build(DataConfig, own, where)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
        return DataEntry(config, name, float(weight))

    @property
    def state_keys(self) -> tuple[str, ...]:
        return (self.state,) if isinstance(self.state, str) else self.state

    @property
    def action_keys(self) -> tuple[str, ...]:
        return (self.action,) if isinstance(self.action, str) else self.action


@dataclass(frozen=True)
class DataEntry:
    """One data set of a mixture, or the only one.

    Attributes:
        config: its place and keys; without what belongs to the whole mixture.
        name: its name; None: that of its folder or repository.
        weight: how often each of its frames is drawn, relative to a frame of a data set of weight 1.
    """

    config: DataConfig
    name: str | None = None
    weight: float = 1.0
