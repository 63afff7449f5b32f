"""Any policy as a model server of vla-eval: one answer per observation, from chunks that are computed in batches.

    hello          -> what the policy needs and sends
    episode_start  -> nothing; another robot than the policy's is refused with the answers that follow
    observation    -> action, or error: one line that says what is wrong
    episode_end    -> nothing

vla-eval's own server carries the messages. An observation is checked as a request of the policy server is. Each episode
has its own chunks, so several benchmarks at a time do not mix.

Shape legend: A action.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import numpy as np
from anyio.abc import TaskGroup
from vla_eval.model_servers.base import ModelServer, SessionContext
from vla_eval.model_servers.serve import serve_async
from vla_eval.specs import DimSpec

from cogvla.envs.harness.specs import check_fit, policy_action, policy_observation, read_listed
from cogvla.envs.rollout.rollout import RolloutSettings
from cogvla.policy.chunking import Chunker
from cogvla.policy.interface import Policy
from cogvla.real_robot.serving.batching import Batcher, BatchSettings, PolicyError
from cogvla.real_robot.serving.quiet_log import QuietLog
from cogvla.real_robot.serving.request import ALL_FORMATS, ImageOffer, ReceivedRequest, RequestFormat, RequestKeys
from cogvla.real_robot.serving.resize import KERNELS
from cogvla.real_robot.serving.server_metrics import ServerMetrics
from cogvla.real_robot.serving.wire import shown

IMAGES, STATES, INSTRUCTION = "images", ("state", "states"), "task_description"
"""Keys of an observation. Both of the state are in use: LIBERO's is `states`."""
WRIST = "wrist"


@dataclass(eq=False)
class _Episode:
    chunker: Chunker
    problem: str | None
    actions: deque[np.ndarray] = field(default_factory=deque)  # each [A], for the next observations


class PolicyModelServer(ModelServer):
    """A policy behind vla-eval's protocol.

    Args:
        policy: the policy.
        batching: when a forward pass starts.
        execution: how many actions of a chunk are executed, and whether chunks are averaged; None: whole chunks.
        cameras: camera of the policy -> name of the image in the observation; None: the same names.

    Raises:
        ValueError: `cameras` does not name the policy's cameras, or `execution` does not fit the policy's chunks.
    """

    def __init__(
        self,
        policy: Policy,
        batching: BatchSettings | None = None,
        execution: RolloutSettings | None = None,
        cameras: Mapping[str, str] | None = None,
    ) -> None:
        self._policy, self._batching = policy, batching or BatchSettings()
        self.embodiment = policy.embodiment
        self._execution = execution or RolloutSettings()
        self._chunker()  # an execution that does not fit ends here
        names = self.embodiment.camera_names
        named = dict.fromkeys(names) if cameras is None else cameras
        if not isinstance(named, Mapping) or set(named) != set(names):
            raise ValueError(f"cameras must give an image for each of the policy's cameras {list(names)}, got {named}")
        self.cameras = {name: str(named[name] or name) for name in names}
        if len(set(self.cameras.values())) < len(names):
            raise ValueError(f"cameras gives one image to two of the policy's cameras: {self.cameras}")
        kernel = getattr(policy, "resize_kernel", None)
        keys = RequestKeys(
            STATES[0], INSTRUCTION, {camera: f"{IMAGES}/{image}" for camera, image in self.cameras.items()}
        )
        self._format = RequestFormat(
            self.embodiment, keys, ImageOffer(ALL_FORMATS, kernel if kernel in KERNELS else None)
        )
        self._episodes: WeakKeyDictionary[SessionContext, _Episode] = WeakKeyDictionary()
        self._batcher: Batcher | None = None

    # --- what the policy needs and sends -----------------------------------------------------------------------------

    def get_action_spec(self) -> dict[str, DimSpec]:
        return dict(policy_action(self.embodiment))

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return dict(policy_observation(self.embodiment, self.cameras))

    def get_observation_params(self) -> dict[str, Any]:
        """Return what benchmarks such as LIBERO's leave out unless it is asked for."""
        return {"send_state": True, **({"send_wrist_image": True} if WRIST in self.cameras.values() else {})}

    # --- messages ----------------------------------------------------------------------------------------------------

    async def on_serve_start(self, tg: TaskGroup) -> None:
        """Warm the policy up before anyone can connect."""
        self._batcher = batcher = Batcher(self._policy, self._batching, ServerMetrics())
        batcher.start()
        await asyncio.wrap_future(batcher.ready)
        tg.start_soon(_run, batcher)

    async def on_episode_start(self, config: Any, ctx: SessionContext) -> None:
        """Forget all chunks. A benchmark that does not fit is refused later: an error here would have no request."""
        self._episodes[ctx] = _Episode(self._chunker(), self._misfit(config))
        self._count()

    async def on_episode_end(self, result: Any, ctx: SessionContext) -> None:
        episode = self._episodes.pop(ctx, None)
        if episode is not None and self._batcher is not None:
            self._batcher.forget(episode)
        self._count()

    async def on_observation(self, obs: Any, ctx: SessionContext) -> None:
        """Answer with the next action.

        Raises:
            ValueError: the observation, or the benchmark, does not fit the policy.
            PolicyError: the policy failed.
        """
        episode = self._episodes.get(ctx)
        if episode is None:
            raise ValueError("an observation came before the start of its episode")
        if episode.problem is not None:
            raise ValueError(episode.problem)
        received = self._checked(obs)
        if not episode.actions:
            assert self._batcher is not None, "vla-eval starts a server before it takes messages"
            request = await anyio.to_thread.run_sync(self._format.finish, received)
            answer = await asyncio.wrap_future(self._batcher.submit(request.observation, slot=episode))
            episode.actions.extend(episode.chunker.plan([0], answer.actions_KA[None])[0])
        await ctx.send_action({"actions": episode.actions.popleft()})

    def _count(self) -> None:
        if self._batcher is not None:
            self._batcher.count_clients(len(self._episodes))

    def _chunker(self) -> Chunker:
        return self._execution.chunker(self.embodiment.chunk, self.embodiment.control_hz)

    def _misfit(self, config: Any) -> str | None:
        """Return why the benchmark of an episode does not fit, as far as its task says what it sends and executes."""
        task = config.get("task") if isinstance(config, dict) else None
        if not isinstance(task, dict) or "action_spec" not in task or "observation_spec" not in task:
            return None
        try:
            action, observation = (read_listed(task[key]) for key in ("action_spec", "observation_spec"))
            check_fit(self.embodiment, self.cameras, action, observation)
        except ValueError as error:
            return str(error)
        return None

    def _checked(self, obs: Any) -> ReceivedRequest:
        """Check an observation, and take what the policy needs from it."""
        if not isinstance(obs, dict) or not isinstance(obs.get(IMAGES), dict):
            got = shown(obs.get(IMAGES)) if isinstance(obs, dict) else shown(obs)
            raise ValueError(f"an observation needs `{IMAGES}`, a map of camera names to images; got {got}")
        images = obs[IMAGES]
        missing = [name for name in self.cameras.values() if name not in images]
        if missing:
            raise ValueError(
                f"the observation has no image {', '.join(missing)}; it has {', '.join(map(shown, images)) or 'none'}: "
                "let the benchmark send it (send_wrist_image), or start the server with cameras.CAMERA=IMAGE"
            )
        states = [obs[key] for key in STATES if obs.get(key) is not None]
        if len(states) != 1:
            both = "both" if states else "neither"
            raise ValueError(f"the observation has {both} of {' and '.join(STATES)}; the policy needs one (send_state)")
        return self._format.check(
            {STATES[0]: states[0], INSTRUCTION: obs.get(INSTRUCTION)}
            | {f"{IMAGES}/{name}": images[name] for name in self.cameras.values()}
        )


async def serve(
    server: PolicyModelServer, host: str, port: int, stop: asyncio.Event, listening: Callable[[int], None]
) -> None:
    """Serve until `stop` is set.

    Args:
        server: the model server.
        host: address to bind.
        port: TCP port; 0: any free port.
        stop: event that ends the server.
        listening: called with the port once clients can connect, after the warm-up.

    Raises:
        OSError: the address cannot be bound.
        Exception: an exception of the policy's warm-up.
    """
    try:
        async with anyio.create_task_group() as group:
            listening(await group.start(serve_async, server, host, port))
            await stop.wait()
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        raise _only(errors) from None


class _ShortLog(logging.Filter):
    """Write what clients can cause to a log that stays short: mistakes are lines without a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._log = QuietLog()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.WARNING:
            return True
        if isinstance(error, ValueError | OSError | PolicyError):
            record.msg, record.args, record.exc_info = f"refused: {error}", (), None
        self._log.handle(record)
        return False


def _only(errors: BaseException) -> BaseException:
    """Return the exception in groups of one."""
    while isinstance(errors, BaseExceptionGroup) and len(errors.exceptions) == 1:
        errors = errors.exceptions[0]
    return errors


async def _run(batcher: Batcher) -> None:
    """Keep the batcher and the short log until the server ends."""
    carrier, short = logging.getLogger(serve_async.__module__), _ShortLog()
    carrier.addFilter(short)
    try:
        await anyio.sleep_forever()
    finally:
        carrier.removeFilter(short)
        batcher.close()
