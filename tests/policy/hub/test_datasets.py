"""A data set on a hub on this machine: its files, tag and card, and training data that comes back from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cogvla.policy.hub.cards import is_ours
from cogvla.scripts.command import compose
from cogvla.scripts.sharing.share_dataset import main
from cogvla.tests.support.lerobot_files import LENGTHS, open_data, write
from cogvla.tests.support.writable_hub import WritableHub, writable_hub

NAME = "someone/episodes"
KEY = f"datasets/{NAME}"
RECORDING = {
    "suite": "toy", "noise": 1.0, "seed": 3, "randomise": None, "tasks": ["a", "b"],
    "simulation": {"mujoco": "3.3.2"},
    "policy": {"checkpoint": "/home/someone/secret/policy", "weights_sha256": "0" * 64},
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    with writable_hub(tmp_path / "cache", monkeypatch) as hub:
        yield hub


@pytest.fixture(params=[False, True], ids=["images", "videos"])
def recorded(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    root = write(tmp_path / "recorded", video=request.param)
    (root / "meta" / "recording.json").write_text(json.dumps(RECORDING))
    return root


def share(root: Path, *overrides: str) -> None:
    main(compose("share_dataset", [f"root={root}", *overrides]))


def test_what_was_shared_trains_as_before(hub: WritableHub, recorded: Path, tmp_path: Path) -> None:
    (recorded / ".cache").mkdir()
    (recorded / ".cache" / "state").write_text("of a tool")
    (recorded / "notes.txt").write_text("mine")
    share(recorded, f"repo_id={NAME}", "license=cc-by-4.0")
    made = hub.repositories[KEY]
    assert len(made.commits) == 2
    assert made.tags == {"v3.0": made.head}
    assert not {"notes.txt", ".cache/state"} & made.files.keys()
    local = open_data(recorded)
    came = open_data(tmp_path / "downloaded", repo_id=NAME)
    assert came.describe()["revision"] == made.head
    assert came.instructions == local.instructions
    for name, values in local.statistics()["action"].to_dict().items():
        np.testing.assert_array_equal(values, came.statistics()["action"].to_dict()[name])
    assert len(came) == len(local) == sum(LENGTHS)


def test_the_same_again_writes_nothing_and_a_change_moves_the_tag(
    hub: WritableHub, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share(recorded, f"repo_id={NAME}")
    made, writes = hub.repositories[KEY], len(hub.writes())
    first = made.head
    share(recorded, f"repo_id={NAME}")
    assert "everything is there already" in capsys.readouterr().out
    assert (made.head, len(hub.writes())) == (first, writes)
    share(recorded, f"repo_id={NAME}", "license=cc-by-4.0")
    assert made.head != first
    assert made.tags == {"v3.0": made.head}


def test_the_card_says_what_the_metadata_say(hub: WritableHub, recorded: Path, tmp_path: Path) -> None:
    share(recorded, f"folder={tmp_path / 'shared'}")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert is_ours(card)
    assert f"| frames | {sum(LENGTHS)} |" in card
    assert f"| episodes | {len(LENGTHS)} |" in card
    assert "| suite | toy |" in card
    assert "mujoco 3.3.2" in card
    assert "by a policy that the suite's scripted expert corrects" in card
    assert "no real robot is in it" in card
    assert ("compressed videos" in card) == (recorded / "videos").exists()
    assert "secret" not in card + (tmp_path / "shared" / "meta" / "recording.json").read_text()
    assert not hub.requests


def test_a_damaged_data_set_is_not_shared(hub: WritableHub, recorded: Path, tmp_path: Path) -> None:
    info = json.loads((recorded / "meta" / "info.json").read_text())
    info["total_frames"] += 1
    (recorded / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="should have 13 frames, its files have 12"):
        share(recorded, f"repo_id={NAME}")
    with pytest.raises(ValueError, match=r"there is no LeRobotDataset in .*: it has no meta/info\.json"):
        share(tmp_path, f"repo_id={NAME}")
    assert not hub.requests
