"""Choose the device that runs a policy."""

from __future__ import annotations

import torch

from cogvla.errors import first_line


def usable_device(device: str | int | None) -> str:
    """Return the wanted torch device; None: cuda if available, else cpu; 1: cuda:1. A GPU becomes torch's current one.

    Raises:
        ValueError: there is no such device, or it cannot be used on this machine.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = f"cuda:{device}" if isinstance(device, int) else device
    try:
        found = torch.empty(0, device=chosen).device
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        if found.type == "cuda":
            torch.cuda.set_device(found)
    except (RuntimeError, AssertionError) as error:  # the second one if torch was built without CUDA
        raise ValueError(f"device={chosen} cannot be used here ({first_line(error)}); give device=cpu") from error
    return chosen
