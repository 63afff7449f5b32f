"""Replay lerobot's real-time chunking in simulated time, for answers that take one, two or three control steps.

    python tests/benchmarks/bench_lerobot_rtc.py

lerobot's thread asks for a chunk when few actions are left, as soon as the one of this step is sent; when the chunk is
there, it drops as many of its actions as control steps have begun. Prints the steps to success, or None.

Shape legend: K chunk, A action.
"""

from __future__ import annotations

import numpy as np
import torch

from cogvla.envs.contract import CAMERAS, SuiteEnv, resting_action
from cogvla.envs.suite import get_suite
from cogvla.policy.checkpoint import load_policy
from cogvla.policy.interface import Observation, Policy
from cogvla.tests.support.paths import SHIPPED
from lerobot_policy_cogvla.modeling_cogvla import _continued

THRESHOLD = HORIZON = 4
STEPS = 120


def play(policy: Policy, env: SuiteEnv, instruction: str, state: int, delay: int) -> int | None:
    """Play an episode whose answers take `delay` control steps; return its steps, None: no success."""
    seen, _ = env.reset(options={"task": 0, "initial_state": state})
    waiting: list[np.ndarray] = []
    asked: tuple[int, Observation, list[np.ndarray]] | None = None
    for step in range(STEPS):
        action_A = waiting.pop(0) if waiting else resting_action()
        if asked is None and len(waiting) <= THRESHOLD:
            images = {name: seen[name][None] for name in CAMERAS}
            asked = step, Observation(images, seen["state"][None], [instruction]), waiting[:HORIZON]
        if asked is not None and step >= asked[0] + delay - 1:
            new_1KA = torch.from_numpy(policy.act(asked[1]).actions)
            if asked[2]:
                left_HA = torch.zeros(HORIZON, new_1KA.shape[-1])
                left_HA[: len(asked[2])] = torch.from_numpy(np.stack(asked[2]))
                new_1KA = _continued(new_1KA, left_HA, delay)
            waiting, asked = list(new_1KA[0, delay:].numpy()), None
        seen, _, _, _, info = env.step(action_A.clip(-1, 1))
        if info["success"]:
            return step + 1
    return None


def main() -> None:
    """Play initial states 0 to 2 of the first task of tabletop_object with the shipped policy."""
    suite = get_suite("tabletop_object")
    policy, env = load_policy(SHIPPED), suite.make()
    for delay in (1, 2, 3):
        print(delay, [play(policy, env, suite.tasks[0].instruction, state, delay) for state in range(3)], flush=True)


if __name__ == "__main__":
    main()
