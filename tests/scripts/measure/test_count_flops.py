"""The command: presets, checkpoints, variants, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cogvla.policy.cost.flops import TOTAL
from cogvla.scripts.command import compose
from cogvla.scripts.measure.count_flops import DECODING, run
from cogvla.tests.support.paths import SHIPPED

TINY = ("policy=tiny", "embodiment=tabletop")


def values(*overrides: str) -> dict[str, Any]:
    found = OmegaConf.to_container(compose("count_flops", list(overrides)), resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def test_all_variants_in_one_table_and_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "cost.json"
    costs = run(values(*TINY, f"output={output}", "gpu=[h200,jetson_thor]"), "tiny on tabletop")
    printed = capsys.readouterr().out
    body = json.loads(output.read_text())
    assert list(body["variants"]) == list(costs) == [*values()["variants"], DECODING]
    for name, rows in body["variants"].items():
        assert name in printed
        assert [row["flops"] for row in rows] == [cost.flops for cost in costs[name]]
        total = next(row for row in rows if row["stage"] == TOTAL)
        assert set(total["floor_seconds"]) == {"H200", "Jetson Thor"}
        assert total["floor_seconds"]["H200"] < total["floor_seconds"]["Jetson Thor"]
    assert "paper" not in printed, "the paper says nothing about this model"


def test_the_paper_is_named_beside_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = values(*TINY, "stages=false")
    run(chosen, chosen["paper"]["model"])
    assert "paper TFLOP" in capsys.readouterr().out


def test_a_checkpoint_is_counted_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    plain = values(f"checkpoint={SHIPPED}", "stages=false")
    costs = run({**plain, "variants": {"as trained": {}}, "decoding": False}, "")
    body = json.loads((SHIPPED / "config.json").read_text())
    assert body["model"]["language"]["width"] == 128
    assert 0.5e6 < costs["as trained"][-2].parameters < 2e6
    assert "checkpoint tabletop_object" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("gpu=[tpu]",), "unknown GPU 'tpu'; one of h200, a800, rtx4090, jetson_thor"),
        (("routing.router.budget=0.5",), r"routing\.router\.budget=0\.5 changes nothing without routing\.router\.name"),
        (("batch=0",), "batch must be a whole number, at least 1, got 0"),
        (("text_length=null",), "text_length must be a whole number, at least 1, got None"),
        (("checkpoint=nowhere",), "no checkpoint folder at nowhere"),
        (("+variants.odd={efa: 3}",), "variants.efa must be true or false, got 3"),
        (("gpu=[4090]",), "unknown GPU 4090; one of"),
        (("+variants.odd={keep: 1}",), "variants change keys of routing: keep is not one of efa, film, fusion"),
    ],
)
def test_mistakes_say_what_is_valid(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(values(*TINY, *overrides), "")


def test_a_variant_may_have_a_router_and_all_lists_may_be_missing() -> None:
    router = "+variants.routed={efa: false, router: {name: random, budget: 4, position: compact}}"
    found = run(values(*TINY, router), "")
    assert 0 < found["routed"][-1].flops < found["routed"][-2].flops
    assert run(values(*TINY, "gpu=null", "variants=null", "paper=null", "decoding=false"), "") == {}
