"""The suites of a training: their configuration, recordings, statistics and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cogvla.envs.evaluation.report import Report
from cogvla.envs.recording.dataset_folder import START_ANEW
from cogvla.envs.recording.recorder import RECORDING_FILE
from cogvla.envs.suite import Suite
from cogvla.files import read_object
from cogvla.policy.data.config import DataConfig, DataEntry
from cogvla.scripts.command import plain

EVALUATION = "evaluation"


def resolved_for(config: DictConfig, suite: str | None) -> dict[str, Any]:
    """Return the configuration as plain values, with this text for `${suite}`."""
    one = config.copy()
    one.suite = suite
    return plain(one)


def suite_label(wanted: Any, names: Sequence[str]) -> str | None:
    """Return the text for `${suite}` in names of folders: the only suite, or what was asked for."""
    if len(names) < 2:
        return names[0] if names else None
    return wanted if isinstance(wanted, str) else "+".join(wanted)


def folders_to_record(played: Sequence[Suite], configs: Sequence[DataConfig]) -> dict[str, Suite]:
    """Return the folders that are recorded if they are missing, and the suite of each; data of the hub is not.

    Raises:
        ValueError: two suites have the same folder.
    """
    found: dict[str, Suite] = {}
    for suite, config in zip(played, configs, strict=False):
        own = [entry.config for entry in config.entries() if entry.config.repo_id is None]
        if config.root is None or config.repo_id is not None or config.root not in [each.root for each in own]:
            continue
        if (other := found.setdefault(config.root, suite)) is not suite:
            raise ValueError(
                f"data.root={config.root} is one folder for {other.name} and {suite.name}: write it with ${{suite}}, "
                "as in 'data.root=outputs/demonstrations/${suite}', or give demonstrations=null if it holds both"
            )
    return found


def outdated(played: Sequence[Suite], entries: Sequence[DataEntry]) -> list[str]:
    """Return a note for each recording of these suites whose labels meant something else than they do now.

    Raises:
        ValueError: the file that describes a recording is damaged.
    """
    labels = {suite.name: suite.labels for suite in played}
    notes = []
    for root in dict.fromkeys(entry.config.root for entry in entries if entry.config.root is not None):
        if not (path := Path(root) / RECORDING_FILE).is_file():
            continue
        made = read_object(path, START_ANEW)
        name, meaning = made.get("suite"), made.get("labels")
        if name in labels and meaning != labels[name]:
            notes.append(
                f"{root}: the labels of {name} meant something else when it was recorded ({meaning or 1}, now "
                f"{labels[name]}): the policy learns what they were then; record it again for those of now"
            )
    return notes


def own_entry(suite: Suite, config: DataConfig, entries: Sequence[DataEntry]) -> int:
    """Return the index of the data set of a suite: with `data.statistics=each`, its statistics are used there.

    Raises:
        ValueError: it could be several ones.
    """
    own = config.entries()
    if config.statistics == "each" and len(own) > 1:
        place = config.root, config.repo_id
        own = tuple(entry for entry in own if (entry.config.root, entry.config.repo_id) == place)
        if len(own) != 1:
            raise ValueError(
                f"data.statistics=each: no entry of data.mixture is data.root={config.root}, so it is not known which "
                f"statistics are those of {suite.name}: give that data.root, or evaluation=null, and evaluate with "
                "eval_libero statistics=NAME"
            )
    return entries.index(own[0])


def report_folders(played: Sequence[Suite]) -> dict[str, Suite]:
    """Return the folder of each suite's report in the output of a run."""
    return {EVALUATION if len(played) == 1 else f"{EVALUATION}/{suite.name}": suite for suite in played}


def success_rates(reports: Iterable[Report]) -> tuple[float | None, dict[str, float | None]]:
    """Return the mean success rate of suites, and that of each; None where no episode could be played."""
    rates = {report.suite: report.total.success.value for report in reports}
    known = [rate for rate in rates.values() if rate is not None]
    return sum(known) / len(known) if known and len(known) == len(rates) else None, rates


def percent(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate:.1%}"
