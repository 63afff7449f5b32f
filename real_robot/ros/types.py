"""ROS 2 message types without ROS 2: definitions and CDR serialisation from rosbags, type names and hashes for DDS.

Received messages are dataclasses of rosbags. To send a message, give its fields as plain nested values (`Fields`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from cyclonedds.idl import IdlStruct, make_idl_struct
from cyclonedds.idl import types as idl
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from cogvla.real_robot.ros.node import Fields

DISTROS = {"humble": Stores.ROS2_HUMBLE, "iron": Stores.ROS2_IRON, "jazzy": Stores.ROS2_JAZZY}
_SERVICES = {
    "std_srvs/srv/SetBool_Request": "bool data",
    "std_srvs/srv/SetBool_Response": "bool success\nstring message",
    "std_srvs/srv/Trigger_Request": "uint8 structure_needs_at_least_one_member",
    "std_srvs/srv/Trigger_Response": "bool success\nstring message",
}
_REQUEST_HEADER = "uint64 client\nint64 sequence\n"
"""Fields that rmw_cyclonedds puts before the fields of a request and of its response."""
_IDL = {
    "bool": bool,
    "byte": idl.uint8,
    "char": idl.uint8,
    "float32": idl.float32,
    "float64": idl.float64,
    "int8": idl.int8,
    "int16": idl.int16,
    "int32": idl.int32,
    "int64": idl.int64,
    "uint8": idl.uint8,
    "uint16": idl.uint16,
    "uint32": idl.uint32,
    "uint64": idl.uint64,
    "string": str,
}


class RosTypes:
    """Message types of one ROS 2 distribution.

    Args:
        distro: one of `DISTROS`; for this project they differ only in the size of the ids in `ros_discovery_info`.
    """

    def __init__(self, distro: str) -> None:
        if distro not in DISTROS:
            raise ValueError(f"distro must be one of {', '.join(DISTROS)}, got {distro!r}")
        self._store = _store(DISTROS[distro])
        self._samples: dict[str, type[Sample]] = {}

    def build(self, name: str, fields: Fields) -> Any:
        """Build a message from its fields; ValueError for an unknown field."""
        known = dict(self._store.fielddefs[name][1])
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"{name} has no field {unknown}; it has {', '.join(known)}")
        return self._store.types[name](**{key: self._value(kind, fields.get(key)) for key, kind in known.items()})

    def to_cdr(self, name: str, fields: Fields) -> bytes:
        """Serialise a message as XCDR1, little endian, with header."""
        return bytes(self._store.serialize_cdr(self.build(name, fields), name))

    def from_cdr(self, name: str, cdr: bytes) -> Any:
        """Deserialise a message."""
        return self._store.deserialize_cdr(cdr, name)

    def sample_type(self, name: str) -> type[Sample]:
        """Return the class with which cyclonedds sends and receives this type."""
        if name not in self._samples:
            fields = {key: self._idl(kind) for key, kind in self._store.fielddefs[name][1]}
            made: Any = make_idl_struct(_dds_name(name), _dds_name(name), fields, dataclassify=False, bases=(Sample,))
            made.__idl_annotations__["extensibility"] = "final"  # the default XCDR2 is not read by ROS 2
            self._samples[name] = made
        return self._samples[name]

    def type_hash(self, name: str) -> str:
        """Return the RIHS01 hash of a type, which ROS 2 compares since Iron."""
        return self._store.hash_rihs01(name)

    @property
    def gid_size(self) -> int:
        """Number of bytes of the ids in `ros_discovery_info`."""
        fields: Any = self._store.fielddefs["rmw_dds_common/msg/Gid"][1]
        [(_, (_, (_, size)))] = fields
        return int(size)

    @property
    def store(self) -> Typestore:
        """Type store of rosbags, to read and write bags."""
        return self._store

    def _value(self, kind: Any, value: Any) -> Any:
        node, detail = kind
        if node is Nodetype.NAME:
            return self.build(detail, value or {})
        if node is Nodetype.BASE:
            return _ZERO.get(detail[0], 0) if value is None else value
        (element_node, element), length = detail
        if element_node is Nodetype.NAME:
            return [self.build(element, each) for each in value or ()]
        if element[0] == "string":
            return list(value or ())
        numbers = np.zeros(length if node is Nodetype.ARRAY else 0) if value is None else value
        return np.ascontiguousarray(numbers, dtype=_NUMPY.get(element[0], element[0]))

    def _idl(self, kind: Any) -> Any:
        node, detail = kind
        types: Any = idl
        if node is Nodetype.NAME:
            return self.sample_type(detail)
        if node is Nodetype.BASE:
            return types.bounded_str[detail[1]] if detail[0] == "string" and detail[1] else _IDL[detail[0]]
        element, length = detail
        if node is Nodetype.ARRAY:
            return types.array[self._idl(element), length]
        return types.sequence[self._idl(element), length] if length else types.sequence[self._idl(element)]


_ZERO = {"string": "", "bool": False, "float32": 0.0, "float64": 0.0}
_NUMPY = {"byte": "uint8", "char": "uint8"}


class Sample(IdlStruct):
    """Serialised message. It bypasses cyclonedds' own serialiser, which takes 95 ms for an image of 640x480."""

    def __init__(self, cdr: bytes) -> None:
        self.cdr = cdr

    def serialize(self, buffer: Any = None, endianness: Any = None, use_version_2: bool | None = None) -> bytes:
        return self.cdr

    @classmethod
    def deserialize(cls, data: bytes, has_header: bool = True, use_version_2: bool | None = None) -> Sample:
        return cls(data)

    @classmethod
    def deserialize_key(cls, data: bytes, has_header: bool = True, use_version_2: bool | None = None) -> Sample:
        return cls(b"")


def _dds_name(name: str) -> str:
    package, kind, message = name.split("/")
    return f"{package}::{kind}::dds_::{message}_"


@cache
def _store(store: Stores) -> Typestore:
    typestore = get_typestore(store)
    for name, definition in _SERVICES.items():
        parsed = get_types_from_msg(_REQUEST_HEADER + definition, name)  # it renames types that are no msg
        typestore.register({name: next(iter(parsed.values()))})
    return typestore
