"""Say why a test is skipped: what it needs that is not installed, and what installs it."""

from __future__ import annotations

INSTALL = "`uv sync --all-extras --group test`"
NEEDS_TEST_GROUP = f"needs the dependency group `test`: {INSTALL}"


def needs(extra: str) -> str:
    """Return the reason to skip a test without this extra of pyproject.toml."""
    return f"needs the extra `{extra}`: {INSTALL}"
