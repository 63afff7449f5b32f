"""Numbers that say what token routing does, from tensors alone. `effective_rank` is in `routing.selection`.

Shape legend: F frames, N tokens, K kept tokens, P patches, D width, W words, Q queries, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ALIVE, DEAD, SINK = 0, 1, 2
"""Kinds of tokens, see `token_kinds`."""


def attention_entropy(attention_QN: Tensor) -> Tensor:
    """Entropy in nats [Q] of attention, whose rows need not sum to 1: log N is uniform, 0 is one token."""
    share_QN = attention_QN.float() / attention_QN.float().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(share_QN).sum(-1)


def flicker(kept: Sequence[Sequence[int]]) -> list[float]:
    """Jaccard distance between the sets of neighbouring control steps: 0 the same tokens, 1 no token in common."""
    distances = []
    for before, now in pairwise(kept):
        both = set(before) | set(now)
        distances.append(1 - len(set(before) & set(now)) / len(both) if both else 0.0)
    return distances


def kept_share(kept_N: Tensor, looks_NP: Tensor, marked_P: Tensor) -> float | None:
    """Share of what all tokens see of the marked patches that the kept ones see; None where none of them is seen.

    For tokens that are patches themselves (`looks_NP` is the identity) it is the share of marked patches kept.

    Args:
        kept_N: bool.
        looks_NP: how much each token sees of each patch.
        marked_P: bool, for instance the patches of an object.
    """
    seen_N = looks_NP.float() @ marked_P.float()
    total = float(seen_N.sum())
    return float(seen_N[kept_N].sum()) / total if total > 0 else None


def token_kinds(
    tokens_FND: Tensor, attention_FN: Tensor, scene_F: Tensor, similarity: float = 0.99, share: float = 0.9
) -> Tensor | None:
    """Kinds [F,N] of tokens after EmbedLens: `ALIVE`, or the same in nearly every scene, so that they tell nothing.

    A token tells nothing of its scene if in at least `share` of the other scenes some token is more than `similarity`
    (cosine) like it. Of these, those that get more attention than the mean token of their frame are a `SINK`, the
    others are `DEAD`. The similarity is the paper's; what separates the two kinds is our choice (there: words of one
    model's vocabulary).

    Args:
        tokens_FND: before routing.
        attention_FN: that they get.
        scene_F: number of each frame's scene; None is answered where there is only one.
        similarity, share: see above.
    """
    scenes = scene_F.unique()
    if len(scenes) < 2:
        return None
    unit_FND = F.normalize(tokens_FND.float(), dim=-1)
    alike_FNS = torch.stack(
        [torch.einsum("fnd,gmd->fngm", unit_FND, unit_FND[scene_F == scene]).amax((-2, -1)) for scene in scenes], -1
    )
    other_FS = scene_F[:, None] != scenes
    repeated_FN = ((alike_FNS > similarity) & other_FS[:, None]).sum(-1) / other_FS.sum(-1)[:, None]
    attended_FN = attention_FN > attention_FN.mean(1, keepdim=True)
    kinds_FN = torch.where(attended_FN, SINK, DEAD)
    return torch.where(repeated_FN >= share, kinds_FN, ALIVE)


def nearest(tokens_ND: Tensor, bank_WD: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Indices and cosines [N,count] of the nearest states of a bank, the nearest first (LatentLens)."""
    cosine_NW = F.normalize(tokens_ND.float(), dim=-1) @ F.normalize(bank_WD.float(), dim=-1).mT
    best = cosine_NW.topk(min(count, bank_WD.shape[0]), dim=-1)
    return best.indices, best.values


def information(change_L: Tensor) -> Tensor:
    """1 - exp(-change) [L]: what vision tokens still tell from a layer on, as the probability that removing them costs.

    Args:
        change_L: mean absolute change of the normalised actions when all vision tokens go before this layer. With the
            answer of all tokens in the place of the truth, p = exp(-change), and p of all tokens is 1.
    """
    return 1 - torch.exp(-change_L)


def information_horizon(information_L: Tensor, share: float = 0.05) -> int:
    """The first layer from which on vision tokens tell less than this share of what they tell in all; L if none."""
    little_L = information_L <= share * information_L[:1].clamp_min(1e-12)
    after_L = little_L.flip(0).cumprod(0).flip(0)
    return int(len(information_L) - after_L.sum())
