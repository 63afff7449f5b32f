"""Encoder-FiLM aggregation (EFA, stage 1): a few learned tokens per view collect what the instruction asks for, and the
instruction sets the mixing weights of the two vision streams.

Shape legend: B batch, V views, M aggregation tokens per view, N tokens per view, F tower width, D language width,
E expert projectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FUSIONS = ("mix", "sum", "concat", "experts")
EXPERTS = 4
"""Number of expert projectors of the fusion `experts`."""


class AggregationTokens(nn.Module):
    """M learned tokens that are appended to the patches of every view. They have no positional embedding.

    Args:
        count: M.
        width: W.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, width))

    def append_to(self, x_BNF: Tensor) -> Tensor:
        """Append the learned tokens: [B,N,F] to [B,N+M,F]."""
        return torch.cat((x_BNF, self.tokens.expand(len(x_BNF), -1, -1)), dim=1)

    def take_from(self, x_BNF: Tensor) -> Tensor:
        """Return the M learned tokens, which are the last ones of [B,N+M,F]."""
        return x_BNF[:, -len(self.tokens) :]


def two_layer(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Build an MLP: linear, GELU, linear."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class StreamFusion(nn.Module):
    """Project both vision streams to the language width and combine them.

    Args:
        widths: tower widths of the first and the second stream.
        width: D.
        kind: `mix`: sum with weights from the instruction (the paper). `sum`: plain sum. `concat`: join the channels
            before one projector of three layers (OpenVLA; also the ablation). `experts`: plain sum x, then the experts
            of Parrot, x + sum of w_e MLP_e(x), where the weights w = softmax(Linear(instruction)) are over all experts.
            Parrot's gate also sees the picture, through [CLS]; here it depends on the instruction alone, as `mix`
            does, and is computed once per instruction. The MLPs start at 0, as a plain sum.
    """

    def __init__(self, widths: Sequence[int], width: int, kind: str = "mix") -> None:
        super().__init__()
        if kind not in FUSIONS:
            raise ValueError(f"unknown stream fusion {kind!r}; one of {', '.join(FUSIONS)}")
        self.kind = kind
        self.weigher: nn.Module | None = None
        if kind == "concat":
            total = sum(widths)
            self.project = nn.Sequential(
                nn.Linear(total, 4 * total), nn.GELU(), nn.Linear(4 * total, width), nn.GELU(), nn.Linear(width, width)
            )
            return
        self.projectors = nn.ModuleList(two_layer(stream, width, width) for stream in widths)
        if kind == "mix":
            self.weigher = two_layer(width, width, len(widths))
        if kind == "experts":
            self.weigher = nn.Linear(width, EXPERTS)
            self.experts = nn.ModuleList(two_layer(width, width, width) for _ in range(EXPERTS))
            for parameter in (p for expert in self.experts for p in expert[2].parameters()):  # type: ignore[index]
                nn.init.zeros_(parameter)

    def weights(self, summary_BD: Tensor) -> Tensor | None:
        """Return the weights of the streams [B,2] (`mix`) or `experts` [B,E] for the summaries [B,D]; else None."""
        return None if self.weigher is None else self.weigher(summary_BD).softmax(-1)

    def forward(self, streams: Sequence[Tensor], weights_BE: Tensor | None) -> Tensor:
        """Combine two streams [B,N,F], each with its own F, into [B,N,D], with the weights of `weights`.

        Raises:
            ValueError: `kind` is `concat` and the streams have different numbers of tokens.
        """
        if self.kind == "concat":
            if streams[0].shape[:-1] != streams[1].shape[:-1]:
                raise ValueError(
                    f"routing.fusion=concat needs towers with the same number of tokens, got {streams[0].shape[1]} and "
                    f"{streams[1].shape[1]}; choose towers with the same patch size"
                )
            return self.project(torch.cat(list(streams), dim=-1))
        first, second = (project(stream) for project, stream in zip(self.projectors, streams, strict=True))
        if weights_BE is None:
            return first + second
        if self.kind == "experts":
            x_BND = first + second
            parts = zip(self.experts, weights_BE.unbind(1), strict=True)
            return x_BND + sum(weight_B[:, None, None] * expert(x_BND) for expert, weight_B in parts)
        return torch.addcmul(first * weights_BE[:, None, :1], second, weights_BE[:, None, 1:])
