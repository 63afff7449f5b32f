"""Folders that tests read from."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
CONFIGS = ROOT / "configs"
SHIPPED = ROOT / "checkpoints" / "tabletop_object"
"""The checkpoint that comes with the repository."""
SHARED = ROOT.parent / "shared"
"""Outputs of the published code, and LIBERO's meshes; not part of the repository, so tests that need it can be
skipped."""
