"""Collect the versions, the git commit and the machine, to reproduce a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "cogvla", "torch", "torchvision", "transformers", "timm", "einops", "numpy", "lerobot",
    "mujoco", "gymnasium", "hf-libero", "robosuite", "hydra-core", "av", "pillow",
)  # fmt: skip
ENVIRONMENT = ("MUJOCO_GL", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def provenance() -> dict[str, Any]:
    """Return versions, commit and machine, as plain values for JSON."""
    return {"versions": versions(), "commit": commit(), "machine": machine()}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any] | None:
    """Return the git commit of this package, and whether tracked files differ from it; None without a git checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie inside another project's repository
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    return {"hash": head, "modified": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Return processor, usable cores, memory, threads, GPUs, system, and the environment variables in `ENVIRONMENT`."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "torch_threads": None,
        "gpus": [],
    }
    torch = sys.modules.get("torch")  # do not import torch for a policy that does not need it
    if torch is not None:
        found["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
