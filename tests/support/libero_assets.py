"""Where tests find LIBERO's assets, and the marks of tests that need LIBERO.

The assets are those of COGVLA_LIBERO_ASSETS, or of a folder `shared/libero_assets` beside the checkout.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from cogvla.libero.env import LiberoSettings
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import SHARED

ASSETS = os.environ.get("COGVLA_LIBERO_ASSETS") or str(SHARED / "libero_assets" / "assets")
LITE = SHARED / "libero_assets" / "robot_lite"
MESHES = str(LITE) if LITE.is_dir() else None
LEAN = LiberoSettings(ASSETS, lean=True, reflections=False, robot_meshes=MESHES)

installed = find_spec("robosuite") is not None
needs_libero = pytest.mark.skipif(not installed, reason=needs("libero"))
needs_assets = pytest.mark.skipif(
    not installed or not (Path(ASSETS) / "scenes").is_dir(),
    reason=f"no LIBERO assets at {ASSETS}" if installed else needs("libero"),
)
