"""The error of a measurement that this machine or this model does not support."""

from __future__ import annotations


class NotMeasuredError(ValueError):
    """Raised for a row that cannot be measured here; it is left out, and the text says why."""
