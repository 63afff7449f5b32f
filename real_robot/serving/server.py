"""Policy server: serve a policy over openpi's websocket protocol, with one inference thread for all clients.

    connect            -> metadata (`ServerInfo`)
    request, binary    -> {"actions": float32 [K,A], "server_timing": {...}, "policy_timing": {...}}
    invalid request    -> one line of text, then close code 1011; other clients are not affected
    GET /healthz       -> 200 after the warm-up, 503 before it and while shutting down
    GET /metrics       -> Prometheus

The event loop only checks and forwards frames, so it answers pings while the policy computes; images are decoded and
resized in two other threads, one for small and one for large images, so that small ones do not wait for large ones.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import ssl
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from cogvla.policy.interface import InstructionError, Policy, reads_committed
from cogvla.real_robot.serving.batching import BatchAnswer, Batcher, BatchSettings, ExpiredError, PolicyError
from cogvla.real_robot.serving.connections import ConnectionLimits, Guard, GuardedConnection
from cogvla.real_robot.serving.quiet_log import QuietLog
from cogvla.real_robot.serving.request import (
    ALL_FORMATS,
    OBSERVATION_ID,
    ImageOffer,
    PolicyRequest,
    RequestFormat,
    RequestKeys,
)
from cogvla.real_robot.serving.resize import KERNELS
from cogvla.real_robot.serving.server_info import ServerInfo
from cogvla.real_robot.serving.server_metrics import Outcome, ServerMetrics
from cogvla.real_robot.serving.wire import FrameError, pack

HEALTH, METRICS = "/healthz", "/metrics"
CLOSE_S = 2.0
"""Seconds that a client has to confirm the end of a connection."""
MAX_ERROR = 500
"""Most characters of an error text."""
HELD_MESSAGES = 4
"""Largest messages that all clients together may have in progress."""
LARGE_PIXELS = 2**20
"""Pixels of a request whose images are decoded in the thread for large ones."""


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
        max_clients: maximum number of connections. A new one takes the place of the longest idle one; it is refused
            with status 503 if none is idle.
        max_per_address: maximum number of connections of one address, as `max_clients`; None: three quarters of it.
            Loopback has no such limit, because all clients behind a proxy or a tunnel come from there.
        idle_s: seconds without a request after which a connection is closed.
        message_s: seconds in which a handshake or a message must arrive, and an answer must be taken.
        ping_s: seconds between pings, and seconds without an answer after which a client is disconnected.
        shutdown_s: maximum time in seconds to finish pending requests after the server was told to stop.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    tls: TlsFiles = field(default_factory=TlsFiles)
    max_message_mb: float = 16.0
    max_clients: int = 64
    max_per_address: int | None = None
    idle_s: float = 600.0
    message_s: float = 10.0
    ping_s: float = 20.0
    shutdown_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be 0 to {2**16 - 1}, got {self.port}")
        for name in ("max_message_mb", "max_clients", "max_per_address", "idle_s", "message_s", "ping_s", "shutdown_s"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_message_mb == math.inf:
            raise ValueError("max_message_mb must be a finite number: a server needs a limit of what it holds")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip() == self.api_key != ""):
            raise ValueError("api_key must be plain text without spaces around it; null switches it off")


class PolicyServer:
    """Server of one policy for many clients. The protocol is in the docstring of this module.

    Args:
        policy: policy that answers the requests; only the inference thread calls it. If it has an attribute
            `resize_kernel`, one of `resize.KERNELS`, the server or the client resizes images to its size with it;
            else the policy gets images of any size.
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
        self._log = QuietLog()
        self._batcher = Batcher(policy, batching, self.metrics, self._log)
        kernel = getattr(policy, "resize_kernel", None)
        self.info = ServerInfo(
            embodiment=policy.embodiment,
            keys=keys or RequestKeys(),
            policy={**policy.describe(), **(identity or {})},
            max_message_bytes=int(settings.max_message_mb * 2**20),
            max_batch=batching.max_batch,
            episodes=True,
            committed=reads_committed(policy),
            images=ImageOffer(ALL_FORMATS, kernel if kernel in KERNELS else None),
        )
        self._format = RequestFormat(policy.embodiment, self.info.keys, self.info.images, self.info.max_message_bytes)
        self._hello = pack(self.info.to_dict())
        self._guard = Guard(
            ConnectionLimits(
                settings.max_clients,
                settings.max_per_address or max(settings.max_clients * 3 // 4, 1),
                settings.idle_s,
                settings.message_s,
                HELD_MESSAGES * self.info.max_message_bytes,
            ),
            self._log,
        )
        self._decoders = [ThreadPoolExecutor(1, thread_name_prefix=f"{kind} images") for kind in ("small", "large")]
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
        watching = asyncio.create_task(self._guard.watch())
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
                open_timeout=self._settings.message_s,
                server_header=None,
                logger=self._log,
                create_connection=type("Connection", (GuardedConnection,), {"guard": self._guard}),
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
                self._guard.close_handshakes()
        finally:
            watching.cancel()
            for decoder in self._decoders:
                decoder.shutdown(wait=False, cancel_futures=True)
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
        assert isinstance(connection, GuardedConnection)
        reason = "the server is stopping" if self._stopping else self._guard.room_for(connection)
        if reason is not None:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, f"{reason}\n")
        connection.serving, connection.active = True, connection.loop.time()
        return None

    def _authorised(self, request: Request) -> bool:
        if self._settings.api_key is None:
            return True
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self._settings.api_key}".encode()
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), expected)

    async def _serve(self, connection: ServerConnection) -> None:
        assert isinstance(connection, GuardedConnection)
        self._count_clients()
        gone = asyncio.ensure_future(connection.wait_closed())
        try:
            await connection.send(self._hello)
            last_ms: float | None = None
            while True:
                frame: bytes | str | None = await connection.recv()
                connection.busy = True
                started = time.perf_counter()
                self._answering += 1
                try:
                    assert frame is not None
                    answering = self._answer(frame, connection, gone, last_ms)
                    frame = None  # the images may be many times larger than what is kept of them
                    answer = await answering
                    if answer is None:
                        return
                    async with asyncio.timeout(self._settings.message_s):
                        await connection.send(answer)
                    connection.answer_sent()
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
        except TimeoutError:
            self._guard.cut(connection, "it does not take its answer")
        finally:
            gone.cancel()
            connection.ending = True
            self._batcher.forget(connection)
            self._count_clients()

    def _count_clients(self) -> None:
        clients = len(self._guard.clients())
        self.metrics.clients.set(clients)
        self._batcher.count_clients(clients)

    async def _answer(
        self, frame: bytes | str, connection: GuardedConnection, gone: asyncio.Future[None], last_ms: float | None
    ) -> bytes | str | None:
        """Return the frame to send back: the answer, or an error text. None if the client has left."""
        outcome: Outcome = "failed"
        try:
            arrived = time.monotonic()
            request = await self._request(frame)
            del frame
            deadline = None if request.deadline_s is None else arrived + request.deadline_s
            job = self._batcher.submit(request.observation, deadline, connection, request.episode_id)
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
            return pack(answer, request.dialect)
        except (FrameError, InstructionError) as error:
            outcome = "invalid"
            text = str(error)[:MAX_ERROR]
            self._log.warning("invalid request from %s: %s", connection.address, text)
            return f"invalid request: {text}"
        except ExpiredError as error:
            outcome = "expired"
            return f"expired: {error}"
        except PolicyError as error:
            return f"failed: {error}"
        finally:
            self.metrics.count(outcome)

    async def _request(self, frame: bytes | str) -> PolicyRequest:
        """Check a frame, and decode and resize its images in another thread."""
        received = self._format.receive(frame)
        if not received.work:
            return self._format.finish(received)
        decoder = self._decoders[received.work > LARGE_PIXELS]
        return await asyncio.get_running_loop().run_in_executor(decoder, self._format.finish, received)


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
