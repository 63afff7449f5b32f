"""The configuration that users start from: every preset builds, and another suite needs no other override."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cogvla import configs
from cogvla.envs import TABLETOP_SUITES
from cogvla.envs.control import CONTROL_HZ
from cogvla.envs.demonstration import Demonstrator, DemonstratorSettings
from cogvla.envs.expert import Expert
from cogvla.envs.suite import get_suite
from cogvla.libero.protocol import load_protocol
from cogvla.policy.config import CogVLAConfig
from cogvla.policy.data import DataConfig
from cogvla.policy.interface import Embodiment
from cogvla.policy.objective import ObjectiveConfig
from cogvla.policy.tokenizer import WordTokenizer
from cogvla.policy.training_config import TrainingConfig

FOLDER = Path(configs.__path__[0])


def composed(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("cogvla.configs", version_base="1.3"):
        values = OmegaConf.to_container(compose(name, list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_everything_of_a_run_follows_the_suite(suite):
    values = composed("train_policy", f"suite={suite}", "seed=3")
    assert DataConfig(**values["data"]).root == f"outputs/demonstrations/{suite}"
    assert values["output"] == f"outputs/train_policy/{suite}/seed3"
    assert TrainingConfig(**values["training"]).seed == 3


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_the_recorded_features_are_those_that_the_mapping_names(suite):
    values = composed("train_policy", f"suite={suite}")
    data, embodiment = DataConfig(**values["data"]), Embodiment(**values["embodiment"])
    played = get_suite(suite)
    instructions = tuple(task.instruction for task in played.tasks)
    settings = DemonstratorSettings(played.make, Expert, instructions, played.max_steps, 16, 0.0, 0)
    demonstrator = Demonstrator(settings)
    episode, _ = demonstrator.record(0)
    demonstrator.close()
    assert demonstrator.fps == embodiment.control_hz == CONTROL_HZ
    assert [data.cameras[name] for name in embodiment.camera_names] == list(episode.images)
    assert episode.arrays[data.state].shape[1:] == (embodiment.state_dim,)
    assert episode.arrays[data.action].shape[1:] == (embodiment.action_dim,)
    assert set(data.labels.values()) <= set(episode.arrays)
    assert set(np.unique(episode.arrays[data.action][:, embodiment.gripper_index])) <= {
        embodiment.gripper_open,
        embodiment.gripper_close,
    }


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_the_default_policy_has_room_for_the_words_of_the_suite(suite):
    values = composed("train_policy", f"suite={suite}")
    words = WordTokenizer.from_instructions(task.instruction for task in get_suite(suite).tasks)
    assert len(words) <= CogVLAConfig.from_dict(values["policy"]).language.vocab_size - 2


def test_demonstrations_recorded_beforehand_are_those_that_training_asks_for():
    trained, recorded = composed("train_policy"), composed("record_demonstrations")
    assert trained["data"]["root"] == recorded["output"]
    assert trained["embodiment"]["cameras"][0]["height"] == recorded["image_size"]
    assert {key: recorded[key] for key in ("episodes", "noise", "seed")} == {
        key: trained["demonstrations"][key] for key in ("episodes", "noise", "seed")
    }


@pytest.mark.parametrize("policy", options("policy"))
@pytest.mark.parametrize("routing", options("routing"))
def test_every_policy_goes_with_every_routing(policy, routing):
    values = composed("train_policy", f"policy={policy}", f"routing={routing}")
    config = CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})
    assert CogVLAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("routing", ["no_efa", "no_lfp", "no_catten"])
def test_an_ablation_differs_from_the_whole_in_one_value(routing):
    whole, part = (composed("train_policy", f"routing={name}")["routing"] for name in ("cogvla", routing))
    assert len([key for key in whole if whole[key] != part[key]]) == 1
    assert whole.keys() == part.keys()


@pytest.mark.parametrize("objective", options("objective"))
def test_every_objective_builds(objective):
    values = composed("train_policy", f"objective={objective}")["objective"]
    assert ObjectiveConfig(**values).grounding == values["grounding"]


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_the_default_protocol_fits_every_tabletop_suite(suite):
    assert composed("train_policy", f"suite={suite}")["evaluation"]["protocol"] is None
    protocol = load_protocol(get_suite(suite).protocol)
    assert len(protocol.episodes(get_suite(suite))) == 10 * protocol.episodes_per_task
