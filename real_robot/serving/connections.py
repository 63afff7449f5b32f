"""Limits of a server's connections: how many, how long they may do nothing, and how much memory they hold.

Nothing here knows about policies. A `Guard` watches all connections of a server, from the first byte of the handshake
on, and ends those that break a limit. A connection that does nothing gives way when others need its place.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import deque
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State

from cogvla.real_robot.serving.quiet_log import QuietLog

WATCH_S = 0.5
HANDSHAKE_BYTES = 2**16
SMALL_FRAME, SMALL_FRAMES = 1024, 2000
"""Bytes of a small frame, and most small frames of a connection in `WATCH_S`; each costs as much as a large one."""
UNREAD_BYTES = 2**20
"""Most bytes that wait for a client that does not read."""
SLICE = 8192
"""Received bytes that are parsed at once."""
NEW_S, SPARE_S = 1.0, 5.0
"""Seconds after which a connection gives way to a new one: if it never got an answer, and if it did."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the connections of a server.

    Attributes:
        clients: most clients.
        per_address: most clients of one address (of one /64 network with IPv6). Loopback has no such limit, because
            all clients behind a proxy or a tunnel come from there.
        idle_s: seconds without a request after which a connection is closed.
        message_s: seconds in which a message must arrive, and an answer must be taken.
        held_bytes: most bytes of messages that are not complete or not answered, of all clients together.
    """

    clients: int
    per_address: int
    idle_s: float
    message_s: float
    held_bytes: int


class Guard:
    """Watches the connections of one server; use it in the server's event loop."""

    def __init__(self, limits: ConnectionLimits, log: QuietLog) -> None:
        self.limits, self.log = limits, log
        self.held = 0
        self._open: dict[GuardedConnection, None] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def clients(self) -> list[GuardedConnection]:
        """Return the connections that have a client's place."""
        return [connection for connection in self._open if connection.serving and not connection.ending]

    def room_for(self, connection: GuardedConnection) -> str | None:
        """Make room for a client; return why there is none, else None. The longest idle client gives way."""
        clients = self.clients()
        same = [each for each in clients if each.network == connection.network]
        if connection.network is not None and len(same) >= self.limits.per_address:
            return None if self._give_way(same) else "too many clients of this address"
        if len(clients) >= self.limits.clients:
            return None if self._give_way(clients) else "no more clients at the moment"
        return None

    def _give_way(self, clients: list[GuardedConnection]) -> bool:
        now = asyncio.get_running_loop().time()
        spare = [c for c in clients if not c.busy and now - c.active > (SPARE_S if c.answered else NEW_S)]
        if spare:
            self.end(min(spare, key=lambda c: (c.answered, c.active)), "idle while others wait for a place")
        return bool(spare)

    def end(self, connection: GuardedConnection, reason: str) -> None:
        """Close a connection; the client sees the reason."""
        connection.ending = True
        closing = asyncio.get_running_loop().create_task(connection.close(CloseCode.GOING_AWAY, reason))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    def cut(self, connection: GuardedConnection, reason: str) -> None:
        """End a connection that breaks the rules at once."""
        if not connection.ending:
            self.log.warning("cut off %s: %s", connection.address, reason)
        connection.ending = True
        connection.transport.abort()

    def close_handshakes(self) -> None:
        """End connections that have no place yet, when the server stops."""
        for connection in list(self._open):
            if not connection.serving:
                connection.transport.abort()

    async def watch(self) -> None:
        """End connections that are idle or stuck, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = asyncio.get_running_loop().time()
            for connection in list(self._open):
                connection.small_frames = 0
                stuck = connection.unfinished or (connection.paused and connection.serving)
                if not stuck:
                    connection.moving = now
                elif now - connection.moving > self.limits.message_s:
                    self.cut(connection, f"a message took more than {self.limits.message_s:g} s")
                idle = connection.serving and not connection.ending and not connection.busy
                if idle and now - connection.active > self.limits.idle_s:
                    self.end(connection, f"no request for {self.limits.idle_s:g} s")

    def opened(self, connection: GuardedConnection) -> None:
        """Take note of a new connection, before its handshake. The oldest of too many handshakes ends."""
        self._open[connection] = None
        waiting = [each for each in self._open if not each.serving and not each.ending]
        if len(waiting) > self.limits.clients + 1:
            self.cut(waiting[0], "too many connections that send no request")

    def closed(self, connection: GuardedConnection) -> None:
        """Forget a connection."""
        self._open.pop(connection, None)
        self.held -= connection.held
        connection.held = 0

    def hold(self, connection: GuardedConnection, size: int) -> None:
        """Note how many bytes of messages a connection holds. If all hold too many, the slowest message is cut off."""
        if connection not in self._open:
            return
        self.held += size - connection.held
        connection.held = size
        if self.held > self.limits.held_bytes:
            others = [each for each in self._open if each.held and not each.ending and not each.busy]
            if others:
                self.cut(min(others, key=lambda c: c.moving), "all clients together send too much")


class GuardedConnection(ServerConnection):
    """Connection of a server with a guard.

    Attributes:
        guard: the guard; a subclass for each server has it.
        serving: the handshake is done, and the client has a place.
        busy: a request is being answered.
        ending: it is about to close.
        answered: it got an answer.
        active: when its handshake ended, or its last answer was sent (seconds of the event loop).
        moving: when no message was in progress for the last time.
        held: bytes that it holds.
        small_frames: number of small frames since the guard last looked.
    """

    guard: Guard

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.serving = self.busy = self.ending = self.answered = False
        self.active = self.moving = self.loop.time()
        self.held = self.small_frames = 0
        self.address = "?"
        self.network: str | None = None
        self._received = 0  # of the handshake, then of the frame in progress
        self._fragments = 0
        self._complete: deque[int] = deque()

    @property
    def unfinished(self) -> bool:
        """True while a message is in progress."""
        return self.protocol.state is State.OPEN and bool(self._fragments or self._received)

    def answer_sent(self) -> None:
        """Note that the oldest message of this connection is answered."""
        self.busy, self.answered, self.active = False, True, self.loop.time()
        self._complete.popleft()
        self._hold()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take note of the address."""
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else "a local socket"
        self.network = _network(self.address)
        self.guard.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the guard."""
        self.guard.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, in parts, so that a flood of small frames ends early."""
        for at in range(0, len(data), SLICE):
            if self.transport.is_closing():
                return
            part, handshake = data[at : at + SLICE], self.request is None
            self._received += len(part)
            super().data_received(part)
            if handshake and self._received > HANDSHAKE_BYTES:
                self.guard.cut(self, f"a handshake of more than {HANDSHAKE_BYTES} bytes")
            elif handshake and self.request is not None:
                self._received = len(self.protocol.reader.buffer)
            elif self.small_frames > SMALL_FRAMES:
                self.guard.cut(self, f"more than {SMALL_FRAMES} small frames in {WATCH_S:g} s")
            elif self.transport.get_write_buffer_size() > UNREAD_BYTES:
                self.guard.cut(self, "it does not read what it asks for")
        self._hold()

    def process_event(self, event: Any) -> None:
        """Count the frames of messages."""
        super().process_event(event)
        if isinstance(event, Frame):
            size = len(event.data)
            self._received -= size + (6 if size < 126 else 8 if size < 2**16 else 14)
            self.small_frames += size < SMALL_FRAME
            if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._fragments += size + 1  # empty fragments are in progress, too
                if event.fin:
                    self._complete.append(self._fragments)
                    self._fragments = 0

    def _hold(self) -> None:
        self.guard.hold(self, max(self._received, 0) + self._fragments + sum(self._complete))


def _network(address: str) -> str | None:
    """Return what all addresses of one client have in common; None for addresses without a limit."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ip.ipv4_mapped
        if mapped is None:
            return None if ip.is_loopback else str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
        ip = mapped
    return None if ip.is_loopback else str(ip)
