"""A packed file holds whole episodes with all columns, and says so when it is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cogvla.policy.data.interventions import Teaching
from cogvla.policy.data.packed import pack, unpack
from cogvla.tests.support.pixels import pixels_of
from cogvla.tests.support.small_data import ROBOT, small_data

ROOM = 10_000_000


def test_everything_comes_back(tmp_path: Path) -> None:
    data, path = small_data(), tmp_path / "new" / "packed.safetensors"
    episodes, size = pack(data, ROBOT, path, ROOM)
    found, robot = unpack(path)
    assert robot == ROBOT
    assert episodes == len(data.episode_N.unique())
    assert size == path.stat().st_size
    for name in ("state_NS", "action_NA", "episode_N", "instruction_N"):
        assert torch.equal(getattr(found, name), getattr(data, name))
    assert found.instructions == data.instructions
    assert found.frame_labels.keys() == data.frame_labels.keys()
    assert all(torch.equal(values, data.frame_labels[name]) for name, values in found.frame_labels.items())
    assert found.chunk == data.chunk
    assert found.frames.shape == data.frames.shape
    assert (pixels_of(found).float() - pixels_of(data).float()).abs().mean() < 20, "JPEG loses a little"


def test_where_a_policy_acted_comes_back(tmp_path: Path) -> None:
    data, path = small_data(), tmp_path / "packed.safetensors"
    taught = Teaching.of(torch.arange(len(data)) % 3 > 0, advised=False, weight=2.0)
    pack(replace(data, teaching=taught, executed_NA=-data.action_NA), ROBOT, path, ROOM)
    found, _ = unpack(path)
    assert found.executed_NA is not None
    assert torch.equal(found.executed_NA, -data.action_NA)
    assert found.teaching is not None
    assert torch.equal(found.teaching.actions_N, taught.actions_N)
    assert torch.equal(found.teaching.weight_N, taught.weight_N)
    assert found.frame_labels.keys() == data.frame_labels.keys()


def test_what_does_not_fit_is_left_out_by_whole_episodes(tmp_path: Path) -> None:
    data, path = small_data(), tmp_path / "packed.safetensors"
    _, whole = pack(data, ROBOT, path, ROOM)
    episodes, size = pack(data, ROBOT, path, whole * 2 // 3)
    found, _ = unpack(path)
    assert size < whole * 2 // 3
    assert 2 <= episodes < len(data.episode_N.unique())
    kept = found.episode_N.unique()
    assert len(kept) == episodes
    assert {0, int(data.episode_N.max())} <= set(kept.tolist()), "spread over the data set"
    assert len(found) == int(torch.isin(data.episode_N, kept).sum())
    with pytest.raises(ValueError, match="not even two episodes fit"):
        pack(data, ROBOT, path, 1000)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("state", lambda values: values[:-1], "do not have the size of"),
        ("action", lambda values: values[:, :-1], "do not have the size of"),
        ("episode", lambda values: values[1:], "do not have the size of"),
        ("instruction", lambda values: values + 99, "an instruction that is not in the file"),
        ("action", lambda values: values / 0, "holds NaN or infinite"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "packed.safetensors"
    pack(small_data(), ROBOT, path, ROOM)
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path, about)
    with pytest.raises(ValueError, match=message):
        unpack(path)
    save_file({key: values for key, values in tensors.items() if key != name}, path, about)
    with pytest.raises(ValueError, match="is no file of demonstrations"):
        unpack(path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"12345678 nothing")
    with pytest.raises(ValueError, match="is no file of demonstrations"):
        unpack(path)
