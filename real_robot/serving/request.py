"""Request format of the policy server: the keys of the cameras, the state, the instruction and the optional entries.

Server and clients use the same `RequestFormat`; the server sends it to the clients in its metadata.

Shape legend: S state dimension, H image height, W image width, A action dimension, N committed actions.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvla.policy.interface import Camera, Committed, Embodiment, Observation
from cogvla.real_robot.serving.images import (
    JPEG,
    PNG,
    check_size,
    decode_image,
    encode_jpeg,
    encoded_size,
)
from cogvla.real_robot.serving.resize import KERNELS, resize_image
from cogvla.real_robot.serving.wire import OPENPI, Dialect, FrameError, pack, shown, unpack_any

MAX_PROMPT = 1000
MAX_PROMPT_BYTES = 2000
MAX_NESTING = 3
MAX_BYTES = 16 * 2**20
RAW = "raw"
OBSERVATION_ID = "observation_id"
DEADLINE_MS = "deadline_ms"
EPISODE_ID = "episode_id"
COMMITTED = "committed"
DELAY = "delay"
OPTIONAL = {
    OBSERVATION_ID: "whole number that the answer repeats",
    DEADLINE_MS: "milliseconds that the client waits for the answer; after that the server drops the request",
    EPISODE_ID: "whole number of the episode; another number lets a policy that remembers begin anew",
    COMMITTED: "actions [N,A] that the robot will execute from the observation on; a policy may ignore them",
    DELAY: "number of the first of them that will certainly be executed before the answer is there",
}
"""Optional keys with their meaning. openpi's clients do not send them."""
LAYOUTS = ("hwc", "chw")
_NO_TEXT = ("Cc", "Cs")
"""Categories of control characters and halves of a surrogate pair."""


@dataclass(frozen=True)
class RequestKeys:
    """Keys of a request. The ready-made sets are the files of configs/request_keys.

    A key `a/b` means the key "a/b", or the key "b" in the map "a".

    Attributes:
        state: key of the proprioceptive state.
        prompt: key of the instruction.
        images: camera of the embodiment -> key; None: `images/CAMERA`.
        layout: axis order of the images: "hwc" or "chw".
        default_prompt: instruction for requests without one; None: refuse such requests.
        ignored: keys that clients send but the policy does not use, such as further cameras.
    """

    state: str = "state"
    prompt: str = "prompt"
    images: Mapping[str, str] | None = None
    layout: str = "hwc"
    default_prompt: str | None = None
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignored", tuple(self.ignored))
        if self.layout not in LAYOUTS:
            raise ValueError(f"request_keys.layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.default_prompt is not None:
            _check_prompt("request_keys.default_prompt", self.default_prompt)


@dataclass(frozen=True)
class ImageOffer:
    """Images that a server takes, besides raw ones of the policy's size.

    Attributes:
        formats: some of "raw" (arrays of any accepted size), "jpeg" and "png" (the bytes of a file).
        resize: kernel with which the server resizes images of other sizes, one of `resize.KERNELS`; a client that
            resizes with it before sending gets the same actions. None: the policy itself resizes, in a way of its own.
    """

    formats: tuple[str, ...] = (RAW,)
    resize: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", tuple(self.formats))


ALL_FORMATS = (RAW, JPEG, PNG)


@dataclass(frozen=True)
class PolicyRequest:
    """One checked request.

    Attributes:
        observation: observation of batch size 1.
        observation_id: number that the answer repeats; None if the client sent none.
        deadline_s: seconds that the client waits for the answer; None if it sent none.
        dialect: form of the arrays, which the answer should have, too.
        episode_id: number of the episode; None if the client sent none.
    """

    observation: Observation
    observation_id: int | None = None
    deadline_s: float | None = None
    dialect: Dialect = OPENPI
    episode_id: int | None = None


@dataclass(frozen=True, eq=False)
class ReceivedRequest:
    """A request whose images are checked, but not yet decoded and resized.

    Attributes:
        images: camera -> uint8 [H,W,3], or the bytes of a JPEG or PNG.
        state: float32 [S].
        instruction: the instruction.
        observation_id: see `PolicyRequest`.
        deadline_s: see `PolicyRequest`.
        dialect: see `PolicyRequest`.
        work: number of pixels to decode and to resize; 0: the images are ready.
        episode_id: see `PolicyRequest`.
        committed: see `Observation.committed`.
    """

    images: Mapping[str, np.ndarray | bytes]
    state: np.ndarray
    instruction: str
    observation_id: int | None
    deadline_s: float | None
    dialect: Dialect
    work: int
    episode_id: int | None = None
    committed: Committed | None = None


class RequestFormat:
    """Encoder and decoder of requests for one embodiment; ValueError if the keys do not fit its cameras.

    Args:
        embodiment: embodiment of the policy.
        keys: keys of the requests.
        offer: images that the server takes.
        max_bytes: most bytes of a request, and of its images when they are decoded.
    """

    def __init__(
        self,
        embodiment: Embodiment,
        keys: RequestKeys,
        offer: ImageOffer | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.embodiment, self.keys, self.max_bytes = embodiment, keys, max_bytes
        self.offer = offer or ImageOffer(ALL_FORMATS)
        names = embodiment.camera_names
        self.image_keys = {name: f"images/{name}" for name in names} if keys.images is None else dict(keys.images)
        if set(self.image_keys) != set(names):
            raise ValueError(
                f"request_keys.images names the cameras {sorted(self.image_keys)}, embodiment {embodiment.name!r} has "
                f"{sorted(names)}: give a key for each, or null for images/CAMERA"
            )
        self._required = [keys.state, *self.image_keys.values()]
        self._known = [*self._required, keys.prompt, *OPTIONAL]
        if len({*self._known, *keys.ignored}) < len(self._known) + len(keys.ignored):
            raise ValueError(f"request_keys uses a key twice: {[*self._known, *keys.ignored]}")

    def write(
        self,
        observation: Observation,
        observation_id: int | None = None,
        deadline_s: float | None = None,
        *,
        episode_id: int | None = None,
        committed: bool = False,
        resize: bool = True,
        jpeg_quality: int | None = None,
    ) -> bytes:
        """Encode an observation of batch size 1 as a frame.

        Args:
            observation: the observation.
            observation_id: number that the answer repeats.
            deadline_s: seconds that the client waits.
            episode_id: number of the episode.
            committed: send the observation's committed actions; an older server refuses them.
            resize: resize larger images to the policy's size, if the server says how it would do it.
            jpeg_quality: 1 to 95: send images as JPEG, if the server takes them; None: raw.

        Raises:
            ValueError: it does not fit the embodiment, or the server takes no request of its size.
        """
        observation.validate(self.embodiment)
        if observation.batch_size != 1:
            raise ValueError(f"a request holds one observation, got a batch of {observation.batch_size}")
        values: dict[str, Any] = {self.keys.state: observation.state[0], self.keys.prompt: observation.instruction[0]}
        kernel = self.offer.resize if resize else None
        for camera in self.embodiment.cameras:
            image_HWC, size = observation.images[camera.name][0], (camera.height, camera.width)
            check_size(camera, *image_HWC.shape[:2])
            if kernel in KERNELS and image_HWC.size > 3 * math.prod(size):
                image_HWC = resize_image(image_HWC, size, kernel)
            if jpeg_quality is not None and JPEG in self.offer.formats:
                value: Any = encode_jpeg(image_HWC, jpeg_quality)
            else:
                value = image_HWC if self.keys.layout == "hwc" else np.moveaxis(image_HWC, -1, 0)
            values[self.image_keys[camera.name]] = value
        if observation_id is not None:
            values[OBSERVATION_ID] = observation_id
        if deadline_s is not None:
            values[DEADLINE_MS] = 1e3 * deadline_s
        if episode_id is not None:
            values[EPISODE_ID] = episode_id
        given = observation.committed[0] if committed and observation.committed is not None else None
        if given is not None and len(given.actions):
            values |= {COMMITTED: given.actions.astype(np.float32), DELAY: given.delay}
        frame = pack(values)
        if len(frame) > self.max_bytes:
            raise ValueError(
                f"the request has {len(frame)} bytes, the server takes {self.max_bytes}: send smaller images or JPEG, "
                "or raise its max_message_mb"
            )
        return frame

    def read(self, frame: bytes | str) -> PolicyRequest:
        """Decode and check a frame from a client; FrameError says in one line what is wrong."""
        return self.finish(self.receive(frame))

    def receive(self, frame: bytes | str) -> ReceivedRequest:
        """Check a frame from a client, except for the pixels of encoded images; FrameError says what is wrong."""
        if isinstance(frame, str):
            raise FrameError("the request is a text frame; send msgpack in a binary frame")
        return self.check(*unpack_any(frame))

    def check(self, message: Any, dialect: Dialect = OPENPI) -> ReceivedRequest:
        """Check a decoded request, except for the pixels of encoded images; FrameError says what is wrong."""
        if not isinstance(message, dict):
            raise FrameError(f"the request is {shown(message)}, not a map of {self._known}")
        values = _flat(message)
        unknown = [key for key in values if key not in self._known and key not in self.keys.ignored]
        if unknown:
            raise FrameError(f"unknown key {shown(unknown[0])}; accepted keys: {self._known}")
        missing = [key for key in self._required if key not in values]
        if missing:
            raise FrameError(f"the request has no {missing}; required keys: {self._required}")
        images, work, pixels = {}, 0, 0
        for camera in self.embodiment.cameras:
            key = self.image_keys[camera.name]
            images[camera.name], (height, width) = self._image(key, camera, values[key])
            pixels += height * width
            encoded = isinstance(images[camera.name], bytes)
            resized = self.offer.resize is not None and (height, width) != (camera.height, camera.width)
            work += height * width if encoded or resized else 0
        if 3 * pixels > self.max_bytes:
            raise FrameError(f"the images have {3 * pixels} bytes when decoded; at most {self.max_bytes} are accepted")
        return ReceivedRequest(
            images,
            self._state(values[self.keys.state]),
            _check_prompt(self.keys.prompt, values.get(self.keys.prompt, self.keys.default_prompt)),
            observation_id=_whole(OBSERVATION_ID, values.get(OBSERVATION_ID)),
            deadline_s=_deadline_s(values.get(DEADLINE_MS)),
            dialect=dialect,
            work=work,
            episode_id=_whole(EPISODE_ID, values.get(EPISODE_ID)),
            committed=self._committed(values.get(COMMITTED), _whole(DELAY, values.get(DELAY))),
        )

    def finish(self, request: ReceivedRequest) -> PolicyRequest:
        """Decode and resize the images of a request; FrameError if one cannot be decoded."""
        images = {}
        for camera in self.embodiment.cameras:
            image_HWC = request.images[camera.name]
            if isinstance(image_HWC, bytes):
                try:
                    image_HWC = decode_image(image_HWC)
                except ValueError as error:
                    raise FrameError(f"{self.image_keys[camera.name]}: {error}") from None
            if self.offer.resize is not None:
                image_HWC = resize_image(image_HWC, (camera.height, camera.width), self.offer.resize)
            images[camera.name] = image_HWC[None]
        committed = None if request.committed is None else [request.committed]
        observation = Observation(images, request.state[None], [request.instruction], committed=committed)
        answering = request.observation_id, request.deadline_s, request.dialect
        return PolicyRequest(observation, *answering, episode_id=request.episode_id)

    def _image(self, key: str, camera: Camera, value: Any) -> tuple[np.ndarray | bytes, tuple[int, int]]:
        """Return the image of a key as uint8 [H,W,3] or as the bytes of a file, and its rows and columns."""
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
            value = value.tobytes()  # as OpenCV's `imencode` gives it
        try:
            if isinstance(value, bytes):
                size = encoded_size(value)
            else:
                value = self._pixels(key, value)
                size = value.shape[:2]
            check_size(camera, *size)
        except FrameError:
            raise
        except ValueError as error:
            raise FrameError(f"{key}: {error}") from None
        return value, size

    def _pixels(self, key: str, value: Any) -> np.ndarray:
        """Return a raw image as uint8 [H,W,3]."""
        channel = {"hwc": 2, "chw": 0}[self.keys.layout]
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[channel] != 3:
            wanted = {"hwc": "[H,W,3]", "chw": "[3,H,W]"}[self.keys.layout]
            raise FrameError(
                f"{key} must be a uint8 array {wanted}, or a JPEG or PNG as bytes, got {_described(value)}"
            )
        return value if channel == 2 else np.moveaxis(value, 0, -1)

    def _committed(self, value: Any, delay: int | None) -> Committed | None:
        """Return the committed actions, None if there are none."""
        if value is None and delay is None:
            return None
        if value is None or delay is None:
            given, missing = (DELAY, COMMITTED) if value is None else (COMMITTED, DELAY)
            raise FrameError(f"the request has {given} without {missing}: send both, or neither")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fi":
            raise FrameError(f"{COMMITTED} must be an array of numbers, got {_described(value)}")
        with np.errstate(over="ignore"):
            committed = Committed(value.astype(np.float32), delay)
        try:
            committed.validate(self.embodiment)
        except ValueError as error:
            raise FrameError(str(error)) from None
        return committed

    def _state(self, value: Any) -> np.ndarray:
        """Return the state as float32 [S]."""
        size = self.embodiment.state_dim
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fi" or value.shape != (size,):
            raise FrameError(f"{self.keys.state} must be an array of {size} numbers, got {_described(value)}")
        with np.errstate(over="ignore"):
            state_S = value.astype(np.float32)
        if not np.isfinite(state_S).all():
            raise FrameError(f"{self.keys.state} has NaN or infinite values; check the robot's joint states")
        return state_S


def _flat(message: dict[Any, Any], prefix: str = "", depth: int = 1) -> dict[str, Any]:
    """Flatten nested maps: `{"a": {"b": x}}` becomes `{"a/b": x}`; numpy's scalars become Python's."""
    if depth > MAX_NESTING:
        raise FrameError(f"maps are nested more than {MAX_NESTING} deep")
    values: dict[str, Any] = {}
    for name, value in message.items():
        if not isinstance(name, str):
            raise FrameError(f"keys must be text, got {shown(name)}")
        value = value.item() if isinstance(value, np.generic) else value
        nested = _flat(value, f"{prefix}{name}/", depth + 1) if isinstance(value, dict) else {f"{prefix}{name}": value}
        twice = values.keys() & nested.keys()
        if twice:
            raise FrameError(f"the request gives {shown(min(twice))} twice")
        values |= nested
    return values


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else shown(value)


def _check_prompt(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FrameError(f"{key} must be the instruction as text, got {_described(value)}")
    if not value.strip() or len(value) > MAX_PROMPT:
        raise FrameError(f"{key} must have 1 to {MAX_PROMPT} characters, got {len(value.strip())}")
    if len(value.encode(errors="surrogatepass")) > MAX_PROMPT_BYTES:
        raise FrameError(f"{key} has more than {MAX_PROMPT_BYTES} bytes")
    wrong = next((c for c in value if unicodedata.category(c) in _NO_TEXT and c not in "\t\n\r"), None)
    if wrong is not None:
        raise FrameError(f"{key} has the character {wrong!a}, which is no text")
    return value


def _whole(key: str, value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise FrameError(f"{key} must be a whole number, got {_described(value)}")
    return value


def _deadline_s(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise FrameError(f"{DEADLINE_MS} must be a positive number of milliseconds, got {_described(value)}")
    return value / 1e3
