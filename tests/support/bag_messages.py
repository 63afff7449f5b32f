"""Messages of ROS 2 for bags, from plain nested values as the front end sends them, without ROS 2."""

from __future__ import annotations

from typing import Any

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_typestore

from cogvla.real_robot.ros.node import Fields

STORE = get_typestore(Stores.ROS2_HUMBLE)
_ZERO = {"string": "", "bool": False, "float32": 0.0, "float64": 0.0}
_NUMPY = {"byte": "uint8", "char": "uint8"}


def to_cdr(name: str, fields: Fields) -> bytes:
    """Serialise a message of a type such as `std_msgs/msg/String`; missing fields are zero or empty."""
    return bytes(STORE.serialize_cdr(_build(name, fields), name))


def _build(name: str, fields: Fields) -> Any:
    known = dict(STORE.fielddefs[name][1])
    return STORE.types[name](**{key: _value(kind, fields.get(key)) for key, kind in known.items()})


def _value(kind: Any, value: Any) -> Any:
    node, detail = kind
    if node is Nodetype.NAME:
        return _build(detail, value or {})
    if node is Nodetype.BASE:
        return _ZERO.get(detail[0], 0) if value is None else value
    (element_node, element), length = detail
    if element_node is Nodetype.NAME:
        return [_build(element, each) for each in value or ()]
    if element[0] == "string":
        return list(value or ())
    numbers = np.zeros(length if node is Nodetype.ARRAY else 0) if value is None else value
    return np.ascontiguousarray(numbers, dtype=_NUMPY.get(element[0], element[0]))
