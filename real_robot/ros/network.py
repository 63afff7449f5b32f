"""ROS 2's network: domain, range of discovery, and what Fast DDS needs for large images. Needs no ROS 2."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

RANGES = ("OFF", "LOCALHOST", "SUBNET", "SYSTEM_DEFAULT")
PROFILE = Path(__file__).with_name("fastdds.xml")
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
"""Environment variables with a file of profiles; the second one is deprecated."""
SHARED_MEMORY = Path("/dev/shm")
_PORT = re.compile(r"/(fast(?:dds|rtps)_port\d+)\b")


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
        with no_port_of_the_dead():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def no_port_of_the_dead() -> Iterator[None]:
    """Keep Fast DDS, while a context and its first node are made, from ports that others share with a dead process.

    A killed process leaves its ports in shared memory. A new process that takes the same number makes a new port, but
    the others go on to write into the old one, for seconds, or for ever if the process died while it read: the new
    process is deaf. A port whose lock is taken counts as used, so Fast DDS takes the next number.
    """
    with ExitStack() as held:
        for port in _open_ports():
            if (SHARED_MEMORY / f"{port}_sl").exists():
                continue  # many may read it
            with suppress(OSError):  # its process lives, or is another user's
                lock = held.enter_context((SHARED_MEMORY / f"{port}_el").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _open_ports() -> set[str]:
    """Return the names of all ports of Fast DDS that a process of this user has open."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            found.update(_PORT.findall(maps.read_text(errors="replace")))
    return found
