"""`compare_routers` and `analyse_routing`: known answers, and both commands on a small policy without a simulator."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import initialize_config_module

from cogvla.configs.build import build
from cogvla.envs import suite as suites
from cogvla.envs.analysis.layer_probes import horizon, injection, keeping, single_tokens
from cogvla.envs.analysis.router_comparison import (
    ROUNDS,
    Cell,
    CellOutcome,
    CellReport,
    Cost,
    against,
    cells_for,
    costs,
    first_observations,
    pareto_front,
    wanted_routers,
)
from cogvla.envs.analysis.router_page import _budgets, _matrices
from cogvla.envs.analysis.routing_findings import findings
from cogvla.envs.analysis.routing_pictures import DARK, SIDE, kept_map, picture
from cogvla.envs.analysis.routing_recording import _looks, covered, look, play
from cogvla.envs.evaluation.plots import lines, pareto
from cogvla.envs.evaluation.protocol import load_protocol
from cogvla.envs.evaluation.robustness import CLEAN
from cogvla.envs.evaluation.statistics import Latency, sign_test, success_rate
from cogvla.policy.checkpoint import save_checkpoint, weights_hash
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Camera, Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.language_layer import Frame, normed, run_layer
from cogvla.policy.policy import CogVLAPolicy
from cogvla.routing import registry
from cogvla.routing.registry import registered_routers
from cogvla.routing.router import RoutedTokens, RouterConfig, RouterContext, RouterSizes, TokenRouter
from cogvla.scripts import analyse_routing, compare_routers, console
from cogvla.scripts.analyse_routing import run as analyse
from cogvla.scripts.command import compose, plain
from cogvla.tests.support.console_command import ended
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.point_suite import EMBODIMENT, TASKS, toy_suite
from cogvla.tests.support.small_data import MODEL

PATCHES, VIEWS = 16, 2
PLAIN: dict[str, Any] = {"efa": False, "lfp": False}
STATISTICS = {
    "state": Statistics.of(np.random.default_rng(0).normal(size=(50, 8))),
    "action": Statistics.of(np.random.default_rng(1).uniform(-1, 1, size=(50, 7))),
}


def point_policy(**routing: Any) -> CogVLAPolicy:
    """A policy with random weights for the suite `point`."""
    torch.manual_seed(0)
    config = CogVLAConfig.from_dict({**MODEL, "routing": {"film_init": 1.0, **routing}})
    words = WordTokenizer.from_instructions(task.instruction for task in TASKS)
    return CogVLAPolicy(CogVLA(config, EMBODIMENT), Preprocessor(EMBODIMENT, words, STATISTICS))


def saved(folder: Path, **routing: Any) -> Path:
    policy = point_policy(**routing)
    save_checkpoint(folder, policy.model.state_dict(), policy.model.config, policy.preprocessor, STATISTICS, {})
    return folder


# --- statistics ---


def test_sign_test_by_hand() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(0, 0) == sign_test(4, 4) == 1.0
    with pytest.raises(ValueError, match="counts"):
        sign_test(-1, 2)


def test_only_what_nothing_beats_is_on_the_front() -> None:
    points = [(1.0, 0.5), (2.0, 0.5), (2.0, 0.9), (3.0, 0.8), (0.5, 0.1), (1.0, 0.5)]
    assert pareto_front(points) == [0, 2, 4, 5], "equal points do not beat each other"
    assert pareto_front([]) == []


def test_figures_are_drawn_of_one_point_and_of_gaps() -> None:
    points = [("random", 5.0, 0.5, 0.4, 0.6), ("random", 4.0, 0.0, 0.0, 0.1), ("other", 5.0, 1.0, 0.9, 1.0)]
    assert pareto(points, [1, 2], "ms", None).startswith(b"\x89PNG")
    assert "<svg" in lines({"": [None, 0.5], "other": []}, "layer", "share", (0, 1))


def outcome(**episodes: bool) -> CellOutcome:
    return CellOutcome(success_rate(episodes.values()), 0, episodes)


def test_cells_are_compared_by_the_episodes_that_both_have_played() -> None:
    paired = against(outcome(a=True, b=True, c=False, d=True), outcome(a=False, b=True, c=True, e=False))
    assert (paired.wins, paired.losses, paired.p) == (1, 1, 1.0)


# --- cells ---


def test_one_token_is_not_all_of_them() -> None:
    cost = Cost(Latency(1, 1, 1, 1, 1, 1), 0, 0, 0, 1)
    table = [
        CellReport(Cell("random", RouterConfig("random", budget)), cost, {CLEAN: outcome(a=solved)}, {})
        for budget, solved in ((1.0, True), (1, False))
    ]
    assert [(str(budget.share), len(budget.rows)) for budget in _budgets(table)] == [("1.0", 1), ("1", 1)]
    (matrix,) = _matrices(table, ["point"], [CLEAN])
    assert list(map(str, matrix.shares)) == ["1.0", "1"]
    assert [rate and rate.value for rate in matrix.lines["random"]] == [1.0, 0.0]


def test_every_router_is_played_or_left_out_for_a_reason() -> None:
    model = point_policy(**PLAIN).model
    cells, left_out = cells_for(model, wanted_routers(None, layer=1), [0.5, 0.25], trained=False)
    labels = [*(cell.label for cell in cells), *left_out]
    assert {label.split()[0] for label in labels} == set(registered_routers())
    assert "has weights of its own" in left_out["learned_pruner"]
    assert "has weights of its own" in left_out["progressive_video"]
    assert {"vla_pruner", "spec_prune", "adp", "vla_iap"} <= {cell.router.name for cell in cells}
    _, partly = cells_for(model, wanted_routers(["spatial_pool"], layer=1), [0.5, 7], trained=False)
    assert list(partly) == ["spatial_pool at 7"], "7 tokens are no grid"
    assert cells[0].key == "identity"
    assert {cell.router.budget for cell in cells if cell.label == "random"} == {0.5, 0.25}
    trained, _ = cells_for(model, wanted_routers(["learned_pruner"], layer=1), [0.5], trained=True)
    assert [cell.key for cell in trained] == ["learned_pruner_0.5"]


def test_budgets_that_leave_as_many_tokens_are_played_once_and_not_without_a_budget() -> None:
    model = point_policy(**PLAIN).model
    names: list[Any] = ["random", "identity", "diversity", {"name": "late_exit", "stage": "llm_layer"}]
    for budgets in ([0.0625, 0.03], [0.25, 4]):
        cells, left_out = cells_for(model, wanted_routers(names, 1), budgets, trained=False)
        played = {cell.key for cell in cells}
        assert {f"random_{budgets[0]}", f"diversity_{budgets[0]}", "identity"} < played
        assert len(played) == 4, "the budget changes nothing for late_exit"
        assert left_out == {
            f"{name} at {budgets[1]}": f"leaves as many tokens as at {budgets[0]}" for name in ("random", "diversity")
        }
    cells, _ = cells_for(model, wanted_routers(["random"], 1), [0.5, 8, 0.25], trained=False)
    assert [cell.router.budget for cell in cells] == [0.5, 0.25]
    cells, left_out = cells_for(model, wanted_routers(["random"], 1), [1.0, 1], trained=False)
    assert [cell.key for cell in cells] == ["random_1.0", "random_1"], "all tokens, and one token"


def test_the_cost_of_every_router_is_counted_those_with_weights_too() -> None:
    policy = point_policy(**PLAIN)
    cells, _ = cells_for(policy.model, wanted_routers(None, 1), [0.25], trained=True)
    found = costs(policy, cells, [EMBODIMENT.fake_observation(1)] * ROUNDS, ROUNDS)
    assert found.keys() == {cell.key for cell in cells}
    assert {"film_aggregation_0.25", "learned_pruner_0.25", "slot_attention_0.25"} <= found.keys()
    for key, cost in found.items():
        assert cost.flops > cost.router_flops >= 0, key
        assert cost.latency.count == ROUNDS
    assert found["film_aggregation_0.25"].router_flops > found["random_0.25"].router_flops


def test_options_are_told_apart_and_mistakes_are_explained() -> None:
    both = wanted_routers(["diversity", {"name": "diversity", "options": {"variant": "maxsum"}}], layer=1)
    assert list(both) == ["diversity", "diversity variant=maxsum"]
    assert wanted_routers(["attention_growth"], layer=1)["attention_growth layers=[1]"].layers == (1,)
    with pytest.raises(ValueError, match=r"'randm'; possible are .*random"):
        wanted_routers(["randm"], layer=1)
    with pytest.raises(ValueError, match="twice"):
        wanted_routers(["random", "random"], layer=1)
    elsewhere = {"name": "adp", "stage": "projector_out", "options": {"base": "coverage"}}
    (router,) = wanted_routers([elsewhere], layer=1).values()
    assert router.layers == ()
    assert cells_for(point_policy(**PLAIN).model, {"adp": router}, [0.25], trained=False)[1] == {}
    with pytest.raises(ValueError, match=r"gives 'random' a budget: .* remove it"):
        wanted_routers([{"name": "random", "budget": 0.1}], layer=1)
    with pytest.raises(ValueError, match="speed"):
        wanted_routers([{"name": "random", "speed": 1}], layer=1)


# --- the command ---


def command(name: str, *overrides: str) -> Any:
    return compose(name, ["imports=[cogvla.tests.support.point_suite]", "suite=point", "threads=1", *overrides])


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_figures: None) -> list[str]:
    monkeypatch.setattr("cogvla.envs.evaluation.evaluate.PROBE_CALLS", 1)
    monkeypatch.setattr("cogvla.envs.analysis.router_page.pareto", lambda *_: b"picture")
    checkpoint = saved(tmp_path / "policy", **PLAIN)
    few = ["routers=[identity,random,spatial_pool]", "budgets=[0.25]", "calls=5"]
    few += ["evaluation.protocol=tabletop", "evaluation.episodes_per_task=1", "evaluation.workers=0"]
    return [f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", *few]


def test_a_comparison_goes_on_where_it_was_stopped(
    comparison: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[str] = []
    evaluate, stopped_at = compare_routers.evaluate, ["random_0.25"]

    def counting(policy: Any, suite: Any, protocol: Any, folder: Path, **options: Any) -> Any:
        name = folder.parent.parent.name
        if name in stopped_at:
            raise KeyboardInterrupt
        played.append(name)
        return evaluate(policy, suite, protocol, folder, **options, progress=False)

    monkeypatch.setattr(compare_routers, "evaluate", counting)
    with pytest.raises(KeyboardInterrupt):
        compare_routers.run(command("compare_routers", *comparison), "compare_routers ...")
    costs = (tmp_path / "out" / "costs.json").read_text()
    partial = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [not row["outcomes"] for row in partial["rows"]] == [False, True, True]
    assert "2 cells are not played to the end yet" in (tmp_path / "out" / "comparison.html").read_text()

    stopped_at.clear()
    data = compare_routers.run(command("compare_routers", *comparison), "compare_routers ...")
    assert played == ["identity", "random_0.25", "spatial_pool_0.25"], "nothing is played twice"
    assert (tmp_path / "out" / "costs.json").read_text() == costs, "times are of one sitting"
    assert [row["outcomes"]["clean"]["success"]["trials"] for row in data["rows"]] == [3, 3, 3]
    identity, random, pool = data["rows"]
    assert (identity["cost"]["tokens"], random["cost"]["tokens"]) == (VIEWS * PATCHES, VIEWS * PATCHES // 4)
    assert 0 < random["cost"]["flops"] < identity["cost"]["flops"]
    assert random["cost"]["router_flops"] < 1e-3 * random["cost"]["flops"], "drawing is no matrix product"
    assert random["cost"]["router_ms"] > 0
    assert list(pool["against"]["clean"]) == ["random"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "data:image/png" in page
    assert 'src="http' not in page

    other = command("compare_routers", *comparison, "evaluation.episodes_per_task=2")
    with pytest.raises(ValueError, match="results with another protocol"):
        compare_routers.run(other, "...")
    lean = {"rendering": "lean"}
    monkeypatch.setattr(compare_routers, "get_suite", lambda *_: replace(toy_suite(), settings=lean))
    with pytest.raises(ValueError, match="results with another simulation"):
        compare_routers.run(command("compare_routers", *comparison), "...")


def test_times_and_results_of_other_circumstances_are_not_mixed(
    comparison: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, counted = dict(compare_routers.machine()), []

    def counting(*given: Any) -> Any:
        counted.append(given)
        return costs(*given)

    monkeypatch.setattr(compare_routers, "machine", lambda: here)
    monkeypatch.setattr(compare_routers, "costs", counting)
    few = [*comparison, "routers=[identity]", "tasks=[0]"]
    for change in ({}, {}, {"cpu": "another"}, {}, {"torch_threads": 8}, {"gpus": ["one"]}):
        here |= change
        compare_routers.run(command("compare_routers", *few), "...")
    assert len(counted) == 4, "what was played is not played again, but all times are measured anew"
    measured = (tmp_path / "out" / "costs.json").read_text()
    with pytest.raises(ValueError, match="results with another engine:"):
        compare_routers.run(command("compare_routers", *few, "engine.kind=plain"), "...")
    assert (tmp_path / "out" / "costs.json").read_text() == measured, "they belong to the cells that are there"
    file = tmp_path / "out" / "identity" / "clean" / "outcome.json"
    with monkeypatch.context() as patch:
        patch.setattr(compare_routers, "versions", lambda: {"mujoco": "0.1"})
        with pytest.raises(ValueError, match=r"MuJoCo 0\.1 and [0-9.]+ cannot be mixed: .* delete .*clean"):
            compare_routers.run(command("compare_routers", *few), "...")
    file.write_text(file.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(ValueError, match="results with another device:"):
        compare_routers.run(command("compare_routers", *few), "...")


def test_a_camera_that_the_suite_lacks_is_named() -> None:
    robot = replace(EMBODIMENT, cameras=(*EMBODIMENT.cameras, Camera("front", 16, 16)))
    with pytest.raises(ValueError, match=r"the policy sees front, and suite 'point' has .*: choose another suite"):
        first_observations(toy_suite(), robot, 1)


def test_suites_are_counted_together_and_perturbed_cells_apart(
    comparison: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A perturbation that is asked for later is added to a finished comparison."""
    monkeypatch.setattr(suites, "_SUITES", dict(suites._SUITES))
    suites.register_suite("point_again", lambda: replace(toy_suite(), name="point_again"))
    both = [*comparison, "suite=[point,point_again]", "tasks=[0,2]"]
    clean = compare_routers.run(command("compare_routers", *both), "...")
    before = (tmp_path / "out" / "random_0.25" / "clean" / "outcome.json").stat().st_mtime_ns
    data = compare_routers.run(command("compare_routers", *both, "perturbation=[sensor,wording]", "level=1"), "...")
    assert (tmp_path / "out" / "random_0.25" / "clean" / "outcome.json").stat().st_mtime_ns == before
    assert data["conditions"] == ["clean", "sensor_1", "wording_1"]
    for old, row in zip(clean["rows"], data["rows"], strict=True):
        assert row["outcomes"]["clean"] == old["outcomes"]["clean"]
        for outcome in row["outcomes"].values():
            assert sorted(outcome["episodes"]) == ["point/0/0", "point/2/0", "point_again/0/0", "point_again/2/0"]
    assert list(data["rows"][1]["against"]["sensor_1"]) == ["spatial_pool"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    for heading in ("point_again", "sensor_1", "wording_1"):
        assert f"<h3>{heading}</h3>" in page


def test_all_perturbations_are_those_of_every_suite(comparison: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "_SUITES", dict(suites._SUITES))
    few = {"wording": toy_suite().perturbations["wording"]}
    suites.register_suite("point_again", lambda: replace(toy_suite(), name="point_again", perturbations=few))
    chosen = ["suite=[point,point_again]", "tasks=[0]", "routers=[identity]", "perturbation=all", "level=1"]
    data = compare_routers.run(command("compare_routers", *comparison, *chosen), "...")
    assert data["conditions"] == ["clean", "wording_1"]


def test_fine_tuning_gives_each_router_to_training(
    comparison: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def train(arguments: list[str], check: bool) -> SimpleNamespace:
        asked.append(arguments[3:])
        router = {"name": "learned_pruner", "budget": 0.25, "options": {"hidden": 8}}
        saved(Path(compose("train_policy", asked[0]).output) / "policy", **PLAIN, router=router)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare_routers, "subprocess", SimpleNamespace(run=train))
    learned = ["regime=fine_tuned", "routers=[{name: learned_pruner, options: {hidden: 8}}]"]
    data = compare_routers.run(command("compare_routers", *comparison, *learned, "tasks=[0]"), "...")
    composed = compose("train_policy", asked[0])
    assert RouterConfig(**composed.routing.router).options == {"hidden": 8}
    assert composed.routing.router.budget == 0.25
    assert composed.training.steps == 500
    values = plain(composed)
    assert build(Embodiment, values["embodiment"], "embodiment") == EMBODIMENT, "not the default of train_policy"
    trained = CogVLAConfig.from_dict({**values["policy"], "routing": {**values["routing"], "router": {}}})
    assert trained == point_policy(**PLAIN).model.config
    assert list(composed.suite) == ["point"]
    assert composed.evaluation is None
    assert (data["regime"], data["rows"][0]["outcomes"]["clean"]["success"]["trials"]) == ("fine_tuned", 1)
    played = json.loads(next((tmp_path / "out").glob("*/clean/point/run.json")).read_text())["fingerprint"]["policy"]
    own = weights_hash(next((tmp_path / "out").glob("*/training/policy")))
    assert (played["weights_sha256"], played["base_sha256"]) == (own, weights_hash(tmp_path / "policy"))
    assert own != played["base_sha256"], "episodes of one training are not continued with those of another"


def test_a_training_knows_the_configs_that_the_comparison_was_given(
    comparison: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def train(arguments: list[str], check: bool) -> SimpleNamespace:
        asked.append(arguments[3:])
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(compare_routers, "subprocess", SimpleNamespace(run=train))
    own = tmp_path / "my configs"
    (own / "objective").mkdir(parents=True)
    (own / "objective" / "mine.yaml").write_text("defaults:\n  - imitation\n  - _self_\n")
    words = [*comparison, "imports=[cogvla.tests.support.point_suite]", "suite=point", "threads=1"]
    words += ["routers=[identity]", "regime=fine_tuned", 'recipe=["objective=mine"]']
    said = ended(console.compare_routers, "--config-dir", str(own), *words)
    assert asked, said
    assert asked[0][:2] == ["--config-dir", str(own)]
    assert said == f"error: training failed; its command is: {shlex.join(['train_policy', *asked[0]])}"


@pytest.mark.parametrize("name", ["a b", "a(1)", "a,b", "a=b", "a#b", "1e3", "null", 'a"b', "a'b", 'a\\"b', "a\\", ""])
def test_text_reaches_training_as_it_is(name: str) -> None:
    words = [f"{key}={compare_routers._written(value)}" for key, value in (("base", name), ("imports", [name, "x"]))]
    composed = compose("train_policy", [*words, f"+routing.router.options={compare_routers._written({'base': name})}"])
    assert (composed.base, list(composed.imports)) == (name, [name, "x"])
    assert dict(composed.routing.router.options) == {"base": name}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["regime=both"], "plug_in or fine_tuned"),
        (["budgets=[]"], "budgets is empty"),
        (["level=2"], "level= needs perturbation=NAME"),
        (["perturbation=ligth"], "did you mean light"),
        (["suite=[]"], "suite is empty"),
        (["routers=[learned_pruner]"], "supports none of the routers: .*weights of its own"),
        (["routers=[nothing]"], "possible are"),
        (["routers=nothing"], "routers names 'nothing'"),
        (["routers=[]"], "routers is empty"),
        (["routers=[1]"], "routers names 1; possible are"),
        (["routers=[[random]]"], r"routers names \['random'\]; possible are"),
        (["routers=[{name: [random]}]"], r"routers names \['random'\]; possible are"),
        (["calls=0"], "calls must be a whole number, at least 1, got 0"),
        (["calls=null"], "calls must be a whole number, at least 1, got None"),
        (["engine.dtype=auto"], "engine.dtype=auto could choose another precision for each router"),
        (["+evaluation.execute_steps=99"], "the policy predicts . actions at once"),
        (["regime=fine_tuned", 'recipe=["training.step=9"]'], r"recipe: .*training\.step\b"),
        (["regime=fine_tuned", 'recipe=["training.steps=0"]'], "steps, .* must be at least 1"),
        (["regime=fine_tuned", 'recipe=["objective=none"]'], "recipe: .*objective/none"),
    ],
)
def test_mistakes_are_explained(
    comparison: list[str], overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_routers, "costs", lambda *_: pytest.fail("nothing is measured before"))
    config = command("compare_routers", *comparison, *overrides)
    running = initialize_config_module("cogvla.configs", version_base="1.3")  # as in the command itself
    with running, pytest.raises(ValueError, match=message):
        compare_routers.run(config, "...")


# --- analyse_routing ---


def test_a_quick_comparison_keeps_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compared(values: dict[str, Any], *_: Any) -> SimpleNamespace:
        seen.append(values)
        return SimpleNamespace(run=dict)

    monkeypatch.setattr(compare_routers, "_Comparison", compared)
    for given in ([], ["routers=[identity,coverage]", "budgets=[0.5]", "evaluation.episodes_per_task=3"]):
        compare_routers.run(command("compare_routers", "checkpoint=it", "quick=true", *given), "compare_routers ...")
    usual, own = seen
    assert {key: usual[key] for key in compare_routers.QUICK} == compare_routers.QUICK
    assert usual["evaluation"]["episodes_per_task"] == 1
    assert (own["routers"], own["budgets"], own["calls"]) == (["identity", "coverage"], [0.5], usual["calls"])
    assert own["evaluation"]["episodes_per_task"] == 3


def test_patches_of_a_mask() -> None:
    mask_VHW = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask_VHW[0, :4, :4] = True
    mask_VHW[0, 4, 4] = True  # one of 16 pixels is too little
    assert covered(mask_VHW, (2, 2)).nonzero()[:, 0].tolist() == [0]
    tiny_VHW = torch.zeros(2, 8, 8, dtype=torch.bool)
    tiny_VHW[1, 7, 0] = True
    assert covered(tiny_VHW, (2, 2)).nonzero()[:, 0].tolist() == [6], "a small object is on the patch that shows most"
    assert not covered(torch.zeros(2, 8, 8), (2, 2)).any()


@pytest.mark.parametrize(
    ("routing", "stages"),
    [
        ({}, {"layer 1": None}),
        ({"mode": "drop"}, {"layer 1": None}),
        ({**PLAIN, "router": {"name": "grid_stride", "budget": 4}}, {"router": 8}),
        ({**PLAIN, "router": {"name": "random", "budget": 8, "layers": [1], "layer_budgets": [2]}},
         {"router": 16, "layer 1": 4}),
        ({**PLAIN, "router": {"name": "spatial_pool", "budget": 4}}, {"router": 0}),
    ],
)  # fmt: skip
def test_what_is_kept_is_named_by_the_tokens_before_routing(routing: dict[str, Any], stages: dict[str, Any]) -> None:
    policy = point_policy(**routing)
    moment = look(policy, EMBODIMENT.fake_observation(1))
    assert moment.kept.keys() == stages.keys()
    for stage, count in stages.items():
        assert count is None or len(moment.kept[stage]) == count
    assert moment.new == (8 if moment.kept.get("router") is not None and not len(moment.kept["router"]) else 0)
    for layer in moment.hidden:
        assert len(moment.hidden[layer]) == len(moment.after[layer])
        assert len(moment.attention[layer]) == len(moment.present[layer])
    if "layer 1" in stages and "router" in stages:
        assert set(moment.kept["layer 1"].tolist()) <= set(moment.kept["router"].tolist())
        assert moment.present[1].tolist() == moment.kept["layer 1"].tolist()
    rows = moment.looks_NP.sum(1)
    assert moment.looks_NP.shape == (len(moment.tokens_ND), VIEWS * PATCHES)
    assert (rows <= 1 + 1e-5).all()
    if routing.get("efa", True) is False:
        assert torch.equal(moment.looks_NP, torch.eye(VIEWS * PATCHES))


@pytest.mark.parametrize("routing", [{}, PLAIN])
@torch.inference_mode()
def test_what_tokens_look_at_is_on_the_device_of_the_policy(routing: dict[str, Any]) -> None:
    policy = point_policy(**routing)
    inputs = policy.inputs(EMBODIMENT.fake_observation(1))
    text = policy.model.encode_text(inputs.text_ids, inputs.text_mask)
    gaze = policy.model(inputs, text, watch=True).gaze
    with torch.device("meta"):  # what is made without a device is elsewhere
        assert _looks(policy.model, inputs, text, gaze)[0].device == inputs.pixels.device


def test_what_is_not_kept_is_dark() -> None:
    policy = point_policy(**PLAIN, router={"name": "grid_stride", "budget": 4})
    moment = look(policy, EMBODIMENT.fake_observation(1))
    bright_P = kept_map(moment, "router")
    assert bright_P.nonzero()[:, 0].tolist() == moment.kept["router"].tolist()
    white = np.full_like(moment.pictures_VHW3, 255)
    pixels = np.asarray(picture(type(moment)(**{**vars(moment), "pictures_VHW3": white}), "router", 0, (4, 4)))
    patches = pixels[SIDE // 8 :: SIDE // 4, SIDE // 8 :: SIDE // 4, 0].flatten()
    assert (patches == 255).tolist() == (bright_P[:PATCHES] == 1).tolist()
    assert set(patches.tolist()) == {255, int(255 * DARK)}


def test_emptied_layers_change_nothing_where_vision_is_not_read() -> None:
    """The last layer's values of vision tokens are made 0, and so are their keys' directions of any use."""
    policy = point_policy(**PLAIN)
    moment = look(policy, EMBODIMENT.fake_observation(1))
    found = horizon(policy.model, [moment])
    assert len(found["information"]) == 2
    assert found["information"][0] > 0
    blind: Any = point_policy(**PLAIN, attention="bidirectional")
    with torch.no_grad():
        blind.model.vision.fusion.project[-1].weight.zero_()
        blind.model.vision.fusion.project[-1].bias.zero_()
        for layer in blind.model.decoder.llm.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.v_proj.weight.zero_()
    assert horizon(blind.model, [look(blind, EMBODIMENT.fake_observation(1))])["horizon"] == 0


@torch.inference_mode()
def test_tokens_that_enter_late_are_those_of_a_decoder_without_the_first_layers() -> None:
    """The words and actions pass the first layer alone; then the tokens join them as they left the projector."""
    policy = point_policy(**PLAIN)
    model, moment = policy.model, look(policy, EMBODIMENT.fake_observation(1))
    changes = injection(model, [moment])
    assert changes is not None
    assert changes[0] == 0
    text = model.encode_text(moment.inputs.text_ids, moment.inputs.text_mask)
    vision, layout = model.vision(moment.inputs.pixels, text.vision), text.context.layout
    state = model.state(moment.inputs.state)[:, None]
    whole = torch.cat((text.bos_B1D, vision, state, text.tail_BRD), dim=1)
    blind = whole[:, [0, *range(layout.rest.start, layout.length)]]
    places = text.context.turn_SU[text.context.position_BS]
    first, second = model.decoder.llm.layers
    few = layout.with_vision(0)
    mask = text.context.mask_B1SS[:, :, layout.vision :, layout.vision :]
    turn = places[:, [0, *range(layout.rest.start, layout.length)]]
    after = run_layer(first, blind, normed(first.input_layernorm, blind), Frame(few, mask, turn))
    joined = torch.cat((after[:, :1], vision, after[:, 1:]), dim=1)
    frame = text.context.whole
    out = run_layer(second, joined, normed(second.input_layernorm, joined), frame)
    actions = model.head(normed(model.decoder.llm.norm, out[:, layout.actions]))
    expected = (actions - model(moment.inputs).actions).abs().mean().item()
    assert changes[1] == pytest.approx(expected, rel=1e-3)
    assert injection(point_policy(**PLAIN, router={"name": "random", "budget": 4}).model, [moment]) is None
    with_lfp = point_policy(efa=False, lfp=True)
    assert injection(with_lfp.model, [look(with_lfp, EMBODIMENT.fake_observation(1))]) is not None


class Only(TokenRouter):
    """Hide all tokens but one."""

    stages = ("llm_layer",)

    def __init__(self, sizes: RouterSizes, *, token: int) -> None:
        super().__init__(sizes)
        self.token = token

    def leaves(self, budget: int) -> int:
        return self.sizes.tokens

    def route(self, tokens_BND: torch.Tensor, context: RouterContext) -> RoutedTokens:
        number_BN = torch.arange(tokens_BND.shape[1]).expand(len(tokens_BND), -1)
        return RoutedTokens(tokens_BND, number_BN, number_BN, mask_Bn=number_BN == self.token)


@torch.inference_mode()
def test_what_a_token_tells_is_measured_by_keeping_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._ROUTERS, "only", Only)
    policy = point_policy(**PLAIN)
    model, moment = policy.model, look(policy, EMBODIMENT.fake_observation(1))
    found = single_tokens(model, [moment])
    assert found is not None
    whole, tokens = model(moment.inputs).actions, model.vision_tokens
    for layer in range(2):
        none = torch.exp(-(keeping(model, moment.inputs, layer, 0.0) - whole).abs().mean())
        told = []
        for token in range(tokens):
            one = model.with_router(RouterConfig("only", 1, "llm_layer", {"token": token}, layers=(layer,))).eval()
            told.append(torch.exp(-(one(moment.inputs).actions - whole).abs().mean()) - none)
        assert found["mean"][layer] == pytest.approx(torch.stack(told).mean().item(), rel=1e-3, abs=1e-6)
        assert found["largest"][layer] == pytest.approx(torch.stack(told).max().item(), rel=1e-3, abs=1e-6)
    assert all(0 <= share <= 1 for share in found["telling"])
    assert horizon(model, [moment])["by_share"].keys() == {"0% kept", "10% kept", "25% kept", "50% kept"}


@torch.inference_mode()
@pytest.mark.parametrize("routing", [{}, {"lfp": True}, {"lfp": True, "mode": "drop"}])
def test_random_tokens_stay_as_with_a_random_router(routing: dict[str, Any]) -> None:
    model = point_policy(**{**PLAIN, **routing}).model
    inputs = look(CogVLAPolicy(model, point_policy(**PLAIN).preprocessor), EMBODIMENT.fake_observation(1)).inputs
    for layer in range(2):
        for share in (0.5, 1.0):
            routed = model.with_router(RouterConfig("random", share, "llm_layer", layers=(layer,))).eval()
            torch.testing.assert_close(keeping(model, inputs, layer, share), routed(inputs).actions)


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["drop", "bypass"])
@pytest.mark.parametrize(
    "router",
    [
        {"name": "token_norm", "stage": "llm_layer"},
        {"name": "token_norm", "layer_router": "random", "budget": 3},
        {"name": "random", "stage": "projector_out", "position": "compact"},
    ],
)
def test_a_probed_policy_keeps_its_own_routers(mode: str, router: dict[str, Any]) -> None:
    policy = point_policy(**PLAIN, router={"budget": 0.5, **router, "layers": [0], "layer_budgets": [1], "mode": mode})
    model, moment = policy.model, look(policy, EMBODIMENT.fake_observation(1))
    torch.testing.assert_close(keeping(model, moment.inputs, 1, 1.0), model(moment.inputs).actions)
    other = model.with_router(replace(model.config.routing.router, layer_budgets=(2,))).eval()
    changed = [not torch.allclose(keeping(one, moment.inputs, 1, 0.0), keeping(model, moment.inputs, 1, 0.0))
               for one in (model, other)]  # fmt: skip
    assert changed == [False, True], "what the first layer removes is seen after the second"
    found = horizon(model, [moment])
    assert len(found["information"]) == 2
    assert all(math.isfinite(value) for value in found["information"])


@pytest.mark.parametrize(
    ("module", "wrong", "said"),
    [
        (analyse_routing, "initial_state=-1", "initial_state must be a whole number of at least 0, got -1"),
        (analyse_routing, "initial_state=null", "initial_state must be a whole number of at least 0, got None"),
        (analyse_routing, "pictures=null", "pictures must be a whole number, at least 1, got None"),
        (compare_routers, "routers=[nothing]", "routers names 'nothing'; possible are"),
    ],
)
def test_mistakes_come_before_the_policy(
    module: ModuleType, wrong: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_policy", lambda *_, **__: pytest.fail("loaded"))
    name = module.__name__.rpartition(".")[2]
    with pytest.raises(ValueError, match=said):
        module.run(command(name, f"checkpoint={SHIPPED}", "tasks=[0]", wrong), "")


@pytest.mark.parametrize("lfp", [False, True])
def test_decisions_that_a_router_lets_pass_keep_all_tokens(lfp: bool) -> None:
    adp = {"name": "adp", "stage": "llm_layer", "layers": [0], "budget": 4}
    policy = point_policy(efa=False, lfp=lfp, router=adp)
    suite = toy_suite()
    episodes = play(policy, suite, load_protocol(suite.protocol), [0, 1], 0)
    moments = [moment for episode in episodes for moment in episode.moments]
    passed = [moment.inputs.dense for moment in moments]
    assert passed[0]
    assert not all(passed)
    assert [len(moment.kept["layer 0"]) for moment in moments] == [32 if dense else 8 for dense in passed]
    found = findings(policy, episodes, [task.instruction for task in TASKS], 1)
    assert list(found["stages"]) == (["layer 0", "layer 1"] if lfp else ["layer 0"])
    assert found["stages"]["layer 0"]["kept"] == pytest.approx(np.mean([32 if dense else 8 for dense in passed]))
    assert any(found["episodes"][0]["flicker"]["layer 0"]), "where it begins to choose"


def test_analyse_routing_writes_a_page_and_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvla.scripts.analyse_routing.lines", lambda *_, **__: "<svg/>")
    checkpoint = saved(tmp_path / "policy")
    overrides = [f"checkpoint={checkpoint}", f"output={tmp_path / 'CHECKPOINT'}", "tasks=[0,1]", "pictures=2"]
    data = analyse(command("analyse_routing", *overrides), "analyse_routing ...")
    folder = tmp_path / "policy"
    assert json.loads((folder / "routing.json").read_text())["moments"] == data["moments"]
    page = (folder / "routing.html").read_text()
    assert page.count("data:image/png") == 2
    assert page.count("data:video/mp4") == 2
    assert 'src="http' not in page
    assert data["tokens"] == VIEWS * 2
    assert data["stages"]["layer 1"]["target_kept"] is None, "this suite has no masks"
    told = data["episodes"][0]["fates"]["tokens"]
    assert len(told) == VIEWS * 2
    assert any(token["not_kept"] and token["not_kept"][0]["stage"] == "layer 1, LFP" for token in told)
    assert page.count("why each token was not kept") == 2
    assert page.count("skips the layer") >= 2
    assert sum(data["kinds"]["before routing"].values()) == pytest.approx(1)
    assert set(data["readings"]["layer 0"]["words"]) <= {"go", "to", "the", "right", "left", "up"}
    assert data["read"]["layer 1"] == {"high": None, "low": None, "all": None}, "no masks, no points on them"
    assert data["alignment"]["layer 0"]["overlap"] is None
    assert 0 < data["alignment"]["layer 1"]["overlap"] <= 1
    assert 0 <= data["language"]["entropy"] <= data["language"]["largest"]
    analyse(command("analyse_routing", *overrides, "router.name=random", "router.budget=1"), "analyse_routing ...")
    assert (tmp_path / "policy_random_1" / "routing.html").is_file()
    with pytest.raises(ValueError, match="tasks 0 to 2"):
        analyse(command("analyse_routing", *overrides, "tasks=[7]"), "...")
