"""What several test files share: one small prepared corpus of real text, and ways to run the real train.py."""

import atexit
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dry_gpu
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests/tiny.py")
READ_AT_IMPORT = {"CXX", "TRITON_INTERPRET"}  # variables that torch and Triton read when they are imported

# One thread per process: many small processes share two cores, and sums must be taken in the same order everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser):
    said = "compile what gpu tests launch for these architectures, by comma (sm_90,sm_80), and run nothing (tests/dry_gpu.py)"
    parser.addoption("--dry-gpu", metavar="ARCHITECTURES", help=said)


def pytest_configure(config):
    if config.option.dry_gpu is not None:
        try:
            config.pluginmanager.register(dry_gpu.DryRun(config.option.dry_gpu), "dry-gpu")
        except ValueError as error:
            raise pytest.UsageError(f"--dry-gpu: {error}") from error


@pytest.hookimpl(trylast=True)  # behind the reporter's own dot or letter
def pytest_runtest_logreport(report):
    """Tell what failed when it fails: a run that is cut still has said it."""
    if report.failed and _reporter:
        crash = getattr(report.longrepr, "reprcrash", None)
        said = (crash.message if crash else str(report.longrepr)).splitlines() or [""]
        _reporter[0].ensure_newline()
        _reporter[0].write_line(f"failed: {report.nodeid}: {said[0][:300]}")


def pytest_sessionstart(session):
    _reporter[:] = filter(None, [session.config.pluginmanager.get_plugin("terminalreporter")])


_reporter = []


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available() and not dry_gpu.active:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: "slow" not in item.keywords)  # whatever takes longest begins first: no worker waits for another


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Some modules of the standard library, prepared by the real command."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = [Path(os.__file__).with_name(name) for name in ("argparse.py", "ast.py", "bdb.py", "cgi.py", "cmd.py", "code.py")]
    sources += [Path(os.__file__).with_name("json"), Path(os.__file__).with_name("email")]
    sources = [str(source) for source in sources if source.exists()]
    command = [sys.executable, "-m", "nanostack", "prepare", *sources, "--out", str(folder / "data"), "--tokenizer", "bpe:300"]
    subprocess.run([*command, "--val_fraction", "0.2"], check=True, capture_output=True, cwd=ROOT)
    return folder / "data"


class Forks:
    """Starts Python commands, each in a process of its own that need not import torch (tests/forks.py)."""

    server: subprocess.Popen | None = None

    def ask(self, request: dict) -> int | None:
        if self.server is None or self.server.poll() is not None:
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, str(ROOT / "tests/forks.py")]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.server = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
            atexit.register(self.server.communicate)  # which ends it
        try:
            print(json.dumps(request), file=self.server.stdin, flush=True)
            return json.loads(self.server.stdout.readline())
        except BaseException:  # pytest's own timeout too: nothing is left that would answer the next request
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()
            raise


forks = Forks()


class Forked:
    """A command under way, with as much of subprocess.Popen as the tests ask for. Its streams are files."""

    def __init__(self, words: list[object], cwd: Path, env: dict, input: str, one_stream: bool):
        self.words, self.returncode = [str(word) for word in words], None
        self.stdin, self.stdout, self.stderr = (tempfile.NamedTemporaryFile("w+") for _ in range(3))  # noqa: SIM115
        self.stdin.write(input)
        self.stdin.flush()
        names = {"in": self.stdin.name, "out": self.stdout.name, "err": (self.stdout if one_stream else self.stderr).name}
        self.pid = forks.ask({"argv": self.words, "cwd": str(cwd), "env": {**os.environ, **env}, **names})

    def poll(self, wait: bool = False) -> int | None:
        if self.returncode is None:
            self.returncode = forks.ask({"pid": self.pid, "wait": wait})
        return self.returncode

    def wait(self) -> int:
        return self.poll(wait=True)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def done(self) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(self.words, self.wait(), self.stdout.read(), self.stderr.read())


def start_python(
    *words: object, cwd: Path = ROOT, env: dict | None = None, input: str = "", one_stream: bool = False
) -> Forked:
    """Begin what `python WORDS` does in the folder `cwd`, on the CPU; with one_stream, errors go to standard output."""
    return Forked(list(words), cwd, {"CUDA_VISIBLE_DEVICES": ""} | (env or {}), input, one_stream)


def python(*words: object, cwd: Path = ROOT, env: dict | None = None, input: str = "") -> subprocess.CompletedProcess:
    """What `python WORDS` does in the folder `cwd`, on the CPU. env: READ_AT_IMPORT have no effect."""
    return start_python(*words, cwd=cwd, env=env, input=input).done()


def ranks(*words: object, number: int, cwd: Path = ROOT, env: dict | None = None) -> subprocess.CompletedProcess:
    """What `python WORDS` does as so many ranks of one process group: the first exit code that is not 0, and what all print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
    } | (env or {})
    started = [start_python(*words, cwd=cwd, env=group | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(number)]
    done = [process.done() for process in started]
    said = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(done[0].args, next((one.returncode for one in done if one.returncode), 0), *said)


class Trainer:
    """Runs the real train.py on tests/tiny.py."""

    def __init__(self, corpus: Path, folder: Path):
        self.corpus, self.folder = corpus, folder

    def command(self, out: str, *overrides: str, processes: int = 0) -> list[str]:
        script = ["train.py", TINY, "--data.path", str(self.corpus), "--out", str(self.folder / out), *overrides]
        if processes:
            return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *script]
        return [sys.executable, *script]

    def __call__(
        self, out: str, *overrides: str, processes: int = 0, env: dict | None = None, torchrun: bool = False
    ) -> subprocess.CompletedProcess:
        """Several processes are ranks, started as torchrun starts them; by `torchrun` itself where that is what is tested."""
        command = self.command(out, *overrides, processes=processes)
        if not processes and not (env or {}).keys() & READ_AT_IMPORT:
            return python(*command[1:], env=env)
        if processes and not torchrun:
            return ranks(*self.command(out, *overrides)[1:], number=processes, env=env)
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {})  # bit for bit is a promise of the CPU
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)

    def good(self, out: str, *overrides: str, **options) -> Path:
        done = self(out, *overrides, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.folder / out

    def refused(self, out: str, *overrides: str, **options) -> str:
        """The one message of a run that ends because of a user's mistake."""
        done = self(out, *overrides, **options)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
        return done.stderr

    def start(self, out: str, *overrides: str, processes: int = 0, env: dict | None = None) -> subprocess.Popen | Forked:
        """Begin a run; what it prints, errors too, is to be read from `stdout`."""
        command = self.command(out, *overrides, processes=processes)
        if not processes and not (env or {}).keys() & READ_AT_IMPORT:
            return start_python(*command[1:], env=env, one_stream=True)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def kill_when(self, process: subprocess.Popen | Forked, reached, number: int = signal.SIGKILL) -> bool:
        """Signal a run as soon as `reached()` holds. False if the run ended before."""
        while process.poll() is None:
            if reached():
                os.kill(process.pid, number)
                process.wait()
                return True
            time.sleep(0.001)
        return False


@pytest.fixture
def trainer(corpus, tmp_path) -> Trainer:
    return Trainer(corpus, tmp_path)


def records(out: Path) -> list[dict]:
    """Records of a run without what differs from run to run: times and speeds."""
    _, *lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for record in found:
        for name in ("seconds", "tokens_per_s", "mfu"):
            del record[name]
        if "growth" in record:
            del record["growth"]["seconds"]
    return found


def run_in_process(corpus: Path, out: Path, *overrides: str):
    """A whole run of tests/tiny.py in this process, as a train.Run."""
    import train
    from nanostack.config import load

    run = train.Run(load(TINY, ["--data.path", str(corpus), "--out", str(out), *overrides]))
    run.train()
    return run


def take_weights(plain, ours) -> None:
    """Give bench/peers.py's PlainLlama the weights of a Llama of ours."""
    pairs = [(ours.embed, plain.embed), (ours.norm, plain.norm), (ours.head, plain.head)]
    for mine, other in zip(ours.blocks, plain.blocks, strict=True):
        pairs += [(mine.attn.qkv, other.qkv), (mine.attn.out, other.out), (mine.mlp.gate_up, other.gate_up)]
        pairs += [(mine.mlp.down, other.down), (mine.attn_norm, other.attn_norm), (mine.mlp_norm, other.mlp_norm)]
    for a, b in pairs:
        b.load_state_dict({"weight": a.weight})


def peak_bytes(work) -> int:
    """Most bytes that `work()` holds at a time on the CPU, from every allocation and free that the profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def assert_same_state(a: dict, b: dict) -> None:
    """Two loaded checkpoints hold the same run, bit for bit."""
    hashes = {k: v for k, v in a["hashes"].items() if k}
    assert hashes == {k: v for k, v in b["hashes"].items() if k}
    assert a["cursor"] == b["cursor"] and a["config"] == b["config"]
    assert len(hashes) > 10
