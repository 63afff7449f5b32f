"""Language-FiLM pruning (LFP): per layer, the instruction decides which vision tokens take part.

Shape legend: B batch, S sequence, N vision tokens, K kept vision tokens, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cogvla.routing.aggregation import two_layer
from cogvla.routing.layout import TokenLayout

MODES = ("bypass", "drop")
POSITION_POLICIES = ("keep", "renumber")
SCALES = ("all", "visual_only", "values")


@dataclass(frozen=True)
class Selection:
    """What one routed layer works on.

    Attributes:
        kept_BK: vision tokens kept, int64, ascending, counted from the first vision token of the layer's input.
        rows: kept tokens of the whole batch as rows of the flattened [B*S,D] sequence.
        layout: the layout of the kept sequence.
        factor_BS1: the router's probability for every kept vision token, [B,S',1]; for the other tokens 1, or their own
            probability where the router scores them too.
    """

    kept_BK: Tensor
    rows: Tensor
    layout: TokenLayout
    factor_BS1: Tensor


class FiLMRouter(nn.Module):
    """Scores vision tokens, modulated by a summary of state and text; two logits per token: skip, take part.

    Args:
        width: D.
        score_all: give the other tokens a probability as well, from their unmodulated state (the published code).
    """

    def __init__(self, width: int, score_all: bool = False) -> None:
        super().__init__()
        self.score_all = score_all
        self.scale = two_layer(width, width // 2, width)
        self.shift = two_layer(width, width // 2, width)
        self.logits = nn.Linear(width, 2)

    def forward(self, h_BSD: Tensor, layout: TokenLayout, valid_BS: Tensor, count: int) -> Selection:
        """Choose `count` vision tokens; bos and everything after the vision tokens always stay.

        No host synchronisation and no loop over samples: the count is fixed, so all shapes are.

        Args:
            h_BSD: normalised input of the layer.
            layout: its layout.
            valid_BS: False on padding.
            count: K.
        """
        context_BT1 = valid_BS[:, layout.context, None].to(h_BSD.dtype)
        summary_BD = (h_BSD[:, layout.context] * context_BT1).sum(1) / context_BT1.sum(1)
        scale_B1D, shift_B1D = self.scale(summary_BD)[:, None], self.shift(summary_BD)[:, None]
        logits_BN2 = self.logits(torch.addcmul(shift_B1D, h_BSD[:, layout.visual], 1 + scale_B1D))

        # Ranked by the difference of the logits: same order as the probability, but it does not saturate into ties.
        score_BN = (logits_BN2[..., 1] - logits_BN2[..., 0]).detach().float()
        kept_BK = score_BN.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        probability_BK1 = logits_BN2.gather(1, kept_BK[..., None].expand(-1, -1, 2)).softmax(-1)[..., 1:]

        bos_B1, rest_BR = _indices(layout.bos, kept_BK), _indices(layout.rest, kept_BK)
        index_BS = torch.cat((bos_B1, kept_BK + layout.visual.start, rest_BR), dim=1)
        rows = (index_BS + layout.length * torch.arange(len(h_BSD), device=h_BSD.device)[:, None]).flatten()
        if self.score_all:
            bos_B11, rest_BR1 = (self.logits(h_BSD[:, s]).softmax(-1)[..., 1:] for s in (layout.bos, layout.rest))
        else:
            bos_B11, rest_BR1 = (torch.ones_like(i, dtype=h_BSD.dtype)[..., None] for i in (bos_B1, rest_BR))
        factor_BS1 = torch.cat((bos_B11, probability_BK1, rest_BR1), dim=1)
        return Selection(kept_BK, rows, layout.with_vision(count), factor_BS1)


def _indices(segment: slice, like: Tensor) -> Tensor:
    return torch.arange(segment.start, segment.stop, device=like.device).expand(len(like), -1)


def take_rows(x_BSD: Tensor, rows: Tensor) -> Tensor:
    """Rows of the flattened batch as [B,S',D]; cheaper than `gather` with an expanded index."""
    return x_BSD.flatten(0, 1).index_select(0, rows).unflatten(0, (len(x_BSD), -1))


def put_rows(x_BSD: Tensor, rows: Tensor, updated_BSD: Tensor) -> Tensor:
    """`x` with those rows replaced; the others pass bit for bit."""
    return x_BSD.flatten(0, 1).index_copy(0, rows, updated_BSD.flatten(0, 1)).view_as(x_BSD)
