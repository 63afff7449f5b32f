"""Notice while a robot moves that its cameras do not show what they should.

Once a whole horizon of actions is executed, four scores of each camera compare the picture with the one before them:

    still      predicted change / seen change; large if the picture is frozen. 0 where hardly any change is predicted
    place      mean of the four largest errors of patches, each in standard deviations of what is normal for a patch
               at its place with this predicted change; large if something moved that should not have
    error      mean error of the prediction; large if the camera was moved or covered
    look       how unusual the part of the picture is that the latents do not keep; needs no prediction

A score above its threshold is an alarm, which stays until the next episode. Thresholds are conformal (Vovk et al.
2005): the largest scores of n good episodes are n draws of what an undisturbed episode shows, so the k-th smallest of
them, k = ceil((n + 1)(1 - a)), is exceeded by a further such episode with a probability of at most a. The a of all
scores and cameras add up to `alpha`.

Shape legend: as in docs/architecture.md, with N patches of a view, D numbers of a latent, s scores, E episodes,
T executed actions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvla.policy.foresight.model import Foresight
from cogvla.policy.foresight.windows import Windows
from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import Observation

SCORES = ("still", "place", "error", "look")
REASONS = {
    "still": "the picture stands still although the arm moves",
    "place": "something in the picture moved that should not have",
    "error": "the picture is not what should be seen after these actions",
    "look": "the picture looks unlike all that is known",
}
LEAST_MOTION = 0.1
"""Predicted change of a view (root mean square of its latents) below which `still` says nothing."""
LEAST_SEEN = 0.01
SMALL = 1e-3
WORST = 4
"""Patches that `place` looks at."""


@dataclass(frozen=True)
class Normal:
    """Normal values of each view: `place` expects a logarithm of the error of slope * log(predicted change) + offset.

    Attributes:
        slope: slope of each view.
        offset, spread: offset of each patch of each view, and the standard deviation around the line.
        look, look_spread: mean and standard deviation of the logarithm of what the latents lose of a view.
    """

    slope: tuple[float, ...]
    offset: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]
    look: tuple[float, ...]
    look_spread: tuple[float, ...]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values as tensors [V,1], [V,N], [V,N], [V], [V], made once."""
        slope_V, *others = (torch.tensor(getattr(self, each.name)) for each in fields(self))
        return slope_V[:, None], *others

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Foresight, windows: Windows, seed: int = 0, samples: int = 1024) -> Normal:
        """Measure on samples that the model was not trained on."""
        logs = []
        for rows_B in windows.draw(samples, seed).split(64):
            window = windows.gather(rows_B)
            z_BVND = model.encode(window.before_BVCHW)
            guess_BVND = model(z_BVND, window.state_BS, window.chunk_BKA)
            later_BVND = model.encode(window.after_BVCHW)
            lost_BV = _lost(model, window.after_BVCHW, later_BVND)
            logs.append((*_logs(z_BVND, guess_BVND, later_BVND), lost_BV))
        change_BVN, error_BVN, lost_BV = (torch.cat(parts) for parts in zip(*logs, strict=True))
        x_BVN, y_BVN = (values - values.mean(0) for values in (change_BVN, error_BVN))
        slope_V1 = (x_BVN * y_BVN).sum((0, 2))[:, None] / x_BVN.square().sum((0, 2))[:, None].clamp(min=SMALL)
        rest_BVN = error_BVN - slope_V1 * change_BVN
        offset_VN, spread_VN = rest_BVN.mean(0), rest_BVN.std(0).clamp(min=SMALL)
        look_V, look_spread_V = lost_BV.mean(0), lost_BV.std(0).clamp(min=SMALL)
        slope_V = slope_V1.flatten()
        return cls(*(_tuples(values.tolist()) for values in (slope_V, offset_VN, spread_VN, look_V, look_spread_V)))


def score(
    model: Foresight, normal: Normal, z_BVND: Tensor, guess_BVND: Tensor, pixels_BVCHW: Tensor, later_BVND: Tensor
) -> Tensor:
    """Return the scores [B,V,s] of pictures, in the order of `SCORES`.

    Args:
        model: the model.
        normal: what is normal.
        z_BVND: latents before the chunk.
        guess_BVND: prediction for after it.
        pixels_BVCHW: pictures after it.
        later_BVND: their latents.
    """
    predicted_BV, seen_BV = ((x - z_BVND).square().mean((-1, -2)).sqrt() for x in (guess_BVND, later_BVND))
    still_BV = torch.where(predicted_BV > LEAST_MOTION, predicted_BV / (seen_BV + LEAST_SEEN), 0.0)
    change_BVN, error_BVN = _logs(z_BVND, guess_BVND, later_BVND)
    slope_V1, offset_VN, spread_VN, look_V, look_spread_V = normal.tensors
    unusual_BVN = (error_BVN - slope_V1 * change_BVN - offset_VN) / spread_VN
    place_BV = unusual_BVN.topk(min(WORST, unusual_BVN.shape[-1])).values.mean(-1)
    look_BV = ((_lost(model, pixels_BVCHW, later_BVND) - look_V) / look_spread_V).abs()
    return torch.stack((still_BV, place_BV, (guess_BVND - later_BVND).square().mean((-1, -2)), look_BV), dim=-1)


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


def _logs(z_BVND: Tensor, guess_BVND: Tensor, later_BVND: Tensor) -> tuple[Tensor, Tensor]:
    """Return logarithms [B,V,N] of the predicted change and of the error of each patch."""
    change_BVN, error_BVN = ((guess_BVND - x).square().mean(-1) for x in (z_BVND, later_BVND))
    return (change_BVN + SMALL).log(), (error_BVN + SMALL).log()


def _lost(model: Foresight, pixels_BVCHW: Tensor, z_BVND: Tensor) -> Tensor:
    """Return the logarithm [B,V] of the mean squared difference between pictures and what their latents keep."""
    lost_X = model.pca.lost(pixels_BVCHW.flatten(0, 1), z_BVND.flatten(0, 1))
    return (lost_X.unflatten(0, pixels_BVCHW.shape[:2]) + 1e-6).log()


def conformal_threshold(scores_E: Sequence[float], alpha: float) -> float:
    """Return the score that a further episode exceeds with a probability of at most alpha.

    Args:
        scores_E: the largest score of each of n episodes, which are exchangeable with the further one.
        alpha: the probability, above 0 and below 1.

    Raises:
        ValueError: n is below ceil(1 / alpha) - 1, so that no finite score is large enough.
    """
    place = math.ceil((len(scores_E) + 1) * (1 - alpha) - 1e-9)
    if place > len(scores_E):
        needed = math.ceil(1 / alpha - 1e-9) - 1
        raise ValueError(f"alpha {alpha:g} of a score needs {needed} episodes, there are {len(scores_E)}")
    return float(sorted(scores_E)[place - 1])


def episodes_needed(alpha: float, cameras: int) -> int:
    """Return the number of good episodes that thresholds need.

    Raises:
        ValueError: alpha is no number between 0 and 1.
    """
    if not (isinstance(alpha, float | int) and 0 < alpha < 1):
        raise ValueError(f"alpha must be above 0 and below 1, got {alpha}")
    return math.ceil(max(1, cameras * len(SCORES)) / alpha - 1e-9) - 1


@dataclass(frozen=True)
class Thresholds:
    """Thresholds [V,s] of the scores, and the medians [V,s] of the episodes that they come from.

    Attributes:
        limit: thresholds by camera and score.
        median: medians by camera and score.
        alpha: largest share of good episodes with an alarm.
        episodes: number of these episodes.
    """

    limit: Mapping[str, Mapping[str, float]]
    median: Mapping[str, Mapping[str, float]]
    alpha: float
    episodes: int

    @classmethod
    def of(cls, highest: Sequence[Mapping[str, Mapping[str, float]]], alpha: float) -> Thresholds:
        """Return the thresholds from the largest scores of good episodes, by camera and score.

        Raises:
            ValueError: there are too few episodes for alpha.
        """
        cameras = tuple(highest[0]) if highest else ()
        needed, scores = episodes_needed(alpha, len(cameras)), max(1, len(cameras) * len(SCORES))
        if len(highest) < needed or not cameras:
            raise ValueError(
                f"alpha={alpha:g}, shared by {scores} scores, needs {needed} successful episodes, there are "
                f"{len(highest)}; raise episodes or alpha"
            )
        each = alpha / scores
        drawn = {camera: {name: [e[camera][name] for e in highest] for name in SCORES} for camera in cameras}
        return cls(
            {camera: {n: conformal_threshold(v, each) for n, v in named.items()} for camera, named in drawn.items()},
            {camera: {n: float(np.median(v)) for n, v in named.items()} for camera, named in drawn.items()},
            alpha,
            len(highest),
        )


@dataclass
class _Start:
    """A moment whose prediction is still to be compared: latents, state, and the actions executed since, [k,A] each."""

    z_VND: Tensor
    state_S: Tensor
    executed: list[np.ndarray] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return sum(map(len, self.executed))


@dataclass
class _Episode:
    """State of one robot's episode."""

    starts: list[_Start] = field(default_factory=list)
    highest_Vs: np.ndarray | None = None
    compared: int = 0
    alarm: str | None = None


class Monitor:
    """Watch the episodes of robots ("slots"), each with a prediction from every observation on.

    Args:
        model: the model, for inference.
        normal: what is normal in its views.
        thresholds: thresholds of the scores; None: only measure them.
    """

    def __init__(self, model: Foresight, normal: Normal, thresholds: Thresholds | None) -> None:
        self.model, self.normal, self.thresholds = model, normal, thresholds
        self.cameras = model.embodiment.camera_names
        self.horizon = model.embodiment.chunk
        self._episodes: dict[Hashable, _Episode] = {}
        self._limit_Vs: np.ndarray = np.full((len(self.cameras), len(SCORES)), np.inf)
        if thresholds is not None:
            self._limit_Vs = np.array([[thresholds.limit[c][s] for s in SCORES] for c in self.cameras])

    def begin(self, slots: Sequence[Hashable]) -> None:
        """Begin an episode of these robots: forget pictures and alarms."""
        for slot in slots:
            self._episodes.pop(slot, None)

    def clear(self) -> None:
        """Forget all robots."""
        self._episodes.clear()

    def interrupt(self, slot: Hashable) -> None:
        """Forget the pictures of a robot, but not its alarm: it does something else than was told by `executed`."""
        if slot in self._episodes:
            self._episodes[slot].starts.clear()

    @torch.inference_mode()
    def look(self, slots: Sequence[Hashable], observation: Observation) -> None:
        """Score what these robots see, if they have executed a whole horizon since an observation, and remember it."""
        size, cameras = self.model.size, self.cameras
        images = [torch.from_numpy(np.ascontiguousarray(observation.images[name])) for name in cameras]
        pixels_BVCHW = torch.stack([resize(image.permute(0, 3, 1, 2), size) for image in images], dim=1)
        state_BS = torch.from_numpy(np.ascontiguousarray(observation.state, np.float32))
        later_BVND = self.model.encode(pixels_BVCHW)
        episodes = [self._episodes.setdefault(slot, _Episode()) for slot in slots]
        rows = [row for row, e in enumerate(episodes) if e.starts and e.starts[0].steps >= self.horizon]
        if rows:
            due = [episodes[row].starts.pop(0) for row in rows]
            z_BVND = torch.stack([start.z_VND for start in due])
            chunk_BKA = torch.from_numpy(np.stack([np.concatenate(start.executed) for start in due]))
            guess_BVND = self.model(z_BVND, torch.stack([start.state_S for start in due]), chunk_BKA)
            seen = (x if len(rows) == len(x) else x[rows] for x in (pixels_BVCHW, later_BVND))  # one robot: no copies
            scores_BVs = score(self.model, self.normal, z_BVND, guess_BVND, *seen)
            for row, scores_Vs in zip(rows, scores_BVs.numpy(), strict=True):
                self._note(episodes[row], scores_Vs)
        for episode, z_VND, state_S in zip(episodes, later_BVND, state_BS, strict=True):
            episode.starts.append(_Start(z_VND, state_S))

    def executed(self, slots: Sequence[Hashable], actions_BTA: np.ndarray) -> None:
        """Tell the actions that these robots execute before their next observation; the horizon is a multiple of T."""
        for slot, actions_TA in zip(slots, np.asarray(actions_BTA, np.float32), strict=True):
            for start in self._episodes[slot].starts if slot in self._episodes else ():
                start.executed.append(actions_TA.copy())
                assert start.steps <= self.horizon, "the horizon is a multiple of the executed steps"

    def alarm(self, slot: Hashable) -> str | None:
        """Return why this robot should hold, or None; an alarm stays until its next episode."""
        return self._episodes[slot].alarm if slot in self._episodes else None

    def noticed(self, slot: Hashable) -> dict[str, Any]:
        """Return the alarm, the number of comparisons, and the largest scores by camera, as plain values."""
        episode = self._episodes.get(slot, _Episode())
        highest: dict[str, dict[str, float]] = {}
        if episode.highest_Vs is not None:
            for camera, scores_s in zip(self.cameras, episode.highest_Vs.tolist(), strict=True):
                highest[camera] = dict(zip(SCORES, scores_s, strict=True))
        return {"alarm": episode.alarm, "compared": episode.compared, "highest": highest}

    def _note(self, episode: _Episode, scores_Vs: np.ndarray) -> None:
        episode.compared += 1
        before_Vs = episode.highest_Vs
        episode.highest_Vs = scores_Vs if before_Vs is None else np.maximum(before_Vs, scores_Vs)
        above_Vs = scores_Vs / self._limit_Vs
        view, which = np.unravel_index(int(np.argmax(above_Vs)), above_Vs.shape)
        if above_Vs[view, which] > 1 and episode.alarm is None:
            episode.alarm = (
                f"monitor: {self.cameras[view]}: {REASONS[SCORES[which]]} ({SCORES[which]} "
                f"{scores_Vs[view, which]:.3g}, normal up to {self._limit_Vs[view, which]:.3g})"
            )
