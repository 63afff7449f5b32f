"""Stop a rollout whose first episodes all fail for one reason, instead of trying every episode."""

from __future__ import annotations

import re

from cogvla.envs.episodes import EpisodeSpec


class EveryEpisodeFailsError(ValueError):
    """The first episodes of all workers ended in the same error, and none could be played.

    Attributes:
        text: the last of these errors, with its traceback.
    """

    def __init__(self, suite: str, text: str) -> None:
        super().__init__(
            f"the first episodes of suite {suite!r} all ended in the same error, so no more are played: "
            f"{last_line(text)}"
        )
        self.text = text


class FirstFailures:
    """The errors of the episodes that failed before any could be played."""

    def __init__(self, suite: str) -> None:
        self._suite, self._text = suite, ""
        self._reasons: dict[EpisodeSpec, str] = {}

    def add(self, spec: EpisodeSpec, text: str) -> None:
        """Note the error of an episode."""
        self._text = text
        self._reasons[spec] = re.sub(r"\d+", "#", last_line(text))  # numbers of tasks, processes, times

    def check(self) -> None:
        """Raise EveryEpisodeFailsError if there are at least two episodes, all with the same reason."""
        if len(self._reasons) > 1 and len(set(self._reasons.values())) == 1:
            raise EveryEpisodeFailsError(self._suite, self._text)


def last_line(text: str) -> str:
    """Return the last line of a traceback, which says what went wrong."""
    return (text.strip() or "an error without a message").splitlines()[-1]
