"""Kills runs at random moments and looks whether they end as if nothing had been: python tests/chaos.py --kills 100

A run of tests/tiny.py is killed with SIGKILL again and again, in training, saving, growing and evaluating, and resumed each
time; at its end every weight, moment and record has to be, bit for bit, that of a run which was left alone. Now and then a
SIGTERM goes before, as from a machine that gives little time. torchrun starts two ranks: killed are all of them and torchrun;
or one rank, and torchrun starts it anew; or all processes of one of two hosts (each with a torchrun, and the first with the
rendezvous). `--seed` repeats what was drawn, but for the clock.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = ("train", "save", "growth", "evaluation")
WHOM = {"one process": ("all",), "two ranks": ("all", "a rank"), "two hosts": ("host 0", "host 1")}
# Small, but long enough to be killed in; two ranks save shards, one process a file.
RUN = ("--stages.0.tokens", "6144", "--stages.1.tokens", "6144", "--save_interval", "512", "--eval_interval", "1024")


class Launch:
    """A run under way: one process, torchrun with two ranks, or two torchruns with a rank each."""

    def __init__(self, kind: str, words: list[str], resume: bool):
        words = [*words, "--resume"] if resume else words
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        if kind == "one process":
            commands = [[sys.executable, *words]]
        elif kind == "two ranks":
            commands = [[*torchrun, "--standalone", "--nproc_per_node", "2", "--max-restarts", "3", *words]]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            host = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
            commands = [[*torchrun, *host, "--rdzv_conf", f"is_host={int(n == 0)}", *words] for n in (0, 1)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.processes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for command in commands]

    def runs(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def workers(self, process: subprocess.Popen) -> list[int]:
        with contextlib.suppress(OSError):
            return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        return []

    def kill(self, whom: str, draw: random.Random) -> None:
        """SIGKILL, or SIGTERM a moment before.

        Of two hosts one is killed; the other cannot go on without it, and is ended so that both can start again.
        """
        if whom == "a rank":
            while not (ranks := self.workers(self.processes[0])) and self.runs():
                time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(draw.choice(ranks), signal.SIGKILL)
            return
        if draw.random() < 0.3:
            for pid in [pid for process in self.processes for pid in self.workers(process) or [process.pid]]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(draw.uniform(0, 0.3))
        first = self.processes[int(whom[-1])] if whom.startswith("host") else self.processes[0]
        for process in (first, *(other for other in self.processes if other is not first)):
            for pid in (process.pid, *self.workers(process)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.5)


def changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def reached(moment: str, out: Path, began: float, wait: float, before: int | None) -> bool:
    """Whether the run is where it is to be killed: in train at a moment of the clock, which may be one of its start; in growth
    and evaluation once it has come so far itself, and its records are no longer those of `before`."""
    records = out / "metrics.jsonl"
    if time.monotonic() - began < 1.0:
        return False
    if moment == "save":
        return any(out.glob("*.partial")) and time.monotonic() - began > wait
    if moment in ("growth", "evaluation") and changed(records) == before:
        return False
    if moment == "growth":  # the last step before it has been recorded
        return records.exists() and '"step": 24,' in (text := records.read_text()) and "n_layer" not in text[-4000:]
    if moment == "evaluation":
        return records.exists() and records.read_text().count('"val_loss": null') % 4 == 3
    return records.exists() and time.monotonic() - began > wait


def drawn(kind: str, kills: int, seed: int) -> list[tuple[str, str]]:
    """So many (moment, whom)."""
    draw = random.Random(f"{kind} {seed} moments")
    return [(draw.choice(MOMENTS), WHOM[kind][number % len(WHOM[kind])]) for number in range(kills)]


def chaos(kind: str, data: Path, folder: Path, planned: list[tuple[str, str]], seed: int, say=print) -> int:
    """Run, kill as planned and resume. Returns in how many runs; AssertionError for one that differs."""
    from conftest import assert_same_state, records

    from nanostack import checkpoint

    def words(out: str) -> list[str]:
        return ["train.py", str(ROOT / "tests/tiny.py"), "--data.path", str(data), "--out", str(folder / out), *RUN]

    draw, done, number = random.Random(f"{kind} {seed}"), 0, 0
    kills = len(planned)
    whole = Launch(kind, words("whole"), resume=False)
    began = time.monotonic()
    while whole.runs():
        time.sleep(0.05)
    took = time.monotonic() - began
    assert all(process.returncode == 0 for process in whole.processes), f"{kind}: the run that was left alone failed"
    state = everything(checkpoint.load(folder / "whole/ckpt.pt"))
    while done < kills:
        out, launch, resume = folder / f"run{number}", None, False
        while True:
            before, launch = changed(out / "metrics.jsonl"), Launch(kind, words(out.name), resume)
            began, wait = time.monotonic(), draw.uniform(0.3, 1.1) * took
            moment, whom = planned[min(done, kills - 1)]
            while launch.runs() and not (done < kills and reached(moment, out, began, wait, before)):
                time.sleep(0.003)
            if not launch.runs():
                break
            launch.kill(whom, draw)
            done += 1
            say(f"{kind}, seed {seed}, run {number}: kill {done} of {kills}, {whom}, in {moment}")
            if whom == "a rank":
                continue_by_itself(launch)
                break
            resume = (out / "metrics.jsonl").exists()
        assert all(process.returncode == 0 for process in launch.processes), f"{kind}, seed {seed}: run {number} failed"
        assert not list(out.glob("*.partial"))
        assert_same_state(everything(checkpoint.load(out / "ckpt.pt")), state)
        differ = [pair for pair in zip(records(out), records(folder / "whole"), strict=False) if pair[0] != pair[1]]
        assert not differ and len(records(out)) == len(records(folder / "whole")), (
            f"{kind}, seed {seed}, run {number}: {differ[:1]}"
        )
        number += 1
    return number


def continue_by_itself(launch: Launch) -> None:
    while launch.runs():
        time.sleep(0.05)


def everything(found: dict) -> dict:
    """A checkpoint with hashes of whole tensors, whatever shards they came in."""
    from nanostack import checkpoint, sharded

    found = found | {
        "model": dict(found["model"]),
        "optimizer": {name: dict(kept) for name, kept in found["optimizer"].items()},
    }
    return found | {"hashes": {name: sharded.tensor_sha256(one) for name, one in checkpoint.all_tensors(found).items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(WHOM), nargs="*", default=list(WHOM))
    parser.add_argument("--data", type=Path, required=True, help="prepared text")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    for number, kind in enumerate(options.kind):
        kills = (options.kills + number) // len(options.kind)  # all together, so many
        with tempfile.TemporaryDirectory() as place:
            planned = drawn(kind, kills, options.seed)
            runs = chaos(kind, options.data.resolve(), Path(place), planned, options.seed, lambda line: print(line, flush=True))
            print(f"{kind}: {kills} kills in {runs} runs, each of which ended as the one that was left alone, bit for bit")
