"""The container files name only what exists. They are read here, not built: that takes a container engine."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from cogvla.tests.support.paths import ROOT

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
Instruction = tuple[str, str]


def instructions(file: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile with what follows each, in order."""
    lines = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines.splitlines()) if word]


def is_ignored(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern.removeprefix("**/")) for pattern in IGNORED)


def test_both_are_there() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_dockerfile_names_what_exists(file: Path) -> None:
    found = instructions(file)
    assert found[0][0] == "FROM"
    assert {word for word, _ in found} <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "CMD"}
    for word, rest in found:
        if word == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() and not is_ignored(source) for source in sources), rest
    shell = " ".join(rest for word, rest in found if word == "RUN")
    assert "--constraint constraints.txt" in shell
    extras = re.findall(r"--extra (\S+)", shell)
    assert extras
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    libraries = re.search(r"apt-get install (lib.+)", (ROOT / "README.md").read_text())
    assert libraries is not None
    assert set(libraries[1].split()) <= set(shlex.split(shell)), "the libraries that README asks for"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_container_does_not_run_as_root(file: Path) -> None:
    words = [word for word, _ in instructions(file)]
    (user,) = [rest for word, rest in instructions(file) if word == "USER"]
    assert user not in ("root", "0")
    assert "RUN" not in words[words.index("USER") :], "root installs, the user does not"
    (command,) = [json.loads(rest) for word, rest in instructions(file) if word == "CMD"]
    assert command[0] in PROJECT["scripts"]


def test_what_git_ignores_is_in_no_image() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert not [line for line in ignored if not is_ignored(line.rstrip("/").replace("*", "x"))]


def test_what_the_package_needs_is_in_the_image() -> None:
    packages = PROJECT["readme"], *PROJECT["license-files"], "checkpoints", "configs", "plugins.py"
    assert not [name for name in packages if is_ignored(name)]
