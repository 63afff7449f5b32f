"""Replace some or all vision tokens of a sample in training.

**Masking.** Source: Croc (Pretraining Large Multimodal Models with Cross-Modal Comprehension). It replaces a random
75 % of the vision tokens by the nearest (L2) entries of a learned pool of 2048, and trains the language model to
understand the picture nevertheless. Here the policy is trained with its usual losses. It learns not to depend on single
tokens, and so tolerates token routers better. Shares to try are 0.25 to 0.75.

    x_n  ->  argmin over p of |x_n - pool_p|      for a random share of the tokens of each sample, exact in number

Gradients go to the chosen entries of the pool, and not to replaced tokens. Differences: a smaller pool (1 is a single
learned mask token), masking after the token router, no captions, no bidirectional attention among vision tokens.

**Hiding** replaces all vision tokens of a share of the samples by 0, as `state_dropout` does for the state. A share of
1 trains the policy without vision that `policy/training/auxiliary/blind_weights.py` needs.

Both are for training only. Random choices depend on the seed of each sample (`ModelInput.draw`), so that neither
resuming nor dividing a step changes them.

Shape legend: B batch, N vision tokens, M masked of them, P entries of the pool, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.routing.draws import uniform

MASKED, HIDDEN = 0x4D41534B, 0x48494445
"""Added to a sample's seed, so that the draws differ from those of token routers."""


class TokenMask(nn.Module):
    """Replaces a share of the vision tokens by entries of a learned pool; used in training only.

    Args:
        share: share of the tokens of each sample, in (0,1].
        pool: P.
        width: D.
    """

    def __init__(self, share: float, pool: int, width: int) -> None:
        super().__init__()
        self.share = share
        self.pool_PD = nn.Parameter(torch.randn(pool, width) * width**-0.5)

    def forward(self, vision_BND: Tensor, draw_B: Tensor) -> Tensor:
        """Replace round(share * N) tokens of each sample; return [B,N,D].

        Args:
            vision_BND: vision tokens at the input of the language model.
            draw_B: seeds.
        """
        tokens = vision_BND.shape[1]
        order_BN = uniform(draw_B + MASKED, tokens).argsort(dim=1)
        place_BMD = order_BN[:, : round(self.share * tokens), None].expand(-1, -1, vision_BND.shape[-1])
        with torch.no_grad():
            nearest_BM = torch.cdist(vision_BND.gather(1, place_BMD).float(), self.pool_PD.float()[None]).argmin(-1)
        entry_BMD = F.embedding(nearest_BM, self.pool_PD).to(vision_BND.dtype)
        return vision_BND.scatter(1, place_BMD, entry_BMD)


def hide(vision_BND: Tensor, share: float, draw_B: Tensor) -> Tensor:
    """Set all vision tokens of a share of the samples to 0."""
    seen_B11 = uniform(draw_B + HIDDEN, 1, 1) >= share
    return vision_BND * seen_B11
