"""`calibrate_monitor`: find from roll-outs of a policy when its monitor should raise an alarm, and measure the monitor.

    calibrate_monitor foresight=outputs/foresight/tabletop_object checkpoint=checkpoints/tabletop_object
    calibrate_monitor foresight=FOLDER checkpoint=FOLDER episodes=400 alpha=0.05 measured=0
    eval_libero checkpoint=FOLDER monitor=FOLDER

Writes `monitor.json` into the folder of foresight: thresholds from the successful ones of `episodes` undisturbed
roll-outs, and how many of `measured` others raise a false alarm, and how many of as many with each disturbance a right
one.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.analysis.monitor_rollouts import MeasuredPolicy, compare, play
from cogvla.envs.episodes import EpisodeSpec
from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.envs.perturbation.disturbance import DISTURBANCES, check_disturbances
from cogvla.envs.rollout.rollout import check_workers
from cogvla.envs.suite import Suite, get_suite
from cogvla.policy.checkpoint import open_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.foresight.model import check_fits
from cogvla.policy.foresight.monitor import Monitor, Thresholds, episodes_needed
from cogvla.policy.foresight.monitored_policy import find_foresight, open_monitor, save_thresholds
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.interface import Embodiment
from cogvla.policy.provenance import provenance
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, import_modules, plain

CALLS = 100


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("calibrate_monitor"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Calibrate, measure and save; print a table, and return what was measured.

    Raises:
        ValueError: the foresight is for another robot, a disturbance cannot happen in the suite, or too few roll-outs
            succeed for alpha; or the monitor would be measured on the episodes of its thresholds.
    """
    values = plain(config)
    import_modules(values["imports"])
    suite = get_suite(values["suite"], values)
    unknown = [kind for kind in values["disturbances"] if kind not in DISTURBANCES]
    if unknown:
        raise ValueError(f"unknown disturbance {unknown[0]!r}; disturbances are {', '.join(DISTURBANCES)}")
    if values["measured"]:
        check_disturbances(suite, values["disturbances"])
    if values["episodes"] < 1 or values["measured"] < 0:
        raise ValueError("episodes must be at least 1 and measured at least 0")
    check_workers(values["workers"])
    folder = find_foresight(Path(values["foresight"]))
    monitor = open_monitor(folder, None, calibrated=False)
    if values["episodes"] < (needed := episodes_needed(values["alpha"], len(monitor.cameras))):
        raise ValueError(
            f"alpha={values['alpha']:g} of {len(monitor.cameras)} cameras needs {needed} successful episodes, and "
            f"episodes={values['episodes']}; raise episodes or alpha"
        )
    specs = _episodes(suite, values["episodes"], values["first_state"], values["seed"])
    others = _episodes(suite, values["measured"], 0, values["seed"])
    if set(specs) & set(others):
        raise ValueError(
            f"first_state={values['first_state']} measures the monitor on episodes that its thresholds come from: give "
            f"first_state={others[-1].initial_state + 1} or more, or measured=0"
        )
    checkpoint = find_checkpoint(values["checkpoint"])
    engine = build(EngineConfig, values["engine"], "engine")
    given = checkpoint, values["device"], values["threads"], engine, None, values["workers"], values["statistics"]
    policy, identity = open_policy(*given)
    check_fits(monitor.model, policy.embodiment, folder)
    about = {"command": command, "suite": suite.name, "policy": {**policy.describe(), **identity}, **provenance()}
    protocol = load_protocol(suite.protocol)
    steps = protocol.execute_steps or policy.embodiment.chunk
    watched = MeasuredPolicy(policy, monitor, steps, holds=False)
    good = [result for result in play(watched, suite, protocol, specs, values["workers"]) if result.success]
    thresholds = Thresholds.of([(result.noticed or {})["highest"] for result in good], values["alpha"])
    thresholds = replace(thresholds, execute_steps=steps)
    about["calibration"] = {"episodes": len(specs), "successful": len(good)}
    measured: dict[str, Any] = {"time_ms": _time(monitor, policy.embodiment)}
    save_thresholds(folder, thresholds, {**about, "measured": measured})  # what follows takes long, and may fail
    if values["measured"]:
        watched = MeasuredPolicy(policy, Monitor(monitor.model, monitor.normal, thresholds), steps, holds=False)
        clean = play(watched, suite, protocol, others, values["workers"])
        happened = {
            kind: play(watched, suite, protocol, others, values["workers"], kind) for kind in values["disturbances"]
        }
        measured |= compare(clean, happened, thresholds)
    save_thresholds(folder, thresholds, {**about, "measured": measured})
    print(table(measured))
    print(f"monitor: {folder}")
    return measured


def _episodes(suite: Suite, count: int, first: int, seed: int) -> list[EpisodeSpec]:
    tasks = len(suite.tasks)
    return [EpisodeSpec(number % tasks, first + number // tasks, None, seed) for number in range(count)]


def _time(monitor: Monitor, embodiment: Embodiment) -> dict[str, float]:
    """Measure what the monitor adds to a chunk of one robot, in milliseconds."""
    observation = embodiment.fake_observation()
    chunk_1KA = np.zeros((1, embodiment.chunk, embodiment.action_dim), np.float32)
    taken = []
    for _ in range(CALLS):
        started = time.perf_counter()
        monitor.look([0], observation)
        monitor.executed([0], chunk_1KA)
        taken.append((time.perf_counter() - started) * 1e3)
    monitor.clear()
    return {"p50": float(np.percentile(taken, 50)), "p95": float(np.percentile(taken, 95))}


def table(measured: dict[str, Any]) -> str:
    """Return the measurements as lines."""
    time_ms = measured["time_ms"]
    lines = [f"time per chunk: p50 {time_ms['p50']:.2f} ms, p95 {time_ms['p95']:.2f} ms"]
    if "false_alarms" in measured:
        false = measured["false_alarms"]
        lines.append(f"false alarms: {false['successes']} of {false['trials']} clean episodes")
    rows = {name: values for name, values in measured.items() if isinstance(values, dict) and "auroc" in values}
    if rows:
        scores = list(next(iter(rows.values()))["auroc"])
        lines.append(f"{'AUROC':18} episodes  alarms  " + "  ".join(f"{score:>10}" for score in scores))
        for name, values in rows.items():
            numbers = "  ".join(f"{value:10.3f}" for value in values["auroc"].values())
            lines.append(f"{name:18} {values['episodes']:8}  {values['alarms']:6.0%}  {numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    console.calibrate_monitor()
