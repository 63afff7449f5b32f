"""The lifecycle node, whose way to the robot's controller fails at every tenth command."""

from __future__ import annotations

import itertools
from typing import Any

from cogvla.real_robot.ros.front_end import RosFrontEnd
from cogvla.real_robot.ros.lifecycle_node import main

_send = RosFrontEnd.send
_number = itertools.count(1)


def _fails(front_end: RosFrontEnd, *arguments: Any) -> None:
    if next(_number) % 10 == 0:
        raise RuntimeError("no way to the arm")
    _send(front_end, *arguments)


if __name__ == "__main__":
    RosFrontEnd.send = _fails  # type: ignore[assignment,method-assign]
    main()
