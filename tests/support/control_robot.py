"""A small robot and a driver of its control loop, for the tests of the control core."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cogvla.policy.interface import ActionChunk, Camera, Embodiment
from cogvla.real_robot.control.control_loop import ChunkRequest, Command, ControlLoop
from cogvla.real_robot.control.settings import LoopSettings, SafetyLimits

HZ = 20.0
PERIOD = 1.0 / HZ
ROBOT = Embodiment(
    name="two_joints",
    cameras=(Camera("front", 2, 3), Camera("wrist", 2, 2)),
    state_dim=3,
    action_dim=3,
    chunk=8,
    control_hz=HZ,
    gripper_index=1,
    gripper_open=-1.0,
    gripper_close=1.0,
)
"""Arm dimensions are actions 0 and 2; the state is their two positions and the gripper's."""
DELTA = SafetyLimits(kind="delta", scale=(0.1, 0.1), state_index=(0, 1), lead=(0.05, 0.05))
ABSOLUTE = SafetyLimits(kind="absolute", state_index=(0, 1))


def image(camera: str, value: int = 0) -> np.ndarray:
    size = {c.name: (c.height, c.width, 3) for c in ROBOT.cameras}[camera]
    return np.full(size, value, np.uint8)


def chunk_of(*actions: tuple[float, ...]) -> ActionChunk:
    return ActionChunk(np.array(actions, np.float32)[None])


def constant(value: float, length: int = ROBOT.chunk) -> ActionChunk:
    return ActionChunk(np.full((1, length, ROBOT.action_dim), value, np.float32))


@dataclass
class Driver:
    """Plays the front end: keeps the time, sends every observation, remembers every command."""

    settings: LoopSettings = field(default_factory=LoopSettings)
    limits: SafetyLimits = DELTA
    now: float = 100.0
    state: np.ndarray = field(default_factory=lambda: np.zeros(3))
    sent: list[Command] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = ControlLoop(ROBOT, self.limits, self.settings)

    def start(self) -> Driver:
        self.loop.set_instruction("pick")
        assert self.loop.activate()
        return self

    def observe(self) -> None:
        for camera in ROBOT.camera_names:
            self.loop.observe_image(camera, image(camera), self.now, self.now)
        self.loop.observe_state(self.state, self.now, self.now)

    def tick(self, observe: bool = True) -> Command:
        """Observe, tick, and let one period pass."""
        if observe:
            self.observe()
        command = self.loop.tick(self.now)
        self.sent.append(command)
        self.now += PERIOD
        return command

    def ask(self) -> ChunkRequest:
        """A request that must be due now, of an observation made now."""
        self.observe()
        request = self.loop.request_due(self.now)
        assert request is not None, self.loop.diagnostics(self.now)
        return request

    def give(self, chunk: ActionChunk | None = None) -> ChunkRequest:
        """Ask and answer at once."""
        request = self.ask()
        assert self.loop.deliver(constant(0.1) if chunk is None else chunk, request, self.now) is None
        return request

    @property
    def counts(self) -> dict[str, int]:
        return self.loop.measurements.counts
