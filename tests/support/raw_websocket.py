"""Websocket clients that do not keep to the protocol."""

from __future__ import annotations

import socket
import struct

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TEXT, BINARY, CONTINUATION, PING = 1, 2, 0, 9


def raw_socket(uri: str, timeout_s: float = 30.0) -> socket.socket:
    """A TCP connection to a server's address, before the handshake."""
    return socket.create_connection(("127.0.0.1", int(uri.rpartition(":")[2])), timeout_s)


def raw_websocket(uri: str) -> socket.socket:
    """A TCP connection after the handshake."""
    client = raw_socket(uri)
    client.sendall(UPGRADE)
    assert b" 101 " in client.recv(4096)
    return client


def frame(kind: int, data: bytes, *, last: bool = True, length: int | None = None) -> bytes:
    """A masked frame; `length` is what its header says, if that is not the truth."""
    size = len(data) if length is None else length
    first = (0x80 if last else 0) | kind
    if size < 126:
        head = struct.pack(">BB", first, 0x80 | size)
    elif size < 2**16:
        head = struct.pack(">BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack(">BBQ", first, 0x80 | 127, size)
    return head + b"\0\0\0\0" + data


def is_cut_off(client: socket.socket) -> bool:
    """Read until the server ends the connection; False if it only falls silent."""
    try:
        while client.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def sends_until_cut_off(client: socket.socket, data: bytes) -> bool:
    """Send the same again and again, without reading; True once the connection has ended."""
    try:
        while True:
            client.sendall(data)
    except TimeoutError:
        return False
    except ConnectionError:
        return True
