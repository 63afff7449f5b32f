"""`check_conventions DATASET`: check that a data set has the conventions of the simulator, and list every mismatch.

    check_conventions outputs/demonstrations/tabletop_object
    check_conventions datasets/libero_goal                                       (LIBERO's HDF5 files)
    check_conventions HuggingFaceVLA/libero data=libero_huggingface suite=libero_object
    check_conventions DATASET statistics=outputs/train_policy/libero_object/seed0/policy  (check a checkpoint, too)

Recorded actions are replayed open loop from the recorded initial state. After the data set, give keys of
configs/check_conventions.yaml as KEY=VALUE. Exit status: 0 no mismatch, 1 mismatches, 2 error.

Shape legend: T steps.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from cogvla.configs.build import build
from cogvla.envs.suite import Suite, get_suite
from cogvla.files import read_object, write_atomic
from cogvla.libero.conventions import declared, image_agreement, state_agreement
from cogvla.libero.conventions.declared import Finding
from cogvla.libero.conventions.recorded_episodes import RecordedEpisode, Recordings, open_recordings
from cogvla.libero.conventions.replayed_episodes import ReplayTrace, replay
from cogvla.libero.tasks import LIBERO_SUITES, tasks
from cogvla.policy.data.config import DataConfig
from cogvla.policy.hub.download import find_checkpoint, hub_source
from cogvla.policy.interface import Embodiment
from cogvla.scripts.command import compose, import_modules
from cogvla.scripts.help import argument_parser

IMAGE_SIZE = 128
WIDTH = 118


def main(arguments: list[str] | None = None) -> None:
    """Run the command; the user's mistakes end in one line, not in a traceback."""
    parser = argument_parser("check_conventions", __doc__, config="check_conventions")
    parser.add_argument("dataset", metavar="DATASET", help="folder, HDF5 file, or name of a data set of the hub")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="see configs/check_conventions.yaml")
    options = parser.parse_args(arguments)
    try:
        findings = run(options.dataset, compose("check_conventions", options.overrides))
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if any(finding.verdict == "mismatch" for finding in findings):
        raise SystemExit(1)


def run(dataset: str, config: DictConfig) -> list[Finding]:
    """Check the data set, print the table and write the JSON report; return the findings."""
    import_modules(config.imports)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    embodiment = build(Embodiment, plain["embodiment"], "embodiment")
    recordings = open_recordings(
        dataset, build(DataConfig, plain["data"] | {"root": dataset}, "data"), embodiment, config.suite
    )
    name = config.suite or recordings.suite
    suite = None if name is None else get_suite(name, {str(key): value for key, value in plain.items()})
    stored = None if config.statistics is None else _statistics(str(config.statistics))
    findings = check(recordings, suite, embodiment, episodes=config.episodes, checkpoint=stored)
    print(table(recordings.name, name, findings))
    output = Path(config.output or f"outputs/check_conventions/{recordings.name}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {"dataset": dataset, "suite": name, "findings": [asdict(finding) for finding in findings]}
    write_atomic(output, json.dumps(report, indent=1, default=_plain) + "\n")
    print(f"report: {output}")
    return findings


def check(
    recordings: Recordings,
    suite: Suite | None,
    embodiment: Embodiment,
    *,
    episodes: int = 10,
    checkpoint: dict[str, Any] | None = None,
    progress: bool = True,
) -> list[Finding]:
    """Run all checks.

    Args:
        recordings: data set.
        suite: suite in which it was recorded; None: no simulator, so that nothing is replayed.
        embodiment: conventions of the robot.
        episodes: number of episodes to replay, spread over the data set.
        checkpoint: statistics of a checkpoint, which are compared with the data; None: no checkpoint.
        progress: show a progress bar.

    Raises:
        ValueError: `episodes` is less than 1, or the data set does not fit the suite.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    everything = recordings.episodes
    features = {"action": np.concatenate([episode.actions_TA for episode in everything])}
    seen = [episode.states_TS for episode in everything if episode.states_TS is not None]
    features |= {"state": np.concatenate(seen)} if seen else {}
    said = declared.gripper_range(recordings, embodiment)
    worded = declared.words(everything)
    if suite is not None:
        moved, _ = declared.gripper(everything, embodiment)
        said = said if moved.verdict == "not checked" and said.verdict == "mismatch" else moved
        family = LIBERO_SUITES if suite.name in LIBERO_SUITES else ()
        elsewhere = {task.instruction for other in family for task in tasks(other)}
        worded = declared.instructions(everything, [task.instruction for task in suite.tasks], elsewhere)
    findings = [
        declared.versions(recordings.simulation, {"mujoco": version("mujoco"), **(suite.settings if suite else {})}),
        worded,
        said,
        declared.statistics("statistics", recordings.statistics, features, embodiment),
    ]
    if checkpoint is not None:
        findings.append(declared.statistics("checkpoint's statistics", checkpoint, features, embodiment))
    findings.append(declared.control_rate(recordings, embodiment))
    findings += [Finding("files", "note", notice) for notice in recordings.notices]
    if suite is None:
        text = "no suite: the simulator compares images, states and motion, if you give suite=NAME"
        return [*findings, Finding("replay", "not checked", text)]
    traces = _traces(recordings, suite, embodiment, episodes, progress)
    if not traces:
        return [*findings, Finding("replay", "not checked", "no episode could be assigned to a task of the suite")]
    findings += state_agreement.fixtures(traces)
    findings += image_agreement.images(recordings, traces)
    late, delay = state_agreement.timing(traces, recordings.delay)
    states = state_agreement.states(traces, delay)
    understood = all(finding.verdict == "ok" for finding in states if finding.check == "rotation")
    findings += [
        *states,
        late,
        state_agreement.motion(traces, delay, turns=understood),
        state_agreement.replays(traces, delay),
    ]
    return findings


def _traces(
    recordings: Recordings, suite: Suite, embodiment: Embodiment, count: int, progress: bool
) -> list[ReplayTrace]:
    """Replay `count` episodes, spread evenly over the data set, in one environment."""
    known = {task.instruction: index for index, task in enumerate(suite.tasks)}
    numbers = range(len(suite.tasks))
    playable = [e for e in recordings.episodes if e.start is not None or e.instruction in known]
    playable = [e for e in playable if e.start is None or e.start.task in numbers]
    chosen = (
        [playable[i] for i in np.unique(np.linspace(0, len(playable) - 1, count).round().astype(int))]
        if playable
        else []
    )
    chosen.sort(key=lambda episode: _task(episode, known))  # scenes are built once
    # Executed actions may have another gripper convention than the actions for training.
    _, gripper = declared.gripper([replace(e, actions_TA=e.executed_TA) for e in recordings.episodes], embodiment)
    rest_A = np.zeros(embodiment.action_dim, np.float32)
    rest_A[list(embodiment.grippers)] = embodiment.gripper_open
    env = suite.make(image_size=IMAGE_SIZE)
    try:
        return [
            replay(
                env,
                episode,
                _task(episode, known),
                recordings.cameras,
                gripper,
                rest_A,
                recordings.delay,
                suite.settling_steps,
            )
            for episode in tqdm(chosen, desc="replay", unit="episode", disable=not progress)
        ]
    finally:
        env.close()


def _task(episode: RecordedEpisode, known: dict[str, int]) -> int:
    return known[episode.instruction] if episode.start is None else episode.start.task


def _statistics(source: str) -> dict[str, Any]:
    """Read the statistics of a checkpoint, or of a JSON file like its `statistics.json`."""
    path = Path(source)
    if not path.exists() and hub_source(source) is not None:
        path = find_checkpoint(source)
    file = path / "statistics.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"statistics: there is no {file}")
    found = read_object(file, "give another one")
    if other := [key for key in ("action", "state") if not isinstance(found.get(key, {}), dict)]:
        raise ValueError(f"{file} is damaged ({other[0]} is no object with statistics); give another one")
    if "action" not in found and any(isinstance(values, dict) and "action" in values for values in found.values()):
        raise ValueError(
            f"{file} has statistics of several data sets ({', '.join(found)}): give a JSON file with those of one"
        )
    return found


def table(dataset: str, suite: str | None, findings: Sequence[Finding]) -> str:
    """Return the findings as a table of text."""
    columns = [max(len(finding.check) for finding in findings) + 2, len("not checked") + 2]
    lines = [f"{dataset} in {suite}" if suite else f"{dataset}, without a suite", ""]
    for finding in findings:
        verdict = finding.verdict.upper() if finding.verdict == "mismatch" else finding.verdict
        indent = " " * sum(columns)
        head = f"{finding.check:<{columns[0]}}{verdict:<{columns[1]}}"
        lines.append(textwrap.fill(finding.text, WIDTH, initial_indent=head, subsequent_indent=indent))
        if finding.advice and finding.verdict in ("mismatch", "note"):
            lines.append(textwrap.fill(f"-> {finding.advice}", WIDTH, initial_indent=indent, subsequent_indent=indent))
    wrong = [finding.check for finding in findings if finding.verdict == "mismatch"]
    lines += ["", f"{len(wrong)} mismatch(es): {', '.join(wrong)}" if wrong else "no mismatch"]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


if __name__ == "__main__":
    main()
