"""`eval_libero`: success rate, latency, videos and a report of any checkpoint on any suite.

    eval_libero checkpoint=FOLDER suite=tabletop_object workers=4
    eval_libero checkpoint=random suite=all_tabletop episodes_per_task=2
    eval_libero checkpoint=ws://127.0.0.1:8000 suite=tabletop_object         (through a policy_server)
    eval_libero checkpoint=FOLDER asked=both
    eval_libero checkpoint=FOLDER router.name=random router.budget=0.25                      (a plugged-in token router)
    eval_libero checkpoint=FOLDER suite=all_libero protocol=cogvla workers=8 shard=1/4
    eval_libero checkpoint=FOLDER suite=all_libero workers=64 ray=auto          (environments on a Ray cluster)

The same command again goes on where it was stopped. `merge_evaluations` puts shards together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig

from cogvla.envs.evaluation.episode_log import write_atomic
from cogvla.envs.evaluation.evaluate import evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol, load_protocol
from cogvla.envs.evaluation.report import Report, render_index
from cogvla.envs.rollout.player import PlayerSettings
from cogvla.envs.rollout.ray_worker import ray_cluster
from cogvla.envs.rollout.workers import ProcessWorker, Worker
from cogvla.envs.suite import Suite, suite_names
from cogvla.libero.suites import configured_suite
from cogvla.policy.interface import Embodiment, Policy
from cogvla.scripts.command import as_typed, import_modules, mistakes_in_one_line, plain

ALL = {"all_tabletop": "tabletop_", "all_libero": "libero_"}
"""Names for all suites that begin alike; libero_90 has to be named."""
OWN = "suite"
"""In the configuration of the protocol: as the suite's own protocol has it."""
RANDOM = "random"
ASKED: dict[str | None, tuple[Literal["swap"] | None, ...]] = {None: (None,), "swap": ("swap",), "both": (None, "swap")}
STOPPED = "stopped; every finished episode is saved: the same command plays the others"


@hydra.main(version_base="1.3", config_path="pkg://cogvla.configs", config_name="eval_libero")
def main(config: DictConfig) -> None:
    """Console entry point."""
    with mistakes_in_one_line(stopped=STOPPED):
        run(config, as_typed("eval_libero"))


def run(config: DictConfig, command: str) -> list[Report]:
    """Evaluate on each suite of the configuration and print where the reports are."""
    with nullcontext(ProcessWorker) if config.ray is None else ray_cluster(config.ray) as start_worker:
        return _run(config, command, start_worker)


def _run(config: DictConfig, command: str, start_worker: Callable[[PlayerSettings], Worker]) -> list[Report]:
    import_modules(config.imports)
    played = [configured_suite(name, plain(config.libero)) for name in suites(config.suite)]
    protocols = [protocol_for(suite, config) for suite in played]
    shard = _shard(config.shard)
    if config.asked not in ASKED:
        raise ValueError(f"asked must be null, swap or both, got {config.asked!r}")
    policy, identity = _policy(config)
    plugged_in = "" if config.router.name is None else f"_{config.router.name}_{config.router.budget}"
    output = Path(config.output or f"outputs/eval_libero/{Path(config.checkpoint).resolve().name}{plugged_in}")
    reports: dict[str, Report] = {}
    for suite, protocol in zip(played, protocols, strict=True):
        if config.protocol.name == OWN:
            print(f"{suite.name}: protocol {protocol.name}, the suite's own; protocol=NAME chooses another one")
        for asked in ASKED[config.asked]:
            folder = suite.name if asked is None else f"{suite.name}_{asked}"
            folder += "" if config.shard is None else f"_shard{shard[0]}of{shard[1]}"
            reports[folder] = evaluate(
                policy,
                suite,
                protocol,
                output / folder,
                workers=config.workers,
                start_worker=start_worker,
                tasks=None if config.tasks is None else [int(task) for task in config.tasks],
                asked=asked,
                shard=shard,
                videos=config.videos,
                resume=config.resume,
                command=command,
                identity=identity,
            )
            print(summary(reports[folder]))
    if len(reports) > 1:
        write_atomic(output / "index.html", render_index(reports))
        print(f"all reports: {output / 'index.html'}")
    else:
        print(f"report: {output / folder / 'report.html'}")
    return list(reports.values())


def suites(wanted: str | Sequence[str]) -> list[str]:
    """The suites of a name, a list of names, `all_tabletop` or `all_libero`; ValueError lists what exists."""
    names: list[str] = []
    for item in [wanted] if isinstance(wanted, str) else wanted:
        names += [n for n in suite_names() if n.startswith(ALL[item]) and n != "libero_90"] if item in ALL else [item]
    if not names:
        raise ValueError(f"suite is empty; give a name, a list of names, {' or '.join(ALL)}")
    for name in names:
        if name not in suite_names():
            raise ValueError(f"unknown suite {name!r}; one of {', '.join(suite_names())}")
    return list(dict.fromkeys(names))


def summary(report: Report) -> str:
    """One line for a terminal."""
    total, probe = report.total, report.inference_batch_1
    rate = total.success
    if rate.value is None or rate.low is None or rate.high is None:
        line = f"{report.suite}: no episode could be played"
    else:
        mode = ", another task asked for" if report.swapped else ""
        line = (
            f"{report.suite}{mode}: success {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] "
            f"of {rate.trials} episodes, {total.errors} errors"
        )
    if total.scene_task.value is not None:
        line += f"; own task of the scene {total.scene_task.value:.1%}"
    if probe is not None:
        line += f"; inference p50 {probe.p50:.1f} ms, p95 {probe.p95:.1f} ms at batch 1"
    if total.loop is not None:
        line += f"; control loop p50 {total.loop.p50:.1f} ms, p95 {total.loop.p95:.1f} ms"
    return line


def protocol_for(suite: Suite, config: DictConfig) -> EvaluationProtocol:
    """The named protocol, or the suite's own, with what the configuration changes in it."""
    values = {key: value for key, value in plain(config.protocol).items() if value != OWN}
    values |= {key: config[key] for key in ("episodes_per_task", "seed") if config[key] is not None}
    return EvaluationProtocol(**values) if "name" in values else load_protocol(suite.protocol, **values)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    part, slash, parts = str(text).partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ValueError(f"shard must be i/n with i from 1 to n, for example shard=1/4, got {text!r}")
    return int(part), int(parts)


def _policy(config: DictConfig) -> tuple[Policy, dict[str, str]]:
    """The policy, and what tells its weights from others."""
    folder = config.checkpoint != RANDOM and not str(config.checkpoint).startswith(("ws://", "wss://"))
    if config.router.name is not None and not folder:
        raise ValueError(f"router.name={config.router.name} needs the folder of a checkpoint, not {config.checkpoint}")
    if config.checkpoint == RANDOM:
        from cogvla.policy.baselines import RandomPolicy

        return RandomPolicy(Embodiment(**plain(config.embodiment)), config.seed or 0), {}

    if str(config.checkpoint).startswith(("ws://", "wss://")):
        from cogvla.real_robot.serving.remote_policy import RemotePolicy

        return RemotePolicy(config.checkpoint, api_key=config.api_key), {}

    if not Path(config.checkpoint).is_dir():  # said before torch is imported
        raise ValueError(f"no checkpoint folder at {config.checkpoint}; train one with `train_policy`, or give random")

    from cogvla.policy.checkpoint import open_policy
    from cogvla.policy.engine.engine import EngineConfig
    from cogvla.routing.router import RouterConfig

    engine, values = EngineConfig.from_dict(plain(config.engine)), plain(config.router)
    try:
        router = None if config.router.name is None else RouterConfig(**values)
    except TypeError as error:
        raise ValueError(f"configuration router: {error}") from error
    beside = config.workers if config.ray is None else 0
    return open_policy(config.checkpoint, config.device, config.threads, engine, router, beside)


if __name__ == "__main__":
    main()
