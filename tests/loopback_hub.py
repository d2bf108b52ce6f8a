"""A Hugging Face Hub on the loopback interface: enough of its protocol for the real client libraries, faults included.

python tests/loopback_hub.py [--token_required]    # serve the fixtures until interrupted, for use by hand

with LoopbackHub(token_required={"google/medasr"}) as hub:
    hub.fault("*/train_igbo_0.tar.gz", "drop_after", 12_000_000, times=2)
    subprocess.run(command, env=hub.env(tmp_path, HF_TOKEN="hf_any"))
    assert hub.count("*/train_igbo_0.tar.gz", "GET") == 3
"""

import argparse
import contextlib
import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
import select
import shutil
import socket
import struct
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

FIXTURES = Path(__file__).resolve().parent / "fixtures"
MODEL, DATASET = "google/medasr", "intronhealth/afrispeech-200"
COMMITS = {DATASET: "b538c6e111914a812af28ff677f8cffc9b404b7d"}
LFS_SUFFIXES = {".csv", ".gz", ".safetensors", ".bin", ".model", ".kenlm"}
HUB_RATE = 44100
BLOCK = 1 << 16

# ---- The corpus as the Hub has it ------------------------------------------------------------------------------------

SCRIPT = '"""Loading script."""\nimport datasets\n\n\nclass AfriSpeech(datasets.GeneratorBasedBuilder):\n    pass\n'
README = "---\nlicense: cc-by-nc-sa-4.0\ntask_categories:\n- automatic-speech-recognition\n---\n# AfriSpeech-200\n"


def hub_copy(corpus_dir, out_dir):
    """Copy a corpus of small .ogg clips with the Hub's kind of audio, 44.1 kHz stereo WAV; returns `out_dir`.

    The same corpus gives the same bytes. Clips that cannot be decoded keep their bytes under the .wav name.
    """
    corpus_dir, out_dir = Path(corpus_dir), Path(out_dir)
    sources = [path for path in sorted(corpus_dir.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda source: _copy_file(source, out_dir / source.relative_to(corpus_dir)), sources))
    (out_dir / "afrispeech-200.py").write_text(SCRIPT)  # `datasets` refuses a repository with a script
    (out_dir / "README.md").write_text(README)
    (out_dir / ".gitattributes").write_text("*.tar.gz filter=lfs diff=lfs merge=lfs -text\n*.csv filter=lfs -text\n")
    return out_dir


def _copy_file(source, target):
    """Copy one file of the corpus, with .wav for .ogg in archives and in the paths of CSVs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.name.endswith(".tar.gz"):
        _copy_archive(source, target)
    elif source.suffix == ".csv":
        target.write_bytes(re.sub(rb"(/AfriSpeech-100/[^,\"\n]*)\.ogg", rb"\1.wav", source.read_bytes()))
    else:
        shutil.copyfile(source, target)


def _copy_archive(source, target):
    """Write an archive again with its clips as WAV."""
    with (
        tarfile.open(source) as clips,
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", 1, raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for clip in clips:
            wav = _hub_wav(clips.extractfile(clip).read())
            member = tarfile.TarInfo(re.sub(r"\.ogg$", ".wav", clip.name))
            member.size = len(wav)
            tar.addfile(member, io.BytesIO(wav))


def _hub_wav(audio):
    """The bytes of a 44.1 kHz stereo PCM16 WAV of an encoded clip; the two channels differ a little in level."""
    import numpy as np
    import soundfile
    import soxr

    try:
        samples, rate = soundfile.read(io.BytesIO(audio), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return audio
    mono = soxr.resample(samples.mean(axis=1), rate, HUB_RATE)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([mono, 0.9 * mono], axis=1), HUB_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


# ---- Repositories ----------------------------------------------------------------------------------------------------


class HubError(Exception):
    """An answer other than success, as the Hub words it: its `code` makes the client choose the exception."""

    def __init__(self, status, code, message, commit=None):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message}
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {"X-Repo-Commit": commit} if commit else {}


class Repository:
    """A local folder as a repository of one commit, which `main` points to."""

    def __init__(self, kind, name, folder):
        self.kind, self.name, self.folder = kind, name, Path(folder)
        self.commit = COMMITS.get(name) or hashlib.sha1(f"{kind}/{name}".encode()).hexdigest()
        self._entries = {}

    def files(self):
        """{path in the repository: local path}."""
        return {
            path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()
        }

    def entry(self, path, local):
        """What the tree API says of one file; an LFS file has the oid of its pointer and the SHA-256 of its content."""
        state = local.stat()
        key = (path, state.st_size, state.st_mtime_ns)
        if key not in self._entries:
            content, entry = local.read_bytes(), {"type": "file", "path": path, "size": state.st_size}
            if local.suffix in LFS_SUFFIXES:
                sha256 = hashlib.sha256(content).hexdigest()
                content = (
                    f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {state.st_size}\n".encode()
                )
                entry["lfs"] = {"oid": sha256, "size": state.st_size, "pointerSize": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self._entries[key] = entry
        return self._entries[key]

    def tree(self, folder="", recursive=False):
        """The tree API's entries below a folder of the repository, folders included."""
        root = Path(folder)
        files = {Path(path): local for path, local in self.files().items() if root in Path(path).parents}
        if not files:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on main", self.commit)
        folders = {parent for path in files for parent in path.parents if root in parent.parents}
        entries = [
            {"type": "directory", "path": path.as_posix(), "size": 0, "oid": hashlib.sha1(bytes(path)).hexdigest()}
            for path in sorted(folders)
        ] + [self.entry(path.as_posix(), local) for path, local in files.items()]
        return [entry for entry in entries if recursive or Path(entry["path"]).parent == root]

    def info(self, gated):
        """What model_info and dataset_info read."""
        return {
            "id": self.name,
            "sha": self.commit,
            "private": False,
            "disabled": False,
            "gated": "auto" if gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in self.files()],
        }


# ---- The server ------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One line of the request log; `sent` counts the bytes of the body."""

    method: str
    path: str
    range: str | None
    authorized: bool
    status: int = 0
    sent: int = 0


class LoopbackHub:
    """The server, as a context manager. `models` and `datasets` map Hub ids to folders; by default, to the fixtures.

    Files of the `token_required` repositories are gated: they need a token, and not one of `denied_tokens`; listing them
    is open to all. `invalid_tokens` are refused everywhere. A repository has the revisions `main` and `commit(name)`.
    """

    def __init__(self, models=None, datasets=None, token_required=(), denied_tokens=(), invalid_tokens=()):
        self._folders = {"models": {MODEL: FIXTURES / "model"} if models is None else models, "datasets": datasets}
        self.token_required, self.denied_tokens, self.invalid_tokens = token_required, denied_tokens, invalid_tokens
        self.requests, self.stopping = [], threading.Event()
        self._faults, self._lock, self._temporary = [], threading.Lock(), None

    def __enter__(self):
        if self._folders["datasets"] is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="hub-")
            self._folders["datasets"] = {DATASET: hub_copy(FIXTURES / "corpus", self._temporary.name)}
        self.repositories = {
            (kind, name): Repository(kind, name, folder)
            for kind, folders in self._folders.items()
            for name, folder in folders.items()
        }
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads, self._server.block_on_close, self._server.hub = True, False, self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        if self._temporary:
            self._temporary.cleanup()

    def env(self, tmp, **extra):
        """Environment variables of a subprocess that talks to this Hub alone, with its cache and token file under `tmp`."""
        ours = re.compile(r"HF_|HUGGING|TRANSFORMERS_OFFLINE|XDG_CACHE_HOME|\w+_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(Path(tmp) / "hf_home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            **extra,
        }

    def commit(self, name):
        """The commit hash of a repository."""
        return next(repo.commit for repo in self.repositories.values() if repo.name == name)

    def count(self, pattern, method=None):
        """How many requests had a path that matches the pattern."""
        return sum(
            fnmatch.fnmatch(request.path, pattern) and method in (None, request.method) for request in self.requests
        )

    def fault(self, pattern, kind, value=None, times=float("inf"), method=None):
        """Let the next `times` requests (default: all) whose URL path matches the pattern go wrong, only of `method` if given.

        drop_after  close the connection after `value` bytes of a file's body (default: half)
        reset_after the same with a TCP reset
        stall       send `value` bytes of the body (default: half), then nothing until the client gives up
        status      answer with the HTTP status `value` (default 500)
        corrupt     flip 16 bytes of the file at `value` (default: its middle)
        truncate    serve the file as if it ended at `value` (default: its middle)
        missing     404, as for a file that is not in the repository
        slow        `value` bytes per second
        """
        if kind not in "drop_after reset_after status stall corrupt truncate missing slow".split():
            raise ValueError(kind)
        if kind not in ("status", "missing", "truncate"):
            method = "GET"  # what happens to a body
        with self._lock:
            self._faults.append(SimpleNamespace(pattern=pattern, kind=kind, value=value, times=times, method=method))

    def clear_faults(self):
        with self._lock:
            self._faults.clear()

    def next_fault(self, method, path):
        """The first fault that is due for a request, counted as used."""
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.method in (None, method) and fnmatch.fnmatch(path, fault.pattern):
                    fault.times -= 1
                    return fault
        return SimpleNamespace(kind=None, value=None)

    def repository(self, kind, name, revision, token):
        """The repository, or the Hub's answer to an unknown one: an anonymous client cannot tell it from a private one."""
        if token in self.invalid_tokens:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        if (repo := self.repositories.get((kind, name))) is None:
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise HubError(status, "RepoNotFound", message)
        if revision not in (None, "main", repo.commit):
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo

    def check_access(self, repo, token):
        """Raise the Hub's answer for a gated repository that the token does not open."""
        restricted = f"Access to {repo.kind[:-1]} {repo.name} is restricted"
        if repo.name in self.token_required and not token:
            raise HubError(
                401,
                "GatedRepo",
                f"{restricted}. You must have access to it and be authenticated to access it. Please log in.",
            )
        if repo.name in self.token_required and token in self.denied_tokens:
            raise HubError(
                403,
                "GatedRepo",
                f"{restricted} and you are not in the authorized list. Visit "
                f"https://huggingface.co/{repo.name} to ask for access.",
            )


REPO = r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"
ROUTES = {  # the first that matches the whole path names the method of Handler
    "whoami": r"/api/whoami-v2",
    "auth_check": rf"{API}/auth-check",
    "tree": rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?",
    "paths_info": rf"{API}/paths-info/(?P<revision>[^/]+)",
    "info": rf"{API}(?:/revision/(?P<revision>[^/]+))?",
    "resolve": rf"/(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
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
        self.hub, url = self.server.hub, urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.request_log = Request(self.command, unquote(url.path), self.headers.get("Range"), bool(self.token))
        self.hub.requests.append(self.request_log)
        self.fault = self.hub.next_fault(self.command, unquote(url.path))
        try:
            if self.fault.kind == "status":
                raise HubError(self.fault.value or 500, None, "Internal Error")
            for route, pattern in ROUTES.items():
                if match := re.fullmatch(pattern, url.path):
                    return getattr(self, route)(
                        **{key: value and unquote(value) for key, value in match.groupdict().items()}
                    )
            raise HubError(404, None, "Not found")
        except HubError as error:
            self.send_json({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = answer

    def whoami(self):
        """Who the token belongs to."""
        if not self.token or self.token in self.hub.invalid_tokens:
            raise HubError(401, None, "Invalid username or password.")
        self.send_json(
            {
                "type": "user",
                "name": "tester",
                "fullname": "Tester",
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": "read"}},
            }
        )

    def auth_check(self, kind, name):
        """Whether the token opens the repository's files."""
        self.hub.check_access(self.hub.repository(kind, name, None, self.token), self.token)
        self.send_json({})

    def info(self, kind, name, revision):
        """model_info, dataset_info; open to all even where the files are gated."""
        self.send_json(self.hub.repository(kind, name, revision, self.token).info(name in self.hub.token_required))

    def tree(self, kind, name, revision, path):
        """list_repo_tree: all entries on one page."""
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        self.send_json(self.hub.repository(kind, name, revision, self.token).tree(path or "", recursive))

    def paths_info(self, kind, name, revision):
        """get_paths_info, which HfFileSystem asks before it opens a file; paths that do not exist are left out."""
        entries = {
            entry["path"]: entry for entry in self.hub.repository(kind, name, revision, self.token).tree(recursive=True)
        }
        self.send_json([entries[path] for path in self.form.get("paths", []) if path in entries])

    def resolve(self, kind, name, revision, path):
        """The file itself, with what the client reads from HEAD (commit, ETag, size) and ranges to resume with."""
        repo = self.hub.repository(kind or "models", name, revision, self.token)
        self.hub.check_access(repo, self.token)
        local = repo.files().get(path)
        if local is None or self.fault.kind == "missing":
            raise HubError(404, "EntryNotFound", "Entry not found", repo.commit)
        entry = repo.entry(path, local)
        size = entry["size"]
        if self.fault.kind == "truncate":
            size = min(size, size // 2 if self.fault.value is None else self.fault.value)
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {
                "X-Linked-Size": size,
                "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"',
                "ETag": f'"{entry["lfs"]["oid"]}"',
            }
        start, end = self.byte_range(size)
        if self.headers.get("Range"):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}" if start < end else f"bytes */{size}"
            if start >= end:
                return self.send_json({"error": "Range not satisfiable"}, 416, headers)
        headers |= {"Content-Type": "application/octet-stream", "Content-Length": end - start}
        self.send_head(206 if self.headers.get("Range") else 200, headers)
        if self.command == "GET":
            self.send_file(local, start, end)

    def byte_range(self, size):
        """(start, end) of the single range asked for: bytes=a-, bytes=a-b or bytes=-n; all of the file without one."""
        first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-")).groups()
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(size, int(last) + 1) if last else size

    def send_head(self, status, headers):
        self.request_log.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def send_json(self, answer, status=200, headers=None):
        body = json.dumps(answer).encode()
        self.send_head(status, {**(headers or {}), "Content-Type": "application/json", "Content-Length": len(body)})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.request_log.sent += len(body)

    def send_file(self, local, start, end):
        """The body of a file, with the fault that is due for it."""
        kind, value, stop = self.fault.kind, self.fault.value, end
        if kind in ("drop_after", "reset_after", "stall"):
            stop = (start + end) // 2 if value is None else min(end, start + value)
        block = max(1, value // 20) if kind == "slow" else BLOCK
        with local.open("rb") as file:
            file.seek(start)
            while start < stop and not self.hub.stopping.is_set():
                data = file.read(min(block, stop - start))
                self.wfile.write(self.flipped(data, start, local) if kind == "corrupt" else data)
                self.request_log.sent += len(data)
                start += len(data)
                if kind == "slow":
                    time.sleep(len(data) / value)
        if start < end:
            self.break_off()

    def flipped(self, data, start, local):
        """A block of the file that begins at `start`, damaged where the fault says."""
        offset = (local.stat().st_size // 2 if self.fault.value is None else self.fault.value) - start
        first, last = max(0, offset), max(0, offset + 16)
        return data[:first] + bytes(byte ^ 0xFF for byte in data[first:last]) + data[last:]

    def break_off(self):
        """End a body too early: wait for the client to leave (stall), reset the connection, or just close it."""
        self.close_connection = True
        while self.fault.kind == "stall" and not self.hub.stopping.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.1)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                break
        if self.fault.kind == "reset_after":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def log_message(self, *_):
        """Nothing on stderr: the log is `LoopbackHub.requests`."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token_required", action="store_true", help="gate the model: any token but 'denied' opens it")
    args = parser.parse_args()
    with LoopbackHub(token_required={MODEL} if args.token_required else (), denied_tokens={"denied"}) as hub:
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
