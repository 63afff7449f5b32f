"""Every test process uses one thread: the processes share the cores, and threads that wait for each other spin."""

from __future__ import annotations

import os
import signal

# A shell that runs tests in the background has them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402 - reads the environment when it is imported

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _ctrl_c_as_ever() -> None:
    """What a test does to Ctrl-C is no matter of the next one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
