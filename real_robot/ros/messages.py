"""Convert ROS 2 messages to images and states, and actions to ROS 2 messages. Needs neither ROS 2 nor DDS.

Incoming messages are objects with the fields as attributes, such as those of rclpy and rosbags. Outgoing messages are
plain nested values (`Fields`).

Shape legend: H, W image size, S state dimension, A action dimension.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cogvla.real_robot.ros.node import Fields, stamp_of

_CHANNELS: dict[str, tuple[int, tuple[int, ...]]] = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC3": (3, (2, 1, 0)),
}
"""Encoding -> bytes per pixel, and the positions of red, green and blue. 8UC3 means OpenCV's order, BGR."""


def image_of(message: Any) -> np.ndarray:
    """Convert a sensor_msgs/Image to uint8 [H,W,3] RGB, contiguous and a copy.

    Raises:
        ValueError: the encoding is not supported, or there is less data than the size requires.
    """
    if message.encoding not in _CHANNELS:
        raise ValueError(f"encoding {message.encoding!r} is not supported; one of {', '.join(_CHANNELS)}")
    channels, order = _CHANNELS[message.encoding]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, np.uint8) if isinstance(message.data, bytes) else np.asarray(message.data)
    if step < width * channels or data.size < height * step:
        raise ValueError(f"{width}x{height} {message.encoding} with rows of {step} bytes has only {data.size} bytes")
    rows = data[: height * step].reshape(height, step)[:, : width * channels]
    return rows.reshape(height, width, channels)[:, :, list(order)].astype(np.uint8)


def compressed_image_of(message: Any) -> np.ndarray:
    """Convert a sensor_msgs/CompressedImage (JPEG, PNG) to uint8 [H,W,3] RGB; ValueError if it cannot be read."""
    try:
        with Image.open(io.BytesIO(bytes(message.data))) as picture:
            return np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(f"a compressed image ({message.format!r}) cannot be read: {error}") from error


def state_of(message: Any, joints: Sequence[str]) -> np.ndarray:
    """Return the positions [S] of `joints` in a sensor_msgs/JointState, which may hold more joints in any order.

    Raises:
        ValueError: a joint is missing or has no position.
    """
    positions = dict(zip(message.name, message.position, strict=False))
    missing = [name for name in joints if name not in positions]
    if missing:
        raise ValueError(f"no position of {', '.join(missing)}; there are {', '.join(positions) or 'none'}")
    return np.array([positions[name] for name in joints])


def image_fields(image_HW3: np.ndarray, stamp: float, frame: str) -> Fields:
    """Return the fields of a sensor_msgs/Image from an image, uint8 [H,W,3] RGB."""
    height, width = image_HW3.shape[:2]
    return {
        "header": {"stamp": stamp_of(stamp), "frame_id": frame},
        "height": height,
        "width": width,
        "encoding": "rgb8",
        "step": 3 * width,
        "data": np.ascontiguousarray(image_HW3).reshape(-1),
    }


def compressed_image_fields(image_HW3: np.ndarray, stamp: float, frame: str, quality: int = 95) -> Fields:
    """Return the fields of a sensor_msgs/CompressedImage, JPEG, from an image, uint8 [H,W,3] RGB."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, "JPEG", quality=quality)
    header = {"stamp": stamp_of(stamp), "frame_id": frame}
    return {
        "header": header,
        "format": "rgb8; jpeg compressed rgb8",
        "data": np.frombuffer(buffer.getvalue(), np.uint8),
    }


def joint_state_fields(positions: Mapping[str, float], stamp: float) -> Fields:
    """Return the fields of a sensor_msgs/JointState."""
    return {
        "header": {"stamp": stamp_of(stamp)},
        "name": list(positions),
        "position": np.array(list(positions.values()), float),
    }


def array_fields(action_A: np.ndarray) -> Fields:
    """Return the fields of a std_msgs/Float64MultiArray from an action [A]."""
    dimension = {"label": "action", "size": len(action_A), "stride": len(action_A)}
    return {"layout": {"dim": [dimension]}, "data": np.asarray(action_A, float)}


def trajectory_fields(action_A: np.ndarray, joints: Sequence[str], period_s: float) -> Fields:
    """Return the fields of a trajectory_msgs/JointTrajectory with one point, to reach in one control period.

    The stamp is 0, which means now. Without velocities the controller interpolates positions and ends at rest.
    """
    point = {"positions": np.asarray(action_A, float), "time_from_start": stamp_of(period_s)}
    return {"joint_names": list(joints), "points": [point]}


LEVELS = {"idle": 0, "running": 0, "holding": 1, "stopped": 2}
"""State of the loop -> level of diagnostic_msgs/DiagnosticStatus: 0 OK, 1 WARN, 2 ERROR."""


def diagnostics_fields(values: Mapping[str, Any], node: str, stamp: float) -> Fields:
    """Return the fields of a diagnostic_msgs/DiagnosticArray with one status from `Bridge.diagnostics`."""
    reason = values["fault"] or values["stale"] or values["last_failure"] or ""
    status = {
        "level": LEVELS[values["state"]],
        "name": f"{node.lstrip('/')}: control loop",
        "message": f"{values['state']}: {reason}" if reason and values["state"] != "running" else values["state"],
        "hardware_id": "",
        "values": [{"key": key, "value": text} for key, text in _flat(values)],
    }
    return {"header": {"stamp": stamp_of(stamp)}, "status": [status]}


def diagnostics_of(message: Any) -> dict[str, Any]:
    """Read a message made by `diagnostics_fields`: key -> value, nested keys joined with dots."""
    return {pair.key: json.loads(pair.value) for status in message.status for pair in status.values}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, json.dumps(value)))
    return pairs
