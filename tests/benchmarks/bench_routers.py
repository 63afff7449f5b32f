"""What every token router costs: alone, on random tokens, and inside a policy, with the context that it asks for.

python tests/benchmarks/bench_routers.py
python tests/benchmarks/bench_routers.py --side 16 --width 512 --budget 64 --policy none
python tests/benchmarks/bench_routers.py --policy small --share 0.125 --only identity random coverage
python tests/benchmarks/bench_routers.py --device cuda --batches 1 8 --calls 200

The policy is a preset with `routing=router` and random weights, at batch 1; its columns are the whole forward pass with
a known instruction, operation by operation and recorded by the engine: the difference to `identity` is the router, its
context, and what fewer tokens save.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf

from cogvla.configs.build import build
from cogvla.policy.engine.engine import Engine, EngineConfig, starting
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA, ModelInput
from cogvla.policy.model.config import CogVLAConfig
from cogvla.routing.registry import build_router, registered_routers
from cogvla.routing.router import RouterConfig
from cogvla.scripts.command import compose
from cogvla.tests.support.router_contexts import context_for, everything, sizes_for

WARM_UP = 3


def milliseconds(call: Callable[[], Any], calls: int, device: str) -> float:
    """Least time of a call: of this process where it has one thread, to which others do not add; else wall time."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    samples = []
    for number in range(WARM_UP + calls):
        started = clock()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= WARM_UP:
            samples.append(1e3 * (clock() - started))
    return min(samples)


def router_ms(name: str, batch: int, args: argparse.Namespace) -> float:
    """A router alone, given its context."""
    grid = (args.side, args.side)
    items = everything(batch, args.budget, grid, width=args.width)
    tokens = items["encoder_BNF"].clone()
    router = build_router(name, sizes_for(args.budget, grid, args.width)).eval().to(args.device)
    there: dict[str, Any] = {k: v.to(args.device) if isinstance(v, torch.Tensor) else v for k, v in items.items()}
    there["projector"].first, there["projector"].second = (
        weight.to(args.device) for weight in (items["projector"].first, items["projector"].second)
    )
    context, tokens = context_for(router, **there), tokens.to(args.device)
    return milliseconds(lambda: router(tokens, context), args.calls, args.device)


def preset(name: str) -> tuple[CogVLA, ModelInput]:
    """A policy with patches and without a router, and one observation for it."""
    composed = compose("train_policy", [f"policy={name}", "routing=router", "routing.router.name=null"])
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    robot = build(Embodiment, values["embodiment"], "embodiment")
    torch.manual_seed(0)
    model = CogVLA(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}), robot).eval()
    size = (robot.cameras[0].height, robot.cameras[0].width)
    pixels = torch.randint(0, 256, (1, len(robot.cameras), 3, *size), dtype=torch.uint8)
    words = torch.randint(1, 20, (1, 7))
    return model, ModelInput(pixels, words, torch.ones(1, 7, dtype=torch.bool), torch.randn(1, robot.state_dim))


def policy_ms(name: str, engine: Engine, inputs: ModelInput, args: argparse.Namespace) -> list[float] | None:
    """A whole forward pass with this router, plain and in the engine; None where the policy cannot give its context."""
    router = RouterConfig(name, args.share)
    if registered_routers()[name].stages == ("llm_layer",):
        router = RouterConfig("random", 1.0, layers=(1,), layer_router=name, layer_budgets=(args.share,))
        if name == "carried":
            router = replace(router, name="token_norm")
        if name == "vision_remember":  # it removes none: the router before it does
            router = replace(router, name="spatial_pool", budget=args.share, layer_budgets=(1.0,))
    try:
        routed = engine.model.with_router(router).eval().to(args.device)
    except ValueError:
        return None
    text, recorded = routed.encode_text(inputs.text_ids, inputs.text_mask), engine.with_router(routed)
    inputs = starting(routed, inputs)
    recorded.warm_up(inputs, inputs.text_ids.shape[1])
    encoded = recorded.encode(inputs.text_ids, inputs.text_mask)
    runs = (lambda: routed(inputs, text), lambda: recorded.run(inputs, encoded))
    return [milliseconds(run, args.calls, args.device) for run in runs]


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8, help="patches per side of a view")
    parser.add_argument("--width", type=int, default=128, help="of tokens")
    parser.add_argument("--budget", type=int, default=16, help="tokens kept")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="views at once")
    parser.add_argument("--policy", choices=("tiny", "small", "none"), default="tiny")
    parser.add_argument("--share", type=float, default=0.25, help="share of the policy's tokens kept")
    parser.add_argument("--only", nargs="+", default=list(registered_routers()), help="routers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = None
    if args.policy != "none":
        model, inputs = preset(args.policy)
        inputs = inputs.to(args.device)
        engine = Engine(model.to(args.device), EngineConfig())
    print(
        f"{args.side} x {args.side} tokens of width {args.width}, {args.budget} kept; "
        f"torch {torch.__version__} on {args.device}"
    )
    columns = [f"ms, {batch} view(s)" for batch in args.batches] + (
        [] if engine is None else ["ms, plain policy", "ms, engine"]
    )
    print("| router | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for name in args.only:
        row = [f"{router_ms(name, batch, args):.2f}" for batch in args.batches]
        if engine is not None:
            whole = policy_ms(name, engine, inputs, args)
            row += ["-"] * 2 if whole is None else [f"{value:.2f}" for value in whole]
        print(f"| `{name}` | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
