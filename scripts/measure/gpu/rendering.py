"""Part `rendering`: frames per second of the tabletop's cameras through EGL, if MuJoCo is installed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from cogvla.policy.cost.not_measured import NotMeasuredError
from cogvla.scripts.measure.gpu.journal import Row
from cogvla.scripts.measure.gpu.runner import Task
from cogvla.scripts.measure.gpu.settings import Settings

COLUMNS = {"size": "pixels", "frames_per_s": "frames/s", "p50": "p50 ms"}
CAMERAS = ("agentview", "wrist")
SUITE, SIZES, FRAMES, REHEARSED_FRAMES = "tabletop_object", (128, 224), 500, 5


def tasks(settings: Settings) -> Mapping[str, Task]:
    """Return a task for each size."""
    return {f"{size} pixels": partial(render, settings, size) for size in SIZES}


def render(settings: Settings, size: int) -> Iterable[Row]:
    """Yield the rate of each camera.

    Raises:
        NotMeasuredError: MuJoCo or gymnasium is not installed.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from cogvla.envs.suite import get_suite

        env: Any = get_suite(SUITE).make(image_size=size)
    except ImportError as error:
        raise NotMeasuredError(f"{error}; docs/gpu.md says how to carry MuJoCo") from error
    env.reset(seed=0)
    for camera in CAMERAS:
        times = _times(partial(env.unwrapped.render_camera, camera, size, size), settings)
        yield {"row": camera, "size": size, "frames_per_s": len(times) / sum(times), "p50": 1e3 * _middle(times)}
    env.close()


def _times(draw: Any, settings: Settings) -> list[float]:
    draw()  # the first one makes the context
    times = []
    for _ in range(REHEARSED_FRAMES if settings.rehearse else FRAMES):
        started = time.perf_counter()
        draw()  # returns the picture on the host
        times.append(time.perf_counter() - started)
    return times


def _middle(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]
