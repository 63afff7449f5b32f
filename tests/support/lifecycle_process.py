"""The lifecycle node as a process, and what its user does with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from cogvla.real_robot.ros.node import SET_BOOL, TRIGGER
from cogvla.tests.support.paths import CONFIGS
from cogvla.tests.support.robot_processes import BRIDGE, Operator, Process
from cogvla.tests.support.waiting import until

TOLERANT = {"image_age_s": 2.0, "state_age_s": 2.0, "sync_tolerance_s": 0.5, "deadline_s": 5.0, "hold_limit_s": 600.0}
CONFIGURE, CLEANUP, ACTIVATE, DEACTIVATE = 1, 2, 3, 4
TEXT, BOOLEAN, DOUBLE = 4, 1, 3
SERVICES = {
    "estop": SET_BOOL,
    "reset": TRIGGER,
    "activate": SET_BOOL,
    "set_parameters": "rcl_interfaces/srv/SetParameters",
    "change_state": "lifecycle_msgs/srv/ChangeState",
    "get_state": "lifecycle_msgs/srv/GetState",
}


def changed(folder: Path, group: str, name: str, changes: Mapping[str, Any]) -> str:
    """The path of a copy of a file in configs with other values; those of mappings are merged."""
    content = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
    del content["defaults"]
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
    (folder / f"{group}.yaml").write_text(yaml.safe_dump(content))
    return str(folder / f"{group}.yaml")


class LifecycleProcess:
    """See `lifecycle_node`."""

    def __init__(self, operator: Operator, folder: Path, program: str, parameters: Mapping[str, Any]) -> None:
        values = {"diagnostics_s": 0.05, **parameters}
        if "robot" not in values:
            loop = {"ask": "ahead", "execute_steps": None, **TOLERANT}
            values["robot"] = changed(folder, "robot", "tabletop", {"loop": loop})
        file = folder / "parameters.yaml"
        file.write_text(yaml.safe_dump({BRIDGE: {"ros__parameters": values}}))
        self._arguments = (program, "--ros-args", "--params-file", str(file))
        self.operator = operator
        self.start()

    def start(self) -> None:
        """Start the process, and wait until its services answer."""
        self.operator.diagnostics = {}
        self.process = Process(*self._arguments, domain=int(self.operator.domain))
        for service, kind in SERVICES.items():
            self.operator.node.client(f"{BRIDGE}/{service}", kind)
        until(self._answers)  # whoever knows this client, the last one made, knows all of them

    def _answers(self) -> bool:
        try:
            self.operator.node.request(f"{BRIDGE}/get_state", SERVICES["get_state"], {}, timeout_s=3)
        except TimeoutError:
            return False
        return True

    def change(self, transition: int) -> bool:
        request = {"transition": {"id": transition}}
        answer = self.operator.node.request(f"{BRIDGE}/change_state", SERVICES["change_state"], request, timeout_s=60)
        return bool(answer.success)

    def run(self) -> None:
        """Configure and activate it, and wait until the policy acts."""
        assert self.change(CONFIGURE)
        assert self.change(ACTIVATE)
        self.operator.state("running")

    def state(self) -> str:
        answer = self.operator.node.request(f"{BRIDGE}/get_state", SERVICES["get_state"], {}, timeout_s=60)
        return str(answer.current_state.label)

    def set(self, name: str, **value: Any) -> tuple[bool, str]:
        request = {"parameters": [{"name": name, "value": value}]}
        answer = self.operator.node.request(
            f"{BRIDGE}/set_parameters", SERVICES["set_parameters"], request, timeout_s=60
        )
        return answer.results[0].successful, answer.results[0].reason

    def said(self, words: str) -> None:
        until(lambda: any(words in line for line in self.process.lines))


@contextmanager
def lifecycle_node(
    operator: Operator, folder: Path, program: str = "cogvla.real_robot.ros.lifecycle_node", **parameters: Any
) -> Iterator[LifecycleProcess]:
    """The node, unconfigured, with these parameters; a failure shows all that it wrote, and a traceback is one."""
    node = LifecycleProcess(operator, folder, program, parameters)
    try:
        yield node
    finally:
        node.process.kill()
    assert not any("Traceback" in line for line in node.process.lines)


def domain_of(base: int) -> int:
    """A ROS 2 domain of this process, for tests that run beside each other."""
    return base + os.getpid() % 25
