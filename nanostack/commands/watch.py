"""Watch runs while they train: `nanostack watch RUN... [--port 6007]`.

Serves one page on this machine (127.0.0.1), until Ctrl-C: losses, learning rate, throughput and MFU over FLOPs, tokens or
seconds, growth marked, what the models wrote, how far each run is. It reads metrics.jsonl: a run need not know of it, and may
be under way, over, resumed, or not begun. For a run on another machine: `ssh -L 6007:127.0.0.1:6007 HOST`.
"""

import errno
import json
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import tyro

from nanostack.errors import UserError, command_line
from nanostack.runs import Follower, name_of

PLACES = ("step", "tokens", "flops", "seconds")  # where a record is
CURVES = ("loss", "val_loss", "lr", "tokens_per_s", "mfu")  # and what is drawn of it
ROWS = 2000  # at most of a run: more than a screen has columns
TEXTS = 200  # the newest, of what a run wrote
HUGE = 1e200  # and beyond: no number that a run records
HOSTS = ("localhost", "127.0.0.1")  # other names that lead here are those of web pages that want to read along


@dataclass(frozen=True)
class Command:
    """Watch runs in the browser while they train."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, which need not be there yet."""
    port: int = 6007
    """The page is at http://127.0.0.1:PORT. 0 takes a port that is free."""
    json: bool = False
    """When it has ended, print what was watched, and where, as one JSON object."""


def number(value: Any) -> float | None:
    return value if type(value) in (int, float) and abs(value) < HUGE else None


def where(record: dict) -> dict[str, float | None]:
    return {name: number(record.get(name)) for name in PLACES}


def add(row: list, record: dict) -> None:
    """Make `row` stand for this record too: [records, *PLACES of the last one, *CURVES], a curve being None or [sum, count,
    lowest, highest]."""
    row[0] += 1
    for i, name in enumerate(PLACES, 1):
        row[i] = number(record.get(name))
    for i, name in enumerate(CURVES, 1 + len(PLACES)):
        if (value := number(record.get(name))) is None:
            continue
        if (curve := row[i]) is None:
            row[i] = [value, 1, value, value]
            continue
        curve[0] += value
        curve[1] += 1
        if value < curve[2]:
            curve[2] = value
        elif value > curve[3]:
            curve[3] = value


def merge(row: list, later: list) -> list:
    """A row that stands for the records of both."""
    curves = zip(row[1 + len(PLACES) :], later[1 + len(PLACES) :], strict=True)
    both = [[a[0] + b[0], a[1] + b[1], min(a[2], b[2]), max(a[3], b[3])] if a and b else a or b for a, b in curves]
    return [row[0] + later[0], *later[1 : 1 + len(PLACES)], *both]


def shown(row: list) -> list:
    """A row as the page gets it: a curve is None, a value, or [mean, lowest, highest], in six digits."""
    curves = ((one[0] / one[1], *one[2:]) if one else (None,) for one in row[1 + len(PLACES) :])
    rounded = ([value if value is None else float(f"{value:.6g}") for value in one] for one in curves)
    return [*row[: 1 + len(PLACES)], *(one if len(set(one)) > 1 else one[0] for one in rounded)]


def growth_of(record: dict) -> dict:
    """Where a growth was, and what it did, in the words of Receipt.outcome: a receipt is at home where torch is."""
    try:
        receipt = record["growth"]
        width = receipt["width"]
        size = f"{len(receipt['rules'])} layers" + (f" × {width['to']['d_model']}" if width else "")
        said = " and ".join(filter(None, [receipt["op"], f"{width['op']} in width" if width else ""])) + f" to {size}"
    except (KeyError, TypeError):
        said = "growth"
    losses = record["growth"] if isinstance(record["growth"], dict) else {}
    about = {"said": said, "before": number(losses.get("loss_before")), "after": number(losses.get("loss_after"))}
    return about | where(record)


def plan_of(header: dict) -> dict | None:
    """What the header tells about the way ahead: for each stage its steps and whether it begins with a growth."""
    try:
        config = header["config"]
        batch, each = config["batch_tokens"], [(stage["tokens"], bool(stage["growth"])) for stage in config["stages"]]
        if any(type(tokens) is not int or number(tokens) is None for tokens in (batch, *(tokens for tokens, _ in each))):
            return None
        stages = [{"steps": -(-tokens // batch), "grows": grows} for tokens, grows in each]
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    return {"batch": batch, "stages": stages, "on": f"{header.get('world_size')} × {header.get('device')}"}


class Watched:
    """A run as the page shows it, in at most ROWS rows, however long it is.

    Each row stands for `each` records. When there are too many rows, two become one. The `key` changes whenever rows that
    the page has no longer hold.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self._follower, self._lock = folder, name, Follower(folder), threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._began, self._each, self._n = time.time_ns(), 1, 0
        self._left, self._torn = 0, False  # bytes of the file that are still to be read; whether its last line has no end
        self._plan: dict | None = None
        self._rows: list[list] = []
        self._growths: list[dict] = []
        self._damaged: list[int] = []  # numbers of lines, the first ones
        self._texts: deque[dict] = deque(maxlen=TEXTS)
        self._wrote = 0

    def answer(self, key: str = "", rows: int = 0, growths: int = 0, texts: int = 0) -> dict[str, Any]:
        """What is new for a page that has so many rows, growths and texts under this key; its last row may have changed."""
        with self._lock:
            said, age = self._read()
            now = f"{self._began:x}.{self._each}"
            rows, growths, texts = (max(0, rows - 1), growths, texts) if key == now else (0, 0, 0)
            return {
                "name": self.name,
                "said": said,
                "age": age,
                "left": self._left,
                "torn": self._torn,
                "damaged": self._damaged,
                "records": self._n,
                "each": self._each,
                "plan": self._plan,
                "key": now,
                "from": rows,
                "rows": [shown(row) for row in self._rows[rows:]],
                "growths": self._growths[growths:],
                "texts": [text for text in self._texts if text["number"] > texts],
            }

    def _read(self) -> tuple[str | None, float | None]:
        """Take in what is new. Why that is not possible, or else None; the seconds since the file was written to."""
        try:
            news = self._follower.news()
            age = time.time() - self._follower.path.stat().st_mtime
        except FileNotFoundError:
            if self._n:
                return "is gone; what is drawn is what it had, until it is back", None
            runs = sorted(file.parent.name for file in self.folder.glob("*/metrics.jsonl"))
            said = f"has no metrics.jsonl yet, but runs in it: {', '.join(runs)}" if runs else "has no metrics.jsonl yet"
            return (said if self.folder.is_dir() else "is not there yet") + "; waiting for it", None
        except OSError as error:
            return f"cannot be read: {error.strerror}", None
        if news.anew:
            self._forget()
        if news.header:
            self._plan = plan_of(news.header)
        self._left, self._torn, self._damaged = news.left, news.torn, (self._damaged + news.damaged)[:20]
        for record in news.records:
            self._take(record)
        return None if self._n or news.left else "has no record yet; waiting for it", age

    def _take(self, record: dict) -> None:
        if not self._rows or self._rows[-1][0] == self._each:
            if len(self._rows) == ROWS:
                self._rows = list(map(merge, self._rows[::2], self._rows[1::2]))
                self._each *= 2
            self._rows.append([0, *[None] * len(PLACES + CURVES)])
        add(self._rows[-1], record)
        self._n += 1
        if record.get("growth"):
            self._growths.append(growth_of(record))
        if isinstance(texts := record.get("texts"), list):
            self._wrote += 1
            self._texts.append({"number": self._wrote, "texts": list(map(str, texts))} | where(record))


class Server(ThreadingTCPServer):
    """A web server for this machine alone. Not HTTPServer, which asks the network for this machine's name."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int, folders: list[Path]):
        self.runs = [Watched(folder, name_of(folder, folders)) for folder in folders]
        self.page = files("nanostack.commands").joinpath("watch.html").read_bytes()
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a page that has been closed waits for no answer
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the page and GET /data with what is new for it."""

    server: Server
    protocol_version, timeout = "HTTP/1.1", 60

    def do_GET(self) -> None:
        url, hosts = urlsplit(self.path), self.headers.get_all("Host", [])
        if [host.partition(":")[0].lower() in HOSTS for host in hosts] != [True]:
            self.reply(403, "text/plain", b"this page is for localhost alone\n")
        elif url.path == "/":
            self.reply(200, "text/html; charset=utf-8", self.server.page)
        elif url.path == "/data":
            runs = [run.answer(*have) for run, have in zip(self.server.runs, self.had(url.query), strict=True)]
            self.reply(200, "application/json", json.dumps({"runs": runs}, allow_nan=False).encode())
        else:
            self.reply(404, "text/plain", b"there are / and /data\n")

    def had(self, query: str) -> list[tuple]:
        """What the page has of each run: `have=KEY:ROWS:GROWTHS:TEXTS,...`. Nothing, where it does not say so."""
        nothing: list[tuple] = [()] * len(self.server.runs)
        try:
            each = (one.split(":") for one in parse_qs(query)["have"][0].split(","))
            had: list[tuple] = [(key, int(rows), int(growths), int(texts)) for key, rows, growths, texts in each]
        except (KeyError, ValueError):
            return nothing
        return had if len(had) == len(nothing) else nothing

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        allowed = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        headers |= {"Content-Security-Policy": f"{allowed}; frame-ancestors 'none'", "X-Content-Type-Options": "nosniff"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing is printed for a request: there are many."""


def main(command: Command) -> dict:
    if not command.runs:
        raise UserError("name at least one folder of a run")
    if not 0 <= command.port <= 65535:
        raise UserError(f"--port {command.port}: a port is a number from 1 to 65535, or 0 for any that is free")
    folders = list(dict.fromkeys(path.parent if path.name == "metrics.jsonl" else path for path in command.runs))
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: name the folder of a run")
    try:
        server = Server(command.port, folders)
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be taken ({error.strerror})"
        raise UserError(f"port {command.port} {why}: name another by --port, or --port 0 for any that is free") from error
    url = f"http://127.0.0.1:{server.server_address[1]}"
    names = ", ".join(map(str, folders))
    print(f"{names}: to be watched at {url} until Ctrl-C", file=sys.stderr if command.json else sys.stdout, flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            if not command.json:
                print("\nno longer watched")
    return {"url": url, "runs": [str(folder) for folder in folders]}


def run() -> None:
    command_line(Command, main, __doc__)
