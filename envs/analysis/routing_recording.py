"""Play episodes and record the policy's tokens, attention and states at every decision.

A vision token keeps the number that it has when it leaves the towers, all views one after the other: N = V * (patches
of a view), or with EFA V * (aggregation tokens). Patches are numbered in the same way, P = V * H * W.

Shape legend: V views, N tokens before routing, n tokens now, P patches of all views, D language width, M aggregation
tokens of a view, h heads, T words, J action tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvla.envs.analysis.token_fates import TokenChoice, choices_of
from cogvla.envs.contract import SuiteEnv, TargetMasks, offered
from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.evaluation.protocol import EvaluationProtocol
from cogvla.envs.evaluation.watched_policy import WatchedPolicy
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import Suite
from cogvla.policy.interface import Observation
from cogvla.policy.model.cogvla import CogVLA, ModelInput, TextFeatures
from cogvla.policy.model.language import Choice
from cogvla.policy.model.routers.attention_probe import AttentionProbe
from cogvla.policy.policy import CogVLAPolicy
from cogvla.routing.diagnostics import attention_entropy

COVERED = 0.1
"""Least share of a patch that an object must cover for the patch to belong to it."""


@dataclass(frozen=True)
class Moment:
    """One decision of the policy.

    Attributes:
        inputs: inputs of the network.
        instruction: instruction of the episode.
        pictures_VHW3: images uint8, as the towers see them.
        tokens_ND: vision tokens before routing, in the language width.
        looks_NP: how much each token sees of each patch; the identity if tokens are patches.
        entropy: entropy in nats of the aggregation tokens' gaze, or of the patches' attention in the first tower.
        kept: routing stage, `router` or `layer 3` -> numbers of the tokens kept there, without new ones. In a played
            episode, all tokens that are there where a router let this decision pass, as `adp` does.
        new: number of new tokens after the router.
        present: language layer -> numbers of the tokens that enter it; a new token has the number of its place.
        attention: language layer -> attention [n] of those tokens from the action tokens.
        after: language layer -> numbers of the tokens that leave it.
        used: language layer with a choice -> bool, which of those neither skipped it nor are hidden.
        hidden: language layer -> states [n,D] of those tokens.
        words: language layer -> states [T,D] of the words after it.
        acting: language layer -> states [J,D] of the action tokens after it.
        choices: every choice of tokens, in order.
        target_P: bool, patches of the target object; None if the environment does not say.
    """

    inputs: ModelInput
    instruction: str
    pictures_VHW3: np.ndarray
    tokens_ND: Tensor
    looks_NP: Tensor
    entropy: float
    kept: Mapping[str, Tensor]
    new: int
    present: Mapping[int, Tensor]
    attention: Mapping[int, Tensor]
    after: Mapping[int, Tensor]
    used: Mapping[int, Tensor]
    hidden: Mapping[int, Tensor]
    words: Mapping[int, Tensor]
    acting: Mapping[int, Tensor]
    choices: tuple[TokenChoice, ...]
    target_P: Tensor | None = None


@dataclass(frozen=True)
class WatchedEpisode:
    """An episode with a moment for each decision."""

    name: str
    result: EpisodeResult
    moments: tuple[Moment, ...]


def play(
    policy: CogVLAPolicy, suite: Suite, protocol: EvaluationProtocol, tasks: Sequence[int], state: int
) -> list[WatchedEpisode]:
    """Play one episode of each task, in this process.

    Raises:
        RuntimeError: an episode could not be played.
    """
    envs: list[SuiteEnv] = []
    moments: list[Moment] = []

    def make(**options: Any) -> SuiteEnv:
        envs.append(suite.make(**options))
        return envs[-1]

    def watch(observation: Observation) -> None:
        moments.append(replace(look(policy, observation), target_P=_target(policy, envs[-1], observation)))

    episodes = []
    watched = WatchedPolicy(policy, watch)
    settings = protocol.for_suite(suite).rollout_settings()
    for task in tasks:
        moments.clear()
        spec = EpisodeSpec(task, state, seed=protocol.seed)
        (result,) = rollout(watched, replace(suite, make=make), [spec], settings=settings)
        if result.error is not None:
            raise RuntimeError(f"task {task} could not be played:\n{result.error}")
        episodes.append(WatchedEpisode(suite.tasks[task].name, result, tuple(moments)))
    return with_all_stages(episodes)


def with_all_stages(episodes: Sequence[WatchedEpisode]) -> list[WatchedEpisode]:
    """Give all moments the stages of any: where a router let a decision pass, it kept all tokens."""
    layer_of = {s: -1 if s == "router" else int(s.split()[1]) for e in episodes for m in e.moments for s in m.kept}

    def whole(moment: Moment) -> Moment:
        everything = {-1: torch.arange(len(moment.tokens_ND), device=moment.tokens_ND.device), **moment.present}
        stages = sorted(layer_of, key=lambda stage: layer_of[stage])
        return replace(moment, kept={s: moment.kept.get(s, everything[layer_of[s]]) for s in stages})

    return [replace(episode, moments=tuple(map(whole, episode.moments))) for episode in episodes]


def _target(policy: CogVLAPolicy, env: SuiteEnv, observation: Observation) -> Tensor | None:
    """Return `target_P` of a moment."""
    if (scene := offered(env, TargetMasks)) is None:
        return None
    masks = {}
    for name, image_BHWC in observation.images.items():
        mask_HW = scene.target_mask(name, *image_BHWC.shape[1:3])
        masks[name] = np.repeat(mask_HW[None, :, :, None], 3, axis=3).astype(np.uint8) * 255
    # The preprocessor crops and scales masks like images.
    pixels_VHW = policy.preprocessor.observation(replace(observation, images=masks)).pixels[0, :, 0]
    return covered(pixels_VHW > 127, policy.model.vision.grid)


def covered(mask_VHW: Tensor, grid: tuple[int, int], share: float = COVERED) -> Tensor:
    """Return the patches, bool [P], that a mask covers by at least `share`; if there are none, those it covers most."""
    part_P = F.adaptive_avg_pool2d(mask_VHW.float()[:, None], grid).flatten()
    enough_P = part_P >= share
    return enough_P if enough_P.any() else (part_P == part_P.max()) & (part_P > 0)


@torch.inference_mode()
def look(policy: CogVLAPolicy, observation: Observation) -> Moment:
    """Run the policy on one observation and return the moment, without its target."""
    model, inputs = policy.model, policy.inputs(observation)
    text = model.encode_text(inputs.text_ids, inputs.text_mask, dense=inputs.dense)
    output = model(inputs, text, debug=True, watch=True)
    inside = output.debug
    assert inside is not None
    entering_n, new = _entering(inside, model.vision.tokens)
    choices = choices_of(inside, entering_n, model.vision.tokens, 1 if model.router is None else model.router.rows)
    others = inside["layout"].length - inside["layout"].vision
    present, after = {}, {}
    for layer, x_BSD in inside["hidden"].items():
        index_Bn = inside["present"][layer]
        present[layer] = entering_n if index_Bn is None else entering_n[index_Bn[0]]
        # LFP in mode `drop` shortens the sequence inside the layer.
        shorter = x_BSD.shape[1] - others < len(present[layer])
        after[layer] = entering_n[inside["kept"][layer][0]] if shorter else present[layer]
    looks_NP, entropy = _looks(model, inputs, text, output.gaze)
    layout, real_T = inside["layout"], inputs.text_mask[0]
    # Vision tokens may be fewer than in the layout, so the words and action tokens are counted from the end.
    parts = (layout.words, layout.actions)
    words, acting = (slice(part.start - layout.length, part.stop - layout.length) for part in parts)
    return Moment(
        inputs=inputs,
        instruction=observation.instruction[0],
        pictures_VHW3=np.moveaxis(inputs.pixels[0].cpu().numpy(), 1, -1),
        tokens_ND=model.vision(inputs.pixels, text.vision)[0].float(),
        looks_NP=looks_NP,
        entropy=entropy,
        kept={choice.stage.partition(",")[0]: choice.kept[choice.kept >= 0] for choice in choices},
        new=new,
        present=present,
        attention={layer: read_Bn[0] for layer, read_Bn in inside["attention"].items()},
        after=after,
        used={choice.layer: _used(choice, len(after[choice.layer])) for choice in inside["choices"]},
        hidden={layer: x_BSD[0, 1 : 1 + len(after[layer])].float() for layer, x_BSD in inside["hidden"].items()},
        words={layer: x_BSD[0, words][real_T].float() for layer, x_BSD in inside["hidden"].items()},
        acting={layer: x_BSD[0, acting].float() for layer, x_BSD in inside["hidden"].items()},
        choices=choices,
    )


def _used(choice: Choice, leaving: int) -> Tensor:
    """Return `Moment.used` of a layer, bool [n], from its last choice and the number of tokens that leave it."""
    index_n, score_BN, routed = choice.index_Bn[0], choice.score_BN, choice.routed
    seen_n = torch.ones_like(index_n, dtype=torch.bool)
    if routed is None and score_BN is not None:
        seen_n = score_BN[0, index_n] > -torch.inf
    elif routed is not None and routed.mask_Bn is not None:
        seen_n = routed.mask_Bn[0]
    if choice.gone:
        return seen_n
    return torch.zeros(leaving, dtype=torch.bool, device=index_n.device).index_copy(0, index_n, seen_n)


def _entering(inside: Mapping[str, Any], tokens: int) -> tuple[Tensor, int]:
    """Return the tokens that enter the language model, and the number of new tokens."""
    routed = inside.get("routed")
    if routed is None:
        return torch.arange(tokens, device=inside["hidden"][0].device), 0
    index_n = routed.index_Bn[0]
    entering_n = torch.where(index_n < 0, routed.place_Bn[0].round().long(), index_n)
    return entering_n, int((index_n < 0).sum())


def _looks(model: CogVLA, inputs: ModelInput, text: TextFeatures, gaze: list[Tensor] | None) -> tuple[Tensor, float]:
    """Return `looks_NP` and `entropy` of a moment."""
    if gaze:  # use only towers with the patches of the first tower, whose grid is that of the policy
        same = [tower for tower in gaze if tower.shape[-1] == gaze[0].shape[-1]]
        looks_VMP = torch.stack([tower.exp().mean(1) for tower in same]).mean(0)
        return torch.block_diag(*looks_VMP), float(attention_entropy(looks_VMP.flatten(0, 1)).mean())
    tower = model.vision.named_towers()[0][1]
    probe = AttentionProbe({"received_BN"}, range(tower.computed - 1, tower.computed), tower.prefix, tower.has_cls)
    model.vision.streams(inputs.pixels, text.vision, None, probe)
    eye_NN = torch.eye(model.vision.tokens, device=inputs.pixels.device)
    return eye_NN, float(attention_entropy(probe.items()["received_BN"]).mean())
