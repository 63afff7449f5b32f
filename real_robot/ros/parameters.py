"""Parameters of the lifecycle node, and the settings built from them. This file does not import ROS 2."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import BridgeSettings
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.real_robot.serving.async_client import ClientSettings

API_KEY = "COGVLA_API_KEY"
PARAMETERS: dict[str, tuple[Any, str]] = {
    "server": ("ws://127.0.0.1:8000", "address of the policy server"),
    "api_key_file": ("", f"file with the API key of the policy server; empty: the variable {API_KEY}, or no key"),
    "certificate": ("", "PEM file to trust, for a server with a self-signed certificate"),
    "jpeg_quality": (0, "1 to 95: send images to the server as JPEG, for slow networks; 0: raw, in the policy's size"),
    "robot": ("tabletop", "limits and loop: a name in configs/robot, or a YAML file"),
    "embodiment": ("tabletop", "cameras and sizes: a name in configs/embodiment, or a YAML file"),
    "topics": ("tabletop", "topics: a name in configs/topics, or a YAML file"),
    "dry_run": (True, "send commands to ~/dry_run instead of the controller"),
    "instruction": ("", "instruction until the topic gives another one"),
    "diagnostics_s": (1.0, "seconds between two diagnostics"),
}
"""Parameter name -> default and description. All are read when the node is configured."""
ROS_2 = ("use_sim_time", "start_type_description_service", "qos_overrides.")
"""Beginnings of the names of parameters that ROS 2 itself reads."""


@dataclass(frozen=True)
class Parts:
    """Checked settings of a bridge."""

    server: str
    robot: RobotConfig
    embodiment: Embodiment
    topics: RosTopics
    client: ClientSettings
    settings: BridgeSettings
    instruction: str


def typed(name: str, value: Any) -> Any:
    """Return the value of a parameter in its type: YAML reads `1` as an integer, and `123` as no text.

    Raises:
        ValueError: it has no such type.
    """
    default = PARAMETERS[name][0]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"parameter {name} must be true or false, got {value!r}")
        return value
    if isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"parameter {name} must be a whole number, got {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"parameter {name} must be a {'number' if isinstance(default, float) else 'text'}: {value!r}")
    if isinstance(default, str):
        return str(value)
    if isinstance(value, str):
        raise ValueError(f"parameter {name} must be a number, got {value!r}")
    return float(value)


def check_names(given: list[str]) -> None:
    """Raise ValueError if a parameter has no known name: ROS 2 would ignore it."""
    unknown = sorted(name for name in given if name not in PARAMETERS and not name.startswith(ROS_2))
    if "api_key" in unknown:
        raise ValueError(
            f"api_key is no parameter, because every node could read it: set the variable {API_KEY}, or api_key_file"
        )
    if unknown:
        raise ValueError(f"there is no parameter {', '.join(unknown)}; there are {', '.join(PARAMETERS)}")


def parts(values: Mapping[str, Any]) -> Parts:
    """Build the settings of a bridge from the values of `PARAMETERS`; ValueError says which one is wrong."""
    values = {name: typed(name, values[name]) for name in PARAMETERS}
    embodiment = build(Embodiment, load("embodiment", values["embodiment"]), "embodiment")
    topics = build(RosTopics, load("topics", values["topics"]), "topics")
    robot = build(RobotConfig, load("robot", values["robot"]), "robot")
    robot.limits.check(embodiment)
    topics.check(embodiment, robot.limits)
    certificate = Path(values["certificate"]) if values["certificate"] else None
    return Parts(
        values["server"],
        robot,
        embodiment,
        topics,
        ClientSettings(
            robot=embodiment,
            api_key=_api_key(values["api_key_file"]),
            certificate=certificate,
            jpeg_quality=values["jpeg_quality"] or None,
        ),
        BridgeSettings(dry_run=values["dry_run"], diagnostics_s=values["diagnostics_s"]),
        values["instruction"],
    )


def _api_key(file: str) -> str | None:
    if not file:
        return os.environ.get(API_KEY) or None
    try:
        key = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"api_key_file {file!r} cannot be read: {error}") from None
    if not key or "\n" in key:
        raise ValueError(f"api_key_file {file!r} must hold the API key on one line")
    return key
