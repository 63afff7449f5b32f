"""Every test process uses one thread: the processes share the cores, and threads that wait for each other spin."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _test_this_checkout() -> None:
    """Make `cogvla`, here and in the processes that tests start, this checkout, wherever it is installed from.

    What `pip install .` installs has no `cogvla.tests`, and what `pip install --editable` installed may be another
    checkout.
    """
    installed = find_spec("cogvla")
    if installed is not None and installed.origin is not None and Path(installed.origin).resolve().parent == ROOT:
        return
    link = ROOT / ".cache" / "types" / "cogvla"  # type checkers follow it, too
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(Path("..", ".."))
    except FileExistsError:  # of an earlier run, or of another process of this one
        assert link.resolve() == ROOT
    sys.path.insert(0, str(link.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(link.parent), os.environ.get("PYTHONPATH"))))


_test_this_checkout()

# A shell that runs tests in the background has them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402 - reads the environment when it is imported

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-each", action="store_true", help="every test once: with the first of its parameters only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first of each test's parameters with `--one-each`: other versions fail in functions, not in values."""
    if not config.getoption("--one-each"):
        return
    kept = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
    config.hook.pytest_deselected(items=[item for item in items if kept[item.nodeid.partition("[")[0]] is not item])
    items[:] = reversed(kept.values())


@pytest.fixture(autouse=True)
def _ctrl_c_as_ever() -> None:
    """What a test does to Ctrl-C is no matter of the next one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demonstrations`, ten episodes of the tabletop's expert, and their `cache`: only to be read."""
    from cogvla.envs.recording.recorder import record

    root = tmp_path_factory.mktemp("recorded")
    record("tabletop_object", 10, root / "demonstrations", workers=0)
    return root


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out of reports: drawing takes most of the time of a small evaluation. test_report.py draws."""
    for name in ("latency_curves", "length_histogram"):
        monkeypatch.setattr(f"cogvla.envs.evaluation.report.{name}", lambda *_: "<svg/>")


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """Let a test choose its precision: accelerate keeps the first one that a process asks for."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
