"""A hub on this machine: it answers what huggingface_hub asks for one data set, so that all of the client is real."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

REPO = "someone/toy"
COMMIT = "a" * 40


class StubHub:
    """Serves a folder as the data set `someone/toy`.

    Attributes:
        root: the folder.
        commit: its commit.
        tag: tag of the commit.
        fetched: paths of the files that were fetched, whole or in part, in order.
        asked: paths of the files whose size was asked for, in order.
        sent: bytes of content that were sent.
        wrong: path of a file -> what happens to it: `gone`, `error`, `cut` (shorter than listed), `flipped` (another
            byte than listed), `dropped` (the connection ends early), `held` (nothing comes until `release` is set).
        times: path of a file -> how often that happens; without it, always.
        silent: no question is answered until `release` is set.
        holding, release: events for `held`.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.commit, self.tag = root, COMMIT, "v3.0"
        self.fetched: list[str] = []
        self.asked: list[str] = []
        self.sent = 0
        self.wrong: dict[str, str] = {}
        self.times: dict[str, int] = {}
        self.silent = False
        self.holding, self.release = threading.Event(), threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_POST(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), ConnectionError):  # as of a client that was killed
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def pictures(self) -> list[str]:
        """Paths of the fetched files that are neither metadata nor numbers of a video data set."""
        return [name for name in self.fetched if name.startswith("videos/")]

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if self.silent:
            self.release.wait()
        path = unquote(urlsplit(request.path).path)
        form = request.rfile.read(int(request.headers.get("Content-Length") or 0)).decode()
        api, files = f"/api/datasets/{REPO}", f"/datasets/{REPO}/resolve/{self.commit}/"
        if path == f"{api}/refs":
            at = {"targetCommit": self.commit}
            refs = {"branches": [{"name": "main", "ref": "refs/heads/main", **at}], "converts": []}
            self._json(request, {**refs, "tags": [{"name": self.tag, "ref": f"refs/tags/{self.tag}", **at}]})
        elif path in (api, *(f"{api}/revision/{name}" for name in ("main", self.tag, self.commit))):
            self._json(request, {"id": REPO, "sha": self.commit, "siblings": [], "tags": [], "private": False})
        elif path.startswith(f"{api}/tree/{self.commit}"):
            self._json(request, self._entries())
        elif path == f"{api}/paths-info/{self.commit}":
            wanted = parse_qs(form).get("paths", []) or json.loads(form or "{}").get("paths", [])
            self._json(request, [_entry(self.root / name, name) for name in wanted if (self.root / name).exists()])
        elif path.startswith(files):
            self._file(request, path.removeprefix(files), body)
        else:
            self._json(request, {"error": "no such thing"}, 404)

    def _entries(self) -> list[dict[str, Any]]:
        return [_entry(path, path.relative_to(self.root).as_posix()) for path in sorted(self.root.glob("**/*"))]

    def _json(self, request: BaseHTTPRequestHandler, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        if status == 404:
            request.send_header("X-Error-Code", "EntryNotFound")
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def _file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        wrong, path = self.wrong.get(name), self.root / name
        (self.fetched if body else self.asked).append(name)
        if body or wrong in ("gone", "error"):
            self.times[name] = self.times.get(name, 1000) - 1
            wrong = wrong if self.times[name] >= 0 else None
        if wrong in ("gone", "error") or not path.is_file():
            self._json(request, {"error": "none"}, 500 if wrong == "error" else 404)
            return
        content = path.read_bytes()
        if wrong == "cut":
            content = content[: len(content) // 2]
        if wrong == "flipped":
            content = content[:50] + bytes([content[50] ^ 1]) + content[51:]
        start, end, status = 0, len(content), 200
        if asked := request.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(end, int(last or end) + 1), 206
        if wrong == "held" and body:
            self.holding.set()
            self.release.wait()
        request.send_response(status)
        request.send_header("ETag", '"' + "c" * 40 + '"')
        request.send_header("X-Repo-Commit", self.commit)
        request.send_header("Accept-Ranges", "bytes")
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        request.send_header("Content-Length", str(end - start))
        request.end_headers()
        if body:
            part = content[start:end]
            if wrong == "dropped":
                part = part[: len(part) // 2]
                request.close_connection = True
            self.sent += len(part)
            try:
                request.wfile.write(part)
            except OSError:  # the client was killed
                request.close_connection = True


def _entry(path: Path, name: str) -> dict[str, Any]:
    """Describe a file or folder as the hub does: videos and parquet files with SHA-256, others with git's checksum."""
    content = path.read_bytes() if path.is_file() else b""
    entry: dict[str, Any] = {"type": "file" if path.is_file() else "directory", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.suffix in (".mp4", ".parquet"):
        entry["oid"] = "b" * 40
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@contextmanager
def stub_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """Serve a folder, and let huggingface_hub of this process ask there, without pauses between its attempts."""
    hub = StubHub(root)
    try:
        with asking(hub.address, monkeypatch):
            yield hub
    finally:
        hub.close()


@contextmanager
def asking(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let huggingface_hub of this process ask at an address, without pauses between its attempts."""
    from huggingface_hub import constants, file_download, hf_file_system, utils

    # the name below version 1 of huggingface_hub, and from it on
    reset_sessions = getattr(utils, "reset_sessions" if hasattr(utils, "reset_sessions") else "close_session")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):
        if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (file_download, hf_file_system):
        for name in ("http_backoff", "http_stream_backoff"):
            if hasattr(module, name):
                patient = partial(getattr(module, name), base_wait_time=0, max_retries=1)
                monkeypatch.setattr(module, name, patient)
    for module in (file_download, utils._http):
        monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), "sleep": lambda _: None}))
    reset_sessions()
    try:
        yield
    finally:
        monkeypatch.undo()
        reset_sessions()
