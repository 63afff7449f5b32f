"""Part `latency`: the time of a chunk of actions for every variant, and for OpenVLA as published."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial

from cogvla.policy.cost.timing import Measured, machine_peaks
from cogvla.policy.cost.variants import (
    PUBLISHED,
    VARIANTS,
    measure_published,
    measure_row,
    published_policy,
    random_policy,
    run_as,
)
from cogvla.scripts.measure.gpu.journal import Row
from cogvla.scripts.measure.gpu.networks import network
from cogvla.scripts.measure.gpu.runner import Task
from cogvla.scripts.measure.gpu.settings import Settings

COLUMNS = {
    "batch": "batch",
    "engine": "engine",
    "p50": "p50 ms",
    "p95": "p95",
    "p99": "p99",
    "prepare": "prepare",
    "vision": "vision",
    "decide": "decoder",
    "head": "head",
    "memory_gib": "GiB",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "times_floor": "times the floor",
    "largest": "largest deviation",
}
PRESETS = ("cogvla_7b", "small", "tiny")
PRECISION = "bfloat16"
CALLS = {1: 200, 8: 50}
"""Timed calls by batch size."""
FIRST = ("drop", "faithful", "drop, float8", PUBLISHED, "all off")
"""Rows in the order of their value; the others follow."""
LEFT_OUT = ("drop, int8", "drop, auto")
"""Rows for CPUs."""


def tasks(settings: Settings) -> Mapping[str, Task]:
    """Return a task for each preset and row; the rows of `FIRST` of all presets come first."""
    presets = PRESETS[:1] if settings.rehearse else PRESETS  # their stand-ins differ in their heads only
    others = [row for row in VARIANTS if row not in (*FIRST, *LEFT_OUT)]
    order = [(name, row) for rows in (FIRST, others) for name in presets for row in rows]
    return {f"{name}, {row}": partial(measure, settings, name, row) for name, row in order}


def measure(settings: Settings, name: str, row: str) -> Iterable[Row]:
    """Yield the row of each batch size."""
    if row == PUBLISHED:
        yield from published(settings, name)
        return
    config, robot, variant = network(settings, name, row)
    variant.check(settings.device, PRECISION)
    plain = random_policy(config, robot, settings.device, PRECISION)
    policy, deviation = run_as(variant, plain, settings.graph, settings.smallest)
    peaks = machine_peaks(settings.device, policy.describe()["dtype"])
    for batch, calls in CALLS.items():
        yield as_row(name, measure_row(row, policy, deviation, batch, 3 if settings.rehearse else calls, peaks))


def published(settings: Settings, name: str) -> Iterable[Row]:
    """Yield the rows of OpenVLA: one view, action tokens one after the other."""
    policy = published_policy(*network(settings, name, "all off")[:2], settings.device, PRECISION)
    peaks = machine_peaks(settings.device, PRECISION)
    for batch, calls in CALLS.items():
        calls = 3 if settings.rehearse else calls
        yield as_row(name, measure_published(policy, PRECISION, batch, calls, peaks))


def as_row(name: str, measured: Measured) -> Row:
    """Return the row of a measurement, with what its table shows beside the times."""
    deviation = measured.deviation
    return {
        **asdict(measured),
        **measured.stages,
        "row": f"{name}, {measured.row}",
        "preset": name,
        "variant": measured.row,
        "tflops": measured.tflops,
        "gb_per_s": measured.gb_per_s,
        "times_floor": measured.times_floor,
        "largest": None if deviation is None else deviation[1],
    }
