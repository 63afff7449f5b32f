"""Clients that send anything to a policy server, reproducibly: payloads, frames, HTTP, images, half messages."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from cogvla.policy.interface import Observation
from cogvla.real_robot.serving.request import RequestFormat
from cogvla.real_robot.serving.server_info import ServerInfo
from cogvla.real_robot.serving.wire import MSGPACK_NUMPY, OPENPI, pack
from cogvla.tests.support.image_files import encoded, jpeg_header, png
from cogvla.tests.support.raw_websocket import BINARY, UPGRADE, frame, raw_socket

TEXTS = [
    "",
    " ",
    "\u200b",
    "\u62ff\u8d77",
    "\U0001f44d",
    "a" * 1001,
    "a\0b",
    "\x1b[2J",
    "x" * 9000,
    "\u202eup",
    "<unk>",
]
WAIT_S = 5.0


class HostileClient:
    """Sends one hostile message after another to a server.

    Args:
        uri: address of the server.
        info: its metadata.
        seed: seed of the messages.
    """

    def __init__(self, uri: str, info: ServerInfo, seed: int) -> None:
        self._uri, self._random = uri, random.Random(seed)
        robot = info.embodiment
        reader = RequestFormat(robot, info.keys, info.images, info.max_message_bytes)
        seen: Observation = robot.fake_observation(seed=seed)
        self._image_keys = list(reader.image_keys.values())
        self._good = reader.write(seen)
        self._values: dict[str, Any] = msgpack.unpackb(self._good)
        self._state, self._prompt = info.keys.state, info.keys.prompt
        self._camera = robot.cameras[0]
        self._pictures = [encoded(seen.images[robot.camera_names[0]][0], kind) for kind in ("JPEG", "PNG")]
        self._most = info.max_message_bytes
        self._kinds: list[tuple[Callable[[], bytes], int]] = [
            (self._changed_payload, 30),
            (self._changed_values, 25),
            (self._changed_picture, 10),
            (self._frames, 15),
            (self._http, 15),
            (self._half, 4),
            (self._large, 1),
        ]

    def send_one(self) -> None:
        """Send one message over a connection of its own, and read what comes back, or leave without."""
        choices, weights = zip(*self._kinds, strict=True)
        kind = self._random.choices(choices, weights)[0]
        data = kind()
        try:
            with raw_socket(self._uri, WAIT_S) as client:
                client.sendall(data)
                if self._random.random() < 0.1:
                    return
                if kind in (self._frames, self._http, self._half):
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
                else:
                    _read_answer(client)
        except OSError:  # cut off, as it deserves
            pass

    def _message(self, payload: bytes, kind: int = BINARY) -> bytes:
        return UPGRADE + frame(kind, payload)

    def _bytes_changed(self, data: bytes) -> bytes:
        changed, rng = bytearray(data), self._random
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randrange(len(changed) or 1), rng.randint(1, 8)
            match rng.randrange(5):
                case 0:
                    changed[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    del changed[at : at + length]
                case 2:
                    changed[at:at] = rng.randbytes(length)
                case 3:
                    changed[at:at] = changed[at : at + length]
                case _:
                    del changed[at:]
        return bytes(changed)

    def _changed_payload(self) -> bytes:
        if self._random.random() < 0.2:
            return self._message(self._random.randbytes(self._random.randrange(300)))
        head = self._random.random() < 0.7  # most of a request are pixels, which may be anything
        cut = 200 if head else len(self._good)
        return self._message(self._bytes_changed(self._good[:cut]) + self._good[cut:])

    def _changed_values(self) -> bytes:
        values = dict(self._values)
        for _ in range(self._random.randint(1, 3)):
            values[self._random.choice([*values, "other", "observation_id", "deadline_ms"])] = self._anything()
        return self._message(msgpack.packb(values, unicode_errors="surrogatepass"))

    def _anything(self, depth: int = 0) -> Any:
        rng, dialect = self._random, self._random.choice([OPENPI, MSGPACK_NUMPY])
        shape = tuple(rng.choice([0, 1, 2, 3, 8, 64, 300]) for _ in range(rng.randrange(4)))
        match rng.randrange(12):
            case 0:
                return rng.choice(TEXTS)
            case 1:
                return rng.choice([None, True, -1, 0, 2**63, 1e308, float("nan"), float("-inf"), "\ud800"])
            case 2:
                return (
                    {str(i) if rng.random() < 0.9 else i: self._anything(depth + 1) for i in range(3)}
                    if depth < 4
                    else {}
                )
            case 3:
                return [self._anything(depth + 1) for _ in range(3)] if depth < 4 else []
            case 4:
                return {
                    b"nd": rng.choice([True, False, 1]),
                    b"type": "|O",
                    b"kind": b"O",
                    b"shape": [1],
                    b"data": b"cos\nsystem\n",
                }
            case 5:
                return {
                    b"__ndarray__": True,
                    b"dtype": rng.choice(["<f4", "|O", "V9"]),
                    b"shape": [2**40, -1],
                    b"data": b"",
                }
            case 6:
                return self._bytes_changed(rng.choice(self._pictures))
            case 7:
                sizes = [1, 4, 128, 65_000]
                return jpeg_header(
                    rng.choice(sizes), rng.choice(sizes), frame=rng.choice([0xC0, 0xC2]), colours=rng.choice([1, 3])
                )
            case 8:
                return png(
                    rng.choice([1, 9, 2**31 - 1]), rng.choice([1, 9, 2**20]), bits=rng.choice([8, 16]), pixels=bytes(99)
                )
            case _:
                array = np.zeros(shape, rng.choice(["u1", "<f4", ">f8", "<i8"]))
                return msgpack.unpackb(pack({"a": array}, dialect))["a"]

    def _changed_picture(self) -> bytes:
        picture = self._random.choice(self._pictures)
        picture = picture if self._random.random() < 0.3 else self._bytes_changed(picture)
        return self._message(msgpack.packb({**self._values, self._random.choice(self._image_keys): picture}))

    def _frames(self) -> bytes:
        rng, parts = self._random, [UPGRADE]
        for _ in range(rng.randint(1, 6)):
            payload = rng.randbytes(rng.choice([0, 1, 100, 125, 126, 200]))
            one = frame(
                rng.randrange(16), payload, last=rng.random() < 0.7, length=rng.choice([None, None, None, 5, 2**40])
            )
            if rng.random() < 0.3:
                one = self._bytes_changed(one)
            parts.append(one)
        return b"".join(parts)

    def _http(self) -> bytes:
        rng = self._random
        match rng.randrange(6):
            case 0:
                return rng.randbytes(rng.randrange(400))
            case 1:
                return b"%s %s HTTP/1.1\r\n\r\n" % (
                    rng.choice([b"GET", b"POST", b"PUT"]),
                    rng.choice([b"/", b"/metrics", b"/x" * 5000]),
                )
            case 2:
                return (
                    UPGRADE[:-2]
                    + b"".join(b"H%d: %s\r\n" % (i, rng.randbytes(9).hex().encode()) for i in range(200))
                    + b"\r\n"
                )
            case 3:
                return UPGRADE.replace(b"websocket", rng.choice([b"h2c", b"", b"websocket, websocket"]))
            case 4:
                return b"POST / HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n" + bytes(999)
            case _:
                return self._bytes_changed(UPGRADE)

    def _half(self) -> bytes:
        whole = self._message(self._good)
        return whole[: self._random.randrange(len(whole))]

    def _large(self) -> bytes:
        size = self._random.choice([self._most // 2, self._most, 2 * self._most])
        sides = [min(32 * self._camera.height, 2000), min(32 * self._camera.width, 1200)]
        large = np.zeros((*sides, 3), np.uint8)
        values = self._random.choice([{"other": bytes(size)}, {self._image_keys[0]: large}])
        changed = {**self._values, **msgpack.unpackb(pack(values))}
        return self._message(msgpack.packb(changed))


def memory_bytes(process: int, what: str = "VmRSS") -> int:
    """Memory of a process: VmRSS now, VmHWM at most so far."""
    [line] = re.findall(rf"{what}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(line) * 1024


def _read_answer(client: socket.socket) -> None:
    """Read the handshake, the metadata and one more frame."""
    with client.makefile("rb") as stream:
        while stream.readline().strip():
            pass
        for _ in range(2):
            head = stream.read(2)
            if len(head) < 2:
                return
            length = head[1]
            if length > 125:
                length = int.from_bytes(stream.read(2 if length == 126 else 8))
            stream.read(length)
