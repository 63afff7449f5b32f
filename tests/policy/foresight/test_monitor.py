"""Scores, thresholds and alarms."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvla.policy.foresight.fitting import fit
from cogvla.policy.foresight.model import Foresight, save_foresight
from cogvla.policy.foresight.monitor import SCORES, Monitor, Normal, Thresholds, conformal_threshold
from cogvla.policy.foresight.monitored_policy import MonitoredPolicy, open_monitor, save_thresholds
from cogvla.policy.foresight.predictor import Prediction
from cogvla.policy.foresight.windows import Windows
from cogvla.policy.interface import ActionChunk, Embodiment, Observation
from cogvla.tests.policy.foresight.test_foresight import FITTING, pushed_data, untrained
from cogvla.tests.support.small_data import CHUNK, ROBOT

FRAMES = 17


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Foresight, Normal]:
    windows = Windows(pushed_data())
    model = untrained(windows)
    fit(model, windows, FITTING, tmp_path_factory.mktemp("fit"), {}, progress=False)
    return model.eval().requires_grad_(False), Normal.of(model, Windows(pushed_data(seed=1)))


class Recorded:
    """A policy that repeats the executed actions of a recording, which its observations follow."""

    def __init__(self, seed: int) -> None:
        self.data = pushed_data(episodes=1, frames=FRAMES + CHUNK, seed=seed)
        self.frame = 0

    @property
    def embodiment(self) -> Embodiment:
        return ROBOT

    choice = "measured"

    def unknown_words(self, instruction: str) -> list[str]:
        return instruction.split()[1:]

    def describe(self) -> dict[str, Any]:
        return {"name": "recorded"}

    def reset(self) -> None:
        self.frame = 0

    def warm_up(self, batch: int, instructions: Any = ()) -> None:
        pass

    def act(self, observation: Observation) -> ActionChunk:
        assert self.data.executed_NA is not None
        chunk_KA = self.data.executed_NA[self.frame : self.frame + CHUNK]
        return ActionChunk(chunk_KA.numpy()[None].repeat(observation.batch_size, 0))

    def observation(self, frame: int, slots: list[Hashable] | None = None) -> Observation:
        self.frame = frame
        images = self.data.frames.take(np.array([frame]))[0].transpose(0, 2, 3, 1)
        views = {name: image[None] for name, image in zip(ROBOT.camera_names, images, strict=True)}
        return Observation(views, self.data.state_NS[frame : frame + 1].numpy(), ["go"], slots)


def highest(model: Foresight, normal: Normal, seed: int) -> dict[str, dict[str, float]]:
    recorded = Recorded(seed)
    watched = MonitoredPolicy(recorded, Monitor(model, normal, None), CHUNK)
    for frame in range(0, FRAMES, CHUNK):
        watched.act(recorded.observation(frame))
    noticed = watched.noticed(0)
    assert noticed["alarm"] is None
    assert noticed["compared"] == 4
    return dict(noticed["highest"])


@pytest.fixture(scope="module")
def thresholds(fitted: tuple[Foresight, Normal]) -> Thresholds:
    return Thresholds.of([highest(*fitted, seed) for seed in range(2, 52)], alpha=0.2)


def test_the_conformal_threshold_is_that_of_the_next_episode() -> None:
    assert conformal_threshold(range(1, 20), 0.05) == 19
    assert conformal_threshold(range(1, 20), 0.1) == 18
    with pytest.raises(ValueError, match="needs 19 episodes, there are 18"):
        conformal_threshold(range(1, 19), 0.05)
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 20))
    above = [float(draw[-1]) > conformal_threshold(draw[:-1].tolist(), 0.1) for draw in draws]
    assert np.mean(above) == pytest.approx(0.1, abs=0.02)


def test_too_few_episodes_for_all_scores_are_refused() -> None:
    one = {camera: dict.fromkeys(SCORES, 1.0) for camera in ROBOT.camera_names}
    with pytest.raises(ValueError, match=r"shared by 10 scores, needs 199 successful episodes, there are 198"):
        Thresholds.of([one] * 198, alpha=0.05)
    assert Thresholds.of([one] * 199, alpha=0.05).limit["front"]["still"] == 1.0
    with pytest.raises(ValueError, match="alpha must be above 0"):
        Thresholds.of([one], alpha=0.0)
    with pytest.raises(ValueError, match="there are 0"):
        Thresholds.of([], alpha=0.5)


@pytest.mark.parametrize(("steps", "kind"), [(4, "frozen"), (2, "frozen"), (4, "covered"), (4, "other")])
def test_a_broken_camera_is_an_alarm_that_stays_and_stops_the_arm(
    steps: int, kind: str, fitted: tuple[Foresight, Normal], thresholds: Thresholds
) -> None:
    recorded = Recorded(100)
    monitor = Monitor(*fitted, thresholds)
    watched = MonitoredPolicy(recorded, monitor, steps)
    told: list[str | None] = []
    for frame in range(0, FRAMES, steps):
        observation = recorded.observation(frame, ["arm"])
        images = dict(observation.images)
        if frame >= 4 and kind == "frozen":
            images["wrist"] = np.asarray(recorded.observation(4).images["wrist"])
            recorded.frame = frame
        elif frame >= 8 and kind == "covered":
            images["wrist"] = np.full_like(images["wrist"], 90)
        elif frame >= 8:
            images["wrist"] = np.ascontiguousarray(images["wrist"].transpose(0, 2, 1, 3))
        chunk = watched.act(Observation(images, observation.state, ["go"], ["arm"]))
        told.append(monitor.alarm("arm"))
        moves = bool((chunk.actions[:, :, :3] != 0).any())
        assert moves == (told[-1] is None)
    assert told[: 4 // steps + 1] == [None] * (4 // steps + 1), "nothing happened before"
    assert told[-1] is not None
    assert told[-1].startswith("monitor: ")
    assert watched.noticed("arm")["alarm"] == told[-1]
    watched.begin(["arm"])
    assert watched.noticed("arm") == {"alarm": None, "compared": 0, "highest": {}}


def test_clean_episodes_rarely_alarm(fitted: tuple[Foresight, Normal], thresholds: Thresholds) -> None:
    alarms = 0
    for seed in range(200, 240):
        scores = highest(*fitted, seed)
        alarms += any(scores[c][s] > thresholds.limit[c][s] for c in scores for s in SCORES)
    assert alarms <= 14, "alpha is 0.2 of 40"


def test_robots_are_told_apart_and_batches_change_nothing(fitted: tuple[Foresight, Normal]) -> None:
    both, alone = Monitor(*fitted, None), Monitor(*fitted, None)
    robots = [Recorded(5), Recorded(6)]
    for frame in range(0, 9, CHUNK):
        seen = [robot.observation(frame) for robot in robots]
        chunks = np.concatenate([robot.act(o).actions for robot, o in zip(robots, seen, strict=True)])
        both.look(["a", "b"], Observation.stack(seen))
        both.executed(["a", "b"], chunks)
        alone.look(["b"], seen[1])
        alone.executed(["b"], chunks[1:])
    for camera, scores in alone.noticed("b")["highest"].items():
        assert both.noticed("b")["highest"][camera] == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert both.noticed("a") != both.noticed("b")
    both.interrupt("a")
    both.look(["a"], robots[0].observation(12))
    assert both.noticed("a")["compared"] == 2, "what was interrupted is not compared"


def test_words_change_nothing(fitted: tuple[Foresight, Normal]) -> None:
    found = []
    for words in ("touch the red square", ""):
        monitor, recorded = Monitor(*fitted, None), Recorded(7)
        for frame in (0, 4):
            seen = recorded.observation(frame)
            monitor.look([0], Observation(seen.images, seen.state, [words]))
            monitor.executed([0], recorded.act(seen).actions)
        found.append(monitor.noticed(0))
    assert found[0] == found[1]


def test_a_monitor_is_saved_and_what_is_missing_is_named(
    tmp_path: Path, fitted: tuple[Foresight, Normal], thresholds: Thresholds
) -> None:
    model, normal = fitted
    folder = tmp_path / "policy" / "foresight"
    with pytest.raises(ValueError, match=r"policy holds no foresight, and neither does .*`calibrate_monitor`"):
        open_monitor(tmp_path / "policy", ROBOT)
    save_foresight(folder, model, {"normal": asdict(normal)})
    with pytest.raises(ValueError, match=r"has no thresholds \(monitor.json is missing\); calibrate it"):
        open_monitor(tmp_path / "policy", ROBOT)
    assert open_monitor(folder, ROBOT, calibrated=False).thresholds is None
    save_thresholds(folder, thresholds, {})
    opened = open_monitor(tmp_path / "policy", ROBOT)
    assert opened.thresholds == thresholds
    assert set(opened._recorded) == {"see", "compare"}, "a moving robot does not wait for a recording"
    assert not opened._episodes
    watched = MonitoredPolicy.open(Recorded(0), tmp_path / "policy", 2)
    assert set(watched.describe()) == {"name", "monitor", "foresight"}
    with pytest.raises(ValueError, match="looks 4 actions ahead, which is no multiple of execute_steps=3"):
        MonitoredPolicy.open(Recorded(0), tmp_path / "policy", 3)
    save_thresholds(folder, replace(thresholds, execute_steps=4), {})
    MonitoredPolicy.open(Recorded(0), folder, 4)
    with pytest.raises(ValueError, match=r"hold for execute_steps=4, not 2: give protocol.execute_steps=4"):
        MonitoredPolicy.open(Recorded(0), folder, 2)
    with torch.no_grad():
        refitted = copy.deepcopy(model)
        refitted.pca.scale.mul_(2)
    save_foresight(folder, refitted, {"normal": asdict(normal)})
    with pytest.raises(ValueError, match=r"monitor.json was measured with another model .*; calibrate it"):
        open_monitor(folder, ROBOT)
    for damage in ('{"thresholds": {"limit": {}}}', "{}", "no", '{"thresholds": null}'):
        (folder / "monitor.json").write_text(damage)
        with pytest.raises(ValueError, match=r"monitor.json is damaged .*; calibrate it with `calibrate_monitor`"):
            open_monitor(folder, ROBOT)


def test_what_the_policy_can_say_passes_through() -> None:
    monitor = Monitor(untrained(Windows(pushed_data())).eval(), Normal((), (), (), (), (), ()), None)
    watched = MonitoredPolicy(Recorded(0), monitor, CHUNK)
    assert (watched.unknown_words("go there"), watched.choice) == (["there"], "measured")


def test_a_camera_in_which_hardly_anything_moves_has_alarms_for_other_reasons(tmp_path: Path) -> None:
    windows = Windows(pushed_data())
    model = untrained(windows).eval().requires_grad_(False)  # predicts that nothing changes, so that `still` is 0
    limit = {camera: dict.fromkeys(SCORES, 1e-6) | {"still": 0.0} for camera in ROBOT.camera_names}
    save_foresight(tmp_path, model, {"normal": asdict(Normal.of(model, windows, samples=64))})
    save_thresholds(tmp_path, Thresholds(limit, limit, 0.2, 50), {})
    monitor, recorded = open_monitor(tmp_path, ROBOT), Recorded(0)
    for frame in (0, CHUNK):
        monitor.look([0], recorded.observation(frame))
        monitor.executed([0], recorded.act(recorded.observation(frame)).actions)
    assert monitor.noticed(0)["highest"][ROBOT.camera_names[0]]["still"] == 0
    assert str(monitor.alarm(0)).startswith("monitor: ")


def test_still_abstains_where_hardly_any_change_is_predicted(fitted: tuple[Foresight, Normal]) -> None:
    model, normal = fitted
    from cogvla.policy.foresight.monitor import score

    pixels = torch.randint(0, 256, (1, 2, 3, 32, 32), dtype=torch.uint8)
    z_BVND, turn_BVt = model.encode(pixels), torch.tensor(normal.turn)[None]
    still = SCORES.index("still")

    def scored(change: float) -> torch.Tensor:
        prediction = Prediction(z_BVND + change, z_BVND[..., 0], z_BVND[..., 1])
        return score(model, normal, z_BVND, prediction, pixels, z_BVND, turn_BVt)[0]

    for change, wanted in ((0.01, 0.0), (0.5, 0.5 / 0.01)):
        torch.testing.assert_close(scored(change)[:, still], torch.full((2,), wanted), rtol=1e-3, atol=1e-6)
    assert math.isfinite(float(scored(0.0).sum()))
    assert scored(0.0)[:, SCORES.index("turn")].tolist() == pytest.approx([0, 0], abs=1e-3)
