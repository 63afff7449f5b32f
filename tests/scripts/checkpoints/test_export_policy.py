"""`export_policy` with the shipped policy on recorded frames, and what runs the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cogvla.envs.evaluation.report import Report
from cogvla.policy.checkpoint import load_policy
from cogvla.scripts import eval_libero
from cogvla.scripts.checkpoints import export_policy
from cogvla.scripts.command import compose
from cogvla.scripts.policies import open_any_policy
from cogvla.tests.support.extras import needs
from cogvla.tests.support.paths import ROOT, SHIPPED

pytest.importorskip("onnxscript", reason=needs("export"))
pytest.importorskip("onnxruntime", reason=needs("export"))

EPISODES = ("suite=tabletop_object", "tasks=[0,5]", "episodes_per_task=1", "workers=0", "videos=0", "threads=1")


def run(*overrides: str) -> None:
    export_policy.run(compose("export_policy", [f"checkpoint={SHIPPED}", "threads=1", *overrides]), "export_policy")


@pytest.fixture(scope="module")
def folder(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    data = [f"data.root={recorded / 'demonstrations'}", f"data.cache={recorded / 'cache'}"]
    run(f"output={folder}", *data, "text_tokens=[8]")
    return folder


def played(checkpoint: Path, output: Path) -> Report:
    config = compose("eval_libero", [f"checkpoint={checkpoint}", f"output={output}", *EPISODES])
    (report,) = eval_libero.run(config, "eval_libero")
    return report


def test_the_exported_policy_plays_the_same_episodes(folder: Path, tmp_path: Path) -> None:
    expected, found = (played(which, tmp_path / which.name) for which in (SHIPPED, folder))
    assert [(e.task, e.success, e.steps) for e in found.episodes] == [
        (e.task, e.success, e.steps) for e in expected.episodes
    ]
    assert (
        json.loads((tmp_path / folder.name / "tabletop_object" / "report.json").read_text())["reproduce"]["policy"][
            "engine"
        ]
        == "onnx"
    )


def test_the_manifest_says_what_was_compared(folder: Path) -> None:
    manifest = json.loads((folder / "exported.json").read_text())
    assert manifest["checked"]["observations"] == 32
    assert manifest["checked"]["recorded"].endswith("demonstrations")
    assert 0 < manifest["checked"]["max"] <= 1e-4
    assert manifest["tokenizer"]["words"][:2] == ["<pad>", "<unk>"]
    assert manifest["statistics"] == json.loads((SHIPPED / "statistics.json").read_text())
    assert manifest["versions"]["torch"]


def test_the_example_needs_neither_torch_nor_this_package(folder: Path, tmp_path: Path) -> None:
    arguments = ["run_exported.py", str(folder), "put the red cube in the tray"]
    script = f"import sys; sys.modules.update(torch=None, cogvla=None); sys.argv = {arguments!r}; "
    script += f"exec(open({str(ROOT / 'examples' / 'run_exported.py')!r}).read())"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    robot = load_policy(SHIPPED).embodiment
    assert f"{robot.chunk} actions of {robot.action_dim} numbers" in done.stdout, done.stderr


def test_without_a_data_set_it_says_so_and_int8_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = (f"data.root={tmp_path / 'nowhere'}", f"output={tmp_path / 'out'}", "text_tokens=[8]")
    with monkeypatch.context() as before:
        before.setattr(export_policy, "load_policy", lambda *_, **__: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=r"precision=int8 needs recorded frames, and there are none at data.root="):
            run(*nowhere, "precision=int8")
    with pytest.raises(ValueError, match="compared must be a whole number, at least 1, got 0"):
        run(*nowhere, "compared=0")
    with pytest.raises(ValueError, match="no checkpoint folder at nothing"):
        run(*nowhere, "checkpoint=nothing")
    assert not (tmp_path / "out").exists()
    run(*nowhere, "compared=2")
    said = capsys.readouterr().out
    assert "note: no data set at data.root=" in said
    assert "on 2 random observations" in said


def test_settings_of_the_export_are_not_those_of_what_runs_it(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"router\.name=random needs a checkpoint, not"):
        open_any_policy(str(folder), router={"name": "random"})
    with pytest.raises(ValueError, match=r"no exported\.json beside it"):
        open_any_policy("elsewhere/policy.onnx")
