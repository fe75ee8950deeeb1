"""Run other projects' own tests on these kernels: python tests/peers/run.py --peers DIR --out peers.json

DIR holds checkouts of them, in folders named as their repositories are. Their files are read from there; none is part of this
repository. A child process for each peer and backend (session.py) puts our operations where the peer's would be imported from
and runs the tests that are about them, in a sample with a fixed seed, at the peer's own tolerances. Beyond what nanostack's
extra `dev` installs, their files import einops. The exit code is 1 where a case of this run failed.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanostack.errors import UserError, command_line

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
BACKENDS = ("torch", "c", "triton")


@dataclass
class Options:
    """Run other projects' own tests on these kernels."""

    peers: Path | None = None  # the folder of their checkouts
    only: tuple[str, ...] = ()  # adapters; all of them by default
    backend: tuple[str, ...] = BACKENDS  # Triton is interpreted
    cases: int = 12  # of each test that are run, refused ones apart
    seconds: int = 20  # that a case may take
    seed: int = 0  # of the sample, and of every case
    out: Path | None = None  # JSON; what it holds of other peers and backends is kept
    table: Path | None = None  # instead of a run: such a file as docs/kernels.md's table
    json: bool = False


def adapters() -> dict[str, str]:
    """The repository that each adapter is for."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "REPOSITORY":
                found[path.stem] = ast.literal_eval(node.value)
    return found


def commit_of(checkout: Path) -> str:
    """The commit of a checkout; of an unpacked archive, what its file COMMIT says."""
    written = checkout / "COMMIT"
    if written.exists():
        return written.read_text().strip()[:9]
    if not (checkout / ".git").exists():
        return "unknown"
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def run(options: Options, adapter: str, checkout: Path, backend: str) -> dict:
    """The counts of one child process, or {"broken": its last line}."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "counts.json"
        job = {"adapter": adapter, "checkout": str(checkout), "backend": backend, "out": str(out)}
        job |= {"cases": options.cases, "seconds": options.seconds, "seed": options.seed}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": str(int(backend == "triton"))}
        command = [sys.executable, str(FOLDER / "session.py"), json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not out.exists() or json.loads(out.read_text())["status"] > 1:
            lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
            return {"broken": lines[-1]}
        return json.loads(out.read_text())


def main(options: Options) -> dict:
    if options.table is not None:
        if not options.table.is_file():
            raise UserError(f"--table {options.table} is not there; --out writes such a file")
        print(table(recorded("table", options.table)))
        return {}
    known = adapters()
    check(options, known)
    results, now = recorded("out", options.out) if options.out and options.out.exists() else {}, {}
    for adapter in options.only or known:
        checkout = options.peers / known[adapter].split("/")[1]
        for backend in options.backend:
            counts = run(options, adapter, checkout, backend)
            sample = {"cases": options.cases, "seconds": options.seconds, "seed": options.seed}
            entry = {"peer": known[adapter], "commit": commit_of(checkout), "backend": backend, **sample, **counts}
            now[f"{adapter} {backend}"] = results[f"{adapter} {backend}"] = entry
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")
            if not options.json:
                print(row(entry), *(f"  {line}" for line in counts.get("failures", [])), sep="\n", flush=True)
    broken = [f"{name}: {entry['broken']}" for name, entry in now.items() if "broken" in entry]
    if broken:
        raise UserError(f"no test could be run with {'; '.join(broken)}")
    return now


def failed(results: dict) -> bool:
    """Whether a case of them failed."""
    return any(entry["failed"] for entry in results.values())


def recorded(name: str, file: Path) -> dict:
    """The results in a file that --`name` names."""
    try:
        found = json.loads(file.read_text())
        table(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--{name} {file} is no file of results ({type(error).__name__}: {error}): move it away") from error
    return found


def check(options: Options, known: dict[str, str]) -> None:
    """Say in one line what is missing before anything runs; make the folder of --out."""
    if options.peers is None or not options.peers.is_dir():
        raise UserError(f"--peers {options.peers}: give the folder that holds checkouts of {', '.join(known.values())}")
    for name, given, choices in (("only", options.only, known), ("backend", options.backend, BACKENDS)):
        for word in set(given) - set(choices):
            raise UserError(f"--{name} {word}: choose from {', '.join(choices)}")
    for adapter in options.only or known:
        checkout = options.peers / known[adapter].split("/")[1]
        if not checkout.is_dir():
            raise UserError(f"{checkout} is not there: git clone https://github.com/{known[adapter]} {checkout}")
    if importlib.util.find_spec("pytest") is None:
        raise UserError("pytest is not installed; pip install pytest")
    if options.out:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=options.out.parent):
                pass
        except OSError as error:
            raise UserError(f"--out {options.out}: nothing can be written there: {error.strerror}") from error


def listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1])) or "–"


def row(entry: dict) -> str:
    """One line of the table."""
    start = f"| {entry['peer']} | {entry['commit']} | {entry['backend']} "
    if "broken" in entry:
        return f"{start}| could not be run: {entry['broken']} |"
    refused = sum(entry["refused"].values())
    run = entry["passed"] + entry["failed"] + refused
    total = run + sum(entry["skipped"].values()) + entry["left_out"]
    counts = f"{run} of {total} | {entry['passed']} | {entry['failed']} | {refused}: {listed(entry['refused'])}"
    return f"{start}| {counts} | {listed(entry['skipped'])} |"


def table(results: dict) -> str:
    head = "| peer | commit | backend | cases | passed | failed | refused | not run |\n|---|---|---|--:|--:|--:|---|---|"
    return "\n".join([head, *(row(results[name]) for name in sorted(results))])


if __name__ == "__main__":
    sys.exit(int(failed(command_line(Options, main))))
