"""Vision tokens that are not what the towers saw: masked ones, and pictures that are hidden altogether.

**Masking.** Source: Croc (Pretraining Large Multimodal Models with Cross-Modal Comprehension). It replaces a random
75 % of the vision tokens by the nearest (L2) of a learned pool of 2048, and has the language model understand the
picture nevertheless. Here it is the policy that has to act nevertheless, with the losses that it has anyway: it learns
not to hang on single tokens, and so stands token routers better. 0.25 to 0.75 are shares to try.

    x_n  ->  argmin over p of |x_n - pool_p|      for a random share of the tokens of each sample, exact in number

Gradients go to the entries of the pool that were taken, and to no replaced token. Ours: a smaller pool (1 is a single
learned mask token), masking after the token router, no captions and no bidirectional attention among vision tokens.

**Hiding** is the same with all tokens and zeros in their place, for a share of the samples: what `state_dropout` is
for the state. With a share of 1 it trains the policy that does not see, which
`policy/training/auxiliary/blind_weights.py` needs.

Both happen in training only. What is random follows from the seed that each sample of a step has (`ModelInput.draw`),
so that neither resuming nor dividing a step changes it.

Shape legend: B batch, N vision tokens, M masked of them, P entries of the pool, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.routing.draws import uniform

MASKED, HIDDEN = 0x4D41534B, 0x48494445
"""Added to a sample's seed: token routers draw from the seed itself."""


class TokenMask(nn.Module):
    """Replaces a share of the vision tokens. Thrown away after training.

    Args:
        share: of the tokens of each sample, in (0,1].
        pool: P.
        width: D.
    """

    def __init__(self, share: float, pool: int, width: int) -> None:
        super().__init__()
        self.share = share
        self.pool_PD = nn.Parameter(torch.randn(pool, width) * width**-0.5)

    def forward(self, vision_BND: Tensor, draw_B: Tensor) -> Tensor:
        """Tokens [B,N,D] with round(share * N) of each sample replaced.

        Args:
            vision_BND: as they enter the language model.
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
    """All vision tokens of a share of the samples become 0."""
    seen_B11 = uniform(draw_B + HIDDEN, 1, 1) >= share
    return vision_BND * seen_B11
