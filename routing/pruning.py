"""Language-FiLM pruning (LFP): per layer, the instruction decides which vision tokens take part.

Shape legend: B batch, S sequence, N vision tokens, K kept vision tokens, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
            probability where the router scores them too. None: 1 for all.
    """

    kept_BK: Tensor
    rows: Tensor
    layout: TokenLayout
    factor_BS1: Tensor | None = None


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

    def score(self, h_BND: Tensor, summary_B1D: Tensor) -> Tensor:
        """By how much each vision token should rather take part than not, [B,N]."""
        scale_B1D, shift_B1D = self.scale(summary_B1D), self.shift(summary_B1D)
        logits_BN2 = self.logits(torch.addcmul(shift_B1D, h_BND, 1 + scale_B1D))
        # The difference of two logits orders like their softmax, but it does not saturate into ties.
        return logits_BN2[..., 1] - logits_BN2[..., 0]

    def forward(self, h_BSD: Tensor, layout: TokenLayout, context_B1T: Tensor, count: int) -> Selection:
        """Choose `count` vision tokens; bos and everything after the vision tokens always stay.

        No host synchronisation and no loop over samples: the count is fixed, so all shapes are.

        Args:
            h_BSD: normalised input of the layer.
            layout: its layout.
            context_B1T: weights of state and text in their mean, see `context_weights`.
            count: K.
        """
        summary_B1D = context_B1T @ h_BSD[:, layout.context]
        score_BN = self.score(h_BSD[:, layout.visual], summary_B1D)
        kept_BK = score_BN.detach().topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        probability_BK1 = score_BN.gather(1, kept_BK).sigmoid()[..., None]

        rows = rows_of(layout, kept_BK)
        if self.score_all:
            bos_B11, rest_BR1 = (self.logits(h_BSD[:, s]).softmax(-1)[..., 1:] for s in (layout.bos, layout.rest))
            factor_BS1 = torch.cat((bos_B11, probability_BK1, rest_BR1), dim=1)
        else:
            after = layout.length - layout.rest.start
            factor_BS1 = F.pad(probability_BK1, (0, 0, 1, after), value=1.0)
        return Selection(kept_BK, rows, layout.with_vision(count), factor_BS1)


def context_weights(layout: TokenLayout, valid_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [B,1,T] that make the mean over state and text, leaving padding out."""
    context_BT = valid_BS[:, layout.context].to(dtype)
    return (context_BT / context_BT.sum(1, keepdim=True))[:, None]


def rows_of(layout: TokenLayout, kept_BK: Tensor) -> Tensor:
    """Rows of the flattened batch that stay when of the vision tokens only these do."""
    row_BS = torch.arange(len(kept_BK) * layout.length, device=kept_BK.device).view(-1, layout.length)
    kept_row_BK = row_BS[:, layout.visual].gather(1, kept_BK)
    return torch.cat((row_BS[:, layout.bos], kept_row_BK, row_BS[:, layout.rest]), dim=1).flatten()


def take_rows(x_BSD: Tensor, rows: Tensor) -> Tensor:
    """Rows of the flattened batch as [B,S',D]; cheaper than `gather` with an expanded index."""
    return x_BSD.flatten(0, 1).index_select(0, rows).unflatten(0, (len(x_BSD), -1))


def put_rows(x_BSD: Tensor, rows: Tensor, updated_BSD: Tensor) -> Tensor:
    """`x` with those rows replaced; the others pass bit for bit."""
    return x_BSD.flatten(0, 1).index_copy(0, rows, updated_BSD.flatten(0, 1)).view_as(x_BSD)
