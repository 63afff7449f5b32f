"""The roofline plot of measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogvla.policy.cost.timing import Measured


def draw_roofline(axes: Any, results: Sequence[Measured]) -> None:
    """Draw the measured rows below the peaks of the machine, into matplotlib's axes."""
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
