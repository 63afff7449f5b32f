"""Describe vision tokens in the language model, and as a language of their own: READ, IMA, and word statistics.

Shape legend: N vision tokens, n of them now, T words, J action tokens, D width, I neurons of an MLP, W codes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.envs.analysis.routing_recording import Moment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.routers.layer_router import active_neurons
from cogvla.routing.selection import minmax

HIGH, LOW, POINTS = 0.8, 0.2, 30
"""READ's thresholds of the scaled similarity, and its largest number of points."""
CODES, ROUNDS = 64, 20
"""Number of codes that stand for words, and rounds of the clustering."""


# --- READ ---


def points(state_JD: Tensor, vision_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vision tokens that the action tokens are most and least similar to, as indices (READ).

    Similarity is the product of the mean action token with each vision token, scaled to 0 to 1. At most 30 tokens have
    0.8 or more, the highest first, and at most 30 have 0.2 or less, the lowest first. READ uses the token that asks for
    a segmentation; here the action tokens ask.
    """
    similar_n = minmax((vision_nD.float() @ state_JD.float().mean(0))[None])[0]
    order_n = similar_n.argsort(descending=True, stable=True)
    high_n, low_n = order_n[similar_n[order_n] >= HIGH], order_n.flip(0)
    return high_n[:POINTS], low_n[similar_n[low_n] <= LOW][:POINTS]


def read(moments: Sequence[Moment]) -> dict[str, dict[str, float | None]]:
    """Return for each layer the share of READ's high and low points that look at the target, and that of all tokens."""
    found = {}
    for layer in moments[0].hidden:
        shares: dict[str, list[float]] = {"high": [], "low": [], "all": []}
        for moment in moments:
            if moment.target_P is None or not len(moment.hidden[layer]):
                continue
            on_n = moment.target_P[moment.looks_NP[moment.after[layer]].argmax(-1)].float()
            high_n, low_n = points(moment.acting[layer], moment.hidden[layer])
            for name, chosen in (("high", on_n[high_n]), ("low", on_n[low_n]), ("all", on_n)):
                shares[name] += [float(chosen.mean())] if len(chosen) else []
        found[f"layer {layer}"] = {name: _mean(values) for name, values in shares.items()}
    return found


# --- IMA ---


def cosines(vision_nD: Tensor, words_TD: Tensor) -> dict[str, float | None]:
    """Return the mean cosine between modalities and within each (IMA): narrow cones have a high one within.

    Within a modality, different tokens are compared; None if there is only one.
    """
    v_nD, t_TD = (F.normalize(x.float(), dim=-1) for x in (vision_nD, words_TD))
    return {"between": float(v_nD.mean(0) @ t_TD.mean(0)), "vision": _within(v_nD), "words": _within(t_TD)}


def _within(unit_ND: Tensor) -> float | None:
    """Return the mean product of two different rows; None if there is one row."""
    count = len(unit_ND)
    return None if count < 2 else float((unit_ND.sum(0).square().sum() - count) / (count * (count - 1)))


def overlap(vision_nI: Tensor, words_TI: Tensor) -> float:
    """Return how much two modalities use the same neurons: sum of minima over sum of maxima of their activation rates.

    IMA takes the intersection over union of two sets of weights; rates need no threshold. 1: the same rates.
    """
    v_I, t_I = vision_nI.float().mean(0), words_TI.float().mean(0)
    return float(torch.minimum(v_I, t_I).sum() / torch.maximum(v_I, t_I).sum().clamp_min(1e-12))


@torch.inference_mode()
def alignment(model: CogVLA, moments: Sequence[Moment]) -> dict[str, dict[str, float | None]]:
    """Return for each layer the cosines after it, the overlap of neurons in it, and how much it changes vision tokens.

    `change` is 1 minus the mean cosine of a vision token before and after the layer, where the layer removes none. The
    first layer has neither overlap nor change, because the states before it are not recorded.
    """
    found = {}
    for layer in moments[0].hidden:
        values: dict[str, list[float]] = {"between": [], "vision": [], "words": [], "overlap": [], "change": []}
        for moment in moments:
            now_nD, words_TD = moment.hidden[layer], moment.words[layer]
            if not len(now_nD):
                continue
            for name, value in cosines(now_nD, words_TD).items():
                values[name] += [] if value is None else [value]
            before_nD = moment.hidden.get(layer - 1)
            if before_nD is None or not len(before_nD):
                continue
            block = model.decoder.llm.layers[layer]
            dtype = block.mlp.up_proj.weight.dtype
            active = (active_neurons(block, x.to(dtype)) for x in (before_nD, moment.words[layer - 1]))
            values["overlap"].append(overlap(*active))
            if torch.equal(moment.after[layer - 1], moment.after[layer]):
                values["change"].append(1 - float(F.cosine_similarity(before_nD, now_nD, dim=-1).mean()))
        found[f"layer {layer}"] = {name: _mean(numbers) for name, numbers in values.items()}
    return found


# --- vision tokens as words ---


def codes(tokens_ND: Tensor, count: int = CODES, seed: int = 0) -> Tensor:
    """Return the number of the nearest of `count` cluster centres (k-means) for each token, int64 [N]."""
    x_ND = tokens_ND.float()
    count = min(count, len(x_ND))
    centre_WD = x_ND[torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))[:count].to(x_ND.device)]
    for _ in range(ROUNDS):
        code_N = torch.cdist(x_ND, centre_WD).argmin(1)
        member_NW = F.one_hot(code_N, count).to(x_ND.dtype)
        total_W1 = member_NW.sum(0)[:, None]
        centre_WD = torch.where(total_W1 > 0, member_NW.mT @ x_ND / total_W1.clamp_min(1), centre_WD)
    return torch.cdist(x_ND, centre_WD).argmin(1)


def word_statistics(code_N: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return how much a sequence of codes is like a text ("Analyzing the Language of Visual Tokens").

    Returns:
        `used`: codes that occur. `zipf`: exponent s of frequency ~ rank^-s by least squares of the logarithms, about 1
        for words of a language, 0 if all are as frequent; and `fit`, its coefficient of determination. `entropy` of the
        frequencies in bits, and `largest`, that of equal ones. `compression`: size of the sequence after zlib, relative
        to a shuffled one; 1: its order says nothing.
    """
    count_W = np.sort(np.unique(code_N.cpu().numpy(), return_counts=True)[1])[::-1].astype(float)
    share_W = count_W / count_W.sum()
    order = np.random.default_rng(seed).permutation(len(code_N))
    number_N = code_N.cpu().numpy().astype(np.uint16)
    sizes = [len(zlib.compress(sequence_N.tobytes(), 9)) for sequence_N in (number_N, number_N[order])]
    found: dict[str, Any] = {
        "used": len(count_W),
        "entropy": float(-(share_W * np.log2(share_W)).sum()) + 0.0,
        "largest": float(np.log2(len(count_W))),
        "compression": sizes[0] / sizes[1],
        "zipf": None,
        "fit": None,
    }
    if len(count_W) > 2:
        rank_W, log_W = np.log(np.arange(1, len(count_W) + 1)), np.log(count_W)
        slope, start = np.polyfit(rank_W, log_W, 1)
        spread = ((log_W - log_W.mean()) ** 2).sum()
        missed = ((log_W - slope * rank_W - start) ** 2).sum()
        found |= {"zipf": -float(slope) + 0.0, "fit": float(1 - missed / spread) if spread > 1e-12 else None}
    return found


def language(moments: Sequence[Moment]) -> dict[str, Any]:
    """Return `word_statistics` of all vision tokens before routing, in order of moments, views and rows."""
    return word_statistics(codes(torch.cat([moment.tokens_ND for moment in moments])))


def representations(model: CogVLA, moments: Sequence[Moment], all_moments: Sequence[Moment]) -> Mapping[str, Any]:
    """Return READ and IMA for some moments, and the word statistics of all."""
    return {"read": read(moments), "alignment": alignment(model, moments), "language": language(all_moments)}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
