"""What routers read is trained with the policy: [CLS], aligned words, any number of tokens. Train, save, route, run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training.objective import Objective, ObjectiveConfig
from cogvla.routing.router import RouterConfig, RouterContext
from cogvla.scripts.training.build import build_trainer
from cogvla.tests.policy.engine.test_engine import assert_same
from cogvla.tests.support.small_data import IMITATION, LABELLED, ROBOT, settings, small_config, small_data
from cogvla.tests.support.tiny_model import tiny_model

PATCHES: dict[str, Any] = {"efa": False, "lfp": False}
FEW = settings(steps=3, validate_every=0, checkpoint_every=3)


def trained(folder: Path, objective: ObjectiveConfig, class_token: bool = False, **routing: Any) -> Path:
    """The folder of a policy after three steps."""
    config = small_config(**PATCHES, **routing)
    if class_token:
        towers = {
            name: replace(getattr(config.vision, name), class_token=True, depth=3) for name in ("dinov2", "siglip")
        }
        config = replace(config, vision=replace(config.vision, **towers))
    build_trainer(FEW, config, objective, ROBOT, small_data(), folder, lambda metrics, step: None, None).run()
    return folder / "policy"


def seen_by(policy: CogVLAPolicy) -> RouterContext:
    """What the router before the language model sees of an observation, which the engine routes in the same way."""
    seen: list[RouterContext] = []
    assert policy.model.router is not None
    assert policy.model.router.before is not None
    hook = policy.model.router.before.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    policy.act(ROBOT.fake_observation(2))
    hook.remove()
    engine = policy.with_engine(EngineConfig("trace", text_buckets=(6,)))
    engine.warm_up(2)
    assert_same(policy, engine, 2)
    return seen[0]


def test_fastervlm_and_vtc_cls_read_a_class_token_that_was_trained(tmp_path: Path) -> None:
    folder = trained(tmp_path / "it", IMITATION, class_token=True)
    fresh = load_policy(folder).model.state_dict()["vision.towers.dinov2.vit.cls_token"]
    assert fresh.abs().sum() > 0
    for layers in (1, 2):  # FasterVLM, VTC-CLS
        router = RouterConfig("cls_attention", 4, options={"layers": layers})
        policy = load_policy(folder, router=router)
        context = seen_by(policy)
        assert context.attention_LBN is not None
        assert len(context.attention_LBN) == layers
        # The rest of [CLS]'s attention goes to itself: with the mean over patches instead, the sum would be 1.
        assert (context.attention_LBN.sum(-1) < 1 - 1e-3).all()
    without = load_policy(trained(tmp_path / "without", IMITATION), router=RouterConfig("cls_attention", 4))
    attention = seen_by(without).attention_LBN
    assert attention is not None
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


@pytest.mark.parametrize("name", ["text_guided", "coverage", "facility_location"])
def test_routers_that_compare_with_words_run_on_a_policy_that_aligned_them(name: str, tmp_path: Path) -> None:
    """FlashVLM, MMTok and CATP, on a base that was trained with `objective.contrast`."""
    folder = trained(tmp_path, replace(IMITATION, contrast=0.5))
    context = seen_by(load_policy(folder, router=RouterConfig(name, 4)))
    assert context.text_BTE is not None
    assert context.text_BTE.isfinite().all()


@pytest.mark.parametrize("variant", ["added", "projector"])
def test_any_number_of_tokens_is_trained_with_grounding(variant: str, tmp_path: Path) -> None:
    router = RouterConfig("flex_count", 4, options={"variant": variant}, train_budgets=(1, 4, 16))
    objective = replace(LABELLED, pointing=0.0)
    folder = trained(tmp_path, objective, router=asdict(router))
    for budget in (1, 4, 16):
        assert load_policy(folder, router=replace(router, budget=budget)).model.vision_tokens == 2 * budget
    start = small_config(**PATCHES, router=asdict(router))
    before = build_trainer(FEW, start, objective, ROBOT, small_data(), tmp_path / "b", lambda m, s: None, None)
    after = load_policy(folder).model.state_dict()
    moved = {name: not torch.equal(after[name], p) for name, p in before.raw.model.state_dict().items()}
    assert moved["router.before.gate.weight"]
    assert moved["vision.fusion.project.0.weight"] == (variant == "added"), "no projector beside the projector"


def test_tokens_of_another_grid_are_pooled_and_repeated_for_the_grounding() -> None:
    config = RouterConfig("flex_count", 4, train_budgets=(1, 4, 16))
    model = tiny_model(**PATCHES, router=asdict(config))
    objective = Objective(model, ObjectiveConfig(pointing=0.0))
    fine = torch.arange(2 * 16.0).view(1, 32, 1).expand(2, -1, 32)
    corner = torch.tensor([0.0, 1, 4, 5]).mean().item()
    expected = [corner, corner + 2, corner + 8, corner + 10]
    assert objective._same_grid(fine)[0, :, 0].tolist() == expected + [16 + x for x in expected]
    coarse = torch.tensor([3.0, 7.0]).view(1, 2, 1).expand(2, -1, 32)
    assert objective._same_grid(coarse)[1, :, 0].tolist() == [3.0] * 4 + [7.0] * 4
    same = torch.randn(2, 8, 32)
    assert objective._same_grid(same) is same
