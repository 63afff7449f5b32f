"""Run the policy in the robot's own process, without a server: the interface of a client around a local policy.

The policy runs in a thread, so the control loop goes on ticking. Both share one Python interpreter, so a server in a
separate process keeps the control rate better.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from cogvla.policy.interface import ActionChunk, Embodiment, Observation, Policy, begin_episode
from cogvla.real_robot.serving.async_client import Answer, UnavailableError
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.serving.server_info import ServerInfo

SLOT = "robot"
"""`Observation.slots` of the only robot."""


class LocalPolicy:
    """Policy of this process with the methods of `AsyncPolicyClient`.

    Args:
        policy: any policy; the constructor warms it up.
        robot: embodiment that the policy must fit.

    Raises:
        ValueError: the policy was trained for another robot.
    """

    def __init__(self, policy: Policy, robot: Embodiment) -> None:
        ServerInfo(policy.embodiment, RequestKeys(), {}, 0, 0).check(robot)
        policy.warm_up(1)
        self._policy = policy
        self._begun: tuple[int | None] | None = None  # the episode, as the number that was given for it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def infer(
        self,
        observation: Observation,
        *,
        timeout_s: float | None = None,
        observation_id: int | None = None,
        episode_id: int | None = None,
    ) -> Answer:
        """Ask the policy for the action chunk of one observation, see `AsyncPolicyClient.infer`.

        After the deadline it raises UnavailableError; the policy still finishes that computation before the next one.
        """
        sent_s = time.monotonic()
        answer = asyncio.get_running_loop().run_in_executor(self._thread, self._act, observation, episode_id)
        try:
            chunk = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise UnavailableError(f"no actions within {timeout_s:.3f} s") from None
        return Answer(chunk.actions[0], sent_s, time.monotonic(), observation_id or 0, chunk.timing)

    def _act(self, observation: Observation, episode_id: int | None) -> ActionChunk:
        if self._begun != (episode_id,):
            begin_episode(self._policy, [SLOT])
            self._begun = (episode_id,)
        return self._policy.act(replace(observation, slots=[SLOT]))

    async def close(self) -> None:
        """Wait for the running computation and end the thread."""
        self._thread.shutdown()
