"""Token routers plugged into checkpoints, trained with a policy, and asked for on the command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from cogvla.policy.checkpoint import load_policy, save_checkpoint
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.training.objective import Objective, ObjectiveConfig
from cogvla.routing.router import RouterConfig
from cogvla.scripts.command import compose
from cogvla.scripts.eval_libero import run as eval_libero
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.small_data import ROBOT, settings, small_data, small_policy, small_trainer
from cogvla.tests.support.tiny_model import tiny_model

PLAIN: dict[str, Any] = {"efa": False, "lfp": False}


def saved(folder: Path, policy: CogVLAPolicy) -> Path:
    weights, statistics = policy.model.state_dict(), small_data().statistics()
    save_checkpoint(folder, weights, policy.model.config, policy.preprocessor, statistics, {"step": 7})
    return folder


def actions(policy: CogVLAPolicy) -> np.ndarray:
    return policy.act(ROBOT.fake_observation(2)).actions


def test_a_router_is_plugged_into_any_checkpoint(tmp_path: Path) -> None:
    folder = saved(tmp_path / "it", small_policy(**PLAIN))
    whole = load_policy(folder)
    assert "router" not in whole.describe()
    np.testing.assert_array_equal(actions(load_policy(folder, router=RouterConfig("identity"))), actions(whole))
    routed = load_policy(folder, router=RouterConfig("random", 0.25))
    assert not np.array_equal(actions(routed), actions(whole))
    assert routed.describe()["router"]["plugged_in"]
    assert (routed.describe()["router"]["name"], routed.describe()["router"]["budget"]) == ("random", 0.25)


def test_a_trained_router_comes_with_its_policy_and_can_be_taken_out(tmp_path: Path) -> None:
    router = RouterConfig("learned_pruner", 4, options={"hidden": 16}, layers=(1,), layer_router="token_norm")
    policy = small_policy(**PLAIN, router=asdict(router))
    folder = saved(tmp_path / "it", policy)
    loaded = load_policy(folder)
    np.testing.assert_array_equal(actions(loaded), actions(policy))
    assert loaded.model.config == policy.model.config
    assert loaded.describe()["router"]["name"] == "learned_pruner"
    without = load_policy(folder, router=RouterConfig("identity"))
    assert not [name for name, _ in without.model.named_parameters() if name.startswith("router")]
    plain = saved(tmp_path / "plain", small_policy(**PLAIN))
    with pytest.raises(ValueError, match=r"'learned_pruner' has weights of its own, .* train_policy base="):
        load_policy(plain, router=RouterConfig("learned_pruner", 4))


@pytest.mark.parametrize("name", ["random", "learned_pruner", "selector_merger", "progressive_video"])
def test_training_with_a_router_does_not_depend_on_how_a_step_is_divided(name: str, tmp_path: Path) -> None:
    routing = {**PLAIN, "router": asdict(RouterConfig(name, 4))}

    def trained(folder: str, **changes: Any) -> dict[str, torch.Tensor]:
        config = settings(steps=3, validate_every=0, **changes)
        return small_trainer(tmp_path / folder, config, **routing).run().model.state_dict()

    whole, parts = trained("whole"), trained("parts", accumulation=2)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-3, atol=1e-4)
    again = trained("again")
    assert all(torch.equal(again[key], value) for key, value in whole.items())


@pytest.mark.parametrize(
    "name", ["lightvla", "grids", "compressor_vla", "flash_pooling", "channel_attention", "token_pooling"]
)
def test_a_router_learns_with_its_policy_and_is_saved_with_it(name: str, tmp_path: Path) -> None:
    routing = {**PLAIN, "router": asdict(RouterConfig(name, 4))}
    torch.manual_seed(0)
    trainer = small_trainer(tmp_path / "run", settings(steps=2, validate_every=0), **routing)
    before = {key: value.clone() for key, value in trainer.policy().model.state_dict().items()}
    policy = trainer.run()
    moved = [key for key, value in policy.model.state_dict().items() if not torch.equal(value, before[key])]
    assert [key for key in moved if "fusion" in key]
    assert [key for key in before if key.startswith("router")] == [key for key in moved if key.startswith("router")]
    np.testing.assert_array_equal(actions(load_policy(saved(tmp_path / "it", policy))), actions(policy))


def test_grounding_needs_a_fixed_number_of_tokens() -> None:
    model = tiny_model(**PLAIN, router=asdict(RouterConfig("random", 4, train_budgets=(2, 4))))
    with pytest.raises(ValueError, match=r"set objective\.grounding=0"):
        Objective(model, ObjectiveConfig(pointing=0.0))


# --- the command ---


def command(*overrides: str) -> DictConfig:
    return compose("eval_libero", list(overrides))


@pytest.mark.usefixtures("no_figures")
def test_eval_libero_plays_with_a_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvla.envs.evaluation.evaluate.PROBE_CALLS", 2)
    few = ("tasks=[0]", "episodes_per_task=1", "workers=0", "videos=0", "threads=1", f"output={tmp_path}")
    config = command(f"checkpoint={SHIPPED}", "router.name=random", "router.budget=0.5", *few)
    (report,) = eval_libero(config, "eval_libero ...")
    assert report.total.success.trials == 1
    assert report.reproduce["policy"]["router"]["name"] == "random"
    with pytest.raises(ValueError, match="another"):
        eval_libero(command(f"checkpoint={SHIPPED}", "router.name=random", "router.budget=0.25", *few), "...")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router.name=randm"], "unknown router 'randm'; one of"),
        (["router.name=random", "router.budget=9"], "choose 1 to 8"),
        (["router.name=spatial_pool"], "or use one of "),
        (["router.name=random", "router.options={speed: 1}"], "has no option speed"),
        (["router.name=random", "router.mode=skip"], "must be one of bypass, drop"),
        (["router.name=random", "+router.speed=1"], "unknown key speed in router"),
        (["router.name=random", "checkpoint=random"], "needs a checkpoint, not"),
        (["router.budget=0.5"], r"router\.budget=0\.5 changes nothing without router\.name"),
        (["router.layers=[1]"], r"router\.layers=\[1\] changes nothing without router\.name"),
    ],
)
def test_mistakes_on_the_command_line_are_explained(overrides: list[str], message: str) -> None:
    config = command(f"checkpoint={SHIPPED}", *overrides)
    with pytest.raises(ValueError, match=message):
        eval_libero(config, "eval_libero ...")
