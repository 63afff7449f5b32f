"""Skip tests of the plugin where it is not installed, and say why."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pytest


def require_plugin() -> None:
    """Skip the module that calls this, unless `lerobot_policy_cogvla` is installed."""
    try:
        version("lerobot_policy_cogvla")
    except PackageNotFoundError:
        pytest.skip(
            "needs the plugin: `uv pip install --no-deps --editable lerobot_policy_cogvla`", allow_module_level=True
        )
