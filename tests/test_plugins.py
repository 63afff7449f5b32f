"""Suites and routers of other packages: installed ones with entry points, and those that `imports` names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogvla.tests.support.paths import SHIPPED

SUITES = """
from dataclasses import replace
from cogvla.envs.suite import register_suite
from cogvla.tests.support import toy_suite

def mine():
    return replace(toy_suite.suite(), name="mine")

register_suite("mine", mine)
"""
ROUTERS = """
from cogvla.routing.registry import register_router
from cogvla.routing.selection import best, kept
from cogvla.routing.router import TokenRouter

@register_router("loudest")
class Loudest(TokenRouter):
    def route(self, tokens_BND, context):
        score_BN = tokens_BND.float().norm(dim=-1)
        return kept(tokens_BND, best(score_BN, context.budget), score_BN)
"""


def package(folder: Path, name: str, entry_points: bool = True, **modules: str) -> None:
    """A package, installed or (without entry points) only on the path."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(text)
    if entry_points:
        information = folder / f"{name}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        groups = [f"[cogvla.{module}]\n{name} = {name}.{module}\n" for module in modules]
        (information / "entry_points.txt").write_text("\n".join(groups))


def command(folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-P", "-m", f"cogvla.scripts.{name}", *overrides],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_an_installed_suite_is_evaluated(tmp_path: Path) -> None:
    package(tmp_path, "my_package", suites=SUITES)
    done = command(
        tmp_path, "eval_libero", "checkpoint=random", "suite=mine", "episodes_per_task=1", "videos=0", "workers=1",
        "output=report",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of 3 episodes, 0 errors" in done.stdout
    assert (tmp_path / "report" / "mine" / "report.html").is_file()


def test_a_suite_that_imports_names_is_recorded(tmp_path: Path) -> None:
    package(tmp_path, "my_package", entry_points=False, suites=SUITES)
    done = command(
        tmp_path, "record_demonstrations", "suite=mine", "episodes=3", "image_size=16", "workers=1", "output=data",
        "imports=[my_package.suites]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "data" / "meta" / "info.json").read_text())["total_episodes"] == 3


@pytest.mark.parametrize("installed", [True, False])
def test_a_router_is_plugged_in(tmp_path: Path, installed: bool) -> None:
    package(tmp_path, "my_package", installed, routers=ROUTERS)
    own = [] if installed else ["imports=[my_package.routers]"]
    done = command(
        tmp_path, "eval_libero", f"checkpoint={SHIPPED}", "suite=tabletop_object", "tasks=[0]", "episodes_per_task=1",
        "videos=0", "workers=0", "threads=1", "output=report", "router.name=loudest", "router.budget=0.5", *own,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "of 1 episodes, 0 errors" in done.stdout


def test_an_unknown_router_names_those_of_packages(tmp_path: Path) -> None:
    package(tmp_path, "my_package", routers=ROUTERS)
    done = command(tmp_path, "eval_libero", f"checkpoint={SHIPPED}", "router.name=softest")
    assert "unknown router 'softest'; one of " in error(done)
    assert "loudest" in done.stderr


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    package(tmp_path, "broken", suites="import not_there")
    assert error(command(tmp_path, "record_demonstrations", "suite=tabletop_object", "output=data")) == (
        "error: the installed package broken (entry point broken of cogvla.suites): cannot import broken.suites: "
        "ModuleNotFoundError: No module named 'not_there'"
    )
    (tmp_path / "broken-1.0.dist-info" / "entry_points.txt").unlink()
    assert error(command(tmp_path, "record_demonstrations", "imports=[broken.suites]", "output=data")) == (
        "error: imports: cannot import broken.suites: ModuleNotFoundError: No module named 'not_there'"
    )


def test_a_name_that_two_packages_want_is_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        package(tmp_path, name, suites=SUITES)
    line = error(command(tmp_path, "eval_libero", "checkpoint=random", "suite=mine"))
    assert line.startswith("error: the installed package second")
    assert line.endswith("two suites have the name 'mine': first.suites.mine and second.suites.mine")
