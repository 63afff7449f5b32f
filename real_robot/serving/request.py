"""Request format of the policy server: the keys of the cameras, the state, the instruction and the optional entries.

Server and clients use the same `RequestFormat`; the server sends it to the clients in its metadata.

Shape legend: S state dimension, H image height, W image width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvla.policy.interface import Embodiment, Observation
from cogvla.real_robot.serving.wire import FrameError, pack, shown, unpack

MAX_PROMPT = 1000
MAX_NESTING = 3
OBSERVATION_ID = "observation_id"
DEADLINE_MS = "deadline_ms"
OPTIONAL = {
    OBSERVATION_ID: "whole number that the answer repeats",
    DEADLINE_MS: "milliseconds that the client waits for the answer; after that the server drops the request",
}
"""Optional keys with their meaning. openpi's clients do not send them."""
LAYOUTS = ("hwc", "chw")


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
class PolicyRequest:
    """One checked request.

    Attributes:
        observation: observation of batch size 1.
        observation_id: number that the answer repeats; None if the client sent none.
        deadline_s: seconds that the client waits for the answer; None if it sent none.
    """

    observation: Observation
    observation_id: int | None = None
    deadline_s: float | None = None


class RequestFormat:
    """Encoder and decoder of requests for one embodiment; ValueError if the keys do not fit its cameras."""

    def __init__(self, embodiment: Embodiment, keys: RequestKeys) -> None:
        self.embodiment, self.keys = embodiment, keys
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
        self, observation: Observation, observation_id: int | None = None, deadline_s: float | None = None
    ) -> bytes:
        """Encode an observation of batch size 1 as a frame; ValueError if it does not fit the embodiment."""
        observation.validate(self.embodiment)
        if observation.batch_size != 1:
            raise ValueError(f"a request holds one observation, got a batch of {observation.batch_size}")
        values: dict[str, Any] = {self.keys.state: observation.state[0], self.keys.prompt: observation.instruction[0]}
        for name, key in self.image_keys.items():
            image_HWC = observation.images[name][0]
            values[key] = image_HWC if self.keys.layout == "hwc" else np.moveaxis(image_HWC, -1, 0)
        if observation_id is not None:
            values[OBSERVATION_ID] = observation_id
        if deadline_s is not None:
            values[DEADLINE_MS] = 1e3 * deadline_s
        return pack(values)

    def read(self, frame: bytes | str) -> PolicyRequest:
        """Decode and check a frame from a client; FrameError says in one line what is wrong."""
        if isinstance(frame, str):
            raise FrameError("the request is a text frame; send msgpack in a binary frame")
        message = unpack(frame)
        if not isinstance(message, dict):
            raise FrameError(f"the request is {shown(message)}, not a map of {self._known}")
        values = _flat(message)
        unknown = [key for key in values if key not in self._known and key not in self.keys.ignored]
        if unknown:
            raise FrameError(f"unknown key {shown(unknown[0])}; accepted keys: {self._known}")
        missing = [key for key in self._required if key not in values]
        if missing:
            raise FrameError(f"the request has no {missing}; required keys: {self._required}")
        return PolicyRequest(
            Observation(
                images={name: self._image(key, values[key])[None] for name, key in self.image_keys.items()},
                state=self._state(values[self.keys.state])[None],
                instruction=[_check_prompt(self.keys.prompt, values.get(self.keys.prompt, self.keys.default_prompt))],
            ),
            observation_id=_observation_id(values.get(OBSERVATION_ID)),
            deadline_s=_deadline_s(values.get(DEADLINE_MS)),
        )

    def _image(self, key: str, value: Any) -> np.ndarray:
        """Return the image of a key as uint8 [H,W,3]."""
        channel = {"hwc": 2, "chw": 0}[self.keys.layout]
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[channel] != 3:
            wanted = {"hwc": "[H,W,3]", "chw": "[3,H,W]"}[self.keys.layout]
            raise FrameError(f"{key} must be a uint8 array {wanted}, got {_described(value)}")
        return value if channel == 2 else np.moveaxis(value, 0, -1)

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
    """Flatten nested maps: `{"a": {"b": x}}` becomes `{"a/b": x}`."""
    if depth > MAX_NESTING:
        raise FrameError(f"maps are nested more than {MAX_NESTING} deep")
    values: dict[str, Any] = {}
    for name, value in message.items():
        if not isinstance(name, str):
            raise FrameError(f"keys must be text, got {shown(name)}")
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
    return value


def _observation_id(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise FrameError(f"{OBSERVATION_ID} must be a whole number, got {_described(value)}")
    return value


def _deadline_s(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise FrameError(f"{DEADLINE_MS} must be a positive number of milliseconds, got {_described(value)}")
    return value / 1e3
