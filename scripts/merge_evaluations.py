"""`merge_evaluations`: merge the results of `eval_libero shard=i/n` into one report.

    merge_evaluations outputs/eval_libero/policy/libero_goal_shard*of4 output=outputs/eval_libero/policy/libero_goal

The parts may be from several machines, but must have the same suite, protocol, policy and simulation. Merging needs
neither the policy nor the simulator.
"""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvla.envs.episodes import EpisodeResult
from cogvla.envs.evaluation.episode_log import (
    EPISODES,
    RUN,
    VIDEOS,
    Key,
    check_simulators,
    differences,
    read_episodes,
    read_run,
)
from cogvla.envs.evaluation.evaluate import write_report
from cogvla.envs.evaluation.perturbed import PICTURE
from cogvla.envs.evaluation.report import Report, build_report, check_played, summary
from cogvla.envs.suite import Suite, Task
from cogvla.files import is_left_by_macos, visible, write_atomic
from cogvla.scripts.command import mistakes_in_one_line
from cogvla.scripts.help import argument_parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the command line."""
    parser = argument_parser("merge_evaluations", __doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders with a report.json, one of each shard")
    parser.add_argument("output", metavar="output=FOLDER", help="folder of the whole evaluation")
    options = parser.parse_args(arguments)
    with mistakes_in_one_line():
        if not options.output.startswith("output="):
            raise ValueError("the last argument must be output=FOLDER")
        folders, output = [Path(folder) for folder in options.folders], Path(options.output.removeprefix("output="))
        command = shlex.join(["merge_evaluations", *options.folders, options.output])
        report = merge(folders, output, command)
        print(summary(report))
        print(f"report: {output / 'report.html'}")
        check_played(report, output)


@dataclass(frozen=True)
class FinishedEvaluation:
    """The folder of a finished evaluation, as `eval_libero` wrote it."""

    folder: Path
    fingerprint: dict[str, Any]
    sessions: list[dict[str, Any]]
    report: dict[str, Any]
    results: dict[Key, EpisodeResult]

    @classmethod
    def read(cls, folder: Path) -> FinishedEvaluation:
        """Read the folder of an evaluation.

        Raises:
            ValueError: the evaluation is not finished, or lacks an episode of its report.
        """
        fingerprint, sessions = read_run(folder)
        if not (folder / "report.json").is_file():
            raise ValueError(f"{folder} is not finished (no report.json): run its eval_libero command again")
        report = json.loads((folder / "report.json").read_text())
        reported = {(episode["task"], episode["initial_state"]) for episode in report["episodes"]}
        results = read_episodes(folder / EPISODES)
        if lost := sorted(reported - results.keys()):
            raise ValueError(
                f"{folder / EPISODES} lacks an episode of its report, (task, state) {lost[0]}: run its eval_libero "
                "command again"
            )
        return cls(folder, fingerprint, sessions, report, {key: results[key] for key in sorted(reported)})


def merge(folders: Sequence[Path], output: Path, command: str = "") -> Report:
    """Merge parts of an evaluation; write report, results and videos to `output` as one evaluation.

    Raises:
        ValueError: a part is not finished or has another configuration, two parts have the same episode, a shard or
            an episode is missing, or `output` is not empty.
    """
    if output.exists() and not all(map(is_left_by_macos, output.iterdir())):
        raise ValueError(f"{output} is not empty: choose another output")
    parts = [FinishedEvaluation.read(folder) for folder in folders]
    first = parts[0]
    results: dict[Key, EpisodeResult] = {}
    for part in parts:
        changed = differences(first.fingerprint, part.fingerprint)
        if changed:
            raise ValueError(f"{part.folder} has another configuration than {first.folder} ({'; '.join(changed)})")
        twice = sorted(results.keys() & part.results.keys())
        if twice:
            raise ValueError(f"{part.folder} has episodes of another part, for example (task, state) {twice[0]}")
        results |= part.results
    _check_complete(parts, results)
    sessions = [session for part in parts for session in part.sessions]
    check_simulators(sessions, "play all shards with one version")

    (output / VIDEOS).mkdir(parents=True)
    for part in parts:
        for video in visible(part.folder / VIDEOS, "*.mp4"):
            shutil.copy2(video, output / VIDEOS)
    for part in reversed(parts):
        if (part.folder / PICTURE).exists():
            shutil.copy2(part.folder / PICTURE, output)
    write_atomic(output / RUN, json.dumps({"fingerprint": first.fingerprint, "sessions": sessions}, indent=2) + "\n")
    ordered = [results[key] for key in sorted(results)]
    write_atomic(output / EPISODES, "".join(json.dumps(result.to_dict()) + "\n" for result in ordered))
    suite = _suite(parts)
    protocol = first.report["reproduce"]["protocol"]
    report = build_report(
        suite=suite,
        results=ordered,
        batch_1_ms=[ms for part in parts for ms in part.report["batch_1_ms"]],
        control_hz=1000 * protocol["execute_steps"] / first.report["chunk_ms"],
        reproduce=_reproduce(parts, command),
    )
    write_report(report, suite, output)
    return report


def _check_complete(parts: Sequence[FinishedEvaluation], results: Mapping[Key, EpisodeResult]) -> None:
    """Check that all shards are there, as far as reports say of which they are, and were played alike."""
    named = [part.report["reproduce"]["shard"] for part in parts if "shard" in part.report["reproduce"]]
    counts = sorted({of for _, of in named})
    if len(counts) > 1:
        raise ValueError(f"the shards are of {' and of '.join(map(str, counts))} parts: give those of one division")
    if missing := sorted(set(range(1, counts[0] + 1 if counts else 1)) - {number for number, _ in named}):
        raise ValueError(f"shard {missing[0]}/{counts[0]} is missing: play it, and give the folders of all shards")
    tasks, states = ({key[part] for key in results} for part in (0, 1))
    lost = sorted(key for key in itertools.product(tasks, states) if key not in results)
    if named and lost:
        raise ValueError(
            f"no shard has the episode (task, state) {lost[0]}: they were played with other tasks or "
            "episodes_per_task; run their eval_libero commands again with the same ones"
        )


def _suite(parts: Sequence[FinishedEvaluation]) -> Suite:
    """Build the suite from the tasks in the reports, since the real suite may not be installed."""
    tasks: dict[int, Task] = {}
    for part in parts:
        played = sorted({task for task, _ in part.results})
        tasks |= {i: Task(row["name"], row["instruction"]) for i, row in zip(played, part.report["tasks"], strict=True)}
    everything = tuple(tasks.get(i, Task("", "")) for i in range(max(tasks) + 1))
    return Suite(parts[0].report["suite"], everything, parts[0].report["max_steps"], make=_not_played)


def _not_played(**_: Any) -> Any:
    raise AssertionError("a merged evaluation plays nothing")


def _reproduce(parts: Sequence[FinishedEvaluation], command: str) -> dict[str, Any]:
    """Merge the `reproduce` sections: the first part's, with summed counts, and per-part values where parts differ."""
    each = [part.report["reproduce"] for part in parts]

    def shared(name: str) -> Any:
        if all(found[name] == each[0][name] for found in each):
            return each[0][name]
        return {part.folder.name: found[name] for part, found in zip(parts, each, strict=True)}

    return {
        **{key: value for key, value in each[0].items() if key != "shard"},
        "command": command,
        "commands": [found["command"] for found in each],
        "machine": shared("machine"),
        "versions": shared("versions"),
        "workers": sum(found["workers"] for found in each),
        "run": {
            "episodes": sum(found["run"]["episodes"] for found in each),
            "seconds": sum(found["run"]["seconds"] for found in each),
        },
        "sessions": sum(found["sessions"] for found in each),
        "commits": sorted({commit for found in each for commit in found["commits"]}),
    }


if __name__ == "__main__":
    main()
