"""What the tests of the plugin share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvla.tests.support.paths import SHIPPED


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policy in lerobot's layout."""
    from lerobot_policy_cogvla.conversion import to_lerobot

    folder = tmp_path_factory.mktemp("lerobot") / "pretrained_model"
    to_lerobot(SHIPPED, folder)
    return folder


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three demonstrations of tabletop_object with images of 32 pixels."""
    from cogvla.envs.recording.recorder import record

    return record("tabletop_object", 3, tmp_path_factory.mktemp("data") / "tabletop", image_size=32, workers=0)
