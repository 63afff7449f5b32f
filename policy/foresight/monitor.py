"""Notice while a robot moves that its cameras do not show what they should.

Once a whole horizon of actions is executed, five scores of each camera compare the picture with the one before them:

    still      predicted change / seen change; large if the picture is frozen. 0 where hardly any change is predicted
    place      mean of the four largest errors of patches, each in standard deviations of what the model expects;
               large if something moved that should not have
    error      mean error of the prediction; large if the camera was moved or covered
    look       how unusual the part of the picture is that the latents do not keep; needs no prediction
    turn       mean of the last two estimates of how far the camera is turned, in standard deviations; likewise

A score above its threshold is an alarm, which stays until the next episode. Thresholds are conformal (Vovk et al.
2005): the largest scores of n good episodes are n draws of what an undisturbed episode shows, so the k-th smallest of
them, k = ceil((n + 1)(1 - a)), is exceeded by a further such episode with a probability of at most a. The a of all
scores and cameras add up to `alpha`.

Shape legend: as in docs/architecture.md, with N patches of a view, D numbers of a latent, s scores, t numbers
of a turn, E episodes, T executed actions.
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

from cogvla.policy.engine.recording import Run, Tensors, record
from cogvla.policy.foresight.model import Foresight
from cogvla.policy.foresight.predictor import SMALL, Prediction
from cogvla.policy.foresight.windows import Windows
from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import Observation

SCORES = ("still", "place", "error", "look", "turn")
REASONS = {
    "still": "the picture stands still although the arm moves",
    "place": "something in the picture moved that should not have",
    "error": "the picture is not what should be seen after these actions",
    "look": "the picture looks unlike all that is known",
    "turn": "the camera is turned",
}
LEAST_MOTION = 0.1
"""Predicted change of a view (root mean square of its latents) below which `still` says nothing."""
LEAST_SEEN = 0.01
LAST = 2
"""Estimates of which `turn` is the mean."""
WORST = 4
"""Patches that `place` looks at."""


@dataclass(frozen=True)
class Normal:
    """Normal values of each view.

    Attributes:
        offset, spread: mean and standard deviation of `Prediction.unusual` of each patch of each view.
        look, look_spread: mean and standard deviation of the logarithm of what the latents lose of a view.
        turn, turn_spread: mean and standard deviation of the three numbers of the estimated turn of each camera.
    """

    offset: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...]
    look: tuple[float, ...]
    look_spread: tuple[float, ...]
    turn: tuple[tuple[float, ...], ...]
    turn_spread: tuple[tuple[float, ...], ...]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values as tensors [V,N], [V,N], [V], [V], [V,t], [V,t], made once."""
        return tuple(torch.tensor(getattr(self, each.name)) for each in fields(self))

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Foresight, windows: Windows, seed: int = 0, samples: int = 1024) -> Normal:
        """Measure on samples that the model was not trained on."""
        parts = []
        for rows_B in windows.draw(samples, seed).split(64):
            window = windows.gather(rows_B)
            z_BVND, later_BVND = model.encode(window.before_BVCHW), model.encode(window.after_BVCHW)
            unusual_BVN = model.predict(z_BVND, window.state_BS, window.chunk_BKA).unusual(later_BVND)
            parts.append((unusual_BVN, _lost(model, window.after_BVCHW, later_BVND), model.turn(window.after_BVCHW)))
        values: list[Any] = []
        for of_all in zip(*parts, strict=True):
            x = torch.cat(of_all)
            values += [x.mean(0), x.std(0).clamp(min=SMALL)]
        return cls(*(_tuples(each.tolist()) for each in values))


def score(
    model: Foresight,
    normal: Normal,
    z_BVND: Tensor,
    prediction: Prediction,
    pixels_BVCHW: Tensor,
    later_BVND: Tensor,
    turn_BVt: Tensor,
) -> Tensor:
    """Return the scores [B,V,s] of pictures, in the order of `SCORES`.

    Args:
        model: the model.
        normal: what is normal.
        z_BVND: latents before the chunk.
        prediction: what was predicted for after it.
        pixels_BVCHW: pictures after it.
        later_BVND: their latents.
        turn_BVt: mean of the last estimates of the cameras' turns.
    """
    guess_BVND = prediction.latents_BVND
    offset_VN, spread_VN, look_V, look_spread_V, turn_Vt, turn_spread_Vt = normal.tensors
    predicted_BV, seen_BV = ((x - z_BVND).square().mean((-1, -2)).sqrt() for x in (guess_BVND, later_BVND))
    still_BV = torch.where(predicted_BV > LEAST_MOTION, predicted_BV / (seen_BV + LEAST_SEEN), 0.0)
    unusual_BVN = (prediction.unusual(later_BVND) - offset_VN) / spread_VN
    place_BV = unusual_BVN.topk(min(WORST, unusual_BVN.shape[-1])).values.mean(-1)
    error_BV = (guess_BVND - later_BVND).square().mean((-1, -2))
    look_BV = ((_lost(model, pixels_BVCHW, later_BVND) - look_V) / look_spread_V).abs()
    turned_BV = ((turn_BVt - turn_Vt) / turn_spread_Vt).square().sum(-1).sqrt()
    return torch.stack((still_BV, place_BV, error_BV, look_BV, turned_BV), dim=-1)


def _tuples(values: Any) -> Any:
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


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
        execute_steps: number of actions of each chunk that were executed in them; None: not known.
    """

    limit: Mapping[str, Mapping[str, float]]
    median: Mapping[str, Mapping[str, float]]
    alpha: float
    episodes: int
    execute_steps: int | None = None

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
    turns_Vt: list[Tensor] = field(default_factory=list)
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
        self._recorded: dict[str, Run] = {}
        self._limit_Vs: np.ndarray = np.full((len(self.cameras), len(SCORES)), np.inf)
        if thresholds is not None:
            self._limit_Vs = np.array([[thresholds.limit[c][s] for s in SCORES] for c in self.cameras])

    def begin(self, slots: Sequence[Hashable]) -> None:
        """Begin an episode of these robots: forget pictures and alarms."""
        for slot in slots:
            self._episodes.pop(slot, None)

    def warm_up(self) -> None:
        """Record what one robot needs, so that it does not wait for it while it moves; forgets all robots."""
        robot = self.model.embodiment
        for _ in range(2):
            self.look([None], robot.fake_observation())
            self.executed([None], np.zeros((1, self.horizon, robot.action_dim), np.float32))
        self.clear()

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
        later_BVND, turn_BVt = self._run("see", {"pixels": pixels_BVCHW})
        episodes = [self._episodes.setdefault(slot, _Episode()) for slot in slots]
        for episode, turn_Vt in zip(episodes, turn_BVt, strict=True):
            episode.turns_Vt = [*episode.turns_Vt[1 - LAST :], turn_Vt]
        rows = [row for row, e in enumerate(episodes) if e.starts and e.starts[0].steps >= self.horizon]
        if rows:
            due = [episodes[row].starts.pop(0) for row in rows]
            whole = len(rows) == len(slots)  # one robot: no copies
            seen_BVCHW, seen_BVND = (x if whole else x[rows] for x in (pixels_BVCHW, later_BVND))
            values = {
                "before": torch.stack([start.z_VND for start in due]),
                "state": torch.stack([start.state_S for start in due]),
                "chunk": torch.from_numpy(np.stack([np.concatenate(start.executed) for start in due])),
                "pixels": seen_BVCHW,
                "later": seen_BVND,
                "turn": torch.stack([torch.stack(episodes[row].turns_Vt).mean(0) for row in rows]),
            }
            scores_BVs = self._run("compare", values)
            for row, scores_Vs in zip(rows, scores_BVs.numpy(), strict=True):
                self._note(episodes[row], scores_Vs)
        for episode, z_VND, state_S in zip(episodes, later_BVND, state_BS, strict=True):
            episode.starts.append(_Start(z_VND, state_S))

    def _see(self, given: Tensors) -> tuple[Tensor, Tensor]:
        """Return latents and estimated turns of pictures."""
        return self.model.encode(given["pixels"]), self.model.turn(given["pixels"])

    def _compare(self, given: Tensors) -> Tensor:
        """Return the scores of pictures, after a prediction from those before."""
        prediction = self.model.predict(given["before"], given["state"], given["chunk"])
        pictures = given["pixels"], given["later"], given["turn"]
        return score(self.model, self.normal, given["before"], prediction, *pictures)

    def _run(self, name: str, given: Tensors) -> Any:
        """Run a function of a batch; for one robot it is recorded, which takes a third of the time away."""
        function: Run = {"see": self._see, "compare": self._compare}[name]
        if len(given["pixels"]) > 1:
            return function(given)
        if name not in self._recorded:
            others = {name: 255 - x if x.dtype == torch.uint8 else 0.5 * x + 0.1 for name, x in given.items()}
            self._recorded[name] = record("trace", function, given, others)
        return self._recorded[name](given)

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
        above_Vs = scores_Vs / np.maximum(self._limit_Vs, np.finfo(np.float32).tiny)  # `still` may always be 0
        view, which = np.unravel_index(int(np.argmax(above_Vs)), above_Vs.shape)
        if above_Vs[view, which] > 1 and episode.alarm is None:
            episode.alarm = (
                f"monitor: {self.cameras[view]}: {REASONS[SCORES[which]]} ({SCORES[which]} "
                f"{scores_Vs[view, which]:.3g}, normal up to {self._limit_Vs[view, which]:.3g})"
            )
