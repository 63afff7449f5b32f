"""`robot_bridge`: connect a robot with ROS 2 topics to a policy server. A dry run unless dry_run=false.

    robot_bridge instruction="pick up the cube"                                  commands are shown, nothing moves
    robot_bridge robot=my_arm embodiment=my_arm topics=my_arm ros.discovery=SUBNET
    robot_bridge monitor=FOLDER                                                  it holds where a monitor alarms
    robot_bridge dry_run=false                                                   it moves after ~/activate is called

Ctrl-C stops sending commands and prints a table of latencies.
"""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

from omegaconf import DictConfig

from cogvla.configs.build import build, take
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings
from cogvla.real_robot.control.measurements import latency_table
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.ros.front_end import RosFrontEnd
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.real_robot.serving.reconnecting import ReconnectingClient, check_server
from cogvla.scripts import console
from cogvla.scripts.command import plain, stop_event
from cogvla.scripts.robot.robots import client_settings, ros_node

POLL_S = 0.2


def main(config: DictConfig) -> None:
    """Run the bridge until SIGINT, SIGTERM or SIGHUP; write `report.json` if an output folder is given."""
    stop = stop_event()
    robot = build(RobotConfig, plain(config.robot), "robot")
    embodiment = build(Embodiment, plain(config.embodiment), "embodiment")
    settings = take(BridgeSettings, plain(config))
    asking = client_settings(config, embodiment)
    if (waiting := asyncio.run(check_server(config.server, asking))) is not None:
        print(f"no policy server yet: {waiting}", flush=True)
    monitor = None
    if config.monitor is not None:  # imports torch, which a robot's process does not need otherwise
        from cogvla.policy.foresight.monitored_policy import open_monitor

        monitor = open_monitor(Path(config.monitor), embodiment)
    client = ReconnectingClient(config.server, asking)
    node = ros_node(config.transport, config.node, plain(config.ros))
    front_end = RosFrontEnd(node, build(RosTopics, plain(config.topics), "topics"), embodiment, robot.limits)
    with node, Bridge(robot, embodiment, client, front_end, settings, monitor=monitor) as bridge:
        if config.instruction is not None:
            bridge.instruct(config.instruction)
        print(
            f"{node.name} for {embodiment.name}, policy at {config.server}"
            + (", dry run: nothing is sent" if settings.dry_run else ""),
            flush=True,
        )
        watch(bridge, stop)
    report = bridge.diagnostics() | {"robot": robot.name, "measurements": bridge.measurements.summary()}
    print(latency_table(bridge.measurements, embodiment.control_hz))
    if config.output is not None:
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def watch(bridge: Bridge, stop: threading.Event) -> None:
    """Print changes of the loop's state until `stop` is set.

    Args:
        bridge: running bridge.
        stop: event that ends the function.

    Raises:
        BaseException: the error that ended the bridge.
    """
    shown = ""
    while not (stop.is_set() or bridge.wait(POLL_S)):
        seen = bridge.diagnostics()
        waits = seen["last_failure"] if seen["state"] == "holding" else None
        if seen["teleoperated"] or seen["alarm"] or not seen["instruction"]:
            waits = seen["holds"]
        reason = seen["fault"] or seen["stale"] or waits
        state = seen["state"] + (", driven by the operator" if seen["teleoperated"] else "")
        line = f"{state}: {_without_numbers(reason)}" if reason else state
        if line != shown:
            print(line if not reason else f"{state}: {reason}", flush=True)
            shown = line


def _without_numbers(text: str) -> str:
    """Remove digits, so that changing ages do not count as changes of the state."""
    return "".join(letter for letter in text if not letter.isdigit())


if __name__ == "__main__":
    console.robot_bridge()
