"""A Hub in this process: serves repositories that are dictionaries of files, by the requests of huggingface_hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class FakeHub:
    """The address of a Hub and what it has; a test changes it as it goes."""

    url: str = ""
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    """By repository (`datasets/a/b`, `a/b`) and branch: its commit."""
    commits: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """By repository and commit: its files."""
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    status: int = 200
    """What every request is answered with, if it is not 200."""

    def push(self, repository: str, files: dict[str, str | bytes], branch: str = "main") -> str:
        """Make a commit that has these files; returns its name."""
        content = {path: text if isinstance(text, bytes) else text.encode() for path, text in files.items()}
        commit = hashlib.sha1(repr((repository, sorted(content.items()))).encode()).hexdigest()
        self.branches.setdefault(repository, {})[branch] = commit
        self.commits[repository, commit] = content
        return commit

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of the answer to a request."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        api = parts[0] == "api"
        if api:
            parts = parts[1 + (parts[1] == "models") :]
        count = 2 + (parts[0] == "datasets")
        repository, (action, *rest) = "/".join(parts[:count]), parts[count:] or ("revision", "main")
        if repository not in self.branches:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commits = self.branches[repository]
        commit = commits.get(rest[0], rest[0])
        if (repository, commit) not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files, place = self.commits[repository, commit], "/".join(rest[1:])
        if action == "revision":
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": [], "tags": []}).encode()
        if action == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            return 200, {}, json.dumps([_entry(path, files[path]) for path in wanted if path in files]).encode()
        if action == "tree":
            below = {path: data for path, data in files.items() if path.startswith(f"{place}/" if place else "")}
            if not below:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            # In the order in which they were pushed: nobody may rely on the order of an answer.
            return 200, {}, json.dumps([_entry(path, data) for path, data in below.items()]).encode()
        assert action == "resolve"
        headers = {"X-Repo-Commit": commit}
        if repository in self.gated:
            return 403, {**headers, "X-Error-Code": "GatedRepo"}, b""
        if place not in files:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        return 200, {**headers, "ETag": f'"{hashlib.sha1(files[place]).hexdigest()}"'}, files[place]


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve an empty Hub on loopback."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, content = (
                (hub.status, {}, b"") if hub.status != 200 else hub.answer(self.command, self.path, body)
            )
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = _respond  # noqa: N815 - the names that http.server calls

        def log_message(self, *_: object) -> None:
            """Nothing: standard error is the test's."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
