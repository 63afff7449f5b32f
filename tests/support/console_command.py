"""Run a console command in this process, which has imported everything: one of its own takes seconds to do so."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hydra.core.global_hydra import GlobalHydra


def ended(command: Callable[[], None], *arguments: str) -> str | int | None:
    """Return what a command of `cogvla.scripts.console` ends with: a text, or a status; None: it came to its end."""
    GlobalHydra.instance().clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["command", *arguments])
            command()
    except SystemExit as end:
        return end.code
    finally:
        GlobalHydra.instance().clear()
    return None
