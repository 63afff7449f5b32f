"""The lower bound of a GPU's time: computing at its peak rate, or reading and writing at its memory bandwidth.

Peaks are for dense bfloat16 products with accumulation in float32. Data sheets often give twice as much, for matrices
that are half zero. Sources, and corrections:

- H200 SXM: NVIDIA H200 data sheet (1,979 TFLOP/s with sparsity, 4.8 TB/s).
- A800 SXM, 80 GB: NVIDIA A100 data sheet for the A100 SXM 80 GB (312 TFLOP/s dense, 2,039 GB/s); the A800 differs in
  NVLink only.
- RTX 4090: NVIDIA Ada GPU architecture white paper, appendix A (165.2 TFLOP/s dense with float32 accumulation,
  1,008 GB/s).
- Jetson Thor (T5000): NVIDIA Jetson Thor data sheet (2,070 TFLOP/s for sparse FP4, 273 GB/s); halved for dense
  matrices, and halved twice from FP4 over FP8 to bfloat16, as in its tensor cores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cogvla.policy.cost.flops import REPEATED, TOTAL, StageCost


@dataclass(frozen=True)
class GPU:
    """Peaks of a GPU.

    Attributes:
        name: name in tables.
        flops: dense bfloat16 FLOP/s.
        bandwidth: memory bandwidth in bytes/s.
    """

    name: str
    flops: float
    bandwidth: float

    def floor(self, cost: StageCost) -> float:
        """Return the lower bound of a stage's time in seconds: the longer of computing and memory access."""
        return max(cost.flops / self.flops, (cost.weight_bytes + cost.activation_bytes) / self.bandwidth)


GPUS = {
    "h200": GPU("H200", 989.5e12, 4.8e12),
    "a800": GPU("A800", 312e12, 2.039e12),
    "rtx4090": GPU("RTX 4090", 165.2e12, 1.008e12),
    "jetson_thor": GPU("Jetson Thor", 2070e12 / 8, 0.273e12),
}


def find_gpu(name: object) -> GPU:
    """Return the GPU with this name; case, spaces, `-` and `_` do not matter.

    Raises:
        ValueError: the GPU is unknown.
    """
    letters = re.sub(r"[\s_-]", "", str(name).lower())
    for key, gpu in GPUS.items():
        if key.replace("_", "") == letters:
            return gpu
    raise ValueError(f"unknown GPU {name!r}; one of {', '.join(GPUS)}")


def floors(costs: Sequence[StageCost], gpu: GPU) -> list[float]:
    """Return the lower bound of each row's time in seconds; a total is the sum of its stages, which run in sequence."""
    stages = [gpu.floor(cost) for cost in costs if cost.stage not in (TOTAL, REPEATED)]
    return [*stages, sum(stages), sum(stages[1:])]


def format_table(costs: Sequence[StageCost], gpus: Sequence[GPU] = ()) -> str:
    """Format the table as text: a line per stage, with the lower bound of its time on each GPU."""
    names = ("parameters M", "GFLOP", "share", "weights MB", "activations MB", "FLOP/byte")
    lines = [f"{'stage':<26}" + header(names, gpus, "ms at least")]
    whole = max(next(cost.flops for cost in costs if cost.stage == TOTAL), 1)
    times = [floors(costs, gpu) for gpu in gpus]
    for index, cost in enumerate(costs):
        if not cost.parameters and not cost.flops:
            continue  # a stage that this configuration does not have
        line = f"{cost.stage:<26}{cost.parameters / 1e6:>14,.3f}{cost.flops / 1e9:>14,.4f}{cost.flops / whole:>14.1%}"
        line += f"{cost.weight_bytes / 1e6:>14,.3f}{cost.activation_bytes / 1e6:>16,.3f}{cost.intensity:>14,.1f}"
        lines.append(line + "".join(f"{1e3 * seconds[index]:>14,.3f}" for seconds in times))
    return "\n".join(lines)


def header(names: Sequence[str], gpus: Sequence[GPU], unit: str) -> str:
    """Format the head of a table: names of columns and GPUs, aligned to the right."""
    columns = "".join(f"{name:>{max(14, len(name) + 2)}}" for name in (*names, *(gpu.name for gpu in gpus)))
    return columns + (f"  ({unit})" if gpus else "")
