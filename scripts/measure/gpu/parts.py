"""The parts of a GPU report, in the order of their value; their limits add up to 20 minutes."""

from __future__ import annotations

from cogvla.scripts.measure.gpu import equality, latency, learning, rendering, training
from cogvla.scripts.measure.gpu.runner import Part

PARTS = {
    part.name: part
    for part in (
        Part("equality", "Equality with the plain network in float32", equality.tasks, 100, equality.COLUMNS),
        Part("latency", "Latency", latency.tasks, 380, latency.COLUMNS),
        Part("training", "Training", training.tasks, 170, training.COLUMNS),
        Part("learning", "Learning from nothing", learning.tasks, 525, learning.COLUMNS),
        Part("rendering", "Rendering", rendering.tasks, 20, rendering.COLUMNS),
    )
}
