"""Metrics of a run: mean losses of the last steps, and the file `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from cogvla.files import write_atomic


class LossWindow:
    """Losses of the steps since the last record.

    They stay on their device until `settle` reads them, because each read would wait for the device.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._steps: list[dict[str, Tensor]] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one step, over this process's part of the batch."""
        self._steps.append(losses)

    def settle(self, step: int) -> None:
        """Replace the losses by their means over all processes; every process must call this.

        Args:
            step: number of the last step.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
        """
        if self._accelerator.num_processes > 1:
            self._steps = [self._accelerator.reduce(losses, "mean") for losses in self._steps]
        for number, losses in enumerate(self._steps, step - len(self._steps) + 1):
            bad = [name for name, value in losses.items() if not math.isfinite(value.item())]
            if bad:
                raise FloatingPointError(
                    f"{', '.join(bad)} is not finite at step {number}. Earlier checkpoints are not affected: run the "
                    "command again with a smaller training.learning_rate or training.clip_norm to continue from the "
                    "last one"
                )

    def take(self) -> dict[str, float]:
        """Return the means over the settled steps, and clear the window."""
        means = {name: torch.stack([losses[name] for losses in self._steps]).mean().item() for name in self._steps[0]}
        self._steps.clear()
        return means

    def state_dict(self) -> list[dict[str, Tensor]]:
        return [dict(losses) for losses in self._steps]

    def load_state_dict(self, state: list[dict[str, Tensor]]) -> None:
        device = self._accelerator.device
        self._steps = [{name: value.to(device) for name, value in losses.items()} for losses in state]


class MetricsFile:
    """Rows `{"step": N, ...}`, one JSON object per line, in ascending order of steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row.

        Raises:
            OSError: the file cannot be written, for example because the disk is full.
        """
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            advice = "Free space; the same command continues from the last checkpoint"
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}. {advice}") from error

    def cut(self, step: int) -> None:
        """Delete rows after `step` and an incomplete last row, before training resumes at `step`."""
        if not self.path.exists():
            return
        kept, rows = [], self.path.read_text(errors="replace").splitlines(keepends=True)
        for row in rows:
            if not row.endswith("\n") or not _is_until(row, step):
                break
            kept.append(row)
        if kept == rows:
            return
        write_atomic(self.path, "".join(kept))


def _is_until(row: str, step: int) -> bool:
    try:
        return bool(json.loads(row)["step"] <= step)
    except (ValueError, KeyError, TypeError):  # damaged, for example by a power failure
        return False
