"""Settings of `real_robot.ros.dds`, which can be read where Cyclone DDS is not installed."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = "lo"


@dataclass(frozen=True)
class DdsSettings:
    """Network and ROS 2 distribution.

    Attributes:
        domain: ROS_DOMAIN_ID of the robot.
        interface: network interface; "lo": this machine only, without multicast; None: use CYCLONEDDS_URI.
        distro: ROS 2 distribution of the robot, one of `ros_types.DISTROS`.
    """

    domain: int = 0
    interface: str | None = LOOPBACK
    distro: str = "humble"

    def __post_init__(self) -> None:
        if not 0 <= self.domain <= 232:
            raise ValueError(f"dds.domain must be from 0 to 232, got {self.domain}")

    def configuration(self) -> str | None:
        """Return the configuration of Cyclone DDS as XML, or None to let Cyclone DDS find its own."""
        if self.interface is None:
            return None
        loopback = self.interface == LOOPBACK
        multicast = "false" if loopback else "default"
        peers = '<Peers><Peer address="localhost"/></Peers>' if loopback else ""
        return (
            "<CycloneDDS><Domain><General>"
            f'<Interfaces><NetworkInterface name="{self.interface}" multicast="{multicast}"/></Interfaces>'
            f"<AllowMulticast>{multicast}</AllowMulticast><MaxMessageSize>65500B</MaxMessageSize></General>"
            "<Discovery><ParticipantIndex>auto</ParticipantIndex>"
            f"<MaxAutoParticipantIndex>32</MaxAutoParticipantIndex>{peers}</Discovery></Domain></CycloneDDS>"
        )
