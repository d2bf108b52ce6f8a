"""A Hugging Face Hub on the loopback interface: enough of its protocol for the real client libraries, and faults."""

import base64
import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

HUB_MODEL, DATASET = "google/medasr", "intronhealth/afrispeech-200"
COMMITS = {DATASET: "b538c6e111914a812af28ff677f8cffc9b404b7d"}
DENIED, INVALID = "hf_denied", "hf_bad"  # tokens
LFS_SUFFIXES = {".csv", ".gz", ".parquet", ".ogg", ".wav", ".safetensors", ".bin", ".model", ".kenlm"}
BLOCK = 1 << 16


@functools.cache
def listing(folder):
    """{path: what the tree API says of the file} of a folder, which must not change any more."""
    entries = {}
    for local in sorted(path for path in folder.rglob("*") if path.is_file()):
        content, path = local.read_bytes(), local.relative_to(folder).as_posix()
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if local.suffix in LFS_SUFFIXES:
            sha256 = hashlib.sha256(content).hexdigest()
            entries[path]["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return entries


class HubError(Exception):
    """An answer other than success, as the Hub words it: its `code` makes the client choose the exception."""

    def __init__(self, status, code, message, **headers):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message, **headers}


class LoopbackHub:
    """The server, as a context manager. `models` and `datasets` map Hub ids to folders.

    Files of the `gated` repositories need a token, and not DENIED, as a new repository does; listing files is open to
    all. INVALID is refused everywhere. A repository has the revisions `main` and `commit(name)`. `uploads` has
    (repository, {path: bytes}) for each commit that a client made.
    """

    def __init__(self, models, datasets, gated=()):
        self.folders = {("models", name): folder for name, folder in models.items()}
        self.folders |= {("datasets", name): folder for name, folder in datasets.items()}
        self.gated, self.requests, self.uploads = gated, [], []
        self._faults, self._lock = [], threading.Lock()

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub, self.url = self, f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def env(self, tmp, **extra):
        """Environment of a subprocess that talks to this Hub alone, with its cache and token file under `tmp`."""
        theirs = re.compile(r"HF_|HUGGING|TRANSFORMERS_OFFLINE|XDG_CACHE_HOME|\w+_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not theirs.match(name)}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": f"{tmp}/hf_home", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {**kept, **ours, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **extra}

    def commit(self, name):
        """The commit hash of a repository."""
        return COMMITS.get(name) or hashlib.sha1(name.encode()).hexdigest()

    def count(self, pattern):
        """How many requests had a path that matches the pattern."""
        return sum(fnmatch.fnmatch(log.path, pattern) for log in self.requests)

    def fault(self, pattern, kind, value=None, times=float("inf"), **headers):
        """Let the next `times` GET requests whose path matches the pattern go wrong, by `kind`:
        drop_after, reset_after: close the connection after `value` bytes of the body, or reset it; stall: send nothing
        after them until the client gives up; slow: send `value` bytes per second; status: answer with the HTTP status
        `value`, and with `headers`; corrupt, truncate: serve the file with 16 other bytes in its middle, or as if it
        ended there; missing: answer as for a file that is not in the repository."""
        self._faults.append(SimpleNamespace(pattern=pattern, kind=kind, value=value, times=times, headers=headers))

    def clear(self):
        """Forget faults and requests."""
        self._faults.clear()
        self.requests.clear()

    def next_fault(self, method, path):
        """The first fault that is due for a request, counted as used."""
        with self._lock:
            for fault in self._faults if method == "GET" else ():
                if fault.times > 0 and fnmatch.fnmatch(path, fault.pattern):
                    fault.times -= 1
                    return fault
        return SimpleNamespace(kind=None)


REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"
ROUTES = {  # the one that matches the whole path names the method of Handler
    "info": rf"{API}(?:/revision/(?P<revision>[^/]+))?",
    "tree": rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?",
    "resolve": rf"/(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
    "create_repo": r"/api/repos/create",
    "validate_yaml": r"/api/validate-yaml",
    "preupload": rf"{API}/preupload/main",
    "make_commit": rf"{API}/commit/main",
}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"  # the client keeps connections open

    def handle(self):
        """Serve requests until the client leaves, however it does so."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def answer(self):
        """Log the request, let a fault have its way, and pass the parts of the path to the method of its route."""
        self.hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.log = SimpleNamespace(method=self.command, path=path, range=self.headers.get("Range"), sent=0)
        self.hub.requests.append(self.log)
        self.fault = self.hub.next_fault(self.command, path)
        try:
            if self.fault.kind == "status":
                raise HubError(self.fault.value, "", "Internal Error", **self.fault.headers)
            if self.token == INVALID:
                raise HubError(401, "", "Invalid credentials in Authorization header")
            for route, pattern in ROUTES.items():
                if match := re.fullmatch(pattern, path):
                    return getattr(self, route)(**match.groupdict())
            raise HubError(404, "", "Not found")
        except HubError as error:
            self.send({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = answer

    def repository(self, kind, name, revision):
        """The folder of a repository; an anonymous client cannot tell an unknown one from a private one."""
        if (kind, name) not in self.hub.folders:
            status, message = (404, "Repository not found") if self.token else (401, "Invalid username or password.")
            raise HubError(status, "RepoNotFound", message)
        if revision not in (None, "main", self.hub.commit(name)):
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.hub.folders[kind, name]

    def info(self, kind, name, revision):
        """model_info, dataset_info; open to all even where the files are gated."""
        files = [{"rfilename": path} for path in listing(self.repository(kind, name, revision))]
        self.send({"id": name, "sha": self.hub.commit(name), "tags": [], "siblings": files})

    def tree(self, kind, name, revision, path):
        """list_repo_tree on one page: all files below a folder, or, without `recursive`, what is in it."""
        entries, folder = listing(self.repository(kind, name, revision)).values(), f"{path}/" if path else ""
        found = {entry["path"]: entry for entry in entries if entry["path"].startswith(folder)}
        if path and not found:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on main")
        if "recursive=true" not in urlsplit(self.path).query.lower():
            below = {folder + name[len(folder) :].split("/")[0] for name in found}
            found = {name: found.get(name, {"type": "directory", "path": name, "size": 0}) for name in sorted(below)}
        self.send([{"oid": "0" * 40} | entry for entry in found.values()])

    def resolve(self, kind, name, revision, path):
        """The file itself, with what the client reads from HEAD (commit, ETag, size) and ranges to resume with."""
        folder = self.repository(kind or "models", name, revision)
        if name in self.hub.gated and self.token in ("", DENIED):
            raise HubError(403 if self.token else 401, "GatedRepo", f"Access to {name} is restricted.")
        headers, entry = {"X-Repo-Commit": self.hub.commit(name)}, listing(folder).get(path)
        if entry is None or self.fault.kind == "missing":
            raise HubError(404, "EntryNotFound", "Entry not found", **headers)
        content = (folder / path).read_bytes()
        if self.fault.kind in ("corrupt", "truncate"):
            middle = len(content) // 2
            content = content[:middle] + (bytes(16) + content[middle + 16 :] if self.fault.kind == "corrupt" else b"")
        headers["ETag"] = f'"{entry.get("lfs", entry)["oid"]}"'
        if "Range" not in self.headers:
            return self.send(content, 200, headers)
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
        start, end = int(start), min(int(end or len(content)) + 1, len(content))
        if start >= len(content):
            raise HubError(416, "", "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.send(content[start:end], 206, headers)

    def create_repo(self):
        """Create an empty model repository, or say that there is one."""
        if self.token in ("", DENIED):
            raise HubError(403 if self.token else 401, "", "You may not create this repository.")
        asked = json.loads(self.body)
        repository = "models", f"{asked['organization'] or 'tester'}/{asked['name']}"
        status = 409 if repository in self.hub.folders else 200
        self.hub.folders.setdefault(repository, Path(os.devnull))
        self.send({"url": f"{self.hub.url}/{repository[1]}"}, status)

    def validate_yaml(self):
        self.send({"errors": [], "warnings": []})

    def preupload(self, kind, name):
        """That all files may come in the commit itself, without git LFS."""
        files = [file | {"uploadMode": "regular", "shouldIgnore": False} for file in json.loads(self.body)["files"]]
        self.send({"files": files})

    def make_commit(self, kind, name):
        """Record a commit, whose lines bring the files."""
        lines = [line["value"] for line in map(json.loads, self.body.splitlines()) if line["key"] == "file"]
        self.hub.uploads.append((name, {line["path"]: base64.b64decode(line["content"]) for line in lines}))
        commit = self.hub.commit(name)
        self.send({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def send(self, body, status=200, headers=None):
        """The answer, as JSON unless `body` is bytes, with the fault that is due for it."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks_off = self.fault.kind in ("drop_after", "reset_after", "stall") and self.fault.value < len(body)
        end = self.fault.value if breaks_off else len(body)
        for start in range(0, end, BLOCK):
            self.log.sent += self.wfile.write(body[start : min(end, start + BLOCK)])
            if self.fault.kind == "slow":
                time.sleep(BLOCK / self.fault.value)
        if not breaks_off:
            return
        self.close_connection = True  # wait for the client to leave (stall), reset the connection, or just close it
        if self.fault.kind == "stall":
            self.rfile.read(1)
        elif self.fault.kind == "reset_after":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def log_message(self, *_):
        """Nothing on stderr: the log is `LoopbackHub.requests`."""
