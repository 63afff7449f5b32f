"""ROS 2's network: domain, range of discovery, and the profile of Fast DDS for large images. Needs no ROS 2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RANGES = ("OFF", "LOCALHOST", "SUBNET", "SYSTEM_DEFAULT")
PROFILE = Path(__file__).with_name("fastdds.xml")
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
"""Environment variables with a file of profiles; the second one is deprecated."""


@dataclass(frozen=True)
class RosSettings:
    """Network and clock of a node.

    Attributes:
        domain: ROS_DOMAIN_ID of the robot.
        discovery: ROS_AUTOMATIC_DISCOVERY_RANGE: LOCALHOST (this machine only), SUBNET, OFF or SYSTEM_DEFAULT.
        sim_time: use the time of the topic /clock instead of the computer's.
    """

    domain: int = 0
    discovery: str = "LOCALHOST"
    sim_time: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.domain, bool) or not isinstance(self.domain, int) or not 0 <= self.domain <= 232:
            raise ValueError(f"ros.domain must be from 0 to 232, got {self.domain!r}")
        if not isinstance(self.sim_time, bool):
            raise ValueError(f"ros.sim_time must be true or false, got {self.sim_time!r}")
        if self.discovery not in RANGES:
            raise ValueError(f"ros.discovery must be one of {', '.join(RANGES)}, got {self.discovery!r}")


def profile_variables() -> dict[str, str]:
    """Return the environment variables that load `PROFILE`; none if the user has set one of them."""
    if any(os.environ.get(name) for name in PROFILE_VARIABLES):
        return {}
    return {PROFILE_VARIABLES[0]: str(PROFILE)}


@contextmanager
def environment(settings: RosSettings) -> Iterator[None]:
    """Set the environment variables that ROS 2 reads while a context and its first node are made."""
    wanted = {"ROS_AUTOMATIC_DISCOVERY_RANGE": settings.discovery, **profile_variables()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
