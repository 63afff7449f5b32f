"""Contexts with everything a router can need, for its tests.

Shape legend: as in `routing.router`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from cogvla.routing.registry import build_router, registered_routers
from cogvla.routing.router import RouterContext, RouterSizes, TokenRouter, latest

GRID = (4, 4)
WIDTH = 12
TEXT = 5
NAMES = list(registered_routers())


def sizes_for(budget: int, grid: tuple[int, int] = GRID, width: int = WIDTH) -> RouterSizes:
    return RouterSizes(grid[0] * grid[1], width, width, grid, budget, width)


def router_of(name: str, budget: int, grid: tuple[int, int] = GRID, **options: Any) -> TokenRouter:
    """In evaluation mode, with reproducible weights that are not those of the start."""
    torch.manual_seed(0)
    router = build_router(name, sizes_for(budget, grid), options).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return router


def tokens_of(batch: int = 3, grid: tuple[int, int] = GRID, seed: int = 0) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(seed))


class Projector(nn.Module):
    """Linear, GELU, Linear with fixed weights."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first = torch.randn(width, width, generator=generator)
        self.second = torch.randn(width, width, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x @ self.first.to(x.dtype)) @ self.second.to(x.dtype)


def everything(
    batch: int = 3, budget: int = 4, grid: tuple[int, int] = GRID, seed: int = 0, width: int = WIDTH
) -> dict[str, Any]:
    """All items of a context, drawn from a generator."""
    draw = torch.Generator().manual_seed(seed + 1)
    tokens = grid[0] * grid[1]
    logits = torch.randn(batch, tokens, tokens, generator=draw)
    mask = torch.arange(TEXT) < torch.randint(1, TEXT + 1, (batch, 1), generator=draw)
    return {
        "budget": budget,
        "draw_B": torch.randint(2**62, (batch,), generator=draw),
        "grid": grid,
        "text_BTE": torch.randn(batch, TEXT, width, generator=draw),
        "text_mask_BT": mask,
        "projector": Projector(width),
        "encoder_BNF": torch.randn(batch, tokens, width, generator=draw),
        "attention_LBN": torch.rand(2, batch, tokens, generator=draw),
        "received_BN": logits.softmax(-1).mean(1),
        "attention_BNN": logits.softmax(-1),
        "keys_BNC": torch.randn(batch, tokens, 6, generator=draw),
        "pixels_B3HW": torch.randint(0, 256, (batch, 3, 8 * grid[0], 8 * grid[1]), generator=draw).float(),
        "score_BN": torch.rand(batch, tokens, generator=draw),
        "growth_BN": torch.randn(batch, tokens, generator=draw),
        "share_B2": torch.rand(batch, 2, generator=draw),
        "neurons_BNI": torch.rand(batch, tokens, 20, generator=draw) > 0.5,
        "text_neurons_BTI": torch.rand(batch, TEXT, 20, generator=draw) > 0.5,
        "history_BOND": torch.randn(batch, 4, tokens, width, generator=draw),
        "text_attention_BN": torch.rand(batch, tokens, generator=draw),
        "text_match_BN": torch.randn(batch, tokens, generator=draw),
        "age_B": torch.randint(0, 5, (batch,), generator=draw),
        "past_pixels_BO3HW": torch.randint(0, 256, (batch, 4, 3, 8 * grid[0], 8 * grid[1]), generator=draw).float(),
        "alike_BON": 0.97 + 0.03 * torch.rand(batch, 4, tokens, generator=draw),
        "motion_BOC": torch.randn(batch, 4, 3, generator=draw),
        "past_attention_BON": torch.rand(batch, 4, tokens, generator=draw),
        "past_seen_BON": torch.rand(batch, 4, tokens, generator=draw) > 0.3,
        "patches_BPF": torch.randn(batch, tokens, width, generator=draw),
        "owner_BP": torch.randint(-1, tokens, (batch, tokens), generator=draw),
    }


def context_for(router: TokenRouter, **items: Any) -> RouterContext:
    """What this router asked for, and nothing else."""
    values = {**everything(), **items}
    wanted = {*router.needs, "budget", "training"} | ({"text_mask_BT"} if "text_BTE" in router.needs else set())
    return latest(RouterContext(**{n: value for n, value in values.items() if n in wanted}), router.remembers or 4)


def sample(context: RouterContext, index: int) -> RouterContext:
    """One sample of a context, alone."""

    def pick(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[:, index : index + 1] if name == "attention_LBN" else value[index : index + 1]

    return RouterContext(**{f.name: pick(f.name, getattr(context, f.name)) for f in fields(context)})
