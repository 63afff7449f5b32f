"""Every letter of a shape suffix has a meaning: that of docs/architecture.md, or that of the file's own legend."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from cogvla.tests.support.paths import ROOT

FOLDERS = ("routing", "policy", "envs", "libero", "real_robot", "scripts", "examples")
SUFFIX = re.compile(r"[a-z0-9_]+_(?=[a-z]?[A-Z0-9])([A-Z0-9]*[A-Z][A-Z0-9]*|[A-Za-z0-9]{1,5})")
SECTION = (ROOT / "docs" / "architecture.md").read_text().partition("\n## Shape letters\n")[2].partition("\n## ")[0]
LETTERS = {
    letter for row in re.findall(r"^\| ([A-Za-z](?:, [A-Za-z])*) \|", SECTION, re.M) for letter in row.split(", ")
}
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).glob("**/*.py")
    if re.search(r"[a-z]_[A-Za-z0-9]*[A-Z]", path.read_text())
)


def names(tree: ast.AST) -> Iterator[str]:
    """Yield the names of variables, arguments and fields; those of other packages are attributes, and left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def suffix(name: str) -> str:
    """Return the shape of a tensor's name, empty where it has none."""
    found = SUFFIX.fullmatch(name)
    return found[1] if found and re.search("[A-Z]", found[1]) else ""


def test_the_rule_sees_shapes() -> None:
    assert {"B", "K", "N", "n"} <= LETTERS
    assert [suffix(name) for name in ("h_BND", "kept_Bn", "q_BhQe", "image_HW3", "_CAMEL_CASE", "plain_name")] == [
        "BND", "Bn", "BhQe", "HW3", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_every_letter_has_a_meaning(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    legend = (ast.get_docstring(tree) or "").partition("Shape legend:")[2].partition("\n\n")[0]
    known = LETTERS | set(re.findall(r"\b[A-Za-z]\b", legend))
    missing = {name: set(re.sub("[0-9]", "", suffix(name))) - known for name in names(tree)}
    assert not {name: letters for name, letters in missing.items() if letters}
