"""Every file under configs/ composes and builds what it configures, and the default fits every suite as it is."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from cogvla.configs.build import build, take
from cogvla.configs.load import load
from cogvla.configs.schema import DATACLASSES, defaults
from cogvla.envs import TABLETOP_SUITES
from cogvla.envs.evaluation.protocol import EvaluationProtocol, load_protocol
from cogvla.envs.recording.demonstrator import Demonstrator, DemonstratorSettings
from cogvla.envs.recording.recorder import record
from cogvla.envs.suite import get_suite
from cogvla.envs.tabletop.control import CONTROL_HZ
from cogvla.envs.tabletop.expert import Expert
from cogvla.libero.env import LiberoSettings
from cogvla.policy.cost.flops import Counting
from cogvla.policy.data.config import DataConfig
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.inputs.augmentation import AugmentationConfig
from cogvla.policy.inputs.tokenizer import WordTokenizer
from cogvla.policy.instructions.paraphrase import wordings
from cogvla.policy.interface import Embodiment
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import CogVLAConfig, RoutingConfig
from cogvla.policy.training.adapters import FinetuneConfig
from cogvla.policy.training.config import TrainingConfig
from cogvla.policy.training.objective import ObjectiveConfig
from cogvla.policy.training.wordings import InstructionAugmentation
from cogvla.real_robot.bridge.bridge import BridgeSettings
from cogvla.real_robot.control.settings import RobotConfig
from cogvla.real_robot.lerobot.robot import LeRobotSettings
from cogvla.real_robot.lerobot.teleoperator import TeleopSettings
from cogvla.real_robot.ros.network import RosSettings
from cogvla.real_robot.ros.topics import RosTopics
from cogvla.real_robot.serving.request import RequestKeys
from cogvla.scripts.command import compose
from cogvla.scripts.training.build import build_trainer
from cogvla.tests.support import small_data as small
from cogvla.tests.support.paths import CONFIGS

GROUPS: dict[str, Any] = {
    "augmentation": AugmentationConfig,
    "counting": Counting,
    "data": DataConfig,
    "embodiment": Embodiment,
    "engine": EngineConfig,
    "finetune": FinetuneConfig,
    "lerobot": LeRobotSettings,
    "libero": LiberoSettings,
    "objective": ObjectiveConfig,
    "protocol": EvaluationProtocol,
    "request_keys": RequestKeys,
    "robot": RobotConfig,
    "ros": RosSettings,
    "routing": RoutingConfig,
    "teleop": TeleopSettings,
    "topics": RosTopics,
    "training": TrainingConfig,
    "wordings": InstructionAugmentation,
}
COMPOSED_BY = {
    "counting": "count_flops",
    "lerobot": "drive_robot",
    "protocol": "eval_libero",
    "request_keys": "policy_server",
    "robot": "robot_bridge",
    "ros": "robot_bridge",
    "teleop": "drive_robot",
    "topics": "robot_bridge",
}
"""The command that a group belongs to; train_policy unless named here."""
IMAGE = {"tiny": 128, "small": 224, "cogvla_7b": 224}
PARAMETERS = {"tiny": (0.5e6, 2e6), "small": (0.4e9, 0.7e9), "cogvla_7b": (7e9, 9.5e9)}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(name: str, *overrides: str) -> dict[str, Any]:
    values = OmegaConf.to_container(compose(name, list(overrides)), resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def model_of(*overrides: str) -> CogVLAConfig:
    values = composed("train_policy", *overrides)
    return CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})


def leaves(values: Any, path: str = "") -> dict[str, Any]:
    """Every value of nested mappings by its dotted name."""
    if not isinstance(values, dict):
        return {path: values}
    return {key: leaf for name, value in values.items() for key, leaf in leaves(value, f"{path}.{name}").items()}


def test_every_folder_is_known() -> None:
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert folders == {*GROUPS, "policy", "ablation", "accelerate", "hydra"}


@pytest.mark.parametrize("command", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_command_composes(command: str) -> None:
    assert composed(command)


@pytest.mark.parametrize("command", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_command_that_runs_a_policy_chooses_its_statistics(command: str) -> None:
    config = composed(command)
    needs_none = {"count_flops", "fit_forecast", "share_policy"}
    assert command in needs_none or "checkpoint" not in config or "statistics" in config


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in names(group)])
def test_every_file_of_a_group_builds_its_dataclass(group: str, name: str) -> None:
    values = composed(COMPOSED_BY.get(group, "train_policy"), f"{group}={name}")[group]
    assert values.keys() == {f.name for f in fields(GROUPS[group])}, "every key can be set on the command line"
    built = build(GROUPS[group], values, group)
    assert built == GROUPS[group](**{f.name: getattr(built, f.name) for f in fields(built)})


@pytest.mark.parametrize("kind", [*(GROUPS[name] for name in GROUPS if name != "request_keys"), RoutingConfig])
def test_every_key_is_documented(kind: Any) -> None:
    text = inspect.getdoc(kind) or ""
    undocumented = [f.name for f in fields(kind) if not re.search(rf"\b{f.name}\b", text)]
    assert not undocumented


def plain(value: Any) -> Any:
    """As YAML writes it."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


@pytest.mark.parametrize("dotted", [dotted for group in DATACLASSES.values() for dotted in group])
def test_defaults_that_are_read_are_those_of_the_dataclass(dotted: str) -> None:
    module, _, name = dotted.rpartition(".")
    read = defaults(dotted)
    expected = fields(getattr(importlib.import_module(f"cogvla.{module}"), name))
    assert list(read) == [f.name for f in expected]
    for f in expected:
        if f.default is not MISSING:
            assert read[f.name] == plain(f.default)
        elif f.default_factory is not MISSING:
            assert read[f.name] == plain(f.default_factory())
        else:
            assert read[f.name] == "???" or isinstance(read[f.name], dict)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in DATACLASSES if group for name in names(group)])
def test_files_read_without_hydra_say_the_same(group: str, name: str) -> None:
    command = COMPOSED_BY.get(group, "train_policy")
    with_hydra = leaves(OmegaConf.to_container(compose(command, [f"{group}={name}"])[group]))
    without = leaves(load(group, name))
    assert without.items() <= with_hydra.items() or {key: with_hydra[key] for key in without} == without


@pytest.mark.parametrize("file", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("**/*.yaml")))
def test_files_begin_by_saying_what_they_are_for(file: str) -> None:
    text = (CONFIGS / file).read_text().removeprefix("# @package _global_\n")
    assert text.startswith("# ")
    for mentioned in re.findall(r"documented in (\S+\.py)", text):
        assert (CONFIGS.parent / mentioned).is_file()
        if group := GROUPS.get(Path(file).parent.name):
            assert inspect.getsourcefile(group) == str(CONFIGS.parent / mentioned), f"{file} points at {mentioned}"


def test_an_unknown_key_lists_the_known_ones() -> None:
    values = composed("train_policy")
    with pytest.raises(ValueError, match=r"unknown key efa_ in model\.routing; valid keys are efa, film, fusion"):
        CogVLAConfig.from_dict({**values["policy"], "routing": {"efa_": True}})


@pytest.mark.parametrize("key", ["finetune", "augmentation"])
def test_an_unknown_key_of_a_part_of_training_is_explained(key: str) -> None:
    values = composed("train_policy", f"+{key}.sharpness=1")
    with pytest.raises(ValueError, match=rf"unknown key sharpness in training\.{key}; valid keys are"):
        build(TrainingConfig, values["training"], "training")


@pytest.mark.parametrize("word", ["no", "Off", "flase"])
def test_text_is_no_truth_value(word: str) -> None:
    values = composed("robot_bridge", f"activate={word}")
    with pytest.raises(ValueError, match=f"activate must be true or false, got '{word}'"):
        take(BridgeSettings, values)


def test_a_base_is_the_teacher_unless_another_is_named() -> None:
    assert composed("train_policy")["objective"]["teacher"] is None
    assert composed("train_policy", "base=FOLDER")["objective"]["teacher"] == "FOLDER"
    assert composed("train_policy", "base=FOLDER", "objective.teacher=OTHER")["objective"]["teacher"] == "OTHER"


def test_what_objectives_need_is_said_before_anything_takes_time() -> None:
    for wish, said in (("distillation=1", "needs a teacher"), ("prior=1", "needs a policy that does not see")):
        with pytest.raises(ValueError, match=said):
            build(ObjectiveConfig, composed("train_policy", f"objective.{wish}")["objective"], "objective")


# --- policies and routings ---


@pytest.mark.parametrize("policy", names("policy"))
@pytest.mark.parametrize("routing", names("routing"))
def test_every_policy_goes_with_every_routing(policy: str, routing: str) -> None:
    config = model_of(f"policy={policy}", f"routing={routing}")
    assert CogVLAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("routing", names("routing"))
def test_the_tiny_policy_is_built_with_every_routing(routing: str) -> None:
    model = CogVLA(
        model_of("policy=tiny", f"routing={routing}"),
        build(Embodiment, composed("train_policy")["embodiment"], "embodiment"),
    )
    assert sum(p.numel() for p in model.parameters()) > 3e5


@pytest.mark.parametrize("policy", names("policy"))
def test_presets_have_the_sizes_they_claim(policy: str) -> None:
    values = composed("train_policy")["embodiment"]
    values["cameras"] = [camera | {"height": IMAGE[policy], "width": IMAGE[policy]} for camera in values["cameras"]]
    with torch.device("meta"):
        model = CogVLA(model_of(f"policy={policy}"), Embodiment(**values))
    low, high = PARAMETERS[policy]
    assert low < sum(p.numel() for p in model.parameters()) < high


CHANGES: dict[str, dict[str, Any]] = {
    "whole": {},
    "no_efa": {".routing.efa": False},
    "no_lfp": {".routing.lfp": False},
    "no_catten": {".routing.attention": "causal"},
    "no_routing": {".routing.efa": False, ".routing.lfp": False, ".routing.attention": "causal"},
    "fusion_sum": {".routing.fusion": "sum"},
    "summary_faithful": {".routing.summary": "faithful"},
    "summary_words": {".routing.summary": "words"},
    "film_default": {".routing.film_init": None},
    "drop": {".routing.mode": "drop"},
    "renumber": {".routing.position_policy": "renumber"},
    "scale_visual_only": {".routing.scale": "visual_only"},
    "scale_all": {".routing.scale": "all"},
    "period_31": {".routing.period": 31},
    "bidirectional": {".routing.attention": "bidirectional"},
    "placeholder_zero": {".policy.head.placeholder": "zero"},
    "token_per_dimension": {".policy.head.tokens_per_step": "action_dim"},
    "shifted": {".policy.head.shifted": True},
    "keep_last_block": {".policy.vision.drop_last_block": False},
    "contrast": {".objective.contrast": 0.1},
    "diversity": {".objective.diversity": 1.0},
    "masking": {".objective.masking": 0.5},
}
"""What each ablation changes of the default."""
FAITHFUL = ("summary_faithful", "film_default", "renumber", "scale_all", "placeholder_zero", "token_per_dimension")


@pytest.mark.parametrize("name", names("ablation"))
def test_an_ablation_changes_what_it_says_and_nothing_else(name: str) -> None:
    whole, part = leaves(composed("train_policy")), leaves(composed("train_policy", f"+ablation={name}"))
    assert part.pop(".output") == f"outputs/ablations/{name}/tabletop_object/seed0"
    changed = {key: value for key, value in part.items() if key not in whole or whole[key] != value}
    together = {key: value for row in (*FAITHFUL, "shifted") for key, value in CHANGES[row].items()}
    together[".routing.router.position"] = "compact"  # what goes with positions that are numbered anew
    assert changed == {**CHANGES, "faithful": together}[name]
    assert part.keys() >= whole.keys() - {".output"}


@pytest.mark.parametrize("name", names("ablation"))
def test_every_ablation_trains(name: str, tmp_path: Path) -> None:
    config = small.settings(steps=2, batch_size=4, validate_every=0)
    model = model_of(f"+ablation={name}")
    changed = {key.removeprefix(".objective."): value for key, value in CHANGES.get(name, {}).items() if "obj" in key}
    objective = replace(small.LABELLED, **changed)
    trainer = build_trainer(config, model, objective, small.ROBOT, small.small_data(), tmp_path, lambda *_: None)
    policy = trainer.run()
    assert np.isfinite(policy.act(small.ROBOT.fake_observation(1)).actions).all()


# --- the default fits every suite ---


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_everything_of_a_run_follows_the_suite(suite: str) -> None:
    values = composed("train_policy", f"suite={suite}", "seed=3")
    assert build(DataConfig, values["data"], "data").root == f"outputs/demonstrations/{suite}"
    assert values["output"] == f"outputs/train_policy/{suite}/seed3"
    assert build(TrainingConfig, values["training"], "training").seed == 3


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_the_recorded_features_are_those_that_the_mapping_names(suite: str) -> None:
    values = composed("train_policy", f"suite={suite}")
    data, embodiment = build(DataConfig, values["data"], "data"), build(Embodiment, values["embodiment"], "embodiment")
    played = get_suite(suite)
    instructions = tuple(task.instruction for task in played.tasks)
    settings = DemonstratorSettings(played.make, Expert, instructions, played.max_steps, 16, 0.0, 0)
    demonstrator = Demonstrator(settings)
    episode, _ = demonstrator.record(0)
    demonstrator.close()
    assert demonstrator.fps == embodiment.control_hz == CONTROL_HZ
    assert [data.cameras[name] for name in embodiment.camera_names] == list(episode.images)
    (state,), (action,) = data.state_keys, data.action_keys
    assert episode.arrays[state].shape[1:] == (embodiment.state_dim,)
    assert episode.arrays[action].shape[1:] == (embodiment.action_dim,)
    assert set(data.labels.values()) <= set(episode.arrays)
    assert embodiment.gripper_index is not None
    assert set(np.unique(episode.arrays[action][:, embodiment.gripper_index])) <= {
        embodiment.gripper_open,
        embodiment.gripper_close,
    }


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_the_default_policy_has_room_for_the_words_of_the_suite(suite: str) -> None:
    texts = [task.instruction for task in get_suite(suite).tasks]
    made = wordings(texts, InstructionAugmentation().count)
    words = WordTokenizer.from_instructions([*texts, *(other for some in made.values() for other in some)])
    assert len(words) <= model_of(f"suite={suite}").language.vocab_size - 2


@pytest.mark.parametrize("suite", TABLETOP_SUITES)
def test_the_default_protocol_fits_every_tabletop_suite(suite: str) -> None:
    assert composed("train_policy", f"suite={suite}")["evaluation"]["protocol"] is None
    protocol = load_protocol(get_suite(suite).protocol)
    assert len(protocol.episodes(get_suite(suite))) == 10 * protocol.episodes_per_task


def test_demonstrations_recorded_beforehand_are_those_that_training_asks_for() -> None:
    trained, recorded = composed("train_policy"), composed("record_demonstrations")
    assert trained["data"]["root"] == recorded["output"]
    assert trained["embodiment"]["cameras"][0]["height"] == recorded["image_size"]
    assert {key: recorded[key] for key in ("episodes", "noise", "seed")} == {
        key: trained["demonstrations"][key] for key in ("episodes", "noise", "seed")
    }


def test_recording_takes_what_train_policy_gives() -> None:
    taken = set(inspect.signature(record).parameters)
    assert composed("train_policy")["demonstrations"].keys() <= taken
    of_a_policy = {"checkpoint", "patience", "execute_steps", "device", "threads", "engine", "statistics"} | {
        "embodiment",
        "cameras",
    }
    assert composed("record_demonstrations").keys() - {"suite", "libero", "imports"} - of_a_policy <= taken
