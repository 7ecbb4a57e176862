"""A local Hugging Face Hub: the HTTP interface that huggingface_hub uses, with a store in memory.

It has commits, branches, tags, trees, large files, visibility and tokens, but no Xet (set
HF_HUB_DISABLE_XET=1). `faults` make selected requests fail as they do in a network.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".png", ".bin", ".parquet")
DATE = "2026-01-01T00:00:00.000Z"


class HttpError(Exception):
    """A response with a status other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class ConnectionDropped(Exception):
    """The connection ends without a response."""


@dataclass(frozen=True)
class File:
    data: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        """Git's blob id; for a large file, the id of its pointer."""
        data = self.data
        if self.large:
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
            )
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: dict[str, File], branch: str = "main") -> Commit:
        parent = self.branches.get(branch, "")
        tree = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}\n{title}\n{tree}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    @property
    def head(self) -> Commit:
        return self.at("main")


@dataclass
class Fault:
    """A fault in the next `times` requests whose method and path match."""

    method: str
    path: str
    kind: Literal["half_body", "no_response"] | int | Callable[[], object] = "half_body"
    """`half_body`: the connection ends in the middle of the body; `no_response`: the request succeeds
    and the response is lost; a status: the response has it; a function: it runs before the request."""
    times: int = 10**9


class LoopbackHub:
    """The server and its store; `tokens` maps access tokens to users, `requests` lists all requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.tokens = {"hf_tester_may_write": "tester", "hf_reader": "reader"}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Reject all further connections."""
        self.server.shutdown()
        self.server.server_close()

    def create(self, repo_id: str, *, private: bool = False) -> Repository:
        """Create a repository like the Hub does, with one commit of .gitattributes."""
        repository = Repository(private=private)
        attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE)
        repository.commit("initial commit", {".gitattributes": File(attributes.encode())})
        self.repositories[repo_id] = repository
        return repository

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Return the fault of a request, and count it down."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<sha>[0-9a-f]{64})", "put"),
    ("POST", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
    ("GET", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
    ("POST", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/tag/(?P<rev>[^/]+)", "tag"),
    ("POST", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch"),
    ("DELETE", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/tag/(?P<rev>[^/]+)", "untag"),
    ("POST", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)", "paths_info"),
    ("GET", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?P<folder>/.*)?", "tree"),
    ("GET", r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+?)(/revision/(?P<rev>[^/]+))?", "info"),
    ("HEAD|GET", r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, url.path))
        fault = self.hub.take_fault(self.command, url.path)
        try:
            kind = fault.kind if fault else None
            body = self._body(half=kind == "half_body")
            if isinstance(kind, int):
                raise HttpError(kind, "injected by the test")
            if callable(kind):
                kind()
            with self.hub.lock:
                status, headers, data = self._route(url.path, parse_qs(url.query), body)
            if kind == "no_response":
                raise ConnectionDropped
        except HttpError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            status, data = error.status, json.dumps({"error": str(error)}).encode()
        except ConnectionDropped:
            self.close_connection = True
            return
        self._respond(status, headers, data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _body(self, *, half: bool) -> bytes:
        if half:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            raise ConnectionDropped
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _respond(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, query: dict, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for methods, pattern, name in _ROUTES:
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                named = {key: unquote(value) for key, value in match.groupdict().items() if value}
                response = getattr(self, f"_{name}")(query=query, body=body, **named)
                return response if isinstance(response, tuple) else (200, {}, json.dumps(response).encode())
        raise HttpError(404, f"unknown address: {self.command} {path}")

    # Users and permissions

    @property
    def _user(self) -> str | None:
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        user = self.hub.tokens.get(sent.removeprefix("Bearer "))
        if user is None:
            raise HttpError(401, "Invalid credentials in Authorization header")
        return user

    def _readable_repository(self, repo: str) -> Repository:
        repository, user = self.hub.repositories.get(repo), self._user
        if repository is None or (repository.private and user != repo.split("/")[0]):
            # Other users get the same response for a private repository and for a missing one.
            raise HttpError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _writable_repository(self, repo: str) -> Repository:
        repository = self._readable_repository(repo)
        self._check_writer(repo.split("/")[0])
        return repository

    def _check_writer(self, owner: str) -> None:
        if self._user is None:
            raise HttpError(401, "Invalid username or password.")
        if self._user != owner:
            raise HttpError(403, f"You don't have the rights to write under the namespace {owner!r}")

    # Responses

    def _whoami(self, **_) -> dict:
        if self._user is None:
            raise HttpError(401, "Invalid username or password.")
        return {"type": "user", "name": self._user, "orgs": [], "auth": {}}

    def _create(self, body: bytes, **_) -> dict:
        request = json.loads(body)
        owner = request.get("organization") or self._user
        self._check_writer(owner)
        repo = f"{owner}/{request['name']}"
        if repo in self.hub.repositories:
            raise HttpError(409, "You already created this model repo")
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.create(repo, private=private)
        return {"url": f"{self.hub.endpoint}/{repo}", "name": repo}

    def _validate(self, body: bytes, **_) -> tuple | dict:
        errors = metadata_errors(json.loads(body)["content"])
        result = {"errors": [{"message": error} for error in errors], "warnings": []}
        return (400 if errors else 200, {}, json.dumps(result).encode())

    def _preupload(self, repo: str, rev: str, body: bytes, **_) -> dict:
        files = self._writable_repository(repo).at(rev).files
        ignored = files[".gitignore"].data.decode().split() if ".gitignore" in files else []
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": file["path"] in ignored,
                    "oid": _hub_hash(files.get(file["path"])),
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, repo: str, body: bytes, **_) -> dict:
        self._writable_repository(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}}
            is_stored = wanted["oid"] in self.hub.large_files
            objects.append(wanted if is_stored else wanted | {"actions": upload})
        return {"transfer": "basic", "objects": objects}

    def _put(self, sha: str, body: bytes, **_) -> dict:
        if hashlib.sha256(body).hexdigest() != sha:
            raise HttpError(400, "the content does not match its SHA-256")
        self.hub.large_files[sha] = body
        return {}

    def _commit(self, repo: str, rev: str, body: bytes, **_) -> dict:
        repository = self._writable_repository(repo)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header, operations = lines[0]["value"], lines[1:]
        if header.get("parentCommit") not in (None, repository.branches[rev]):
            raise HttpError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.at(rev).files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise HttpError(
                        422, f"Your push was rejected because an LFS pointer is missing: {value['path']}"
                    )
                files[value["path"]] = File(self.hub.large_files[value["oid"]], large=True)
            elif key == "deletedFile":
                files.pop(value["path"], None)
        if "README.md" in files and (errors := metadata_errors(files["README.md"].data.decode())):
            raise HttpError(400, "; ".join(errors))
        commit = repository.commit(header["summary"], files, branch=rev)
        return {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit.oid}",
        }

    def _refs(self, repo: str, **_) -> dict:
        repository = self._readable_repository(repo)
        return {
            "branches": _refs_of("heads", repository.branches),
            "tags": _refs_of("tags", repository.tags),
            "converts": [],
        }

    def _tag(self, repo: str, rev: str, body: bytes, **_) -> dict:
        repository, name = self._writable_repository(repo), json.loads(body)["tag"]
        if name in repository.tags:
            raise HttpError(409, "Tag reference exists already")
        repository.tags[name] = repository.at(rev).oid
        return {}

    def _branch(self, repo: str, rev: str, body: bytes, **_) -> dict:
        repository = self._writable_repository(repo)
        if rev in repository.branches:
            raise HttpError(409, "Branch reference exists already")
        repository.branches[rev] = repository.at(json.loads(body).get("startingPoint", "main")).oid
        return {}

    def _untag(self, repo: str, rev: str, **_) -> dict:
        if self._writable_repository(repo).tags.pop(rev, None) is None:
            raise HttpError(404, f"the tag {rev} does not exist", "RevisionNotFound")
        return {}

    def _tree(self, repo: str, rev: str, query: dict, folder: str = "", **_) -> list:
        commit, folder = self._readable_repository(repo).at(rev), folder.strip("/")
        inside = {p: f for p, f in commit.files.items() if not folder or p.startswith(folder + "/")}
        if folder and not inside:
            raise HttpError(404, f"{folder} does not exist on {rev}", "EntryNotFound")
        depth = len(folder.split("/")) if folder else 0
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {"/".join(p.split("/")[:n]) for p in inside for n in range(depth + 1, p.count("/") + 1)}
        shown = [_entry(p, f) for p, f in inside.items() if recursive or p.count("/") == depth]
        shown += [
            {"type": "directory", "path": p, "size": 0, "oid": hashlib.sha1(p.encode()).hexdigest()}
            for p in folders
            if recursive or p.count("/") == depth
        ]
        return sorted(shown, key=lambda entry: entry["path"])

    def _paths_info(self, repo: str, rev: str, body: bytes, **_) -> list:
        """Answer as the Hub does with `expand`: the newest commit that changed each file."""
        repository = self._readable_repository(repo)
        head, commits = repository.at(rev), list(repository.commits.values())
        history = commits[: commits.index(head) + 1]
        entries = []
        for path in parse_qs(body.decode()).get("paths", []):
            if (file := head.files.get(path)) is None:
                continue
            changes = [
                after
                for before, after in zip([None, *history], history, strict=False)
                if after.files.get(path) != (before.files.get(path) if before else None)
            ]
            last = {"id": changes[-1].oid, "title": changes[-1].title, "date": DATE}
            entries.append(_entry(path, file) | {"lastCommit": last})
        return entries

    def _info(self, repo: str, rev: str = "main", **_) -> dict:
        repository = self._readable_repository(repo)
        commit = repository.at(rev)
        return {
            "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid,
            "lastModified": DATE,
            "private": repository.private, "gated": repository.gated, "disabled": False, "tags": [],
            "cardData": metadata_of(commit.files["README.md"].data) if "README.md" in commit.files else {},
            "siblings": [{"rfilename": p, "size": len(f.data)} for p, f in sorted(commit.files.items())],
        }  # fmt: skip

    def _resolve(self, repo: str, rev: str, path: str, **_) -> tuple:
        repository = self._readable_repository(repo)
        if repository.gated and self._user != repo.split("/")[0]:
            raise HttpError(403, f"Access to model {repo} is restricted", "GatedRepo")
        commit = repository.at(rev)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid, "Content-Type": "application/octet-stream"}
        if file is None:
            return 404, headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        etag = {"ETag": f'"{_hub_hash(file)}"'}
        if block := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(block[1]), min(int(block[2]), len(file.data) - 1)
            part = {"Content-Range": f"bytes {first}-{last}/{len(file.data)}"}
            return 206, headers | etag | part, file.data[first : last + 1]
        return 200, headers | etag, file.data

    def log_message(self, *_: object) -> None:
        """Log nothing to standard error."""


def metadata_of(card: bytes) -> dict:
    """Return the metadata of a card, or nothing if it has none."""
    match = re.match(rb"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def metadata_errors(card: str) -> list[str]:
    """Return errors in the metadata of a card, by a subset of the checks of the Hub."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return ["the metadata is missing"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not valid YAML: {error}"]
    errors = []
    if not re.fullmatch(r"[a-z0-9.-]+", metadata.get("license", "mit")):
        errors.append(f'"license" must be one of the known ones, not {metadata["license"]!r}')
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            for part, name in itertools.product(("task", "dataset"), ("type", "name")):
                if (part, name) != ("task", "name") and not isinstance(result[part].get(name), str):
                    errors.append(f'"model-index[0].results[0].{part}.{name}" must be a string')
            errors += [
                "a metric lacks type or value" for m in result["metrics"] if not {"type", "value"} <= set(m)
            ]
    return errors


def _entry(path: str, file: File) -> dict:
    entry = {"type": "file", "path": path, "size": len(file.data), "oid": file.oid}
    lfs = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
    return entry | ({"lfs": lfs} if file.large else {})


def _hub_hash(file: File | None) -> str | None:
    return None if file is None else file.sha256 if file.large else file.oid


def _refs_of(kind: str, refs: dict[str, str]) -> list[dict]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]
