"""What every token router costs: alone, on random tokens, and inside a policy, with the context that it asks for.

python tests/benchmarks/bench_routers.py
python tests/benchmarks/bench_routers.py --side 16 --width 512 --budget 64 --policy none
python tests/benchmarks/bench_routers.py --device cuda --batches 1 8 --calls 200

The policy is the preset `tiny` with `routing=router` and random weights, at batch 1; its column is the whole forward
pass with a known instruction: the difference to `identity` is the router, its context, and what fewer tokens save.
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


def preset() -> tuple[CogVLA, ModelInput]:
    """The tiny policy with patches, and one observation for it."""
    composed = compose("train_policy", ["routing=router", "routing.router.name=identity"])
    values: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    robot = build(Embodiment, values["embodiment"], "embodiment")
    torch.manual_seed(0)
    model = CogVLA(CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]}), robot).eval()
    size = (robot.cameras[0].height, robot.cameras[0].width)
    pixels = torch.randint(0, 256, (1, len(robot.cameras), 3, *size), dtype=torch.uint8)
    words = torch.randint(1, 20, (1, 7))
    return model, ModelInput(pixels, words, torch.ones(1, 7, dtype=torch.bool), torch.randn(1, robot.state_dim))


def policy_ms(name: str, model: CogVLA, inputs: ModelInput, args: argparse.Namespace) -> float | None:
    """A whole forward pass with this router keeping a quarter; None where the policy cannot give its context."""
    router = RouterConfig(name, 0.25)
    if registered_routers()[name].stages == ("llm_layer",):
        router = RouterConfig("random", 1.0, layers=(1,), layer_router=name, layer_budgets=(0.25,))
        if name == "carried":
            router = replace(router, name="token_norm")
    try:
        routed = model.with_router(router).eval()
    except ValueError:
        return None
    routed, inputs = routed.to(args.device), inputs.to(args.device)
    text = routed.encode_text(inputs.text_ids, inputs.text_mask)
    return milliseconds(lambda: routed(inputs, text), args.calls, args.device)


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=8, help="patches per side of a view")
    parser.add_argument("--width", type=int, default=128, help="of tokens")
    parser.add_argument("--budget", type=int, default=16, help="tokens kept")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="views at once")
    parser.add_argument("--policy", choices=("tiny", "none"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, inputs = preset() if args.policy == "tiny" else (None, None)
    print(
        f"{args.side} x {args.side} tokens of width {args.width}, {args.budget} kept; "
        f"torch {torch.__version__} on {args.device}"
    )
    columns = [f"ms, {batch} view(s)" for batch in args.batches] + (["ms, policy"] if model is not None else [])
    print("| router | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for name in registered_routers():
        row = [f"{router_ms(name, batch, args):.2f}" for batch in args.batches]
        if model is not None and inputs is not None:
            whole = policy_ms(name, model, inputs, args)
            row.append("-" if whole is None else f"{whole:.2f}")
        print(f"| `{name}` | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
