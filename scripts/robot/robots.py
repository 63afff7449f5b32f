"""Open the robot and the policy of a command's configuration, for a `Bridge`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cogvla.configs.build import build
from cogvla.policy.checkpoint_folder import is_exported
from cogvla.policy.hub.download import find_checkpoint
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import AsksPolicy, FrontEnd
from cogvla.real_robot.control.control_loop import ControlLoop
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.ros.network import RosSettings
from cogvla.real_robot.serving.async_client import AsyncPolicyClient, ClientSettings
from cogvla.real_robot.serving.local_policy import LocalPolicy
from cogvla.real_robot.serving.reconnecting import ReconnectingClient
from cogvla.scripts.command import plain
from cogvla.scripts.policies import LEROBOT, open_any_policy

if TYPE_CHECKING:
    from cogvla.real_robot.ros.rclpy_node import OwnNode

TRANSPORTS = ("rclpy", "lerobot")
HERE, THERE = ("statistics", "device", "threads"), ("certificate", "jpeg_quality")
"""Keys for a policy in this process, and those for its server."""


def open_front_end(
    config: DictConfig, embodiment: Embodiment, robot: RobotConfig, stack: ExitStack
) -> tuple[FrontEnd, Any]:
    """Connect to the robot by `config.transport`; return its front end, and its ROS 2 node or None.

    Raises:
        ValueError: the transport is unknown or not installed, or the robot does not fit the embodiment or the limits.
        OSError: the robot cannot be reached.
    """
    ControlLoop(embodiment, robot.limits, robot.loop)  # which refuses what does not fit, before anything is connected
    if config.transport == "lerobot":
        from cogvla.real_robot.lerobot.robot import LeRobotFrontEnd, LeRobotSettings, connected, make_robot

        settings = build(LeRobotSettings, plain(config.lerobot), "lerobot")
        settings.check(embodiment, robot.limits)
        arm = make_robot(settings)
        settings.check_robot(arm, embodiment)  # before anything is connected
        return LeRobotFrontEnd(stack.enter_context(connected(arm)), settings, embodiment, robot.limits), None
    if config.transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {config.transport!r}")
    from cogvla.real_robot.ros.front_end import RosFrontEnd
    from cogvla.real_robot.ros.topics import RosTopics

    node = ros_node(config.transport, config.node, plain(config.ros))
    front_end = RosFrontEnd(node, build(RosTopics, plain(config.topics), "topics"), embodiment, robot.limits)
    stack.enter_context(node)
    return front_end, node


def open_teleoperator(config: DictConfig, embodiment: Embodiment) -> tuple[Any, tuple[str, ...]]:
    """Build the teleoperator of `config.teleop`; return it and the keys [A] of its action, or None and no keys.

    Raises:
        ValueError: lerobot does not know it, or its actions do not fit the robot's.
    """
    from cogvla.real_robot.lerobot.robot import LeRobotSettings, make_robot
    from cogvla.real_robot.lerobot.teleoperator import TeleopSettings, check_units, make_teleoperator

    settings = build(TeleopSettings, plain(config.teleop), "teleop")
    if settings.type is None:
        return None, ()
    teleop = make_teleoperator(settings)
    keys = settings.keys(teleop, recorded_names(config, embodiment).get("action", ()), embodiment)
    if config.transport == "lerobot":
        check_units(teleop, make_robot(build(LeRobotSettings, plain(config.lerobot), "lerobot")))
    return teleop, keys


def recorded_names(config: DictConfig, embodiment: Embodiment) -> dict[str, tuple[str, ...]]:
    """Return the names of the numbers in a recording's features: the keys or joints of the robot."""
    if config.transport == "lerobot":
        from cogvla.real_robot.lerobot.robot import LeRobotSettings

        return build(LeRobotSettings, plain(config.lerobot), "lerobot").names
    from cogvla.real_robot.ros.topics import RosTopics

    return build(RosTopics, plain(config.topics), "topics").names(embodiment)


def ros_node(transport: str, name: str, settings: Mapping[str, Any]) -> OwnNode:
    """Return a ROS 2 node that is not started yet; `settings` are fields of `RosSettings`.

    Raises:
        ValueError: ROS 2 is not installed, the transport is another one, or a setting is wrong.
    """
    if transport != "rclpy":
        raise ValueError(f"transport must be rclpy, got {transport!r}")
    network = build(RosSettings, settings, "ros")
    try:
        from cogvla.real_robot.ros.rclpy_node import OwnNode
    except ImportError as error:
        raise ValueError(
            f"transport=rclpy needs ROS 2, {error}: `uv sync --extra ros` (x86-64 Linux), or source an installation of "
            "ROS 2 for the same version of Python"
        ) from error
    return OwnNode(name, network)


def open_policy_client(config: DictConfig, embodiment: Embodiment) -> tuple[AsksPolicy, Mapping[str, Any]]:
    """Open the policy for a bridge: `config.checkpoint` in this process, or else the server at `config.server`.

    Returns:
        The client, and the description of the policy.

    Raises:
        ValueError: there is no such checkpoint, the policy is for another robot, or a key would change nothing.
        UnavailableError: the server cannot be reached.
    """
    unused = {key: config[key] for key in (HERE if config.checkpoint is None else THERE) if config[key] is not None}
    if unused:
        what_to_do = (
            "the policy is in its server: give this to policy_server, or give checkpoint=FOLDER to run it here"
            if config.checkpoint is None
            else f"this is for a policy server, but checkpoint={config.checkpoint} runs in this process"
        )
        raise ValueError(f"{' '.join(f'{key}={value}' for key, value in unused.items())}: {what_to_do}")
    if config.checkpoint is None:
        settings = client_settings(config, embodiment)
        described = asyncio.run(_described(config.server, settings))
        return ReconnectingClient(config.server, settings, policy=described), described
    source = str(config.checkpoint)
    if not source.startswith(LEROBOT) and not is_exported(source):
        source = str(find_checkpoint(source, "give another one, or server=ws://HOST:PORT"))
    policy, identity = open_any_policy(
        source,
        embodiment=asdict(embodiment),
        device=config.device,
        threads=config.threads,
        statistics=config.statistics,
    )
    return LocalPolicy(policy, embodiment), {**policy.describe(), **identity}


def client_settings(config: DictConfig, embodiment: Embodiment) -> ClientSettings:
    """Return how a command's configuration asks the policy server."""
    return ClientSettings(
        robot=embodiment,
        api_key=None if config.api_key is None else str(config.api_key),
        certificate=None if config.certificate is None else Path(config.certificate),
        jpeg_quality=config.jpeg_quality,
    )


async def _described(uri: str, settings: ClientSettings) -> Mapping[str, Any]:
    client = await AsyncPolicyClient.connect(uri, settings)
    await client.close()
    return client.info.policy
