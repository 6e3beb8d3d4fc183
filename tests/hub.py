"""A stand-in for the Hugging Face Hub on 127.0.0.1: just what snapshot_download asks for."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Hub:
    """Repositories by id, each {revision: directory}; requests are listed in `asked`."""

    def __init__(self, repos: dict[str, dict[str, Path]]):
        self.repos = repos
        self.asked: list[str] = []
        self.url = ""

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit of a revision (or of a commit itself); None where there is none."""
        commits = {name: _sha(f"{repo}@{name}") for name in self.repos[repo]}
        return revision if revision in commits.values() else commits.get(revision)

    def directory(self, repo: str, commit: str) -> Path:
        """The files of a commit."""
        return next(d for name, d in self.repos[repo].items() if _sha(f"{repo}@{name}") == commit)


def _sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _answer(hub: Hub, parts: list[str]) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of a path's parts."""
    api = parts[:2] == ["api", "models"]
    parts = parts[2:] if api else parts
    repo, rest = "/".join(parts[:2]), parts[2:]
    if repo not in hub.repos:
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    commit = hub.commit(repo, rest[1] if len(rest) > 1 else "main")
    if commit is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    directory = hub.directory(repo, commit)
    files = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
    if not api:
        path = files.get("/".join(rest[2:]))
        if rest[:1] != ["resolve"] or path is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        data = path.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, data
    if rest[:1] == ["tree"]:
        found = [
            {"type": "file", "path": name, "oid": _sha(name), "size": path.stat().st_size}
            for name, path in files.items()
        ]
        return 200, {}, json.dumps(found).encode()
    siblings = [{"rfilename": name} for name in files]
    about = {"_id": "0", "id": repo, "sha": commit, "siblings": siblings, "private": False}
    return 200, {}, json.dumps(about).encode()


@contextlib.contextmanager
def serve(repos: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    """A running hub with these repositories."""
    hub = Hub(repos)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            """Answers a request, body and all."""
            path = unquote(self.path.split("?")[0])
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = _answer(hub, path.strip("/").split("/"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Keeps the tests' output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
