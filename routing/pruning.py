"""Language-FiLM pruning (LFP, stage 2): at each layer the instruction decides which vision tokens are processed.

Shape legend: B batch, S sequence, N vision tokens, n kept vision tokens, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.routing.aggregation import two_layer
from cogvla.routing.layout import TokenLayout
from cogvla.routing.router import RoutedTokens

POSITION_POLICIES = ("keep", "renumber")
SCALES = ("all", "visual_only", "values")


@dataclass(frozen=True)
class Selection:
    """The tokens that one routed layer processes.

    Attributes:
        kept_Bn: kept vision tokens, int64, ascending, counted from the first vision token of the layer's input.
        rows: kept tokens of the whole batch, as rows of the flattened [B*S,D] sequence.
        layout: layout of the kept sequence.
        factor_BS1: factors [B,S',1]: the router's probability for each kept vision token; 1 for the other tokens, or
            their own probability if the router scores them too. None: 1 for all.
        score_BN: scores of the vision tokens to choose from, higher is more worth keeping; None: there are none.
        routed: result of the token router that chose, whose new tokens `kept_Bn` has at their places; None: LFP chose.
    """

    kept_Bn: Tensor
    rows: Tensor
    layout: TokenLayout
    factor_BS1: Tensor | None = None
    score_BN: Tensor | None = None
    routed: RoutedTokens | None = None


class FiLMRouter(nn.Module):
    """Score vision tokens that are modulated by a summary of state and text: two logits per token, skip and keep.

    Args:
        width: D.
        score_all: also give the other tokens a probability, from their unmodulated states (the published code).
    """

    def __init__(self, width: int, score_all: bool = False) -> None:
        super().__init__()
        self.score_all = score_all
        self.scale = two_layer(width, width // 2, width)
        self.shift = two_layer(width, width // 2, width)
        self.logits = nn.Linear(width, 2)

    def score(self, h_BND: Tensor, summary_B1D: Tensor) -> Tensor:
        """Return the logit of keeping minus the logit of skipping for each vision token, [B,N]."""
        scale_B1D, shift_B1D = self.scale(summary_B1D), self.shift(summary_B1D)
        logits_BN2 = self.logits(torch.addcmul(shift_B1D, h_BND, 1 + scale_B1D))
        # The difference of two logits gives the same order as their softmax, but does not saturate into ties.
        return logits_BN2[..., 1] - logits_BN2[..., 0]

    def forward(
        self, h_BSD: Tensor, layout: TokenLayout, context_B1T: Tensor, count: int, seen_BN: Tensor | None = None
    ) -> Selection:
        """Choose `count` vision tokens; bos and all tokens after the vision tokens always stay.

        The count is fixed, so all shapes are: there is no host synchronisation and no loop over samples.

        Args:
            h_BSD: normalised input of the layer.
            layout: layout of that input.
            context_B1T: weights of state and text in their mean; see `context_weights`.
            count: n.
            seen_BN: False for hidden vision tokens, which are chosen last; None: all are visible.
        """
        summary_B1D = context_B1T @ h_BSD[:, layout.context]
        score_BN = self.score(h_BSD[:, layout.visual], summary_B1D)
        if seen_BN is not None:
            score_BN = score_BN.masked_fill(~seen_BN, float("-inf"))
        kept_Bn = score_BN.detach().topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        probability_Bn1 = score_BN.gather(1, kept_Bn).sigmoid()[..., None]

        rows = rows_of(layout, kept_Bn)
        if self.score_all:
            bos_B11, rest_BR1 = (self.logits(h_BSD[:, s]).softmax(-1)[..., 1:] for s in (layout.bos, layout.rest))
            factor_BS1 = torch.cat((bos_B11, probability_Bn1, rest_BR1), dim=1)
        else:
            after = layout.length - layout.rest.start
            factor_BS1 = F.pad(probability_Bn1, (0, 0, 1, after), value=1.0)
        return Selection(kept_Bn, rows, layout.with_vision(count), factor_BS1, score_BN.detach())


def context_weights(layout: TokenLayout, valid_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [B,1,T] of the mean over state and text, without padding."""
    context_BT = valid_BS[:, layout.context].to(dtype)
    return (context_BT / context_BT.sum(1, keepdim=True))[:, None]


def rows_of(layout: TokenLayout, kept_Bn: Tensor) -> Tensor:
    """Return the rows of the flattened batch [B*S] that remain if only these vision tokens are kept."""
    row_BS = torch.arange(len(kept_Bn) * layout.length, device=kept_Bn.device).view(-1, layout.length)
    kept_row_Bn = row_BS[:, layout.visual].gather(1, kept_Bn)
    return torch.cat((row_BS[:, layout.bos], kept_row_Bn, row_BS[:, layout.rest]), dim=1).flatten()


def take_rows(x_BSD: Tensor, rows: Tensor) -> Tensor:
    """Return rows of the flattened batch as [B,S',D]; cheaper than `gather` with an expanded index."""
    return x_BSD.flatten(0, 1).index_select(0, rows).unflatten(0, (len(x_BSD), -1))


def put_rows(x_BSD: Tensor, rows: Tensor, updated_BSD: Tensor) -> Tensor:
    """Return `x` with these rows replaced; the other rows are unchanged to the bit."""
    return x_BSD.flatten(0, 1).index_copy(0, rows, updated_BSD.flatten(0, 1)).view_as(x_BSD)
