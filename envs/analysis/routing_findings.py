"""Compute the numbers of `analyse_routing` from the episodes of `routing_recording`.

Shape legend: F moments, N tokens before routing, n tokens now, L language layers, D language width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvla.envs.analysis.layer_probes import horizon, injection, single_tokens
from cogvla.envs.analysis.representations import representations
from cogvla.envs.analysis.routing_recording import Moment, WatchedEpisode
from cogvla.envs.analysis.token_fates import fates
from cogvla.policy.model.language import DecoderContext, DecoderTrace
from cogvla.policy.policy import CogVLAPolicy
from cogvla.routing.diagnostics import (
    ALIVE,
    DEAD,
    SINK,
    attention_entropy,
    flicker,
    kept_share,
    nearest,
    token_kinds,
)
from cogvla.routing.layout import TokenLayout
from cogvla.routing.selection import effective_rank

WORDS_SHOWN = 12
KINDS = {"sink": SINK, "dead": DEAD, "alive": ALIVE}


def findings(
    policy: CogVLAPolicy, episodes: Sequence[WatchedEpisode], instructions: Sequence[str], few: int
) -> dict[str, Any]:
    """Compute all numbers, as plain values for JSON.

    Args:
        policy: policy that played the episodes.
        episodes: the played episodes.
        instructions: all instructions of the suite, for `readings`.
        few: number of moments for the slow analyses: `readings`, `horizon`, `read` and `alignment`.
    """
    moments = [moment for episode in episodes for moment in episode.moments]
    some = [moments[i] for i in sorted(set(np.linspace(0, len(moments) - 1, min(few, len(moments))).astype(int)))]
    return {
        "moments": len(moments),
        "tokens": len(moments[0].tokens_ND),
        "effective_rank": ranks(moments),
        "attention_entropy": entropies(moments),
        "stages": {stage: stage_numbers(episodes, stage) for stage in moments[0].kept},
        "new_tokens": moments[0].new,
        "kinds": kinds(episodes),
        "readings": readings(policy, some, instructions),
        "information": horizon(policy.model, some),
        **representations(policy.model, some, moments),
        "injection": injection(policy.model, some),
        "single_tokens": single_tokens(policy.model, some[:: max(1, len(some) // 4)][:4]),
        "episodes": [
            {
                "task": e.name, "success": e.result.success, "steps": e.result.steps, **over_time(e),
                "fates": fates_of(e, policy.embodiment.camera_names),
            }
            for e in episodes
        ],
    }  # fmt: skip


def over_time(episode: WatchedEpisode) -> dict[str, Any]:
    """Return the share of the target that is kept, and the flicker, for each stage and decision."""
    stages = list(episode.moments[0].kept)
    return {
        "target_kept": {stage: [target_share(m, stage) for m in episode.moments] for stage in stages},
        "flicker": {stage: flicker([m.kept[stage].tolist() for m in episode.moments]) for stage in stages},
    }


def fates_of(episode: WatchedEpisode, views: Sequence[str]) -> dict[str, Any]:
    """Return which choices did not keep each token at the middle decision; tokens are numbered within their view."""
    number = len(episode.moments) // 2
    moment = episode.moments[number]
    found = fates(moment.choices, len(moment.tokens_ND))
    each = len(found) // len(views)
    told = [
        {"view": views[token // each], "token": token % each, "not_kept": [asdict(one) for one in fate]}
        for token, fate in enumerate(found)
    ]
    return {"decision": number + 1, "tokens": told}


def target_share(moment: Moment, stage: str) -> float | None:
    """Return how much the tokens kept at a stage see of the target, as a share of what all tokens see of it."""
    if moment.target_P is None:
        return None
    kept_N = torch.zeros(len(moment.looks_NP), dtype=torch.bool, device=moment.looks_NP.device)
    kept_N[moment.kept[stage]] = True
    return kept_share(kept_N, moment.looks_NP, moment.target_P)


def stage_numbers(episodes: Sequence[WatchedEpisode], stage: str) -> dict[str, Any]:
    """Return the means over all moments of a stage: tokens kept, share of the target kept, and flicker."""
    moments = [moment for episode in episodes for moment in episode.moments]
    targets = [target_share(moment, stage) for moment in moments]
    changes = [d for e in episodes for d in flicker([m.kept[stage].tolist() for m in e.moments])]
    kept = mean([len(m.kept[stage]) for m in moments])
    return {
        "kept": kept,
        "kept_share": kept / len(moments[0].tokens_ND) if kept is not None else None,
        "target_kept": mean(targets),
        "flicker": mean(changes),
    }


def ranks(moments: Sequence[Moment]) -> dict[str, float | None]:
    """Return the effective rank of the vision tokens before routing, after each routing stage, and after each layer."""
    found = {"before routing": mean([_rank(m.tokens_ND) for m in moments])}
    for stage in moments[0].kept:
        found[f"kept at {stage}"] = mean([_rank(m.tokens_ND[m.kept[stage]]) for m in moments])
    return found | {f"after layer {n}": mean([_rank(m.hidden[n]) for m in moments]) for n in moments[0].hidden}


def _rank(tokens_nD: Tensor) -> float | None:
    return float(effective_rank(tokens_nD[None])[0]) if len(tokens_nD) else None


def entropies(moments: Sequence[Moment]) -> dict[str, float | None]:
    """Return the entropy of attention in nats: in the towers, and in each layer from action to vision tokens."""
    found = {"towers": mean([m.entropy for m in moments])}
    for layer in moments[0].attention:
        entropy = [float(attention_entropy(m.attention[layer][None])[0]) for m in moments if len(m.attention[layer])]
        found[f"layer {layer}"] = mean(entropy)
    return found


def kinds(episodes: Sequence[WatchedEpisode]) -> dict[str, Any] | None:
    """Return the shares of sink, dead and alive tokens before routing, and among the tokens kept at each stage.

    Uses the first and the middle moment of every episode, and takes each episode as one scene. None for one episode.
    """
    chosen = [(n, e.moments[i]) for n, e in enumerate(episodes) for i in sorted({0, len(e.moments) // 2})]
    moments = [moment for _, moment in chosen]
    attention_FN = torch.stack([_attention_before(moment) for moment in moments])
    scene_F = torch.tensor([scene for scene, _ in chosen], device=attention_FN.device)
    kinds_FN = token_kinds(torch.stack([m.tokens_ND for m in moments]), attention_FN, scene_F)
    if kinds_FN is None:
        return None
    found = {"before routing": _shares(kinds_FN.flatten())}
    for stage in moments[0].kept:
        kept = [kinds_n[m.kept[stage]] for m, kinds_n in zip(moments, kinds_FN, strict=True)]
        found[f"kept at {stage}"] = _shares(torch.cat(kept))
    return found


def _attention_before(moment: Moment) -> Tensor:
    """Return the attention [N] in the first language layer; 0 for tokens that do not reach it."""
    attention_N = torch.zeros(len(moment.tokens_ND), device=moment.tokens_ND.device)
    return attention_N.index_add_(0, moment.present[0], moment.attention[0].float())


def _shares(kinds_n: Tensor) -> dict[str, float | None]:
    return {name: float((kinds_n == kind).float().mean()) if len(kinds_n) else None for name, kind in KINDS.items()}


# --- words ---


@dataclass(frozen=True)
class Bank:
    """Words, and their states [W,D] in sentences without an image."""

    words: tuple[str, ...]
    states_WD: Tensor


@torch.inference_mode()
def word_bank(policy: CogVLAPolicy, instructions: Sequence[str]) -> Bank:
    """Return the states of all words of all instructions after every layer (LatentLens, with the suite's sentences)."""
    model, words, states = policy.model, [], []
    for instruction in dict.fromkeys(instructions):
        ids_BT, mask_BT = policy.preprocessor.text([instruction])
        text = model.encode_text(ids_BT, mask_BT)
        layout = TokenLayout(vision=0, text=ids_BT.shape[1], action=model.action_tokens)
        state_B1D = model.state(torch.zeros(1, model.embodiment.state_dim, device=ids_BT.device))[:, None]
        trace = DecoderTrace()
        model.decoder(
            torch.cat((text.bos_B1D, state_B1D.to(text.bos_B1D.dtype), text.tail_BRD), dim=1),
            DecoderContext(model.decoder, layout, mask_BT),
            trace,
        )
        ids_1T, _ = policy.preprocessor.tokenizer.encode([instruction])
        spelled = policy.preprocessor.tokenizer.spelled(ids_1T[0].tolist())
        for x_BSD in trace.hidden.values():
            words += spelled
            states.append(x_BSD[0, layout.words].float())
    return Bank(tuple(words), torch.cat(states))


def readings(policy: CogVLAPolicy, moments: Sequence[Moment], instructions: Sequence[str]) -> dict[str, Any]:
    """Find the nearest word of each vision token in each layer: the most frequent words, and shares of telling words.

    A word is telling if it is in the moment's instruction, but not in every instruction of the suite.
    """
    bank = word_bank(policy, instructions)
    usual = set.intersection(*(set(_words(policy, text)) for text in instructions))
    found: dict[str, Any] = {}
    for layer in moments[0].hidden:
        frequent: Counter[str] = Counter()
        hits: dict[str, list[float]] = {"target": [], "elsewhere": [], "kept": [], "gone": []}
        cosines: list[float] = []
        for moment in moments:
            if not len(moment.hidden[layer]):
                continue
            index_n1, cosine_n1 = nearest(moment.hidden[layer], bank.states_WD)
            read = [bank.words[i] for i in index_n1[:, 0].tolist()]
            frequent.update(read)
            cosines += cosine_n1[:, 0].tolist()
            telling = set(_words(policy, moment.instruction)) - usual
            for place, word in enumerate(read):
                for group in _groups(moment, layer, place):
                    hits[group].append(float(word in telling))
        found[f"layer {layer}"] = {
            "words": dict(frequent.most_common(WORDS_SHOWN)),
            "cosine": mean(cosines),
            "telling": {group: mean(values) for group, values in hits.items()},
        }
    return found


def _words(policy: CogVLAPolicy, instruction: str) -> list[str]:
    ids_1T, _ = policy.preprocessor.tokenizer.encode([instruction])
    return policy.preprocessor.tokenizer.spelled(ids_1T[0].tolist())


def _groups(moment: Moment, layer: int, place: int) -> list[str]:
    """Return the groups of a token that leaves a layer: `target` or `elsewhere` by where it looks, `kept` or `gone`."""
    groups = []
    if moment.target_P is not None:
        looks_P = moment.looks_NP[moment.after[layer][place]]
        groups.append("target" if bool(moment.target_P[looks_P.argmax()]) else "elsewhere")
    if layer in moment.used:
        groups.append("kept" if bool(moment.used[layer][place]) else "gone")
    return groups


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
