"""Parameters of the ROS 2 node, and the settings built from them. This file does not import ROS 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvla.configs.build import build
from cogvla.configs.load import load
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import BridgeSettings
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.ros.front_end import RosTopics
from cogvla.real_robot.serving.async_client import ClientSettings

PARAMETERS: dict[str, tuple[Any, str]] = {
    "server": ("ws://127.0.0.1:8000", "address of the policy server"),
    "api_key": ("", "API key of the policy server; empty if it needs none"),
    "certificate": ("", "PEM file to trust, for a server with a self-signed certificate"),
    "robot": ("tabletop", "limits and loop: a name in configs/robot, or a YAML file"),
    "embodiment": ("tabletop", "cameras and sizes: a name in configs/embodiment, or a YAML file"),
    "topics": ("tabletop", "topics: a name in configs/topics, or a YAML file"),
    "dry_run": (True, "send commands to ~/dry_run instead of the controller"),
    "instruction": ("", "instruction until the topic gives another one"),
    "diagnostics_s": (1.0, "seconds between two diagnostics"),
}
"""Parameter name -> default and description."""


@dataclass(frozen=True)
class Parts:
    """Checked settings of a bridge."""

    robot: RobotConfig
    embodiment: Embodiment
    topics: RosTopics
    client: ClientSettings
    settings: BridgeSettings


def parts(values: Mapping[str, Any]) -> Parts:
    """Build the settings of a bridge from the values of `PARAMETERS`; ValueError says which one is wrong."""
    embodiment = build(Embodiment, load("embodiment", values["embodiment"]), "embodiment")
    topics = build(RosTopics, load("topics", values["topics"]), "topics")
    topics.check(embodiment)
    robot = build(RobotConfig, load("robot", values["robot"]), "robot")
    robot.limits.check(embodiment)
    return Parts(
        robot,
        embodiment,
        topics,
        ClientSettings(
            robot=embodiment,
            api_key=values["api_key"] or None,
            certificate=Path(values["certificate"]) if values["certificate"] else None,
        ),
        BridgeSettings(dry_run=values["dry_run"], diagnostics_s=values["diagnostics_s"]),
    )
