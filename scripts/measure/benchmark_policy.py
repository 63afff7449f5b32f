r"""`benchmark_policy`: how long a chunk of actions takes, stage by stage, and how far that is from the floor.

    benchmark_policy --preset tiny --threads 1
    benchmark_policy --preset cogvla_7b --device cuda --dtype bfloat16 --output outputs/benchmark
    benchmark_policy --checkpoint checkpoints/tabletop_object      (rows plain, engine, float8, int8)
    benchmark_policy --preset small --rows drop --profile           (traces for Perfetto or chrome://tracing)

Weights are random unless a checkpoint is given; that changes no time. Every row is one network and one way to run it:

    all off               no stage of CogVLA, the model operation by operation: what OpenVLA-OFT computes
    faithful              CogVLA as published, operation by operation
    faithful, engine      the same network in the inference engine
    bypass, drop          CogVLA with our choices, in the engine; `drop` leaves pruned tokens out for good
    without stage 1, 2    ablations, in the engine
    drop, float8          large layers in 8 bits, on GPUs
    drop, int8            the same on CPUs

Needs torch, transformers, timm, einops, safetensors and numpy, and no installation of this package:

    mkdir -p .cache/types && ln -sfn ../.. .cache/types/cogvla
    PYTHONPATH=.cache/types python -m cogvla.scripts.measure.benchmark_policy --preset cogvla_7b --device cuda \
        --dtype bfloat16
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from torch import nn

from cogvla.envs.evaluation.provenance import provenance
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.cost.flops import REPEATED, count_flops
from cogvla.policy.cost.timing import Measured, machine_peaks, measure, profile
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.interface import Embodiment, Observation
from cogvla.policy.model.config import CogVLAConfig
from cogvla.policy.model.empty_model import empty_model
from cogvla.policy.policy import CogVLAPolicy

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
INSTRUCTION = "put the red cube in the tray"
CALIBRATION = 8
"""Observations that the ranges of 8-bit inputs are taken from."""


class NotMeasuredError(ValueError):
    """A row in 8 bits that this machine, precision or model does not have; the others are measured."""


@dataclass(frozen=True)
class Row:
    """What is measured: a file of configs/routing (None: as the checkpoint has it), changes to it, how it is run.

    `eight_bits` is the precision of large layers, float8 or int8; None: that of the others.
    """

    routing: str | None
    engine: bool = True
    changes: dict[str, Any] = field(default_factory=dict)
    eight_bits: str | None = None

    def check(self, device: str, dtype: str) -> None:
        """NotMeasuredError if this row cannot be had there, or beside this precision."""
        if self.eight_bits == "float8" and dtype != "bfloat16":
            raise NotMeasuredError("float8 layers compute beside bfloat16 ones (--dtype bfloat16)")
        if self.eight_bits == "int8" and (device.startswith("cuda") or dtype != "float32"):
            raise NotMeasuredError("int8 layers compute beside float32 ones on a CPU (--device cpu --dtype float32)")


ROWS = {
    "all off": Row("none", engine=False, changes={"attention": "bidirectional"}),
    "faithful": Row("faithful", engine=False),
    "faithful, engine": Row("faithful"),
    "bypass": Row("cogvla", changes={"mode": "bypass"}),
    "drop": Row("cogvla", changes={"mode": "drop"}),
    "without stage 1": Row("no_efa"),
    "without stage 2": Row("no_lfp"),
    "drop, float8": Row("cogvla", changes={"mode": "drop"}, eight_bits="float8"),
    "drop, int8": Row("cogvla", changes={"mode": "drop"}, eight_bits="int8"),
}

AS_TRAINED = {
    "plain": Row(None, engine=False),
    "engine": Row(None),
    "float8": Row(None, eight_bits="float8"),
    "int8": Row(None, eight_bits="int8"),
}
"""Rows of a checkpoint."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Console entry point."""
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        results = run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
    if options.output is not None:
        write(options, results)


def run(options: argparse.Namespace) -> list[Measured]:
    """Measure each row and print it as soon as it is known."""
    usual = machine_peaks(options.device, options.dtype)
    print(f"{usual.name}, {options.dtype}: large products {usual.flops / 1e12:.3g} TFLOP/s, "
          f"copies {usual.bandwidth / 1e9:.3g} GB/s (measured now)")  # fmt: skip
    print(header())
    results: list[Measured] = []
    rows = ROWS if options.checkpoint is None else AS_TRAINED
    if unknown := [name for name in options.rows or () if name not in rows]:
        raise ValueError(f"no row {unknown[0]!r} here; there are {', '.join(map(repr, rows))}")
    for name in options.rows or rows:
        row = rows[name]
        try:
            row.check(options.device, options.dtype)
            policy, plain_actions = _policy(row, options)
        except NotMeasuredError as error:
            print(f"{name:<20} not measured: {error}")
            continue
        peaks = usual
        if row.eight_bits is not None:
            peaks = machine_peaks(options.device, row.eight_bits)
            print(f"{name:<20} large products {peaks.flops / 1e12:.3g} TFLOP/s in {row.eight_bits}")
        for batch in options.batches:
            observation = _observation(policy.embodiment, batch)
            costs = count_flops(policy.model.config, policy.embodiment, len(INSTRUCTION.split()), batch)
            cost = next(cost for cost in costs if cost.stage == REPEATED)
            measured = measure(policy, observation, options.calls, name, cost, peaks, INSTRUCTION)
            if batch == 1 and plain_actions is not None:
                measured = replace(measured, deviation=plain_actions(policy))
            results.append(measured)
            print(line(measured), flush=True)
            if options.profile and batch == options.batches[0]:
                profile(policy, observation, Path(options.output or ".") / f"trace_{name.replace(', ', '_')}.json")
        del policy, plain_actions
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    _compare(results)
    return results


def header() -> str:
    """Names of the columns of `line`."""
    names = (
        "least",
        "p50",
        "p95",
        "p99",
        "prepare",
        "vision",
        "decide",
        "head",
        "TFLOP/s",
        "GB/s",
        "x floor",
        "GiB",
    )  # on a CPU of the process so far
    return f"{'ms':<20}{'batch':>6}" + "".join(f"{name:>9}" for name in names) + "  from plain, mean / largest"


def line(measured: Measured) -> str:
    """One row of the table."""
    stages = [measured.stages.get(name) for name in ("prepare", "vision", "decide", "head")]
    numbers = [measured.least, measured.p50, measured.p95, measured.p99, *stages]
    numbers += [measured.tflops, measured.gb_per_s, measured.times_floor, measured.memory_gib]
    cells = "".join(" " * 8 + "-" if number is None else f"{number:>9.3g}" for number in numbers)
    deviation = "" if measured.deviation is None else "  {:.1e} / {:.1e}".format(*measured.deviation)
    return f"{measured.row:<20}{measured.batch:>6}{cells}{deviation}"


def write(options: argparse.Namespace, results: Sequence[Measured]) -> None:
    """`benchmark.json`, and `roofline.png` where matplotlib is installed."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    body = {"settings": settings, "rows": [asdict(result) for result in results], **provenance()}
    (folder / "benchmark.json").write_text(json.dumps(body, indent=2) + "\n")
    print(f"written: {folder / 'benchmark.json'}")
    if not results:
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure, axes = plt.subplots(figsize=(8, 5))
    _roofline(axes, results)
    figure.tight_layout()
    figure.savefig(folder / "roofline.png", dpi=120)
    plt.close(figure)


def _roofline(axes: Any, results: Sequence[Measured]) -> None:
    intensities = [result.flops / result.moved for result in results]
    roofs = list(dict.fromkeys(result.peaks for result in results))  # one for each precision
    ridges = [peaks.flops / peaks.bandwidth for peaks in roofs]
    low, high = min(*intensities, *ridges) / 4, max(*intensities, *ridges) * 4
    for peaks, ridge, style in zip(roofs, ridges, ("k-", "k--"), strict=False):
        peak = peaks.flops / 1e12
        heights = [low * peaks.bandwidth / 1e12, peak, peak]
        axes.loglog([low, ridge, high], heights, style, label=f"at most {peak:.3g} TFLOP/s")
    for result, intensity in zip(results, intensities, strict=True):
        axes.plot(intensity, result.tflops, "o" if result.batch == 1 else "s", label=f"{result.row}, {result.batch}")
    axes.set_xlabel("FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{roofs[0].name}: reached, against what large products and copies reach")
    axes.legend(fontsize=7, title="row, batch")


def _compare(results: Sequence[Measured]) -> None:
    base = {result.batch: result for result in results if result.row in ("faithful", "plain")}
    for result in results:
        slow = base.get(result.batch, result)
        if slow is not result:
            print(f"{result.row}, batch {result.batch}: {slow.p50 / result.p50:.2f} times as fast as {slow.row}")


def _policy(
    row: Row, options: argparse.Namespace
) -> tuple[CogVLAPolicy, Callable[[CogVLAPolicy], tuple[float, float]] | None]:
    """The policy of a row, and what compares it with the same model operation by operation."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
    if row.routing is None:
        plain = load_policy(options.checkpoint, options.device)
        model, preprocessor = plain.model, plain.preprocessor
    else:
        config, embodiment = preset(row, options)
        model = empty_model(config, embodiment)
        _fill(model, torch.device(options.device), dtype)
        preprocessor = _preprocessor(embodiment)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    plain = CogVLAPolicy(model, preprocessor)
    if not row.engine:
        return plain, None
    seen = [_observation(plain.embodiment, 1, seed) for seed in range(CALIBRATION)]
    expected = [torch.from_numpy(plain.act(observation).actions) for observation in seen]
    plain.reset()
    int8 = "int8" if row.eight_bits == "int8" else None
    try:
        policy = plain.with_engine(EngineConfig(options.engine, dtype=int8, smallest=options.smallest), release=True)
        if row.eight_bits == "float8":
            policy.to_float8(seen, options.smallest)
    except ValueError as error:
        if row.eight_bits is None:
            raise
        raise NotMeasuredError(str(error)) from error

    def deviation(policy: CogVLAPolicy) -> tuple[float, float]:
        found = [torch.from_numpy(policy.act(observation).actions) for observation in seen]
        difference = torch.stack([(a - b).abs() for a, b in zip(found, expected, strict=True)])
        return float(difference.mean()), float(difference.max())

    return policy, deviation


def _fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights of a usual size, made on the device: no time is spent on initialisation."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            tensor = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() < 2:
                tensor.fill_(1.0 if "norm" in type(module).__name__.lower() and name == "weight" else 0.0)
            else:
                tensor.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    model.to(device)


def _preprocessor(embodiment: Embodiment) -> Preprocessor:
    span = {"state": embodiment.state_dim, "action": embodiment.action_dim}
    low, high = -1.0, 1.0
    statistics = {
        key: Statistics((low,) * dim, (high,) * dim, (low,) * dim, (high,) * dim, (0.0,) * dim, (1.0,) * dim)
        for key, dim in span.items()
    }
    return Preprocessor(embodiment, WordTokenizer.from_instructions([INSTRUCTION]), statistics)


def _observation(embodiment: Embodiment, batch: int, seed: int = 0) -> Observation:
    return replace(embodiment.fake_observation(batch, seed), instruction=[INSTRUCTION] * batch)


def preset(row: Row, options: argparse.Namespace) -> tuple[CogVLAConfig, Embodiment]:
    """The network of a row of `ROWS`, and a robot with LIBERO's numbers and the views that the options ask for."""
    assert row.routing is not None, "rows of a checkpoint have no preset"
    values = _yaml("embodiment", "libero")
    size = options.size or (128 if options.preset == "tiny" else 224)
    cameras = [{"name": f"view{index}", "height": size, "width": size} for index in range(options.views)]
    routing = {**_yaml("routing", row.routing), **row.changes}
    config = CogVLAConfig.from_dict({**_yaml("policy", options.preset), "routing": routing})
    return config, Embodiment(**{**values, "cameras": cameras})


def _yaml(group: str, name: str) -> dict[str, Any]:
    """One file of configs, and those that it builds on; Hydra, which does this elsewhere, may not be here."""
    path = CONFIGS / group / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ValueError(f"no {group} called {name!r}; one of {known}")
    values = yaml.safe_load(path.read_text())
    defaults = values.pop("defaults", [])
    return {**{key: value for default in defaults for key, value in _yaml(group, default).items()}, **values}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmark_policy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="tiny", help="of configs/policy: tiny, small or cogvla_7b")
    add("--checkpoint", type=Path, help="a trained policy instead of a preset with random weights")
    add("--rows", nargs="+", metavar="ROW", help="default: all")
    add("--batches", nargs="+", type=int, default=[1, 8], help="samples in one pass")
    add("--calls", type=int, default=200, help="timed calls, after a warm-up")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", choices=("float32", "bfloat16"))
    add("--engine", default="auto", choices=("auto", "eager", "trace", "cuda_graph", "compile"))
    add("--smallest", type=int, default=256, help="8 bits for layers with so many inputs and outputs")
    add("--views", type=int, default=2)
    add("--size", type=int, help="of the square views in pixels; default 224, for tiny 128")
    add("--threads", type=int, help="of torch, on a CPU")
    add("--output", type=Path, help="folder for benchmark.json and roofline.png")
    add("--profile", action="store_true", help="also write a trace of each row, into --output")
    return parser


if __name__ == "__main__":
    main()
