"""Files that others wrote: what is wrong with one, and what to do, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvla.files import read_object


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"robot": {"mask": 1, "mask": 2}}', r"a.json has the key 'mask' twice; keep one of them"),
        ("{", r"a.json is damaged \(Expecting property name .*\); copy it again"),
        ("[" * 100_000, r"a.json is damaged \(.*\); copy it again"),
        ("[]", r"a.json is damaged \(it is not a JSON object\); copy it again"),
        ("\x00", r"a.json is damaged \(.*\); copy it again"),
        (None, r"a.json cannot be read \(No such file or directory\); copy it again"),
    ],
)
def test_files_that_hold_no_object(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_object(tmp_path / "a.json", "copy it again")


def test_objects_that_windows_wrote(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "ä"}', encoding="utf-8-sig")
    assert read_object(tmp_path / "a.json", "") == {"a": "ä"}
