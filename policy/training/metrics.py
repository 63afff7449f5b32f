"""Metrics of a run: the mean losses of the last steps, and a file that is the same after a resumed run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor


class LossWindow:
    """Losses of the steps since the last record, on the device they were computed on: reading them waits for it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._steps: list[dict[str, Tensor]] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one step, over this process's part of the batch."""
        self._steps.append(losses)

    def settle(self, step: int) -> None:
        """Take the mean over all processes; every process must call this.

        Raises:
            FloatingPointError: one is not finite; `step` is the number of the last step.
        """
        if self._accelerator.num_processes > 1:
            self._steps = [self._accelerator.reduce(losses, "mean") for losses in self._steps]
        for number, losses in enumerate(self._steps, step - len(self._steps) + 1):
            bad = [name for name, value in losses.items() if not math.isfinite(value.item())]
            if bad:
                raise FloatingPointError(
                    f"{', '.join(bad)} is not finite at step {number}. Earlier checkpoints are sound: the same "
                    "command with a smaller training.learning_rate or training.clip_norm goes on from the last one"
                )

    def take(self) -> dict[str, float]:
        """Means over the settled steps, which are then forgotten."""
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
        """Raise OSError if the disk is full; the message says what to do."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            advice = "Make space; the same command goes on from the last checkpoint"
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}. {advice}") from error

    def cut(self, step: int) -> None:
        """Forget what comes after `step`, and a row that was not finished: training goes on from there."""
        if not self.path.exists():
            return
        kept, rows = [], self.path.read_text(errors="replace").splitlines(keepends=True)
        for row in rows:
            if not row.endswith("\n") or not _is_until(row, step):
                break
            kept.append(row)
        if kept == rows:
            return
        draft = self.path.with_suffix(f".{os.getpid()}.partial")
        draft.write_text("".join(kept))
        draft.replace(self.path)


def _is_until(row: str, step: int) -> bool:
    try:
        return bool(json.loads(row)["step"] <= step)
    except (ValueError, KeyError, TypeError):  # what a power cut leaves
        return False
