"""Who may import what: the tables of docs/architecture.md against the sources."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from cogvla.tests.support.paths import ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = ("routing", "policy", "envs", "libero", "real_robot", "scripts", "configs")
ROS = "real_robot/ros/package"
"""Runs where ROS 2 is installed, with ROS 2's packages."""


def rows(heading: str, level: str) -> dict[str, list[str]]:
    """Cells of the table below a heading, by the folder that each row is about."""
    section = ARCHITECTURE.partition(f"\n{level} {heading}\n")[2].partition("\n#")[0]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`/"): row[1:] for row in cells}


MAY_IMPORT = {folder: re.findall(r"`([\w.]+)`", cells[1]) for folder, cells in rows("Folders", "##").items()}
PACKAGES = {
    folder: {name.strip() for name in cells[1].split(",") if name.strip()}
    for folder, cells in rows("Inside the folders", "###").items()
}


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_of(file): file for file in sources()}


def above(file: str) -> list[str]:
    """The folders that a file is in, innermost first."""
    return [str(folder) for folder in Path(file).parents][:-1]


@functools.cache
def imports(file: str) -> frozenset[str]:
    """All names that a file imports, also inside of functions and for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def ours(file: str) -> set[str]:
    """Modules of this package that a file imports."""
    found = set()
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top == "cogvla":
            while rest and rest not in MODULES:
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return found - {"", module_of(file)}


def cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """Names that lead back to themselves; empty where there are none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_the_tables_are_about_something() -> None:
    assert MAY_IMPORT.keys() >= set(FOLDERS)
    assert len(sources()) > 200
    assert {str(Path(file).parent) for file in sources() if not file.startswith(ROS)} <= PACKAGES.keys()
    assert "torch.Tensor" in imports("policy/training/trainer.py")
    assert any(n.startswith("lerobot.utils") for n in imports("policy/data/download.py")), "those in functions count"


@pytest.mark.parametrize("file", sources())
def test_imports_follow_the_tables(file: str) -> None:
    folders = above(file)
    rule = next(folder for folder in folders if folder in MAY_IMPORT)
    for module in ours(file):
        allowed = MAY_IMPORT[rule] + [rule.replace("/", ".")]
        free = rule == "scripts" and not module.startswith("tests")
        assert free or any(f"{module}.".startswith(f"{name}.") for name in allowed), f"{file} may not import {module}"
    if file.startswith(ROS):
        return
    packages = set().union(*(PACKAGES.get(folder, set()) for folder in folders)) | {"cogvla"} | sys.stdlib_module_names
    for name in imports(file):
        assert name.partition(".")[0] in packages, f"{file} may not import {name}"


def test_no_file_leads_back_to_itself() -> None:
    assert not cycle({module: ours(file) for module, file in MODULES.items()})


@pytest.mark.parametrize("parent", ["", *sorted({str(Path(file).parent) for file in sources()})])
def test_no_folder_leads_back_to_its_neighbour(parent: str) -> None:
    edges: dict[str, set[str]] = {}
    inside = [Path(file) for file in sources() if Path(file).parent.is_relative_to(parent or ".")]
    depth = len(Path(parent).parts)
    for file in inside:
        for module in ours(str(file)):
            other = Path(MODULES[module])
            if other in inside and len(file.parts) > depth + 1 < len(other.parts):
                here, there = file.parts[depth], other.parts[depth]
                edges.setdefault(here, set()).update({there} - {here})
    assert not cycle(edges)


@pytest.mark.parametrize("folder", sorted({str(Path(file).parent) for file in sources()}))
def test_folders_stay_small(folder: str) -> None:
    files = [file for file in sources() if str(Path(file).parent) == folder and not file.endswith("__init__.py")]
    assert len(files) <= 15 or folder == "routing/routers", "split it: a newcomer has to find things"


def test_every_folder_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {str(Path(file).parent).replace("/", ".") for file in sources() if not file.startswith(ROS)}
    assert sorted(listed) == sorted(["cogvla", *(f"cogvla.{folder}" for folder in folders)])


BARE = """
import sys

for name in {blocked!r}:
    sys.modules[name] = None  # as if it were not installed

import torch
import cogvla.policy.checkpoint, cogvla.policy.cost.flops, cogvla.policy.policy
import cogvla.policy.weights.pretrained, cogvla.policy.inputs.tokenizer
from cogvla.routing import aggregation, attention, film, keep_schedule, layout, pruning
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
