"""What a `Bridge` stands between: a robot, and who is asked for actions.

Shape legend: A action dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cogvla.policy.interface import Observation
from cogvla.real_robot.serving.async_client import Answer

if TYPE_CHECKING:
    from cogvla.real_robot.bridge.bridge import Bridge


class FrontEnd(Protocol):
    """A robot: its sensors, its controller, and its operator's buttons."""

    def start(self, bridge: Bridge) -> None:
        """From now on call the bridge with whatever arrives, from any thread."""
        ...

    def send(self, action_A: np.ndarray, dry_run: bool) -> None:
        """Send a command [A] to the controller, or only show it in a dry run. Quick; called under the bridge's lock."""
        ...

    def show(self, diagnostics: Mapping[str, Any]) -> None:
        """Publish `Bridge.diagnostics`."""
        ...

    def close(self) -> None:
        """Call the bridge no more, and leave the robot as it is."""
        ...


class AsksPolicy(Protocol):
    """`ReconnectingClient`, or a stand-in."""

    async def infer(
        self, observation: Observation, *, timeout_s: float | None = None, observation_id: int | None = None
    ) -> Answer: ...

    async def close(self) -> None: ...
