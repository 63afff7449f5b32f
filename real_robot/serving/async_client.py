"""Async client of the policy server: one websocket connection.

This module imports neither torch nor a simulator, so it runs on the robot's own computer.

A call returns its answer within the deadline or raises. After any error the client cuts the connection at once, so
that a late answer is never mistaken for the answer to a later request.

Shape legend: K chunk, A action.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
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
_log = logging.getLogger(__name__)


class UnavailableError(ConnectionError):
    """The server gave no answer within the deadline: it is away, busy, stopping or failed. Another try may succeed."""


class RefusedError(ValueError):
    """The server refused the request as invalid. Sending the same request again fails again."""


@dataclass(frozen=True)
class ClientSettings:
    """Settings of a connection to a policy server.

    Attributes:
        robot: embodiment that the server's policy must fit; None skips the check.
        api_key: API key of the server; None if it needs none.
        answer_s: default deadline of an answer, in seconds.
        connect_s: deadline for connecting and receiving the server's metadata, in seconds.
        ping_s: seconds between pings, and seconds without an answer to a ping after which the connection is lost.
        certificate: PEM file to trust besides the system's certificates, for a server with a self-signed certificate.
        max_message_mb: largest answer in MiB; a larger one ends the connection.
        resize: send images that are larger than the policy's in the policy's size; the actions stay the same.
        jpeg_quality: 1 to 95: send images as JPEG of this quality, which changes the actions a little; None: raw.
            Neither changes what is sent to an older server, which takes raw images only.
    """

    robot: Embodiment | None = None
    api_key: str | None = field(default=None, repr=False)
    answer_s: float = 1.0
    connect_s: float = 5.0
    ping_s: float = 5.0
    certificate: Path | None = None
    max_message_mb: float = 16.0
    resize: bool = True
    jpeg_quality: int | None = None

    def __post_init__(self) -> None:
        if self.jpeg_quality is not None and (type(self.jpeg_quality) is not int or not 1 <= self.jpeg_quality <= 95):
            raise ValueError(f"jpeg_quality must be 1 to 95, got {self.jpeg_quality!r}")
        for name in ("answer_s", "connect_s", "ping_s", "max_message_mb"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    def tls(self, uri: str) -> ssl.SSLContext | None:
        """Return a context that trusts the system's certificates and `certificate`; None for an address without TLS.

        Raises:
            ValueError: the certificate cannot be read, or the address has no TLS, so that it would not be used.
        """
        if not uri.startswith("wss:"):
            if self.certificate is not None:
                raise ValueError(
                    f"a certificate is given, but {uri} is no address of a server with TLS: wss://HOST:PORT"
                )
            return None
        context = ssl.create_default_context()
        if self.certificate is not None:
            try:
                context.load_verify_locations(self.certificate)
            except OSError as error:
                raise ValueError(f"certificate {self.certificate} cannot be used: {error}") from error
        return context


@dataclass(frozen=True)
class Answer:
    """Answer of a policy server: the action chunk for one observation.

    Attributes:
        actions: float32 [K,A] in physical units, all finite.
        sent_s: when the request was sent (`time.monotonic()` of this computer); the answer's age counts from here.
        received_s: when the answer arrived (same clock).
        observation_id: number of the request that this answers.
        timing: milliseconds per stage as reported by the server, and `round_trip_ms`.
    """

    actions: np.ndarray
    sent_s: float
    received_s: float
    observation_id: int
    timing: Mapping[str, float]


class AsyncPolicyClient:
    """One connection to a policy server, with one request at a time. Create it with `AsyncPolicyClient.connect`."""

    def __init__(self, connection: ClientConnection, info: ServerInfo, settings: ClientSettings) -> None:
        self._connection, self.info, self._settings = connection, info, settings
        self._format = RequestFormat(info.embodiment, info.keys, info.images, info.max_message_bytes)
        self._ids = itertools.count()
        self._busy = self._said = False

    @staticmethod
    async def connect(uri: str, settings: ClientSettings | None = None) -> AsyncPolicyClient:
        """Connect and check that the policy fits the robot.

        Args:
            uri: address of the server, `ws://HOST:PORT` or `wss://HOST:PORT`.
            settings: deadlines, API key and TLS; None for the defaults of `ClientSettings`.

        Raises:
            UnavailableError: no server answers at this address within `connect_s`.
            ValueError: the address, API key or certificate is wrong, it is no cogvla server, or its policy does not
                fit the robot.
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
                    ssl=settings.tls(uri),
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
        """True while the connection can carry a request."""
        return self._connection.close_code is None and not self._connection.transport.is_closing()

    async def infer(
        self,
        observation: Observation,
        *,
        timeout_s: float | None = None,
        observation_id: int | None = None,
        episode_id: int | None = None,
    ) -> Answer:
        """Ask the policy for the action chunk of one observation.

        Args:
            observation: batch size 1, images of the camera's size or the policy's; see `ClientSettings.resize`.
                Its committed actions are sent if the server's policy reads them; else this is logged once.
            timeout_s: deadline in seconds; None uses `ClientSettings.answer_s`.
            observation_id: number that the answer repeats; None uses a running number.
            episode_id: number of the episode: with another one, a policy that remembers begins anew. None: the episode
                lasts as long as the connection.

        Raises:
            UnavailableError: no answer in time. The connection is closed.
            RefusedError: the server refused the request and says why. The connection is closed.
            ValueError: the observation does not fit the policy. Nothing was sent.
            RuntimeError: another request of this client still waits for its answer.
        """
        timeout_s = self._settings.answer_s if timeout_s is None else timeout_s
        number = next(self._ids) if observation_id is None else observation_id
        sent_s = time.monotonic()
        if observation.committed is not None and not self.info.committed and not self._said:
            self._said = True
            _log.warning("the server is older, or its policy ignores committed actions: they are not sent")
        frame = self._format.write(
            observation,
            number,
            timeout_s,
            episode_id=episode_id if self.info.episodes else None,
            committed=self.info.committed,
            resize=self._settings.resize,
            jpeg_quality=self._settings.jpeg_quality,
        )
        if self._busy:
            raise RuntimeError("this client already waits for an answer; give every robot a client of its own")
        self._busy = True
        try:
            async with asyncio.timeout(timeout_s - (time.monotonic() - sent_s)):
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
        """Close the connection, within `CLOSE_S` seconds even if the server does not answer."""
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
            or not (np.abs(actions_KA) <= np.finfo(np.float32).max).all()
        ):
            raise FrameError(f"the answer has no finite float actions of shape {expected}")
        if message.get(OBSERVATION_ID) != observation_id:
            raise FrameError(f"the answer belongs to another request: {shown(message.get(OBSERVATION_ID))}")
        timing = {**message.get("policy_timing", {}), **message.get("server_timing", {})}
        timing["round_trip_ms"] = 1e3 * (received_s - sent_s)
        return Answer(actions_KA.astype(np.float32), sent_s, received_s, observation_id, timing)


def _binary(frame: bytes | str) -> bytes:
    """Return a binary frame as it is; raise RefusedError or UnavailableError for a text frame, which is an error."""
    if isinstance(frame, bytes):
        return frame
    kind, _, text = frame.partition(": ")
    if kind == "invalid request":
        raise RefusedError(text)
    raise UnavailableError(f"the policy server says: {shown(frame, 200)}")


def _explain(error: BaseException, server: str) -> None:
    """Raise UnavailableError if another try may help, ValueError if not; return if the error needs no rewording."""
    match error:
        case UnavailableError():
            return
        case InvalidStatus() if error.response.status_code == 401:
            raise ValueError(f"{server} refuses the API key") from error
        case InvalidStatus() if error.response.status_code < 500:
            raise ValueError(f"{server} is no policy server (status {error.response.status_code})") from error
        case InvalidStatus():
            raise UnavailableError(f"{server} is busy or stopping (status {error.response.status_code})") from error
        case InvalidURI() | ValueError() if isinstance(error, InvalidURI) or str(error).startswith("Port "):
            raise ValueError(f"{server!r} is no address; give ws://HOST:PORT or wss://HOST:PORT") from error
        case ssl.SSLCertVerificationError():
            raise ValueError(f"the certificate of {server} is not trusted: {error.verify_message}") from error
        case FrameError():
            raise UnavailableError(f"{server} sent an invalid frame: {error}") from error
        case TimeoutError():
            raise UnavailableError(f"{server} did not answer in time") from error
        case ConnectionClosed():
            raise UnavailableError(f"{server} closed the connection: {error}") from error
        case InvalidHandshake() | OSError() | EOFError():
            raise UnavailableError(f"{server} cannot be reached: {error}") from error
