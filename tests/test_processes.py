"""Processes of our own answer, end with their parent, and say how they failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogvla.processes import Child, Pool, ProcessDiedError
from cogvla.tests.support.child_functions import count, dividing, dying


def test_a_child_answers_and_ends_with_its_pipe() -> None:
    child = Child(count, 3)
    child.send(4)
    assert child.receive() == (7, "1", True)
    child.close()
    assert child.process.returncode == 0


def test_a_child_that_dies_is_reported() -> None:
    child = Child(count, 3)
    child.send(0)
    with pytest.raises(ProcessDiedError, match="SIGKILL"):
        child.receive()
    child.send(1)  # nobody is there: only `receive` complains
    with pytest.raises(ProcessDiedError, match="SIGKILL"):
        child.receive()
    child.close()


def test_what_cannot_be_sent_is_named() -> None:
    with pytest.raises(ValueError, match=r"lambda.*function or class of a module"):
        Child(count, lambda: 3)


@pytest.mark.parametrize("processes", [0, 1, 2, 9])
def test_a_pool_answers_every_item(processes: int) -> None:
    with Pool(dividing, 12.0, [1.0, 2.0, 3.0, 4.0], processes) as pool:
        assert sorted(pool.next() for _ in range(4)) == [3.0, 4.0, 6.0, 12.0]


@pytest.mark.parametrize("processes", [0, 1])
def test_a_pool_raises_what_is_passed_on(processes: int) -> None:
    with Pool(dividing, -1.0, [1.0], processes, (OSError,)) as pool, pytest.raises(OSError, match="no negative"):
        pool.next()
    with Pool(dividing, 1.0, [0.0], processes, (ZeroDivisionError,)) as pool, pytest.raises(ZeroDivisionError):
        pool.next()


def test_a_pool_shows_the_traceback_of_other_failures() -> None:
    with Pool(dividing, 1.0, [0.0], 1) as pool, pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError"):
        pool.next()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_pool_replaces_a_process_that_dies(tmp_path: Path, processes: int, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("begin-1", "1-1", "3-1"):
        (tmp_path / name).touch()
    with Pool(dying, tmp_path, range(4), processes) as pool:
        assert sorted(pool.next() for _ in range(4)) == [0, 1, 2, 3]
    assert [record.message for record in caplog.records] == [
        "a worker died and is replaced: SIGKILL (a crash, or not enough memory)"
    ] * 3


@pytest.mark.parametrize("fatal", ["begin", "0"])
def test_a_pool_gives_up_what_kills_two_processes(tmp_path: Path, fatal: str) -> None:
    for name in ("1", "2"):
        (tmp_path / f"{fatal}-{name}").touch()
    with Pool(dying, tmp_path, range(3), 1) as pool, pytest.raises(RuntimeError, match="worker died: SIGKILL"):
        pool.next()
