r"""`benchmark_policy`: measure the time of a chunk of actions, stage by stage, and compare it with the lower bound.

    benchmark_policy --preset tiny --threads 1
    benchmark_policy --preset cogvla_7b --device cuda --dtype bfloat16 --output outputs/benchmark
    benchmark_policy --checkpoint checkpoints/tabletop_object      (rows plain, engine, float8, int8)
    benchmark_policy --preset small --rows drop --profile           (traces for Perfetto or chrome://tracing)

Without a checkpoint, weights are random, which does not change the times. `policy/cost/variants.py` explains the rows.

It needs torch, transformers, timm, einops, safetensors and numpy, but no installation of this package:

    mkdir -p .cache/types && ln -sfn ../.. .cache/types/cogvla
    PYTHONPATH=.cache/types python -m cogvla.scripts.measure.benchmark_policy --preset cogvla_7b --device cuda \
        --dtype bfloat16
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from cogvla.plugins import import_plugin
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.cost.not_measured import NotMeasuredError
from cogvla.policy.cost.timing import Measured, Peaks, machine_peaks, profile
from cogvla.policy.cost.variants import (
    AS_TRAINED,
    DTYPES,
    PUBLISHED,
    VARIANTS,
    Variant,
    measure_published,
    measure_row,
    observe,
    preset,
    published_policy,
    random_policy,
    run_as,
)
from cogvla.policy.device import usable_device
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.policy import CogVLAPolicy
from cogvla.policy.provenance import provenance
from cogvla.policy.threads import use_threads
from cogvla.scripts.help import argument_parser
from cogvla.scripts.measure.roofline_plot import draw_roofline

PAPER = f"{PUBLISHED}: one action from one view; the paper reports 2.8 times its speed for CogVLA at 7 B"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments; None: those of the command line."""
    options = _parser().parse_args(arguments)
    try:
        use_threads(options.threads)
        for module in options.imports:
            import_plugin(module, "--imports")
        results = run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
    if options.output is not None:
        write(options, results)


def run(options: argparse.Namespace) -> list[Measured]:
    """Measure all rows and print each one when it is finished.

    Raises:
        ValueError: a row is unknown, a number is below 1, or a model cannot run.
    """
    if min(options.calls, *options.batches) < 1:
        raise ValueError(f"--calls and --batches must be at least 1, got {options.calls} and {options.batches}")
    _check_model(options)
    usable_device(options.device)
    usual = machine_peaks(options.device, options.dtype)
    print(f"{usual.name}, {options.dtype}: large products {usual.flops / 1e12:.3g} TFLOP/s, "
          f"copies {usual.bandwidth / 1e9:.3g} GB/s (measured now)")  # fmt: skip
    print(header())
    results: list[Measured] = []
    variants, rows = (VARIANTS, [PUBLISHED, *VARIANTS]) if options.checkpoint is None else (AS_TRAINED, [*AS_TRAINED])
    if unknown := [name for name in options.rows or () if name not in rows]:
        raise ValueError(f"unknown row {unknown[0]!r}; one of {', '.join(map(repr, rows))}")
    if options.checkpoint is not None:
        options.checkpoint = find_checkpoint(options.checkpoint)
    for name in options.rows or rows:
        if name == PUBLISHED:
            results += _published(options, usual)
            continue
        variant = variants[name]
        try:
            variant.check(options.device, options.dtype)
            policy, plain_actions = run_as(variant, _plain(variant, options), options.engine, options.smallest)
        except NotMeasuredError as error:
            print(f"{name:<20} not measured: {error}")
            continue
        peaks = usual
        if policy.choice is not None:
            print(f"{name:<20} {policy.choice}")
        if (precision := policy.describe()["dtype"]) != options.dtype:
            peaks = machine_peaks(options.device, precision)
            print(f"{name:<20} large products {peaks.flops / 1e12:.3g} TFLOP/s in {precision}")
        for batch in options.batches:
            measured = measure_row(name, policy, plain_actions, batch, options.calls, peaks)
            results.append(measured)
            print(line(measured), flush=True)
            if options.profile and batch == options.batches[0]:
                path = Path(options.output or ".") / f"trace_{name.replace(', ', '_')}.json"
                profile(policy, observe(policy.embodiment, batch), path)
        del policy, plain_actions
        _free(options.device)
    _compare(results)
    return results


def _check_model(options: argparse.Namespace) -> None:
    """Fill in the preset; ValueError for options that change nothing with a checkpoint, or without one."""
    if options.checkpoint is None:
        if options.statistics is not None:
            raise ValueError("--statistics names a data set of a --checkpoint: give one, or leave it out")
        options.preset, options.views = options.preset or "tiny", 2 if options.views is None else options.views
        return
    for name in ("preset", "views", "size"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} changes nothing with --checkpoint, which has its own: leave it out")


def header() -> str:
    """Return the head of the table."""
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
    )  # GiB on a CPU: peak memory of the process so far
    return f"{'ms':<20}{'batch':>6}" + "".join(f"{name:>9}" for name in names) + "  from plain, mean / largest"


def line(measured: Measured) -> str:
    """Return one line of the table."""
    stages = [measured.stages.get(name) for name in ("prepare", "vision", "decide", "head")]
    numbers = [measured.least, measured.p50, measured.p95, measured.p99, *stages]
    numbers += [measured.tflops, measured.gb_per_s, measured.times_floor, measured.memory_gib]
    cells = "".join(" " * 8 + "-" if number is None else f"{number:>9.3g}" for number in numbers)
    deviation = "" if measured.deviation is None else "  {:.1e} / {:.1e}".format(*measured.deviation)
    return f"{measured.row:<20}{measured.batch:>6}{cells}{deviation}"


def write(options: argparse.Namespace, results: Sequence[Measured]) -> None:
    """Write `benchmark.json`, and `roofline.png` if matplotlib is installed."""
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
    draw_roofline(axes, results)
    figure.tight_layout()
    figure.savefig(folder / "roofline.png", dpi=120)
    plt.close(figure)


def _published(options: argparse.Namespace, peaks: Peaks) -> list[Measured]:
    policy = published_policy(
        *preset(VARIANTS["all off"], options.preset, options.views, options.size), options.device, options.dtype
    )
    results = []
    for batch in options.batches:
        results.append(measure_published(policy, options.dtype, batch, options.calls, peaks))
        print(line(results[-1]), flush=True)
    del policy
    _free(options.device)
    return results


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _compare(results: Sequence[Measured]) -> None:
    for rows in (("faithful", "plain"), (PUBLISHED,)):
        base = {result.batch: result for result in results if result.row in rows}
        for result in results:
            slow = base.get(result.batch, result)
            if slow is not result and result.row != PUBLISHED:
                print(f"{result.row}, batch {result.batch}: {slow.p50 / result.p50:.2f} times as fast as {slow.row}")
    if any(result.row == PUBLISHED for result in results):
        print(PAPER)


def _plain(variant: Variant, options: argparse.Namespace) -> CogVLAPolicy:
    """Return the policy of a row without engine, in the precision of the options."""
    if variant.routing is not None:
        return random_policy(
            *preset(variant, options.preset, options.views, options.size), options.device, options.dtype
        )
    policy = load_policy(options.checkpoint, options.device, statistics=options.statistics)
    for parameter in policy.model.parameters():
        parameter.data = parameter.data.to(DTYPES[options.dtype])
    return CogVLAPolicy(policy.model, policy.preprocessor)


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser("benchmark_policy", __doc__)
    add = parser.add_argument
    add("--preset", help="a file of configs/policy: tiny (the default), small or cogvla_7b")
    add(
        "--checkpoint", help="a trained policy, folder or USER/NAME of the hub, instead of a preset with random weights"
    )
    add("--statistics", help="name of the data set whose statistics the checkpoint uses; default: the only ones")
    add("--imports", nargs="+", default=[], metavar="MODULE", help="modules to import first, e.g. to register routers")
    add("--rows", nargs="+", metavar="ROW", help="default: all")
    add("--batches", nargs="+", type=int, default=[1, 8], help="samples in one pass")
    add("--calls", type=int, default=200, help="timed calls, after a warm-up")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", choices=("float32", "bfloat16"))
    add("--engine", default="auto", choices=("auto", "eager", "trace", "cuda_graph", "compile"))
    add("--smallest", type=int, default=256, help="least number of inputs and of outputs of an 8-bit layer")
    add("--views", type=int, help="number of views of a preset; default 2")
    add("--size", type=int, help="side of a preset's square views in pixels; default 224, for tiny 128")
    add("--threads", type=int, help="threads of torch on a CPU")
    add("--output", type=Path, help="folder for benchmark.json and roofline.png")
    add("--profile", action="store_true", help="also write a trace of each row, into --output")
    return parser


if __name__ == "__main__":
    main()
