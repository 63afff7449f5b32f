"""Convert ROS 2 messages to images and states, and actions to ROS 2 messages. Needs no ROS 2.

Incoming messages are objects with the fields as attributes, such as those of rclpy and rosbags. Outgoing messages are
plain nested values (`Fields`).

Shape legend: H, W image size, b bytes of a pixel, S state dimension, A action dimension,
D joints of a trajectory, N its points.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cogvla.real_robot.ros.node import Fields, seconds_of, stamp_of
from cogvla.real_robot.serving.images import decode_image, encode_jpeg

_CHANNELS: dict[str, tuple[int, tuple[int, ...]]] = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "8UC3": (3, (2, 1, 0)),
}
"""Encoding -> bytes per pixel, and the positions of red, green and blue. 8UC3 means OpenCV's order, BGR."""
_CONVERTED = {
    "yuv422": (2, "COLOR_YUV2RGB_UYVY"),
    "uyvy": (2, "COLOR_YUV2RGB_UYVY"),
    "yuv422_yuy2": (2, "COLOR_YUV2RGB_YUY2"),
    "yuyv": (2, "COLOR_YUV2RGB_YUY2"),
    "bayer_rggb8": (1, "COLOR_BayerBG2RGB"),
    "bayer_bggr8": (1, "COLOR_BayerRG2RGB"),
    "bayer_gbrg8": (1, "COLOR_BayerGR2RGB"),
    "bayer_grbg8": (1, "COLOR_BayerGB2RGB"),
}
"""Encoding -> bytes per pixel, and OpenCV's conversion, which names a pattern by its second row and column."""


def image_of(message: Any) -> np.ndarray:
    """Convert a sensor_msgs/Image to uint8 [H,W,3] RGB, contiguous and a copy.

    Raises:
        ValueError: the encoding has no colours, has not 8 bits or is not known; or the data does not fit the size.
    """
    name = message.encoding
    if name not in _CHANNELS and name not in _CONVERTED:
        raise ValueError(
            f"encoding {name!r} is not supported, because policy cameras are RGB with 8 bits; one of "
            + ", ".join([*_CHANNELS, *_CONVERTED])
        )
    channels = (_CHANNELS.get(name) or _CONVERTED[name])[0]
    height, width, step = message.height, message.width, message.step
    data = np.frombuffer(message.data, np.uint8) if isinstance(message.data, bytes) else np.asarray(message.data)
    if min(height, width) < 1 or step < width * channels or data.size < height * step:
        raise ValueError(f"{width}x{height} {name} with rows of {step} bytes has only {data.size} bytes")
    rows = data[: height * step].reshape(height, step)[:, : width * channels]
    if name in _CONVERTED:
        return _converted(rows.reshape(height, width, channels), name)
    return rows.reshape(height, width, channels)[:, :, list(_CHANNELS[name][1])].astype(np.uint8)


def _converted(pixels_HWb: np.ndarray, name: str) -> np.ndarray:
    """Convert YUV or Bayer pixels, uint8 [H,W,b], to uint8 [H,W,3] RGB with OpenCV."""
    height, width = pixels_HWb.shape[:2]
    if width % 2 or (name.startswith("bayer") and (height % 2 or min(height, width) < 4)):
        raise ValueError(f"an image of {width}x{height} pixels cannot be {name}, whose pixels are in pairs")
    try:
        import cv2
    except ImportError:
        raise ValueError(f"encoding {name} needs OpenCV: pip install opencv-python-headless") from None
    return cv2.cvtColor(np.ascontiguousarray(pixels_HWb, dtype=np.uint8), getattr(cv2, _CONVERTED[name][1]))


def compressed_image_of(message: Any) -> np.ndarray:
    """Convert a sensor_msgs/CompressedImage (JPEG, PNG) to uint8 [H,W,3] RGB.

    Raises:
        ValueError: it cannot be read, or it is not RGB with 8 bits.
    """
    try:
        return decode_image(bytes(message.data))
    except ValueError as error:
        raise ValueError(f"a compressed image ({message.format!r}) cannot be read: {error}") from None


def state_of(message: Any, joints: Sequence[str]) -> np.ndarray:
    """Return the positions [S] of `joints` in a sensor_msgs/JointState, which may hold more joints in any order.

    Raises:
        ValueError: a joint is missing, named twice or has no position.
    """
    positions = dict(zip(message.name, message.position, strict=False))
    missing = [name for name in joints if name not in positions]
    if twice := [name for name in joints if list(message.name).count(name) > 1]:
        raise ValueError(f"a joint state names {', '.join(twice)} twice")
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
    header = {"stamp": stamp_of(stamp), "frame_id": frame}
    return {
        "header": header,
        "format": "rgb8; jpeg compressed rgb8",
        "data": np.frombuffer(encode_jpeg(image_HW3, quality), np.uint8),
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


def trajectory_fields(points_ND: np.ndarray, joints: Sequence[str], times_s: Sequence[float]) -> Fields:
    """Return the fields of a trajectory_msgs/JointTrajectory to be at each point [N,D] after so many seconds.

    The stamp is 0, which means now. Without velocities the controller interpolates positions and ends at rest.
    """
    points = [
        {"positions": np.asarray(point_D, float), "time_from_start": stamp_of(after_s)}
        for point_D, after_s in zip(points_ND, times_s, strict=True)
    ]
    return {"joint_names": list(joints), "points": points}


def trajectory_of(message: Any, joints: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return positions [N,D] and times [N] in seconds of a trajectory_msgs/JointTrajectory.

    It may hold more joints than `joints`, in any order.

    Raises:
        ValueError: it has no points, a joint is missing or named twice, or a point has another number of positions.
    """
    names = list(message.joint_names)
    if not message.points:
        raise ValueError("a trajectory has no points")
    if missing := [name for name in joints if names.count(name) != 1]:
        raise ValueError(f"a trajectory must name {', '.join(missing)} once; it names {', '.join(names) or 'none'}")
    for point in message.points:
        if len(point.positions) != len(names):
            raise ValueError(f"a point has {len(point.positions)} positions, the trajectory {len(names)} joints")
    points_ND = np.array([[point.positions[names.index(name)] for name in joints] for point in message.points], float)
    return points_ND, np.array([seconds_of(point.time_from_start) for point in message.points])


def twist_fields(velocity_6: np.ndarray, stamp: float, frame: str) -> Fields:
    """Return the fields of a geometry_msgs/TwistStamped from linear and angular velocity [6]."""
    x, y, z, roll, pitch, yaw = map(float, velocity_6)
    return {
        "header": {"stamp": stamp_of(stamp), "frame_id": frame},
        "twist": {"linear": {"x": x, "y": y, "z": z}, "angular": {"x": roll, "y": pitch, "z": yaw}},
    }


def twist_of(message: Any) -> np.ndarray:
    """Return the linear and angular velocity [6] of a geometry_msgs/TwistStamped."""
    return np.array([getattr(part, axis) for part in (message.twist.linear, message.twist.angular) for axis in "xyz"])


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
