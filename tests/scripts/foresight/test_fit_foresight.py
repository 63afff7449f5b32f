"""`fit_foresight` as a user calls it, on episodes that the expert records here."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvla.policy.foresight.model import load_foresight
from cogvla.scripts import console
from cogvla.tests.support.console_command import ended
from cogvla.tests.support.small_foresight import STEPS, fit, fitting, recorded
from cogvla.tests.support.waiting import until

COMMAND = [sys.executable, "-m", "cogvla.scripts.foresight.fit_foresight"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording, and `whole`, a finished fit to it."""
    root = recorded(tmp_path_factory.mktemp("fit"))
    fit(root, root / "whole")
    return root


def test_it_says_and_writes_how_much_better_than_copying_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fit(root, root / "whole")
    said = capsys.readouterr().out
    assert {"agentview", "wrist", "all"} <= {line.split()[0] for line in said.splitlines()}
    assert f"foresight: {root / 'whole'}" in said
    stored = json.loads((root / "whole" / "report.json").read_text())
    assert stored["held_out"] == report["held_out"]
    assert 0 < stored["held_out"]["all"]["copy_ratio"] < 1, "even a short fit is better than copying"
    assert stored["data_set"]["episodes"] == 10
    assert stored["horizon"] == 8
    model, about = load_foresight(root / "whole")
    assert model.embodiment.name == "tabletop_panda"
    assert about["seed"] == 0


def test_a_killed_fit_goes_on_exactly(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "part" / "training.pt"
    process = subprocess.Popen([*COMMAND, *fitting(root, tmp_path / "part")], stderr=subprocess.DEVNULL)
    until(lambda: state.exists() or process.poll() is not None)
    process.send_signal(signal.SIGSTOP)
    process.kill()
    process.wait()
    assert 0 < len(torch.load(state)["losses"]) < STEPS, "it was killed before its end"
    assert not (tmp_path / "part" / "foresight.json").exists()
    fit(root, tmp_path / "part")
    whole, part = (load_foresight(folder)[0].state_dict() for folder in (root / "whole", tmp_path / "part"))
    assert whole.keys() == part.keys()
    for name, value in whole.items():
        assert torch.equal(value, part[name]), name
    reports: list[dict[str, Any]] = [
        json.loads((folder / "report.json").read_text()) for folder in (root / "whole", tmp_path / "part")
    ]
    assert reports[0]["held_out"] == reports[1]["held_out"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("patch=24", "foresight needs cameras of one size, a multiple of patch=24; those of 'tabletop_panda' have"),
        ("latent=1000", "a patch of 16 x 16 pixels has 1 to 768 components, got 1000"),
        ("steps=0", "steps must be positive, got 0"),
        ("validation_fraction=0", "validation_fraction must be above 0 and below 1"),
        ("embodiment.chunk=400", "foresight looks 400 frames ahead, and the longest episode has"),
        ("embodiment.action_dim=6", "embodiment"),
        ("data.root=nowhere", "nowhere"),
        ("actions=perhaps", "actions must be true or false, got 'perhaps'"),
        ("executed=perhaps", "executed must be true or false, got 'perhaps'"),
        ("resume=perhaps", "resume must be true or false, got 'perhaps'"),
        ("seed=1", "is of another run"),
    ],
)
def test_a_mistake_is_named(root: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fit(root, root / "whole", override)
    assert "\n" not in str(error.value)


def test_at_the_command_line_it_is_one_line(root: Path) -> None:
    said = str(ended(console.fit_foresight, *fitting(root, root / "whole"), "seed=1"))
    assert said.startswith("error: ")
    assert "is of another run" in said
    assert "\n" not in said
