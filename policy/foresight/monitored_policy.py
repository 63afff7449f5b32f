"""A policy whose robots hold once a monitor has raised an alarm, and the folder of a calibrated monitor.

Shape legend: as in docs/architecture.md.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cogvla.configs.build import build
from cogvla.files import file_hash, read_object, write_atomic
from cogvla.policy.foresight.model import DESCRIPTION, WEIGHTS, check_fits, load_foresight
from cogvla.policy.foresight.monitor import SCORES, Monitor, Normal, Thresholds
from cogvla.policy.interface import ActionChunk, Embodiment, Observation, Policy, begin_episode, end_episode

MONITOR, PART = "monitor.json", "foresight"
CALIBRATE = "calibrate it with `calibrate_monitor`"


def find_foresight(folder: Path) -> Path:
    """Return the folder of foresight: this one, or the part `foresight` of a checkpoint.

    Raises:
        ValueError: it is neither.
    """
    for found in (folder, folder / PART):
        if (found / DESCRIPTION).is_file():
            return found
    raise ValueError(
        f"{folder} holds no foresight, and neither does {folder / PART}; fit one with `fit_foresight`, {CALIBRATE}, "
        "and name its folder"
    )


def normal_of(about: Mapping[str, Any], folder: Path) -> Normal:
    """Return what is normal from the facts about a model; ValueError if they do not say it."""
    if not isinstance(about.get("normal"), Mapping):
        raise ValueError(f"the foresight in {folder} does not say what is normal; fit it with `fit_foresight`")
    nested = {key: [tuple(v) if isinstance(v, list) else v for v in values] for key, values in about["normal"].items()}
    return build(Normal, nested, "normal")


def open_monitor(folder: Path, embodiment: Embodiment | None, calibrated: bool = True) -> Monitor:
    """Read the monitor of a folder, see `find_foresight`.

    Args:
        folder: the folder.
        embodiment: the robot that it shall watch; None: not yet known, for a check before a policy is loaded.
        calibrated: False: without thresholds, to measure scores only.

    Raises:
        ValueError: there is none, it is damaged, not calibrated, or for another robot.
    """
    folder = find_foresight(folder)
    model, about = load_foresight(folder)
    if embodiment is not None:
        check_fits(model, embodiment, folder)
    normal = normal_of(about, folder)
    if not calibrated:
        return Monitor(model, normal, None)
    if not (folder / MONITOR).is_file():
        raise ValueError(f"the foresight in {folder} has no thresholds ({MONITOR} is missing); {CALIBRATE}")
    body = read_object(folder / MONITOR, CALIBRATE)
    try:
        thresholds = build(Thresholds, body["thresholds"], "thresholds")
        if any(not float(thresholds.limit[c][s]) >= 0 for c in model.embodiment.camera_names for s in SCORES):
            raise ValueError("a threshold is negative, or no number")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / MONITOR} is damaged ({error}); {CALIBRATE}") from error
    if body.get("weights_sha256") != file_hash(folder / WEIGHTS):
        raise ValueError(f"{folder / MONITOR} was measured with another model than the one beside it; {CALIBRATE}")
    monitor = Monitor(model, normal, thresholds)
    monitor.warm_up()
    return monitor


def save_thresholds(folder: Path, thresholds: Thresholds, about: Mapping[str, Any]) -> None:
    """Write the thresholds into the folder of foresight, with the hash of the model that they were measured with."""
    body = {
        "thresholds": asdict(thresholds),
        "weights_sha256": file_hash(folder / WEIGHTS),
        "about": dict(about),
    }
    write_atomic(folder / MONITOR, json.dumps(body, indent=2, default=str) + "\n")


class MonitoredPolicy:
    """Policy that is watched: once a robot has an alarm, its chunks are replaced by standing still.

    Standing still is an action of zeros, as everywhere in simulation, with the gripper as it was.

    Args:
        policy: the policy.
        monitor: the monitor.
        steps: number of actions of each chunk that are executed before the next observation.
        about: facts for reports.
        holds: False: the policy acts on in spite of alarms.

    Raises:
        ValueError: the horizon of the monitor is no multiple of these steps.
    """

    def __init__(
        self, policy: Policy, monitor: Monitor, steps: int, about: Mapping[str, Any] | None = None, holds: bool = True
    ) -> None:
        if monitor.horizon % steps:
            raise ValueError(
                f"the monitor looks {monitor.horizon} actions ahead, which is no multiple of execute_steps={steps}; "
                "give another protocol.execute_steps"
            )
        self._policy, self._monitor, self._steps, self._holds = policy, monitor, steps, holds
        self._about = about or {}
        self._gripper: dict[Hashable, np.ndarray] = {}

    @classmethod
    def open(cls, policy: Policy, folder: Path, steps: int) -> MonitoredPolicy:
        """Open the calibrated monitor of a folder for a policy.

        Raises:
            ValueError: see `open_monitor` and the class.
        """
        found = find_foresight(folder)
        monitor = open_monitor(found, policy.embodiment)
        measured = monitor.thresholds.execute_steps if monitor.thresholds is not None else None
        if measured not in (None, steps):
            raise ValueError(
                f"the thresholds in {found / MONITOR} hold for execute_steps={measured}, not {steps}: give "
                f"protocol.execute_steps={measured}"
            )
        about = {"monitor": file_hash(found / MONITOR), "foresight": file_hash(found / DESCRIPTION)}
        return cls(policy, monitor, steps, about)

    @property
    def embodiment(self) -> Embodiment:
        return self._policy.embodiment

    @property
    def choice(self) -> Any:
        """The measurement that chose the policy's precision; None: it was given."""
        return getattr(self._policy, "choice", None)

    def unknown_words(self, instruction: str) -> list[str]:
        """Return the words of an instruction that the policy does not know, if it can say so."""
        ask = getattr(self._policy, "unknown_words", None)
        return [] if ask is None else list(ask(instruction))

    def describe(self) -> dict[str, Any]:
        return {**self._policy.describe(), **self._about}

    def reset(self) -> None:
        self._policy.reset()
        self._monitor.clear()
        self._gripper.clear()

    def begin(self, slots: Sequence[Hashable]) -> None:
        begin_episode(self._policy, slots)
        self._monitor.begin(slots)
        for slot in slots:
            self._gripper.pop(slot, None)

    def end(self, slots: Sequence[Hashable]) -> None:
        self.begin(slots)
        end_episode(self._policy, slots)

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        self._policy.warm_up(batch, instructions)

    def noticed(self, slot: Hashable) -> Mapping[str, Any]:
        return self._monitor.noticed(slot)

    def act(self, observation: Observation) -> ActionChunk:
        slots = range(observation.batch_size) if observation.slots is None else observation.slots
        self._monitor.look(slots, observation)
        chunk = self._policy.act(observation)
        actions_BKA, grippers = np.array(chunk.actions), list(self.embodiment.grippers)
        for slot, actions_KA in zip(slots, actions_BKA, strict=True):
            if self._holds and self._monitor.alarm(slot) is not None:
                actions_KA[:] = 0.0
                actions_KA[:, grippers] = self._gripper.get(slot, self.embodiment.gripper_open)
            self._gripper[slot] = actions_KA[self._steps - 1, grippers].copy()
        self._monitor.executed(slots, actions_BKA[:, : self._steps])
        return replace(chunk, actions=actions_BKA)
