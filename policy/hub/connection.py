"""Requests to the hub: its errors in one line, the time to wait for an answer, whether a file is the one it lists."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cogvla.errors import first_line

COMMIT = re.compile(r"[0-9a-f]{40}")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ANSWER_S = 30.0
"""Seconds after which a hub that does not answer is given up."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOG_IN = "log in with `hf auth login`, with a token that may {do} it"


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a hub that cannot be reached or says no; from version 1 on, some of them are httpx's."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        from httpx import HTTPError
    except ImportError:
        return HfHubHTTPError, HFValidationError, OSError
    return HfHubHTTPError, HFValidationError, OSError, HTTPError


def give_up_waiting(seconds: float | None = None) -> None:
    """Let this thread's requests to the hub end when nothing comes; huggingface_hub waits for some of them for ever.

    Args:
        seconds: how long nothing may come; None: `ANSWER_S`.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    request = session.request
    plain = request.func if isinstance(request, partial) else request
    session.request = partial(plain, timeout=ANSWER_S if seconds is None else seconds)  # type: ignore[method-assign]


class HubError(ValueError):
    """The hub says no or cannot be reached; the message is one line for the user.

    Attributes:
        answered: the hub has answered, so it can be reached.
    """

    def __init__(self, message: str, answered: bool) -> None:
        super().__init__(message)
        self.answered = answered


@contextmanager
def hub_says(repo_id: str, do: str) -> Iterator[None]:
    """Turn the hub's errors into `HubError`.

    Args:
        repo_id: the repository that is asked about.
        do: what the user wants, `read` or `write`.

    Raises:
        OSError: a file on this machine cannot be read or written.
    """
    try:
        yield
    except hub_errors() as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise HubError(_reason(repo_id, do, status, error), status is not None) from error


def _reason(repo_id: str, do: str, status: int | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    log_in = LOG_IN.format(do=do)
    if isinstance(error, HFValidationError):
        return f"{repo_id} is no repository id: {first_line(error)}"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository {repo_id} has no such revision"
    if isinstance(error, RepositoryNotFoundError) and not isinstance(
        error, GatedRepoError
    ):  # also for 401: the hub does not tell a stranger what is private
        return f"the hub has no repository {repo_id}, or it is private: check its name, or {log_in}"
    if status in (401, 403):
        return f"the hub does not let you {do} {repo_id} (HTTP {status}): {log_in}"
    if status == 412:
        return f"{repo_id} was changed by someone else at the same time: run the same command again"
    if status is not None:
        return f"the hub answers HTTP {status} about {repo_id}: {first_line(error)}"
    return f"the hub cannot be reached for {repo_id}: {first_line(error)}"


def same_content(file: Path | bytes, there: Any) -> bool:
    """Return whether a file has the content of another one, or of an entry that the hub lists."""
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    if isinstance(there, Path):
        return size == there.stat().st_size and _digest(file, hashlib.sha256()) == _digest(there, hashlib.sha256())
    if there.lfs is not None:
        return size == there.lfs.size and _digest(file, hashlib.sha256()) == there.lfs.sha256
    return _digest(file, hashlib.sha1(b"blob %d\0" % size)) == there.blob_id


def _digest(file: Path | bytes, digest: Any) -> str:
    if isinstance(file, bytes):
        digest.update(file)
    else:
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return str(digest.hexdigest())
