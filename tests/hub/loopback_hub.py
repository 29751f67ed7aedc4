"""A Hub on loopback: as much of its HTTP interface as the real client needs to push and load models.

It keeps repositories in memory: immutable commits of paths and contents, branches that point at them, and LFS objects,
whose SHA-256 it checks. Tests look into ``LoopbackHub`` and set its faults; the client knows no difference.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MAIN = "main"
# What is stored as an LFS object, as on the Hub.
LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class File:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid

    def listing(self, path: str) -> dict[str, Any]:
        """The file as the Hub lists it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """A model repository."""

    owner: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        """Make ``files`` the new head of ``branch``."""
        parent = self.branches.get(branch, "")
        content = [parent, *(f"{path} {file.sha256}" for path, file in sorted(files.items()))]
        commit_id = hashlib.sha1("\n".join([str(len(self.commits)), *content]).encode()).hexdigest()
        self.commits[commit_id] = files
        self.branches[branch] = commit_id
        return commit_id


@dataclass
class User:
    """Who a token belongs to, and what it may."""

    name: str
    may_write: bool = True


@dataclass
class LoopbackHub:
    """State of the server, and its faults.

    Attributes:
        users: by token.
        requests: method and path of every request so far.
        during_upload: is called once, when the first half of an LFS upload has come; then the connection is closed.
        drop_downloads_after: bytes after which downloads of LFS objects break off, as long as it is set.
    """

    users: dict[str, User]
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    during_upload: Callable[[], None] | None = None
    drop_downloads_after: int | None = None
    url: str = ""

    def files(self, repo_id: str, revision: str = MAIN) -> dict[str, bytes]:
        """Path -> content in a revision of a repository."""
        repository = self.repositories[repo_id]
        files = repository.commits[repository.branches.get(revision, revision)]
        return {path: file.content for path, file in files.items()}


class Refusal(Exception):
    """Ends a request with an error status."""

    def __init__(self, status: HTTPStatus, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@contextmanager
def running(users: dict[str, User]) -> Iterator[LoopbackHub]:
    """A hub that listens on a free port of 127.0.0.1 while the context lasts."""
    hub = LoopbackHub(users)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", rf"/api/models/{_REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        method = "GET" if self.command == "HEAD" else self.command
        self._content: bytes | None = None
        try:
            for route_method, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and route_method == method:
                    arguments = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    getattr(self, f"_{name}")(**arguments)
                    return
            raise Refusal(HTTPStatus.NOT_FOUND, f"no such route: {self.command} {path}")
        except Refusal as refusal:
            self._body()  # a connection closed on a body that is not read is reset, and the reply may be lost
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._reply({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: ``requests`` is the log."""

    # Requests and replies

    def _body(self) -> bytes:
        """What the request carries; read off the connection once."""
        if self._content is None:
            self._content = self._read_body()
        return self._content

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, value: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        self._reply_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _reply_bytes(
        self, content: bytes, status: HTTPStatus, headers: dict[str, str], cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut_after])
        if cut_after is not None:
            self.close_connection = True

    # Rights

    def _user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def _readable(self, repo_id: str) -> Repository:
        user, repository = self._user(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and (user is None or user.name != repository.owner)):
            status = HTTPStatus.UNAUTHORIZED if user is None else HTTPStatus.NOT_FOUND
            raise Refusal(status, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, repo_id: str) -> Repository:
        repository = self._readable(repo_id)
        self._check_may_write(repository.owner)
        return repository

    def _check_may_write(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        if user.name != owner or not user.may_write:
            raise Refusal(HTTPStatus.FORBIDDEN, f"You don't have the rights to write to {owner}'s repositories")

    def _commit_id(self, repository: Repository, revision: str) -> str:
        commit_id = repository.branches.get(revision, revision)
        if commit_id not in repository.commits:
            raise Refusal(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit_id

    # Repositories

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        role = "write" if user.may_write else "read"
        token = {"displayName": "token", "role": role}
        self._reply({"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": token}})

    def _create(self) -> None:
        request = json.loads(self._body())
        user = self._user()
        owner = request.get("organization") or (user.name if user else "")
        self._check_may_write(owner)
        repo_id = f"{owner}/{request['name']}"
        reply = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            self._reply(reply | {"error": "You already created this model repo"}, HTTPStatus.CONFLICT)
            return
        repository = Repository(owner, private=request.get("visibility") == "private")
        repository.commit(MAIN, {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        self.hub.repositories[repo_id] = repository
        self._reply(reply)

    def _info(self, repo: str, revision: str = MAIN) -> None:
        repository = self._readable(repo)
        commit_id = self._commit_id(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit_id])]
        shown = {"id": repo, "modelId": repo, "sha": commit_id, "private": repository.private, "siblings": siblings}
        self._reply(shown | {"tags": [], "downloads": 0, "likes": 0})

    def _tree(self, repo: str, revision: str) -> None:
        repository = self._readable(repo)
        files = repository.commits[self._commit_id(repository, revision)]
        self._reply([file.listing(path) for path, file in sorted(files.items())])

    def _paths_info(self, repo: str, revision: str) -> None:
        repository, body = self._readable(repo), self._body().decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        files = repository.commits[self._commit_id(repository, revision)]
        self._reply([files[path].listing(path) for path in paths if path in files])

    def _create_branch(self, repo: str, branch: str) -> None:
        repository, request = self._writable(repo), json.loads(self._body() or b"{}")
        if branch in repository.branches:
            raise Refusal(HTTPStatus.CONFLICT, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = self._commit_id(repository, request.get("startingPoint", MAIN))
        self._reply({})

    # Uploads

    def _validate_yaml(self) -> None:
        self._body()
        self._reply({"errors": [], "warnings": []})

    def _preupload(self, repo: str, revision: str) -> None:
        self._commit_id(self._writable(repo), revision)
        files = json.loads(self._body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._reply({"files": modes, "commitOid": self._commit_id(self._writable(repo), revision)})

    def _lfs_batch(self, repo: str) -> None:
        self._writable(repo)
        objects = []
        for wanted in json.loads(self._body())["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload, verify = f"{self.hub.url}/lfs/{wanted['oid']}", f"{self.hub.url}/lfs/verify"
                entry["actions"] = {"upload": {"href": upload, "header": {}}, "verify": {"href": verify, "header": {}}}
            objects.append(entry)
        self._reply({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        if self.hub.during_upload is not None:
            interrupt, self.hub.during_upload = self.hub.during_upload, None
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            interrupt()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"what was uploaded has not the SHA-256 {oid}")
        self.hub.objects[oid] = content
        self._reply({})

    def _lfs_verify(self) -> None:
        request = json.loads(self._body())
        if len(self.hub.objects.get(request["oid"], b"")) != request["size"]:
            raise Refusal(HTTPStatus.NOT_FOUND, f"object {request['oid']} was not uploaded whole")
        self._reply({})

    def _commit(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        files = dict(repository.commits[self._commit_id(repository, revision)])
        for line in self._body().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise Refusal(HTTPStatus.BAD_REQUEST, f"LFS object {value['oid']} of {value['path']} is missing")
                files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise Refusal(HTTPStatus.BAD_REQUEST, f"unknown operation {key}")
        commit_id = repository.commit(revision, files)
        self._reply({"success": True, "commitOid": commit_id, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit_id}"})

    # Downloads

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        repository = self._readable(repo)
        commit_id = self._commit_id(repository, revision)
        file = repository.commits[commit_id].get(path)
        if file is None:
            raise Refusal(HTTPStatus.NOT_FOUND, f"Entry not found: {path}", "EntryNotFound")
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        content, status = file.content, HTTPStatus.OK
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], HTTPStatus.PARTIAL_CONTENT
        cut = self.hub.drop_downloads_after if file.lfs and self.command == "GET" else None
        self._reply_bytes(content, status, headers, cut)
