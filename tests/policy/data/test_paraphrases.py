"""Files of the user's own wordings: what is read, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvla.policy.data.paraphrases import read_paraphrases

DATA = ["open the drawer", "put the red cube in the tray"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "Open the drawer.:\n  - pull at the handle\n  - Pull at the handle!\n  - open the drawer\n"),
        ("a.json", '{"open the drawer": ["pull at the handle"]}'),
        ("a.yml", '"open the drawer": ["pull at the handle"]'),
    ],
)
def test_instructions_are_found_and_repetitions_left_out(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (sentences,) = read_paraphrases(tmp_path / name, DATA).values()
    assert [sentence.strip("!").lower() for sentence in sentences] == ["pull at the handle"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.yaml",
            "open the draw: [pull]",
            "the data has no instruction 'open the draw'; the nearest is 'open the drawer'",
        ),
        (
            "a.yaml",
            "wipe: [clean]",
            "no instruction 'wipe'; it has 'open the drawer', 'put the red cube in the tray'. Corr",
        ),
        ("a.yaml", "on: [clean]", "the data has no instruction True; it has"),
        (
            "a.yaml",
            "open the drawer: ['']",
            r"'open the drawer': sentence 1 \(''\) has no words; write it, or remove it",
        ),
        ("a.yaml", "open the drawer: [a, '. .']", r"sentence 2 \('. .'\) has no words"),
        ("a.yaml", "open the drawer:\n  - a\n  -\n", "sentence 2 is None, not a text; put it in quotes"),
        ("a.yaml", "open the drawer: [on]", "sentence 1 is True, not a text"),
        ("a.yaml", "open the drawer: pull", "'open the drawer' must have a list of sentences, got 'pull'"),
        ("a.yaml", "open the drawer: []", r"must have a list of sentences, got \[\]"),
        ("a.yaml", "open the drawer:\n", "must have a list of sentences, got None"),
        ("a.yaml", "- open the drawer\n", "must map each instruction to a list of sentences"),
        ("a.yaml", "", "must map each instruction to a list of sentences, got None"),
        ("a.yaml", "open the drawer: [a]\nopen the drawer: [b]\n", "has the key 'open the drawer' twice; keep one"),
        ("a.json", '{"open the drawer": ["a"], "open the drawer": ["b"]}', "has the key 'open the drawer' twice"),
        ("a.yaml", "open the drawer: [a]\nOpen the drawer!: [b]\n", "has the instruction 'open the drawer' twice"),
        (
            "a.yaml",
            "open the drawer: [go]\nput the red cube in the tray: [Go!]\n",
            "'Go!' of 'put the red cube in the tray' also means 'open the drawer'",
        ),
        (
            "a.yaml",
            "open the drawer: [Put the red cube in the tray.]\n",
            "'Put the red cube in the tray.' of 'open the drawer' also means 'put the red cube in the tray'",
        ),
        ("a.yaml", "open the drawer: [a\n", "is no YAML at line 2"),
        ("a.json", '{"open the drawer": [a]}', "is no JSON at line 1"),
    ],
)
def test_mistakes_of_a_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_paraphrases(tmp_path / name, DATA)
    assert f"data.paraphrases={tmp_path / name}" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("öffne: [auf]".encode("latin-1"))
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        read_paraphrases(tmp_path / "latin.yaml", DATA)
    with pytest.raises(OSError, match=r"none\.yaml"):
        read_paraphrases(tmp_path / "none.yaml", DATA)
