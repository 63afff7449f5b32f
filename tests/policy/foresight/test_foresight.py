"""Windows, predictor, fitting and its measurements, on demonstrations made in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.frames import ArrayFrames
from cogvla.policy.foresight.fitting import FittingConfig, fit, prediction_losses
from cogvla.policy.foresight.measure import copy_ratios, measure
from cogvla.policy.foresight.model import (
    DESCRIPTION,
    WEIGHTS,
    Foresight,
    ForesightConfig,
    check_fits,
    load_foresight,
    save_foresight,
)
from cogvla.policy.foresight.windows import Windows
from cogvla.policy.inputs.normalise import Statistics
from cogvla.policy.interface import Camera
from cogvla.tests.support.full_disk import files_limited_to
from cogvla.tests.support.small_data import CHUNK, ROBOT, SIZE, small_data

SMALL = ForesightConfig(patch=8, latent=16, channels=16)
FITTING = FittingConfig(steps=400, batch_size=32, learning_rate=1e-2, save_every=1000)


def pushed_data(episodes: int = 60, frames: int = 9, seed: int = 0) -> DemonstrationData:
    """A bright column per view, which the executed action 0 moves, and which `action` knows nothing of."""
    generator = torch.Generator().manual_seed(seed)
    count = episodes * frames
    executed_NA = torch.randint(-1, 2, (count, 4), generator=generator).float()
    pixels = torch.zeros(count, 2, 3, SIZE, SIZE, dtype=torch.uint8)
    for episode in range(episodes):
        place = 12
        for frame in range(episode * frames, (episode + 1) * frames):
            pixels[frame, :, :, :, place : place + 4] = 255
            place = max(0, min(SIZE - 4, place + 3 * int(executed_NA[frame, 0])))
    data = small_data()
    return replace(
        data,
        frames=ArrayFrames(pixels.numpy()),
        state_NS=torch.rand(count, 3, generator=generator),
        action_NA=torch.rand(count, 4, generator=generator),
        episode_N=torch.arange(episodes).repeat_interleave(frames),
        instruction_N=torch.zeros(count, dtype=torch.int64),
        frame_labels={},
        executed_NA=executed_NA,
        teaching=None,
    )


def untrained(windows: Windows, config: ForesightConfig = SMALL) -> Foresight:
    statistics = {
        "state": Statistics.of(windows.data.state_NS.numpy()),
        "action": Statistics.of(windows.action_NA.numpy()),
    }
    return Foresight(config, ROBOT, statistics)


def test_windows_end_in_their_episode_and_hold_what_was_executed() -> None:
    data = pushed_data(episodes=3, frames=6)
    windows, executed_NA = Windows(data), data.executed_NA
    assert executed_NA is not None
    assert windows.rows.tolist() == [0, 1, 6, 7, 12, 13]
    window = windows.gather(torch.tensor([1, 6]))
    assert torch.equal(window.chunk_BKA, torch.stack([executed_NA[i : i + 4] for i in (1, 6)]))
    assert torch.equal(window.after_BVCHW, torch.from_numpy(data.frames.take(torch.tensor([5, 10]).numpy())))
    assert torch.equal(Windows(data, executed=False).chunk(torch.tensor([1]))[0], data.action_NA[1:5])
    part, _ = data.split(0.34, 0)
    assert set(Windows(part).rows.tolist()) < set(windows.rows.tolist())


def test_what_cannot_be_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="looks 4 frames ahead, and the longest episode has 4; record longer"):
        Windows(pushed_data(episodes=3, frames=4))
    data = replace(pushed_data(), executed_NA=None)
    assert torch.equal(Windows(data).action_NA, data.action_NA), "what was executed is what is to be learned"


def test_an_untrained_model_copies_and_a_fitted_one_needs_the_executed_actions(tmp_path: Path) -> None:
    windows, unseen = Windows(pushed_data()), Windows(pushed_data(seed=1))
    model = untrained(windows)
    window = unseen.gather(unseen.rows[:8])
    fit(model, windows, replace(FITTING, steps=1, learning_rate=1e-12), tmp_path / "none", {}, progress=False)
    ratio_BV = copy_ratios(model, window)
    torch.testing.assert_close(ratio_BV[~ratio_BV.isnan()], torch.ones(int((~ratio_BV.isnan()).sum())))
    fit(model, windows, FITTING, tmp_path / "run", {}, progress=False)
    found = measure(model.eval(), unseen)
    assert found["all"]["copy_ratio"] < 0.3
    assert found["all"]["shuffle_gap"] > 1
    assert found["front"]["changed"] < 1
    blind = untrained(windows, replace(SMALL, actions=False))
    fit(blind, windows, FITTING, tmp_path / "blind", {}, progress=False)
    without = measure(blind.eval(), unseen)["all"]
    assert without["copy_ratio"] > 1.5 * found["all"]["copy_ratio"]
    assert without["shuffle_gap"] == pytest.approx(0, abs=1e-6)


def test_the_latents_are_frozen_and_half_way_is_known() -> None:
    windows = Windows(pushed_data())
    model = untrained(windows)
    window = windows.gather(windows.rows[:4])
    loss, surprise = prediction_losses(model, window)
    surprise.backward(retain_graph=True)
    reached = {name.split(".")[0] for name, p in model.predictor.named_parameters() if p.grad is not None}
    assert reached == {"expect", "place"}
    loss.backward()
    assert all(not buffer.requires_grad for buffer in model.pca.buffers())
    assert model.predictor.leave.weight.grad is not None

    def half(z_BVND: torch.Tensor) -> torch.Tensor:
        return (z_BVND + model.encode(window.after_BVCHW)) / 2

    ratio_BV = copy_ratios(model, window, half)
    torch.testing.assert_close(ratio_BV[~ratio_BV.isnan()], torch.full((int((~ratio_BV.isnan()).sum()),), 0.25))


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    windows = Windows(pushed_data())
    config = FittingConfig(steps=6, batch_size=4, save_every=3)
    whole, stopped = untrained(windows), untrained(windows)
    losses = fit(whole, windows, config, tmp_path / "whole", {"data": 1}, progress=False)

    class StoppedError(Exception):
        pass

    drawn, gather = 0, windows.gather

    def stop(rows_B: torch.Tensor) -> None:
        nonlocal drawn
        drawn += 1
        if drawn > 5:
            raise StoppedError

    windows.gather = lambda rows_B: (stop(rows_B), gather(rows_B))[1]  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(StoppedError):
        fit(stopped, windows, config, tmp_path / "part", {"data": 1}, progress=False)
    windows.gather = gather  # type: ignore[method-assign]
    again = untrained(windows)
    assert fit(again, windows, config, tmp_path / "part", {"data": 1}, progress=False) == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"is of another run \(fitting.steps was 6, is 7\)"):
        fit(again, windows, replace(config, steps=7), tmp_path / "part", {"data": 1}, progress=False)
    (tmp_path / "part" / "training.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"training.pt is damaged .*resume=false"):
        fit(again, windows, config, tmp_path / "part", {"data": 1}, progress=False)


def test_a_fit_that_diverges_ends_and_its_weights_are_refused(tmp_path: Path) -> None:
    windows = Windows(pushed_data(episodes=4))
    model = untrained(windows)
    config = FittingConfig(steps=60, batch_size=8, learning_rate=100.0, save_every=1000)
    with pytest.raises(ValueError, match=r"the loss of step \d+ is (nan|inf): give a smaller learning_rate"):
        fit(model, windows, config, tmp_path / "run", {}, progress=False)
    model.predictor.position.data[:] = torch.nan
    save_foresight(tmp_path / "foresight", model, {})
    with pytest.raises(ValueError, match=r"damaged \(predictor.position has NaN or infinite numbers\); fit one"):
        load_foresight(tmp_path / "foresight")


def test_saving_keeps_all_and_damage_is_named(tmp_path: Path) -> None:
    windows = Windows(pushed_data())
    model = untrained(windows).eval()
    model.pca.fit(windows.gather(windows.rows).before_BVCHW.flatten(0, 1))
    save_foresight(tmp_path, model, {"seed": 3})
    loaded, about = load_foresight(tmp_path)
    window = windows.gather(windows.rows[:3])
    z_BVND = model.encode(window.before_BVCHW)
    assert about == {"seed": 3}
    assert torch.equal(loaded.encode(window.before_BVCHW), z_BVND)
    torch.testing.assert_close(
        loaded(z_BVND, window.state_BS, window.chunk_BKA), model(z_BVND, window.state_BS, window.chunk_BKA)
    )
    check_fits(loaded, ROBOT, tmp_path)
    larger = replace(ROBOT, cameras=(Camera("front", 64, 64), Camera("wrist", 64, 64)), chunk=CHUNK * 2)
    with pytest.raises(ValueError, match=r"its chunk is 4, the policy's 8; image size of front is \(32, 32\)"):
        check_fits(loaded, larger, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"is damaged .*fit one with `fit_foresight`"):
        load_foresight(tmp_path)
    (tmp_path / DESCRIPTION).unlink()
    with pytest.raises(ValueError, match="holds no foresight"):
        load_foresight(tmp_path)


def test_a_full_disk_leaves_the_weights_with_their_description(tmp_path: Path) -> None:
    windows = Windows(pushed_data())
    save_foresight(tmp_path / "foresight", untrained(windows), {"seed": 3})
    (tmp_path / "foresight" / "other.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "foresight").iterdir()}
    changed = untrained(windows)
    changed.pca.scale.mul_(2)
    size = len(before[WEIGHTS]) + 10_000
    with files_limited_to(size), pytest.raises(OSError, match="cannot write"):
        save_foresight(tmp_path / "foresight", changed, {"long": "x" * size})
    assert {path.name: path.read_bytes() for path in (tmp_path / "foresight").iterdir()} == before
    save_foresight(tmp_path / "foresight", changed, {"seed": 4})
    assert load_foresight(tmp_path / "foresight")[1] == {"seed": 4}
    assert {path.name for path in (tmp_path / "foresight").iterdir()} == set(before)


def test_image_sizes_that_cannot_be_cut_are_refused() -> None:
    windows = Windows(pushed_data())
    with pytest.raises(ValueError, match=r"cameras of one size, a multiple of patch=12; those of 'small' have"):
        untrained(windows, replace(SMALL, patch=12))
