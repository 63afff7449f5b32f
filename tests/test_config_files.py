"""Every file under configs/ composes and builds what it configures."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cogvla.envs.recorder import record
from cogvla.libero.protocol import Protocol
from cogvla.policy.config import CogVLAConfig, RoutingConfig
from cogvla.policy.data import DataConfig
from cogvla.policy.flops import Counting
from cogvla.policy.interface import Embodiment
from cogvla.policy.model import CogVLA
from cogvla.policy.objective import ObjectiveConfig
from cogvla.policy.training_config import TrainingConfig
from cogvla.real_robot.request import RequestKeys

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS: dict[str, Callable[..., Any]] = {
    "counting": Counting,
    "data": DataConfig,
    "embodiment": Embodiment,
    "objective": ObjectiveConfig,
    "protocol": Protocol,
    "request_keys": RequestKeys,
    "training": TrainingConfig,
}
COMPOSED_BY = {"protocol": "eval_libero", "request_keys": "policy_server"}
"""The command that a group belongs to; train_policy unless named here."""
IMAGE = {"tiny": 128, "small": 224, "cogvla_7b": 224}
PARAMETERS = {"tiny": (0.5e6, 2e6), "small": (0.4e9, 0.7e9), "cogvla_7b": (7e9, 9.5e9)}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(name: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("cogvla.configs", version_base="1.3"):
        values = OmegaConf.to_container(compose(name, list(overrides)), resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def model_of(policy: str, routing: str) -> CogVLAConfig:
    values = composed("train_policy", f"policy={policy}", f"routing={routing}")
    return CogVLAConfig.from_dict({**values["policy"], "routing": values["routing"]})


def test_every_folder_is_known() -> None:
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert folders - {"robot", "env"} == {*GROUPS, "policy", "routing"}


@pytest.mark.parametrize("command", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_command_composes(command: str) -> None:
    assert composed(command)


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in names(group)])
def test_every_file_of_a_group_builds_its_dataclass(group: str, name: str) -> None:
    built = GROUPS[group](**composed(COMPOSED_BY.get(group, "train_policy"), f"{group}={name}")[group])
    assert built == GROUPS[group](**{f.name: getattr(built, f.name) for f in fields(built)})


@pytest.mark.parametrize("routing", names("routing"))
def test_the_tiny_policy_is_built_with_every_routing(routing: str) -> None:
    model = CogVLA(model_of("tiny", routing), Embodiment(**composed("train_policy")["embodiment"]))
    assert sum(p.numel() for p in model.parameters()) > 3e5


@pytest.mark.parametrize("policy", names("policy"))
def test_presets_have_the_sizes_they_claim(policy: str) -> None:
    values = composed("train_policy")["embodiment"]
    values["cameras"] = [camera | {"height": IMAGE[policy], "width": IMAGE[policy]} for camera in values["cameras"]]
    with torch.device("meta"):
        model = CogVLA(model_of(policy, "cogvla"), Embodiment(**values))
    low, high = PARAMETERS[policy]
    assert low < sum(p.numel() for p in model.parameters()) < high


@pytest.mark.parametrize(
    "kind", [Counting, DataConfig, Embodiment, ObjectiveConfig, Protocol, RoutingConfig, TrainingConfig]
)
def test_every_key_is_documented(kind: Any) -> None:
    text = inspect.getdoc(kind) or ""
    undocumented = [f.name for f in fields(kind) if not re.search(rf"\b{f.name}\b", text)]
    assert not undocumented


@pytest.mark.parametrize(
    ("file", "kind"),
    [(f"{group}/{name}.yaml", GROUPS[group]) for group in ("objective", "training") for name in names(group)]
    + [("routing/cogvla.yaml", RoutingConfig), ("routing/faithful.yaml", RoutingConfig)],
)
def test_files_that_users_copy_list_every_key(file: str, kind: Any) -> None:
    assert yaml.safe_load((CONFIGS / file).read_text()).keys() == {f.name for f in fields(kind)}


@pytest.mark.parametrize("file", sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("**/*.yaml")))
def test_files_begin_by_saying_what_they_are_for(file: str) -> None:
    text = (CONFIGS / file).read_text()
    assert text.startswith("# ")
    for mentioned in re.findall(r"documented in (\S+\.py)", text):
        assert (CONFIGS.parent / mentioned).is_file()
        group = GROUPS[Path(file).parent.name]
        assert inspect.getsourcefile(group) == str(CONFIGS.parent / mentioned), f"{file} points at {mentioned}"


def test_recording_takes_what_train_policy_gives() -> None:
    values = composed("train_policy")
    taken = set(inspect.signature(record).parameters)
    assert values["demonstrations"].keys() <= taken
    assert composed("record_demonstrations").keys() - {"suite"} <= taken


def test_an_unknown_key_lists_the_known_ones() -> None:
    values = composed("train_policy")
    with pytest.raises(ValueError, match=r"unknown key efa_ in model\.routing; valid keys are efa, fusion"):
        CogVLAConfig.from_dict({**values["policy"], "routing": {"efa_": True}})
