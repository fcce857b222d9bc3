"""A Hub for tests: repositories of models in memory, spoken to by huggingface_hub and transformers over HTTP.

    with HubServer() as hub:
        hub.fail("POST", "/commit/", times=2, how=503)       # or "drop", "lose", "stall"
        ...                                                  # HF_ENDPOINT=hub.url HF_TOKEN=WRITER

A commit makes a new tree, and moves its branch, at once. `hub.requests` holds (method, path) of all requests.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import http_backoff

from tools import repository

WRITER, READER = "hf_writerSecret0123456789", "hf_readerSecret0123456789"  # tokens of the one user there is
SIGNATURE = "signedSecret0123456789"  # in the URLs of uploads, as of S3
NAMESPACE = "team"  # where WRITER may write


@dataclass
class Repository:
    private: bool
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by commit: path -> content
    commits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # by branch: (commit, title), oldest first

    def commit(self, branch: str, title: str, tree: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{branch} {title} {len(self.trees)}".encode()).hexdigest()
        self.trees[oid] = tree
        self.commits.setdefault(branch, []).append((oid, title))
        return oid

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.commits[revision][-1][0] if revision in self.commits else revision
        return (oid, self.trees[oid]) if oid in self.trees else None


@dataclass
class Fault:
    method: str
    path: str  # regular expression
    times: int
    how: int | str  # a code to answer, "drop": no answer, "lose": done, but no answer, "stall": no answer, no end


class Failed(Exception):
    """Answer (code, X-Error-Code)."""


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def oid_of(path: str, content: bytes) -> str:
    """As git and LFS name it."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves while the `with` block lasts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.verified: set[str] = set()  # of the uploads
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.stalled = threading.Event()  # set when a request has begun to wait
        self.released = threading.Event()
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def fail(self, method: str, path: str, times: int = 1, how: int | str = "drop") -> None:
        """Let the next `times` requests fail that match."""
        self.stalled.clear()
        self.faults.append(Fault(method, path, times, how))

    def fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault.how
        return None

    def titles(self, repo_id: str, branch: str) -> list[str]:
        """Of the branch's commits, oldest first."""
        return [title for _, title in self.repositories[repo_id].commits[branch]]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repositories[repo_id].tree(revision)
        assert found, f"{repo_id} has no {revision}"
        return found[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, which saves 40 ms a request
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def respond(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self.read_body()
        fault = self.server.fault(self.command, path)
        if fault in ("drop", "stall"):
            self.drop(wait=fault == "stall")
        elif isinstance(fault, int):
            self.answer({"error": "told to fail"}, fault)
        else:
            try:
                with self.server.lock:
                    answer = self.route(path, body)
            except Failed as failed:
                code, name = failed.args
                self.answer({"error": name}, code, {"X-Error-Code": name})
            else:
                if fault == "lose":
                    self.drop()
                elif answer is not None:
                    self.answer(answer)

    do_GET = do_POST = do_PUT = do_HEAD = respond

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def drop(self, wait: bool = False) -> None:
        if wait:
            self.server.stalled.set()
            self.server.released.wait(60)
        self.close_connection = True

    def answer(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def role(self) -> str:
        """ "" without a token, "read" or "write"."""
        header = self.headers.get("Authorization")
        found = {None: "", f"Bearer {READER}": "read", f"Bearer {WRITER}": "write"}.get(header)
        if found is None:
            raise Failed(401, "InvalidToken")
        return found

    def require_write(self, repo_id: str) -> None:
        role = self.role()
        if role != "write" or not repo_id.startswith(f"{NAMESPACE}/"):
            raise Failed(403 if role else 401, "Forbidden")

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        role = self.role()
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and not role):
            raise Failed(404 if role else 401, "RepoNotFound")
        if write:
            self.require_write(repo_id)
        return found

    def route(self, path: str, body: bytes) -> Any:
        """The answer as JSON; None where it has been given."""
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.startswith("/upload/"):
            return self.upload(path.removeprefix("/upload/"), body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            return self.lfs(found[1], found[2], json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[2], found[3])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([^/]+)(?:/(.+))?)?", path):
            repo_id, verb, rest = found.groups()
            calls = {
                "auth-check": self.check,
                "branch": self.branch,
                "commit": self.commit,
                "preupload": self.preupload,
            }
            if verb in calls:
                return calls[verb](repo_id, rest, body)
            return self.look(self.repository(repo_id), repo_id, verb, rest)
        raise Failed(404, "NotFound")

    def create(self, asked: dict) -> dict:
        repo_id = f"{asked['organization']}/{asked['name']}"
        self.require_write(repo_id)
        if repo_id not in self.server.repositories:
            made = Repository(private=asked.get("visibility") == "private")
            made.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories[repo_id] = made
        return {"url": f"{self.server.url}/{repo_id}"}

    def check(self, repo_id: str, right: str | None, body: bytes) -> dict:
        self.repository(repo_id, write=right == "write")
        return {}

    def branch(self, repo_id: str, name: str, body: bytes) -> dict:
        repository = self.repository(repo_id, write=True)
        if name in repository.commits:
            raise Failed(409, "BranchExists")
        repository.commits[name] = list(repository.commits["main"])
        return {}

    def look(self, repository: Repository, repo_id: str, verb: str | None, rest: str | None) -> Any:
        if verb == "refs":
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1][0]}
                for name, commits in repository.commits.items()
            ]
            return {"branches": refs, "converts": [], "tags": []}
        revision, _, folder = (rest or "main").partition("/")
        found = repository.tree(revision)
        if found is None:
            raise Failed(404, "RevisionNotFound")
        commit, tree = found
        if verb == "tree" and folder and not any(path.startswith(f"{folder}/") for path in tree):
            raise Failed(404, "EntryNotFound")
        if verb == "tree":
            return [self.entry(path, content) for path, content in tree.items() if path.startswith(folder)]
        siblings = [{"rfilename": path} for path in tree]
        return {"id": repo_id, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        oid = oid_of(path, content)
        lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 130}} if is_lfs(path) else {}
        return {"type": "file", "path": path, "size": len(content), "oid": oid, **lfs}

    def preupload(self, repo_id: str, revision: str, body: bytes) -> dict:
        found = self.repository(repo_id, write=True).tree(revision)
        if found is None:
            raise Failed(404, "RevisionNotFound")
        paths = [file["path"] for file in json.loads(body)["files"]]
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_lfs(path) else "regular",
                    "shouldIgnore": False,
                    "oid": oid_of(path, found[1][path]) if path in found[1] else None,
                }
                for path in paths
            ]
        }

    def lfs(self, repo_id: str, verb: str, asked: dict) -> dict:
        self.repository(repo_id, write=True)
        if verb == "verify":
            self.server.verified.add(asked["oid"])
            return {}
        objects = []
        for wanted in asked["objects"]:
            oid = wanted["oid"]
            upload = {"href": f"{self.server.url}/upload/{oid}?X-Amz-Signature={SIGNATURE}"}
            verify = {"href": f"{self.server.url}/{repo_id}.git/info/lfs/objects/verify"}
            known = oid in self.server.verified
            objects.append({**wanted, **({} if known else {"actions": {"upload": upload, "verify": verify}})})
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str, body: bytes) -> dict:
        if SIGNATURE not in self.path or hashlib.sha256(body).hexdigest() != oid:
            raise Failed(403, "BadUpload")
        self.server.uploads[oid] = body
        return {}

    def commit(self, repo_id: str, branch: str, body: bytes) -> dict:
        repository = self.repository(repo_id, write=True)
        if branch not in repository.commits:
            raise Failed(404, "RevisionNotFound")
        header, *changes = [json.loads(line) for line in body.splitlines()]
        tree = dict(self.server.files(repo_id, branch))
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                del tree[value["path"]]
            elif change["key"] == "lfsFile":
                tree[value["path"]] = self.server.uploads[value["oid"]]
            else:
                tree[value["path"]] = base64.b64decode(value["content"])
        oid = repository.commit(branch, header["value"]["summary"], tree)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"}

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self.repository(repo_id).tree(revision)
        if found is None:
            raise Failed(404, "RevisionNotFound")
        commit, tree = found
        if path not in tree:
            raise Failed(404, "EntryNotFound")
        content = tree[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid_of(path, content)}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.answer(content, 200, headers)
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(content[first : last + 1], 206, headers)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process speaks to as WRITER, without long pauses."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf_cache"))
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(repository, "PAUSES", (0, 0))
        monkeypatch.setitem(http_backoff.__kwdefaults__, "max_retries", 1)
        monkeypatch.setitem(http_backoff.__kwdefaults__, "base_wait_time", 0)
        yield server


def environment(hub: HubServer, folder: Path, token: str | None = WRITER) -> dict[str, str]:
    """Of another process, which reads it when it imports huggingface_hub."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder)}
    settings |= {"OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_TOKEN")} | settings
