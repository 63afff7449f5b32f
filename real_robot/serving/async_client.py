"""One connection to a policy server. It imports neither torch nor a simulator, so that any robot's computer can run it.

An answer is returned within its deadline or not at all: a connection on which anything went wrong is cut at once, so a
late answer can never be taken for the answer to a later request.

Shape legend: K chunk, A action.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from cogvla.policy.interface import Embodiment, Observation
from cogvla.real_robot.serving.request import OBSERVATION_ID, RequestFormat
from cogvla.real_robot.serving.server_info import ServerInfo
from cogvla.real_robot.serving.wire import FrameError, shown, unpack

CLOSE_S = 0.5


class UnavailableError(ConnectionError):
    """No answer within the deadline: the server is away, busy, shutting down or failed. Worth another try."""


class RefusedError(ValueError):
    """The server says that the request is wrong; the same one again will be refused again."""


@dataclass(frozen=True)
class ClientSettings:
    """How a client talks to its server.

    Attributes:
        robot: what the server's embodiment must fit; None: not checked.
        api_key: of the server; None: it has none.
        answer_s: deadline of an answer, unless the call says otherwise.
        connect_s: deadline of a connection with its metadata.
        ping_s: an idle connection is pinged so often, and is dead if a ping is not answered for so long.
        certificate: PEM file to trust besides the system's, for a server with a certificate of its own.
        max_message_mb: longer answers end the connection.
    """

    robot: Embodiment | None = None
    api_key: str | None = field(default=None, repr=False)
    answer_s: float = 1.0
    connect_s: float = 5.0
    ping_s: float = 5.0
    certificate: Path | None = None
    max_message_mb: float = 16.0

    def __post_init__(self) -> None:
        for name in ("answer_s", "connect_s", "ping_s", "max_message_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def tls(self) -> ssl.SSLContext:
        """Trusts the system's certificates and `certificate`."""
        context = ssl.create_default_context()
        if self.certificate is not None:
            context.load_verify_locations(self.certificate)
        return context


@dataclass(frozen=True)
class Answer:
    """A chunk for one observation.

    Attributes:
        actions: float32 [K,A] in physical units, all finite.
        sent_s, received_s: `time.monotonic()` of this computer; an answer's age counts from `sent_s`.
        observation_id: the one of the request.
        timing: milliseconds by stage as the server says, and `round_trip_ms`.
    """

    actions: np.ndarray
    sent_s: float
    received_s: float
    observation_id: int
    timing: Mapping[str, float]


class AsyncPolicyClient:
    """One connection; made by `AsyncPolicyClient.connect`. One request at a time."""

    def __init__(self, connection: ClientConnection, info: ServerInfo, settings: ClientSettings) -> None:
        self._connection, self.info, self._settings = connection, info, settings
        self._format = RequestFormat(info.embodiment, info.keys)
        self._ids = itertools.count()
        self._busy = False

    @staticmethod
    async def connect(uri: str, settings: ClientSettings | None = None) -> AsyncPolicyClient:
        """Connect and check that the policy fits the robot.

        Args:
            uri: `ws://HOST:PORT` or `wss://HOST:PORT`.
            settings: see there.

        Raises:
            UnavailableError: nobody answers there (in time).
            ValueError: the address, the API key or the certificate is wrong, the server is of another kind, or its
                policy is not for this robot.
        """
        settings = settings or ClientSettings()
        connection: ClientConnection | None = None
        try:
            async with asyncio.timeout(settings.connect_s):
                connection = await connect(
                    uri,
                    additional_headers=None
                    if settings.api_key is None
                    else {"Authorization": f"Api-Key {settings.api_key}"},
                    ssl=settings.tls() if uri.startswith("wss:") else None,
                    compression=None,
                    proxy=None,  # a robot's server is in its own network
                    max_size=int(settings.max_message_mb * 2**20),
                    open_timeout=None,
                    ping_interval=settings.ping_s,
                    ping_timeout=settings.ping_s,
                    close_timeout=CLOSE_S,
                )
                info = ServerInfo.from_dict(unpack(_binary(await connection.recv())))
            if settings.robot is not None:
                info.check(settings.robot)
        except BaseException as error:
            if connection is not None:
                connection.transport.abort()
            _explain(error, uri)
            raise
        return AsyncPolicyClient(connection, info, settings)

    @property
    def open(self) -> bool:
        """Whether it is worth asking."""
        return self._connection.close_code is None and not self._connection.transport.is_closing()

    async def infer(
        self, observation: Observation, *, timeout_s: float | None = None, observation_id: int | None = None
    ) -> Answer:
        """The policy's chunk for an observation of batch size 1.

        Args:
            observation: images of any size; smaller ones travel faster.
            timeout_s: deadline; None: the settings'.
            observation_id: repeated by the answer; None: a running number.

        Raises:
            UnavailableError: no answer in time; this connection is closed now.
            RefusedError: the server says what is wrong with the request; this connection is closed now.
            ValueError: the observation does not fit the policy; nothing was sent.
        """
        timeout_s = self._settings.answer_s if timeout_s is None else timeout_s
        number = next(self._ids) if observation_id is None else observation_id
        frame = self._format.write(observation, number, timeout_s)
        if self._busy:
            raise RuntimeError("this client waits for an answer already; every robot needs a client of its own")
        self._busy = True
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self._connection.send(frame)
                answer = await self._connection.recv()
            return self._read(answer, number, sent_s)
        except BaseException as error:
            self._connection.transport.abort()
            _explain(error, "the policy server")
            raise
        finally:
            self._busy = False

    async def close(self) -> None:
        """Say goodbye; at once if the other side does not answer."""
        await self._connection.close()

    def _read(self, frame: bytes | str, observation_id: int, sent_s: float) -> Answer:
        received_s = time.monotonic()
        message = unpack(_binary(frame))
        embodiment = self.info.embodiment
        expected = (embodiment.chunk, embodiment.action_dim)
        actions_KA = message.get("actions") if isinstance(message, dict) else None
        if (
            not isinstance(actions_KA, np.ndarray)
            or actions_KA.shape != expected
            or actions_KA.dtype.kind != "f"
            or not np.isfinite(actions_KA).all()
        ):
            raise FrameError(f"the answer holds no finite actions of shape {expected}")
        if message.get(OBSERVATION_ID) != observation_id:
            raise FrameError(f"the answer belongs to another request: {shown(message.get(OBSERVATION_ID))}")
        timing = {**message.get("policy_timing", {}), **message.get("server_timing", {})}
        timing["round_trip_ms"] = 1e3 * (received_s - sent_s)
        return Answer(actions_KA.astype(np.float32), sent_s, received_s, observation_id, timing)


def _binary(frame: bytes | str) -> bytes:
    """A frame that is no error text."""
    if isinstance(frame, bytes):
        return frame
    kind, _, text = frame.partition(": ")
    if kind == "invalid request":
        raise RefusedError(text)
    raise UnavailableError(f"the policy server says: {shown(frame, 200)}")


def _explain(error: BaseException, server: str) -> None:
    """Raise UnavailableError if another try may help, ValueError if not; return if the error says enough already."""
    match error:
        case UnavailableError():
            return
        case InvalidStatus() if error.response.status_code == 401:
            raise ValueError(f"{server} refuses the API key") from error
        case InvalidStatus() if error.response.status_code < 500:
            raise ValueError(f"{server} is no policy server (status {error.response.status_code})") from error
        case InvalidStatus():
            raise UnavailableError(f"{server} is busy or stopping (status {error.response.status_code})") from error
        case InvalidURI():
            raise ValueError(f"{server} is no address; give ws://HOST:PORT or wss://HOST:PORT") from error
        case ssl.SSLCertVerificationError():
            raise ValueError(f"the certificate of {server} is not trusted: {error.verify_message}") from error
        case FrameError():
            raise UnavailableError(f"{server} sent something odd: {error}") from error
        case TimeoutError():
            raise UnavailableError(f"{server} did not answer in time") from error
        case ConnectionClosed():
            raise UnavailableError(f"{server} closed the connection: {error}") from error
        case InvalidHandshake() | OSError() | EOFError():
            raise UnavailableError(f"{server} cannot be reached: {error}") from error
