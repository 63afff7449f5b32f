"""Record the missing episodes of a data set in worker processes, or in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cogvla.envs.contract import ContractError
from cogvla.envs.recording.demonstrator import Demonstrator, DemonstratorSettings, ExpertFailedError
from cogvla.processes import Pool

PASSED_ON = (OSError, ExpertFailedError, ContractError)
"""Mistakes of the user: they need no traceback of the worker."""


class DemonstrationPool:
    """Records the missing episodes in order, in `workers` processes; in this process if `workers` is 0."""

    def __init__(self, settings: DemonstratorSettings, paths: list[Path], missing: list[int], workers: int) -> None:
        self.pending = set(missing)
        self.attempts = self.successes = 0
        self._pool = Pool(_demonstrator, (settings, paths), missing, workers, PASSED_ON)

    def __enter__(self) -> DemonstrationPool:
        self._pool.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.__exit__()

    def ready(self) -> bool:
        """Return True if `next` would not wait."""
        return self._pool.ready()

    def next(self) -> None:
        """Wait until one more episode is saved."""
        slot, attempts = self._pool.next()
        self.attempts += attempts
        self.successes += 1
        self.pending.remove(slot)


@contextmanager
def _demonstrator(arguments: tuple[DemonstratorSettings, list[Path]]) -> Iterator[Callable[[int], tuple[int, int]]]:
    """Build the environment and yield what records one episode: its number -> its number, attempts."""
    settings, paths = arguments
    with _not_of_the_output():
        demonstrator = Demonstrator(settings)
    try:
        yield lambda slot: (slot, _play(demonstrator, slot, paths[slot]))
    finally:
        demonstrator.close()


def _play(demonstrator: Demonstrator, slot: int, path: Path) -> int:
    """Record and save an episode; return the number of attempts."""
    with _not_of_the_output():
        episode, attempts = demonstrator.record(slot)
    episode.save(path)
    return attempts


@contextmanager
def _not_of_the_output() -> Iterator[None]:
    """Turn an OSError of the environment into a RuntimeError; the recorder reports an OSError as a full disk."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"the environment failed: {error}") from error
