"""Metadata of a policy server, the first frame of a connection. Clients check it before they move a robot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cogvla.policy.interface import Embodiment
from cogvla.real_robot.serving.request import OPTIONAL, ImageOffer, RequestFormat, RequestKeys
from cogvla.real_robot.serving.wire import shown

SERVER = "cogvla"
PROTOCOL_VERSION = 1
HERE, THERE = "on this computer", "on the server's computer"
CHECKED = ("state_dim", "action_dim", "chunk", "control_hz", "gripper_index", "gripper_open", "gripper_close")
"""Fields of `Embodiment` that must be equal for robot and policy, besides the camera names."""


@dataclass(frozen=True)
class ServerInfo:
    """Metadata of a policy server.

    Attributes:
        embodiment: robot that the policy was trained for.
        keys: keys of the requests.
        policy: description of the policy, with entries that identify its weights.
        max_message_bytes: largest request in bytes; a larger one ends the connection.
        max_batch: largest number of requests in one forward pass.
        images: images that the server takes; an older server takes raw ones only.
        episodes: True if the server takes `episode_id`; an older server refuses it.
        committed: True if the server takes `committed` and `delay`, and its policy reads them; an older server refuses
            them.
    """

    embodiment: Embodiment
    keys: RequestKeys
    policy: Mapping[str, Any]
    max_message_bytes: int
    max_batch: int
    images: ImageOffer = field(default_factory=ImageOffer)
    episodes: bool = False
    committed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the metadata as maps, lists, text and numbers, ready to send."""
        values = {
            "server": SERVER,
            "protocol_version": PROTOCOL_VERSION,
            "embodiment": asdict(self.embodiment),
            "request": {
                **asdict(self.keys),
                "images": RequestFormat(self.embodiment, self.keys).image_keys,
                "optional": OPTIONAL,
            },
            "policy": dict(self.policy),
            # An older client ignores these entries, but no new ones in the others.
            "images": asdict(self.images),
            "episodes": self.episodes,
            "committed": self.committed,
            "limits": {"max_message_bytes": self.max_message_bytes, "max_batch": self.max_batch},
        }
        return json.loads(json.dumps(values, default=str))

    @staticmethod
    def from_dict(values: Any) -> ServerInfo:
        """Read the metadata that a server sent.

        Raises:
            ValueError: it is no cogvla server, or it has another version; the message says which side to update.
        """
        if not isinstance(values, dict) or values.get("server") != SERVER:
            raise ValueError("this is no cogvla policy server: its metadata does not describe the embodiment")
        version = values.get("protocol_version")
        if version != PROTOCOL_VERSION:
            newer = isinstance(version, int) and version > PROTOCOL_VERSION
            raise ValueError(
                f"the server speaks protocol version {shown(version)}, this client version {PROTOCOL_VERSION}: update "
                f"cogvla {HERE if newer else THERE}"
            )
        try:
            limits = values["limits"]
            unknown = sorted(values["embodiment"].keys() - _known(Embodiment, values["embodiment"]).keys())
            if unknown:
                raise ValueError(
                    f"the policy's embodiment has {', '.join(map(shown, unknown))}, which this client does not know: "
                    f"update cogvla {HERE}"
                )
            info = ServerInfo(
                Embodiment(**values["embodiment"]),
                RequestKeys(**_known(RequestKeys, values["request"])),
                values["policy"],
                limits["max_message_bytes"],
                limits["max_batch"],
                ImageOffer(**_known(ImageOffer, values.get("images", {}))),
                bool(values.get("episodes", False)),
                bool(values.get("committed", False)),
            )
            RequestFormat(info.embodiment, info.keys)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the server's metadata is incomplete: {shown(repr(error), 200)}: update cogvla {THERE}"
            ) from error
        return info

    def check(self, robot: Embodiment) -> None:
        """Raise a ValueError with every difference between the policy's embodiment and this robot, if there are any."""
        ours, theirs = robot, self.embodiment
        differences = [
            f"{name}: robot {getattr(ours, name)}, policy {getattr(theirs, name)}"
            for name in CHECKED
            if getattr(ours, name) != getattr(theirs, name)
        ]
        if set(ours.camera_names) != set(theirs.camera_names):
            differences.append(f"cameras: robot {sorted(ours.camera_names)}, policy {sorted(theirs.camera_names)}")
        if differences:
            raise ValueError(
                f"the policy was trained for {theirs.name!r} and does not fit the robot {ours.name!r}: "
                + "; ".join(differences)
            )


def _known(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are fields of a dataclass; a newer server may send more."""
    names = {each.name for each in fields(kind)}
    return {key: value for key, value in values.items() if key in names}
