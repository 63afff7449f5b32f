"""A thread that writes: everything arrives, and what ends it is raised once, wherever it happens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cogvla.real_robot.bridge.writing_thread import WritingThread


class Written(WritingThread[int]):
    def __init__(self, fails_at: int | None, room: int = 0) -> None:
        super().__init__("written", room)
        self.fails_at, self.found = fails_at, []  # type: ignore[var-annotated]

    def count(self, items: int) -> None:
        for item in range(items):
            self._waiting.put(item, timeout=10)

    def _write(self, items: Iterator[int]) -> None:
        for item in items:
            if item == self.fails_at:
                raise OSError("the disk is full")
            self.found.append(item)
        if self.fails_at == -1:
            raise OSError("the disk is full")


def test_everything_is_written_when_the_context_is_left() -> None:
    with Written(None) as writer:
        writer.count(100)
    assert writer.found == list(range(100))


@pytest.mark.parametrize("fails_at", [3, -1])
def test_a_failure_is_raised_at_the_end_and_blocks_nobody(fails_at: int) -> None:
    with pytest.raises(OSError, match="the disk is full"), Written(fails_at, room=2) as writer:
        writer.count(10)


def test_the_first_error_wins() -> None:
    with pytest.raises(ZeroDivisionError), Written(3) as writer:  # noqa: PT012
        writer.count(10)
        raise ZeroDivisionError
