"""Rounds of `train_policy rounds=N`: train, collect corrections of the policy, train on everything recorded so far.

    OUTPUT/rounds.json                 the request; another one is refused
    OUTPUT/round_1/                    an ordinary training on the demonstrations
    OUTPUT/round_2/corrections/SUITE   a data set: the policy of round 1 acts, the expert says what should be done
    OUTPUT/round_2/                    trained from the weights of round 1, on the demonstrations and all corrections
    OUTPUT/policy, OUTPUT/summary.json the last policy, and the success after every round

Each part resumes by itself, and is skipped when it is finished.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

from accelerate import PartialState
from omegaconf import DictConfig, OmegaConf, open_dict

from cogvla.configs.build import build
from cogvla.envs.recording.correction_pool import Corrected, check_advice, check_robot
from cogvla.envs.recording.dataset_folder import START_ANEW
from cogvla.envs.recording.recorder import RECORDING_FILE, record
from cogvla.envs.suite import Suite
from cogvla.files import read_object, write_atomic
from cogvla.policy.checkpoint import atomic_folder, open_policy
from cogvla.policy.checkpoint_folder import CONFIG, STATISTICS, WEIGHTS
from cogvla.policy.data.config import INTERVENTION, MOST, DataConfig
from cogvla.policy.data.files.metadata import Metadata
from cogvla.policy.data.streaming import locate
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.interface import Embodiment
from cogvla.policy.training.trainer import PATIENCE
from cogvla.scripts.command import usual
from cogvla.scripts.training.suites import resolved_for

SUMMARY, REQUEST = "summary.json", "rounds.json"
POLICY = (CONFIG, WEIGHTS, STATISTICS)
FREE = ("rounds", "output", "wandb", "threads", "imports", "forecast")
"""Keys that may differ when rounds go on: they do not change the weights, or say how many rounds there are."""
FREE_IN = {
    "corrections": ("workers",),
    "demonstrations": ("workers",),
    "evaluation": ("workers", "videos"),
    "data": ("cache", "cache_gb"),
    "training": ("checkpoint_every", "keep_checkpoints", "rollout_every"),
}
"""Group -> its keys that may differ likewise: what a machine with less memory or another disk needs."""


@dataclass(frozen=True)
class CorrectionsConfig:
    """How corrections are collected between two rounds of training.

    Attributes:
        episodes: number of episodes of each suite in each round.
        patience: control steps without progress after which the expert takes over from the policy.
        noise: strength of the expert's noise.
        workers: number of environment processes.
        weight: weight of these data sets in the mixture, relative to that of the demonstrations.
    """

    episodes: int = 300
    patience: int = 30
    noise: float = 1.0
    workers: int = 2
    weight: float = 1.0

    def __post_init__(self) -> None:
        whole = all(type(number) is int for number in (self.episodes, self.patience, self.workers))
        if not whole or min(self.episodes, self.patience) < 1 or self.workers < 0:
            raise ValueError(
                f"corrections: episodes and patience must be positive whole numbers, workers 0 or more; got {self}"
            )
        if not 1 / MOST <= self.weight <= MOST or not 0 <= self.noise < math.inf:
            raise ValueError(
                f"corrections: weight must be a positive number, 1e-9 to 1e9, noise a number of at least 0; got {self}"
            )


def train_in_rounds(
    config: DictConfig,
    values: Mapping[str, Any],
    corrections: CorrectionsConfig,
    suites: Sequence[Suite],
    engine: EngineConfig,
    execute_steps: Mapping[str, int | None],
    train: Callable[[DictConfig], dict[str, Any]],
) -> dict[str, Any]:
    """Carry out the rounds and return the content of `OUTPUT/summary.json`.

    Args:
        config: configuration of the command, with `rounds`.
        values: the same as plain values.
        corrections: how corrections are collected.
        suites: suites of the training.
        engine: engine of the policy that collects.
        execute_steps: suite -> number of actions of a chunk that the policy executes.
        train: function that trains one round, given its configuration.

    Raises:
        ValueError: there is no suite, an expert gives no advice, the folder holds other rounds or more of them, or the
            settings do not fit data sets that grow from round to round.
    """
    output, rounds = Path(values["output"]), values["rounds"]
    if not suites:
        raise ValueError(f"rounds={rounds} needs a suite whose expert corrects the policy; give suite=NAME")
    if values["data"]["statistics"] != "joint":
        raise ValueError(f"rounds={rounds} needs data.statistics=joint: corrections are no robot of their own")
    for name in ("distillation", "prior"):
        if values["objective"][name]:
            raise ValueError(
                f"rounds={rounds} cannot have objective.{name}: its other policy was trained with the statistics of "
                "other data than the next round's; set it to 0"
            )
    robot = build(Embodiment, values["embodiment"], "embodiment")
    for suite in suites:
        check_robot(robot, suite, robot.cameras[0].height, execute_steps[suite.name])
        check_advice(suite)
    processes = PartialState(timeout=PATIENCE)
    with processes.main_process_first():
        for suite in suites:
            _check_rate(resolved_for(config, suite.name))
        _check_request(output, _decisive(values))
        if (there := sum(1 for _ in output.glob(f"round_*/{SUMMARY}"))) > rounds:
            raise ValueError(f"{output} holds {there} rounds; give rounds={there} or more, or choose another output")
    found: list[dict[str, Any]] = []
    for number in range(1, rounds + 1):
        folder = output / f"round_{number}"
        if number > 1:
            with processes.main_process_first():
                if processes.is_main_process:
                    before = output / f"round_{number - 1}" / "policy"
                    _collect(before, folder, number, values, corrections, suites, engine, execute_steps)
        if not (folder / SUMMARY).is_file():
            print(f"round {number} of {rounds}: training", flush=True)
            train(_of_round(config, output, number, corrections))
        processes.wait_for_everyone()
        found.append(_told(folder, number, suites))
    result = {"rounds": found, "success": found[-1]["success"]}
    if processes.is_main_process:
        _take_policy(output / f"round_{rounds}" / "policy", output / "policy")
        write_atomic(output / SUMMARY, json.dumps(result, indent=2) + "\n")
        for told in found:
            rate = "unknown" if told["success"] is None else f"{told['success']:.1%}"
            alone = f", the policy before solved {told['solved_alone']} alone" if "solved_alone" in told else ""
            print(f"round {told['round']}: success {rate}{alone}")
    return result


def _check_rate(values: Mapping[str, Any]) -> None:
    """Raise a ValueError if a data set that is there already cannot be mixed with corrections."""
    data, rate = build(DataConfig, values["data"], "data"), values["embodiment"]["control_hz"]
    for entry in () if data.mixed_rates else data.entries():
        own = entry.config.root if entry.config.repo_id is None else None
        root = locate(entry.config, progress=True)[0] if own is None else Path(own)
        if (root / "meta" / "info.json").is_file() and (fps := Metadata(root).fps) != rate:
            raise ValueError(
                f"{root} has {fps:g} frames per second, and corrections have {rate:g}: an action would mean another "
                "speed in each; mix them as they are with data.mixed_rates=true"
            )


def _decisive(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that must stay the same."""
    return {
        group: {key: item for key, item in value.items() if key not in FREE_IN.get(group, ())}
        if isinstance(value, Mapping)
        else value
        for group, value in values.items()
        if group not in FREE
    }


def check_without_rounds(output: Path) -> None:
    """Check that a training does not take the place of the last round's.

    Raises:
        ValueError: the folder holds rounds.
    """
    if (output / REQUEST).is_file():
        raise ValueError(f"{output} holds rounds of corrections; give rounds=N to go on, or choose another output")


def _check_request(output: Path, request: dict[str, Any]) -> None:
    """Write down what is asked for; ValueError if the folder holds rounds of something else, or another training."""
    path, wanted = output / REQUEST, json.loads(json.dumps(request, default=str))
    if path.is_file():
        there = _decisive(read_object(path, "choose another output"))
        if changed := [key for key in wanted if there.get(key) != wanted[key]]:
            raise ValueError(
                f"{output} holds rounds with another {', '.join(changed)}; give the same, or choose another output"
            )
        return
    if (output / "policy").exists() or (output / SUMMARY).exists():
        raise ValueError(f"{output} holds a training without rounds; choose another output")
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(wanted, indent=1) + "\n")


def _corrections(output: Path, number: int) -> Path:
    return output / f"round_{number}" / "corrections"


def _collect(
    policy_folder: Path,
    folder: Path,
    number: int,
    values: Mapping[str, Any],
    corrections: CorrectionsConfig,
    suites: Sequence[Suite],
    engine: EngineConfig,
    execute_steps: Mapping[str, int | None],
) -> None:
    """Record what the last round's policy does and what the experts say, if it is not there yet."""
    policy, identity = open_policy(policy_folder, threads=values["threads"], engine=engine, beside=corrections.workers)
    for suite in suites:
        print(f"round {number} of {values['rounds']}: corrections of {suite.name}", flush=True)
        record(
            suite,
            corrections.episodes,
            _corrections(folder.parent, number) / suite.name,
            image_size=policy.embodiment.cameras[0].height,
            workers=corrections.workers,
            noise=corrections.noise,
            seed=number - 1,
            corrected=Corrected(policy, identity, corrections.patience, execute_steps[suite.name]),
        )


def _of_round(config: DictConfig, output: Path, number: int, corrections: CorrectionsConfig) -> DictConfig:
    """Return the configuration of a round: where it writes, where it starts, and all that was recorded before it."""
    one = config.copy()
    with open_dict(one):
        one.rounds, one.output = 1, str(output / f"round_{number}")
        one.corrections = usual("train_policy")["corrections"]  # without rounds, they change nothing
        if number == 1:
            return one
        one.base = str(output / f"round_{number - 1}" / "policy")
        mixture = OmegaConf.to_container(one.data.mixture) if one.data.mixture else [{}]
        assert isinstance(mixture, list)
        keys = _recorded_keys(one)
        for earlier in range(2, number + 1):
            entry = {"root": f"{_corrections(output, earlier)}/${{suite}}", "name": f"${{suite}}_round_{earlier}"}
            mixture.append({**entry, "weight": corrections.weight, **keys})
        one.data.mixture = mixture
    return one


def _recorded_keys(config: DictConfig) -> dict[str, Any]:
    """Return the keys of `data` for what the recorder writes, whatever they are for the user's own data set."""
    return {
        "cameras": {camera.name: f"observation.images.{camera.name}" for camera in config.embodiment.cameras},
        "state": "observation.state",
        "action": "action",
        "labels": {name: f"label.{name.replace('projection_', 'projection.')}" for name in config.data.labels},
        "gripper": None,
        "instruction_key": "task",
        "episodes": None,
        "intervention": INTERVENTION,
    }


def _told(folder: Path, number: int, suites: Sequence[Suite]) -> dict[str, Any]:
    """Return what the summary says about a finished round."""
    told = read_object(folder / SUMMARY, "delete the folder to train this round anew")
    found = {"round": number, "success": told.get("success")}
    if "suites" in told:
        found["suites"] = told["suites"]
    if number > 1:
        paths = [folder / "corrections" / suite.name / RECORDING_FILE for suite in suites]
        made = [read_object(path, START_ANEW) for path in paths]
        found["solved_alone"] = sum(each["solved_alone"] for each in made)
        found["intervention_share"] = {s.name: m["intervention_share"] for s, m in zip(suites, made, strict=True)}
    return found


def _take_policy(source: Path, target: Path) -> None:
    """Copy the last round's policy, in place of that of an earlier round; the same one stays, with what was added."""
    if all((target / name).is_file() and cmp(source / name, target / name, shallow=False) for name in POLICY):
        return
    with atomic_folder(target) as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True)
