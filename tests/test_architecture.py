"""The import rules of docs/architecture.md, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "routing": set(),
    "policy": {"routing"},
    "envs": {"policy"},
    "libero": {"policy", "envs"},
    "real_robot": {"policy", "envs"},
    "configs": set(),
}
"""Folder -> the other folders that it may import."""
CONTRACT = {"cogvla.policy.interface", "cogvla.policy.chunking"}
"""All that `envs/` may know of `policy/`: numpy only, so that no environment process imports torch."""
CORE = {"torch", "transformers", "timm", "einops", "safetensors", "numpy"}
"""Enough to build, load and run a policy."""
ONLY_IN = {
    "lerobot": {"policy/lerobot_reader.py", "envs/dataset_writer.py"},
    "hydra": {
        "libero/train_policy.py",
        "libero/eval_libero.py",
        "envs/expert_table.py",
        "envs/record_demonstrations.py",
    },
    "wandb": {"libero/run_log.py"},
    "libero": set(),
}
INFERENCE = ("checkpoint", "flops", "import_cogvla", "pretrained")


def imports(path: Path, lazy: bool) -> set[str]:
    """Names of the modules that a file imports; `lazy` includes imports inside functions and for type checkers."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    nodes = list(ast.walk(tree)) if lazy else list(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: relative import"
            found.add(node.module)
            # `from cogvla.policy import data` names a module, `from cogvla.policy.data import X` does not
            found |= {f"{node.module}.{a.name}" for a in node.names if (ROOT / _file(node.module, a.name)).is_file()}
    return found


def _file(module: str, name: str) -> str:
    return f"{module.replace('.', '/').removeprefix('cogvla').lstrip('/')}/{name}.py".lstrip("/")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_the_table_allows(folder):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(folder)
        for module in imports(path, lazy=True)
        if module.startswith("cogvla.") and module.split(".")[1] not in MAY_IMPORT[folder] | {folder}
    ]
    assert not wrong


def test_environments_know_only_the_contract():
    used = {m for path in sources("envs") for m in imports(path, lazy=True) if m.startswith("cogvla.policy")}
    assert used <= CONTRACT
    for module in CONTRACT:
        path = ROOT / f"{module.removeprefix('cogvla.').replace('.', '/')}.py"
        foreign = {name.split(".")[0] for name in imports(path, lazy=True)} - sys.stdlib_module_names
        assert foreign <= {"numpy"}


def test_routing_needs_torch_and_einops_only():
    used = {name.split(".")[0] for path in sources("routing") for name in imports(path, lazy=True)}
    assert used - sys.stdlib_module_names <= {"torch", "einops", "cogvla"}


def test_running_a_policy_needs_the_core_only():
    waiting, seen, packages = [f"cogvla.policy.{name}" for name in INFERENCE], set(), set()
    while waiting:
        module = waiting.pop()
        path = ROOT / f"{module.removeprefix('cogvla.').replace('.', '/')}.py"
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        for name in imports(path, lazy=False):
            if name.startswith("cogvla."):
                waiting.append(name)
            else:
                packages.add(name.split(".")[0])
    assert {"cogvla.policy.model", "cogvla.routing.pruning"} <= seen
    assert packages - sys.stdlib_module_names <= CORE


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_foreign_package_stays_where_it_belongs(package):
    users = {
        str(path.relative_to(ROOT))
        for folder in MAY_IMPORT
        for path in sources(folder)
        if any(name.split(".")[0] == package for name in imports(path, lazy=True))
    }
    assert users <= ONLY_IN[package]


def test_nothing_reads_the_command_line():
    readers = [
        str(path.relative_to(ROOT))
        for folder in MAY_IMPORT
        for path in sources(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "argv"
    ]
    assert not readers
