"""Log the timing of the control loop and videos for each trial on a robot.

control.jsonl     one line per attempt: samples and counters of the control loop while the robot was driven
videos/           one video per trial, all cameras side by side
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogvla.envs.episodes import EpisodeResult
from cogvla.real_robot.bridge.bridge import Bridge, Tick
from cogvla.real_robot.bridge.live_view import VideoView
from cogvla.real_robot.control.measurements import Measurements
from cogvla.real_robot.trials.trials import STOPPED

_log = logging.getLogger(__name__)
CONTROL = "control.jsonl"
VIDEOS = "videos"


@dataclass(frozen=True)
class AttemptTiming:
    """Timing of one attempt, a line of `control.jsonl`. `Measurements` explains the samples and counters."""

    task: int
    initial_state: int
    error: str | None
    jitter_ms: tuple[float, ...]
    loop_ms: tuple[float, ...]
    inference_ms: tuple[float, ...]
    counts: dict[str, int]


class ControlLog:
    """Writer of `control.jsonl`; it also reads the attempts of earlier sessions.

    Args:
        folder: folder of the trials.
        resume: keep the attempts of earlier sessions; False deletes them.

    Attributes:
        attempts: all attempts, including those of earlier sessions.
    """

    def __init__(self, folder: Path, resume: bool = True) -> None:
        self._path = folder / CONTROL
        if not resume:
            self._path.unlink(missing_ok=True)
        self.attempts: list[AttemptTiming] = []
        text = self._path.read_text() if self._path.exists() else ""
        whole = text.rfind("\n") + 1  # a crash may have left half a line at the end
        if whole < len(text):
            os.truncate(self._path, len(text[:whole].encode()))
        for line in text[:whole].splitlines():
            self.attempts.append(_timing(json.loads(line)))
        self._before: Counter[str] = Counter()

    def begin(self, bridge: Bridge) -> None:
        """Start an attempt: drop what was measured while the robot waited."""
        measured = bridge.measurements
        for samples in (measured.jitter_ms, measured.loop_ms, measured.inference_ms):
            samples.clear()
        self._before = measured.counts.copy()

    def end(self, bridge: Bridge, result: EpisodeResult) -> None:
        """End an attempt and write it to disk before returning."""
        measured = bridge.measurements
        timing = AttemptTiming(
            result.task,
            result.initial_state,
            result.error,
            tuple(measured.jitter_ms),
            result.loop_ms,
            result.inference_ms,
            dict(measured.counts.copy() - self._before),  # a copy, because the loop goes on to count
        )
        self.attempts.append(timing)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(timing)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def measurements(self) -> Measurements:
        """Return the measurements of all attempts; `safety_stops` counts attempts that the control loop stopped."""
        total = Measurements()
        for attempt in self.attempts:
            total.jitter_ms.extend(attempt.jitter_ms)
            total.loop_ms.extend(attempt.loop_ms)
            total.inference_ms.extend(attempt.inference_ms)
            total.counts.update(attempt.counts)
            total.counts["safety_stops"] += (attempt.error or "").startswith(STOPPED)
        return total


def _timing(values: dict[str, Any]) -> AttemptTiming:
    for name in ("jitter_ms", "loop_ms", "inference_ms"):
        values[name] = tuple(values[name])
    return AttemptTiming(**values)


class Film:
    """Video recorder of attempts, one video each; pass `show` as a bridge's `on_tick`.

    Args:
        folder: folder of the trials; None records nothing.
        fps: frames per second, the control rate.
    """

    def __init__(self, folder: Path | None, fps: float) -> None:
        self._folder, self._fps = folder, fps
        self._path: Path | None = None
        self._view: VideoView | None = None

    def show(self, tick: Tick) -> None:
        """Add a tick to the video; returns quickly."""
        view = self._view
        if view is not None:
            view.show(tick)

    def begin(self) -> None:
        """Start the video of a new attempt."""
        if self._folder is not None:
            self._view = VideoView(self._folder / VIDEOS / f".running.{os.getpid()}.mp4", self._fps)
            self._view.__enter__()

    def end(self, result: EpisodeResult | None) -> str | None:
        """End the video, name it after the result and return its path.

        None without a result or without frames, or if it cannot be written: the trial counts without its video, too.
        """
        view, self._view = self._view, None
        if view is None or self._folder is None:
            return None
        try:
            view.__exit__(None, None, None)
            if result is None:
                view.path.unlink()
                return None
            outcome = "error" if result.error else "success" if result.success else "failure"
            path = view.path.with_name(f"task{result.task:02d}_trial{result.initial_state:02d}_{outcome}.mp4")
            os.replace(view.path, path)
        except ValueError:  # no frame: the attempt ended before it began
            return None
        except Exception:
            _log.exception("a trial has no video")
            return None
        return str(path)
