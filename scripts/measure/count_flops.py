"""`count_flops`: count parameters, FLOPs, bytes and the lower bound of a GPU's time, stage by stage, without weights.

    count_flops                                       the paper's model: with all stages, without each, without both
    count_flops gpu=[jetson_thor,rtx4090] batch=8
    count_flops policy=small embodiment=tabletop
    count_flops checkpoint=checkpoints/tabletop_object output=cost.json
    count_flops counting=paper text_length=7          reproduces the paper's numbers

`policy/cost/flops.py` explains the counting, `policy/cost/roofline.py` has the peaks of the GPUs with their sources.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.policy.checkpoint import read_config, saved_config
from cogvla.policy.cost.flops import TOTAL, Counting, StageCost, count_decoding, count_flops
from cogvla.policy.cost.roofline import GPU, find_gpu, floors, format_table, header
from cogvla.policy.hub.download import checkpoint_name, find_checkpoint
from cogvla.policy.inputs.text_encoder import with_encoder_width
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.config import CogVLAConfig, RoutingConfig
from cogvla.scripts import console
from cogvla.scripts.command import check_counts, import_modules, plain
from cogvla.scripts.policies import named_router

DECODING = "OpenVLA as published (one view)"


def summary(variants: dict[str, list[StageCost]], gpus: Sequence[GPU], paper: dict[str, Any] | None) -> str:
    """Return a table with a line for each variant, with the paper's numbers if `paper` has them."""
    reported = ("paper TFLOP", "difference", "paper ms") if paper else ()
    lines = [f"{'variant':<42}" + header(("TFLOP", *reported, "GB", "FLOP/byte"), gpus, "ms at least")]
    for name, costs in variants.items():
        at = next(index for index, cost in enumerate(costs) if cost.stage == TOTAL)
        total = costs[at]
        line = f"{name:<42}{total.flops / 1e12:>14.4g}"
        if paper and (known := paper.get(name)):
            difference = total.flops / 1e12 / known["tflop"] - 1
            line += f"{known['tflop']:>14.2f}{difference:>+14.1%}{known['milliseconds']:>14.0f}"
        else:
            line += " " * 14 * len(reported)
        line += f"{(total.weight_bytes + total.activation_bytes) / 1e9:>14.4g}{total.intensity:>14.1f}"
        lines.append(line + "".join(f"{1e3 * floors(costs, gpu)[at]:>14.3g}" for gpu in gpus))
    return "\n".join(lines)


def as_data(costs: Sequence[StageCost], gpus: Sequence[GPU]) -> list[dict[str, Any]]:
    """Return the table of one variant as plain data for JSON, one mapping per stage."""
    times = {gpu.name: floors(costs, gpu) for gpu in gpus}
    return [
        {
            "stage": cost.stage,
            "parameters": cost.parameters,
            "flops": cost.flops,
            "weight_bytes": cost.weight_bytes,
            "activation_bytes": cost.activation_bytes,
            "flop_per_byte": cost.intensity,
            "floor_seconds": {name: seconds[index] for name, seconds in times.items()},
        }
        for index, cost in enumerate(costs)
    ]


def run(values: dict[str, Any], name: str) -> dict[str, list[StageCost]]:
    """Print the tables of all variants; return their costs.

    Args:
        values: the configuration, see `configs/count_flops.yaml`.
        name: name of the model, by which the paper's numbers are found.

    Raises:
        ValueError: a GPU or a key of a variant is unknown, or the configuration is wrong.
    """
    import_modules(values["imports"])
    check_counts(values, "text_length", "batch")
    gpus = [find_gpu(gpu) for gpu in values["gpu"] or ()]
    if values["checkpoint"] is not None:
        folder = find_checkpoint(values["checkpoint"])
        body = read_config(folder)
        base, embodiment = saved_config(body, folder), build(Embodiment, body["embodiment"], "embodiment")
        name = f"checkpoint {checkpoint_name(folder)}"
    else:
        base = with_encoder_width(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}))
        embodiment = build(Embodiment, values["embodiment"], "embodiment")
        named_router(values["routing"]["router"], "routing.router")
    text, batch, counting = values["text_length"], values["batch"], build(Counting, values["counting"], "counting")
    counted = ", ".join(f"{key}={value}" for key, value in asdict(counting).items())
    print(f"{name}: {batch} sample(s), {len(embodiment.cameras)} views, {text} text tokens; counted: {counted}")
    variants: dict[str, list[StageCost]] = {}
    for variant, changes in (values["variants"] or {}).items():
        config = replace(base, routing=_changed(base.routing, changes or {}))
        variants[variant] = count_flops(config, embodiment, text, batch, counting)
    if values["decoding"]:
        variants[DECODING] = count_decoding(base, embodiment, text, batch, counting)
    for variant, costs in variants.items() if values["stages"] else ():
        print(f"\n{variant}\n{format_table(costs, gpus)}")
    paper = values["paper"] or {"model": None}
    comparable = name == paper["model"] and batch == 1
    print("\n" + summary(variants, gpus, paper["variants"] if comparable else None))
    if values["output"] is not None:
        data = {"model": name, "batch": batch, "views": len(embodiment.cameras), "text_length": text}
        stages = {variant: as_data(costs, gpus) for variant, costs in variants.items()}
        output = Path(values["output"])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**data, "counting": asdict(counting), "variants": stages}, indent=2) + "\n")
    return variants


def _changed(routing: RoutingConfig, changes: dict[str, Any]) -> RoutingConfig:
    valid = asdict(routing)
    if unknown := sorted(set(changes) - set(valid)):
        raise ValueError(f"variants change keys of routing: {', '.join(unknown)} is not one of {', '.join(valid)}")
    return build(RoutingConfig, {**valid, **changes}, "variants")


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    choices = HydraConfig.get().runtime.choices
    run(plain(config), f"{choices['policy']} on {choices['embodiment']}")


if __name__ == "__main__":
    console.count_flops()
