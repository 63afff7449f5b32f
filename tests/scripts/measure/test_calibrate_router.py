"""`calibrate_router` and `search_schedule` on frames that the expert records here, with the shipped checkpoint."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvla.configs.build import build
from cogvla.policy.checkpoint import load_policy
from cogvla.routing.router import RouterConfig, RouterContext
from cogvla.routing.routers.debias import fit_rate
from cogvla.routing.selection import effective_rank
from cogvla.scripts.command import compose, plain
from cogvla.scripts.measure import calibrate_router, search_schedule
from cogvla.scripts.measure.recorded import batches, draw_frames
from cogvla.tests.policy.model.routers.test_router_checkpoint import saved
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import SHIPPED
from cogvla.tests.support.small_data import small_policy

IN_A_LAYER = ("router.stage=llm_layer", "router.layers=[1]")


def overrides(recorded: Path, folder: Path, *more: str) -> list[str]:
    data = [f"data.root={recorded / 'demonstrations'}", f"data.cache={recorded / 'cache'}", "observations=12"]
    return [f"checkpoint={SHIPPED}", *data, "device=cpu", f"output={folder}/ROUTER.json", *more]


def calibrate(recorded: Path, folder: Path, *more: str) -> dict[str, Any]:
    return calibrate_router.run(compose("calibrate_router", overrides(recorded, folder, *more)), "calibrate_router")


def contexts(
    recorded: Path, folder: Path, router: RouterConfig, *more: str
) -> list[tuple[torch.Tensor, RouterContext]]:
    """What the router sees of the same frames."""
    policy, seen = load_policy(SHIPPED, router=router), []
    values = plain(compose("calibrate_router", overrides(recorded, folder, *more)))
    data, rows = draw_frames(policy, values, observations=12)
    assert policy.model.router is not None
    for one in policy.model.router.layers.values():
        one.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.inference_mode():
        for batch in batches(policy, data, rows):
            policy.model(batch.inputs)
    return seen


def test_a_router_before_the_language_model_and_in_it_is_not_measured_at_one_of_both(
    recorded: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "it", small_policy(efa=False, film=True, lfp=False))
    here = f"checkpoint={folder}", "router.name=adaptive_erank", "router.layers=[1]"
    with pytest.raises(ValueError, match=r"works at encoder_out, .* router\.layers: set router\.stage=llm_layer"):
        calibrate(recorded, tmp_path, *here)


def test_the_mean_effective_rank_is_that_of_the_tokens_it_sees(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = calibrate(recorded, tmp_path, "router.name=adaptive_erank", "router.budget=2", *IN_A_LAYER)
    router = RouterConfig("adaptive_erank", 2, "llm_layer", layers=(1,))
    ranks = torch.cat([effective_rank(tokens) for tokens, _ in contexts(recorded, tmp_path, router)])
    assert len(ranks) == 12
    assert options == {"mean_erank": pytest.approx(ranks.mean().item(), rel=1e-5)}
    said = capsys.readouterr().out
    assert f"mean_erank = {options['mean_erank']:.5g}, measured on 12 observations (12 rows)" in said
    assert "rows that run out of candidates" in said
    # What is printed and what is written is taken.
    file = tmp_path / "adaptive_erank.json"
    typed = ["router.name=adaptive_erank", f"router.options={{mean_erank: {options['mean_erank']}}}"]
    saved = ["router.name=adaptive_erank", f"router.options={file}"]
    one, other = (
        build(RouterConfig, plain(compose("analyse_routing", [f"checkpoint={SHIPPED}", *words]))["router"], "router")
        for words in (typed, saved)
    )
    assert one == other
    assert one.options == options
    about = json.loads(file.read_text())["about"]
    assert (about["observations"], about["router"]["layers"]) == (12, [1])


def test_the_rate_of_debias_fits_the_attention_and_its_other_options_stay(recorded: Path, tmp_path: Path) -> None:
    base = "router.options={base: cls_attention, base_options: {layers: 1}}"
    options = calibrate(recorded, tmp_path, "router.name=debias", "router.budget=2", base, *IN_A_LAYER)
    router = RouterConfig("debias", 2, "llm_layer", layers=(1,))
    seen = [c.attention_LBN for _, c in contexts(recorded, tmp_path, router) if c.attention_LBN is not None]
    profile = torch.cat([attention_LBN.double().sum(0) for attention_LBN in seen]).mean(0)
    expected = {
        "base": "cls_attention",
        "base_options": {"layers": 1},
        "rate": pytest.approx(fit_rate(profile), rel=1e-4),
    }
    assert options == expected


def test_below_the_threshold_of_an_exit_no_action_changes_by_more(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("router.name=late_exit", "router.layers=[2]", "tolerance=0.01")
    options = calibrate(recorded, tmp_path, *words)
    assert "cannot attend to text here (causal mask)" in capsys.readouterr().out
    seen = contexts(recorded, tmp_path, RouterConfig("late_exit", options={"threshold": 0.0}, layers=(2,)))
    share = torch.cat([context.share_B2 for _, context in seen if context.share_B2 is not None])
    assert not share[:, 1].any()
    exits = share[:, 0] < options["threshold"]
    actions = {}
    values = plain(compose("calibrate_router", overrides(recorded, tmp_path)))
    for name, threshold in {"stay": 0.0, "gone": 1.01, "ruled": options["threshold"]}.items():
        policy = load_policy(SHIPPED, router=RouterConfig("late_exit", options={"threshold": threshold}, layers=(2,)))
        data, rows = draw_frames(policy, values, observations=12)
        with torch.inference_mode():
            actions[name] = torch.cat([policy.model(batch.inputs).actions for batch in batches(policy, data, rows)])
    change = (actions["stay"] - actions["gone"]).abs().flatten(1).mean(1)
    assert (change[exits] <= 0.01).all()
    assert change[share[:, 0] == options["threshold"]].max() > 0.01, "a larger one would let this through"
    expected = torch.where(exits[:, None, None], actions["gone"], actions["stay"])
    torch.testing.assert_close(actions["ruled"], expected, rtol=1e-4, atol=1e-5)
    assert calibrate(recorded, tmp_path, *words[:2], "tolerance=10") == {"threshold": None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["router.name=random"],
            r"router.name is random; routers with options to measure are .*adaptive_erank.*late_exit",
        ),
        ([], r"router.name is None; routers with options"),
        (["router.name=adaptive_erank"], "needs attention_LBN, which this policy does not provide"),
        (["router.name=late_exit", "router.layers=[1,2]"], "one router at a time"),
        (["router.name=late_exit"], r"needs router\.layers"),
        (
            ["router.name=late_exit", "router.layers=[1]", "observations=100000"],
            r"but observations=100000 needs 100000",
        ),
        (
            ["router.name=late_exit", "router.layers=[1]", "observations=0"],
            "observations must be a whole number, at least 1, got 0",
        ),
        *(
            (["router.name=late_exit", "router.layers=[1]", f"tolerance={wrong}"], "tolerance must be positive")
            for wrong in ("0", "null", "nan")
        ),
        (["router.name=debias", "router.options=nowhere.json"], "nowhere.json cannot be read"),
        (["router.name=debias", "router.options=[1]"], r"give names and values, such as '\{variant: maxsum\}'"),
        (["checkpoint=nowhere"], "nowhere"),
    ],
)
def test_mistakes_in_one_line(recorded: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        calibrate(recorded, tmp_path, *words)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_without_options_is_refused(tmp_path: Path) -> None:
    (tmp_path / "it.json").write_text('{"threshold": 1}')
    with pytest.raises(
        ValueError, match=r"it.json has no options; router.options takes names and values, or a file that"
    ):
        RouterConfig("late_exit", options=str(tmp_path / "it.json"))  # type: ignore[arg-type]


# --- schedules ---


def searched(recorded: Path, folder: Path, *more: str) -> RouterConfig:
    words = overrides(recorded, folder, "router.name=token_norm", "router.layers=[1,2]", "evaluations=3", *more)
    return search_schedule.run(compose("search_schedule", words), "search_schedule")


@pytest.mark.parametrize("method", ["random", "gaussian"])
def test_the_schedule_that_is_printed_is_the_best_that_was_tried(
    recorded: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if method == "gaussian":
        pytest.importorskip("sklearn", reason=needs("search"))
    router = searched(recorded, tmp_path, f"method={method}", "mean=0.5")
    content = json.loads((tmp_path / "token_norm.json").read_text())
    assert build(RouterConfig, content["router"], "router") == router
    tried = content["about"]["tried"]
    assert tried[0]["value"] == content["about"]["flat"]
    best = max(tried, key=lambda one: one["value"])
    assert best["shares"] == [router.budget, *router.layer_budgets]
    assert all(0.3 < sum(one["shares"]) / 3 <= 0.5 for one in tried), "layer 0, 1 and 2"
    assert all(share * 8 == round(share * 8) for one in tried for share in one["shares"]), "whole tokens"
    said = capsys.readouterr().out
    policy = load_policy(SHIPPED, router=router)
    assert policy.model.router is not None
    assert f"router.budget={router.budget:.4g} 'router.layers=[1,2]'" in said


def test_a_schedule_is_printed_as_the_same_router() -> None:
    router = RouterConfig(
        "token_norm", 1.0, "projector_out", {"threshold": 0.5}, position="compact", joint=True, layers=(1, 2),
        layer_router="carried", layer_budgets=(1.0, 0.25), resample=False,
    )  # fmt: skip
    typed = [f"checkpoint={SHIPPED}", *shlex.split(search_schedule.words(router))]
    assert build(RouterConfig, plain(compose("analyse_routing", typed))["router"], "router") == router


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["router.layers=[]"], r"needs router.name and router.layers"),
        (["router.stage=llm_layer"], "leave out router.stage"),
        (["router.mode=bypass"], "it needs router.mode=drop"),
        (["router.layer_budgets=[4,2]"], "finds router.layer_budgets: leave it out"),
        (["router.layers=[0]", "method=random"], "layers must increase, from 1, got"),
        (["mean=1.5", "method=random"], "the budget must be between 0.01 and 1"),
        (["mean=null", "method=random"], "the budget must be between 0.01 and 1"),
        (["method=annealing"], "unknown method 'annealing'; one of gaussian, random"),
        (["method=random", "ranges={threshold: [3, 3]}"], r"range of threshold must be \[low, high\]"),
        (["ranges={threshold: 3}"], r"give options and bounds, such as 'ranges=\{threshold: \[0, 50\]\}'"),
        (["ranges=[1, 2]"], "give options and bounds"),
        (["evaluations=0"], "evaluations must be a whole number, at least 1, got 0"),
    ],
)
def test_impossible_searches_end_before_the_policy(
    recorded: Path, tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_schedule, "load_policy", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        searched(recorded, tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ranges={speed: [1, 2]}"], "has no option speed"),
        (["router.layers=[1,9]"], "layer 9; the language model has layers 0 to"),
        (["router.layer_router=late_exit"], "'late_exit' keeps 0 where the budget is 4"),
        (["router.name=identity", "router.layer_router=token_norm"], "'identity' keeps 16 where the budget is 4"),
        (["mean=0.02"], "a mean of 0.02 of . tokens is less than one token"),
    ],
)
def test_what_does_not_fit_the_policy_ends_before_the_data(
    recorded: Path, tmp_path: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_schedule, "draw_frames", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(ValueError, match=message):
        searched(recorded, tmp_path, "method=random", *words)


def test_without_scikit_learn_the_way_out_is_said(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"install the extra `search` .*or use method=random"):
        searched(recorded, tmp_path)
