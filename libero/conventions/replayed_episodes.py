"""Replay recorded actions open loop in the simulator, to compare its states and images with the recorded ones.

Shape legend: T steps, S state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvla.envs.contract import Perturbable, offered
from cogvla.libero.conventions.recorded_episodes import EpisodeStart, RecordedEpisode

PICTURED_STEPS = (0, 10)
"""Steps of an episode whose images are compared: the first, and one where the arm has moved but not yet diverged."""
APPROACH = 40
"""Steps that are replayed of an episode with unknown initial state: about until the first contact."""


@dataclass(frozen=True)
class ReplayTrace:
    """Result of one replayed episode.

    Attributes:
        episode: the recorded episode.
        exact: True if the replay began in the recorded initial state, False if in another one of the same task.
        states_TS: simulated states float32 [T+1,S], before each action and after the last one.
        images: camera -> step of the recording -> simulated image uint8 [H,W,3].
        success: True if the task was done at any step.
        unplaced: fixtures whose recorded poses are unknown, though the recorded states are of that scene.
    """

    episode: RecordedEpisode
    exact: bool
    states_TS: np.ndarray
    images: dict[str, dict[int, np.ndarray]]
    success: bool
    unplaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gripper:
    """Meaning of recorded gripper values.

    Attributes:
        index: index of the gripper in an action.
        recorded: recorded values that open and close the gripper.
        simulated: values that open and close it in the simulator.
    """

    index: int
    recorded: tuple[float, float]
    simulated: tuple[float, float]

    def mapped(self, actions_TA: np.ndarray) -> np.ndarray:
        """Return actions [T,A] with the gripper values converted to the simulator's."""
        (opened, closed), (to_open, to_close) = self.recorded, self.simulated
        mapped_TA = actions_TA.copy()
        mapped_TA[:, self.index] = to_open + (actions_TA[:, self.index] - opened) / (closed - opened) * (
            to_close - to_open
        )
        return mapped_TA


def replay(
    env: Any,
    episode: RecordedEpisode,
    task: int,
    cameras: Sequence[str],
    gripper: Gripper | None,
    rest_A: np.ndarray,
    delay: int = 0,
    waiting_steps: int = 0,
) -> ReplayTrace:
    """Replay the executed actions of an episode.

    Args:
        env: gymnasium environment of the suite.
        episode: the episode to replay.
        task: index of its task, for an episode with unknown initial state.
        cameras: names of the cameras to render.
        gripper: conversion of the gripper values; None: no conversion.
        rest_A: action that moves nothing.
        delay: control steps by which the recorded observations are late.
        waiting_steps: control steps before the first action, for an episode that does not say.
    """
    exact = episode.start is not None
    start = episode.start or EpisodeStart(task, initial_state=0)
    waiting_steps = waiting_steps if start.waiting_steps is None else start.waiting_steps
    actions_TA = episode.executed_TA if gripper is None else gripper.mapped(episode.executed_TA)
    actions_TA = actions_TA if exact else actions_TA[:APPROACH]
    moments = {step + delay: step for step in PICTURED_STEPS if step < len(actions_TA)}
    scene: Any = env.unwrapped
    scene.skip_images = 0 not in moments or waiting_steps > 0
    observation = _begin(env, start)
    success = False
    for left in range(waiting_steps, 0, -1):
        scene.skip_images = left > 1 or 0 not in moments
        observation, *_ = env.step(rest_A)
    states = [observation["state"]]
    images: dict[str, dict[int, np.ndarray]] = {camera: {} for camera in cameras}
    for moment in range(len(actions_TA) + 1):
        if moment in moments:
            for camera in cameras:
                images[camera][moments[moment]] = observation[camera]
        if moment == len(actions_TA):
            break
        scene.skip_images = moment + 1 not in moments
        observation, _, _, _, info = env.step(actions_TA[moment])
        states.append(observation["state"])
        success = success or bool(info["success"])
    return ReplayTrace(episode, exact, np.stack(states), images, success, _unplaced(scene, start, waiting_steps))


def _unplaced(env: Any, start: EpisodeStart, waiting_steps: int) -> tuple[str, ...]:
    """Return the fixtures of unknown pose; with waiting steps, recordings began as evaluations do, with their poses."""
    if start.state is None or waiting_steps:
        return ()
    return tuple(name for name in env.scene.fixtures if name not in start.fixtures)


def _begin(env: Any, start: EpisodeStart) -> dict[str, np.ndarray]:
    if (perturbable := offered(env, Perturbable)) is not None:
        perturbable.perturbations = start.perturbations
    if start.state is None:
        options = {"task": start.task, "initial_state": start.initial_state}
        if start.scene_task is not None:
            options |= {"task": start.scene_task, "asked": start.task}
        observation, _ = env.reset(options=options)
        return observation
    scene: Any = env.unwrapped
    if not start.fixtures:
        return scene.restore(start.state, start.task)
    scene.restore(start.state, start.task)
    return scene.restore(start.state, fixtures=start.fixtures)
