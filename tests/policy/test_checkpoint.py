"""Checkpoints: what comes back is what was saved, they appear whole or not at all, and damage is explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cogvla.policy.checkpoint import (
    CONFIG,
    STATISTICS,
    TRAINING,
    WEIGHTS,
    load_policy,
    load_training_state,
    save_checkpoint,
)
from cogvla.policy.device import usable_device
from cogvla.policy.policy import CogVLAPolicy
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.small_data import ROBOT, small_data, small_policy


def save(folder: Path, policy: CogVLAPolicy, training: dict[str, Any] | None = None) -> None:
    save_checkpoint(
        folder,
        policy.model.state_dict(),
        policy.model.config,
        policy.preprocessor,
        small_data().statistics(),
        {"step": 7},
        training,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "runs" / "best", small_policy(), {"step": 7, "weights": {"a": torch.arange(3)}})
    return tmp_path / "runs" / "best"


@pytest.mark.parametrize("routing", [{}, {"mode": "drop"}, {"efa": False, "lfp": False, "attention": "causal"}])
def test_a_loaded_policy_acts_as_the_saved_one(tmp_path: Path, routing: dict[str, Any]) -> None:
    policy = small_policy(seed=3, **routing)
    save(tmp_path / "it", policy)
    loaded = load_policy(tmp_path / "it")
    observation = ROBOT.fake_observation(3)
    np.testing.assert_array_equal(loaded.act(observation).actions, policy.act(observation).actions)
    assert loaded.embodiment == policy.embodiment
    assert loaded.model.config == policy.model.config
    described = loaded.describe()
    assert (described["checkpoint"], described["step"]) == ("it", 7)
    assert described["parameters"] == sum(p.numel() for p in policy.model.parameters())


def test_actions_are_in_physical_units(saved: Path) -> None:
    policy = load_policy(saved)
    inputs = policy.preprocessor.observation(ROBOT.fake_observation(1))
    with torch.inference_mode():
        normalised = policy.model(inputs).actions[0, 0]
    q01, q99 = (np.array(json.loads((saved / STATISTICS).read_text())["action"][key]) for key in ("q01", "q99"))
    action = policy.act(ROBOT.fake_observation(1)).actions[0, 0]
    expected = (normalised[:3].numpy() + 1) / 2 * (q99 - q01)[:3] + q01[:3]
    np.testing.assert_allclose(action[:3], expected, atol=1e-5)
    assert action[3] == normalised[3].item()  # the gripper is not normalised


def test_the_training_state_comes_back(saved: Path) -> None:
    state = load_training_state(saved)
    assert state["step"] == 7
    assert state["weights"]["a"].tolist() == [0, 1, 2]


def test_files_are_there_and_readable_by_others(saved: Path) -> None:
    names = {CONFIG, STATISTICS, WEIGHTS, TRAINING}
    assert {path.name for path in saved.iterdir()} == names
    assert len({path.stat().st_mode for path in saved.iterdir()}) == 1
    assert [path.name for path in saved.parent.iterdir()] == ["best"]


def test_an_existing_checkpoint_is_replaced(saved: Path) -> None:
    other = small_policy(seed=1)
    save(saved, other)
    observation = ROBOT.fake_observation(1)
    np.testing.assert_array_equal(load_policy(saved).act(observation).actions, other.act(observation).actions)
    assert not (saved / TRAINING).exists()


@pytest.mark.parametrize("limit", [100, 20_000, 100_000])
def test_a_full_disk_is_explained_and_leaves_what_was_there(saved: Path, limit: int) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    large = {"optimiser": torch.zeros(100_000)}
    with (
        files_limited_to(limit),
        pytest.raises(OSError, match=r"cannot write .*best: .* MB free\)\. What was saved before is untouched"),
    ):
        save(saved, small_policy(seed=1), large)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["best"]
    load_policy(saved)


def test_an_interruption_while_writing_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogvla.policy.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(saved, small_policy(seed=1))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["best"]


def test_what_a_killed_process_left_is_cleared_away(saved: Path) -> None:
    (saved.parent / ".best.partial").mkdir()
    (saved.parent / ".best.partial" / WEIGHTS).write_text("half")
    (saved.parent / ".best.old").mkdir()
    save(saved, small_policy(seed=1))
    assert [path.name for path in saved.parent.iterdir()] == ["best"]
    load_policy(saved)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*/file/best: File exists"):
        save(tmp_path / "file" / "best", small_policy())


def rewrite(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        body = json.loads((folder / name).read_text())
        change(body)
        (folder / name).write_text(json.dumps(body))

    return apply


def shorten(name: str, share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), f"is not a complete checkpoint: {WEIGHTS} missing"),
        (lambda folder: (folder / STATISTICS).unlink(), f"is not a complete checkpoint: {STATISTICS} missing"),
        (shorten(WEIGHTS, 0.5), rf"{WEIGHTS} is damaged or truncated .*use another checkpoint"),
        (shorten(WEIGHTS, 0.0), rf"{WEIGHTS} is damaged or truncated .*use another checkpoint"),
        (shorten(CONFIG, 0.5), rf"{CONFIG} is damaged .*use another checkpoint"),
        (shorten(STATISTICS, 0.5), rf"{STATISTICS} is damaged .*use another checkpoint"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\x00\xff\xfe"), rf"{CONFIG} is damaged .*use another"),
        (lambda folder: (folder / CONFIG).write_text("[]"), rf"{CONFIG} is damaged \(it is not a JSON object\)"),
        (rewrite(CONFIG, lambda body: body.update(format=99)), "has checkpoint format 99; this version reads 1"),
        (rewrite(CONFIG, lambda body: body.pop("embodiment")), r"is damaged \(no 'embodiment'\); use another"),
        (rewrite(CONFIG, lambda body: body["embodiment"].update(wheels=4)), r"is damaged .*wheels.*use another"),
        (rewrite(CONFIG, lambda body: body["model"].update(wheels=4)), "unknown key wheels in model; valid keys are"),
        (
            rewrite(STATISTICS, lambda body: body["state"]["q01"].pop()),
            r"'q99' has 3 dim.*q01 has 2.*use another",
        ),
        (
            rewrite(STATISTICS, lambda body: body.pop("action")),
            r"'action' must have the embodiment's 4 dimensions.*use another",
        ),
        (rewrite(STATISTICS, lambda body: body.update(action=None)), r"statistics.json in .* is damaged .*use another"),
        (rewrite(STATISTICS, lambda body: body.update(state="q01")), r"statistics.json in .* is damaged .*use another"),
        (rewrite(STATISTICS, lambda body: body.clear()), r"statistics.json in .* is damaged .*use another"),
        (
            rewrite(CONFIG, lambda body: body["model"]["language"].update(intermediate=32)),
            rf"the weights in .* do not fit its {CONFIG} \(size mismatch for .* and \d+ more differences\); use",
        ),
    ],
)
def test_damage_is_explained(saved: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=said):
        load_policy(saved)


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no checkpoint folder at .*nowhere; train one with `train_policy`"):
        load_policy(tmp_path / "nowhere")


def test_a_policy_without_training_state_cannot_be_resumed(tmp_path: Path) -> None:
    save(tmp_path / "it", small_policy())
    with pytest.raises(ValueError, match="it can be evaluated, but training cannot resume from it"):
        load_training_state(tmp_path / "it")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_training_state_is_explained(saved: Path, share: float) -> None:
    shorten(TRAINING, share)(saved)
    with pytest.raises(ValueError, match=rf"{TRAINING} is damaged or truncated .*delete .*best to resume"):
        load_training_state(saved)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_one_line(saved: Path, device: str) -> None:
    with pytest.raises(ValueError, match=rf"device={device} cannot be used here \(.*\); give device=cpu") as error:
        load_policy(saved, device)
    assert "\n" not in str(error.value)


def test_a_second_gpu_is_the_one_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert usable_device("cuda:1") == "cuda:1"
    assert usable_device(0) == "cuda:0"
    assert chosen == [torch.device("cuda", 1), torch.device("cuda", 0)]


def test_a_description_says_how_images_are_prepared_if_that_is_unusual(tmp_path: Path) -> None:
    policy = small_policy()
    assert "pictures" not in policy.describe()
    policy.preprocessor.crop_area = 0.81
    save(tmp_path / "it", policy)
    assert load_policy(tmp_path / "it").describe()["pictures"] == {"crop_area": 0.81, "resize_kernel": "bilinear"}
