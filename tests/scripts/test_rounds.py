"""`train_policy rounds=N`, small: each part in its folder, skipped when finished, and the same after a `kill -9`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogvla.configs.build import build
from cogvla.policy.checkpoint import FLOAT8, FORECAST, load_policy, weights_hash
from cogvla.policy.data.config import DataConfig
from cogvla.scripts import train_policy
from cogvla.scripts.command import compose
from cogvla.scripts.training.rounds import CorrectionsConfig, _of_round
from cogvla.scripts.training.suites import resolved_for
from cogvla.tests.scripts.test_train_policy import overrides

pytestmark = pytest.mark.usefixtures("no_figures")
SMALL = ("rounds=2", "corrections.episodes=10", "corrections.workers=0", "corrections.patience=5")


def run(root: Path, *more: str) -> dict[str, Any]:
    return train_policy.run(compose("train_policy", overrides(root, *SMALL, *more)), "train_policy")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rounds")
    run(root)
    return root


def test_every_round_learns_from_all_that_was_recorded(root: Path) -> None:
    output = root / "run"
    summary = json.loads((output / "summary.json").read_text())
    assert [told["round"] for told in summary["rounds"]] == [1, 2]
    assert summary["success"] == summary["rounds"][-1]["success"] is not None
    sets = load_policy(output / "policy").describe()["data_set"]["sets"]
    assert list(sets) == ["demonstrations", "tabletop_object_round_2"]
    made = json.loads((output / "round_2/corrections/tabletop_object/meta/recording.json").read_text())
    assert made["policy"]["weights_sha256"] == weights_hash(output / "round_1" / "policy")
    assert summary["rounds"][1]["solved_alone"] == made["solved_alone"]
    hashes = [weights_hash(output / name / "policy") for name in ("round_1", "round_2", ".")]
    assert hashes[0] != hashes[1] == hashes[2]


def test_finished_rounds_are_skipped_and_others_refused(root: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in root.glob("run/round_*/**/*") if path.is_file()}
    added = [root / "run/policy" / name for name in (FLOAT8, FORECAST)]  # by `calibrate_policy` and `fit_forecast`
    for path in added:
        path.write_text("{}")
    run(root, "threads=1", "forecast=false", "corrections.workers=1", "training.checkpoint_every=2", "data.cache_gb=9")
    assert times == {path: path.stat().st_mtime_ns for path in root.glob("run/round_*/**/*") if path.is_file()}
    assert [path.read_text() for path in added] == ["{}", "{}"]
    for path in added:
        path.unlink()
    for change, said in (
        ("training.steps=7", "holds rounds with another training"),
        ("corrections.episodes=11", "holds rounds with another corrections"),
    ):
        with pytest.raises(ValueError, match=said):
            run(root, change)
    with pytest.raises(ValueError, match=r"run holds rounds of corrections; give rounds=N to go on"):
        run(root, "rounds=1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rounds=0", "rounds must be 1"),
        ("rounds=two", "rounds must be a whole number, got 'two'"),
        ("corrections.episodes=0", "corrections: episodes and patience must be positive whole numbers"),
        ("corrections.episodes=1e1", "corrections.episodes must be a whole number, got 10.0"),
        ("corrections.weight=-1", "corrections: weight must be a positive number"),
        ("corrections.weight=inf", "corrections: weight must be a positive number"),
        ("corrections.weight=1e10", "corrections: weight must be a positive number, 1e-9 to 1e9"),
        ("suite=null", "rounds=2 needs a suite"),
        ("embodiment.gripper_open=1,embodiment.gripper_close=-1", "the policy opens its gripper with 1 and closes it"),
        ("embodiment.cameras.0.width=64", "the policy sees agentview .* x 64, .*, which has to be square"),
        ("embodiment.control_hz=10", "the policy acts 10 times per second, suite 'tabletop_object' takes 20"),
        ("data.statistics=each", "rounds=2 needs data.statistics=joint"),
        ("objective.prior=0.5", r"rounds=2 cannot have objective\.prior: its other policy"),
    ],
)
def test_mistakes(tmp_path: Path, change: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(tmp_path, *change.split(","), "data.root=nowhere", "objective.blind=nowhere")


def test_fewer_rounds_than_there_are(root: Path) -> None:
    (root / "run/round_3").mkdir()
    summary = root / "run/round_3/summary.json"
    summary.write_text("{}")
    try:
        with pytest.raises(ValueError, match=r"run holds 3 rounds; give rounds=3 or more, or choose another output"):
            run(root)
    finally:
        summary.unlink()
        summary.parent.rmdir()


def test_a_data_set_of_another_rate_is_refused_before_the_first_round(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "demonstrations", tmp_path / "other")
    info = tmp_path / "other/meta/info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fps": 10}))
    with pytest.raises(ValueError, match=r"other has 10 frames per second, and corrections have 20: .*mixed_rates"):
        run(tmp_path, f"data.root={tmp_path}/other", "demonstrations=null")


@pytest.mark.parametrize("intervention", ["helped", "null"])
def test_corrections_have_the_recorders_keys_whatever_those_of_the_users_data_are(
    tmp_path: Path, intervention: str
) -> None:
    own = ["data.cameras={agentview: image, wrist: hand}", "data.state=state", "data.action=actions"]
    own += ["data.episodes=10%", "data.instruction_key=text", f"data.intervention={intervention}"]
    config = compose("train_policy", overrides(tmp_path, *own))
    one = _of_round(config, tmp_path, 2, CorrectionsConfig())
    data = build(DataConfig, resolved_for(one, "tabletop_object")["data"], "data")
    mine, corrections = (entry.config for entry in data.entries())
    assert (mine.state, mine.episodes, mine.instruction_key) == ("state", "10%", "text")
    plain = build(DataConfig, resolved_for(compose("train_policy", overrides(tmp_path)), "tabletop_object")["data"], "")
    assert corrections == replace(plain, root=f"{tmp_path}/round_2/corrections/tabletop_object")


@pytest.mark.parametrize(
    "seen", ["round_1/checkpoints/step_0000003", "round_2/corrections/tabletop_object.recording/episodes/000003.npz"]
)
def test_killed_rounds_go_on(root: Path, tmp_path: Path, seen: str) -> None:
    """It is killed in the training of the first round, and while it collects."""
    for name in ("demonstrations", "cache"):
        (tmp_path / name).symlink_to(root / name)
    words = overrides(tmp_path, *SMALL)
    code = "import sys; from cogvla.scripts import console; sys.argv[1:] = " + repr(words) + "; console.train_policy()"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / seen).exists():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(tmp_path)
    name = "round_2/corrections/tabletop_object/data/chunk-000/file-000.parquet"
    assert (tmp_path / "run" / name).read_bytes() == (root / "run" / name).read_bytes()
    assert weights_hash(tmp_path / "run" / "policy") == weights_hash(root / "run" / "policy")
