"""A policy server for the tabletop arm whose policy draws circles: it moves for ever, gently, and needs no torch.

python tests/support/circle_server.py PORT
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from cogvla.policy.interface import ActionChunk, Camera, Embodiment, Observation
from cogvla.real_robot.serving.server import PolicyServer, ServerSettings
from cogvla.tests.support.policy_servers import LIBERO_KEYS

TABLETOP = Embodiment(
    name="tabletop_panda",
    cameras=(Camera("agentview", 128, 128), Camera("wrist", 128, 128)),
    state_dim=8,
    action_dim=7,
    chunk=8,
    control_hz=20.0,
    gripper_index=6,
)
CENTRE = np.array([0.5, 0.0])
HEIGHT = 0.25
RADIUS = 0.08


class CirclePolicy:
    """Around `CENTRE`, at 5 mm per tick."""

    embodiment = TABLETOP

    def describe(self) -> dict[str, Any]:
        return {"preset": "circle", "parameters": 0}

    def reset(self) -> None:
        """Nothing to forget."""

    def warm_up(self, batch: int, instructions: Sequence[str] = ()) -> None:
        """Nothing to prepare."""

    def act(self, observation: Observation) -> ActionChunk:
        out_B2 = observation.state[:, :2] - CENTRE
        distance_B1 = np.linalg.norm(out_B2, axis=1, keepdims=True) + 1e-6
        along_B2 = np.stack([-out_B2[:, 1], out_B2[:, 0]], axis=1) / distance_B1
        speed_B2 = along_B2 + (RADIUS - distance_B1) / RADIUS * out_B2 / distance_B1
        actions_BKA = np.zeros((len(out_B2), 8, 7), np.float32)
        actions_BKA[:, :, :2] = 0.1 * np.clip(speed_B2, -2, 2)[:, None]
        actions_BKA[:, :, 2] = np.clip(HEIGHT - observation.state[:, 2:3], -0.1, 0.1)
        actions_BKA[:, :, 6] = -1.0
        return ActionChunk(actions_BKA)


async def _main(port: int) -> None:
    await PolicyServer(CirclePolicy(), ServerSettings(port=port), keys=LIBERO_KEYS).run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
