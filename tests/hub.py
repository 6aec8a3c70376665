"""The Hugging Face hub at the network edge: local folders as model repositories, on the loopback.

`serving_hub()` serves; `using(hub, home)` leads this process's client there, and `environment(hub, home)` a child's.
It speaks plain HTTP: no Xet, no pages of long listings, no uploads, and no redirects to a CDN.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS = (".safetensors", ".bin")  # large files: their ETag is a SHA-256, that of the others git's SHA-1
NAME = r"/(?P<name>[^/]+(?:/[^/]+)??)"
API = re.compile(rf"/api/models{NAME}(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?")
FILE = re.compile(rf"{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
MISSING = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
}
SETTINGS = re.compile(r"HF_|HUGGING|TRANSFORMERS_OFFLINE|\w+_proxy$", re.IGNORECASE)  # what a child does not inherit


@dataclass(frozen=True)
class Answer:
    """What the hub says to one request; `cut` bytes of the body and no more, where the connection breaks."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Repository:
    """Commits, each with the bytes of its files; branches and tags; and the status that a gate answers with."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gate: int | None = None

    def commit(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """What is published, what goes wrong, and what was asked: (method, path, Range header or None)."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    breaks: dict[tuple[str, str], int] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    down: int | None = None  # a status that every request gets

    def publish(self, name: str, folder: Path, revision: str = "main") -> str:
        """Copies a folder's files to a new commit, to which a branch or tag then points; returns the commit."""
        files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
        sha = hashlib.sha1(repr([name, *((n, _sha1(b)) for n, b in files.items())]).encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[sha] = files
        repository.refs[revision] = sha
        return sha

    def gate(self, name: str, status: int | None = 403) -> None:
        """Refuses a repository's files: 401 nobody is logged in, 403 the account may not read them, None open."""
        self.repositories[name].gate = status

    def break_once(self, name: str, file: str, after: int) -> None:
        """Closes the connection of the next GET of a file after so many bytes of it."""
        self.breaks[name, file] = after

    def ranges(self, file: str) -> list[str | None]:
        """The Range headers of all GETs of a file, in order."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(f"/{file}")]

    def answer(self, method: str, target: str, ranged: str | None) -> Answer:
        self.requests.append((method, target, ranged))
        url = urlsplit(target)
        asked = API.fullmatch(url.path) or FILE.fullmatch(url.path)
        if self.down is not None or asked is None:
            return Answer(self.down or 404)
        given = {key: unquote(value) for key, value in asked.groupdict().items() if value is not None}
        repository = self.repositories.get(given["name"])
        if repository is None:
            return _missing("RepoNotFound")
        commit = repository.commit(given.get("revision", "main"))
        if commit is None:
            return _missing("RevisionNotFound")
        query = {key: values[-1].lower() == "true" for key, values in parse_qs(url.query).items()}
        if asked.re is FILE:
            cut = self.breaks.pop((given["name"], given["path"]), None) if method == "GET" else None
            return _file(repository, commit, given["path"], ranged, cut)
        if given.get("what") == "tree":
            return _tree(repository.commits[commit], commit, given.get("path"), query.get("recursive", False))
        return _json(_info(given["name"], repository, commit, query.get("blobs", False)))


def _file(repository: Repository, commit: str, path: str, ranged: str | None, cut: int | None) -> Answer:
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if repository.gate is not None:
        said = {401: "Access to this model is restricted. You must be authenticated.", 403: "You are not in its list."}
        return _error(repository.gate, "GatedRepo", said[repository.gate], headers)
    body = repository.commits[commit].get(path)
    if body is None:
        return _missing("EntryNotFound", headers)
    headers["ETag"] = f'"{_sha1(body)}"'
    if path.endswith(LFS):
        headers |= {
            "ETag": f'"{_sha256(body)}"',
            "X-Linked-Etag": f'"{_sha256(body)}"',
            "X-Linked-Size": f"{len(body)}",
        }
    if ranged is None:
        return Answer(200, body, headers, cut)
    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", ranged).groups()
    start, end = int(first), min(int(last or len(body)), len(body) - 1)
    if start > end:
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(body)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
    return Answer(206, body[start : end + 1], headers, cut)


def _info(name: str, repository: Repository, commit: str, blobs: bool) -> dict:
    def sibling(path: str, body: bytes) -> dict:
        detail = {"size": len(body), "blobId": _sha1(body)} if blobs else {}
        lfs = {"sha256": _sha256(body), "size": len(body), "pointerSize": 130}
        return {"rfilename": path, **detail, **({"lfs": lfs} if blobs and path.endswith(LFS) else {})}

    return {
        "id": name,
        "modelId": name,
        "sha": commit,
        "private": False,
        "disabled": False,
        "gated": False if repository.gate is None else "manual",
        "tags": ["transformers", "safetensors"],
        "lastModified": "2026-01-01T00:00:00.000Z",
        "siblings": [sibling(path, body) for path, body in repository.commits[commit].items()],
    }


def _tree(files: dict[str, bytes], commit: str, under: str | None, recursive: bool) -> Answer:
    """Files and folders below `under`, or only those directly in it."""
    start = f"{under}/" if under else ""
    below = {path: body for path, body in files.items() if path.startswith(start)}
    if under and not below:
        return _missing("EntryNotFound", {"X-Repo-Commit": commit})
    folders = {path[:end] for path in below for end in _slashes(path) if end > len(start)}
    entries = [{"type": "directory", "oid": _sha1(f.encode()), "size": 0, "path": f} for f in sorted(folders)]
    for path, body in below.items():
        lfs = {"oid": _sha256(body), "size": len(body), "pointerSize": 130}
        entry = {"type": "file", "oid": _sha1(body), "size": len(body), "path": path}
        entries.append(entry | ({"lfs": lfs} if path.endswith(LFS) else {}))
    return _json([e for e in entries if recursive or "/" not in e["path"][len(start) :]])


def _slashes(path: str) -> list[int]:
    return [at for at, sign in enumerate(path) if sign == "/"]


def _json(content: dict | list) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _missing(code: str, headers: dict[str, str] | None = None) -> Answer:
    return _error(404, code, MISSING[code], headers or {})


def _error(status: int, code: str, said: str, headers: dict[str, str]) -> Answer:
    typed = {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": said}
    return Answer(status, json.dumps({"error": said}).encode(), headers | typed)


def _sha1(body: bytes) -> str:
    """The name of a blob in git."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10  # a client that says nothing holds up the end of a test no longer

        def do_GET(self):
            said = hub.answer(self.command, self.path, self.headers.get("Range"))
            self.send_response(said.status)
            # One request a connection: no thread waits for another one when the server ends.
            for name, value in (said.headers | {"Content-Length": f"{len(said.body)}", "Connection": "close"}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(said.body[: said.cut])

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing the server joins them
    request_queue_size = 64  # the client connects eight times at once; those that find no room wait for a second


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """An empty hub, with its address; at the end nothing listens there any more."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: Hub, home: Path, *, offline: bool = False) -> dict[str, str]:
    """A child process's whole environment: this hub, a cache of its own in `home`, no token and no proxy."""
    kept = {name: value for name, value in os.environ.items() if not SETTINGS.match(name)}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


@contextlib.contextmanager
def using(hub: Hub, home: Path, *, offline: bool = False) -> Iterator[None]:
    """Leads this process's `huggingface_hub` and transformers to a hub, with a cache in `home` and no token.

    Both read the environment once, when imported: here their copies are replaced. Waiting between attempts takes no
    time, and downloads come in chunks of 1 kB: of a broken one, the client keeps whole chunks alone.
    """
    import transformers.utils.hub
    from huggingface_hub import close_session, constants, hf_api

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if SETTINGS.match(n)]:
            patch.delenv(name)
        for name, value in environment(hub, home, offline=offline).items():
            patch.setenv(name, value)
        for name, value in _constants(hub.url, home, offline).items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.url)  # behind `huggingface_hub.model_info` and the like
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # made at its first use
        hasty = SimpleNamespace(**{**vars(time), "sleep": lambda _seconds: None})
        patch.setattr("huggingface_hub.utils._http.time", hasty)
        patch.setattr("huggingface_hub.file_download.time", hasty)
        close_session()  # a client that was made before may know a proxy
        try:
            yield
        finally:
            close_session()


def _constants(url: str, home: Path, offline: bool) -> dict[str, object]:
    return {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "DOWNLOAD_CHUNK_SIZE": 1024,
    }
