"""`--help` of every console command: what it does, its examples, and one line for each of its keys."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from cogvla.configs.schema import DATACLASSES
from cogvla.scripts import help
from cogvla.tests.support.paths import CONFIGS, ROOT

SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
FILES: dict[str, Path] = {path.stem: path for path in (ROOT / "scripts").rglob("*.py")}
COMPOSED = sorted(name for name in SCRIPTS if (CONFIGS / f"{name}.yaml").is_file())


def printed(name: str, *words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    module, _, function = SCRIPTS[name].partition(":")
    monkeypatch.setattr(sys, "argv", [name, *words])
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as ended:  # of argparse
        if ended.code:
            raise
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_command_says_what_it_does_with_examples(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    docstring = ast.get_docstring(ast.parse(FILES[name].read_text()), clean=False)
    assert docstring is not None
    assert docstring.strip() in out
    assert f"\n    {name}" in docstring, "there is no example"
    for key in help._own_keys(name) if name in COMPOSED else ():
        assert f"  {key.name}={key.value}" in out


@pytest.mark.parametrize("config", COMPOSED)
def test_every_key_of_a_command_has_its_line(config: str) -> None:
    keys = [*help._own_keys(config), *help._groups(config)]
    assert keys
    assert not [key.name for key in keys if not key.text]


@pytest.mark.parametrize("dotted", sorted({dotted for group in DATACLASSES.values() for dotted in group}))
def test_every_field_of_a_group_has_its_line(dotted: str) -> None:
    names = {name for name, _ in help._flat(help.defaults(dotted))}
    assert names <= help.attributes(dotted).keys()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_of_a_group_says_what_it_is_for(path: Path) -> None:
    assert help._top_comment(path.read_text())


def test_the_keys_of_a_group_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(
        "train_policy", "-m", "training=libero", "--help", "training", "policy", monkeypatch=monkeypatch, capsys=capsys
    )
    assert "  training.steps=60000 " in out
    assert "  policy.vision.dinov2.width=64 " in out
    assert "  policy=small " in out
    with pytest.raises(SystemExit, match=r"error: train_policy has no group 'trainin'; it has .*training"):
        printed("train_policy", "--help", "trainin", monkeypatch=monkeypatch, capsys=capsys)


def test_a_comment_belongs_to_the_key_before_or_below_it() -> None:
    text = """\
# The file.
defaults:
  - group: null  # one of many
a: 1  # first
# second, on
# two lines
b: [1, "# 2"]
c:  # third
  d: "x # y"
  e: {f: 1}  # fourth
g:
"""
    assert help.comments(text) == {
        "defaults": "", "defaults.group": "one of many", "a": "first", "b": "second, on two lines", "c": "third",
        "c.d": "", "c.e": "fourth", "c.e.f": "", "g": "",
    }  # fmt: skip
