"""A folder that is no checkpoint: what it is, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cogvla.policy.checkpoint_folder import check_checkpoint_folder
from cogvla.tests.support.published_layouts import openvla_weights, write_cogvla, write_openvla, write_prismatic


@pytest.mark.parametrize(
    "write", [write_openvla, write_cogvla, lambda folder: write_prismatic(folder, openvla_weights())]
)
def test_published_weights_are_to_be_imported(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "release")
    with pytest.raises(ValueError, match=rf"run `import_checkpoint {tmp_path / 'release'} output=FOLDER` first"):
        check_checkpoint_folder(tmp_path / "release")


@pytest.mark.parametrize(
    "source", ["openvla/openvla-7b", "https://huggingface.co/openvla/openvla-7b", Path("openvla/openvla-7b")]
)
def test_a_repository_of_the_hub_is_to_be_imported(source: str | Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint folder.*`import_checkpoint openvla/openvla-7b output=FOLDER`"):
        check_checkpoint_folder(source)


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint folder at /not/there; train one with `train_policy`$"):
        check_checkpoint_folder("/not/there")
    (tmp_path / "config.json").write_text('{"embodiment": {}}')
    with pytest.raises(ValueError, match=r"model.safetensors, statistics.json missing; give the folder of another"):
        check_checkpoint_folder(tmp_path)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"missing; give {tmp_path / 'policy'}$"):
        check_checkpoint_folder(tmp_path)
