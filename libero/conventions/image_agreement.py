"""Compare recorded with simulated images: orientation, camera and colour order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from cogvla.libero.conventions.declared import Finding
from cogvla.libero.conventions.recorded_episodes import Recordings
from cogvla.libero.conventions.replayed_episodes import PICTURED_STEPS, ReplayTrace

AS_IT_IS = "as it is"
TURNS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    AS_IT_IS: lambda image: image,
    "rotated 180": lambda image: image[::-1, ::-1],
    "flipped vertically": lambda image: image[::-1],
    "flipped horizontally": lambda image: image[:, ::-1],
}
THUMBNAIL = 32
CLEARLY, UNLIKE = 0.1, 0.4
"""Correlations: least advantage of another orientation, and least value for two images of the same thing."""


def images(recordings: Recordings, traces: Sequence[ReplayTrace]) -> list[Finding]:
    """Check the images; return one finding for each camera."""
    pairs = {camera: _pairs(recordings, traces, camera) for camera in recordings.cameras}
    return [_image_finding(camera, pairs, recordings.turn) for camera in recordings.cameras]


def _pairs(recordings: Recordings, traces: Sequence[ReplayTrace], camera: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return pairs (recorded, simulated) of thumbnails float64 [32,32,3]."""
    found = []
    for trace in traces:
        steps = [step for step in PICTURED_STEPS if step in trace.images[camera]]
        recorded = recordings.images(trace.episode, camera, steps)
        found += [
            (_thumbnail(a), _thumbnail(trace.images[camera][step])) for a, step in zip(recorded, steps, strict=True)
        ]
    return found


def _thumbnail(image_HWC: np.ndarray) -> np.ndarray:
    small = Image.fromarray(image_HWC).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float64)


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of two thumbnails' brightness; 0 for an image without contrast."""
    bright_a, bright_b = (image.mean(axis=2) - image.mean() for image in (a, b))
    size = float(np.sqrt((bright_a**2).sum() * (bright_b**2).sum()))
    return float((bright_a * bright_b).sum()) / size if size > 0 else 0.0


def _image_finding(camera: str, pairs: Mapping[str, list[tuple[np.ndarray, np.ndarray]]], expected: str) -> Finding:
    """Find the turn that makes the simulator's images agree best with the recorded ones, and judge it."""
    check = f"images of {camera}"
    agreement = {name: _mean(_likeness(a, turn(b)) for a, b in pairs[camera]) for name, turn in TURNS.items()}
    others = {
        other: max(
            _mean(_likeness(a, turn(b)) for (a, _), (_, b) in zip(pairs[camera], seen, strict=True))
            for turn in TURNS.values()
        )
        for other, seen in pairs.items()
        if other != camera
    }
    best = max(agreement, key=lambda name: agreement[name])
    colours = _mean(float(np.sum(_red(a) * TURNS[best](_red(b)))) for a, b in pairs[camera])
    measured: dict[str, Any] = {"agreement": agreement, "with other cameras": others, "red against blue": colours}
    said = f"agreement {agreement[best]:.2f}"
    for other, value in others.items():
        if value > agreement[best] + CLEARLY and agreement[best] < UNLIKE + CLEARLY:
            text = f"they look like images of {other} (agreement {value:.2f}, with {camera} {agreement[best]:.2f})"
            return Finding(check, "mismatch", text, f"exchange {camera} and {other} in data.cameras", measured)
    if agreement[best] < UNLIKE:
        text = f"they look like the simulator's in no orientation ({said}, {best})"
        advice = "the scene, task order, camera or crop may differ: look at both images"
        return Finding(check, "mismatch", text, advice, measured)
    if best != expected and agreement[best] > agreement[expected] + CLEARLY:
        found = "oriented as in the simulator" if best == AS_IT_IS else best
        text = f"they are {found} ({said}); {expected}: {agreement[expected]:.2f}"
        return Finding(check, "mismatch", text, _turn_advice(best, expected), measured)
    if colours < 0:
        text = "red and blue are exchanged"
        return Finding(check, "mismatch", text, "the images are BGR: reverse their last axis", measured)
    where = "oriented as in the simulator" if expected == AS_IT_IS else f"{expected}, as in all files of this kind"
    return Finding(check, "ok", f"{where}, {said}", measured=measured)


def _turn_advice(best: str, expected: str) -> str:
    if expected != AS_IT_IS:
        return f"images in files of this kind are {expected}: were these converted already?"
    turn = {"rotated 180": "image[::-1, ::-1]", "flipped vertically": "image[::-1]"}.get(best, "image[:, ::-1]")
    return f"policies see images oriented as in published training data: store {turn} instead"


def _red(image_HWC: np.ndarray) -> np.ndarray:
    return (image_HWC[..., :1] - image_HWC[..., 2:]) / 255.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else float("nan")
