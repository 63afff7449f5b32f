"""`compare_routers`: compare success and latency of a policy with different token routers and budgets.

    compare_routers checkpoint=outputs/film_patches/policy                       every router at 50, 25, 12.5 and 6 %
    compare_routers checkpoint=outputs/film_patches/policy quick=true            a test of some minutes
    compare_routers checkpoint=outputs/film_patches/policy 'routers=[identity,random,{name: diversity, options: {variant: maxsum}}]'
    compare_routers checkpoint=outputs/film_patches/policy regime=fine_tuned     each router is trained with the policy first
    compare_routers checkpoint=... suite=all_tabletop perturbation=[light,wording] level=2      on more suites, and perturbed

A cell is a router with a budget; all cells play the same episodes, as they are and perturbed. The same command resumes a
stopped run: what was played is not played again, and an unfinished cell continues with its next episode.
`comparison.html` and `comparison.json` are written after every cell. The two regimes have separate output folders.
"""  # noqa: E501

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
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
from cogvla.envs.evaluation.episode_log import check_simulators
from cogvla.envs.evaluation.evaluate import check_evaluation, evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol, protocol_for
from cogvla.envs.evaluation.report import Report, check_played
from cogvla.envs.evaluation.robustness import CLEAN, chosen_cells
from cogvla.envs.evaluation.statistics import success_rate
from cogvla.envs.perturbation.perturbation import Perturbation
from cogvla.envs.suite import Suite, get_suite
from cogvla.files import write_atomic
from cogvla.policy.checkpoint import load_policy, open_policy, weights_hash
from cogvla.policy.data.config import DataConfig
from cogvla.policy.engine.engine import AUTO, EngineConfig
from cogvla.policy.hub.download import checkpoint_name, find_checkpoint
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import machine, provenance, versions
from cogvla.policy.threads import use_threads
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, check_counts, compose, config_dir, import_modules, plain, usual
from cogvla.scripts.eval_libero import suites
from cogvla.scripts.training.suites import resolved_for, suite_label

REGIMES = ("plug_in", "fine_tuned")
QUICK: dict[str, Any] = {
    "routers": ["identity", "random", "grid_stride", "spatial_pool", "token_norm", "cls_attention", "diversity"],
    "budgets": [0.25],
    "calls": ROUNDS,
    "recipe": ["objective=reading", "training.steps=2"],
}
COSTS, OUTCOME, DATA, PAGE, TRAINING = "costs.json", "outcome.json", "comparison.json", "comparison.html", "training"


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("compare_routers"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Measure and play every cell; return the content of `comparison.json`."""
    values = plain(config)
    if values["quick"]:  # what was given stays
        before = usual("compare_routers")
        values |= {key: value for key, value in QUICK.items() if values[key] == before[key]}
        if values["evaluation"]["episodes_per_task"] == before["evaluation"]["episodes_per_task"]:
            values["evaluation"]["episodes_per_task"] = 1
    if values["regime"] not in REGIMES:
        raise ValueError(f"regime must be {' or '.join(REGIMES)}, got {values['regime']!r}")
    if not values["budgets"]:
        raise ValueError("budgets is empty; give shares of the tokens, such as [0.5,0.25]")
    check_counts(values, "calls")
    if values["engine"]["dtype"] == AUTO:
        raise ValueError("engine.dtype=auto could choose another precision for each router: give one, or leave it out")
    import_modules(values["imports"])
    use_threads(values["threads"], values["evaluation"]["workers"])
    played = [get_suite(name, values) for name in suites(values["suite"])]
    changes = {key: value for key, value in values["evaluation"].items() if key not in ("protocol", "workers")}
    protocols = [protocol_for(suite, values["evaluation"]["protocol"], changes) for suite in played]
    for suite, protocol in zip(played, protocols, strict=True):
        check_evaluation(suite, protocol, workers=values["evaluation"]["workers"], tasks=values["tasks"])
    return _Comparison(values, list(zip(played, protocols, strict=True)), command).run()


class _Comparison:
    """The comparison of one regime on one policy."""

    def __init__(
        self, values: dict[str, Any], played: Sequence[tuple[Suite, EvaluationProtocol]], command: str
    ) -> None:
        folder = find_checkpoint(values["checkpoint"])  # once: a branch of the hub may move meanwhile
        self.checkpoint, values = checkpoint_name(folder), {**values, "checkpoint": str(folder)}
        self.values, self.played, self.command = values, played, command
        cells = [chosen_cells(values["perturbation"], values["level"], suite) for suite, _ in played]
        everywhere = [cell for cell in cells[0] if all(cell in others for others in cells)]
        self.conditions: dict[str, Perturbation | None] = {CLEAN: None} | {str(cell): cell for cell in everywhere}
        self.output, self.trained = Path(values["output"]), values["regime"] == "fine_tuned"
        self.device = values["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = build(EngineConfig, values["engine"], "engine")
        routers = wanted_routers(values["routers"], values["layer"])  # before the policy is loaded
        plain_engine, chosen = EngineConfig("plain"), values["statistics"]
        threads, beside = values["threads"], values["evaluation"]["workers"]
        policy, self.identity = open_policy(folder, self.device, threads, plain_engine, None, beside, chosen)
        self.identity |= {} if chosen is None else {"statistics": chosen}
        self.policy = policy.with_engine(self.engine)
        if self.policy.model.router is not None:
            name = self.policy.model.router.config.name
            raise ValueError(f"the policy in {folder} has the router {name!r}; give one without router")
        for suite, protocol in played:
            workers = values["evaluation"]["workers"]
            check_evaluation(suite, protocol, workers=workers, tasks=values["tasks"], robot=policy.embodiment)
        self.cells, self.left_out = cells_for(self.policy.model, routers, values["budgets"], self.trained)
        if not self.cells:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
            raise ValueError(f"this policy supports none of the routers: {reasons}")

    def run(self) -> dict[str, Any]:
        for name, why in self.left_out.items():
            print(f"left out: {name}: {why}")
        episodes = sum(len(protocol.episodes(suite, self.values["tasks"])) for suite, protocol in self.played)
        print(f"{len(self.cells)} cells of {episodes} episodes, played {', '.join(self.conditions)}")
        if self.trained:
            self._check_recipe()
        # Before the costs: those of another comparison in this folder must not be replaced.
        outcomes: dict[str, dict[str, CellOutcome]] = {cell.key: self._finished(cell) for cell in self.cells}
        cost = self._costs()
        data = self._write(cost, outcomes)
        for cell in self.cells:
            policy = None
            for condition in self.conditions:
                if condition in outcomes[cell.key]:
                    continue
                policy = policy or self._policy(cell)
                outcomes[cell.key][condition] = found = self._play(cell, condition, policy)
                solved, ms = f"{found.success.successes} of {found.success.trials}", cost[cell.key].latency.p50
                print(f"{cell.key}, {condition}: {solved}, {ms:.1f} ms per chunk")
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
        here = machine()
        settings |= {"engine": self.values["engine"], **{key: here[key] for key in ("cpu", "torch_threads", "gpus")}}
        settings |= {"cells": {cell.key: json.loads(json.dumps(asdict(cell.router))) for cell in self.cells}}
        if file.is_file():
            saved = json.loads(file.read_text())
            if saved["settings"] == settings:
                return {key: Cost.from_dict(value) for key, value in saved["costs"].items()}
        observations = first_observations(self.played[0][0], self.policy.embodiment, ROUNDS)
        found = costs(self.policy, self.cells, observations, self.values["calls"])
        body = {"settings": settings, "costs": {key: asdict(value) for key, value in found.items()}}
        self.output.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(body, indent=2) + "\n")
        return found

    def _settings(self, cell: Cell, condition: str) -> dict[str, Any]:
        """Return all settings that determine an outcome of a cell, as JSON data."""
        perturbation = self.conditions[condition]
        values = {
            "router": asdict(cell.router), "suite": list(self._protocols()), "protocol": self._protocols(),
            "tasks": self.values["tasks"], "checkpoint": self.identity, "regime": self.values["regime"],
            "recipe": self.values["recipe"] if self.trained else None,
            "engine": self.values["engine"], "device": self.device,
            "simulation": {suite.name: dict(suite.settings) for suite, _ in self.played},
            "perturbation": perturbation and {suite.name: suite.magnitudes(perturbation) for suite, _ in self.played},
        }  # fmt: skip
        return json.loads(json.dumps(values))

    def _protocols(self) -> dict[str, Any]:
        return {suite.name: asdict(protocol.for_suite(suite)) for suite, protocol in self.played}

    def _finished(self, cell: Cell) -> dict[str, CellOutcome]:
        """Return condition -> outcome, of the conditions that are played."""
        found = {}
        for condition in self.conditions:
            file = self.output / cell.key / condition / OUTCOME
            if not file.is_file():
                continue
            saved = json.loads(file.read_text())
            if (settings := self._settings(cell, condition)) != saved["settings"]:
                changed = ", ".join(key for key in settings if settings[key] != saved["settings"].get(key))
                raise ValueError(f"{file.parent} has results with another {changed}: use another output, or delete it")
            check_simulators([saved, {"versions": versions()}], f"use another output, or delete {file.parent}")
            found[condition] = CellOutcome.from_dict(saved["outcome"])
        return found

    def _policy(self, cell: Cell) -> CogVLAPolicy:
        if self.trained:
            policy = load_policy(self._train(cell, self.output / cell.key / TRAINING), self.device)
        else:
            policy = load_policy(self.values["checkpoint"], self.device, cell.router, self.values["statistics"])
        return policy.with_engine(self.engine, release=True)

    def _play(self, cell: Cell, condition: str, policy: CogVLAPolicy) -> CellOutcome:
        folder = self.output / cell.key / condition
        identity = {**self.identity, "regime": self.values["regime"]}
        if self.trained:  # what is played are the weights of the cell
            trained = weights_hash(self.output / cell.key / TRAINING / "policy")
            identity |= {"weights_sha256": trained, "base_sha256": self.identity["weights_sha256"]}
        reports = []
        for suite, protocol in self.played:
            report = evaluate(
                policy,
                suite,
                protocol,
                folder / suite.name,
                workers=self.values["evaluation"]["workers"],
                tasks=self.values["tasks"],
                perturbation=self.conditions[condition],
                videos=0,
                command=self.command,
                identity=identity,
            )
            check_played(report, folder / suite.name)
            reports.append(report)
        outcome = outcome_of(reports)
        if outcome.errors:  # without OUTCOME, the same command plays these episodes again
            print(f"{cell.key}: {outcome.errors} episodes could not be played, see the reports in {folder}")
        else:
            body = {"settings": self._settings(cell, condition), "outcome": asdict(outcome), "versions": versions()}
            write_atomic(folder / OUTCOME, json.dumps(body, indent=2) + "\n")
        return outcome

    def _train(self, cell: Cell, folder: Path) -> Path:
        """Train the policy with this router in a separate process, or resume its training; return the policy's folder.

        Raises:
            ValueError: the training failed.
        """
        words = [*config_dir(), *self._training(cell, folder)]
        done = subprocess.run([sys.executable, "-m", "cogvla.scripts.train_policy", *words], check=False)
        if done.returncode:
            raise ValueError(f"training failed; its command is: {shlex.join(['train_policy', *words])}")
        return folder / "policy"

    def _training(self, cell: Cell, folder: Path) -> list[str]:
        """Return the arguments of `train_policy` for a cell."""
        overrides = [f"base={_written(self.values['checkpoint'])}", "routing=router"]
        overrides.append(f"suite={_written(list(self._protocols()))}")
        model, robot = asdict(self.policy.model.config), asdict(self.policy.embodiment)
        own = {key: value for key, value in model.pop("routing").items() if key != "router"}
        overrides += [f"routing.{key}={_written(value)}" for key, value in own.items()]
        overrides += [f"policy.{key}={_written(value)}" for key, value in model.items()]
        overrides += [f"embodiment.{key}={_written(value)}" for key, value in robot.items()]
        overrides.append(f"augmentation.crop_area={self.policy.preprocessor.crop_area}")
        overrides += [f"routing.router.{key}={_written(value)}" for key, value in asdict(cell.router).items()]
        overrides.append(f"imports={_written(self.values['imports'])}")
        return [*overrides, "evaluation=null", f"output={_written(str(folder))}", *self.values["recipe"]]

    def _check_recipe(self) -> None:
        """Check the settings of the trainings before anything is measured.

        Raises:
            ValueError: `train_policy` does not understand them.
        """
        cell = self.cells[0]
        try:
            config = compose("train_policy", self._training(cell, self.output / cell.key / TRAINING))
        except HydraException as error:
            raise ValueError(f"recipe: {str(error).strip().splitlines()[0]}") from error
        values = resolved_for(config, suite_label(config.suite, list(self._protocols())))
        for kind, name in ((TrainingConfig, "training"), (ObjectiveConfig, "objective"), (DataConfig, "data")):
            build(kind, values[name], name)

    def _write(self, cost: Mapping[str, Cost], outcomes: Mapping[str, Mapping[str, CellOutcome]]) -> dict[str, Any]:
        table = rows(self.cells, cost, outcomes)
        data = {
            "command": self.command, "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "regime": self.values["regime"], "checkpoint": self.checkpoint, "suites": list(self._protocols()),
            "conditions": list(self.conditions), "recipe": self.values["recipe"] if self.trained else None,
            "policy": self.policy.describe(), "protocol": self._protocols(),
            "rows": [row.to_dict() for row in table], "left_out": self.left_out, **provenance(),
        }  # fmt: skip
        write_atomic(self.output / DATA, json.dumps(data, indent=2, default=str) + "\n")
        write_atomic(self.output / PAGE, render_comparison(table, data))
        return data


def outcome_of(reports: Sequence[Report]) -> CellOutcome:
    """Return the numbers of one condition, with a report for each suite, that routers are compared by."""
    played = {
        f"{report.suite}/{each.task}/{each.initial_state}": each.success
        for report in reports
        for each in report.episodes
        if each.error is None
    }
    return CellOutcome(success_rate(played.values()), sum(report.total.errors for report in reports), played)


def _written(value: Any) -> str:
    """Format a value for Hydra's command line, text in quotes."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, str):  # backslashes count only before a quote
        escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
        return '"' + re.sub(r"(\\+)\Z", r"\1\1", escaped) + '"'
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    console.compare_routers()
