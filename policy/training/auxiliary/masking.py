"""Replace some or all vision tokens of a sample in training.

**Masking.** Source: Croc (Pretraining Large Multimodal Models with Cross-Modal Comprehension). It replaces a random
75 % of the vision tokens by the nearest (L2) entries of a learned pool of 2048, and trains the language model to
understand the picture nevertheless. Here the policy is trained with its usual losses. It learns not to depend on single
tokens, and so tolerates token routers better. Shares to try are 0.25 to 0.75.

    x_n  ->  argmin over p of |x_n - pool_p|      for a random share of the tokens of each sample, exact in number

Gradients go to the chosen entries of the pool, and not to replaced tokens. The released code imports a Hungarian
matching and does not use it: it takes the nearest entry, so that several tokens can get the same one. That is
`nearest`, the default. `hungarian` gives the masked tokens of a sample different entries, with the least sum of
distances; the pool must then be at least as large as their number. It runs on the CPU, sample by sample, in training
only.

Differences: a smaller pool (1 is a single learned mask token), masking after the token router, no captions, no
bidirectional attention among vision tokens.

**Hiding** replaces all vision tokens of a share of the samples by 0, as `state_dropout` does for the state. A share of
1 trains the policy without vision that `policy/training/auxiliary/blind_weights.py` needs.

Both are for training only. Random choices depend on the seed of each sample (`ModelInput.draw`), so that neither
resuming nor dividing a step changes them.

Shape legend: B batch, N vision tokens, M masked of them, P entries of the pool, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.routing.draws import uniform

MATCHINGS = ("nearest", "hungarian")
MASKED, HIDDEN = 0x4D41534B, 0x48494445
"""Added to a sample's seed, so that the draws differ from those of token routers."""


class TokenMask(nn.Module):
    """Replaces a share of the vision tokens by entries of a learned pool; used in training only.

    Args:
        share: share of the tokens of each sample, in (0,1].
        pool: P.
        width: D.
        matching: one of `MATCHINGS`.

    Raises:
        ValueError: unknown matching, or scipy is missing for it.
    """

    def __init__(self, share: float, pool: int, width: int, matching: str = "nearest") -> None:
        super().__init__()
        if matching not in MATCHINGS:
            raise ValueError(f"unknown matching {matching!r}; one of {', '.join(MATCHINGS)}")
        self.share, self.match = share, nearest if matching == "nearest" else hungarian
        if matching == "hungarian":
            _assignment()
        self.pool_PD = nn.Parameter(torch.randn(pool, width) * width**-0.5)

    def forward(self, vision_BND: Tensor, draw_B: Tensor) -> Tensor:
        """Replace round(share * N) tokens of each sample; return [B,N,D].

        Args:
            vision_BND: vision tokens at the input of the language model.
            draw_B: seeds.

        Raises:
            ValueError: with `hungarian`, the pool is smaller than the number of tokens to replace.
        """
        tokens = vision_BND.shape[1]
        order_BN = uniform(draw_B + MASKED, tokens).argsort(dim=1)
        place_BMD = order_BN[:, : round(self.share * tokens), None].expand(-1, -1, vision_BND.shape[-1])
        with torch.no_grad():
            entry_BM = self.match(torch.cdist(vision_BND.gather(1, place_BMD).float(), self.pool_PD.float()[None]))
        entry_BMD = F.embedding(entry_BM, self.pool_PD).to(vision_BND.dtype)
        return vision_BND.scatter(1, place_BMD, entry_BMD)


def nearest(distance_BMP: Tensor) -> Tensor:
    """Return the nearest entry of each token, int64 [B,M]."""
    return distance_BMP.argmin(-1)


def hungarian(distance_BMP: Tensor) -> Tensor:
    """Return different entries for the tokens of each sample, int64 [B,M], with the least sum of distances.

    Raises:
        ValueError: there are fewer entries than tokens.
    """
    tokens, pool = distance_BMP.shape[1:]
    if pool < tokens:
        raise ValueError(
            f"objective.mask_matching=hungarian gives {tokens} masked tokens different entries, but the pool has "
            f"{pool}: set objective.mask_pool to at least {tokens}, or mask_matching=nearest"
        )
    assign = _assignment()
    # Its rows come out in order, since no token is without an entry.
    known_BMP = distance_BMP.nan_to_num()  # the training tells of NaN itself
    entries = [torch.as_tensor(assign(distance_MP)[1]) for distance_MP in known_BMP.cpu().numpy()]
    return torch.stack(entries).to(distance_BMP.device)


def _assignment() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ValueError(
            "objective.mask_matching=hungarian needs scipy: install the extra `search` (`uv sync --extra search`), or "
            "use mask_matching=nearest"
        ) from error
    return linear_sum_assignment


def hide(vision_BND: Tensor, share: float, draw_B: Tensor) -> Tensor:
    """Set all vision tokens of a share of the samples to 0."""
    seen_B11 = uniform(draw_B + HIDDEN, 1, 1) >= share
    return vision_BND * seen_B11
