"""A local model hub that serves folders: the part of the protocol that huggingface_hub uses, with optional faults.

with hub({"openai/whisper-tiny.en": {"main": folder}}, slow=0.01) as server:
    subprocess.run([...], env=server.env(home))
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Repositories = Mapping[str, Mapping[str, Path]]  # folders by repository and revision
CHUNK = 2**12


@dataclass
class Hub:
    """The folders that are served, the faults to simulate, and the requests that were received.

    slow: seconds of delay before each chunk of 4 KiB of a file.
    breaks: how often the transfer of a file of more than `after` bytes breaks off after that many bytes.
    token: the token that requests must send. gated: whether every file is refused as that of a gated model.
    """

    repositories: Repositories
    slow: float = 0
    breaks: float = 0
    after: int = 20_000
    token: str | None = None
    gated: bool = False
    endpoint: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    tokens: set[str | None] = field(default_factory=set)

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a command that uses this hub, with its own cache and no settings of the user."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSF"))}
        return kept | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | more

    @property
    def fetched(self) -> list[str]:
        """Return the names of the files whose content was requested, without repetition."""
        gets = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return sorted({re.sub(r".*/resolve/[^/]+/", "", path) for path in gets})


def commit(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if "/models/" in path or "/resolve/" in path:  # huggingface_hub also makes other requests
                hub.tokens.add(self.headers.get("Authorization"))
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.refuse(401, "", "Invalid username or password.")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                self.about(match[1], match[2] or "revision", match[3] or "main")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.file(match[1], match[2], match[3])
            else:
                self.refuse(404, "", "Not Found")

        def refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def folder(self, repository: str, revision: str) -> tuple[Path, str] | None:
            """Return the folder and commit of a revision or commit; None after sending an error if there is none."""
            revisions = hub.repositories.get(repository)
            if revisions is None:
                self.refuse(404, "RepoNotFound", "Repository not found")
                return None
            for name, folder in revisions.items():
                if revision in (name, commit(repository, name)):
                    return folder, commit(repository, name)
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None

        def about(self, repository: str, what: str, revision: str) -> None:
            found = self.folder(repository, revision)
            if found is None:
                return
            files = {path.relative_to(found[0]).as_posix(): path for path in sorted(found[0].rglob("*"))}
            files = {name: path for name, path in files.items() if path.is_file()}
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest(path)}
                for name, path in files.items()
            ]
            info = {"id": repository, "sha": found[1], "siblings": [{"rfilename": name} for name in files]}
            body = json.dumps(tree if what == "tree" else info).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def file(self, repository: str, revision: str, name: str) -> None:
            found = self.folder(repository, revision)
            if found is None:
                return
            path = found[0] / name
            if hub.gated:
                self.refuse(403, "GatedRepo", f"Access to model {repository} is restricted")
                return
            if not path.is_file():
                self.refuse(404, "EntryNotFound", "Entry not found")
                return
            content = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            start = int(asked[1]) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("ETag", f'"{digest(path)}"')
            self.send_header("X-Repo-Commit", found[1])
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "GET":
                self.send(content[start:])

        def send(self, content: bytes) -> None:
            end = len(content)
            if hub.breaks and end > hub.after:
                hub.breaks -= 1
                end = hub.after
            for place in range(0, end, CHUNK):
                time.sleep(hub.slow)
                self.wfile.write(content[place : min(place + CHUNK, end)])
            if end < len(content):
                self.close_connection = True

    return Handler


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


@contextmanager
def hub(repositories: Repositories, **options: Any) -> Iterator[Hub]:
    """Serve the folders on a free local port until the context ends."""
    served = Hub(repositories, **options)
    server = Server(("127.0.0.1", 0), _handler(served))
    served.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
