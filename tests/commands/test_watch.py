"""A page that follows runs: nanostack watch, asked over HTTP; in a browser in test_watch_browser.py."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT

from nanostack.commands.watch import ROWS, TEXTS, Watched
from nanostack.growth import Receipt
from nanostack.runs import Follower, name_of

STAGES = [{"tokens": 1024, "growth": None}, {"tokens": 900, "growth": {"op": "stack"}}]
HEADER = {"config": {"batch_tokens": 256, "stages": STAGES}}
LOSS, VAL = 5, 6  # columns of a row


def record(step: int, **values) -> dict:
    """What train.py writes for a step."""
    at = {"stage": 0, "step": step, "samples": 8 * step, "tokens": 256 * step, "flops": 1e9 * step, "seconds": 0.5 * step}
    return at | {"loss": 5.0 - 0.01 * step, "val_loss": None, "lr": 1e-3, "tokens_per_s": 512.0, "mfu": None} | values


def lines(*records: dict) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


def write(folder: Path, *records: dict, header: dict = HEADER) -> Path:
    """The metrics.jsonl of a run that has made these records."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text(lines(header, *records))
    return path


def replace(path: Path, text: str) -> None:
    """Put another file in the place of this one, as a resumed run does."""
    other = path.with_suffix(".partial")
    other.write_text(text)
    other.replace(path)


class Page:
    """What the page does: it keeps what it has got of a run, and asks for the rest."""

    def __init__(self, watched: Watched):
        self.watched, self.key, self.rows, self.growths, self.texts = watched, "", [], [], []

    def poll(self) -> dict:
        last = self.texts[-1]["number"] if self.texts else 0
        answer = self.watched.answer(self.key, len(self.rows), len(self.growths), last)
        if answer["key"] != self.key:
            self.key, self.rows, self.growths, self.texts = answer["key"], [], [], []
        self.rows[answer["from"] :] = answer["rows"]
        self.growths += answer["growths"]
        self.texts += answer["texts"]
        return answer

    @property
    def losses(self) -> list[float]:
        return [row[LOSS] for row in self.rows]


@pytest.fixture
def page(tmp_path) -> Page:
    return Page(Watched(tmp_path / "run", "run"))


def test_page_gets_only_what_is_new(page, tmp_path):
    path = write(tmp_path / "run", record(1, loss=5.0), record(2, loss=4.0))
    assert len(page.poll()["rows"]) == 2
    with open(path, "a") as file:
        file.write(lines(record(3, loss=3.0)))
    answer = page.poll()
    assert answer["from"] == 1 and len(answer["rows"]) == 2, "the last row, which may stand for more now, and the new one"
    assert page.losses == [5.0, 4.0, 3.0] and len(json.dumps(page.poll())) < 700


def test_line_under_way_is_read_when_it_has_an_end(page, tmp_path):
    path, line = write(tmp_path / "run", record(1)), lines(record(2))
    for part, rows, torn in ((line[:50], 1, True), (line[50:], 2, False)):
        with open(path, "a") as file:
            file.write(part)
        answer = page.poll()
        assert (len(page.rows), answer["torn"], answer["damaged"]) == (rows, torn, [])


@pytest.mark.parametrize("how", [replace, Path.write_text])
@pytest.mark.parametrize("steps", [2, 9], ids=["shorter", "longer"])
def test_resumed_run_leaves_no_old_point(page, tmp_path, how, steps):
    """Also where its file is longer than the old one when it is looked at next, and where it is the same file."""
    path = write(tmp_path / "run", *(record(step, loss=5.0) for step in range(1, 6)))
    page.poll()
    again = [record(step, loss=5.0 if step < 2 else 4.0, seconds=step) for step in range(1, steps + 1)]
    how(path, lines(HEADER, *again))
    page.poll()
    assert page.losses == [one["loss"] for one in again]


def test_file_that_stays_is_never_read_twice(tmp_path):
    path, follower = write(tmp_path, record(1)), Follower(tmp_path)
    assert follower.news().anew and not follower.news().anew
    with open(path, "a") as file:
        file.write(lines(record(2)))
    news = follower.news()
    assert [one["step"] for one in news.records] == [2] and not news.anew and news.header is None


def test_run_that_vanishes_stays_drawn_and_comes_back(page, tmp_path):
    write(tmp_path / "run", record(1), record(2))
    page.poll()
    (tmp_path / "run").rename(tmp_path / "away")
    assert "is gone" in page.poll()["said"] and len(page.rows) == 2
    write(tmp_path / "away", record(1, loss=3.0))
    (tmp_path / "away").rename(tmp_path / "run")
    assert page.poll()["said"] is None and page.losses == [3.0]


def test_run_that_is_to_come_is_waited_for(page, tmp_path):
    assert "is not there yet" in page.poll()["said"]
    (tmp_path / "run").mkdir()
    assert page.poll()["said"] == "has no metrics.jsonl yet; waiting for it"
    write(tmp_path / "run/inner")
    assert "but runs in it: inner" in page.poll()["said"]
    write(tmp_path / "run")
    assert "no record yet" in page.poll()["said"]
    write(tmp_path / "run", record(1))
    assert page.poll()["said"] is None and len(page.rows) == 1


def test_run_is_called_by_its_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here, other = Path("."), Path("other") / tmp_path.name
    assert name_of(here, [here]) == tmp_path.name and name_of(here, [here, other]) == "."
    assert name_of(Path("/"), [Path("/")]) == "/"


def test_damaged_lines_are_told_and_left_out(page, tmp_path):
    path = write(tmp_path / "run", record(1), record(2))
    header, first, second = path.read_bytes().splitlines()
    damage = [first[:40], b"\xff\x00\r[", b"[1]", b'"config"', b"{}", b'{"tokens": NaN}', b"9" * 5000, b"[" * 100_000]
    path.write_bytes(b"\n".join([header, *damage, first, second, b""]))
    assert page.poll()["damaged"] == list(range(2, 2 + len(damage))) and len(page.rows) == 2


def test_values_that_cannot_be_drawn_are_no_values(page, tmp_path):
    odd = record(2, loss="low", lr=float("inf"), val_loss=[1], mfu=10**400, flops=None, texts=7, growth="tall")
    write(tmp_path / "run", record(1, growth=None), odd)
    json.dumps(page.poll(), allow_nan=False)
    assert page.rows[1] == [1, 2, 512, None, 1.0, None, None, None, 512.0, None] and page.texts == []
    assert [growth["said"] for growth in page.growths] == ["growth"]


ENDLESS = {"stages": [{"tokens": float("inf"), "growth": None}], "batch_tokens": 1}


@pytest.mark.parametrize(
    "config", [3, {"stages": 1}, {"stages": [], "batch_tokens": 0}, ENDLESS, ENDLESS | {"batch_tokens": 10**400}]
)
def test_header_that_tells_no_plan_leaves_the_rest(page, tmp_path, config):
    write(tmp_path / "run", record(1), header={"config": config})
    answer = page.poll()
    json.dumps(answer, allow_nan=False)
    assert answer["plan"] in (None, {"batch": 0, "stages": [], "on": "None × None"}) and len(page.rows) == 1


def test_plan_has_the_steps_of_each_stage(page, tmp_path):
    write(tmp_path / "run", record(1))
    plan = page.poll()["plan"]
    assert plan["batch"] == 256 and plan["stages"] == [{"steps": 4, "grows": False}, {"steps": 4, "grows": True}]


@pytest.mark.parametrize("width", [None, {"op": "split", "to": {"d_model": 256}}])
def test_growth_is_told_in_the_words_of_its_receipt(page, tmp_path, width):
    rules = ["kept"] * 2 + ["copied"] * 6
    receipt = Receipt("stack", 4, None, [0, 1] * 4, rules, rc=0.75, width=width, moments=None, noise=0.0)
    receipt.loss_before, receipt.loss_after = 4.0, 4.5
    write(tmp_path / "run", record(1), record(1, loss=None, growth=receipt.as_dict()), record(2))
    page.poll()
    (growth,) = page.growths
    assert growth["said"] == receipt.outcome() and (growth["before"], growth["after"], growth["tokens"]) == (4.0, 4.5, 256)


def test_long_run_is_thinned_with_its_lowest_and_highest(page, tmp_path):
    number = 5 * ROWS + 3
    losses = [3.0 + (step % 7) for step in range(number)]
    losses[777], losses[4242] = 0.5, 99.0  # a spike must not be lost
    write(tmp_path / "run", *(record(step, loss=loss, lr=1e-3) for step, loss in enumerate(losses)))
    answer = page.poll()
    each, curves = answer["each"], [row[LOSS] for row in page.rows]
    assert (each, answer["records"]) == (8, number) and len(page.rows) == -(-number // 8) <= ROWS
    for row, begin in zip(curves, range(0, number, each), strict=True):
        part = losses[begin : begin + each]
        assert row == pytest.approx([sum(part) / len(part), min(part), max(part)], rel=1e-5)
    assert min(low for _, low, _ in curves) == 0.5 and max(high for *_, high in curves) == 99.0
    assert page.rows[-1][:2] == [number % 8, number - 1] and page.rows[-1][7] == 1e-3


def test_long_file_is_read_in_parts(tmp_path):
    path, follower, found = write(tmp_path, *(record(step) for step in range(500))), Follower(tmp_path), []
    while (news := follower.news(limit=10_000)).left:
        found += news.records
    assert [one["step"] for one in found + news.records] == list(range(500)) and path.stat().st_size > 50_000


def test_newest_texts_are_kept(page, tmp_path):
    write(tmp_path / "run", *(record(step, texts=[f"<b>{step}"]) for step in range(TEXTS + 5)))
    page.poll()
    assert [page.texts[0]["texts"], page.texts[-1]["number"], len(page.texts)] == [["<b>5"], TEXTS + 5, TEXTS]


# The command, over HTTP


def command(*arguments: object) -> list[str]:
    """To be run as it is: it starts as fast as a fork of what has imported torch."""
    return [sys.executable, "-m", "nanostack", "watch", *map(str, arguments)]


@contextmanager
def watching(*arguments: object):
    """`nanostack watch ARGUMENTS` at a port that is free: the process and the port."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pipes |= {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}  # ignored in the background
    with subprocess.Popen(command(*arguments, "--port", 0), cwd=ROOT, text=True, **pipes) as process:
        try:
            said = process.stdout.readline()
            assert said, process.stderr.read()
            yield process, int(re.search(r"http://127\.0\.0\.1:(\d+) ", said)[1])
        finally:
            process.kill()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode(), response.headers


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Where one run and one that is to come are watched."""
    folder = tmp_path_factory.mktemp("watched")
    write(folder / "run", record(1), record(2))
    with watching(folder / "run" / "metrics.jsonl", folder / "to_come") as (_, port):
        yield port


def test_page_and_data_are_served(port):
    status, page, headers = ask(port)
    assert status == 200 and "<svg" not in page and "default-src 'none'" in headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)=\"(?!data:,\")|https?://(?!www\.w3\.org/2000/svg)", page), "nothing from elsewhere"
    run, to_come = json.loads(ask(port, "/data")[1])["runs"]
    assert (run["name"], len(run["rows"]), to_come["name"], to_come["rows"]) == ("run", 2, "to_come", [])
    again = json.loads(ask(port, f"/data?have={run['key']}:2:0:0,{to_come['key']}:0:0:0")[1])["runs"][0]
    assert again["from"] == 1 and len(again["rows"]) == 1


@pytest.mark.parametrize("have", ["", ":", "a:b:c:d,e", "x:1:1:1", "x:1:1:1,y:1:1", "%00:-1:-1:-1,y:99999999999999999999:1:1"])
def test_page_that_says_what_it_cannot_have_gets_everything(port, have):
    status, answer, _ = ask(port, f"/data?have={have}")
    assert status == 200 and len(json.loads(answer)["runs"][0]["rows"]) == 2


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1]", ""])
def test_name_of_a_web_page_is_refused(port, host):
    """A page on the web whose name is made to lead here could read what is answered to that name."""
    assert ask(port, "/data", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:80", "LocalHost:6007"])
def test_names_of_this_machine_are_answered(port, host):
    """With any port: a tunnel may have another one at its other end."""
    assert ask(port, "/data", Host=host)[0] == 200


@pytest.mark.parametrize("path", ["/metrics.jsonl", "/../../etc/passwd", "//etc/passwd", "/data/x", "/watch.html"])
def test_no_file_is_served(port, path):
    status, answer, _ = ask(port, path)
    assert status == 404 and len(answer) < 100


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_nothing_but_get_is_answered(port, method):
    assert ask(port, method=method)[0] == 501


def test_machine_is_reached_from_itself_alone(port):
    with socket.socket() as here:
        here.settimeout(5)
        assert here.connect_ex(("127.0.0.1", port)) == 0
    with socket.socket() as other:  # 127.0.0.2 is this machine too, but what listens everywhere would answer there
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", port)) != 0


def test_ctrl_c_ends_it_in_one_line(tmp_path):
    with watching(tmp_path) as (process, port):
        ask(port, "/data")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)
    assert process.returncode == 0 and said == ("\nno longer watched\n", "")


def test_port_in_use_is_named_with_its_option(port, tmp_path):
    refused(f"port {port} is in use: name another by --port", tmp_path, "--port", port)


def test_what_cannot_be_watched_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused("name at least one folder of a run")
    refused("is a file: name the folder of a run", tmp_path / "file")
    for number in (-1, 65536):
        refused(f"--port {number}: a port is a number from 1 to 65535", tmp_path, "--port", number)


def refused(message: str, *arguments: object) -> None:
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_it_starts_without_torch():
    """It starts at once, and takes no memory from a run."""
    code = "import sys, nanostack.commands.watch; print(sorted({'torch', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
