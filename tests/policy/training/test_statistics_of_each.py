"""Statistics of each data set: training normalises each sample by its own, a policy must be told which it needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvla.policy.checkpoint import load_policy, open_policy
from cogvla.policy.data.config import DataConfig, DataEntry
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.mixture.mixture import Place, joined
from cogvla.policy.data.sampling import TrainingBatches
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.normalise import Normaliser
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.training.batches import BatchBuilder
from cogvla.policy.training.data_checks import rare_dimensions
from cogvla.scripts.policies import open_any_policy
from cogvla.tests.support.small_data import LABELLED, ROBOT, settings, small_data, small_trainer

NAMES = ("metres", "millimetres")


def two(statistics: str = "each", episodes: int = 8) -> DemonstrationData:
    """The same motions in two units, one of them shifted."""
    first, second = small_data(episodes), small_data(episodes, seed=1)
    far = replace(
        second, state_NS=1000 * second.state_NS + 5, action_NA=second.action_NA * torch.tensor([1e3] * 3 + [1])
    )
    places = [Place(n, DataEntry(DataConfig({}, root=n)), Path(n), None, 10, "x_y") for n in NAMES]
    return joined(places, [first, far], DataConfig({}, root="A", statistics=statistics))


def preprocessor_of(data: DemonstrationData) -> Preprocessor:
    return Preprocessor(ROBOT, WordTokenizer.from_instructions(data.instructions), data.statistics())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("each")
    small_trainer(root, settings(steps=8), data=two()).run()
    return root / "policy"


def test_every_sample_is_normalised_by_its_own_data_set() -> None:
    data = two()
    builder = BatchBuilder(data, preprocessor_of(data), LABELLED)
    samples = TrainingBatches(data, 64, 0).gather(TrainingBatches(data, 64, 0).rows(0))
    batch = builder.evaluation(samples)
    assert set(samples["set"].tolist()) == {0, 1}
    for number, part in enumerate(data.parts):
        alone = replace(data, rows=torch.arange(part.start, part.end), each=False).statistics()
        mine = samples["set"] == number
        assert torch.equal(batch.inputs.state[mine], Normaliser("q99", alone["state"])(samples["state"][mine]))
        actions = Normaliser("q99", alone["action"], ROBOT.action_normalise_mask)(samples["actions"][mine])
        assert torch.equal(batch.actions_BKA[mine], actions)
    joint, own = two("joint"), samples.pop("set")
    spread = BatchBuilder(joint, preprocessor_of(joint), LABELLED).evaluation(samples).inputs.state
    assert spread[own == 0].std() < 0.1 * batch.inputs.state[own == 0].std()


def test_other_units_are_noted_only_with_joint_statistics() -> None:
    assert any("very different ranges" in note for note in two("joint").notes)
    assert not any("very different ranges" in note for note in two().notes)


def test_the_checkpoint_names_the_data_sets(trained: Path) -> None:
    saved = json.loads((trained / "statistics.json").read_text())
    assert tuple(saved) == NAMES
    one, other = (load_policy(trained, statistics=name) for name in NAMES)
    robot = one.embodiment.fake_observation(2, 0)
    for policy, name in ((one, NAMES[0]), (other, NAMES[1])):
        assert policy.describe()["statistics"] == name
        low, high = (torch.tensor(saved[name]["action"][q]) for q in ("q01", "q99"))
        inputs = policy.preprocessor.observation(robot)
        normalised = policy.normalised_actions(inputs)
        wanted = (normalised[..., :3] + 1) / 2 * (high - low)[:3] + low[:3]
        torch.testing.assert_close(torch.from_numpy(policy.act(robot).actions)[..., :3], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        torch.from_numpy(one.with_statistics(NAMES[1]).act(robot).actions), torch.from_numpy(other.act(robot).actions)
    )


def test_it_must_be_said_which_statistics(trained: Path, tmp_path: Path) -> None:
    several = r"policy has statistics of several data sets; choose .* statistics=NAME: metres, millimetres"
    with pytest.raises(ValueError, match=several):
        load_policy(trained)
    with pytest.raises(ValueError, match=several):
        open_policy(trained, "cpu")
    with pytest.raises(ValueError, match=r"no statistics named 'inches'; one of metres, millimetres"):
        open_any_policy(str(trained), device="cpu", statistics="inches")
    with pytest.raises(ValueError, match=r"statistics of several data sets"):
        load_policy(trained, statistics="*").act(ROBOT.fake_observation(1))
    opened, _ = open_any_policy(str(trained), device="cpu", statistics="metres")
    assert opened.describe()["statistics"] == "metres"
    with pytest.raises(ValueError, match="statistics=metres needs a checkpoint, not random"):
        open_any_policy("random", statistics="metres")
    small_trainer(tmp_path, settings(steps=1)).run()
    with pytest.raises(ValueError, match=r"no statistics named 'metres'; leave it out: there is one set"):
        load_policy(tmp_path / "policy", statistics="metres")


def test_an_engine_uses_the_chosen_statistics(trained: Path) -> None:
    policy = load_policy(trained, statistics="millimetres")
    seen = policy.embodiment.fake_observation(1, 3)
    fast = policy.with_engine(EngineConfig())
    torch.testing.assert_close(
        torch.from_numpy(fast.act(seen).actions), torch.from_numpy(policy.act(seen).actions), rtol=1e-3, atol=1e-2
    )


def test_a_run_goes_on_exactly_and_only_with_the_same_kind_of_statistics(tmp_path: Path) -> None:
    small_trainer(tmp_path / "whole", settings(), data=two()).run()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/step_0000008")  # as if killed after step 4
    shutil.rmtree(tmp_path / "part/policy")
    for path in (tmp_path / "part/checkpoints").glob("step_0000010"):
        shutil.rmtree(path)
    small_trainer(tmp_path / "part", settings(), data=two()).run()
    for file in ("model.safetensors", "statistics.json"):
        assert (tmp_path / "whole/policy" / file).read_bytes() == (tmp_path / "part/policy" / file).read_bytes()
    with pytest.raises(ValueError, match=r"data\.statistics was each, is None"):
        small_trainer(tmp_path / "whole", settings(steps=12), data=two("joint")).run()


def test_a_teacher_may_have_them_too(trained: Path, tmp_path: Path) -> None:
    objective = replace(LABELLED, distillation=1.0, teacher=str(trained))
    metrics: dict[str, Any] = small_trainer(tmp_path, settings(steps=1), objective, data=two())._train_step()
    assert "teacher_kl" in metrics
    with pytest.raises(ValueError, match="data with other statistics of state or action"):
        small_trainer(tmp_path, settings(steps=1), objective, data=two("joint"))


def test_resting_dimensions_are_named_by_data_set() -> None:
    data = two(episodes=40)
    state_NS = data.state_NS.clone()
    last = data.parts[1]
    state_NS[last.start : last.end, 1] = 0
    state_NS[last.start, 1] = 9
    lines = rare_dimensions(replace(data, state_NS=state_NS), ROBOT)
    assert [line.split(" rests")[0] for line in lines] == ["millimetres: state 1"]
