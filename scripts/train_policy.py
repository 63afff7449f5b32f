"""`train_policy`: record demonstrations if they are missing, train a policy and evaluate it.

    train_policy                                        the default: tabletop_object from scratch, on a CPU
    train_policy suite=tabletop_goal seed=1
    train_policy suite=libero_object libero=lean embodiment=libero_small
    train_policy routing=no_efa                         an ablation
    train_policy data=my_robot objective=imitation suite=null
    train_policy base=checkpoints/tabletop_object suite=tabletop_goal finetune=lora

The same command resumes a stopped run and skips finished parts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.envs.evaluation.evaluate import evaluate
from cogvla.envs.evaluation.protocol import EvaluationProtocol, protocol_for
from cogvla.envs.evaluation.report import Report, check_played, summary
from cogvla.envs.recording.recorder import record
from cogvla.envs.rollout.failures import EveryEpisodeFailsError
from cogvla.envs.suite import Suite, get_suite
from cogvla.files import visible
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.data.demonstrations import DataConfig, DemonstrationData
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.text_encoder import open_encoder, with_encoder
from cogvla.policy.inputs.tokenizer import PretrainedTokenizer, Tokenizer, WordTokenizer
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig, LanguageConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.policy.threads import use_threads
from cogvla.policy.training.auxiliary.frozen_policy import load_frozen
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.data_checks import check_instructions, rare_dimensions
from cogvla.policy.training.objective import Objective, ObjectiveConfig
from cogvla.policy.training.run_log import RunLog
from cogvla.policy.training.trainer import PATIENCE, Trainer
from cogvla.policy.training.wordings import training_wordings
from cogvla.policy.weights.base import base_tokenizer, check_base_encoder, is_own, load_own
from cogvla.policy.weights.pretrained import load_backbones, load_base
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, import_modules, plain


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("train_policy"))


def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Record, train and evaluate; return the content of `output/summary.json`."""
    values = plain(config)
    import_modules(values["imports"])
    use_threads(values["threads"])
    output = Path(values["output"])
    # Check the whole configuration before anything slow starts.
    embodiment = build(Embodiment, values["embodiment"], "embodiment")
    model_config = with_encoder(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}))
    data_config = build(DataConfig, values["data"], "data")
    objective_config = build(ObjectiveConfig, values["objective"], "objective")
    training_config = build(TrainingConfig, values["training"], "training")
    engine_config = build(EngineConfig, values["engine"], "engine")
    engine_config.check_trained(model_config.routing.router.name)
    suite = None if values["suite"] is None else get_suite(values["suite"], values)
    if suite is not None and values["evaluation"] is not None:
        _protocol(values["evaluation"], suite)

    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    seconds: dict[str, float] = {}
    with _timed(seconds, "demonstrations"), processes.main_process_first():
        folder = data_config.root if data_config.repo_id is None else None  # data sets of the hub are not recorded
        if processes.is_main_process and suite is not None and values["demonstrations"] is not None and folder:
            record(suite, output=folder, image_size=embodiment.cameras[0].height, **values["demonstrations"])
        data = DemonstrationData.open(data_config, embodiment)
    for note in data.notes if processes.is_main_process else ():
        print(f"note: {note}")
    logging = values["wandb"] if processes.is_main_process else {**values["wandb"], "mode": "disabled"}
    with _timed(seconds, "training"), RunLog(logging, values, output) as log:
        trainer = build_trainer(
            training_config, model_config, objective_config, embodiment, data, output, log.write, values["base"]
        )
        if suite is not None and training_config.rollout_every and values["evaluation"] is not None:
            trainer.evaluate = _rollouts(suite, values["evaluation"], output, log)
        trainer.run()
    report = None
    result: dict[str, Any] = {"command": command, "seconds": seconds, **provenance()}
    if not processes.is_main_process:
        return result
    if suite is not None and values["evaluation"] is not None:
        use_threads(values["threads"], values["evaluation"]["workers"])
        with _timed(seconds, "evaluation"):
            report = _evaluate(
                load_policy(output / "policy").with_engine(engine_config),
                suite,
                values["evaluation"],
                output,
                command,
                resume=trainer.first_step == trainer.step,  # after training, earlier results are from another policy
            )
        result["success"] = report.total.success.value
        print(summary(report))
        print(f"report: {output / 'evaluation' / 'report.html'}")
    (output / "summary.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
    print("minutes: " + ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items()))
    if report is not None:
        check_played(report, output / "evaluation")
    return result


def build_trainer(
    config: TrainingConfig,
    model_config: CogVLAConfig,
    objective_config: ObjectiveConfig,
    embodiment: Embodiment,
    data: DemonstrationData,
    output: Path,
    log: Callable[[dict[str, float], int], None],
    base: str | None = None,
) -> Trainer:
    """Build a model for this data, and its trainer.

    The model starts from `base` (a checkpoint folder, or published weights as a folder or hub id). Without a base it
    starts from the published backbones that its configuration names, if any. Words keep their ids of the base; the
    statistics of state and action are always those of the new data.
    """
    worded = training_wordings(data, config.wordings)
    texts = [text for some in worded.values() for text in some]
    tokenizer = _tokenizer(model_config.language, texts, base, reworded=len(texts) > len(data.instructions))
    check_instructions(tokenizer, data)  # `Trainer` does it, too, but after the model is built
    if config.wordings.share and (plain := [text for text, some in worded.items() if len(some) == 1]):
        print(f"{len(plain)} of {len(worded)} instructions have no other wordings, for example {plain[0]!r}")
    for said in rare_dimensions(data, embodiment):
        print(said)
    torch.manual_seed(config.seed)
    model = CogVLA(model_config, embodiment)
    if model.text is not None:
        model.text.fit(*tokenizer.inputs(data.instructions))
    for said in _start(model, base):
        print(f"loaded {said}")
    preprocessor = Preprocessor(embodiment, tokenizer, data.statistics(), config.augmentation.crop_area)
    teacher: CogVLA | None = None
    if objective_config.distillation:
        assert objective_config.teacher is not None
        teacher = load_frozen(objective_config.teacher, "teacher", preprocessor, texts)
    objective = Objective(model, objective_config, model.vision_tokens, model_config.language.width, teacher)
    return Trainer(config, objective, model_config, preprocessor, data, output, log)


def _start(model: CogVLA, base: str | None) -> list[str]:
    """Load the initial weights of the model in place; return lines for the log."""
    if base is None:
        return load_backbones(model)
    return load_own(model, base) if is_own(base) else load_base(model, base)


def _tokenizer(language: LanguageConfig, instructions: list[str], base: str | None, reworded: bool) -> Tokenizer:
    """Return the text encoder; else the tokenizer of base or pretrained language model; else the words of the data.

    Raises:
        ValueError: the vocabulary has no room for the words of the data; or the base was trained with another encoder.
    """
    if language.encoder is not None:
        encoder = open_encoder(language.encoder)
        if base is not None and is_own(base):
            check_base_encoder(base, encoder)
        return encoder
    words = WordTokenizer.from_instructions(instructions)
    if base is not None:
        tokenizer = base_tokenizer(base)
        if not isinstance(tokenizer, WordTokenizer):
            return tokenizer
        words = tokenizer.with_words_of(instructions)
    elif language.hub is not None:
        return PretrainedTokenizer(language.hub)
    room = min(language.vocab_size, language.bos_token, language.stop_token)
    if len(words) > room:
        raise ValueError(
            f"the data has {len(words)} words{' with other wordings' if reworded else ''}, but "
            f"policy.language.bos_token, stop_token and vocab_size leave room for {room}: increase all three"
            + (", or choose wordings=none" if reworded else "")
        )
    return words


def _rollouts(
    suite: Suite, settings: dict[str, Any], output: Path, log: RunLog
) -> Callable[[CogVLAPolicy, int], dict[str, float]]:
    def play(policy: CogVLAPolicy, step: int) -> dict[str, float]:
        folder = output / "rollouts" / f"step_{step:07d}"
        few = {**settings, "episodes_per_task": max(1, settings["episodes_per_task"] // 5)}
        try:
            report = _evaluate(policy, suite, few, folder, command="")
        except EveryEpisodeFailsError as error:  # training does not depend on it
            print(f"WARNING: no success rate at step {step}: {error}")
            return {}
        log.videos(visible(folder / "evaluation", "**/*.mp4")[:4], step)
        value = report.total.success.value
        return {} if value is None else {"rollout/success": value}

    return play


def _evaluate(
    policy: CogVLAPolicy, suite: Suite, settings: dict[str, Any], output: Path, command: str, resume: bool = True
) -> Report:
    return evaluate(
        policy,
        suite,
        _protocol(settings, suite),
        output / "evaluation",
        workers=settings["workers"],
        videos=settings["videos"],
        resume=resume,
        command=command,
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
