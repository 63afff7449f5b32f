"""Check the saved pipelines around a policy of lerobot: whether all of their files are there and fit together."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cogvla.files import read_object

PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")
USED = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
"""Mode of lerobot's normalisation -> the statistics that it reads."""


def saved_steps(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the steps of each saved pipeline.

    Raises:
        ValueError: a file is damaged, or names one that is not there.
    """
    found = {}
    for name in PROCESSORS:
        steps = read_object(folder / name, "give another checkpoint").get("steps")
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise ValueError(f"{folder / name} has no list of steps: give another checkpoint")
        lost = [str(step["state_file"]) for step in steps if step.get("state_file")]
        lost = [file for file in lost if not (folder / file).is_file()]
        if lost:
            raise ValueError(f"{folder} has no {', '.join(lost)}, which {name} needs: the checkpoint is incomplete")
        found[name] = steps
    return found


def check_registered(steps: Mapping[str, list[dict[str, Any]]], folder: Path) -> None:
    """Raise ValueError for a step that is not registered, after lerobot has tried to load it."""
    from lerobot.processor import ProcessorStepRegistry

    known = ProcessorStepRegistry.list()
    for name, saved in steps.items():
        if unknown := [
            str(step["registry_name"]) for step in saved if step.get("registry_name", known[0]) not in known
        ]:
            raise ValueError(
                f"{folder / name} has the step {', '.join(unknown)}, which lerobot {version('lerobot')} does not know: "
                "another version or a plugin saved it; use that one"
            )


def check_statistics(config: Any, before: Any, after: Any) -> None:
    """Check that the statistics are there, which lerobot passes over where they are not, and those of one checkpoint.

    Args:
        config: configuration of the policy.
        before: its preprocessor.
        after: its postprocessor.

    Raises:
        ValueError: they are missing, not finite, or differ between the two pipelines.
    """
    actions = []
    for pipeline, features in ((before, config.input_features), (after, config.output_features)):
        for step in pipeline.steps:
            if not (modes := getattr(step, "norm_map", None)):
                continue
            saved, chosen = step.state_dict(), step.normalize_observation_keys
            actions.append({name: value for name, value in saved.items() if name.startswith("action.")})
            for key, feature in features.items():
                names = USED.get(getattr(modes.get(feature.type), "name", ""), ())
                for name in names if chosen is None or key in chosen or key == "action" else ():
                    value = saved.get(f"{key}.{name}")
                    if value is None or not value.isfinite().all():
                        wrong = "no" if value is None else "NaN or infinite numbers as"
                        raise ValueError(f"{type(step).__name__} has {wrong} {name} of {key}")
    for one, other in pairwise(actions):
        if any(name in other and not torch.equal(value, other[name]) for name, value in one.items()):
            raise ValueError(f"{' and '.join(PROCESSORS)} are of two checkpoints: other statistics of action")
