"""`calibrate_router`: measure on recorded observations what the options of a token router should be for a policy.

    calibrate_router checkpoint=FOLDER router.name=adaptive_erank router.budget=16
    calibrate_router checkpoint=FOLDER router.name=debias router.options='{base: cls_attention}'
    calibrate_router checkpoint=FOLDER router.name=late_exit 'router.layers=[2]' tolerance=0.01
    eval_libero checkpoint=FOLDER router.name=adaptive_erank router.budget=16 router.options=FILE

Prints the options, and writes them to a file that `router.options` takes.

Shape legend: X rows of all observations (of each view, at stages before the language model), N tokens, B observations
at once, K chunk, A action.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor

from cogvla.configs.build import build
from cogvla.files import write_atomic
from cogvla.policy.checkpoint import load_policy, weights_hash
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.routing.registry import registered_routers
from cogvla.routing.router import Calibrated, RouterConfig, RouterContext, TokenRouter
from cogvla.routing.routers.late_exit import LateExit, fit_threshold
from cogvla.scripts import console
from cogvla.scripts.command import as_typed, plain
from cogvla.scripts.measure.recorded import batches, check_data, draw_frames, start


def main(config: DictConfig) -> None:
    """Run the command, whose entry point is in `scripts/console.py`."""
    run(config, as_typed("calibrate_router"))


@torch.inference_mode()
def run(config: DictConfig, command: str) -> dict[str, Any]:
    """Measure, print and save the options of a router; return the options.

    Raises:
        ValueError: the router has nothing to measure or does not fit the policy, or there are too few frames.
    """
    values = plain(config)
    folder, device = start(values, "observations")
    check_data(values)
    if not (isinstance(values["tolerance"], int | float) and values["tolerance"] > 0):
        raise ValueError(f"tolerance must be positive, got {values['tolerance']}")
    router = build(RouterConfig, values["router"], "router")
    known = registered_routers()
    possible = [name for name, kind in known.items() if issubclass(kind, (Calibrated, LateExit))]
    if router.name not in known or router.name not in possible:
        raise ValueError(f"router.name is {router.name}; routers with options to measure are {', '.join(possible)}")
    if router.layer_router is not None or len(router.layers) > 1:
        raise ValueError(
            "calibrate_router measures one router at a time: at most one of router.layers, no layer_router"
        )
    exits = issubclass(known[router.name], LateExit)
    if exits:
        router = replace(router, stage="llm_layer", options={**(router.options or {}), "threshold": 0.0})
    policy = load_policy(folder, device, router, values["statistics"])
    assert policy.model.router is not None
    if policy.model.router.before is not None and router.layers:
        raise ValueError(
            f"router {router.name!r} works at {policy.model.router.stage}, where it would be measured, and again at "
            "router.layers: set router.stage=llm_layer to measure it there, or leave out router.layers"
        )
    data, rows = draw_frames(policy, values, observations=values["observations"])
    measure = _exit if exits else _constants
    options, found = measure(policy, router, data, rows, values["tolerance"])
    about = {
        "command": command,
        "router": {"name": router.name, "stage": router.stage, "budget": router.budget, "layers": list(router.layers)},
        "found": found,
        "weights_sha256": weights_hash(folder),
        "data_set": data.describe(),
        "observations": len(rows),
        **provenance(),
    }
    output = Path(values["output"].replace("CHECKPOINT", folder.resolve().name).replace("ROUTER", router.name))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps({"options": options, "about": about}, indent=2) + "\n")
    print("\n".join(found))
    print(f"router.name={router.name} router.options='{flow(options)}'\nor router.options={output}")
    return options


def _constants(
    policy: CogVLAPolicy, router: RouterConfig, data: DemonstrationData, rows: Tensor, tolerance: float
) -> tuple[dict[str, Any], list[str]]:
    """Measure the options of a `Calibrated` router; return them, and what was found."""
    model, total, troubled = policy.model, 0, list[Tensor]()
    sums: Tensor | None = None

    def watch(one: TokenRouter, tokens_BND: Tensor, context: RouterContext) -> None:
        nonlocal sums, total
        calibrated = cast(Calibrated, one)
        seen = calibrated.observed(tokens_BND, context).double().sum(0)
        sums, total = (seen if sums is None else sums + seen), total + len(tokens_BND)
        if (bad_B := calibrated.troubled(tokens_BND, context)) is not None:
            troubled.append(bad_B)

    def share() -> float | None:
        return float(torch.cat(troubled).double().mean()) if troubled else None

    _pass(policy, model, data, rows, watch, "observations")
    assert sums is not None
    before, fitted = share(), cast(Calibrated, _router_of(model)).fitted(sums / total)
    options = {**(router.options or {}), **fitted}
    found = [
        f"{name} = {value:.5g}, measured on {len(rows)} observations ({total} rows)" for name, value in fitted.items()
    ]
    if before is not None:
        troubled.clear()
        with_options = model.with_router(replace(router, options=options)).eval()
        _pass(policy, with_options, data, rows, watch, "with them")
        said = type(_router_of(model)).trouble  # type: ignore[attr-defined]
        found.append(f"rows that {said}: {before:.1%} with the given options, {share():.1%} with the measured ones")
    return options, found


def _exit(
    policy: CogVLAPolicy, router: RouterConfig, data: DemonstrationData, rows: Tensor, tolerance: float
) -> tuple[dict[str, Any], list[str]]:
    """Find the threshold of `late_exit`; return it as options, and what was found."""
    shares: list[Tensor] = []

    def watch(one: TokenRouter, tokens_BND: Tensor, context: RouterContext) -> None:
        assert context.share_B2 is not None
        shares.append(context.share_B2)

    stay = _pass(policy, policy.model, data, rows, watch, "with vision tokens")
    gone = policy.model.with_router(replace(router, options=None)).eval()
    left = _pass(policy, gone, data, rows, None, "without")
    share_X2, change_X = torch.cat(shares).cpu(), (stay - left).abs().flatten(1).mean(1)
    threshold = fit_threshold(share_X2, change_X, tolerance)
    layer, low, high = router.layers[0], float(change_X.min()), float(change_X.max())
    found = [
        f"without vision tokens from layer {layer} on, normalised actions change by {low:.4f} to {high:.4f} (mean)"
    ]
    if not share_X2[:, 1].any():
        found.append("vision tokens cannot attend to text here (causal mask): only the other direction is tested")
    if threshold is None:
        found.append(f"none changes by more than {tolerance}: without a threshold all exit, which also saves time")
        return {"threshold": None}, found
    exit_share = float((share_X2.amax(1) < threshold).float().mean())
    found.append(
        f"threshold {threshold:.5g}: {exit_share:.1%} of the observations exit, and change by at most {tolerance}"
    )
    if not exit_share:
        found.append("so it is of no use at this layer: try a later one, or a larger tolerance")
    return {"threshold": threshold}, found


def _pass(
    policy: CogVLAPolicy,
    model: CogVLA,
    data: DemonstrationData,
    rows: Tensor,
    watch: Callable[[TokenRouter, Tensor, RouterContext], None] | None,
    progress: str,
) -> Tensor:
    """Run a model on frames and show `watch` all inputs of its router; return the normalised actions [X,K,A]."""
    hook = None
    if watch is not None:
        hook = _router_of(model).register_forward_pre_hook(lambda one, given: watch(one, *given))
    actions = [model(batch.inputs).actions.float().cpu() for batch in batches(policy, data, rows, progress)]
    if hook is not None:
        hook.remove()
    return torch.cat(actions)


def _router_of(model: CogVLA) -> TokenRouter:
    assert model.router is not None
    before = model.router.before
    return cast(TokenRouter, next(iter(model.router.layers.values()))) if before is None else before


def flow(options: dict[str, Any]) -> str:
    """Return options as the command line takes them, in all digits: a threshold that is rounded is another one."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return flow(value)
        return "null" if value is None else repr(value) if isinstance(value, float) else str(value)

    return "{" + ", ".join(f"{name}: {text(value)}" for name, value in options.items()) + "}"


if __name__ == "__main__":
    console.calibrate_router()
