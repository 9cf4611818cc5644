"""A Hugging Face Hub on localhost, as far as a client that downloads models can tell.

It speaks HTTP as the Hub does: HEAD and GET of /{repo}/resolve/{revision}/{file}, which redirect
to storage on another origin with the file's hash and size in the redirect's headers; the model
API; error codes in X-Error-Code. No Xet headers, so clients take plain HTTP. `Faults` make it
misbehave; `requests` is what came, `bytes_served` what left.

    with FakeHub() as hub:
        hub.add("owner/repo", {"model.gguf": data})
        hf_hub_download("owner/repo", "model.gguf", endpoint=hub.url)
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 64 * 1024


@dataclass(kw_only=True)
class Repo:
    """One model repository: files at commits, branches that name commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    licence: str = "apache-2.0"
    gated: bool = False  # listed for everyone, files only with the token
    private: bool = False  # not even listed without the token


@dataclass(kw_only=True)
class Faults:
    """How the server misbehaves; counted ones are used up, one per request."""

    answers: deque[tuple[int, Mapping[str, str]]] = field(default_factory=deque)  # at /resolve
    storage_answers: deque[tuple[int, Mapping[str, str]]] = field(default_factory=deque)
    cut_after: deque[int] = field(default_factory=deque)  # bytes of a body, then the cable
    ignore_ranges: bool = False
    wrong_ranges: int = 0  # so many answers of 206 begin elsewhere
    extra_bytes: int = 0  # every file is that much longer than the Hub said
    tamper_at: int | None = None  # this byte of every file comes inverted
    no_hash: bool = False  # a mirror that says no LFS hash
    mute: bool = False  # accepts, and never answers
    hold_at: int | None = None  # a body stops at this byte of the file until `released`
    held: threading.Event = field(default_factory=threading.Event)  # it has come to that
    released: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as it came, and what was answered."""

    method: str
    path: str
    byte_range: str | None
    authorization: str | None
    storage: bool
    status: int


class FakeHub:
    """The two servers: the Hub at `url`, and the storage that it redirects to."""

    token = "hf_let_me_in"  # the one that this server accepts

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults = Faults()
        self.requests: list[Request] = []
        self.bytes_served = 0
        self.lock = threading.Lock()
        self._servers = [_Server(self, storage=False), _Server(self, storage=True)]
        self.url, self.storage_url = (server.url for server in self._servers)

    def __enter__(self) -> FakeHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **kind: Any) -> str:
        """Commit these files to `main` of a repository, made on the first call."""
        repo = self.repos.setdefault(name, Repo(**kind))
        digest = hashlib.sha1(f"{name} {len(repo.commits)}".encode(), usedforsecurity=False)
        commit = digest.hexdigest()
        repo.commits[commit] = dict(files)
        repo.branches["main"] = commit
        return commit

    def seen(self, method: str, part: str = "") -> list[Request]:
        """The requests of that method whose path contains `part`."""
        return [r for r in self.requests if r.method == method and part in r.path]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: FakeHub, *, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.storage = storage
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed or hang up are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body leave at once
    server: _Server

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def log_message(self, format: str, *args: object) -> None:
        """The list of requests is the log."""

    def _route(self) -> None:
        hub = self.server.hub
        if hub.faults.mute:
            hub.faults.released.wait()
            return self._hang_up()
        path = unquote(urlsplit(self.path).path)
        if self.server.storage:
            return self._storage(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._api(match[1], match[2] or "revision/main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        return self._answer(404)

    # -- the Hub

    def _resolve(self, name: str, revision: str, file: str) -> None:
        faults = self.server.hub.faults
        if faults.answers:
            status, headers = faults.answers.popleft()
            return self._answer(status, headers)
        found = self._files(name, revision, listing=False)
        if found is None:
            return None
        commit, files = found
        if file not in files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[file]
        sha256 = hashlib.sha256(data).hexdigest()
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.server.hub.storage_url}/{sha256}?signature=of-the-hub",
            "ETag": '"0123456789abcdef0123456789abcdef-1"',  # of the storage, not of the content
        }
        if not faults.no_hash:
            headers["X-Linked-ETag"] = f'"{sha256}"'
        return self._answer(302, headers)

    def _api(self, name: str, rest: str) -> None:
        what, _, revision = rest.partition("/")
        found = self._files(name, revision.partition("/")[0] or "main", listing=True)
        if found is None:
            return None
        commit, files = found
        repo = self.server.hub.repos[name]
        if what == "revision":
            with_blobs = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [_sibling(file, data, with_blobs) for file, data in files.items()]
            return self._json(
                {
                    "id": name,
                    "sha": commit,
                    "private": repo.private,
                    "gated": "auto" if repo.gated else False,
                    "cardData": {"license": repo.licence},
                    "tags": ["gguf"],
                    "siblings": siblings,
                }
            )
        entries = [_entry(file, data) for file, data in files.items()]
        if what == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            return self._json([entry for entry in entries if entry["path"] in asked["paths"]])
        return self._json(entries) if what == "tree" else self._answer(404)

    def _files(self, name: str, revision: str, *, listing: bool) -> tuple[str, Any] | None:
        """Commit and files, if the caller may see them; else the Hub's refusal is sent."""
        repo = self.server.hub.repos.get(name)
        sent = self.headers["Authorization"]
        allowed = sent == f"Bearer {self.server.hub.token}"
        if sent is not None and not allowed:
            message = "Invalid credentials in Authorization header"
            return self._answer(401, {"X-Error-Message": message})
        if repo is None or (repo.private and not allowed):
            return self._answer(404 if allowed else 401, {"X-Error-Code": "RepoNotFound"})
        if repo.gated and not allowed and not listing:
            return self._answer(401, {"X-Error-Code": "GatedRepo"})
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        return commit, repo.commits[commit]

    # -- the storage

    def _storage(self, path: str) -> None:
        hub, faults = self.server.hub, self.server.hub.faults
        if faults.storage_answers:
            status, headers = faults.storage_answers.popleft()
            return self._answer(status, headers)
        if "signature=of-the-hub" not in self.path:
            return self._answer(403)
        data = next(
            (
                data
                for repo in hub.repos.values()
                for files in repo.commits.values()
                for data in files.values()
                if hashlib.sha256(data).hexdigest() == path.strip("/")
            ),
            None,
        )
        if data is None:
            return self._answer(404)
        if faults.tamper_at is not None:
            at = faults.tamper_at
            data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        data += bytes(faults.extra_bytes)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked is None or faults.ignore_ranges:
            return self._body(200, {}, data, 0)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._answer(416, {"Content-Range": f"bytes */{len(data)}"})
        if faults.wrong_ranges:
            faults.wrong_ranges -= 1
            first -= 1
        content_range = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return self._body(206, content_range, data[first : last + 1], first)

    def _body(self, status: int, headers: Mapping[str, str], body: bytes, first: int) -> None:
        hub, faults = self.server.hub, self.server.hub.faults
        cut = faults.cut_after.popleft() if faults.cut_after else None
        self._start(status, {"Accept-Ranges": "bytes", **headers}, len(body))
        at = 0
        while at < len(body) and self.command != "HEAD":
            end = min(at + CHUNK, len(body))
            if faults.hold_at is not None and first + end > faults.hold_at:
                faults.held.set()
                faults.released.wait()
            if cut is not None:
                end = min(end, cut)
            self.wfile.write(body[at:end])
            with hub.lock:
                hub.bytes_served += end - at
            at = end
            if at == cut:
                return self._hang_up()
        return None

    # -- answers

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._start(200, {"Content-Type": "application/json"}, len(body))
        self.wfile.write(body)

    def _answer(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self._start(status, headers or {}, 0)

    def _start(self, status: int, headers: Mapping[str, str], n_bytes: int) -> None:
        request = Request(
            method=self.command,
            path=self.path,
            byte_range=self.headers["Range"],
            authorization=self.headers["Authorization"],
            storage=self.server.storage,
            status=status,
        )
        with self.server.hub.lock:
            self.server.hub.requests.append(request)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()


def _entry(file: str, data: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(data).hexdigest()
    lfs = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return {"type": "file", "path": file, "size": len(data), "oid": sha256[:40], "lfs": lfs}


def _sibling(file: str, data: bytes, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": file}
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"rfilename": file, "size": len(data), "blobId": lfs["sha256"][:40], "lfs": lfs}
