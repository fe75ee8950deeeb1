"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as its own libraries ask of it.

`Hub(folder)` serves folder/models/OWNER/NAME and folder/datasets/OWNER/NAME, each as one commit, called main or COMMIT.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """requests: (method, path, Range) of all that came. breaks_at: from this byte of a file on, its content is refused."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests, self.breaks_at = folder, [], None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self):
        url = urlsplit(self.path)
        self.server.requests.append((self.command, unquote(self.path), self.headers.get("Range")))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "api":
            self._api(parts[1:], parse_qs(url.query))
        elif "resolve" in parts:
            kind = "datasets" if parts[0] == "datasets" else "models"
            owner, name, _, revision, *path = parts[parts[0] == "datasets" :]
            self._file(self.server.folder / kind / owner / name, revision, "/".join(path))
        else:
            self._answer(404, {})

    def _api(self, parts: list[str], query: dict):
        if len(parts) < 3:
            return self._answer(404, {})
        kind, owner, name, what, revision, *path = parts if len(parts) > 3 else [*parts, "revision", "main"]
        root = self.server.folder / kind / owner / name
        if not root.is_dir():
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if what == "tree":
            top = root.joinpath(*path)
            if not top.exists():
                return self._answer(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
            found = sorted(top.rglob("*") if "true" in str(query.get("recursive")).lower() else top.iterdir())
            return self._answer(200, [self._entry(root, file) for file in found])
        if what == "paths-info":
            asked = parse_qs(self.body.decode())
            paths = asked["paths"] if "paths" in asked else json.loads(self.body)["paths"]
            return self._answer(200, [self._entry(root, root / one) for one in paths if (root / one).exists()])
        files = [{"rfilename": file.relative_to(root).as_posix()} for file in sorted(root.rglob("*")) if file.is_file()]
        return self._answer(200, {"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "tags": [], "siblings": files})

    def _entry(self, root: Path, file: Path) -> dict:
        entry = {"path": file.relative_to(root).as_posix(), "type": "directory" if file.is_dir() else "file", "oid": "0" * 40}
        return entry | {"size": file.stat().st_size if file.is_file() else 0}

    def _file(self, root: Path, revision: str, path: str):
        file = root / path
        if not root.is_dir() or revision not in ("main", COMMIT):
            return self._answer(404, {}, {"X-Error-Code": "RevisionNotFound" if root.is_dir() else "RepoNotFound"})
        if not file.is_file():
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            start, _, stop = wanted.removeprefix("bytes=").partition("-")
            if self.server.breaks_at is not None and int(start) >= self.server.breaks_at:
                return self._answer(403, {"error": "no more today"})
            headers["Content-Range"] = f"bytes {start}-{stop or len(data) - 1}/{len(data)}"
            data, status = data[int(start) : int(stop) + 1 if stop else None], 206
        return self._answer(status, data, headers)

    def _answer(self, status: int, body, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
