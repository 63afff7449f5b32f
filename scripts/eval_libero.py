"""`eval_libero`: evaluate a checkpoint on a suite; report success rate, latency and videos.

    eval_libero checkpoint=FOLDER suite=tabletop_object workers=4
    eval_libero checkpoint=random suite=all_tabletop episodes_per_task=2
    eval_libero checkpoint=ws://127.0.0.1:8000 suite=tabletop_object         (through a policy_server)
    eval_libero checkpoint=lerobot:PATH suite=tabletop_object                (ACT, diffusion, SmolVLA ... of lerobot)
    eval_libero checkpoint=FOLDER asked=both
    eval_libero checkpoint=FOLDER perturbation=all                (the robustness benchmark; or =light level=2)
    eval_libero checkpoint=FOLDER monitor=FOLDER                  (the robot holds where a calibrated monitor alarms)
    eval_libero checkpoint=FOLDER router.name=random router.budget=0.25                      (a plugged-in token router)
    eval_libero checkpoint=FOLDER suite=all_libero protocol=cogvla workers=8 shard=1/4
    eval_libero checkpoint=FOLDER suite=all_libero workers=64 ray=auto          (environments on a Ray cluster)

The same command resumes a stopped evaluation. `merge_evaluations` merges shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from cogvla.envs.evaluation.evaluate import check_evaluation, check_results, evaluate
from cogvla.envs.evaluation.protocol import MEASURED, EvaluationProtocol, protocol_for
from cogvla.envs.evaluation.report import Report, check_played, render_index, summary
from cogvla.envs.evaluation.robustness import CLEAN, chosen_cells, compare, finished_cells, table, write_page
from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.envs.rollout.player import PlayerSettings
from cogvla.envs.rollout.ray_worker import ray_cluster
from cogvla.envs.rollout.workers import ProcessWorker, Worker
from cogvla.envs.suite import Suite, get_suite, suite_names, unknown_suite
from cogvla.files import write_atomic
from cogvla.policy.foresight.monitored_policy import MonitoredPolicy, open_monitor
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, import_modules, plain
from cogvla.scripts.policies import open_any_policy, report_name

ALL = {"all_tabletop": "tabletop_", "all_libero": "libero_"}
"""Names for all suites with the same prefix, except libero_90."""
OWN = "suite"
"""Value of a key of the protocol: use the value of the suite's own protocol."""
ASKED: dict[str | None, tuple[Literal["swap"] | None, ...]] = {None: (None,), "swap": ("swap",), "both": (None, "swap")}


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("eval_libero"))


def run(config: DictConfig, command: str) -> list[Report]:
    """Evaluate on each suite of the configuration, and print the paths of the reports."""
    with nullcontext(ProcessWorker) if config.ray is None else ray_cluster(config.ray) as start_worker:
        return _run(config, command, start_worker)


def _run(config: DictConfig, command: str, start_worker: Callable[[PlayerSettings], Worker]) -> list[Report]:
    import_modules(config.imports)
    played = [get_suite(name, plain(config)) for name in suites(config.suite)]
    protocols = [protocol_of(suite, config) for suite in played]
    shard = _shard(config.shard)
    if config.asked not in ASKED:
        raise ValueError(f"asked must be null, swap or both, got {config.asked!r}")
    cells = [_cells(config, suite) for suite in played]
    given = {"workers": config.workers, "videos": config.videos, "tasks": plain(config)["tasks"], "shard": shard}
    for suite, protocol in zip(played, protocols, strict=True):  # before a policy is loaded
        check_evaluation(suite, protocol, **given)
    if config.monitor is not None:  # likewise
        for protocol in protocols:
            _check_watched(protocol)
        open_monitor(Path(config.monitor), None)
    policy, identity = open_any_policy(
        str(config.checkpoint),
        embodiment=plain(config.embodiment),
        seed=config.seed or 0,
        api_key=config.api_key,
        device=config.device,
        threads=config.threads,
        workers=config.workers if config.ray is None else 0,
        engine=plain(config.engine),
        router=plain(config.router),
        statistics=config.statistics,
        cameras=plain(config.cameras or {}),
    )
    if config.monitor is not None:
        steps = {protocol.execute_steps or policy.embodiment.chunk for protocol in protocols}
        if len(steps) > 1:
            raise ValueError("a monitor needs one execute_steps for all suites: give protocol.execute_steps=N")
        policy = MonitoredPolicy.open(policy, Path(config.monitor), steps.pop())
    builds = config.ray is None and len(played) > 1  # the only suite is checked as soon as it is there
    for suite, protocol in zip(played, protocols, strict=True):  # before the first of them is played
        check_evaluation(suite, protocol, **given, robot=policy.embodiment, builds=builds)
    plugged_in = "" if config.router.name is None else f"_{config.router.name}_{config.router.budget}"
    late = f"_late_{config.latency}" if config.latency else ""
    output = Path(config.output or f"outputs/eval_libero/{report_name(str(config.checkpoint))}{plugged_in}{late}")
    part = "" if config.shard is None else f"_shard{shard[0]}of{shard[1]}"
    modes = [[(asked, None) for asked in ASKED[config.asked]] + [(None, p) for p in perturbed] for perturbed in cells]
    for suite, protocol, of_suite in zip(played, protocols, modes, strict=True):  # before the first is played
        for asked, perturbation in of_suite if config.resume else ():
            there = output / _folder(suite, perturbation or asked, part)
            check_results(policy, suite, protocol, there, asked=asked, perturbation=perturbation, identity=identity)
    reports: dict[str, Report] = {}
    listed: dict[str, Report] = {}
    for suite, protocol, perturbed, of_suite in zip(played, protocols, cells, modes, strict=True):
        if config.protocol.name == OWN:
            print(f"{suite.name}: protocol {protocol.name}, the suite's own; protocol=NAME chooses another one")
        for asked, perturbation in of_suite:
            folder = _folder(suite, perturbation or asked, part)
            reports[folder] = evaluate(
                policy,
                suite,
                protocol,
                output / folder,
                workers=config.workers,
                start_worker=start_worker,
                tasks=plain(config)["tasks"],
                asked=asked,
                perturbation=perturbation,
                shard=shard,
                videos=config.videos,
                resume=config.resume,
                command=command,
                identity=identity,
            )
            listed[folder] = reports[folder]
            if protocol.latency == MEASURED:  # one latency for all of a suite
                protocol = replace(protocol, latency=reports[folder].late_ms)
            print(summary(reports[folder]))
        if perturbed and config.shard is None:
            finished = finished_cells(reports[suite.name], suite, output)  # also those of earlier commands
            found = compare(reports[suite.name], finished)
            folders = {str(p): f"{suite.name}_{p}" for p in finished} | {CLEAN: suite.name}
            listed |= {folders[str(p)]: report for p, report in finished.items()}
            print(table(found))
            print(f"robustness: {write_page(found, output, folders)}")
    if len(reports) > 1:
        write_atomic(output / "index.html", render_index(listed))
        print(f"all reports: {output / 'index.html'}")
    else:
        print(f"report: {output / folder / 'report.html'}")
    for folder, report in reports.items():
        check_played(report, output / folder)
    return list(reports.values())


def suites(wanted: str | Sequence[str] | None) -> list[str]:
    """Return the names of the chosen suites, each once.

    Args:
        wanted: a name, `all_tabletop`, `all_libero`, or a list of these.

    Raises:
        ValueError: a suite is unknown, or none is chosen.
    """
    names: list[str] = []
    for item in [wanted] if isinstance(wanted, str) else wanted or ():
        names += [n for n in suite_names() if n.startswith(ALL[item]) and n != "libero_90"] if item in ALL else [item]
    if not names:
        raise ValueError(f"suite is empty; give a name, a list of names, {' or '.join(ALL)}")
    for name in names:
        if name not in suite_names():
            raise unknown_suite(name, ALL)
    return list(dict.fromkeys(names))


def protocol_of(suite: Suite, config: DictConfig) -> EvaluationProtocol:
    """Return the protocol for a suite with the changes of the configuration."""
    changes = {key: value for key, value in plain(config.protocol).items() if value != OWN}
    changes |= {
        key: config[key] for key in ("episodes_per_task", "seed", "latency", "overlap") if config[key] is not None
    }
    return protocol_for(suite, None, changes)


def _cells(config: DictConfig, suite: Suite) -> list[Perturbation]:
    """Return the cells of the robustness benchmark to play after the clean run."""
    if config.perturbation is not None and config.asked is not None:
        raise ValueError("give either perturbation or asked: a swapped instruction is a measurement of its own")
    values = plain(config)
    return chosen_cells(values["perturbation"], values["level"], suite)


def _folder(suite: Suite, mode: Perturbation | str | None, part: str) -> str:
    """Return the name of the folder of one evaluation: of a suite, a swapped instruction or a cell, and a shard."""
    return suite.name + ("" if mode is None else f"_{mode}") + part


def _check_watched(protocol: EvaluationProtocol) -> None:
    """Check that a monitor can know which actions are executed."""
    if protocol.temporal_ensemble is not None or protocol.latency:
        raise ValueError("a monitor must know what is executed: it needs protocol.temporal_ensemble=null and latency=0")


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    part, slash, parts = str(text).partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"shard must be i/n with i from 1 to n, for example shard=1/4, got {text!r}")
    return int(part), int(parts)


if __name__ == "__main__":
    console.eval_libero()
