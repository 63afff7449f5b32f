"""`compare_routers`: compare success and latency of a policy with different token routers and budgets.

    compare_routers checkpoint=outputs/film_patches/policy                       every router at 50, 25, 12.5 and 6 %
    compare_routers checkpoint=outputs/film_patches/policy quick=true            a test of some minutes
    compare_routers checkpoint=outputs/film_patches/policy 'routers=[identity,random,{name: diversity, options: {variant: maxsum}}]'
    compare_routers checkpoint=outputs/film_patches/policy regime=fine_tuned     each router is trained with the policy first

A cell is a router with a budget; all cells play the same episodes. The same command resumes a stopped run: finished
cells are not played again, and an unfinished one continues with its next episode. `comparison.html` and
`comparison.json` are written after every cell. The two regimes have separate output folders.
"""  # noqa: E501

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.analysis.router_comparison import (
    ROUNDS,
    Cell,
    CellOutcome,
    Cost,
    cells_for,
    costs,
    first_observations,
    rows,
    wanted_routers,
)
from cogvla.envs.analysis.router_page import render_comparison
from cogvla.envs.evaluation.evaluate import evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol, protocol_for
from cogvla.envs.evaluation.report import Report, check_played
from cogvla.envs.suite import Suite
from cogvla.files import write_atomic
from cogvla.libero.suites import configured_suite
from cogvla.policy.checkpoint import load_policy, open_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.hub.download import checkpoint_name, find_checkpoint
from cogvla.policy.provenance import provenance
from cogvla.policy.threads import use_threads
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, import_modules, plain

REGIMES = ("plug_in", "fine_tuned")
QUICK: dict[str, Any] = {
    "routers": ["identity", "random", "grid_stride", "spatial_pool", "token_norm", "cls_attention", "diversity"],
    "budgets": [0.25],
    "calls": ROUNDS,
    "recipe": ["objective=reading", "training.steps=2"],
}
COSTS, OUTCOME, DATA, PAGE = "costs.json", "outcome.json", "comparison.json", "comparison.html"


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("compare_routers"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Measure and play every cell; return the content of `comparison.json`."""
    values = plain(config)
    if values["quick"]:
        values |= QUICK
        values["evaluation"]["episodes_per_task"] = 1
    if values["regime"] not in REGIMES:
        raise ValueError(f"regime must be {' or '.join(REGIMES)}, got {values['regime']!r}")
    if not values["budgets"]:
        raise ValueError("budgets is empty; give shares of the tokens, such as [0.5,0.25]")
    import_modules(values["imports"])
    use_threads(values["threads"], values["evaluation"]["workers"])
    suite = configured_suite(values["suite"], values["libero"])
    changes = {key: value for key, value in values["evaluation"].items() if key not in ("protocol", "workers")}
    protocol = protocol_for(suite, values["evaluation"]["protocol"], changes)
    return _Comparison(values, suite, protocol, command).run()


class _Comparison:
    """The comparison of one regime on one policy and suite."""

    def __init__(self, values: dict[str, Any], suite: Suite, protocol: EvaluationProtocol, command: str) -> None:
        folder = find_checkpoint(values["checkpoint"])  # once: a branch of the hub may move meanwhile
        self.checkpoint, values = checkpoint_name(folder), {**values, "checkpoint": str(folder)}
        self.values, self.suite, self.protocol, self.command = values, suite, protocol, command
        self.output, self.trained = Path(values["output"]), values["regime"] == "fine_tuned"
        self.device = values["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = build(EngineConfig, values["engine"], "engine")
        policy, self.identity = open_policy(values["checkpoint"], self.device, engine=EngineConfig("plain"))
        self.policy = policy.with_engine(self.engine)
        if self.policy.model.router is not None:
            name = self.policy.model.router.config.name
            raise ValueError(f"the policy in {folder} has the router {name!r}; give one without router")
        routers = wanted_routers(values["routers"], values["layer"])
        self.cells, self.left_out = cells_for(self.policy.model, routers, values["budgets"], self.trained)
        if not self.cells:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
            raise ValueError(f"this policy supports none of the routers: {reasons}")

    def run(self) -> dict[str, Any]:
        for name, why in self.left_out.items():
            print(f"left out: {name}: {why}")
        episodes = len(self.protocol.episodes(self.suite, self.values["tasks"]))
        print(f"{len(self.cells)} cells of {episodes} episodes")
        cost = self._costs()
        outcomes = {cell.key: found for cell in self.cells if (found := self._finished(cell)) is not None}
        data = self._write(cost, outcomes)
        for cell in self.cells:
            if cell.key in outcomes:
                continue
            outcomes[cell.key] = found = self._play(cell)
            rate = found.success
            print(f"{cell.key}: {rate.successes} of {rate.trials}, {cost[cell.key].latency.p50:.1f} ms per chunk")
            data = self._write(cost, outcomes)
        print(f"report: {self.output / PAGE}")
        return data

    def _costs(self) -> dict[str, Cost]:
        """Return the costs of all cells.

        They are read from disk if they are from the same cells and settings. Otherwise all are measured, because only
        times that are measured together are comparable.
        """
        file = self.output / COSTS
        settings = {"calls": self.values["calls"], "checkpoint": self.identity, "device": self.device}
        settings["engine"] = self.values["engine"]
        settings |= {"cells": {cell.key: json.loads(json.dumps(asdict(cell.router))) for cell in self.cells}}
        if file.is_file():
            saved = json.loads(file.read_text())
            if saved["settings"] == settings:
                return {key: Cost.from_dict(value) for key, value in saved["costs"].items()}
        observations = first_observations(self.suite, self.policy.embodiment, ROUNDS)
        found = costs(self.policy, self.cells, observations, self.values["calls"])
        body = {"settings": settings, "costs": {key: asdict(value) for key, value in found.items()}}
        self.output.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(body, indent=2) + "\n")
        return found

    def _settings(self, cell: Cell) -> dict[str, Any]:
        """Return all settings that determine the outcome of a cell, as JSON data."""
        protocol = self.protocol.for_suite(self.suite)
        values = {
            "router": asdict(cell.router), "suite": self.suite.name, "protocol": asdict(protocol),
            "tasks": self.values["tasks"], "checkpoint": self.identity, "regime": self.values["regime"],
            "recipe": self.values["recipe"] if self.trained else None,
        }  # fmt: skip
        return json.loads(json.dumps(values))

    def _finished(self, cell: Cell) -> CellOutcome | None:
        file = self.output / cell.key / OUTCOME
        if not file.is_file():
            return None
        saved = json.loads(file.read_text())
        if (settings := self._settings(cell)) != saved["settings"]:
            changed = ", ".join(key for key in settings if settings[key] != saved["settings"].get(key))
            raise ValueError(f"{file.parent} has results with another {changed}: choose another output, or delete it")
        return CellOutcome.from_dict(saved["outcome"])

    def _play(self, cell: Cell) -> CellOutcome:
        folder = self.output / cell.key
        if self.trained:
            policy = load_policy(self._train(cell, folder / "training"), self.device)
        else:
            policy = load_policy(self.values["checkpoint"], self.device, cell.router)
        policy = policy.with_engine(self.engine, release=True)
        report = evaluate(
            policy,
            self.suite,
            self.protocol,
            folder,
            workers=self.values["evaluation"]["workers"],
            tasks=self.values["tasks"],
            videos=0,
            command=self.command,
            identity={**self.identity, "regime": self.values["regime"]},
        )
        check_played(report, folder)
        outcome = outcome_of(report)
        if outcome.errors:  # without OUTCOME, the same command plays these episodes again
            print(f"{cell.key}: {outcome.errors} episodes could not be played, see {folder / 'report.html'}")
        else:
            body = {"settings": self._settings(cell), "outcome": asdict(outcome)}
            write_atomic(folder / OUTCOME, json.dumps(body, indent=2) + "\n")
        return outcome

    def _train(self, cell: Cell, folder: Path) -> Path:
        """Train the policy with this router in a separate process, or resume its training; return the policy's folder.

        Raises:
            ValueError: the training failed.
        """
        overrides = [f"base={self.values['checkpoint']}", "routing=router", f"suite={self.suite.name}"]
        own = {key: value for key, value in asdict(self.policy.model.config.routing).items() if key != "router"}
        overrides += [f"routing.{key}={_written(value)}" for key, value in own.items()]
        overrides += [f"routing.router.{key}={_written(value)}" for key, value in asdict(cell.router).items()]
        overrides.append(f"imports={_written(self.values['imports'])}")
        overrides += ["evaluation=null", f"output={folder}", *self.values["recipe"]]
        done = subprocess.run([sys.executable, "-m", "cogvla.scripts.train_policy", *overrides], check=False)
        if done.returncode:
            raise ValueError(f"training failed; its command is: {shlex.join(['train_policy', *overrides])}")
        return folder / "policy"

    def _write(self, cost: Mapping[str, Cost], outcomes: Mapping[str, CellOutcome]) -> dict[str, Any]:
        table = rows(self.cells, cost, outcomes)
        protocol = replace(self.protocol.for_suite(self.suite), name=self.protocol.name)
        data = {
            "command": self.command, "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "regime": self.values["regime"], "checkpoint": self.checkpoint, "suite": self.suite.name,
            "recipe": self.values["recipe"] if self.trained else None, "policy": self.policy.describe(),
            "protocol": asdict(protocol), "rows": [row.to_dict() for row in table], "left_out": self.left_out,
            **provenance(),
        }  # fmt: skip
        write_atomic(self.output / DATA, json.dumps(data, indent=2, default=str) + "\n")
        write_atomic(self.output / PAGE, render_comparison(table, data))
        return data


def outcome_of(report: Report) -> CellOutcome:
    """Return the numbers of a report that routers are compared by."""
    played = {f"{r.task}/{r.initial_state}": r.success for r in report.episodes if r.error is None}
    return CellOutcome(report.total.success, report.total.errors, played)


def _written(value: Any) -> str:
    """Format a value for Hydra's command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    console.compare_routers()
