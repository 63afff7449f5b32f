"""The pages lead to what exists, and every command, folder and group of configurations is named in them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cogvla.tests.support.paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
COMMANDS = ARCHITECTURE.partition("## Commands")[2].partition("## ")[0].splitlines()
FOLDERS = ("routing", "policy", "envs", "libero", "real_robot", "scripts", "configs")
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def missing(page: Path, text: str) -> list[str]:
    """Relative links, and paths of the repository in backticks, that lead nowhere."""
    links = re.findall(r"\]\(([^)#\s]+)", text)
    found = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    folders = "|".join((*FOLDERS, "tests", "docs", "examples"))
    paths = re.findall(rf"`((?:{folders})/[\w./-]*)`", text)
    return found + [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_lead_to_what_exists(page: Path) -> None:
    assert not missing(page, page.read_text())


def test_what_leads_nowhere_is_found() -> None:
    text = "[a](data.md#here) [b](nowhere.md) [c](https://example.org/x.md) `my_configs/data/x.yaml`"
    text += " `policy/gone.py` `policy/gone/` `policy/policy.py`"
    assert missing(ROOT / "docs" / "data.md", text) == ["nowhere.md", "policy/gone.py", "policy/gone/"]


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_command_is_in_the_architecture(command: str) -> None:
    (row,) = [line for line in COMMANDS if f"`{command}`" in line]
    assert (ROOT / row.split("|")[2].strip(" `") / f"{command}.py").is_file()
    pages = [(ROOT / "docs" / page).read_text() for page in re.findall(r"\((.+?)\)", row)]
    assert any(re.search(rf"\b{command}\b", page) for page in pages)


def test_every_folder_is_in_the_architecture() -> None:
    packages = [path.parent.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).glob("**/*.py")]
    inside = {package for package in packages if "package" not in package.parts}
    assert not [str(package) for package in inside if f"`{package}/`" not in ARCHITECTURE]
    row = next(line for line in ARCHITECTURE.splitlines() if line.startswith("| `configs/`"))
    groups = {path.parent.name for path in (ROOT / "configs").glob("*/*.yaml")}
    assert not [group for group in groups if not re.search(rf"\b{group}\b", row)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(?:[\w/.]*/)?(test_\w+)(?:\.py)?`", page.read_text()))
    there = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    if named - there:
        sources = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
        there |= set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert named <= there, sorted(named - there)
