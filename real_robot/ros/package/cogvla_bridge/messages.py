"""Fill messages of rclpy from plain nested values. This file does not import ROS 2."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_ELEMENT = re.compile(r"sequence<(\w+)/(\w+)>")


def fill(message: Any, fields: Mapping[str, Any], message_type: Callable[[str], Any]) -> Any:
    """Set the fields of a message and return it; the other fields keep their values.

    Args:
        message: message of rclpy.
        fields: field name -> value; a mapping for a nested message, a list of mappings for a sequence of messages, a
            list or numpy array for numbers.
        message_type: function from a name such as `std_msgs/msg/Header` to its class, for elements of sequences.
    """
    for name, value in fields.items():
        present = getattr(message, name)
        if isinstance(value, Mapping):
            fill(present, value, message_type)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            element = _ELEMENT.fullmatch(message.get_fields_and_field_types()[name])
            assert element is not None, f"{name} is a sequence of messages"
            kind = message_type(f"{element[1]}/msg/{element[2]}")
            setattr(message, name, [fill(kind(), each, message_type) for each in value])
        elif isinstance(present, bytes):  # `byte` is bytes of length one in Python
            setattr(message, name, bytes([value]))
        else:
            setattr(message, name, value.tolist() if isinstance(value, np.ndarray) else value)
    return message
