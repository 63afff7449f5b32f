"""The parts of a GPU report, in the order of their value; their limits add up to less than 20 minutes."""

from __future__ import annotations

from cogvla.scripts.measure.gpu import equality, latency
from cogvla.scripts.measure.gpu.runner import Part

PARTS = {
    part.name: part
    for part in (
        Part("equality", "Equality with the plain network in float32", equality.tasks, 150, equality.COLUMNS),
        Part("latency", "Latency", latency.tasks, 390, latency.COLUMNS),
    )
}
