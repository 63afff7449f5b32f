"""Who may import what: the table of docs/architecture.md, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib

import pytest

from cogvla.tests.support.paths import ROOT

CORE = {"torch", "transformers", "timm", "einops", "safetensors", "numpy"}
"""All that a machine needs to run a policy."""

REPORTING = ("episode_log", "evaluate", "protocol", "provenance", "report", "statistics")
"""Parts of `libero` that know nothing about LIBERO: a robot's trials are reported as an evaluation is."""
COMMAND = "scripts.command"
"""What the console commands share; other parts know nothing of them."""
INTERNAL: dict[str, tuple[str, ...]] = {
    "configs": ("configs",),
    "routing": ("routing",),
    "policy": ("policy", "routing"),
    "envs": ("envs", "policy.interface", "policy.chunking"),
    "libero": ("libero", "policy", "routing", "envs", "real_robot.remote_policy"),
    "real_robot": ("real_robot", "policy", "envs", *(f"libero.{name}" for name in REPORTING)),
}
THIRD_PARTY: dict[str, set[str]] = {
    "configs": {"hydra", "omegaconf"},
    "routing": {"torch", "einops"},
    "policy": CORE,
    "envs": {"numpy", "gymnasium", "mujoco", "av", "PIL", "tqdm"},
    "libero": {
        "numpy",
        "torch",
        "gymnasium",
        "accelerate",
        "omegaconf",
        "pyarrow",
        "av",
        "PIL",
        "tqdm",
        "matplotlib",
        "jinja2",
    },
}
EXCEPTIONS: dict[str, set[str]] = {
    "policy/data/reader.py": {"lerobot", "pyarrow", "PIL", "huggingface_hub"},
    "policy/weights/release.py": {"huggingface_hub"},
    "policy/data/frame_cache.py": {"tqdm"},
    "policy/training/trainer.py": {"accelerate", "tqdm"},
    "policy/training/adapters.py": {"peft"},
    "policy/training/optimisation.py": {"bitsandbytes"},
    "policy/training/trained_weights.py": {"accelerate"},
    "policy/training/metrics.py": {"accelerate"},
    "envs/rollout/ray_worker.py": {"ray"},
    "envs/recording/dataset_writer.py": {"lerobot", "datasets", "pyarrow", "PIL"},
    "envs/recording/recorded_dataset.py": {"lerobot", "pyarrow"},
    "scripts/measure/benchmark_policy.py": {"yaml"},
    "libero/hdf5/reader.py": {"h5py"},
    "policy/training/run_log.py": {"wandb"},
    "libero/installation.py": {"libero"},
    "libero/simulation.py": {"libero", "robosuite", "mujoco"},
}


def entry_points() -> set[str]:
    """Files of the console scripts, which alone may use Hydra."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules = [target.partition(":")[0] for target in scripts.values()]
    return {module.removeprefix("cogvla.").replace(".", "/") + ".py" for module in modules}


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in INTERNAL for path in (ROOT / folder).glob("**/*.py"))


def imports(file: str) -> set[str]:
    """All modules that a file imports, also inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module.count(".") < 2 else {module}
    return found


def test_the_table_is_about_something() -> None:
    assert {file.partition("/")[0] for file in sources()} >= {"routing", "policy", "envs", "libero"}
    assert len(sources()) > 60
    assert EXCEPTIONS.keys() <= set(sources())
    assert entry_points() <= set(sources())
    assert "torch.Tensor" in imports("policy/training/trainer.py")
    assert "lerobot.datasets.video_utils" in imports("policy/data/reader.py"), "imports in functions count"


@pytest.mark.parametrize("file", sources())
def test_imports_follow_the_table(file: str) -> None:
    folder = file.partition("/")[0]
    allowed = THIRD_PARTY.get(folder, set()) | EXCEPTIONS.get(file, set())
    if file in entry_points():
        allowed = allowed | {"hydra", "omegaconf"}
    for module in imports(file):
        top, _, rest = module.partition(".")
        if top == "cogvla":
            may = INTERNAL[folder] + ((COMMAND,) if file in entry_points() | {"scripts/robot/robots.py"} else ())
            assert any(rest == name or rest.startswith(name + ".") for name in may), f"{file} may not import {module}"
        elif folder != "real_robot":
            assert top in allowed or top in sys.stdlib_module_names, f"{file} may not import {module}"


BARE = """
import sys

for name in {blocked!r}:
    sys.modules[name] = None  # as if it were not installed

import torch
import cogvla.policy.checkpoint, cogvla.policy.cost.flops, cogvla.policy.policy
import cogvla.policy.weights.pretrained, cogvla.policy.inputs.tokenizer
from cogvla.routing import aggregation, attention, film, layout, pruning, schedule
from cogvla.tests.support.tiny_model import tiny_input, tiny_model

with torch.inference_mode():
    print(tuple(tiny_model()(tiny_input()).actions.shape))
"""
BLOCKED = [
    "lerobot",
    "mujoco",
    "hydra",
    "omegaconf",
    "wandb",
    "accelerate",
    "gymnasium",
    "datasets",
    "pyarrow",
    "av",
    "peft",
]


def test_a_policy_runs_where_only_the_core_is_installed() -> None:
    code = BARE.format(blocked=BLOCKED)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(3, 4, 3)\n"


def test_the_contract_needs_numpy_only() -> None:
    code = "import sys; sys.modules['torch'] = None; import cogvla.policy.interface, cogvla.policy.chunking"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
