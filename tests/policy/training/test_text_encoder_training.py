"""Policies that read instructions through a frozen text encoder: trained, saved, loaded, run by the engine, counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.cost.flops import INSTRUCTION, count_flops
from cogvla.policy.cost.memory import estimate_memory
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.text_encoder import TextEncoder, open_encoder, with_encoder, with_encoder_width
from cogvla.policy.interface import Observation
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.text_projection import TextProjection
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.policy.training.trainer import Trainer
from cogvla.policy.training.wordings import InstructionAugmentation
from cogvla.scripts.training.build import build_trainer
from cogvla.tests.support.small_data import IMITATION, LABELLED, MODEL, ROBOT, settings, small_data, small_trainer
from cogvla.tests.support.text_encoders import WORDS, minilm, save_tokenizer, tiny_encoder
from cogvla.tests.support.tiny_model import alone

Trained = tuple[Trainer, CogVLAPolicy, Path]
UNSEEN = ["grab the red block", "touch the blue one"]


def config_with(source: str | Path, **routing: Any) -> CogVLAConfig:
    language = {**MODEL["language"], "encoder": str(source)}
    return CogVLAConfig.from_dict({**MODEL, "language": language, "routing": {"film_init": 1.0, **routing}})


def trainer_with(
    source: str | Path, output: Path, objective: ObjectiveConfig = LABELLED, base: str | None = None, **changes: Any
) -> Trainer:
    config, model = settings(**{"steps": 4, **changes}), with_encoder(config_with(source))
    return build_trainer(config, model, objective, ROBOT, small_data(), output, lambda metrics, step: None, base)


def observation(instructions: list[str], seed: int = 0) -> Observation:
    return replace(ROBOT.fake_observation(len(instructions), seed), instruction=tuple(instructions))


def actions(policy: CogVLAPolicy, instructions: list[str] | None = None) -> torch.Tensor:
    policy.reset()
    return torch.from_numpy(policy.act(observation(instructions or UNSEEN)).actions)


def projection(model: CogVLA) -> TextProjection:
    assert model.text is not None
    return model.text


def source_of(policy: CogVLAPolicy) -> str:
    encoder = policy.preprocessor.tokenizer
    assert isinstance(encoder, TextEncoder)
    return encoder.source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def trained(source: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    output = tmp_path_factory.mktemp("run")
    trainer = trainer_with(source, output, contrast_objective(), wordings=InstructionAugmentation(share=0.5, count=4))
    return trainer, trainer.run(), output / "policy"


def contrast_objective() -> ObjectiveConfig:
    return replace(LABELLED, contrast=0.1)


def test_the_encoder_is_not_trained_saved_or_copied(trained: Trained, source: str) -> None:
    trainer, policy, folder = trained
    names = {name for name in trainer.raw.state_dict() if ".text." in name}
    assert names == {
        f"model.text.{n}" for n in ("mean_E", "std_E", "norm.weight", "norm.bias", "linear.weight", "linear.bias")
    }
    assert {name for name in trainer.weights.average.average if ".text." in name} == {n for n in names if "_E" not in n}
    network = open_encoder(source)._network
    assert not any(p.requires_grad for p in network.parameters())
    theirs = {id(p) for p in network.parameters()}
    assert not theirs & {id(p) for p in (*trainer.raw.parameters(), *policy.model.parameters())}
    assert not theirs & {id(p) for group in trainer.weights.optimiser.param_groups for p in group["params"]}
    fresh = trainer_with(source, folder.parent / "fresh")
    assert (
        open_encoder(source).fingerprint == json.loads((folder / "config.json").read_text())["tokenizer"]["fingerprint"]
    )
    assert not torch.equal(projection(policy.model).linear.weight, projection(fresh.raw.model).linear.weight), (
        "the projection learns"
    )
    assert torch.equal(projection(policy.model).mean_E, projection(fresh.raw.model).mean_E)


def test_training_reads_standardised_states(trained: Trained) -> None:
    trainer, policy, _ = trained
    states_BTE, mask_BT = policy.preprocessor.tokenizer.inputs(trainer.data.instructions)
    words_WE = ((states_BTE - projection(policy.model).mean_E) / projection(policy.model).std_E)[mask_BT]
    torch.testing.assert_close(words_WE.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    assert words_WE.std(0, correction=0).median() == pytest.approx(1, abs=1e-3)


def test_a_loaded_policy_acts_the_same_also_for_unseen_words(trained: Trained) -> None:
    _, policy, folder = trained
    loaded = load_policy(folder)
    assert torch.equal(actions(loaded), actions(policy))
    together_BTE, alone_BTE = (loaded.preprocessor.text(texts)[0] for texts in (UNSEEN, UNSEEN[:1]))
    assert torch.equal(together_BTE[:1], alone_BTE), "instructions do not depend on their batch"
    assert not torch.equal(actions(loaded), actions(loaded, ["push the green square", UNSEEN[1]]))
    assert loaded.describe()["text_encoder"] == source_of(policy)
    assert loaded.unknown_words("grab the red block") == ["grab"]


@pytest.mark.parametrize("summary", ["contextual", "words", "faithful"])
@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_order_of_the_words_counts_and_padding_does_not(kind: str, summary: str, tmp_path: Path) -> None:
    source = tiny_encoder(tmp_path, kind)
    torch.manual_seed(0)
    model = CogVLA(with_encoder(config_with(source, summary=summary)), ROBOT).eval()
    states_BTE, mask_BT = open_encoder(source).inputs(
        ["put the cube on the block", "put the block on the cube", "open the top drawer then push the cube in"]
    )
    fake = ROBOT.fake_observation(1)
    pixels_BVCHW = torch.stack([torch.from_numpy(fake.images[name]) for name in ROBOT.camera_names], 1).movedim(-1, 2)
    inputs = ModelInput(
        pixels_BVCHW.expand(3, -1, -1, -1, -1), states_BTE, mask_BT, torch.from_numpy(fake.state).expand(3, -1)
    )
    garbage_BTE = torch.where(mask_BT[..., None], states_BTE, 7.0)
    with torch.no_grad():
        actions_BKA = model(inputs).actions
        assert torch.equal(model(replace(inputs, text_ids=garbage_BTE)).actions, actions_BKA)
        torch.testing.assert_close(model(alone(inputs, 0)).actions, actions_BKA[:1])
        vision = model.encode_text(states_BTE, mask_BT).vision
    assert vision.weights_B2 is not None
    assert not torch.allclose(vision.weights_B2[0], vision.weights_B2[1], rtol=1e-4)
    for film in vision.films:
        assert film is not None
        assert not torch.allclose(film[0][:, 0], film[0][:, 1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("eager", None), ("trace", None), ("trace", "bfloat16"), ("trace", "int8")]
)
def test_engines(kind: str, dtype: str | None, trained: Trained) -> None:
    _, policy, folder = trained
    engine = load_policy(folder).with_engine(EngineConfig(kind=kind, dtype=dtype, smallest=8), release=True)
    engine.warm_up(2, UNSEEN)
    tolerance = {None: 1e-4, "bfloat16": 0.1, "int8": 0.1}[dtype]
    torch.testing.assert_close(actions(engine), actions(policy), atol=tolerance, rtol=0)


def test_each_instruction_is_encoded_once(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(trained[2])
    encoder: Any = policy.preprocessor.tokenizer
    calls: list[Any] = []
    handle = encoder._network.register_forward_hook(lambda *_: calls.append(1))
    try:
        for _ in range(3):
            actions(policy)
        assert len(calls) == len(UNSEEN)
        trainer = trainer_with(encoder.source, trained[2].parent / "again")
        before = len(calls)
        for step in range(2):
            trainer._train_step()
            trainer.step = step + 1
        assert len(calls) == before, "training reads the states that were computed at its start"
    finally:
        handle.remove()


def test_a_resumed_run_is_the_same_and_another_encoder_is_refused(tmp_path: Path) -> None:
    source = tiny_encoder(tmp_path / "encoder")
    whole = trainer_with(source, tmp_path / "whole", steps=6, checkpoint_every=3).run()
    trainer_with(source, tmp_path / "parts", steps=3, checkpoint_every=3).run()
    parts = trainer_with(source, tmp_path / "parts", steps=6, checkpoint_every=3)
    resumed = parts.run()
    assert parts.first_step == 3
    assert torch.equal(actions(whole), actions(resumed))
    elsewhere = str(shutil.move(source, tmp_path / "elsewhere"))
    trainer_with(elsewhere, tmp_path / "parts", steps=7, checkpoint_every=7).run()
    tiny_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(ValueError, match="text encoder differs"):
        trainer_with(source, tmp_path / "parts", steps=9).run()


def moved(encoder: Path, checkpoint: Path) -> None:
    encoder.rename(encoder.with_name("elsewhere"))


def other_weights(encoder: Path, checkpoint: Path) -> None:
    tiny_encoder(encoder, seed=1)


def other_width(encoder: Path, checkpoint: Path) -> None:
    tiny_encoder(encoder, width=32)


def other_words(encoder: Path, checkpoint: Path) -> None:
    save_tokenizer(encoder, [*WORDS[:4], *reversed(WORDS[4:])])


def other_kind(encoder: Path, checkpoint: Path) -> None:
    tiny_encoder(encoder, "llama")


def no_source(encoder: Path, checkpoint: Path) -> None:
    body = json.loads((checkpoint / "config.json").read_text())
    body["model"]["language"] |= {"encoder": None, "encoder_width": None}
    (checkpoint / "config.json").write_text(json.dumps(body))


def no_encoder(encoder: Path, checkpoint: Path) -> None:
    body = json.loads((checkpoint / "config.json").read_text())
    body["tokenizer"] = {"kind": "words", "words": ["<pad>", "<unk>", "touch"]}
    (checkpoint / "config.json").write_text(json.dumps(body))


def no_fingerprint(encoder: Path, checkpoint: Path) -> None:
    body = json.loads((checkpoint / "config.json").read_text())
    del body["tokenizer"]["fingerprint"]
    (checkpoint / "config.json").write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (moved, "needs the text encoder of its training: .*no file or folder .*; or copy that encoder to"),
        (other_weights, "is not the text encoder with which .* was trained"),
        (other_width, "is not the text encoder with which .* was trained"),
        (other_words, "is not the text encoder with which .* was trained"),
        (other_kind, "is not the text encoder with which .* was trained"),
        (no_source, "is damaged .*tokenizer is 'encoder', but model.language.encoder is None"),
        (no_encoder, "is damaged .*tokenizer is 'words', but model.language.encoder is "),
        (no_fingerprint, "is damaged .*no 'fingerprint'"),
    ],
)
def test_a_checkpoint_refuses_another_encoder(
    change: Callable[[Path, Path], None], said: str, trained: Trained, tmp_path: Path
) -> None:
    encoder, checkpoint = tmp_path / "encoder", tmp_path / "policy"
    shutil.copytree(source_of(trained[1]), encoder)
    shutil.copytree(trained[2], checkpoint)
    body = json.loads((checkpoint / "config.json").read_text())
    body["model"]["language"]["encoder"] = str(encoder)
    (checkpoint / "config.json").write_text(json.dumps(body))
    expected = actions(load_policy(checkpoint))
    change(encoder, checkpoint)
    with pytest.raises(ValueError, match=said) as caught:
        load_policy(checkpoint)
    assert "\n" not in str(caught.value)
    if change is moved:
        shutil.copytree(encoder.with_name("elsewhere"), checkpoint / "encoder")
        assert torch.equal(actions(load_policy(checkpoint)), expected)


@pytest.mark.parametrize("case", ["same", "another", "none", "from words"])
def test_a_base_and_its_encoder(case: str, trained: Trained, source: str, tmp_path: Path) -> None:
    _, policy, folder = trained
    base = str(folder)
    if case == "from words":
        base = str(tmp_path / "words" / "policy")
        small_trainer(tmp_path / "words", settings(steps=1)).run()
    refused = pytest.raises(
        ValueError, match=r"base=.* was trained with a text encoder.*give policy\.language\.encoder="
    )
    if case == "none":
        with refused:
            small_trainer(tmp_path / "run", base=base)
        return
    if case == "another":
        other = tiny_encoder(tmp_path / "other", seed=1)
        with refused:
            trainer_with(other, tmp_path / "run", base=base)
        return
    trainer = trainer_with(source, tmp_path / "run", base=base, finetune=FinetuneConfig(("text", "head")))
    assert (case == "same") == torch.equal(
        projection(trainer.raw.model).linear.weight, projection(policy.model).linear.weight
    )
    trained_names = set(trainer.weights.trained)
    trainer.run()
    assert "model.text.linear.weight" in trained_names
    assert torch.isfinite(actions(load_policy(tmp_path / "run" / "policy"))).all()


@pytest.mark.usefixtures("own_accelerator")
@pytest.mark.parametrize("part", ["text", "head"])
def test_in_bfloat16(part: str, source: str, tmp_path: Path) -> None:
    half: dict[str, Any] = {"precision": "bfloat16", "finetune": FinetuneConfig((part,)), "ema_decay": 0.0}
    policy = trainer_with(source, tmp_path, **half).run()
    loaded = load_policy(tmp_path / "policy")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.equal(projection(loaded.model).mean_E, projection(policy.model).mean_E), "statistics stay exact"
    assert projection(loaded.model).mean_E.dtype == torch.float32
    torch.testing.assert_close(actions(loaded), actions(policy), atol=1e-2, rtol=0)


@pytest.mark.parametrize("key", ["teacher", "blind"])
def test_a_frozen_policy_with_another_encoder_is_refused(
    key: str, trained: Trained, source: str, tmp_path: Path
) -> None:
    strength: dict[str, Any] = {"teacher": {"distillation": 0.5}, "blind": {"prior": 0.5}}[key] | {key: str(trained[2])}
    objective = replace(IMITATION, **strength)
    trainer_with(source, tmp_path / "same", objective)
    with pytest.raises(ValueError, match="another text encoder"):
        trainer_with(tiny_encoder(tmp_path / "other", seed=1), tmp_path / "run", objective)
    with pytest.raises(ValueError, match="another text encoder"):
        small_trainer(tmp_path / "words", objective=objective)


def test_a_width_that_is_not_the_encoders(source: str) -> None:
    config = config_with(source)
    wrong = replace(config, language=replace(config.language, encoder_width=32))
    with pytest.raises(ValueError, match=r"encoder_width is 32, but .* has states of width 24: set encoder_width=null"):
        with_encoder(wrong)
    for width, encoder in ((8, None), (0, source), (-1, source)):
        with pytest.raises(ValueError, match="encoder_width is"):
            replace(config.language, encoder_width=width, encoder=encoder)
    with pytest.raises(ValueError, match=r"language\.encoder is empty"):
        replace(config.language, encoder=" ")


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_work_of_the_encoder_is_counted_once_per_instruction(kind: str, tmp_path: Path) -> None:
    source = tiny_encoder(tmp_path, kind)
    config = with_encoder_width(config_with(source))
    without = CogVLAConfig.from_dict({**MODEL, "routing": {"film_init": 1.0}})
    costs, plain = ({c.stage: c for c in count_flops(x, ROBOT, 7)} for x in (config, without))
    network: Any = open_encoder(source)._network
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        network(input_ids=torch.ones(1, 7, dtype=torch.long))
    projection = 2 * 7 * 24 * config.language.width
    counted = costs[INSTRUCTION].flops - plain[INSTRUCTION].flops - projection
    assert counted == pytest.approx(counter.get_total_flops(), rel=1e-3)  # rotations of Llama are not counted
    parameters = sum(p.numel() for p in network.parameters())
    assert costs[INSTRUCTION].parameters - plain[INSTRUCTION].parameters == parameters + 2 * 24 + 25 * 16
    assert {s: c for s, c in costs.items() if s not in (INSTRUCTION, "total")}.keys() <= plain.keys()
    assert costs["total, same instruction"].flops == plain["total, same instruction"].flops


def test_memory_is_estimated(source: str) -> None:
    config = with_encoder_width(config_with(source))
    memory, _ = estimate_memory(config, ROBOT, settings())
    plain, _ = estimate_memory(CogVLAConfig.from_dict(MODEL), ROBOT, settings())
    assert memory.trained == plain.trained + 4 * (2 * 24 + 25 * 16)


def test_a_real_encoder_gives_a_policy(tmp_path: Path) -> None:
    trainer = trainer_with(minilm(), tmp_path, steps=2)
    policy = trainer.run()
    loaded = load_policy(tmp_path / "policy")
    unseen = ["grab the crimson block", "move to the blue thing"]
    assert torch.equal(actions(loaded, unseen), actions(policy, unseen))
    assert loaded.unknown_words("grab the crimson block") == []
    assert (tmp_path / "policy" / "model.safetensors").stat().st_size < 1e6, "the encoder is not in the checkpoint"
