"""Observations and actions of suites and policies in the terms of vla-eval, and a check that they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vla_eval.specs import (
    GRIPPER_CLOSE_NEG,
    GRIPPER_CLOSE_POS,
    IMAGE_RGB,
    LANGUAGE,
    POSITION_DELTA,
    ROTATION_AA,
    STATE_EEF_POS_AA_GRIP,
    DimSpec,
    check_specs,
)

from cogvla.policy.interface import Embodiment

Specs = Mapping[str, DimSpec]
SUITE_ACTION: Specs = {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}
"""Action of every suite (`SuiteEnv` in envs/contract.py), which is LIBERO's."""
SUITE_STATE = STATE_EEF_POS_AA_GRIP


def suite_observation(wrist: bool = True, state: bool = True) -> Specs:
    """Return what a suite sends, without the view of the wrist or the state where they are left out."""
    return {
        "agentview": IMAGE_RGB,
        **({"wrist": IMAGE_RGB} if wrist else {}),
        **({"state": SUITE_STATE} if state else {}),
        "language": LANGUAGE,
    }


def policy_action(embodiment: Embodiment) -> Specs:
    """Return what a policy for this robot sends: LIBERO's pose deltas and gripper, or so many numbers of its own."""
    if not _moves_a_pose(embodiment):
        return {"action": DimSpec("action", embodiment.action_dim, "raw")}
    closes_up = embodiment.gripper_close > embodiment.gripper_open
    return {**SUITE_ACTION, "gripper": GRIPPER_CLOSE_POS if closes_up else GRIPPER_CLOSE_NEG}


def policy_observation(embodiment: Embodiment, cameras: Mapping[str, str]) -> Specs:
    """Return what a policy for this robot needs.

    Args:
        embodiment: the robot.
        cameras: camera of the robot -> name of the image in the observation.
    """
    state = SUITE_STATE if _moves_a_pose(embodiment) else DimSpec("state", embodiment.state_dim, "raw")
    return {**dict.fromkeys(cameras.values(), IMAGE_RGB), "state": state, "language": LANGUAGE}


def _moves_a_pose(embodiment: Embodiment) -> bool:
    """Return whether state and action are those of LIBERO's robot, as far as an embodiment says it."""
    limits = {embodiment.gripper_open, embodiment.gripper_close}
    return (embodiment.state_dim, embodiment.action_dim, embodiment.gripper_index, limits) == (8, 7, 6, {-1.0, 1.0})


def listed(specs: Specs) -> list[dict[str, Any]]:
    """Return specifications as plain values, for the entries of a task, which travel to the model server."""
    return [{"key": key, **spec.to_dict()} for key, spec in specs.items()]


def read_listed(values: Any) -> Specs:
    """Return the specifications of `listed`; ValueError if they are none."""
    try:
        return {str(value["key"]): DimSpec.from_dict(value) for value in values}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the specification of the benchmark cannot be read: {error!r}") from None


def check_fit(embodiment: Embodiment, cameras: Mapping[str, str], action: Specs, observation: Specs) -> None:
    """Raise a ValueError with every difference, if a policy for this robot does not fit a benchmark.

    Args:
        embodiment: the policy's robot.
        cameras: see `policy_observation`.
        action: what the benchmark executes.
        observation: what it sends.
    """
    needed = policy_observation(embodiment, cameras)
    differences = check_specs(dict(policy_action(embodiment)), dict(action), dict(needed), dict(observation))
    if differences:
        raise ValueError(
            f"the policy (robot {embodiment.name!r}, images {', '.join(cameras.values())}, state of "
            f"{embodiment.state_dim} numbers, action of {embodiment.action_dim}) does not fit the benchmark: "
            + "; ".join(differences)
        )
