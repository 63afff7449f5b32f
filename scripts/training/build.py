"""Builds the model of a training, and its trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from cogvla.configs.load import read_once
from cogvla.policy.checkpoint import weights_hash
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.engine.nf4 import Nf4Linear
from cogvla.policy.hub.download import checkpoint_name
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.text_encoder import open_encoder
from cogvla.policy.inputs.tokenizer import PretrainedTokenizer, Tokenizer, WordTokenizer
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig, LanguageConfig, RoutingConfig
from cogvla.policy.model.empty_model import empty_model
from cogvla.policy.training.adapters import check_parts
from cogvla.policy.training.auxiliary.frozen_policy import check_frozen, load_frozen
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.data_checks import check_instructions, check_tokens, clipped_instructions, rare_dimensions
from cogvla.policy.training.objective import Objective, ObjectiveConfig
from cogvla.policy.training.optimisation import adamw
from cogvla.policy.training.trainer import Trainer
from cogvla.policy.training.wordings import training_wordings
from cogvla.policy.weights.base import base_tokenizer, check_base_encoder, find_base, is_own, load_own
from cogvla.policy.weights.pretrained import load_backbones, load_base


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

    The model starts from `base` (a checkpoint or published weights, as a folder or hub id). Without a base it
    starts from the published backbones that its configuration names, if any. Words keep their ids of the base; the
    statistics of state and action are always those of the new data.
    """
    named = base = None if base is None else find_base(base)
    if base is not None and Path(base).is_dir():
        named = checkpoint_name(Path(base).resolve())
    worded = training_wordings(data, config.wordings)
    texts = [text for some in worded.values() for text in some]
    tokenizer = choose_tokenizer(model_config.language, texts, base, reworded=len(texts) > len(data.instructions))
    check_instructions(tokenizer, data)  # `Trainer` does it, too, but after the model is built
    if model_config.head.kind == "discrete":
        check_tokens(data, embodiment)
    if config.wordings.share and (plain := [text for text, some in worded.items() if len(some) == 1]):
        print(f"{len(plain)} of {len(worded)} instructions have no other wordings, for example {plain[0]!r}")
    for said in (*rare_dimensions(data, embodiment), *clipped_instructions(data, embodiment)):
        print(said)
    _check_fusion(model_config.routing)
    torch.manual_seed(config.seed)
    model = CogVLA(model_config, embodiment)
    if model.text is not None:
        model.text.fit(*tokenizer.inputs(data.instructions))
    preprocessor = Preprocessor(embodiment, tokenizer, data.statistics(), config.augmentation.crop_area)
    for said in load_start(model, base, preprocessor):
        print(f"loaded {said}")
    teacher: CogVLA | None = None
    if objective_config.distillation:
        assert objective_config.teacher is not None
        teacher = load_frozen(objective_config.teacher, "teacher", preprocessor, texts)
    objective = Objective(model, objective_config, teacher)
    weights = weights_hash(Path(base)) if base is not None and is_own(base) else base
    return Trainer(config, objective, model_config, preprocessor, data, output, log, base=named, base_weights=weights)


def check_without_data(
    config: TrainingConfig,
    model: CogVLAConfig,
    objective: ObjectiveConfig,
    data: Iterable[DataConfig],
    robot: Embodiment,
    base: str | None,
) -> None:
    """Check what shows without data, so that a mistake is not said only after a recording.

    Raises:
        ValueError: robot, policy, objective, base and the parts to train do not fit each other, or a file or checkpoint
            that they name cannot be used.
        OSError: such a file cannot be read.
    """
    _check_fusion(model.routing)
    network = empty_model(model, robot)
    check_parts(network, config.finetune)
    adamw(torch.nn.Linear(1, 1), 1.0, 0.0, config.optimiser)  # is what it needs installed?
    if config.finetune.bits is not None:
        Nf4Linear(torch.zeros(1, 64), None)  # likewise
    Objective(network, replace(objective, distillation=0.0))
    choose_tokenizer(model.language, [], base, reworded=False)
    if base is not None and is_own(base):  # published weights may be too large to be read twice
        load_own(network, base)
    for key, weight in (("teacher", objective.distillation), ("blind", objective.prior)):
        if weight:
            check_frozen(getattr(objective, key), key)
    for path in {each.paraphrases for each in data if each.paraphrases is not None}:
        read_once(Path(path), f"data.paraphrases={path}")


def _check_fusion(routing: RoutingConfig) -> None:
    """Raise a ValueError if `fusion` changes nothing, as published weights and older checkpoints may have it."""
    if routing.fusion not in ("mix", "concat") and not (routing.efa or routing.film):
        raise ValueError(
            f"routing.fusion={routing.fusion} changes nothing with routing.efa=false and routing.film=false, where "
            "channels are concatenated: set routing.film=true, or leave it out"
        )


def load_start(model: CogVLA, base: str | None, preprocessor: Preprocessor) -> list[str]:
    """Load the initial weights of the model in place, for these statistics; return lines for the log."""
    if base is None:
        return load_backbones(model)
    return load_own(model, base, preprocessor) if is_own(base) else load_base(model, base)[1]


def choose_tokenizer(language: LanguageConfig, instructions: list[str], base: str | None, reworded: bool) -> Tokenizer:
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
