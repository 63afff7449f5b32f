"""The examples run as a user runs them, but from another folder, and the commands accept what they register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from cogvla.tests.support.extras import NEEDS_TEST_GROUP, needs
from cogvla.tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "train_and_watch.ipynb"


def run(folder: Path, *arguments: str) -> str:
    """Run Python in `folder` with the examples on its path, and return what it prints."""
    paths = os.pathsep.join([*filter(None, sys.path), str(EXAMPLES)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(folder: Path, name: str, *overrides: str) -> str:
    return run(folder, "-m", f"cogvla.scripts.{name}", *overrides)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_own_suite(tmp_path: Path) -> None:
    said = run(tmp_path, str(EXAMPLES / "own_suite.py"))
    assert "expert: 30 of 30 episodes" in said
    assert "of 30 episodes, 0 errors" in said
    assert size(tmp_path / "outputs" / "examples" / "own_suite.png")[0] > 500


def test_own_suite_in_the_commands(tmp_path: Path) -> None:
    said = command(
        tmp_path, "eval_libero", "imports=[own_suite]", "suite=reach", "checkpoint=random", "episodes_per_task=1",
        "videos=0", "workers=1", "asked=both",
    )  # fmt: skip
    assert said.count("of 3 episodes, 0 errors") == 2
    command(
        tmp_path, "train_policy", "imports=[own_suite]", "suite=reach", "demonstrations.episodes=3",
        "demonstrations.workers=1", "training.steps=2", "training.cpu_parts=1", "evaluation=null", "threads=1",
    )  # fmt: skip
    assert (tmp_path / "outputs" / "train_policy" / "reach" / "seed0" / "policy" / "model.safetensors").is_file()


def contract(folder: Path, module: str, name: str, file: str) -> str:
    """Run the tests of everything that is registered for what an example registers."""
    options = ["-n", "0", "-p", "no:cacheprovider", "-p", module, "-k", name]
    return run(folder, "-m", "pytest", *options, str(ROOT / "tests" / file))


def test_own_suite_keeps_to_the_contract(tmp_path: Path) -> None:
    assert " passed" in contract(tmp_path, "own_suite", "reach", "envs/test_contract.py")


def test_own_router_keeps_to_the_contract(tmp_path: Path) -> None:
    assert " passed" in contract(tmp_path, "own_router", "vivid", "routing/test_routers_contract.py")


def test_own_router(tmp_path: Path) -> None:
    rows = run(tmp_path, str(EXAMPLES / "own_router.py")).splitlines()
    kept = {row[:12].strip(): int(row.split(",")[1].split("%")[0]) for row in rows if " keeps " in row}
    assert all(" 32 patches" in row for row in rows if " keeps " in row)
    assert kept["vivid"] > 2 * kept["random"]
    assert kept["vivid edges"] > 2 * kept["random"]
    assert size(tmp_path / "outputs" / "examples" / "own_router.png")[0] > 500


@pytest.mark.skipif(find_spec("rclpy") is None, reason=needs("ros"))
def test_own_robot(tmp_path: Path) -> None:
    domain = 201 + os.getpid() % 30
    said = run(tmp_path, str(EXAMPLES / "own_robot.py"), "--seconds", "3", "--domain", str(domain))
    assert "my_robot fits the policy, which answers 8 actions at once" in said
    assert "dry run: nothing is sent" in said
    report = json.loads((tmp_path / "outputs" / "examples" / "own_robot" / "report.json").read_text())
    assert report["robot"] == "my_robot"
    assert report["dry_run"]
    counts = report["measurements"]["counts"]
    assert min(counts["chunks"], counts["dry_run"], counts["limited_velocity"]) > 0


def test_the_notebook_is_committed_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipykernel", reason=NEEDS_TEST_GROUP)
    nbclient = pytest.importorskip("nbclient", reason=NEEDS_TEST_GROUP)
    nbformat = pytest.importorskip("nbformat", reason=NEEDS_TEST_GROUP)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "success 0.0%" in said
    assert "of 2 episodes, 0 errors" in said
    assert said.count("layer 1 keeps 8 of 16 tokens") == 2
    assert said.count("layer 2 keeps 2 of 16 tokens") == 2
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6, "frames of a demonstration, a sheet of each episode, two of the routing"
    (folder,) = (tmp_path / "outputs" / "train_and_watch").iterdir()
    assert (folder / "policy" / "model.safetensors").is_file()
    assert (folder / "evaluation" / "report.html").is_file()
