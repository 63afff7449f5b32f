"""`search_schedule`: find at which language layers how many vision tokens can go (VFlowOpt), on recorded observations.

    search_schedule checkpoint=FOLDER router.name=token_norm 'router.layers=[1,2]' mean=0.25
    search_schedule checkpoint=FOLDER router.name=global_attention 'router.layers=[1,2]' 'ranges={threshold: [0, 50]}'

The shares before and in the language model are searched such that their mean over its layers is `mean`, and the states
of the action tokens change least. Prints the router's keys, and writes them with all schedules that were tried.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from cogvla.configs.build import build
from cogvla.files import write_atomic
from cogvla.policy.checkpoint import load_policy, weights_hash
from cogvla.policy.model.cogvla import ModelInput
from cogvla.policy.model.routers.schedule_objective import schedule_objective
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.routing.router import RouterConfig, count_of
from cogvla.routing.schedule_search import Schedule, check_search, search
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, plain
from cogvla.scripts.measure.calibrate_router import flow
from cogvla.scripts.measure.recorded import batches, check_data, draw_frames, start

CARRIED = "carried"


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("search_schedule"))


def run(config: DictConfig, command: str) -> RouterConfig:
    """Search, print and save a schedule; return the router with it.

    Raises:
        ValueError: the router does not fit the policy, or a number is out of range.
    """
    values = plain(config)
    folder, device = start(values, "observations", "evaluations")
    check_data(values)
    router = build(RouterConfig, values["router"], "router")
    if router.name is None or not router.layers:
        raise ValueError("search_schedule needs router.name and router.layers, for example router.layers=[1,2]")
    if router.stage == "llm_layer":
        raise ValueError("search_schedule also searches the share before the language model: leave out router.stage")
    if router.layer_budgets:
        raise ValueError("search_schedule finds router.layer_budgets: leave it out")
    if router.mode == "bypass":
        raise ValueError("search_schedule counts tokens as removed from their layer on: it needs router.mode=drop")
    router = replace(router, layer_router=router.layer_router or CARRIED)
    ranges = _ranges(values["ranges"])
    given = router.layers, values["mean"], ranges, values["evaluations"], values["method"]
    check_search(*given)  # what needs no policy
    middle = {name: sum(ends) / 2 for name, ends in ranges.items()}
    first = Schedule(router.layers, (values["mean"],) * (len(router.layers) + 1), middle).applied(router)
    policy = load_policy(folder, device, first, values["statistics"])
    depth = policy.model.config.language.layers
    tokens = policy.model.vision.tokens // len(policy.embodiment.cameras)
    check_search(*given, depth, tokens)
    check_counts_kept(policy, first)
    data, rows = draw_frames(policy, values, observations=values["observations"])
    parts = [batch.inputs for batch in batches(policy, data, rows)]
    objective = schedule_objective(policy.model, together(parts), router)
    tried: list[dict[str, Any]] = []
    started = time.monotonic()
    with tqdm(total=values["evaluations"], unit="schedule") as bar:

        def watch(schedule: Schedule, value: float) -> None:
            tried.append({"shares": schedule.shares, "options": dict(schedule.options), "value": value})
            bar.set_postfix(best=f"{max(one['value'] for one in tried):.5f}")
            bar.update()

        schedule, value = search(
            objective, router.layers, depth, values["mean"], ranges, values["evaluations"], values["seed"],
            values["method"], watch, tokens,
        )  # fmt: skip
    found = schedule.applied(router)
    about = {
        "command": command,
        "value": value,
        "flat": tried[0]["value"],
        "seconds": round(time.monotonic() - started, 1),
        "weights_sha256": weights_hash(folder),
        "data_set": data.describe(),
        "observations": len(rows),
        "tried": tried,
        **provenance(),
    }
    output = Path(values["output"].replace("CHECKPOINT", folder.resolve().name).replace("ROUTER", router.name))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps({"router": asdict(found), "about": about}, indent=2) + "\n")
    print(f"cosine of the action tokens' states: {value:.5f}; with equal shares {tried[0]['value']:.5f}")
    lfp = ", before LFP, which removes more" if policy.model.config.routing.lfp else ""
    print(f"mean share of the tokens: {schedule.mean(depth):.4g}{lfp}")
    print(words(found))
    print(f"all {len(tried)} schedules: {output}")
    return found


def check_counts_kept(policy: CogVLAPolicy, router: RouterConfig) -> None:
    """Check that the routers of a policy keep as many tokens as their budgets say, which a schedule counts on.

    Raises:
        ValueError: one keeps another number, as `late_exit` does.
    """
    built, views = policy.model.router, len(policy.embodiment.cameras)
    assert built is not None
    given = views * count_of(router.budget, policy.model.vision.tokens // views)
    numbers = [(router.name, given, built.tokens)]
    numbers += [(router.layer_router, count, built.left[layer]) for layer, count in built.counts.items()]
    for name, count, left in numbers:
        if left != count:
            raise ValueError(
                f"search_schedule needs routers that keep as many tokens as their budget says; {name!r} keeps {left} "
                f"where the budget is {count}"
            )


def _ranges(values: Any) -> dict[str, tuple[float, float]]:
    """Return the ranges of the key `ranges`; ValueError if they are something else."""
    values = {} if values is None else values
    fits = isinstance(values, dict) and all(
        isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(x, int | float) for x in bounds)
        for bounds in values.values()
    )
    if not fits:
        raise ValueError(f"ranges is {values!r}; give options and bounds, such as 'ranges={{threshold: [0, 50]}}'")
    return {str(name): (float(low), float(high)) for name, (low, high) in values.items()}


def words(router: RouterConfig) -> str:
    """Return a router with a schedule as keys of the command line: all that differ from the defaults."""
    usual = asdict(RouterConfig())
    given = {name: value for name, value in asdict(router).items() if value != usual[name] and name != "options"}
    given["budget"] = router.budget
    pairs = [f"router.{name}={_text(value)}" for name, value in given.items()]
    keys = [f"'{pair}'" if "[" in pair else pair for pair in pairs]
    return " ".join(keys + ([f"router.options='{flow(dict(router.options))}'"] if router.options else []))


def _text(value: Any) -> str:
    """Return a value as the command line takes it; a share stays a fraction, because 1 is one token and 1.0 all."""
    if isinstance(value, tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, float):
        return str(float(f"{value:.4g}"))
    return str(value).lower() if isinstance(value, bool) else str(value)


def together(parts: list[ModelInput]) -> ModelInput:
    """Join batches whose instructions are padded to different lengths."""
    longest = max(part.text_mask.shape[1] for part in parts)

    def padded(text: torch.Tensor) -> torch.Tensor:
        return torch.cat((text, text.new_zeros(len(text), longest - text.shape[1], *text.shape[2:])), dim=1)

    return ModelInput(
        torch.cat([part.pixels for part in parts]),
        torch.cat([padded(part.text_ids) for part in parts]),
        torch.cat([padded(part.text_mask) for part in parts]),
        torch.cat([part.state for part in parts]),
    )


if __name__ == "__main__":
    console.search_schedule()
