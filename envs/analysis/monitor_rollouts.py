"""Roll-outs of a policy with a monitor: the largest scores of good episodes, and how well disturbed ones stand out.

Shape legend: B robots, H, W image, K chunk, A action.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.evaluation.protocol import EvaluationProtocol
from cogvla.envs.evaluation.report import MANY_ERRORS
from cogvla.envs.evaluation.statistics import success_rate
from cogvla.envs.perturbation.disturbance import disturbed
from cogvla.envs.rollout.failures import last_line
from cogvla.envs.rollout.rollout import rollout
from cogvla.envs.suite import Suite
from cogvla.policy.foresight.monitor import SCORES, Thresholds
from cogvla.policy.foresight.monitored_policy import MonitoredPolicy
from cogvla.policy.interface import ActionChunk, Observation

_log = logging.getLogger(__name__)
BASELINES = ("identical", "difference")
"""Scores that need no model: 1 if a picture equals the one of the chunk before; their mean squared difference."""
LEVEL = "all"


class MeasuredPolicy(MonitoredPolicy):
    """A watched policy that also notes the largest `BASELINES` of each episode and camera."""

    _pictures: dict[Hashable, dict[str, np.ndarray]]
    _highest: dict[Hashable, dict[str, dict[str, float]]]

    def begin(self, slots: Sequence[Hashable]) -> None:
        super().begin(slots)
        self._pictures, self._highest = getattr(self, "_pictures", {}), getattr(self, "_highest", {})
        for slot in slots:
            self._pictures.pop(slot, None)
            self._highest.pop(slot, None)

    def act(self, observation: Observation) -> ActionChunk:
        """See `MonitoredPolicy.act`; observations must name their slots."""
        assert observation.slots is not None, "the rollout names them"
        for row, slot in enumerate(observation.slots):
            pictures = {name: image_BHW3[row] for name, image_BHW3 in observation.images.items()}
            before, self._pictures[slot] = self._pictures.get(slot), pictures
            if before is None:
                continue
            highest = self._highest.setdefault(slot, {name: dict.fromkeys(BASELINES, 0.0) for name in pictures})
            for name, image_HW3 in pictures.items():
                change = float(np.square((image_HW3.astype(np.float32) - before[name]) / 255).mean())
                for baseline, value in zip(BASELINES, (float(change == 0), change), strict=True):
                    highest[name][baseline] = max(highest[name][baseline], value)
        return super().act(observation)

    def noticed(self, slot: Hashable) -> Mapping[str, Any]:
        noticed = dict(super().noticed(slot))
        extra = self._highest.get(slot, {})
        noticed["highest"] = {camera: {**scores, **extra[camera]} for camera, scores in noticed["highest"].items()}
        return noticed


def play(
    policy: MonitoredPolicy,
    suite: Suite,
    protocol: EvaluationProtocol,
    episodes: Sequence[EpisodeSpec],
    workers: int,
    kind: str | None = None,
) -> list[EpisodeResult]:
    """Play episodes, disturbed ones if `kind` is given; leave out errors, and episodes with nothing to compare.

    Raises:
        ValueError: more than `MANY_ERRORS` of the episodes ended in an error.
    """
    suite = suite if kind is None else disturbed(suite, kind)
    settings = protocol.for_suite(suite).rollout_settings()
    results = list(rollout(policy, suite, episodes, workers=workers, settings=settings, stop_if_all_fail=True))
    if errors := [r.error for r in results if r.error is not None]:
        said = f"{len(errors)} of {len(results)} episodes ended in an error: {last_line(errors[0])}"
        if len(errors) > MANY_ERRORS * len(results):
            raise ValueError(said)
        _log.warning("%s; they are left out", said)
    return [r for r in results if r.noticed and r.noticed["highest"]]


def auroc(normal: Sequence[float], other: Sequence[float]) -> float:
    """Return the probability that a score of `other` is larger than one of `normal`; ties count half."""
    difference = np.asarray(other)[:, None] - np.asarray(normal)
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def level(result: EpisodeResult, thresholds: Thresholds, scores: Sequence[str] = SCORES) -> float:
    """Return the largest score of an episode on a scale with the median episode at 0 and the threshold at 1."""
    highest = (result.noticed or {})["highest"]
    return max(
        (highest[camera][name] - thresholds.median[camera][name])
        / max(thresholds.limit[camera][name] - thresholds.median[camera][name], 1e-9)
        for camera in thresholds.limit
        for name in scores
    )


def compare(
    clean: Sequence[EpisodeResult], disturbed_by: Mapping[str, Sequence[EpisodeResult]], thresholds: Thresholds
) -> dict[str, Any]:
    """Compare disturbed with clean episodes.

    Returns:
        `false_alarms`: alarms in clean episodes, with a 95 % interval; for `kind` and `kind camera`: number of
        episodes, share with an alarm, and `auroc` of the monitor (`all`), of each score and of the baselines, each the
        largest over both cameras.
    """
    found: dict[str, Any] = {
        "false_alarms": vars(success_rate((r.noticed or {})["alarm"] is not None for r in clean)),
        "clean_success": sum(r.success for r in clean) / len(clean),
    }

    def highest(results: Sequence[EpisodeResult], score: str) -> list[float]:
        return [_value(result, score, thresholds) for result in results]

    groups: dict[str, list[EpisodeResult]] = {}
    for kind, results in disturbed_by.items():
        groups[kind] = list(results)
        if kind != "pushed":
            for result in results:
                groups.setdefault(f"{kind} {(result.perturbation or {})['camera']}", []).append(result)
    for name, results in groups.items():
        found[name] = {
            "episodes": len(results),
            "alarms": sum((r.noticed or {})["alarm"] is not None for r in results) / len(results),
            "auroc": {
                score: auroc(highest(clean, score), highest(results, score)) for score in (LEVEL, *SCORES, *BASELINES)
            },
        }
    return found


def _value(result: EpisodeResult, score: str, thresholds: Thresholds) -> float:
    if score == LEVEL:
        return level(result, thresholds)
    if score in SCORES:
        return level(result, thresholds, [score])
    return max(float(named[score]) for named in (result.noticed or {})["highest"].values())
