"""`calibrate_policy` on frames that the expert records here, and what uses what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvla.policy.checkpoint import load_policy, open_policy
from cogvla.policy.engine.engine import EngineConfig
from cogvla.policy.engine.float8 import Calibration
from cogvla.scripts.command import compose
from cogvla.scripts.measure import calibrate_policy
from cogvla.tests.support.paths import SHIPPED

FLOAT8 = EngineConfig("eager", dtype="float8")
ROUNDING = 2**-4
"""Largest relative error of a number in float8_e4m3fn."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(SHIPPED, tmp_path / "policy")


def run(recorded: Path, checkpoint: Path, *more: str) -> Calibration:
    overrides = [
        f"checkpoint={checkpoint}",
        f"data.root={recorded / 'demonstrations'}",
        f"data.cache={recorded / 'cache'}",
        "observations=24",
        "checked=12",
        "smallest=64",
        "device=cpu",
        *more,
    ]
    return calibrate_policy.run(compose("calibrate_policy", overrides), "calibrate_policy")


def test_a_calibrated_checkpoint_runs_in_eight_bits(
    recorded: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(recorded, checkpoint)
    said = capsys.readouterr().out
    assert f"{len(found.largest_inputs)} layers in 8 bits, measured on 24 frames. On 12 other frames" in said
    stored = json.loads((checkpoint / "float8.json").read_text())
    assert stored == {"largest_inputs": found.largest_inputs, "about": found.about}
    assert min(found.largest_inputs.values()) > 0
    assert found.about["data_set"]["episodes"] == 10
    assert found.about["versions"]["torch"]
    moved, error = found.about["from_bfloat16"], found.about["action_l1"]
    assert 0 < moved["mean"] < moved["max"]
    assert abs(error["float8"] - error["bfloat16"]) <= moved["mean"] + 1e-6, "the triangle inequality"

    policy, identity = open_policy(checkpoint, "cpu", engine=FLOAT8)
    described = policy.describe()
    assert (described["dtype"], described["float8"]) == ("float8", found.about)
    assert found.about["weights_sha256"] == identity["weights_sha256"]
    layers = [m for m in policy.engine.network.modules() if getattr(m, "weight", None) is not None]  # type: ignore[union-attr]
    assert sum(m.weight.dtype == torch.float8_e4m3fn for m in layers) == len(found.largest_inputs)
    seen = policy.embodiment.fake_observation(2)
    exact = load_policy(checkpoint).act(seen).actions
    error = np.linalg.norm(policy.act(seen).actions - exact) / np.linalg.norm(exact)
    walk = np.sqrt(2 * len(found.largest_inputs) / 3)  # of the rounding of weights and inputs, over the layers
    assert 0 < error < 3 * ROUNDING * walk


def test_the_choice_of_frames_is_drawn_once(recorded: Path, checkpoint: Path) -> None:
    first, again, other = (run(recorded, checkpoint, f"seed={seed}").largest_inputs for seed in (0, 0, 1))
    assert first == again != other


def test_without_a_calibration_the_way_out_is_said(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"run `calibrate_policy checkpoint=FOLDER` once, or give engine.dtype=bf"):
        open_policy(checkpoint, "cpu", engine=FLOAT8)
    with pytest.raises(ValueError, match=r"train with engine\.dtype=null"):
        FLOAT8.check_trained()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"largest_inputs": {"head.net": "x"}, "about": {}}', "damaged: delete it, and run"),
        ('{"about": {}}', "damaged: delete it, and run"),
        ('{"largest_inputs": {', "damaged: delete it, and run"),
        ('{"largest_inputs": {}, "about": {"weights_sha256": "0"}}', "other weights: run `calibrate_policy` again"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_refused(checkpoint: Path, text: str, message: str) -> None:
    (checkpoint / "float8.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_policy(checkpoint, "cpu", engine=FLOAT8)


def test_one_of_another_model_is_refused(checkpoint: Path) -> None:
    policy = load_policy(checkpoint)
    policy.calibration = Calibration({"layers.of.another": 1.0})
    with pytest.raises(ValueError, match=r"layers.of.another.*run `calibrate_policy` again"):
        policy.with_engine(FLOAT8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("observations=100000", "frames, but observations=100000 and checked=12 need 100012"),
        ("checked=0", "checked must be a whole number, at least 1, got 0"),
        ("smallest=4096", "no layer of this model has 4096 or more inputs and outputs"),
        ("+data.root_folder=here", "unknown key root_folder in data"),
    ],
)
def test_mistakes_are_said_and_leave_the_checkpoint_alone(
    recorded: Path, checkpoint: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(recorded, checkpoint, override)
    assert not (checkpoint / "float8.json").exists()
