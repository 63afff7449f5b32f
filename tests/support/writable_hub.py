"""A hub on this machine that takes uploads: it answers what huggingface_hub asks to publish and to download.

Its repositories are in memory: commits of files. Large files come by git LFS, not by Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from cogvla.tests.support.stub_hub import asking

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: one may write to `someone/...`, the other may only read."""
LARGE = (".safetensors", ".parquet", ".mp4")


@dataclass
class Repository:
    """Commits of a repository, the newest last, and its tags."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes]) -> str:
        text = repr((len(self.commits), sorted((n, hashlib.sha1(c).hexdigest()) for n, c in files.items())))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        return sha

    def at(self, revision: str) -> str | None:
        revision = self.head if revision == "main" else self.tags.get(revision, revision)
        return revision if revision in self.commits else None


class WritableHub:
    """A hub.

    Attributes:
        repositories: `models/USER/NAME` or `datasets/USER/NAME` -> its commits.
        requests: method and path of each request, in order.
        broken: (method, part of a path) -> status of the answer.
        flipped: paths of files that come with another byte than they have.
        before_commit: called when a commit arrives.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.broken: dict[tuple[str, str], int] = {}
        self.flipped: set[str] = set()
        self.before_commit: Any = lambda: None
        self.closed = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                if hub.closed:
                    self.close_connection = True
                else:
                    hub.answer(self)

            do_HEAD = do_GET = do_POST = do_PUT = do_DELETE = _answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closed = True  # for connections that are open
        self._server.shutdown()
        self._server.server_close()

    def writes(self) -> list[tuple[str, str]]:
        """Requests that change something, or upload a file."""
        return [r for r in self.requests if r[1].startswith(("/upload/", "/api/repos/create")) or "/commit/" in r[1]]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        body = self._body(request)
        self.requests.append((request.command, path))
        for (method, part), status in self.broken.items():
            if method == request.command and part in path:
                return self._json(request, {"error": "no"}, status)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/repos/create":
            return self._create(request, json.loads(body), token)
        if path == "/api/validate-yaml":
            return self._json(request, {"errors": [], "warnings": []})
        if path.startswith("/upload/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/upload/"):
                return self._json(request, {"error": "another content"}, 400)
            self.large[path.removeprefix("/upload/")] = body
            return self._json(request, {})
        parts = path.strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("api", "datasets") else "models"
        if kind == "api":
            kind = parts.pop(0)
        name = "/".join(parts[:2]).removesuffix(".git")
        found = self.repositories.get(f"{kind}/{name}")
        if found is None or (found.private and token not in (WRITER, READER)):
            status = 404 if token else 401
            return self._json(request, {"error": "Repository not found"}, status, "RepoNotFound")
        return self._about(request, f"{kind}/{name}", found, parts[2:], body, token)

    def _about(
        self, request: BaseHTTPRequestHandler, key: str, found: Repository, rest: list[str], body: bytes, token: str
    ) -> None:
        what = rest[0] if rest else "revision"
        name = key.partition("/")[2]
        if what in ("commit", "preupload", "tag", "info") and token != WRITER:
            return self._json(request, {"error": "You may not write here"}, 403 if token else 401)
        if what == "refs":
            branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": found.head}]
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in found.tags.items()]
            return self._json(request, {"branches": branches, "converts": [], "tags": tags})
        if what == "tag":
            if request.command == "DELETE":
                del found.tags[rest[1]]
            else:
                found.tags[json.loads(body)["tag"]] = str(found.at(rest[1]))
            return self._json(request, {})
        if what == "info":
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.address}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._json(request, {"transfer": "basic", "objects": objects})
        commit = found.at(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return self._json(request, {"error": "Invalid rev id"}, 404, "RevisionNotFound")
        files = found.commits[commit]
        if what == "revision":
            self._json(request, {"id": name, "sha": commit, "private": found.private, "siblings": [], "tags": []})
        elif what == "tree":
            self._json(request, [entry(n, content) for n, content in sorted(files.items())])
        elif what == "paths-info":
            self._json(request, [entry(n, files[n]) for n in json.loads(body)["paths"] if n in files])
        elif what == "preupload":
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular"} for f in asked]
            self._json(request, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif what == "commit":
            self._commit(request, name, found, [json.loads(line) for line in body.splitlines()])
        elif what == "resolve":
            self._file(request, "/".join(rest[2:]), files, commit)
        else:
            self._json(request, {"error": "no such thing"}, 404)
        return None

    def _create(self, request: BaseHTTPRequestHandler, asked: dict[str, Any], token: str) -> None:
        key = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
        if token != WRITER or asked["organization"] != "someone":
            return self._json(request, {"error": "You may not make repositories here"}, 403 if token else 401)
        if key in self.repositories:
            return self._json(request, {"error": "You already created this repo"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repositories[key] = made = Repository(bool(private))
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json(request, {"url": f"{self.address}/{key.removeprefix('models/')}"})

    def _commit(self, request: BaseHTTPRequestHandler, name: str, found: Repository, lines: list[Any]) -> None:
        self.before_commit()
        files = dict(found.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, found.head):
                return self._json(request, {"error": "A commit has happened since"}, 412)
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(files)
        url = f"{self.address}/{name}/commit/{sha}"
        return self._json(request, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None, "success": True})

    def _file(self, request: BaseHTTPRequestHandler, name: str, files: dict[str, bytes], commit: str) -> None:
        if name not in files:
            self._json(request, {"error": "none"}, 404, "EntryNotFound")
            return
        content, about = files[name], entry(name, files[name])
        etag = about["lfs"]["oid"] if "lfs" in about else about["oid"]
        if name in self.flipped:
            content = content[:-1] + bytes([content[-1] ^ 1])
        request.send_response(200)
        for header, value in (("ETag", f'"{etag}"'), ("X-Repo-Commit", commit), ("Content-Length", len(content))):
            request.send_header(header, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _body(self, request: BaseHTTPRequestHandler) -> bytes:
        if request.headers.get("Transfer-Encoding") != "chunked":
            return request.rfile.read(int(request.headers.get("Content-Length") or 0))
        parts = []
        while size := int(request.rfile.readline().strip(), 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        request.rfile.readline()
        return b"".join(parts)

    def _json(self, request: BaseHTTPRequestHandler, content: Any, status: int = 200, code: str = "") -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        if code:
            request.send_header("X-Error-Code", code)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


def is_large(name: str) -> bool:
    """Whether the hub stores a file with git LFS."""
    return name.endswith(LARGE)


def entry(name: str, content: bytes) -> dict[str, Any]:
    """Describe a file as the hub does: large ones with SHA-256, others with git's checksum."""
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    found["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if is_large(name):
        found["oid"] = "b" * 40
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return found


@contextmanager
def writable_hub(cache: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = WRITER) -> Iterator[WritableHub]:
    """Start a hub, and let huggingface_hub of this process use it with this token and an empty cache."""
    from huggingface_hub import constants

    hub = WritableHub()
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        with asking(hub.address, monkeypatch):
            yield hub
    finally:
        hub.close()
