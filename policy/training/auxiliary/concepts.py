"""Alignment by shared concepts: picture and instruction should be explained by the same few entries of a codebook.

Source: FDT (Finite Discrete Tokens). Both sides ask the same codebook C, and only a few entries answer:

    r_c = max over tokens of q(token) . C_c / sqrt(d)        q: a linear map for pictures, another one for words
    share = sparsemax(r)                                     exact zeros, sums to 1
    embedding = share C

The loss is that of `contrast.py` between these embeddings. The paper uses 16384 entries of width 512, and a temperature
that it decreases; here the codebook has `objective.concept_pool` entries of width 64, and the temperature is 1.

The shares are a sparse code of the vision tokens that enter the language model, after a token router. As in
`contrast.py`, the words get no gradient, but their map does.

Shape legend: B pictures, C = B texts, N tokens, D width, E codebook entries, d their width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvla.policy.training.auxiliary.contrast import TEMPERATURE, info_nce

WIDTH = 64


class Concepts(nn.Module):
    """The codebook, and its loss; used in training only.

    Args:
        width: D.
        pool: E.
    """

    def __init__(self, width: int, pool: int) -> None:
        super().__init__()
        self.codebook_Ed = nn.Parameter(torch.randn(pool, WIDTH))
        self.picture, self.text = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH, bias=False)) for _ in range(2)
        )

    def forward(self, vision_BND: Tensor, words_CTD: Tensor, mask_CT: Tensor, instruction_C: Tensor) -> Tensor:
        """Compute the InfoNCE loss of a batch; the arguments are those of `contrast_loss`."""
        with torch.autocast(vision_BND.device.type, enabled=False):
            picture_BE = self.share(self.picture(vision_BND.float()), None)
            text_CE = self.share(self.text(words_CTD.detach().float()), mask_CT)
            picture_Bd, text_Cd = (F.normalize(share @ self.codebook_Ed, dim=-1) for share in (picture_BE, text_CE))
            return info_nce(picture_Bd @ text_Cd.mT / TEMPERATURE, instruction_C)

    def share(self, query_BNd: Tensor, mask_BN: Tensor | None) -> Tensor:
        """Return the share [B,E] of each entry, from the queries of all tokens that are not masked."""
        logits_BNE = query_BNd @ self.codebook_Ed.mT * self.codebook_Ed.shape[1] ** -0.5
        if mask_BN is not None:
            logits_BNE = logits_BNE.masked_fill(~mask_BN[..., None], float("-inf"))
        return sparsemax(logits_BNE.amax(1))


def sparsemax(logits_BE: Tensor) -> Tensor:
    """Project each row onto the probabilities (Martins and Astudillo 2016): like softmax, but with exact zeros.

    A row with NaN gives NaN.
    """
    logits_BE = logits_BE - logits_BE.amax(-1, keepdim=True)  # the same result, and 1 + large - large is 1
    sorted_BE = logits_BE.sort(dim=-1, descending=True).values
    number_E = torch.arange(1, logits_BE.shape[-1] + 1, device=logits_BE.device)
    total_BE = sorted_BE.cumsum(-1)
    count_B1 = (1 + number_E * sorted_BE > total_BE).sum(-1, keepdim=True).clamp_min(1)
    threshold_B1 = (total_BE.gather(-1, count_B1 - 1) - 1) / count_B1
    return (logits_BE - threshold_B1).clamp_min(0)
