"""The training loop: it learns, goes on exactly where it was stopped, and does not depend on how a step is divided."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvla.policy.checkpoint import load_policy
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frame_file import FrameFile, FrameWriter
from cogvla.policy.data.frames import ArrayFrames
from cogvla.policy.inputs.augmentation import AugmentationConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.identity import differences
from cogvla.policy.training.interrupt import Interruption
from cogvla.policy.training.metrics import MetricsFile
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.policy.training.trainer import Trainer
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.pixels import pixels_of
from cogvla.tests.support.small_data import (
    IMITATION,
    INSTRUCTIONS,
    LABELLED,
    ROBOT,
    settings,
    small_data,
    small_trainer,
)

STEPS = 10


def changed_data(**changes: Any) -> DemonstrationData:
    return replace(small_data(), **changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that nothing disturbed."""
    output = tmp_path_factory.mktemp("uninterrupted")
    small_trainer(output).run()
    return output


def test_compressed_frames_train_as_arrays_do(uninterrupted: Path, tmp_path: Path) -> None:
    pixels = pixels_of(small_data()).numpy()
    writer = FrameWriter(tmp_path / "frames", pixels.shape)
    for row, view in np.ndindex(pixels.shape[:2]):
        writer.add(row, view, pixels[row, view], (0, pixels[0, view]) if row else None)
    writer.finish()
    small_trainer(tmp_path / "run", data=changed_data(frames=FrameFile(tmp_path / "frames"))).run()
    for name in ("metrics.jsonl", "policy/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (uninterrupted / name).read_bytes()


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def assert_same_run(output: Path, expected: Path) -> None:
    """Bit for bit: metrics, weights for inference, and the state that a next run would start from."""
    assert (output / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    name = "model.safetensors"
    assert (output / "policy" / name).read_bytes() == (expected / "policy" / name).read_bytes()
    states = [
        torch.load(folder / "checkpoints" / f"step_{STEPS:07d}" / "training.pt", weights_only=True)
        for folder in (output, expected)
    ]
    assert_equal(*states)


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):  # the first is loaded as the second was saved
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def interrupt_at(trainer: Trainer, step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of a step, once."""
    build = trainer.builder.build
    sent: list[int] = []

    def interrupting(*args: Any) -> Any:
        if trainer.step == step and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return build(*args)

    monkeypatch.setattr(trainer.builder, "build", interrupting)


def test_it_learns(tmp_path: Path) -> None:
    config = settings(steps=100, batch_size=16, learning_rate=5e-3, validate_every=0, checkpoint_every=100)
    small_trainer(tmp_path, config, IMITATION).run()
    losses = [row["train/action_l1"] for row in rows(tmp_path)]
    assert len(losses) == 5
    assert losses[-1] < 0.75 * losses[0]


def test_what_a_run_leaves(uninterrupted: Path) -> None:
    assert [row["step"] for row in rows(uninterrupted)] == [4, 8, 10, 10]
    train = rows(uninterrupted)[2]
    assert {"train/loss", "train/action_l1", "train/gradient_norm", "train/learning_rate"} <= train.keys()
    assert "validation/wrong_instruction_l1" in rows(uninterrupted)[0]
    assert checkpoints(uninterrupted) == ["step_0000008", "step_0000010"], "all but the newest two are deleted"
    policy = load_policy(uninterrupted / "policy")
    assert policy.act(ROBOT.fake_observation(2)).actions.shape == (2, 4, 4)
    assert policy.describe()["step"] == STEPS
    assert policy.describe()["data_set"]["name"] == "small"


def test_the_policy_has_the_averaged_weights(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, settings(steps=4, ema_decay=0.9))
    policy = trainer.run()
    raw = dict(trainer.raw.model.named_parameters())
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, trainer.weights.average.average[f"model.{name}"])
    assert any(not torch.equal(weight, raw[name]) for name, weight in policy.model.named_parameters())


def test_the_same_seed_gives_the_same_run_and_another_seed_another(uninterrupted: Path, tmp_path: Path) -> None:
    small_trainer(tmp_path / "same").run()
    assert_same_run(tmp_path / "same", uninterrupted)
    small_trainer(tmp_path / "other", settings(seed=1)).run()
    assert rows(tmp_path / "other")[-1] != rows(uninterrupted)[-1]


def test_processes_do_not_make_it_a_matter_of_luck_nor_does_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(cpu_parts=2, accumulation=2)
    small_trainer(tmp_path / "whole", config).run()
    trainer = small_trainer(tmp_path / "twice", config)
    interrupt_at(trainer, 5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert checkpoints(tmp_path / "twice") == ["step_0000004", "step_0000006"], "the step is finished first"
    small_trainer(tmp_path / "twice", config).run()
    assert_same_run(tmp_path / "twice", tmp_path / "whole")


def test_ctrl_c_saves_and_the_same_command_goes_on_exactly(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = small_trainer(tmp_path)
    interrupt_at(trainer, 5, monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) == before
    assert checkpoints(tmp_path) == ["step_0000004", "step_0000006"], "the step is finished first"
    assert "stopped at step 6; the same command continues from there" in capsys.readouterr().out
    assert not (tmp_path / "policy").exists()
    again = small_trainer(tmp_path)
    again.run()
    assert_same_run(tmp_path, uninterrupted)


KILLED = """
import os, signal, sys
from pathlib import Path
from cogvla.policy import checkpoint
from cogvla.tests.support.small_data import small_trainer

save_file, calls = checkpoint.save_file, []

def killed_at_the_second_checkpoint(*args):
    save_file(*args)
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_file = killed_at_the_second_checkpoint
small_trainer(Path(sys.argv[1])).run()
"""


def test_after_kill_9_in_the_middle_of_saving_it_goes_on_exactly(uninterrupted: Path, tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert checkpoints(tmp_path) == [".step_0000008.partial", "step_0000004"]
    assert [row["step"] for row in rows(tmp_path)] == [4, 8], "the second row is forgotten and measured again"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "half')
    small_trainer(tmp_path).run()
    assert_same_run(tmp_path, uninterrupted)
    assert checkpoints(tmp_path) == ["step_0000008", "step_0000010"]


def test_a_finished_run_is_not_done_again(uninterrupted: Path, tmp_path: Path) -> None:
    small_trainer(tmp_path).run()
    added = tmp_path / "policy" / "float8.json"
    added.write_text("{}")
    trainer = small_trainer(tmp_path)
    trainer.evaluate = lambda policy, step: pytest.fail("there is nothing left to evaluate")
    trainer.run()
    assert_same_run(tmp_path, uninterrupted)
    assert added.is_file(), "what was added to the policy since stays"
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"damaged")
    small_trainer(tmp_path).run()
    assert_same_run(tmp_path, uninterrupted)
    assert not added.exists(), "it was measured on another file"


def test_more_steps_go_on_from_the_end(tmp_path: Path) -> None:
    small_trainer(tmp_path, settings(steps=4)).run()
    trainer = small_trainer(tmp_path, settings(steps=6))
    trainer.run()
    assert trainer.step == 6
    assert [row["step"] for row in rows(tmp_path)] == [4, 4, 6, 6]


def test_a_new_learning_rate_and_decay_count_after_a_resume(tmp_path: Path) -> None:
    small_trainer(tmp_path, settings(steps=4)).run()
    config = settings(steps=5, learning_rate=1e-6, weight_decay=0.5, warmup_steps=0)
    trainer = small_trainer(tmp_path, config)
    trainer._resume()
    before = {name: value.detach().clone() for name, value in trainer.raw.named_parameters()}
    trainer.run()
    assert [group["weight_decay"] for group in trainer.weights.optimiser.param_groups] == [0.5, 0.0]
    moved = max((value - before[name]).abs().max().item() for name, value in trainer.raw.named_parameters())
    assert 0 < moved < 1e-5


def test_settings_that_an_older_version_did_not_have_count_as_their_defaults() -> None:
    now: dict[str, Any] = {"objective": asdict(LABELLED), "embodiment": asdict(ROBOT), "vocabulary": "a"}
    assert LABELLED.matching == 0.0
    old = {**now, "objective": {name: value for name, value in now["objective"].items() if name != "matching"}}
    assert differences(old, now) == []
    one, other = ({"data set": {name: {"actions": "1", "weight": 1.0}, "B": {"weight": w}}} for name, w in ("A1", "C2"))
    drawn = {"data set": one["data set"] | {"B": {"weight": 2.0}}}
    assert differences(one, drawn) == ["data set.B.weight was 1, is 2.0"]
    assert differences(one, other) == ["the data sets were A, B, are C, B"]
    matched = {**now, "objective": asdict(replace(LABELLED, matching=0.5))}
    assert differences(old, matched) == ["objective.matching was 0.0, is 0.5"]
    assert differences({"objective": {}}, {"objective": asdict(ObjectiveConfig())}) == []
    gone = {**now, "objective": {**now["objective"], "foresight": 0.0, "foresight_target": "future"}}
    assert differences(gone, now) == [], "a setting that is gone counts as its default, too"
    gone["objective"]["foresight"] = 0.1
    assert differences(gone, now) == ["objective.foresight was 0.1, is None"]
    placed = {**now, "objective": {**now["objective"], "teacher": "here"}}
    nameless = {name: value for name, value in now["objective"].items() if name not in ("teacher", "blind")}
    assert differences(placed, {**now, "objective": nameless}) == [], "earlier versions saved its place"
    told = {**now, "weights of the base": None, "training.augmentation": asdict(AugmentationConfig(hue=0.1))}
    assert differences(now, told) == [], "of these it saved nothing"
    assert differences({**told, "weights of the base": "abc"}, told) == ["weights of the base differs"]
    known = {**now, "embodiment": {**now["embodiment"], "name": "other"}}
    assert differences(known, now) == [f"embodiment.name was other, is {ROBOT.name}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"efa": False}, r"step_0000004 was trained with another policy or routing; choose another output, or delete"),
        (
            {"objective": IMITATION},
            r"setting: objective.grounding was 1.0, is 0.0; .*; choose another output, or delete",
        ),
        ({"objective": replace(LABELLED, reading=0.25)}, r"setting: objective.reading was [\d.]+, is 0.25; choose"),
        ({"config": settings(seed=1)}, r"step_0000004: .*seed was 0, is 1; .*output, or delete .* to start again"),
        ({"data": small_data(6)}, r"data set.pictures differs; .* and \d more; choose another output"),
        (
            {"data": changed_data(action_NA=10 * small_data().action_NA)},
            "another setting: data set.actions differs; choose",
        ),
        (
            {"data": changed_data(state_NS=small_data().state_NS / 2)},
            "another setting: data set.states differs; choose",
        ),
        (
            {"data": changed_data(frames=ArrayFrames(255 - pixels_of(small_data()).numpy()))},
            "setting: data set.pictures differs; ch",
        ),
        (
            {"data": changed_data(instructions=[*INSTRUCTIONS[:2], "square the blue one"])},
            "instructions differs; voc.* d",
        ),
        (
            {"data": changed_data(frame_labels={**small_data().frame_labels, "phase": torch.zeros(67)})},
            "labels differs;",
        ),
        (
            {"robot": replace(ROBOT, action_normalisation="mean_std")},
            "action_normalisation was q99, is mean_std; choose",
        ),
        ({"robot": replace(ROBOT, gripper_index=None)}, "setting: embodiment.gripper_index was 3, is None; choose"),
        (
            {"config": settings(augmentation=AugmentationConfig(brightness=0.1))},
            "setting: training.augmentation.brightness was 0.0, is 0.1; choose",
        ),
        ({"config": settings(steps=3)}, r"step_0000004 has 4 steps, more than training\.steps=3; choose another"),
        (
            {"config": settings(steps=4, learning_rate=1e-4, ema_decay=0.25)},
            r"the end of a run with training\.learning_rate=[\d.]+, not 0.0001, training\.ema_decay=[\d.]+, not 0.25;",
        ),
    ],
)
def test_checkpoints_of_another_run_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    small_trainer(tmp_path, settings(steps=4)).run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=said):
        small_trainer(tmp_path, **change).run()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_from_another_base_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        small_trainer(tmp_path / name, settings(steps=2, seed=int(name == "b"))).run()
    first, second = (str(tmp_path / name / "policy") for name in ("a", "b"))
    small_trainer(tmp_path / "tuned", settings(steps=2), base=first).run()
    small_trainer(tmp_path / "tuned", settings(steps=2), base=first).run()
    for other in (second, None):
        with pytest.raises(ValueError, match="another setting: weights of the base differs; choose another output"):
            small_trainer(tmp_path / "tuned", settings(steps=4), base=other).run()


def test_a_run_that_was_interrupted_early_is_not_a_shorter_one(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, settings(steps=8, checkpoint_every=4))
    while trainer.step < 4:
        trainer._train_step()
        trainer.step += 1
    trainer.save()
    with pytest.raises(ValueError, match=r"step_0000004 is the end of a run with training\.steps=8, not 4; choose"):
        small_trainer(tmp_path, settings(steps=4)).run()


def test_a_truncated_checkpoint_is_explained(tmp_path: Path) -> None:
    small_trainer(tmp_path, settings(steps=8)).run()
    damaged = tmp_path / "checkpoints" / "step_0000008" / "training.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"damaged or truncated .*delete .*step_0000008 to resume from the checkpoint be"
    ):
        small_trainer(tmp_path, settings(steps=8)).run()


def test_a_full_disk_loses_nothing_but_the_last_steps(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = small_trainer(tmp_path)
    save = trainer.save

    def full_at_8() -> None:
        with files_limited_to(50_000 if trainer.step == 8 else 10**9):
            save()

    monkeypatch.setattr(trainer, "save", full_at_8)
    with pytest.raises(OSError, match=r"cannot write .*step_0000008: .*What was saved before is untouched"):
        trainer.run()
    assert checkpoints(tmp_path) == ["step_0000004"]
    small_trainer(tmp_path).run()
    assert_same_run(tmp_path, uninterrupted)


def test_a_full_disk_at_a_row_of_metrics_is_explained(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(4, {"loss": 1.0})
    with (
        files_limited_to(30),
        pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl: .*from the last checkpoint"),
    ):
        file.append(8, {"loss": 0.5})
    file.cut(4)
    assert file.path.read_text() == '{"step": 4, "loss": 1.0}\n'


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    small_trainer(tmp_path, settings(steps=4)).run()
    trainer = small_trainer(tmp_path, settings(steps=10, checkpoint_every=3))
    trainer._resume()
    with torch.no_grad():
        next(trainer.raw.model.head.parameters()).fill_(torch.nan)
    trainer._resume = lambda: None  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"loss.* is not finite at step 5\. .*smaller training\.learning_rate"):
        trainer.run()
    assert checkpoints(tmp_path) == ["step_0000004"]
    assert all(row["step"] <= 4 for row in rows(tmp_path))


def gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Of the first step, with counterfactual, state-less and padded samples in it."""
    trainer = small_trainer(tmp_path, config, LABELLED)
    monkeypatch.setattr(trainer.weights.optimiser, "zero_grad", lambda set_to_none: None)
    losses = trainer._train_step()
    found = {name: value.grad.clone() for name, value in trainer.raw.named_parameters() if value.grad is not None}
    return found | losses


@pytest.mark.parametrize(
    "change", [{"accumulation": 2}, {"accumulation": 4}, {"cpu_parts": 2}, {"accumulation": 2, "cpu_parts": 2}]
)
def test_a_step_in_parts_has_the_gradient_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    config = settings(batch_size=16, clip_norm=1e9)
    whole = gradients(tmp_path / "whole", monkeypatch, config)
    parts = gradients(tmp_path / "parts", monkeypatch, replace(config, **change))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-4, msg=partial("{}: {}".format, name))


def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gradients(tmp_path, monkeypatch, settings(clip_norm=0.01))
    norm = found.pop("gradient_norm")
    values = [value for name, value in found.items() if value.ndim]
    assert norm > 0.01
    assert torch.cat([value.flatten() for value in values]).norm().item() == pytest.approx(0.01, rel=1e-2)


DISTRIBUTED = """
import sys
from pathlib import Path
from cogvla.tests.support.small_data import settings, small_trainer

trainer = small_trainer(Path(sys.argv[1]), settings(validate_every=5, accumulation=2))
assert trainer.accelerator.num_processes == 2
trainer.run()
trainer.accelerator.end_training()
"""


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    small_trainer(tmp_path / "one", settings(validate_every=5)).run()
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    done = subprocess.run([*launch, script, tmp_path / "two"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row.keys() for row in two] == [row.keys() for row in one]
    for first, second in zip(one, two, strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)
    assert checkpoints(tmp_path / "two") == checkpoints(tmp_path / "one")


def test_rollouts_are_recorded_and_ctrl_c_interrupts_them_at_once(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, settings(rollout_every=5))
    asked: list[int] = []

    def evaluate(policy: Any, step: int) -> dict[str, float]:
        asked.append(step)
        if step == 10:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("KeyboardInterrupt comes at once")
        return {"rollout/success": 0.5}

    trainer.evaluate = evaluate
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert asked == [5, 10]
    assert {"step": 5, "rollout/success": 0.5} in rows(tmp_path)
    assert checkpoints(tmp_path) == ["step_0000008", "step_0000010"]


def test_the_first_ctrl_c_waits_and_the_second_does_not() -> None:
    with Interruption() as interruption:
        assert not interruption.requested
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("own_accelerator")
def test_bfloat16(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, settings(steps=2, batch_size=2, validate_every=0, precision="bfloat16"))
    policy = trainer.run()
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}
    assert 0 < rows(tmp_path)[0]["train/loss"] < 10


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"batch_size": 9, "accumulation": 2}, "batch_size 9 is not a multiple of accumulation 2"),
        ({"batch_size": 8, "cpu_parts": 3}, "batch_size 8 is not a multiple of accumulation 1 x cpu_parts 3"),
        ({"steps": 0}, "must be at least 1"),
        ({"precision": "int4"}, "unknown precision 'int4'; one of auto, float32, bfloat16"),
        ({"learning_rate": 0.0}, "learning_rate and clip_norm must be positive"),
        ({"warmup_steps": -100}, r"training\.warmup_steps must not be negative, got -100"),
    ],
)
def test_bad_settings_are_explained(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainingConfig(**bad)


def test_a_fusion_by_the_instruction_needs_towers_that_know_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"routing\.fusion=experts changes nothing with routing\.efa=false"):
        small_trainer(tmp_path, fusion="experts", efa=False)


def test_too_few_episodes_to_hold_some_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 episode\(s\) to learn from cannot be split.*record more, or set it to 0"):
        small_trainer(tmp_path, data=small_data(1))
    small_trainer(tmp_path, settings(steps=1, validation_fraction=0.0), IMITATION, small_data(1)).run()


def test_rows_after_a_step_and_torn_rows_are_forgotten(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.cut(5)
    for step in (2, 4, 4, 6):
        file.append(step, {"loss": step / 2})
    whole = file.path.read_text()
    file.cut(4)
    assert file.path.read_text() == "".join(whole.splitlines(keepends=True)[:3])
    file.path.write_text(whole.splitlines(keepends=True)[0] + "\0\0\0\n" + whole)
    file.cut(6)
    assert file.path.read_text() == whole.splitlines(keepends=True)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
