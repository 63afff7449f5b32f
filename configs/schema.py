"""Defaults of the dataclasses that YAML files configure, read from their sources.

They are read and not imported, because importing them imports torch, and a command's `--help` should not wait for that.
A field's default must be a literal, a constant of the same file, or another dataclass (`field(default_factory=...)`).
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MISSING = "???"
"""How YAML and OmegaConf write a value that must be given."""
DATACLASSES: dict[str, tuple[str, ...]] = {
    "augmentation": ("policy.inputs.augmentation.AugmentationConfig",),
    "counting": ("policy.cost.flops.Counting",),
    "data": ("policy.data.config.DataConfig",),
    "embodiment": ("policy.interface.Embodiment",),
    "engine": ("policy.engine.engine.EngineConfig",),
    "finetune": ("policy.training.adapters.FinetuneConfig",),
    "lerobot": ("real_robot.lerobot.robot.LeRobotSettings",),
    "libero": ("libero.env.LiberoSettings",),
    "objective": ("policy.training.objective.ObjectiveConfig",),
    "policy": tuple(f"policy.model.config.{name}" for name in ("VisionConfig", "LanguageConfig", "ActionHeadConfig")),
    "protocol": ("envs.evaluation.protocol.EvaluationProtocol",),
    "request_keys": ("real_robot.serving.request.RequestKeys",),
    "robot": ("real_robot.control.settings.RobotConfig",),
    "ros": ("real_robot.ros.network.RosSettings",),
    "router": ("routing.router.RouterConfig",),
    "routing": ("policy.model.config.RoutingConfig",),
    "teleop": ("real_robot.lerobot.teleoperator.TeleopSettings",),
    "topics": ("real_robot.ros.topics.RosTopics",),
    "training": ("policy.training.config.TrainingConfig",),
    "wordings": ("policy.training.wordings.InstructionAugmentation",),
    "": (
        "policy.export.export.ExportConfig",
        "policy.foresight.fitting.FittingConfig",
        "policy.foresight.model.ForesightConfig",
        "real_robot.bridge.bridge.BridgeSettings",
        "real_robot.serving.batching.BatchSettings",
        "real_robot.serving.server.ServerSettings",
    ),
}
"""Group of configs -> dataclasses that its files build on by name, as in `defaults: [TrainingConfig]`.

Those of the group "" are parts of the configuration of whole commands.
"""


def defaults(dotted: str) -> dict[str, Any]:
    """Return the defaults of a dataclass, e.g. `routing.router.RouterConfig`, as nested plain data in its order.

    A field without a default is `MISSING`; one that is a dataclass itself is a mapping.

    Raises:
        ValueError: there is no such class, or a default is neither of what the top of this file lists.
    """
    module = dotted.rpartition(".")[0]
    found: dict[str, Any] = {}
    for node in _class(dotted).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            part = _part(module, node)
            found[node.target.id] = _default(module, node.value, dotted) if part is None else defaults(part)
    return found


def summary(dotted: str) -> str:
    """Return the first line of the docstring of a dataclass."""
    return (ast.get_docstring(_class(dotted)) or "").partition("\n")[0]


def attributes(dotted: str) -> dict[str, str]:
    """Return the documentation of each field of a dataclass, by its dotted name; fields of its parts are included."""
    module = dotted.rpartition(".")[0]
    node = _class(dotted)
    section = (ast.get_docstring(node) or "").partition("Attributes:\n")[2]
    found = {
        name.strip(): " ".join(entry[2].split())
        for entry in re.finditer(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        for name in entry[1].split(",")
    }
    for field in node.body:
        part = _part(module, field) if isinstance(field, ast.AnnAssign) else None
        if part is not None and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            found |= {f"{field.target.id}.{name}": text for name, text in attributes(part).items()}
    return found


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())


def _class(dotted: str) -> ast.ClassDef:
    module, _, name = dotted.rpartition(".")
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise ValueError(f"there is no class {name} in {module}")


def _part(module: str, node: ast.AnnAssign) -> str | None:
    """Return the dataclass that a field holds, from its `default_factory`; from its annotation if it has no default."""
    kind = node.annotation if node.value is None else _keyword(node.value, "default_factory")
    if not isinstance(kind, ast.Name):
        return None
    for other in _tree(module).body:
        if isinstance(other, ast.ClassDef) and other.name == kind.id:
            return f"{module}.{kind.id}"
        if isinstance(other, ast.ImportFrom) and any(alias.name == kind.id for alias in other.names):
            prefix, _, origin = (other.module or "").partition(".")
            return f"{origin}.{kind.id}" if prefix == "cogvla" else None
    return None


def _default(module: str, value: ast.expr | None, dotted: str) -> Any:
    if isinstance(value, ast.Call):
        factory = _keyword(value, "default_factory")
        if isinstance(factory, ast.Name) and factory.id in ("dict", "list", "tuple"):
            return {} if factory.id == "dict" else []
        value = _keyword(value, "default")
    if value is None:
        return MISSING
    if isinstance(value, ast.Name):
        value = _constant(module, value.id, dotted)
    try:
        literal = ast.literal_eval(value)
    except ValueError as error:
        raise ValueError(f"{dotted}: the default {ast.unparse(value)} is no literal") from error
    return list(literal) if isinstance(literal, tuple) else literal


def _constant(module: str, name: str, dotted: str) -> ast.expr:
    for node in _tree(module).body:
        if not isinstance(node, ast.Assign):
            continue
        (target,) = node.targets
        if isinstance(target, ast.Name) and target.id == name:
            return node.value
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            for element, value in zip(target.elts, node.value.elts, strict=True):
                if isinstance(element, ast.Name) and element.id == name:
                    return value
    raise ValueError(f"{dotted}: the default {name} is no constant of {module}")


def _keyword(call: ast.expr, name: str) -> ast.expr | None:
    assert isinstance(call, ast.expr)
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return next((keyword.value for keyword in keywords if keyword.arg == name), None)
