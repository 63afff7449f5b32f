"""Measures of what a token router does: entropy, flicker, dead and sink tokens, information per layer.

All of them take tensors only. `effective_rank` is in `routing.selection`.

Shape legend: F frames, N tokens, n kept tokens, P patches, D width, W words, Q queries, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ALIVE, DEAD, SINK = 0, 1, 2
"""Kinds of tokens; see `token_kinds`."""


def attention_entropy(attention_QN: Tensor) -> Tensor:
    """Return the entropy [Q] of attention, in nats: log N for uniform attention, 0 for attention to one token.

    Rows need not sum to 1.
    """
    share_QN = attention_QN.float() / attention_QN.float().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.special.entr(share_QN).sum(-1)


def flicker(kept: Sequence[Sequence[int]]) -> list[float]:
    """Return the Jaccard distances between the kept sets of neighbouring control steps.

    0: the same tokens; 1: no token in common.

    Args:
        kept: indices of the kept tokens, for each control step.
    """
    distances = []
    for before, now in pairwise(kept):
        both = set(before) | set(now)
        distances.append(1 - len(set(before) & set(now)) / len(both) if both else 0.0)
    return distances


def kept_share(kept_N: Tensor, looks_NP: Tensor, marked_P: Tensor) -> float | None:
    """Return the kept tokens' share of all attention to the marked patches; None if no token attends to them.

    For tokens that are patches themselves (`looks_NP` is the identity), it is the share of marked patches kept.

    Args:
        kept_N: bool, tokens that are kept.
        looks_NP: attention of each token to each patch.
        marked_P: bool, for example the patches of an object.
    """
    seen_N = looks_NP.float() @ marked_P.float()
    total = float(seen_N.sum())
    return float(seen_N[kept_N].sum()) / total if total > 0 else None


def token_kinds(
    tokens_FND: Tensor, attention_FN: Tensor, scene_F: Tensor, similarity: float = 0.99, share: float = 0.9
) -> Tensor | None:
    """Classify tokens as `ALIVE`, `DEAD` or `SINK` [F,N] by our own rules, after EmbedLens; None for one scene only.

    A token carries no information about its scene if it is nearly the same in other scenes: if at least `share` of the
    other scenes have a token whose cosine with it is above `similarity`. Such a token is a `SINK` if it gets more
    attention than the mean token of its frame, otherwise it is `DEAD`. All others are `ALIVE`. The threshold of the
    similarity is the paper's; everything else is ours: the share of scenes, and to tell the two kinds apart by
    attention. In the paper a token is dead or a sink if one of its three nearest word embeddings is one of a few words
    that were found by hand in one model (LLaVA-1.5: 30296 for dead ones, 1141 and 26673 for sinks). A policy has other
    words, and a small one has no embeddings near its vision tokens, so that this rule cannot be applied: the shares
    here must not be compared with the paper's (10 % sinks, 30 % dead, 60 % alive).

    Args:
        tokens_FND: tokens before routing.
        attention_FN: attention that each token gets.
        scene_F: number of each frame's scene.
        similarity: cosine above which two tokens count as the same.
        share: share of the other scenes, 0 to 1.
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
    """Return indices and cosines [N,count] of the nearest states in a bank, the nearest first (LatentLens)."""
    cosine_NW = F.normalize(tokens_ND.float(), dim=-1) @ F.normalize(bank_WD.float(), dim=-1).mT
    best = cosine_NW.topk(min(count, bank_WD.shape[0]), dim=-1)
    return best.indices, best.values


def information(change_L: Tensor) -> Tensor:
    """Return the visual information 1 - exp(-change) [L] that each layer and those after it still use.

    It is the loss of probability when vision tokens are removed. The answer with all tokens stands for the truth:
    p = exp(-change), and p is 1 with all tokens.

    Args:
        change_L: mean absolute change of the normalised actions when all vision tokens are removed before this layer.
    """
    return 1 - torch.exp(-change_L)


def information_horizon(information_L: Tensor, share: float = 0.05) -> int:
    """Return the first layer from which on the visual information stays at most `share` of that at layer 0; L if none.

    Args:
        information_L: see `information`.
        share: 0 to 1.
    """
    little_L = information_L <= share * information_L[:1].clamp_min(1e-12)
    after_L = little_L.flip(0).cumprod(0).flip(0)
    return int(len(information_L) - after_L.sum())
