"""The training reader: what comes out is what was recorded, batches resume exactly, and bad data sets are explained."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvla.lerobot_versions import LeRobotDataset, encoding
from cogvla.policy.data import frame_cache
from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.labels import shaped
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.inputs.resize import resize
from cogvla.policy.interface import Camera, Embodiment
from cogvla.tests.support.pixels import pixels_of
from cogvla.tests.support.small_data import small_data

LENGTHS = (5, 9, 4, 7)
SIZE = 16
EMBODIMENT = Embodiment("toy", (Camera("front", SIZE, SIZE), Camera("hand", SIZE, SIZE)), 3, 2, chunk=4, control_hz=10)
CAMERAS = {"front": "observation.images.main", "hand": "observation.images.gripper"}
FEATURES: dict[str, dict[str, Any]] = {
    "observation.images.main": {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]},
    "observation.images.gripper": {"dtype": "image", "shape": (24, 32, 3), "names": ["height", "width", "channels"]},
    "observation.state": {"dtype": "float32", "shape": (3,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": None},
    "label.target": {"dtype": "float32", "shape": (3,), "names": None},
    "label.table": {"dtype": "float32", "shape": (2, 3), "names": None},
    "label.flags": {"dtype": "bool", "shape": (2,), "names": None},
}


def frame_of(episode: int, step: int) -> dict[str, Any]:
    rng = np.random.default_rng([episode, step])
    return {
        "observation.images.main": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
        "observation.images.gripper": rng.integers(0, 256, (24, 32, 3), dtype=np.uint8),
        "observation.state": np.array([episode, step, 0.5], np.float32),
        "action": np.array([10 * episode + step, float(step > 2)], np.float32),
        "label.target": rng.random(3, np.float32),
        "label.table": np.full((2, 3), step, np.float32),
        "label.flags": np.array([step % 2 == 0, True]),
    }


def write(root: Path, lengths: tuple[int, ...] = LENGTHS, video: bool = False, **overrides: Any) -> Path:
    """A data set made with lerobot's own writer."""
    features: dict[str, Any] = {key: {**feature} for key, feature in FEATURES.items()}
    if video:
        for key in CAMERAS.values():
            features[key] |= {"dtype": "video", "shape": (64, 64, 3)}
    data = LeRobotDataset.create(
        "someone/toy", 10, features, root, use_videos=video, **encoding("h264"), video_backend="pyav"
    )
    for episode, length in enumerate(lengths):
        for step in range(length):
            frame = frame_of(episode, step)
            if video:
                level = np.uint8(20 * step + 40 * (episode % 2))
                frame |= {key: np.full((64, 64, 3), level) for key in CAMERAS.values()}
            frame |= {key: value(episode, step) for key, value in overrides.items()}
            data.add_frame(frame | {"task": f"do {episode % 2}"})
        data.save_episode(parallel_encoding=False)
    data.finalize()
    return root


def config(root: Path, cache: Path, **overrides: Any) -> DataConfig:
    labels = {"target": "label.target", "table": "label.table", "flags": "label.flags"}
    return DataConfig(**{"root": str(root), "cameras": CAMERAS, "labels": labels, "cache": str(cache), **overrides})


def open_data(root: Path, cache: Path, embodiment: Embodiment = EMBODIMENT, **overrides: Any) -> DemonstrationData:
    return DemonstrationData.open(config(root, cache, **overrides), embodiment, progress=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def data(root: Path, tmp_path_factory: pytest.TempPathFactory) -> DemonstrationData:
    return open_data(root, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def test_what_is_read_is_what_was_written(data: DemonstrationData) -> None:
    assert len(data) == sum(LENGTHS)
    assert data.instructions == ["do 0", "do 1"]
    where = [(episode, step) for episode, length in enumerate(LENGTHS) for step in range(length)]
    for row, (episode, step) in enumerate(where):
        frame = frame_of(episode, step)
        np.testing.assert_array_equal(pixels_of(data)[row, 0].permute(1, 2, 0), frame["observation.images.main"])
        hand = torch.from_numpy(frame["observation.images.gripper"]).permute(2, 0, 1)[None]
        assert torch.equal(pixels_of(data)[row, 1], resize(hand, (SIZE, SIZE))[0])
        assert data.state_NS[row].tolist() == [episode, step, 0.5]
        assert data.instructions[data.instruction_ids[row]] == f"do {episode % 2}"
        np.testing.assert_array_equal(data.labels["target"][row], frame["label.target"])
        assert (data.labels["table"][row] == step).all()
        assert data.labels["table"][row].shape == (2, 3)
        assert data.labels["flags"][row].tolist() == [step % 2 == 0, True]


def test_a_suite_with_one_task_has_labels_of_one_column() -> None:
    assert shaped("possible", "label.possible", torch.ones(5, dtype=torch.bool)).shape == (5, 1)
    assert shaped("possible", "label.possible", torch.ones(5, 3, dtype=torch.bool)).shape == (5, 3)
    with pytest.raises(ValueError, match="label 'possible' must have any number values"):
        shaped("possible", "label.possible", torch.ones(5, 3, 2, dtype=torch.bool))


def test_labels_have_the_type_that_training_needs() -> None:
    for dtype in (torch.uint8, torch.int32, torch.float32, torch.float64):
        found = shaped("phase", "step", torch.tensor([[2], [0]], dtype=dtype))
        assert found.dtype == torch.int64
        assert found.tolist() == [2, 0]
    assert shaped("target", "cube", torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float32
    for wrong in ([-1.0], [0.5], [0.0, 1.0]):
        with pytest.raises(ValueError, match="label 'phase' must be one whole number from 0 up in each frame, 'step'"):
            shaped("phase", "step", torch.tensor([wrong]))


def test_samples_are_chunks_that_end_with_their_episode(data: DemonstrationData) -> None:
    batches = TrainingBatches(data, 2, seed=0)
    sample = batches.gather(torch.tensor([2, 5]))  # two frames before the end of episode 0; the first of episode 1
    assert sample["pixels"].shape == (2, 2, 3, SIZE, SIZE)
    assert sample["pixels"].dtype == torch.uint8
    assert sample["pixels"].is_contiguous()
    assert sample["actions"][0, :, 0].tolist() == [2, 3, 4, 4]
    assert sample["actions"][1, :, 0].tolist() == [10, 11, 12, 13]
    assert sample["action_is_pad"].tolist() == [[False, False, False, True], [False] * 4]
    assert sample["instruction_id"].tolist() == [0, 1]
    assert sample["labels"]["table"][:, 0, 0].tolist() == [2, 0]
    assert torch.equal(sample["pixels"], pixels_of(data)[[2, 5]])
    last = batches.gather(torch.tensor([len(data) - 1]))
    assert last["action_is_pad"].tolist() == [[False, True, True, True]]


def test_chunks_equal_lerobots_delta_timestamps(root: Path, data: DemonstrationData) -> None:
    times = {"action": [i / 10 for i in range(EMBODIMENT.chunk)]}
    theirs = LeRobotDataset("someone/toy", root=root, delta_timestamps=times, video_backend="pyav")
    batch = TrainingBatches(data, 1, seed=0).gather(torch.arange(len(data)))
    for row in range(len(data)):
        assert torch.equal(batch["actions"][row], theirs[row]["action"])
        assert torch.equal(batch["action_is_pad"][row], theirs[row]["action_is_pad"])


def test_the_order_is_a_function_of_seed_and_step(data: DemonstrationData) -> None:
    first, second = TrainingBatches(data, 6, seed=3), TrainingBatches(data, 6, seed=3)
    forward = [first.rows(step).tolist() for step in range(20)]
    backward = [second.rows(step).tolist() for step in reversed(range(20))]
    assert forward == backward[::-1]
    assert forward != [TrainingBatches(data, 6, seed=4).rows(step).tolist() for step in range(20)]
    size = len(data)
    drawn = [row for rows in forward for row in rows]
    epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size, size)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches_larger_than_the_data(data: DemonstrationData) -> None:
    batches = TrainingBatches(data, 2 * len(data) + 1, seed=0)
    count = torch.bincount(torch.cat([batches.rows(0), batches.rows(1)]), minlength=len(data))
    assert count.tolist().count(4) >= len(data) - 2


def test_iteration_resumes_exactly(data: DemonstrationData) -> None:
    whole = TrainingBatches(data, 4, seed=1)
    for _ in range(9):
        next(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = TrainingBatches(data, 4, seed=1)
    resumed.load_state_dict(state)
    for _ in range(5):
        ours, theirs = next(resumed), next(whole)
        assert torch.equal(ours["pixels"], theirs["pixels"])
        assert torch.equal(ours["actions"], theirs["actions"])
    with pytest.raises(ValueError, match="batch_size was 4, is 5"):
        TrainingBatches(data, 5, seed=1).load_state_dict(state)


def test_split_by_episode(data: DemonstrationData) -> None:
    training, held_out = data.split(0.25, seed=0)
    assert training.rows is not None
    assert held_out.rows is not None
    assert len(training) + len(held_out) == len(data)
    episodes = [set(part.episode_N[part.rows].tolist()) for part in (training, held_out)]
    assert not episodes[0] & episodes[1]
    assert len(episodes[1]) == 1
    held = [data.split(0.25, seed=seed)[1].rows for seed in range(8)]
    assert held[0] is not None
    assert held[0].tolist() == held_out.rows.tolist()
    assert len({tuple(rows.tolist()) for rows in held if rows is not None}) > 1
    assert len(held_out.labels["target"]) == len(held_out) == len(held_out.instruction_ids)
    drawn = {row for step in range(30) for row in TrainingBatches(training, 5, 0).rows(step).tolist()}
    assert drawn == set(training.rows.tolist())
    everything, nothing = data.split(0.0, seed=0)
    assert (len(everything), len(nothing)) == (len(data), 0)
    with pytest.raises(ValueError, match="cannot be split"):
        held_out.split(0.5, seed=0)
    with pytest.raises(ValueError, match="no demonstrations"):
        TrainingBatches(nothing, 2, seed=0)


def test_statistics(data: DemonstrationData) -> None:
    statistics = data.statistics()
    np.testing.assert_allclose(statistics["state"].max, [3, 8, 0.5])
    np.testing.assert_allclose(statistics["action"].mean, data.action_NA.double().mean(0), rtol=1e-6)
    part = data.split(0.25, seed=0)[1]
    np.testing.assert_allclose(part.statistics()["state"].min[0], part.episode_N[part.rows].min())


def test_gripper_conventions_are_converted(root: Path, tmp_path: Path) -> None:
    robot = Embodiment("toy", EMBODIMENT.cameras, 3, 2, 4, 10, gripper_index=1, gripper_open=-1.0, gripper_close=1.0)
    data = open_data(root, tmp_path, robot, gripper={"index": 1, "open": 1, "close": 0})
    assert data.action_NA[:5, 1].tolist() == [1, 1, 1, -1, -1]
    assert data.action_NA[:5, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="index 2 is no gripper of embodiment 'toy': its gripper_index is \\[1\\]"):
        open_data(root, tmp_path, robot, gripper={"index": 2, "open": 1, "close": 0})
    with pytest.raises(ValueError, match="must differ"):
        config(root, tmp_path, gripper={"index": 1, "open": 1, "close": 1})


def test_frames_are_decoded_once(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = open_data(copy, cache)
    with monkeypatch.context() as patch:
        patch.setattr(frame_cache, "_decode", lambda *_: pytest.fail("decoded again"))
        again = open_data(copy, cache)
    assert torch.equal(pixels_of(again), pixels_of(first))
    assert again.describe() == first.describe()
    small = Embodiment("toy", (Camera("front", 8, 8), Camera("hand", 8, 8)), 3, 2, 4, 10)
    assert pixels_of(open_data(copy, cache, small)).shape[-2:] == (8, 8)
    changed = next((copy / "data").glob("*/*.parquet"))
    os.utime(changed, (time.time(), time.time() + 5))
    assert open_data(copy, cache).describe() == first.describe(), "the content is the same"
    assert len(list(cache.glob("*.frames"))) == 3


def test_an_interrupted_decoding_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(frame_cache, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_data(root, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_videos(tmp_path: Path) -> None:
    data = open_data(write(tmp_path / "toy", lengths=(4, 3), video=True), tmp_path / "cache")
    levels = pixels_of(data).float().mean(dim=(2, 3, 4))
    expected = torch.tensor([0, 20, 40, 60, 40, 60, 80.0])[:, None].expand(-1, 2)
    assert (levels - expected).abs().max() < 4
    next((tmp_path / "toy" / "videos").glob("*/*/*.mp4")).write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"\.mp4 is missing or no video"):
        open_data(tmp_path / "toy", tmp_path / "cache")
    shutil.rmtree(tmp_path / "toy" / "videos")
    with pytest.raises(ValueError, match=r"\.mp4 is missing"):
        open_data(tmp_path / "toy", tmp_path / "cache")


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_of_the_cache_is_positive(root: Path, tmp_path: Path, limit: float) -> None:
    with pytest.raises(ValueError, match=r"data.cache_gb must be positive, .* or null for no limit; got"):
        open_data(root, tmp_path, cache_gb=limit)


def test_a_missing_camera(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no camera 'x'; it has observation.images.main, observation.images.gripper"):
        open_data(root, tmp_path, cameras={**CAMERAS, "hand": "x"})
    with pytest.raises(ValueError, match="has no key for hand"):
        open_data(root, tmp_path, cameras={"front": CAMERAS["front"]})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"state": "observation.position"}, "no 'observation.position'; it has observation.state, action"),
        ({"action": "observation.state"}, r"shape \(3,\) .* the embodiment's action_dim is 2"),
        ({"state": "action"}, r"shape \(2,\) .* the embodiment's state_dim is 3"),
        ({"labels": {"goal": "label.goal"}}, "no 'label.goal'"),
        ({"instruction_key": "language"}, "no 'language'"),
    ],
)
def test_keys_that_do_not_fit(root: Path, tmp_path: Path, overrides: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(root, tmp_path, **overrides)


def test_nan_actions_are_located(tmp_path: Path) -> None:
    def action(episode: int, step: int) -> np.ndarray:
        return np.array([np.nan if (episode, step) in ((1, 2), (1, 3)) else 0, 0], np.float32)

    with pytest.raises(ValueError, match=r"action has NaN or infinite values in 2 frames .* episode 1, frame 2"):
        open_data(write(tmp_path / "toy", (3, 4), action=action), tmp_path / "cache")


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no LeRobotDataset in .*record one with `record_demonstrations suite=\.\.\."):
        open_data(tmp_path / "nothing", tmp_path)
    with pytest.raises(ValueError, match=r"root .* or a repo_id"):
        DataConfig(cameras=CAMERAS)


def test_an_empty_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        open_data(write(tmp_path / "toy", ()), tmp_path / "cache")


def test_a_truncated_file(copy: Path, tmp_path: Path) -> None:
    path = next((copy / "data").glob("*/*.parquet"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"file-000.parquet is missing or damaged .*download"):
        open_data(copy, tmp_path / "cache")


def test_a_damaged_image(copy: Path, tmp_path: Path) -> None:
    path = next((copy / "data").glob("*/*.parquet"))
    content = bytearray(path.read_bytes())
    start = content.find(b"IDAT")
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the image of .* at frame .* is damaged"):
        open_data(copy, tmp_path / "cache")


def test_missing_files(copy: Path, tmp_path: Path) -> None:
    info = copy / "meta" / "info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps(content | {"total_frames": 99}))
    with pytest.raises(ValueError, match="should have 99 frames, its files have 25"):
        open_data(copy, tmp_path / "cache")
    info.write_text("{")
    with pytest.raises(ValueError, match=r"info.json is damaged"):
        open_data(copy, tmp_path / "cache")


def test_a_merged_data_set(root: Path, tmp_path: Path) -> None:
    from lerobot.datasets.aggregate import aggregate_datasets

    other = write(tmp_path / "other", (3,))
    aggregate_datasets(
        ["someone/toy", "someone/toy"], "someone/merged", [root, other], tmp_path / "merged", data_files_size_in_mb=1e-3
    )
    data = open_data(tmp_path / "merged", tmp_path / "cache")
    assert len(data) == sum(LENGTHS) + 3
    assert data.state_NS[-3:].tolist() == [[0, 0, 0.5], [0, 1, 0.5], [0, 2, 0.5]]
    main = torch.from_numpy(frame_of(0, 2)["observation.images.main"]).permute(2, 0, 1)
    assert torch.equal(pixels_of(data)[-1, 0], main)
    assert data.episode_N.unique().tolist() == [0, 1, 2, 3, 4]


def test_earlier_frames_come_from_the_same_episode() -> None:
    data = small_data()
    batches = TrainingBatches(data, 4, 0, history=(2, 3))
    first = int(data.episode_N.eq(1).nonzero()[0])
    rows = first + torch.tensor([0, 2, 3, 6])
    samples = batches.gather(rows)
    past = first + torch.tensor([[0, 0], [0, 0], [0, 0], [0, 3]])
    assert samples["past_age"].tolist() == [0, 0, 1, 2]
    assert torch.equal(samples["past_state"], data.state_NS[past])
    expected = torch.from_numpy(data.frames.take(past.flatten().numpy())).unflatten(0, (4, 2))
    assert torch.equal(samples["past_pixels"], expected)
    assert "past_age" not in TrainingBatches(data, 4, 0).gather(rows)
