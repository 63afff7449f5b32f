"""Objectives that other processes can import, for the tests of `policy.training.parallel`."""

from __future__ import annotations

import os

import torch
from torch import nn


class MeanSquare(nn.Module):
    """The mean square of what a module makes of a batch; an odd one out ends the process or fails."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if batch.isnan().any():
            os._exit(3)
        if batch.isinf().any():
            raise ValueError("this part is infinite")
        return {"loss": self.module(batch).square().mean()}


class FirstOnly(nn.Module):
    """Three layers, of which only the first one is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(1, 1)
        self.frozen.requires_grad_(False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.used(batch)
