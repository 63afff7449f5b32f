"""Compare what must stay the same when a run resumes: data, robot, objective and vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from cogvla.policy.checkpoint import weights_hash
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.inputs.augmentation import AugmentationConfig
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.text_encoder import TextEncoder
from cogvla.policy.interface import Embodiment
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.policy.training.wordings import InstructionAugmentation, Wordings

SETTINGS: Mapping[str, type] = {
    "objective": ObjectiveConfig,
    "embodiment": Embodiment,
    "training.augmentation": AugmentationConfig,
    "training.wordings": InstructionAugmentation,
}
"""Parts of an identity -> the dataclass with their defaults."""

REMOVED = {"objective.foresight": 0.0, "objective.foresight_target": "future"}
"""Settings that earlier versions had -> the value with which they changed nothing."""
POLICIES = {"teacher": "distillation", "blind": "prior"}
"""Fields of `ObjectiveConfig` that name another policy, whose place does not matter -> the field that turns it on."""
PLACES = tuple(f"objective.{name}" for name in POLICIES)
"""Names of these places, which earlier versions saved."""
ADDED = ("weights of the base", "weights of objective.teacher", "training.augmentation.")
"""Beginnings of the names of values that earlier versions did not save: nothing is known of them then."""
HASHED = ("data set", "vocabulary", "weights", "wordings", "text encoder")
"""Beginnings of the names of values that are fingerprints."""
FINISHED = ("steps", "learning_rate", "warmup_steps", "optimiser", "weight_decay", "clip_norm", "ema_decay")
"""Fields of `TrainingConfig` that may change while a run goes on (but `optimiser`), but not once it is finished."""


def identity(
    data: DemonstrationData,
    preprocessor: Preprocessor,
    objective: ObjectiveConfig,
    wordings: Wordings,
    augmentation: AugmentationConfig,
    base: str | None,
) -> dict[str, Any]:
    """Return the identity of a run as plain data: values where they are short, else fingerprints of the content.

    The vocabulary is that of the data's instructions: their ids. `base` is what the weights began with, as a
    fingerprint or a name; None: random numbers.
    """
    ids_BT, mask_BT = preprocessor.tokenizer.encode(data.instructions)
    ids = hashlib.sha256(f"{ids_BT.tolist()} {mask_BT.tolist()}".encode()).hexdigest()[:16]
    found: dict[str, Any] = {
        "data set": data.content(),
        "embodiment": asdict(preprocessor.embodiment),
        "objective": {name: value for name, value in asdict(objective).items() if name not in POLICIES},
        "vocabulary": ids,
        "training.augmentation": asdict(augmentation),
        "weights of the base": base,
    }
    if data.each:
        found["data.statistics"] = "each"
    if isinstance(preprocessor.tokenizer, TextEncoder):
        found["text encoder"] = preprocessor.tokenizer.fingerprint
    if wordings.config.share:
        found["training.wordings"] = asdict(wordings.config)
        found["wordings of the instructions"] = wordings.fingerprint()
    for name, strength in POLICIES.items():
        if getattr(objective, strength):
            found[f"weights of objective.{name}"] = weights_hash(find_checkpoint(getattr(objective, name)))
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two results of `identity`, one text for each value.

    A setting that one of the versions does not have counts as its default, which changes nothing.
    """
    was, has = _flat(before), _flat(now)
    was = {
        name: value
        for name, value in was.items()
        if name in has or (REMOVED.get(name, MISSING) != value and name not in PLACES)
    }
    for name, kind in SETTINGS.items():
        if name in before:
            was |= {key: value for key, value in _flat(_defaults(kind), f"{name}.").items() if key not in was}
    found = []
    if (sets := _sets(before)) != _sets(now):
        found.append(f"the data sets were {', '.join(sets) or 'one'}, are {', '.join(_sets(now)) or 'one'}")
        was, has = ({n: v for n, v in side.items() if not n.startswith("data set.")} for side in (was, has))
    for name in (*was, *(name for name in has if name not in was and not name.startswith(ADDED))):
        old, new = was.get(name), has.get(name)
        if old != new:
            hashed = name.startswith(HASHED) and not name.endswith(".weight")
            found.append(f"{name} differs" if hashed else f"{name} was {old}, is {new}")
    return found


def _sets(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the data sets of a mixture; one data set has none."""
    return [name for name, content in values.get("data set", {}).items() if isinstance(content, Mapping)]


def _defaults(kind: type) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested values by dotted name; tuples and lists are the same."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        else:
            found[name] = _lists(value)
    return found


def _lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_lists(part) for part in value]
    return _flat(value) if isinstance(value, Mapping) else value
