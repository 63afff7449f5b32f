"""Executable of the package; the node itself is in `cogvla`, which pip installs."""

from cogvla.real_robot.ros.lifecycle_node import main

__all__ = ["main"]
