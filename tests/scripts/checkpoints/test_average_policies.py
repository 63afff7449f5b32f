"""Tests of `average_policies`: the mean of trainings, in the units of the last, and what does not belong together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvla.policy.checkpoint import load_policy, read_config, save_checkpoint
from cogvla.policy.inputs.preprocess import Preprocessor
from cogvla.policy.model.cogvla import CogVLA
from cogvla.policy.model.config import ActionHeadConfig, CogVLAConfig
from cogvla.policy.weights.base import load_own
from cogvla.scripts.checkpoints.average_policies import main
from cogvla.tests.support import small_data as small
from cogvla.tests.support.small_data import ROBOT


def saved(folder: Path, seed: int = 0, config: CogVLAConfig | None = None, other_data: bool = False) -> str:
    """A checkpoint of a new network, normalised by other statistics with `other_data`."""
    torch.manual_seed(seed)
    config = config or small.small_config()
    data = small.small_data(seed=int(other_data))
    if other_data:
        data.action_NA[:, 1] *= 3
    preprocessor = Preprocessor(ROBOT, small.small_preprocessor().tokenizer, data.statistics())
    save_checkpoint(folder, CogVLA(config, ROBOT).state_dict(), config, preprocessor, data.statistics(), {"step": seed})
    return str(folder)


def weights(folder: str) -> dict[str, Any]:
    return load_policy(folder).model.state_dict()


def test_the_mean_is_that_of_each_weight_and_says_whose(tmp_path: Path) -> None:
    one, two, three = (saved(tmp_path / str(seed), seed) for seed in range(3))
    main([one, two, three, f"output={tmp_path / 'mean'}"])
    found, states = weights(str(tmp_path / "mean")), [weights(each) for each in (one, two, three)]
    for name, value in found.items():
        torch.testing.assert_close(value, sum(state[name] for state in states) / 3)
    description = read_config(tmp_path / "mean")["description"]
    assert description["step"] == 2
    assert [each["name"] for each in description["average"]["policies"]] == ["0", "1", "2"]


def test_weights_are_averaged_in_the_units_of_the_last_policy(tmp_path: Path) -> None:
    """One policy with two statistics: the mean of both acts as each of them."""
    one, rescaled, mean = saved(tmp_path / "one"), saved(tmp_path / "two", other_data=True), tmp_path / "mean"
    first = load_policy(one)
    model = load_policy(rescaled).model
    preprocessor = load_policy(rescaled).preprocessor
    load_own(model, one, preprocessor)
    data = small.small_data(seed=1)
    data.action_NA[:, 1] *= 3
    save_checkpoint(tmp_path / "same", model.state_dict(), first.model.config, preprocessor, data.statistics(), {})
    main([one, str(tmp_path / "same"), f"output={mean}"])
    seen = ROBOT.fake_observation(2)
    seen = replace(seen, instruction=[small.INSTRUCTIONS[0]] * 2, state=np.full((2, ROBOT.state_dim), 0.5, np.float32))
    np.testing.assert_allclose(load_policy(mean).act(seen).actions, first.act(seen).actions, atol=1e-5)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    config = small.small_config()
    flow = replace(config, head=ActionHeadConfig(kind="flow"))
    one = saved(tmp_path / "one")
    other = saved(tmp_path / "other", config=flow)
    elsewhere = saved(tmp_path / "elsewhere", config=flow, other_data=True)
    for policies, output, said in (
        ([one], "mean", "give two policies or more"),
        ([one, one], "one", "one exists; give another output"),
        ([one, other], "mean", "has another network than"),
        ([other, elsewhere], "mean", "has other statistics than"),
    ):
        with pytest.raises(SystemExit, match=said):
            main([*policies, f"output={tmp_path / output}"])
    assert not (tmp_path / "mean").exists()
    with pytest.raises(SystemExit, match="the last argument must be output=FOLDER"):
        main([one, one])
