"""`drive_robot`: drive a robot of lerobot (or with ROS 2 topics) with a policy. A dry run unless dry_run=false.

    drive_robot lerobot=so101 lerobot.config.port=/dev/ttyACM0 instruction="pick up the cube"      nothing moves
    drive_robot ... dry_run=false                                      it moves after `a` is pressed
    drive_robot ... dry_run=false record=FOLDER                        record a LeRobotDataset
    drive_robot ... teleop=so101 teleop.config.port=/dev/ttyACM1       a leader arm to take over with
    drive_robot ... checkpoint=FOLDER                                  run the policy in this process, without a server

Keys: a activate, s stop, space emergency stop, r release it and reset, d drop the running or else the last episode,
t take over with the teleoperator or hand back, q quit.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig

from cogvla.configs.build import build, take
from cogvla.policy.interface import Embodiment
from cogvla.real_robot.bridge.bridge import Bridge, BridgeSettings
from cogvla.real_robot.bridge.keyboard import Keyboard
from cogvla.real_robot.control.measurements import latency_table
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.lerobot.teleoperator import Teleoperation
from cogvla.real_robot.recording.recorder import Recorder
from cogvla.scripts import console
from cogvla.scripts.command import import_modules, plain, stop_event
from cogvla.scripts.robot.robot_bridge import watch
from cogvla.scripts.robot.robots import open_front_end, open_policy_client, open_teleoperator, recorded_names

KEYS = "a activate, s stop, space emergency stop, r reset, d drop the last episode, t take over or hand back, q quit"


def main(config: DictConfig, keyboard: int | None = None) -> None:
    """Drive until `q` or a signal; `keyboard` is a file descriptor with keys, None: standard input."""
    stop = stop_event()
    import_modules(config.imports)
    robot = build(RobotConfig, plain(config.robot), "robot")
    embodiment = build(Embodiment, plain(config.embodiment), "embodiment")
    settings = take(BridgeSettings, plain(config))
    if config.record is not None and settings.dry_run:
        raise ValueError("a dry run cannot be recorded, because nothing moves: give dry_run=false with record")
    teleop, keys = open_teleoperator(config, embodiment)
    client, described = open_policy_client(config, embodiment)
    recorder = None
    if config.record is not None:  # before the robot is connected: the folder may be there already
        names = recorded_names(config, embodiment)
        video, teleoperated = bool(config.record_video), teleop is not None
        recorder = Recorder(Path(config.record), embodiment, robot.name, video, names=names, teleoperated=teleoperated)
    with ExitStack() as stack:
        front_end, _ = open_front_end(config, embodiment, robot, stack)
        if recorder is not None:
            stack.enter_context(recorder)
        on_tick = None if recorder is None else recorder.show
        bridge = stack.enter_context(Bridge(robot, embodiment, client, front_end, settings, on_tick))
        bridge.instruct(config.instruction or "")
        operator = None if teleop is None else Teleoperation(teleop, keys, bridge, _say)
        stack.enter_context(Keyboard(Keys(bridge, recorder, operator, stop), keyboard))
        name = described.get("checkpoint") or described.get("preset") or "a policy"
        print(f"{embodiment.name} by {name}" + (", dry run: nothing is sent" if settings.dry_run else ""), flush=True)
        print(f"keys: {KEYS}", flush=True)
        if operator is not None:
            stack.enter_context(operator)
        watch(bridge, stop)
    print(latency_table(bridge.measurements, embodiment.control_hz))
    if recorder is not None:
        print(f"{recorder.episodes} episodes in {config.record}" if recorder.episodes else "no episode was recorded")


class Keys:
    """Handler of the operator's keys; the module docstring lists them."""

    def __init__(
        self, bridge: Bridge, recorder: Recorder | None, operator: Teleoperation | None, stop: threading.Event
    ) -> None:
        self._bridge, self._recorder, self._operator, self._stop = bridge, recorder, operator, stop

    def __call__(self, key: str) -> None:
        if key == " ":
            self._say(self._bridge.estop(True))
        elif key == "a":
            self._say(self._bridge.activate())
        elif key == "s":
            self._say(self._bridge.activate(False))
        elif key == "r":
            self._bridge.estop(False)
            self._say(self._bridge.reset())
        elif key == "t":
            refused = False, "there is no teleoperator: start with teleop=..."
            self._say(refused if self._operator is None else self._operator.toggle())
        elif key == "d" and self._recorder is not None:
            self._recorder.end_episode(keep=False)
            print("dropped", flush=True)
        elif key == "q":
            self._stop.set()

    def _say(self, answer: tuple[bool, str]) -> None:
        _say(answer[1])


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    console.drive_robot()
