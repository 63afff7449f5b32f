"""Which view is used, with and without rerun (lerobot 0.6 does not bring it), and what a slow encoder does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cogvla.real_robot.bridge.bridge import Tick
from cogvla.real_robot.bridge.live_view import VideoView, choose_view
from cogvla.real_robot.control.loop_types import Command, Kind


@pytest.mark.parametrize(
    ("view", "screen", "installed", "chosen"),
    [
        ("auto", ":0", True, "rerun"),
        ("auto", ":0", False, "video"),
        ("auto", "", True, "video"),
        ("video", ":0", True, "video"),
        ("none", ":0", False, "none"),
        ("rerun", "", True, "rerun"),
    ],
)
def test_the_view(view: str, screen: str, installed: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, screen, installed)
    assert choose_view(view) == chosen


@pytest.mark.parametrize(
    ("view", "said"),
    [("rerun", "^view=rerun: rerun is not installed; .*=video$"), ("window", "^view must be one of")],
)
def test_a_view_that_is_not_there(view: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, ":0", False)
    with pytest.raises(ValueError, match=said):
        choose_view(view)


def test_a_video_whose_encoder_is_slow_leaves_frames_out(tmp_path: Path) -> None:
    view = VideoView(tmp_path / "slow.mp4", 20.0)  # its thread does not run: nothing is encoded
    picture = {"front": np.zeros((8, 12, 3), np.uint8)}
    for number in range(1000):
        view.show(Tick(Command(Kind.NONE, number, None), picture, None, "pick", 0.0))
    assert view._waiting.qsize() < 1000


def _machine(monkeypatch: pytest.MonkeyPatch, screen: str, installed: bool) -> None:
    """Stand in for a machine with or without a screen and rerun."""
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", screen)
    rerun = ModuleType("rerun")
    rerun.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "rerun", rerun if installed else None)
