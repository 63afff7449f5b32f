"""The versions of Python that are promised, the versions of lerobot that fit, and where their differences are known."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cogvla import lerobot_versions
from cogvla.lerobot_versions import installed_version, is_old
from cogvla.tests.support.paths import ROOT

MOVED = {
    "DEFAULT_FEATURES",
    "CompatibilityError",
    "convert_dataset_v21_to_v30",
    "get_hf_features_from_features",
    "load_tasks",
    "pull_from_repo",
}
"""Names of lerobot that lie elsewhere in the two versions."""
RENAMED = {"vcodec", "rgb_encoder", "episode_buffer", "hf_features"}
"""Arguments and attributes that have other names."""


def differences(source: str) -> set[str]:
    """What a file takes from lerobot, or names, that differs between the versions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lerobot"):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)} & MOVED
        elif isinstance(node, ast.Attribute):
            found |= {node.attr} & ({"pull_from_repo"} | RENAMED)
        elif isinstance(node, ast.keyword):
            found |= {node.arg or ""} & {"vcodec", "rgb_encoder"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("lerobot."):
            found |= set(node.value.split(".")) & MOVED
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lerobot.datasets.utils import DEFAULT_FEATURES as D", {"DEFAULT_FEATURES"}),
        ("def f():\n    from lerobot.datasets.io_utils import load_tasks", {"load_tasks"}),
        ("create(vcodec='h264')", {"vcodec"}),
        ("data.episode_buffer['a']", {"episode_buffer"}),
        ("run('lerobot.datasets.v30.convert_dataset_v21_to_v30')", {"convert_dataset_v21_to_v30"}),
        ("from cogvla.lerobot_versions import load_tasks, episode_buffer", set()),
    ],
)
def test_what_counts_as_a_difference(source: str, found: set[str]) -> None:
    assert differences(source) == found


def test_one_module_knows_the_differences() -> None:
    tops = [path for path in ROOT.iterdir() if not path.name.startswith(".")]
    files = [file for top in tops for file in (top.glob("**/*.py") if top.is_dir() else [top]) if file.suffix == ".py"]
    found = {str(file.relative_to(ROOT)): names for file in files if (names := differences(file.read_text()))}
    assert found.keys() == {"lerobot_versions.py"}, found


@pytest.mark.parametrize(
    ("version", "old"), [("0.4.4", True), ("0.6.1", False), ("0.6.2.dev0", False), ("0.6.13", False)]
)
def test_versions_that_fit(version: str, old: bool) -> None:
    assert is_old(version) is old


@pytest.mark.parametrize("version", ["0.3.3", "0.4.3", "0.5.0", "0.5.1", "0.6.0", "0.7.0", "1.0", "unknown", None])
def test_versions_that_do_not_fit(version: str | None) -> None:
    said = f"lerobot {version} does not fit" if version else "lerobot is not installed"
    with pytest.raises(ValueError, match=rf"^{said}: cogvla works with lerobot 0.4.4 on Python 3.11, .*`uv pip"):
        is_old(version)


def test_the_installed_version_is_the_one_that_pyproject_asks_for() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    new = sys.version_info >= (3, 12)
    assert {
        "lerobot==0.4.4 ; python_version < '3.12'",
        "lerobot[dataset]>=0.6.1,<0.7 ; python_version >= '3.12'",
    } <= set(wanted)
    assert lerobot_versions.OLD is is_old(installed_version()) is not new


def test_a_command_with_another_version_ends_in_one_line(tmp_path: Path) -> None:
    """The metadata of another lerobot lie first on the path, as after `pip install lerobot==0.5.1`."""
    other = tmp_path / "path" / "lerobot-0.5.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: lerobot\nVersion: 0.5.1\n")
    start = f"import sys; sys.path.insert(0, {str(other.parent)!r}); from cogvla.scripts import console; "
    arguments = ["suite=tabletop_object", "episodes=1", "workers=0", f"output={tmp_path / 'data'}"]
    command = [sys.executable, "-c", start + "console.record_demonstrations()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: lerobot 0.5.1 does not fit: "), done.stderr
    assert "Traceback" not in done.stderr


def test_readme_promises_what_the_package_declares() -> None:
    """`.ci/run` takes the versions that it has to run from README."""
    [line] = re.findall(r"^- Linux\. Python (.+?), each", (ROOT / "README.md").read_text(), re.MULTILINE)
    promised = re.findall(r"3\.\d+", line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [name.rpartition(" ")[2] for name in project["classifiers"] if ":: Python ::" in name]
    first, last = (int(version.partition(".")[2]) for version in (promised[0], promised[-1]))
    assert promised == declared == [f"3.{minor}" for minor in range(first, last + 1)]
    assert project["requires-python"] == f">=3.{first},<3.{last + 1}"
