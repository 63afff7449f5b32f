"""Policy server: serve a policy over openpi's websocket protocol, with one inference thread for all clients.

    connect            -> metadata (`ServerInfo`)
    request, binary    -> {"actions": float32 [K,A], "server_timing": {...}, "policy_timing": {...}}
    invalid request    -> one line of text, then close code 1011; other clients are not affected
    GET /healthz       -> 200 after the warm-up, 503 before it and while shutting down
    GET /metrics       -> Prometheus

The event loop only checks and forwards frames, so it answers pings while the policy computes.
"""

from __future__ import annotations

import asyncio
import hmac
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from cogvla.policy.interface import Policy
from cogvla.real_robot.serving.batching import BatchAnswer, Batcher, BatchSettings, ExpiredError, PolicyError
from cogvla.real_robot.serving.request import OBSERVATION_ID, RequestFormat, RequestKeys
from cogvla.real_robot.serving.server_info import ServerInfo
from cogvla.real_robot.serving.server_metrics import Outcome, ServerMetrics
from cogvla.real_robot.serving.wire import FrameError, pack

HEALTH, METRICS = "/healthz", "/metrics"
CLOSE_S = 2.0
"""Seconds that a client has to confirm the end of a connection."""


@dataclass(frozen=True)
class TlsFiles:
    """Certificate of a server.

    Attributes:
        cert: PEM file with the certificate; None: no TLS.
        key: PEM file with its private key; None: no TLS.
    """

    cert: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("TLS needs both tls.cert and tls.key")

    def context(self) -> ssl.SSLContext | None:
        """Return the server's TLS context, None without TLS; ValueError if the files are no certificate and key."""
        if self.cert is None or self.key is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"cannot use tls.cert={self.cert} with tls.key: {error}") from error
        return context


@dataclass(frozen=True)
class ServerSettings:
    """Address, access and limits of a policy server.

    Attributes:
        host: address to bind; the default accepts connections from this machine only.
        port: TCP port; 0: any free port.
        api_key: key that clients must send (`Authorization: Api-Key ...`); None: accept all clients.
        tls: certificate of the server, see `TlsFiles`.
        max_message_mb: maximum size of a request in MiB; a larger one ends the connection.
        max_clients: maximum number of connections; further ones are refused with status 503.
        ping_s: seconds between pings, and seconds without an answer after which a client is disconnected.
        shutdown_s: maximum time in seconds to finish pending requests after the server was told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    tls: TlsFiles = field(default_factory=TlsFiles)
    max_message_mb: float = 16.0
    max_clients: int = 64
    ping_s: float = 20.0
    shutdown_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be 0 to {2**16 - 1}, got {self.port}")
        for name in ("max_message_mb", "max_clients", "ping_s", "shutdown_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ValueError("api_key must be plain text without spaces around it; null switches it off")


class PolicyServer:
    """Server of one policy for many clients. The protocol is in the docstring of this module.

    Args:
        policy: policy that answers the requests; only the inference thread calls it.
        settings: address, access and limits.
        batching: when a forward pass starts.
        keys: keys of the requests.
        identity: entries added to the policy's description that identify its weights, such as a hash.
        metrics: counters that the server updates; read them to observe it from the same process.

    Attributes:
        metrics: the counters.
        info: the metadata that every client receives first.
    """

    def __init__(
        self,
        policy: Policy,
        settings: ServerSettings | None = None,
        batching: BatchSettings | None = None,
        keys: RequestKeys | None = None,
        identity: Mapping[str, str] | None = None,
        metrics: ServerMetrics | None = None,
    ) -> None:
        self._settings = settings = settings or ServerSettings()
        batching = batching or BatchSettings()
        self.metrics = metrics or ServerMetrics()
        self._batcher = Batcher(policy, batching, self.metrics)
        self.info = ServerInfo(
            embodiment=policy.embodiment,
            keys=keys or RequestKeys(),
            policy={**policy.describe(), **(identity or {})},
            max_message_bytes=int(settings.max_message_mb * 2**20),
            max_batch=batching.max_batch,
        )
        self._format = RequestFormat(policy.embodiment, self.info.keys)
        self._hello = pack(self.info.to_dict())
        self._clients = 0
        self._answering = 0
        self._stopping = False

    async def run(self, stop: asyncio.Event, listening: Callable[[int], None] = lambda _: None) -> None:
        """Serve until `stop` is set, then answer the pending requests and close.

        Args:
            stop: event that ends the server.
            listening: called with the port once clients can connect. The warm-up comes after it, so the first
                requests wait for the warm-up.

        Raises:
            OSError: the address cannot be bound.
            Exception: an exception of the policy's warm-up.
        """
        try:
            async with serve(
                self._serve,
                self._settings.host,
                self._settings.port,
                process_request=self._http,
                ssl=self._settings.tls.context(),
                origins=[None],  # refuse browsers, so that no web page can reach the server through a visitor
                compression=None,
                max_size=self.info.max_message_bytes,
                max_queue=1,  # one request per client at a time: further ones wait in its socket
                ping_interval=self._settings.ping_s,
                ping_timeout=self._settings.ping_s,
                close_timeout=CLOSE_S,
                server_header=None,
            ) as server:
                self._batcher.start()
                listening(_port(server))
                await self._warm(stop)
                await stop.wait()
                self._stopping = True
                self.metrics.ready.set(0)
                last = time.monotonic() + self._settings.shutdown_s
                while self._answering and time.monotonic() < last:
                    await asyncio.sleep(0.01)
        finally:
            await asyncio.to_thread(self._batcher.close)

    async def _warm(self, stop: asyncio.Event) -> None:
        stopped = asyncio.ensure_future(stop.wait())
        ready = asyncio.wrap_future(self._batcher.ready)
        await _first(stopped, ready)
        stopped.cancel()
        if ready.done():
            ready.result()
            self.metrics.ready.set(1)

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer a plain HTTP request or refuse a connection; return None to go on with the websocket handshake."""
        if request.path == HEALTH:
            healthy = self._batcher.healthy and not self._stopping
            if healthy:
                return connection.respond(HTTPStatus.OK, "OK\n")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "not ready\n")
        if not self._authorised(request):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "send the header `Authorization: Api-Key KEY`\n")
        if request.path == METRICS:
            response = connection.respond(HTTPStatus.OK, self.metrics.text().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        if self._stopping or self._clients >= self._settings.max_clients:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "no more clients at the moment\n")
        return None

    def _authorised(self, request: Request) -> bool:
        if self._settings.api_key is None:
            return True
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self._settings.api_key}".encode()
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), expected)

    async def _serve(self, connection: ServerConnection) -> None:
        self._count_clients(1)
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            await connection.send(self._hello)
            last_ms: float | None = None
            async for frame in connection:
                started = time.perf_counter()
                self._answering += 1
                try:
                    answer = await self._answer(frame, gone, last_ms)
                    if answer is None:
                        return
                    await connection.send(answer)
                    if isinstance(answer, str):
                        await connection.close(CloseCode.INTERNAL_ERROR, "the request was not answered")
                        return
                finally:
                    self._answering -= 1
                last_ms = 1e3 * (time.perf_counter() - started)
                self.metrics.latency.observe(last_ms / 1e3)
        except ConnectionClosed as error:  # a robot that is switched off is no fault of the server
            if error.sent is not None and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
                self.metrics.count("oversized")
        finally:
            gone.cancel()
            self._count_clients(-1)

    def _count_clients(self, change: int) -> None:
        self._clients += change
        self.metrics.clients.set(self._clients)
        self._batcher.count_clients(self._clients)

    async def _answer(
        self, frame: str | bytes, gone: asyncio.Future[None], last_ms: float | None
    ) -> bytes | str | None:
        """Return the frame to send back: the answer, or an error text. None if the client has left."""
        outcome: Outcome = "failed"
        try:
            request = self._format.read(frame)
            deadline = None if request.deadline_s is None else time.monotonic() + request.deadline_s
            job = self._batcher.submit(request.observation, deadline)
            future = asyncio.wrap_future(job)
            await _first(future, gone)
            if not future.done():
                job.cancel()  # directly, because cancelling `future` reaches the job only in the loop's next round
                future.cancel()
                outcome = "abandoned"
                return None
            answer = _message(future.result(), last_ms)
            if request.observation_id is not None:
                answer[OBSERVATION_ID] = request.observation_id
            outcome = "ok"
            return pack(answer)
        except FrameError as error:
            outcome = "invalid"
            return f"invalid request: {error}"
        except ExpiredError as error:
            outcome = "expired"
            return f"expired: {error}"
        except PolicyError as error:
            return f"failed: {error}"
        finally:
            self.metrics.count(outcome)


def _message(answer: BatchAnswer, last_ms: float | None) -> dict[str, Any]:
    """Build the answer as openpi's server does.

    `actions` is the only array, because openpi's ActionChunkBroker slices every array along the chunk.
    """
    server_timing: dict[str, float] = {
        "infer_ms": answer.infer_ms,
        "queue_ms": answer.queue_ms,
        "batch": answer.batch,
    }
    if last_ms is not None:
        server_timing["prev_total_ms"] = last_ms
    policy_timing = {name: float(value) for name, value in answer.timing.items()}
    return {
        "actions": answer.actions_KA,
        "server_timing": server_timing,
        "policy_timing": {"infer_ms": answer.infer_ms, **policy_timing},
    }


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _port(server: Server) -> int:
    return next(iter(server.sockets)).getsockname()[1]
