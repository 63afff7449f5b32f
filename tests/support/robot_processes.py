"""The commands of a robot as processes, and an operator who hears and says everything on their wire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT
from typing import Any

import numpy as np
from rclpy.serialization import deserialize_message

from cogvla.real_robot.ros.messages import diagnostics_of, state_of
from cogvla.real_robot.ros.network import RosSettings
from cogvla.real_robot.ros.node import ARRAY, DIAGNOSTICS, JOINT_STATE, SET_BOOL, STRING, TRIGGER, Delivery, seconds_of
from cogvla.real_robot.ros.rclpy_node import OwnNode, ros_type
from cogvla.real_robot.simulated.simulated_arm import STATE_NAMES
from cogvla.tests.support.waiting import PATIENCE_S

BRIDGE = "/cogvla_bridge"
COMMANDS = "/arm_controller/commands"


class Process:
    """A script of the tests (`.py`), a module, or a command of this package, started as a user does.

    Its output is shown when a test fails.
    """

    def __init__(self, name: str, *arguments: str, domain: int = 0, **variables: str) -> None:
        environment = {**os.environ, "ROS_DOMAIN_ID": str(domain), "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
        script = ["-m", name if "." in name else f"cogvla.scripts.robot.{name}"]
        if name.endswith(".py"):
            script = [str(Path(__file__).with_name(name))]
        self.process = subprocess.Popen(
            [sys.executable, *script, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, args=(name,), daemon=True).start()

    def _read(self, name: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            print(f"[{name}] {line}", end="")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """As the kernel kills: without a word."""
        self.process.kill()
        self.process.wait(120)

    def end(self, timeout_s: float = 60.0, by: int = SIGINT) -> int:
        """As Ctrl-C ends; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()


class Operator:
    """A node that watches a robot and its bridge, and gives orders.

    Attributes:
        diagnostics: newest of the bridge.
        commands: (seconds since the epoch at which it was sent, [A]) of every command to the controller.
        positions: (stamp, [8]) of every joint state.
        scenes: every status of the simulated robot.
    """

    def __init__(self, domain: int, joints: Sequence[str] = STATE_NAMES) -> None:
        self.domain, self._joints = domain, joints
        self.node = OwnNode("/operator", RosSettings(domain=domain))
        self.diagnostics: dict[str, Any] = {}
        self.commands: deque[tuple[float, np.ndarray]] = deque(maxlen=10_000)
        self.positions: deque[tuple[float, np.ndarray]] = deque(maxlen=10_000)
        self.scenes: list[dict[str, Any]] = []
        self.node.subscribe("/diagnostics", DIAGNOSTICS, Delivery.EVENTS, self._diagnose)
        self.node.subscribe("/joint_states", JOINT_STATE, Delivery.SENSOR, self._move)
        self.node.subscribe_raw(COMMANDS, ARRAY, Delivery.COMMAND, self._command)
        self.node.subscribe(
            "/sim_robot/status", STRING, Delivery.LATCHED, lambda m: self.scenes.append(json.loads(m.data))
        )
        self._orders = {
            topic: self.node.advertise(topic, STRING, Delivery.EVENTS)
            for topic in ("/sim_robot/scene", "/sim_robot/fault")
        }
        self._instruction = self.node.advertise("/instruction", STRING, Delivery.LATCHED)
        self.node.start()

    def _diagnose(self, message: Any) -> None:
        self.diagnostics = diagnostics_of(message)

    def _move(self, message: Any) -> None:
        self.positions.append((seconds_of(message.header.stamp), state_of(message, self._joints)))

    def _command(self, cdr: bytes, sent: float) -> None:
        self.commands.append((sent, np.asarray(deserialize_message(cdr, ros_type(ARRAY)).data)))

    def count(self, name: str) -> int:
        """Of the bridge's counters, by their name in the diagnostics."""
        return self.diagnostics.get(name, 0)

    def instruct(self, text: str) -> None:
        self._instruction({"data": text})

    def fault(self, fault: str, sensor: str | None = None, seconds: float = 0.0) -> None:
        """Break a sensor of the simulated robot."""
        self._order("/sim_robot/fault", {"fault": fault, "sensor": sensor, "seconds": seconds})

    def scene(self, number: int, task: int = 0, initial_state: int = 0) -> dict[str, Any]:
        """Set up a scene; its first status."""
        self._order("/sim_robot/scene", {"number": number, "task": task, "initial_state": initial_state})
        self.until(lambda: self.scenes and self.scenes[-1]["number"] == number)
        return self.scenes[-1]

    def _order(self, topic: str, order: dict[str, Any]) -> None:
        self.until(lambda: self.node.heard(topic))  # what is said before is lost
        self._orders[topic]({"data": json.dumps(order)})

    def estop(self, engaged: bool = True) -> tuple[bool, str]:
        return self.node.call(f"{BRIDGE}/estop", SET_BOOL, engaged, timeout_s=120)

    def activate(self, active: bool = True) -> tuple[bool, str]:
        return self.node.call(f"{BRIDGE}/activate", SET_BOOL, active, timeout_s=120)

    def reset(self) -> tuple[bool, str]:
        return self.node.call(f"{BRIDGE}/reset", TRIGGER, timeout_s=120)

    def until(self, condition: Any) -> None:
        """Wait; the machine may be busy."""
        last = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < last, f"it did not happen in time; diagnostics: {self.diagnostics}"
            assert self.node.failure is None, self.node.failure
            time.sleep(0.01)

    def state(self, name: str, reason: str = "") -> None:
        """Wait for a state of the bridge, and for what is given as its reason."""
        self.until(lambda: self.diagnostics.get("state") == name and reason in json.dumps(self.diagnostics))

    def close(self) -> None:
        self.node.close()
