"""`train_policy`: record demonstrations if they are missing, train a policy and evaluate it.

    train_policy                                        the default: tabletop_object from scratch, on a CPU
    train_policy suite=tabletop_goal seed=1
    train_policy suite=all_tabletop training.steps=12000        one policy for all of them; or suite=[NAME,NAME]
    train_policy suite=libero_object libero=lean embodiment=libero_small
    train_policy routing=no_efa                         an ablation
    train_policy data=my_robot objective=imitation suite=null
    train_policy 'data.mixture=[{root: A}, {root: B, weight: 2}]' objective=imitation suite=null output=FOLDER
    train_policy base=checkpoints/tabletop_object suite=tabletop_goal finetune=lora

The same command resumes a stopped run and skips finished parts.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.evaluation.episode_log import RUN, read_run
from cogvla.envs.evaluation.evaluate import check_evaluation, evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol, protocol_for
from cogvla.envs.evaluation.report import Report, check_played, render_index, summary
from cogvla.envs.recording.recorder import check_recording, record
from cogvla.envs.rollout.failures import EveryEpisodeFailsError
from cogvla.envs.suite import Suite, get_suite
from cogvla.files import visible, write_atomic
from cogvla.policy.checkpoint import FORECAST, load_policy, weights_hash
from cogvla.policy.data.config import DataConfig, DataEntry
from cogvla.policy.data.mixture.mixture import open_data
from cogvla.policy.device import usable_device
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.text_encoder import with_encoder
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.policy.threads import use_threads
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.policy.training.run_log import RunLog
from cogvla.policy.training.trainer import PATIENCE
from cogvla.policy.weights.base import find_base
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, import_modules, usual
from cogvla.scripts.eval_libero import suites
from cogvla.scripts.policies import named_router
from cogvla.scripts.training.build import build_trainer, check_without_data
from cogvla.scripts.training.forecast import add_forecast
from cogvla.scripts.training.rounds import CorrectionsConfig, check_without_rounds, train_in_rounds
from cogvla.scripts.training.suites import (
    EVALUATION,
    folders_to_record,
    outdated,
    own_entry,
    percent,
    report_folders,
    resolved_for,
    success_rates,
    suite_label,
)


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("train_policy"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Record, train and evaluate; return the content of `output/summary.json`."""
    import_modules(config.imports)
    names = [] if config.suite is None else suites(config.suite)
    values = resolved_for(config, suite_label(config.suite, names))
    use_threads(values["threads"])
    output = Path(values["output"])
    # Check the whole configuration before anything slow starts.
    embodiment = build(Embodiment, values["embodiment"], "embodiment")
    model_config = with_encoder(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}))
    named_router(values["routing"]["router"], "routing.router")
    nodes = [resolved_for(config, name)["data"] for name in names] if len(names) > 1 else [values["data"]]
    data_configs = [build(DataConfig, node, "data") for node in nodes]
    if len({str(each.paraphrases) for each in data_configs}) > 1:
        raise ValueError(
            f"data.paraphrases={data_configs[0].paraphrases} is for one suite, and one file is read for all: put all "
            "instructions into one file, and give its name without ${suite}"
        )
    objective_config = build(ObjectiveConfig, values["objective"], "objective")
    training_config = build(TrainingConfig, values["training"], "training")
    engine_config = build(EngineConfig, values["engine"], "engine")
    engine_config.check_trained()
    base = None if values["base"] is None else find_base(values["base"])
    log = RunLog(values["wandb"] or {"mode": "disabled", "project": None}, values, output)
    played = [get_suite(name, values) for name in names]
    for suite in played if values["evaluation"] is not None else ():
        settings = values["evaluation"]
        check_evaluation(
            suite,
            _protocol(settings, suite),
            workers=settings["workers"],
            videos=settings["videos"],
            robot=embodiment,
        )
    if training_config.rollout_every and (not played or values["evaluation"] is None):
        raise ValueError(
            f"training.rollout_every={training_config.rollout_every} plays nothing with suite=null or evaluation=null: "
            "set it to 0, or give both"
        )
    rounds = values["rounds"]
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ValueError(f"rounds must be 1 (train once) or more, got {rounds!r}")
    corrections = build(CorrectionsConfig, values["corrections"], "corrections")
    if rounds > 1:
        settings = values["evaluation"] or {"protocol": None}
        execute_steps = {suite.name: _protocol(settings, suite).execute_steps for suite in played}
        return train_in_rounds(
            config, values, corrections, played, engine_config, execute_steps, lambda one: run(one, command)
        )
    check_without_rounds(output)
    if changed := [
        f"{k}={v}" for k, v in values["corrections"].items() if usual("train_policy")["corrections"][k] != v
    ]:
        raise ValueError(f"corrections.{changed[0]} changes nothing in one training: give rounds=N, or leave it out")
    recordings = {} if values["demonstrations"] is None else folders_to_record(played, data_configs)
    for suite in recordings.values():  # before the first of them is recorded
        check_recording(suite, image_size=embodiment.cameras[0].height, **values["demonstrations"])
    if not all(Path(folder).exists() for folder in recordings):
        check_without_data(training_config, model_config, objective_config, data_configs, embodiment, base)
    entries: list[DataEntry] = []
    for data_config in data_configs:
        entries += [entry for entry in data_config.entries() if entry not in entries]  # suites may share data sets

    own = (
        [own_entry(*pair, entries) for pair in zip(played, data_configs, strict=False)] if values["evaluation"] else []
    )

    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    training_config.check_processes(processes.num_processes)
    seconds: dict[str, float] = {}
    with _timed(seconds, "demonstrations"), processes.main_process_first():
        for folder, suite in recordings.items() if processes.is_main_process else ():
            record(suite, output=folder, image_size=embodiment.cameras[0].height, **values["demonstrations"])
        data = open_data(data_configs[0], embodiment, entries)
    for note in (*data.notes, *outdated(played, entries)) if processes.is_main_process else ():
        print(f"note: {note}")
    log.mode = log.mode if processes.is_main_process else "disabled"
    with _timed(seconds, "training"), log:
        trainer = build_trainer(
            training_config, model_config, objective_config, embodiment, data, output, log.write, values["base"]
        )
        names_of = {s.name: data.parts[i].name if data.each else None for s, i in zip(played, own, strict=False)}
        if played and training_config.rollout_every and values["evaluation"] is not None:
            trainer.evaluate = _rollouts(played, values["evaluation"], output, log, names_of)
        trainer.run()
    reports: dict[str, Report] = {}
    result: dict[str, Any] = {"command": command, "seconds": seconds, **provenance()}
    if not processes.is_main_process:
        return result
    drawn, nothing_new = trainer.batches.drawn(trainer.step), trainer.first_step == trainer.step
    del trainer  # the policy needs its memory
    if drawn:
        result["data"] = {name: {**data.describe()["sets"][name], **counts} for name, counts in drawn.items()}
        print("epochs: " + ", ".join(f"{name} {counts['epochs']:.2f}" for name, counts in drawn.items()))
    if played and values["evaluation"] is not None:
        use_threads(values["threads"], values["evaluation"]["workers"])
        policy = load_policy(output / "policy", usable_device(None), statistics=names_of[played[0].name])
        policy.preprocessor.forecast = None  # of an earlier run of this command: the evaluation is then the same
        policy = policy.with_engine(engine_config)
        identity = {"weights_sha256": weights_hash(output / "policy")}
        # After training, earlier results are from another policy; so are those left by a run that was killed then.
        runs = [read_run(output / folder)[0] for folder in report_folders(played) if (output / folder / RUN).is_file()]
        same = all(run["policy"].get("weights_sha256") == identity["weights_sha256"] for run in runs)
        resume = same and nothing_new
        with _timed(seconds, "evaluation"):
            if not resume and len(played) > 1:  # of all suites, before the first one is played
                shutil.rmtree(output / EVALUATION, ignore_errors=True)
            for folder, suite in report_folders(played).items():
                own_policy = policy.with_statistics(names_of[suite.name])
                reports[folder] = _evaluate(
                    own_policy, suite, values["evaluation"], output / folder, command, resume, identity
                )
                print(summary(reports[folder]))
        result["success"], rates = success_rates(reports.values())
        if len(played) > 1:
            result["suites"] = rates
            print(f"mean of {len(played)} suites: {percent(result['success'])}")
            page = output / EVALUATION / "index.html"
            write_atomic(page, render_index({suite.name: reports[f] for f, suite in report_folders(played).items()}))
            print(f"all reports: {page}")
        else:
            print(f"report: {output / EVALUATION / 'report.html'}")
    if values["forecast"] and not model_config.head.prefix and not (output / "policy" / FORECAST).is_file():
        # After the evaluation, which is then the same as without a forecast, and resumes.
        with _timed(seconds, "forecast"):
            print(add_forecast(output / "policy", data, embodiment.chunk))
    write_atomic(output / "summary.json", json.dumps(result, indent=2, default=str) + "\n")
    print("minutes: " + ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items()))
    for folder, report in reports.items():
        check_played(report, output / folder)
    return result


def _rollouts(
    played: Sequence[Suite], settings: dict[str, Any], output: Path, log: RunLog, statistics: Mapping[str, str | None]
) -> Callable[[CogVLAPolicy, int], dict[str, float]]:
    def play(policy: CogVLAPolicy, step: int) -> dict[str, float]:
        folder = output / "rollouts" / f"step_{step:07d}"
        few = {**settings, "episodes_per_task": max(1, settings["episodes_per_task"] // 5)}
        reports = []
        for part, suite in report_folders(played).items():
            try:
                own_policy = policy.with_statistics(statistics[suite.name])
                # never resumed: what an earlier attempt at this step has played may be of other weights
                reports.append(_evaluate(own_policy, suite, few, folder / part, command="", resume=False))
            except EveryEpisodeFailsError as error:  # training does not depend on it
                print(f"WARNING: no success rate of {suite.name} at step {step}: {error}")
                continue
            log.videos(visible(folder / part, "**/*.mp4")[:4], step, f"{suite.name}/" if len(played) > 1 else "")
        mean, rates = success_rates(reports)
        found = {f"rollout/{name}/success": rate for name, rate in rates.items() if len(played) > 1}
        found |= {"rollout/success": mean} if len(reports) == len(played) else {}
        return {name: rate for name, rate in found.items() if rate is not None}

    return play


def _evaluate(
    policy: CogVLAPolicy,
    suite: Suite,
    settings: dict[str, Any],
    output: Path,
    command: str,
    resume: bool = True,
    identity: Mapping[str, str] | None = None,
) -> Report:
    return evaluate(
        policy,
        suite,
        _protocol(settings, suite),
        output,
        workers=settings["workers"],
        videos=settings["videos"],
        resume=resume,
        command=command,
        identity=identity,
    )


def _protocol(settings: dict[str, Any], suite: Suite) -> EvaluationProtocol:
    changes = {key: value for key, value in settings.items() if key not in ("protocol", "workers", "videos")}
    return protocol_for(suite, settings["protocol"], changes)


class _timed:  # noqa: N801 - used like a function
    """Context manager that stores the time of a block, in seconds, in a mapping."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = time.perf_counter() - self.started


if __name__ == "__main__":
    console.train_policy()
