"""A policy of this process behind the interface of a client, for robots whose computer can run it: no server needed.

The policy runs in a thread, so that ticks go on meanwhile; they share one Python, though. A server in a process of its
own keeps time better.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from cogvla.policy.interface import Embodiment, Observation, Policy
from cogvla.real_robot.serving.async_client import Answer, UnavailableError
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.real_robot.serving.server_info import ServerInfo


class LocalPolicy:
    """See the module docstring.

    Args:
        policy: any; warmed up here.
        robot: what the policy must fit.

    Raises:
        ValueError: the policy is for another robot.
    """

    def __init__(self, policy: Policy, robot: Embodiment) -> None:
        ServerInfo(policy.embodiment, RequestKeys(), {}, 0, 0).check(robot)
        policy.warm_up(1)
        self._policy = policy
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def infer(
        self, observation: Observation, *, timeout_s: float | None = None, observation_id: int | None = None
    ) -> Answer:
        """See `AsyncPolicyClient.infer`; UnavailableError after the deadline, though the policy goes on with it."""
        sent_s = time.monotonic()
        answer = asyncio.get_running_loop().run_in_executor(self._thread, self._policy.act, observation)
        try:
            chunk = await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise UnavailableError(f"no actions within {timeout_s:.3f} s") from None
        return Answer(chunk.actions[0], sent_s, time.monotonic(), observation_id or 0, chunk.timing)

    async def close(self) -> None:
        """Wait for what is computed now, and end the thread."""
        self._thread.shutdown()
