"""Content of the report of a perturbed evaluation: first images without and with the perturbation, and drawn values."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from cogvla.envs.episodes import EpisodeResult, EpisodeSpec
from cogvla.envs.evaluation.watched_policy import WatchedPolicy
from cogvla.envs.rollout.rollout import RolloutSettings, rollout
from cogvla.envs.suite import Suite
from cogvla.policy.interface import Observation, Policy

PICTURE = "perturbation.png"
GAP = 4
SHOWN = 6
"""Largest number of different texts that are listed."""


def first_images(
    policy: Policy, suite: Suite, spec: EpisodeSpec, settings: RolloutSettings, workers: int
) -> bytes | None:
    """Return a PNG of what the policy sees first: for each camera the image without, and with the perturbation.

    `workers`: 1 or 0, so that the two episodes are played in order. None: one of them could not be started.
    """
    seen: list[Observation] = []
    watched = WatchedPolicy(policy, seen.append)
    both = [replace(spec, perturbation=None), spec]
    list(rollout(watched, suite, both, workers=workers, settings=replace(settings, max_steps=1)))
    if len(seen) != len(both):
        return None
    clean, perturbed = (observation.images for observation in seen)
    height = max(image.shape[1] for image in clean.values())
    images = [Image.fromarray(views[name][0]) for name in clean for views in (clean, perturbed)]
    images = [image.resize((round(image.width * height / image.height), height)) for image in images]
    sheet = Image.new("RGB", (sum(image.width + GAP for image in images) - GAP, height), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (sum(other.width + GAP for other in images[:index]), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def drawn_values(episodes: Sequence[EpisodeResult]) -> dict[str, str]:
    """Return what the episodes drew: name -> range of its numbers, or its texts with their counts."""
    found: dict[str, list[Any]] = {}
    for episode in episodes:
        for name, value in (episode.perturbation or {}).items():
            found.setdefault(name, []).extend(_leaves(value))
    return {name: _summary(values) for name, values in found.items() if values}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _summary(values: Sequence[Any]) -> str:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return f"{min(values):.3g} to {max(values):.3g}"
    counts = Counter(map(str, values)).most_common()
    more = f"; {len(counts) - SHOWN} others" if len(counts) > SHOWN else ""
    return "; ".join(f"{text} ({count}×)" for text, count in counts[:SHOWN]) + more
