"""Fine-tuning: what is trained, adapters and merging, recomputed gradients, 8-bit moments, and where it starts."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from cogvla.configs.load import load
from cogvla.policy.checkpoint import load_policy, save_checkpoint
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.interface import Committed, Observation
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import ActionHeadConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training import adapters
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.optimisation import adamw
from cogvla.policy.weights.base import load_own
from cogvla.tests.policy.training.test_trainer import KILLED, assert_same_run, rows
from cogvla.tests.support import small_data as small
from cogvla.tests.support.extras import needs
from cogvla.tests.support.small_data import ROBOT, settings, small_trainer
from cogvla.tests.support.tiny_model import ROBOT as TINY_ROBOT
from cogvla.tests.support.tiny_model import tiny_config, tiny_input, tiny_model

PAPER = load("finetune", "lora")
LORA = FinetuneConfig(**{**PAPER, "rank": 4, "alpha": 2.0})
HEAD_ONLY = FinetuneConfig(train=("head",))


def adapted(config: FinetuneConfig = LORA, **routing: Any) -> CogVLA:
    """A model whose adapters do something."""
    model = tiny_model(**routing)
    adapters.prepare(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def with_text_projection(encoder_width: int | None, **routing: Any) -> CogVLA:
    """A model that reads states of a text encoder of this width; None: token ids."""
    config = tiny_config(**routing)
    encoder = None if encoder_width is None else "an encoder"
    return CogVLA(
        replace(config, language=replace(config.language, encoder=encoder, encoder_width=encoder_width)), TINY_ROBOT
    )


def answers(model: CogVLA) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        output = model(tiny_input(), watch=model.config.routing.efa)
    return output.actions, output.gaze or []


def assert_alike(first: CogVLA, second: CogVLA) -> None:
    (actions, gaze), (other_actions, other_gaze) = answers(first), answers(second)
    torch.testing.assert_close(actions, other_actions, rtol=1e-4, atol=1e-5)
    for one, other in zip(gaze, other_gaze, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder_width", [None, 24])
def test_the_papers_choice_of_what_is_trained(encoder_width: int | None) -> None:
    model = with_text_projection(encoder_width)
    everything = {name for name, _ in model.named_parameters()}
    adapters.prepare(model, LORA)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    full = {name for name in trained if ".lora_" not in name}
    router = re.compile(
        r"vision\.towers\.\w+\.(film|aggregation)\.|vision\.fusion\.|order\.|text\.|decoder\.routers\.|state\.|head\."
        r"|placeholder"
    )
    assert full == {name for name in everything if router.match(name)}
    layers = dict(adapters.adapted_layers(model))
    linear = r"(attn\.(qkv|proj)|mlp\.fc[12]|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    assert layers.keys() == {name[:-7] for name in everything if re.search(linear + r"\.weight$", name)}
    assert all(layer.scaling["default"] == 0.5 for layer in layers.values()), "alpha / rank, as in the paper"
    paper = FinetuneConfig(**PAPER)
    assert (paper.rank, paper.alpha) == (32, 16)


def test_fresh_adapters_change_nothing() -> None:
    model = tiny_model().eval()
    before = answers(model)[0]
    adapters.prepare(model, LORA)
    torch.testing.assert_close(answers(model)[0], before)


@pytest.mark.parametrize(
    "routing", [{}, {"efa": False}, {"efa": False, "film": True}, {"mode": "drop"}, {"scale": "all"}]
)
def test_merged_weights_compute_what_the_adapters_do(routing: dict[str, Any]) -> None:
    model, plain = adapted(**routing), tiny_model(seed=5, **routing).eval()
    base = tiny_model(**routing).eval()
    assert not torch.allclose(answers(model)[0], answers(base)[0], atol=1e-3)
    plain.load_state_dict(adapters.merged_state(model))
    assert_alike(plain, model)


def test_every_adapter_counts() -> None:
    """None is passed by, as it would be where weights are used without calling their layer."""
    model = adapted()
    model(tiny_input()).actions.square().sum().backward()
    silent = [name for name, p in model.named_parameters() if ".lora_" in name and (p.grad is None or not p.grad.any())]
    assert not silent


@pytest.mark.parametrize("name", ["lora", "lora_all"])
@pytest.mark.parametrize(("summary", "encoder_width"), [("words", None), ("contextual", None), ("contextual", 24)])
def test_what_reads_the_words_is_trained_fully(name: str, summary: str, encoder_width: int | None) -> None:
    model = with_text_projection(encoder_width, summary=summary)
    adapters.prepare(model, FinetuneConfig(**{**load("finetune", name), "rank": 4}))
    words = {name: p for name, p in model.named_parameters() if name.startswith(("order.", "text."))}
    assert any(name.startswith("order.") for name in words) == (summary == "contextual")
    assert any(name.startswith("text.") for name in words) == (encoder_width is not None)
    assert all(p.requires_grad and ".lora_" not in name for name, p in words.items())


@pytest.mark.parametrize("name", ["lora", "lora_all"])
@pytest.mark.parametrize("routing", [{"efa": False}, {"efa": False, "lfp": False}, {"summary": "words"}])
def test_parts_that_this_policy_lacks_may_be_named(name: str, routing: dict[str, Any]) -> None:
    adapters.prepare(tiny_model({"placeholder": "zero"}, **routing), FinetuneConfig(**load("finetune", name)))


@pytest.mark.parametrize("name", ["lora", "lora_all"])
@pytest.mark.parametrize("router", [{"name": "grids"}, {"name": "learned_pruner", "stage": "llm_layer", "layers": [1]}])
def test_a_token_router_which_a_base_may_not_have_is_trained_fully(name: str, router: dict[str, Any]) -> None:
    model = tiny_model(efa=False, film=True, router={**router, "budget": 4})
    adapters.prepare(model, FinetuneConfig(**{**load("finetune", name), "rank": 4}))
    own = {name: p for name, p in model.named_parameters() if name.startswith("router.")}
    assert own
    assert all(p.requires_grad and ".lora_" not in name for name, p in own.items())


@pytest.mark.parametrize("finetune", ["full", "lora_all"])
def test_a_projector_that_the_router_replaces_is_not_trained(tmp_path: Path, finetune: str) -> None:
    """Its gradients would be missing, for which several processes would wait. Weights that came frozen are trained."""
    router = {"name": "flex_count", "stage": "encoder_out", "budget": 4, "options": {"variant": "projector"}}
    objective = replace(small.LABELLED, grounding=0.0, pointing=0.0)
    config = settings(finetune=FinetuneConfig(**load("finetune", finetune)))
    trainer = small_trainer(tmp_path, config, objective, efa=False, film=True, lfp=False, router=router)
    assert any(".router." in name for name in trainer.weights.trained)
    assert not [name for name in trainer.weights.trained if "vision.fusion" in name]
    model = CogVLA(small.small_config(), ROBOT).requires_grad_(False)
    adapters.prepare(model, FinetuneConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merge_and_unmerge_is_a_round_trip_bit_for_bit() -> None:
    model = adapted()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = answers(model)[0]
    base = adapters.merge(model)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    assert changed == [f"{name}.base_layer.weight" for name in base]
    torch.testing.assert_close(answers(model)[0], before, rtol=1e-4, atol=1e-5)
    adapters.unmerge(model, base)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(answers(model)[0], before)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"train": ["haed"]}, r"names 'haed', but the policy has .*decoder, head, order, placeholder, .*, vision"),
        ({"train": ["head", "decoder.rooters"]}, r"names 'decoder\.rooters', but decoder has .*llm, .*routers"),
        ({"adapt": ["decodr.llm"]}, r"names 'decodr\.llm', but there is no decodr"),
        ({"train": ["*"], "adapt": ["decoder"]}, "leaves no linear layer to adapt"),
        ({"train": []}, "there is nothing to train"),
        ({"train": "head"}, "finetune.train must be a list of parts, got 'head'"),
        ({"rank": 0}, r"finetune\.rank must be a positive whole number, got 0"),
        ({"rank": 2.5}, r"finetune\.rank must be a positive whole number, got 2\.5"),
        ({"alpha": float("nan")}, "alpha must be positive and finite"),
    ],
)
def test_mistakes_are_explained(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adapters.prepare(tiny_model(), FinetuneConfig(**bad))


def test_without_peft_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"adapters need peft: `uv pip install peft`, or train with finetune=full"):
        adapters.prepare(tiny_model(), LORA)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with adapters, augmented pictures and recomputed gradients."""
    output = tmp_path_factory.mktemp("uninterrupted")
    small_trainer(output, lora()).run()
    return output


def lora(**changes: Any) -> Any:
    return settings(finetune=LORA, gradient_checkpointing=True, **changes)


def test_the_saved_policy_is_whole_and_plain(uninterrupted: Path, tmp_path: Path) -> None:
    policy = load_policy(uninterrupted / "policy")
    assert not list(adapters.adapted_layers(policy.model))
    trainer = small_trainer(tmp_path, lora())
    trainer.output = uninterrupted
    trainer._resume()
    merged = adapters.merged_state(trainer.weights.averaged().model)
    assert merged.keys() == policy.model.state_dict().keys()
    assert all(torch.equal(merged[name], value) for name, value in policy.model.state_dict().items())
    observation = ROBOT.fake_observation(2)
    actions = policy.act(observation).actions
    np.testing.assert_allclose(trainer.policy().act(observation).actions, actions, rtol=1e-4, atol=1e-5)
    begun = small_trainer(tmp_path / "begun", lora()).policy().act(observation).actions
    assert not np.allclose(begun, actions, atol=1e-3)
    state = torch.load(uninterrupted / "checkpoints" / "step_0000010" / "training.pt", weights_only=True)
    trained = {name for name, p in trainer.raw.named_parameters() if p.requires_grad}
    assert state["objective"].keys() == state["average"].keys() == trained
    assert len(trained) < len(list(trainer.raw.parameters()))


def test_what_is_frozen_does_not_move(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, settings(steps=3, finetune=HEAD_ONLY, validate_every=0))
    before = {name: p.detach().clone() for name, p in trainer.raw.model.named_parameters()}
    policy = trainer.run()
    after = dict(policy.model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert all(name.startswith("head.") for name in moved)


def test_after_kill_9_with_adapters_it_goes_on_exactly(uninterrupted: Path, tmp_path: Path) -> None:
    code = KILLED.replace("Path(sys.argv[1])", "Path(sys.argv[1]), lora()")
    code = f"from cogvla.tests.policy.training.test_finetune import lora\n{code}"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    small_trainer(tmp_path, lora()).run()
    assert_same_run(tmp_path, uninterrupted)


def test_parts_that_the_policy_lacks_do_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    before = replace(LORA, train=tuple(part for part in LORA.train if part != "router"))
    old, new = (small_trainer(tmp_path, settings(finetune=config)).weights for config in (before, LORA))
    new.load_state_dict(old.state_dict())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"finetune": replace(LORA, rank=2)}, "was trained with another finetune; choose another output"),
        ({"finetune": FinetuneConfig()}, "was trained with another finetune"),
    ],
)
def test_checkpoints_of_another_finetuning_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    small_trainer(tmp_path, settings(steps=1, finetune=LORA, validate_every=0)).run()
    with pytest.raises(ValueError, match=said):
        small_trainer(tmp_path, settings(steps=2, **change)).run()


def test_a_changed_base_is_refused(tmp_path: Path) -> None:
    small_trainer(tmp_path, settings(steps=1, finetune=LORA, validate_every=0)).run()
    trainer = small_trainer(tmp_path, settings(steps=2, finetune=LORA))
    trainer.weights.frozen = trainer.weights.frozen + 1
    with pytest.raises(ValueError, match="was trained from another base: its frozen weights are not these"):
        trainer.run()


@pytest.mark.usefixtures("own_accelerator")
def test_the_base_is_in_bfloat16_and_what_is_trained_in_float32(tmp_path: Path) -> None:
    config = settings(steps=1, batch_size=2, validate_every=1, precision="bfloat16", finetune=LORA)
    trainer = small_trainer(tmp_path, config)
    policy = trainer.run()
    kinds = {(p.requires_grad, p.ndim > 1, p.dtype) for p in trainer.raw.parameters()}
    assert (False, True, torch.bfloat16) in kinds
    assert all(dtype == torch.float32 for trained, matrix, dtype in kinds if trained or not matrix)
    assert 0 < rows(tmp_path)[0]["train/loss"] < 10
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert policy.act(ROBOT.fake_observation(1)).actions.shape == (1, 4, 4)
    assert load_policy(tmp_path / "policy").act(ROBOT.fake_observation(1)).actions.shape == (1, 4, 4)


@pytest.mark.usefixtures("own_accelerator")
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_run_goes_on_in_another_precision(tmp_path: Path, precision: str) -> None:
    """As from a GPU to a CPU with `auto`."""
    config = settings(steps=1, batch_size=2, validate_every=0, precision=precision, finetune=HEAD_ONLY)
    small_trainer(tmp_path, config).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    other = "float32" if precision == "bfloat16" else "bfloat16"
    small_trainer(tmp_path, replace(config, steps=2, precision=other)).run()
    assert rows(tmp_path)[-1]["step"] == 2


ROUTINGS = [{}, {"mode": "drop"}, {"efa": False}, {"scale": "all", "position_policy": "renumber"}]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_recomputed_gradients_are_the_same(tmp_path: Path, routing: dict[str, Any]) -> None:
    found = []
    for recompute in (False, True):
        trainer = small_trainer(tmp_path, settings(gradient_checkpointing=recompute), **routing)
        assert trainer.raw.model.decoder.recompute is recompute
        choices = trainer.builder.choose(samples := trainer.batches.gather(torch.arange(6)), torch.Generator())
        trainer.raw(trainer.builder.build(samples, choices))["loss"].backward()
        found.append({name: p.grad for name, p in trainer.raw.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_recomputing_keeps_less() -> None:
    kept = []
    for recompute in (False, True):
        model = tiny_model()
        saved: dict[int, int] = {}
        model.recompute_blocks(recompute)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor, saved: dict[int, int] = saved, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(tiny_input())
        kept.append(sum(saved.values()))
        del output
    assert kept[1] < 0.5 * kept[0]


def test_eight_bit_moments_resume_exactly(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason=needs("adamw8bit"))
    config = settings(steps=4, checkpoint_every=2, validate_every=0, optimiser="adamw8bit")
    trainer = small_trainer(tmp_path, config)
    trainer.run()
    assert torch.uint8 in {m["state1"].dtype for m in trainer.weights.optimiser.optimizer.state.values()}
    whole = load_policy(tmp_path / "policy").model.state_dict()
    shutil.rmtree(tmp_path / "checkpoints" / "step_0000004")
    small_trainer(tmp_path, config).run()
    again = load_policy(tmp_path / "policy").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    with pytest.raises(ValueError, match=r"has the moments of training\.optimiser=adamw8bit, not adamw; choose"):
        small_trainer(tmp_path, replace(config, steps=6, optimiser="adamw")).run()


def test_large_matrices_have_eight_bit_moments() -> None:
    pytest.importorskip("bitsandbytes", reason=needs("adamw8bit"))
    layer = torch.nn.Linear(64, 128)
    optimiser = adamw(layer, 1e-2, 0.0, "adamw8bit")
    before = layer.weight.detach().clone()
    layer(torch.randn(4, 64)).square().mean().backward()
    optimiser.step()
    assert not torch.equal(layer.weight, before)
    assert optimiser.state[layer.weight]["state1"].dtype == torch.uint8


def test_without_bitsandbytes_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"] + ["bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"adamw8bit needs bitsandbytes .*or train with training\.optimiser=adamw"):
        adamw(torch.nn.Linear(2, 2), 1e-3, 0.0, "adamw8bit")


def test_it_starts_from_a_checkpoint_with_its_words_and_the_new_statistics(tmp_path: Path) -> None:
    base = tmp_path / "base"
    small_trainer(base, settings(steps=2, validate_every=0)).run()
    data = small.small_data(seed=1)
    data.instructions[2] = "approach the blue one"
    trainer = small_trainer(tmp_path / "tuned", data=data, base=str(base / "policy"))
    learned = load_policy(base / "policy")
    changed = {"state.0.weight", "state.0.bias", "head.net.6.weight", "head.net.6.bias"}  # with the statistics
    for name, value in learned.model.state_dict().items():
        assert torch.equal(trainer.raw.model.state_dict()[name], value) == (name not in changed), name
    words, tuned = learned.preprocessor.tokenizer.words, trainer.preprocessor.tokenizer.words  # type: ignore[attr-defined]
    assert tuned == (*words, "approach")
    expected = data.statistics()["action"]
    assert not np.allclose(expected.q01, learned.preprocessor.action_normaliser.shift_D.numpy())
    trainer.run()
    assert load_policy(tmp_path / "tuned" / "policy").preprocessor.tokenizer.words == tuned  # type: ignore[attr-defined]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("state", "action"), [("q99", "min_max"), ("mean_std", "mean_std"), ("identity", "identity")])
def test_other_statistics_do_not_change_the_actions_of_the_base(
    tmp_path: Path, state: str, action: str, prefix: int
) -> None:
    config = small.small_config()
    config = replace(config, head=replace(config.head, prefix=prefix))
    torch.manual_seed(0)
    base = CogVLAPolicy(CogVLA(config, ROBOT), small.small_preprocessor())
    if base.model.committed is not None:
        torch.nn.init.normal_(base.model.committed.matrix)
    statistics = small.small_data().statistics()
    save_checkpoint(tmp_path / "base", base.model.state_dict(), config, base.preprocessor, statistics, {})
    robot = replace(ROBOT, state_normalisation=state, action_normalisation=action)
    other = small.small_data(seed=1)
    other.action_NA[:, 1] *= 3
    preprocessor = Preprocessor(robot, base.preprocessor.tokenizer, other.statistics())
    model = CogVLA(config, robot)
    load_own(model, tmp_path / "base", preprocessor)
    generator = np.random.default_rng(0)
    observation = Observation(
        {name: generator.integers(0, 256, (4, small.SIZE, small.SIZE, 3), np.uint8) for name in ROBOT.camera_names},
        generator.uniform(0.3, 0.7, (4, 3)).astype(np.float32),
        [small.INSTRUCTIONS[0]] * 4,
        committed=[Committed(generator.uniform(-0.2, 0.2, (prefix, 4)).astype(np.float32), prefix)] * 4,
    )
    expected, found = (p.act(observation).actions for p in (base, CogVLAPolicy(model, preprocessor)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    of_another = Preprocessor(replace(robot, name="another"), base.preprocessor.tokenizer, other.statistics())
    load_own(model, tmp_path / "base", of_another)
    assert all(torch.equal(value, base.model.state_dict()[name]) for name, value in model.state_dict().items())
    (tmp_path / "base/statistics.json").write_text('{"state": {"q01": [0]}, "action": {"q01": [0]}}')
    with pytest.raises(ValueError, match=r"statistics\.json in .*base is damaged .*; use another checkpoint"):
        load_own(model, tmp_path / "base", preprocessor)


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("language", {"rope_theta": 5e5}, "language.rope_theta 10000.0, not 500000.0"),
        ("language", {"heads": 1, "kv_heads": None}, "language.heads 2, not 1"),
        ("language", {"bos_token": 13}, "language.bos_token 14, not 13"),
    ],
)
def test_a_base_whose_weights_would_mean_something_else_is_refused(
    tmp_path: Path, part: str, change: dict[str, Any], said: str
) -> None:
    config, base = small.small_config(), small.small_policy()
    save_checkpoint(tmp_path, base.model.state_dict(), config, base.preprocessor, small.small_data().statistics(), {})
    model = CogVLA(replace(config, **{part: replace(getattr(config, part), **change)}), ROBOT)
    with pytest.raises(ValueError, match=f"was trained with {said}: set policy.{said.split()[0]}="):
        load_own(model, tmp_path)
    load_own(base.model, tmp_path)


def test_a_head_of_another_kind_starts_anew(tmp_path: Path) -> None:
    """Those of flow and diffusion have the same names and shapes."""
    configs = [replace(small.small_config(), head=ActionHeadConfig(kind=kind)) for kind in ("flow", "diffusion")]
    base, model = (CogVLA(config, ROBOT) for config in configs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = small.small_data().statistics()
    save_checkpoint(tmp_path, base.state_dict(), configs[0], small.small_preprocessor(), statistics, {})
    assert "head.denoiser.action" in load_own(model, tmp_path)[-1]
    for name, value in model.state_dict().items():
        assert torch.equal(value, (before if name.startswith("head.") else base.state_dict())[name]), name


def test_a_base_with_other_routing_gives_what_fits_and_says_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_trainer(tmp_path, settings(steps=1, validate_every=0), lfp=False).run()
    trainer = small_trainer(tmp_path / "tuned", base=str(tmp_path / "policy"))
    assert "nothing into decoder.routers.1" in capsys.readouterr().out
    first, second = load_policy(tmp_path / "policy").model, trainer.raw.model
    assert torch.equal(first.decoder.llm.norm.weight, second.decoder.llm.norm.weight)
    save_checkpoint(tmp_path / "routed", second.state_dict(), second.config, trainer.preprocessor, {}, {})
    assert load_own(first, tmp_path / "routed")[1].startswith("left out: decoder.routers.1")
    with pytest.raises(ValueError, match="nothing is neither a folder nor USER/NAME of the hub"):
        small_trainer(tmp_path / "other", base=str(tmp_path / "nothing"))


DISTRIBUTED = """
import sys
from pathlib import Path
from cogvla.tests.support.small_data import small_trainer
from cogvla.tests.policy.training.test_finetune import lora

trainer = small_trainer(Path(sys.argv[1]), lora(steps=4, validate_every=0))
assert trainer.accelerator.num_processes == 2
trainer.run()
trainer.accelerator.end_training()
"""


def test_two_processes_with_adapters_learn_what_one_does(tmp_path: Path) -> None:
    small_trainer(tmp_path / "one", lora(steps=4, validate_every=0)).run()
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run([*launch, script, tmp_path / "two"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for first, second in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
