"""All that only a GPU can tell, in three commands of minutes. Each is whole by itself, and does first what is worth most:

    make gpu-right   2 minutes: the tests that need a GPU; twenty steps of a small model under every option, beside torch
    make gpu-fast    4 minutes: the 1B step and attention beside their peers; memory-bound operations; growth; a cold start
    make gpu-tune    4 minutes: rows of attention for d_head 64 and 128, and the patch of kernels/configs.py that sets them

    make gpu-right WHEELS=DIR PYTHON=python3     with the Python that is there; what it lacks comes from a folder of wheels
    make gpu-wheels WHEELS=DIR FOR=3.12          fills that folder, where there is a network
    make gpu-cache CACHE=DIR FOR=3.12            compiles what the gpu tests launch, with no GPU; gpu-right CACHE=DIR finds it
    make gpu-right ARGS=--rehearse               the same parts at sizes of seconds, with no GPU, into out/rehearsal/

The folder bench/results/GPU-DATE/ gets COMMAND.json, written anew after every single measurement, and COMMAND.txt, what the
parts print. A part is a process with a time of its own: one that fails or is late costs only itself, and keeps what it had.
Nothing comes from the network. `python bench/report_gpu.py` turns the files into the tables of docs/performance.md.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import ROOT, sections, wheels

PATIENCE = 5  # seconds that a part which is told to stop may take


@dataclass(frozen=True)
class Part:
    """A command line behind `python`, and the seconds it may take. {json} is the command's file, {out} its folder."""

    name: str
    seconds: int
    arguments: tuple[str, ...]
    rehearsal: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()  # of the rehearsal


def gpu_tests() -> list[str]:
    """The files with a test that needs a GPU; targets of kernel_oracle are marked one by one."""
    files = {path: path.read_text() for path in sorted((ROOT / "tests").glob("*/test_*.py")) if path.name != "test_bench.py"}
    return [str(path.relative_to(ROOT)) for path, text in files.items() if "mark.gpu" in text or "kernel_oracle" in text]


PYTEST = ("-m", "pytest", "-q", "-p", "bench.recorded", "-p", "no:cacheprovider", "--recorded", "{json}#tests")
LEFT_OUT = ("--deselect=tests/kernels/test_compiled.py::test_tune_measures_a_kernel",)  # many processes; gpu-tune covers it
# Two micro-batches: the gradients of the second are added in place, as in a real step.
STEP = ("bench/throughput.py", "config/1b.py", "--out", "{json}#step", "--rounds", "1", "--steps", "5", "--warmup", "2")
# What compiles for longest comes last: late, it costs only itself.
STEP += ("--accumulate", "2", "--micro_batch", "8", "--against", "hf,compile")
ATTENTION = ("bench/kernel_ops.py", "--op", "flash_attention", "--out", "{json}#attention", "--samples", "20")
BOUND = ("bench/kernel_ops.py", "--out", "{json}#memory_bound", "--op", "rms_norm", "add_rms_norm", "rotary", "swiglu")
BOUND += ("linear_cross_entropy", "--way", "torch.compile", "Liger", "--samples", "20")
START = ("bench/throughput.py", "config/1b.py", "--out", "{json}#start", "--rounds", "2", "--steps", "1", "--warmup", "1")
TUNE = ("bench/tuning.py", "--out", "{json}#rows", "--patch", "{out}/tune.patch")
SMALL = ("bench/throughput.py", "config/quickstart.py", "--rounds", "1", "--steps", "2", "--warmup", "1")
SMALL += ("--accumulate", "1")
SMALL += ("--micro_batch", "2", "--out")
PARTS = {
    "right": (
        Part("tests", 60, (*PYTEST, "-m", "gpu", "-n", "8", *LEFT_OUT, *gpu_tests()),
             (*PYTEST, "-n", "1", *LEFT_OUT, "tests/trainer/test_flops.py")),
        Part("options", 55, ("bench/options.py", "--out", "{json}#options"),
             ("bench/options.py", "--small", "--only", "plain", "--out", "{json}#options")),
    ),
    "fast": (
        Part("step", 115, STEP, (*SMALL, "{json}#step", "--against", "eager")),
        Part("attention", 45, (*ATTENTION, "--shape", "x32x32x64", "x16x16x128", "--way", "SDPA cuDNN", "SDPA flash"),
             (*ATTENTION, "--samples", "4")),
        Part("memory_bound", 35, (*BOUND, "--shape", "16384x", "4x4096x"), ("bench/kernel_ops.py", "--op", "swiglu",
             "--samples", "4", "--out", "{json}#memory_bound")),
        Part("growth", 30, ("bench/growth.py", "--shapes", "1b", "--samples", "1", "--no-traced", "--out", "{json}#growth"),
             ("bench/growth.py", "--shapes", "tiny", "--samples", "1", "--out", "{json}#growth")),
        Part("start", 40, (*START, "--accumulate", "1", "--micro_batch", "8", "--against", ""),
             (*SMALL, "{json}#start", "--against", "")),
    ),
    "tune": (
        Part("rows", 225, (*TUNE, "--seconds", "215"), (*TUNE, "--rehearse"), (("TRITON_INTERPRET", "1"),)),
    ),
}  # fmt: skip
ALLOWED = {"right": 120, "fast": 240, "tune": 240}  # seconds from the start of a command to its end
EXTRA = 600  # seconds a part of a rehearsal may take


def name_of_gpu() -> str | None:
    """The name that nvidia-smi tells; torch would take seconds to tell it. None without a GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def git_commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def short(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` → `h100`: its first word with a number."""
    words = device.lower().split()
    return next((word for word in words if any(letter.isdigit() for letter in word)), words[0])


def refuse_others(command: argparse.Namespace) -> None:
    """Results of two devices in one folder would be read as one measurement. Commits between commands add results, or rows that
    were tuned: each part says which was its own, and only a whole file of another commit is not written over."""
    for name in PARTS:
        file = command.out / f"{name}.json"
        found = sections.read(file).get("about")
        if found is None:
            continue
        if not isinstance(found, dict) or not {"device", "git_commit"} <= set(found):
            raise wheels.Unusable(f"{file} does not say of what device and commit it is: move it away")
        if found["device"] != command.device:
            told = f"{file} is of the device {found['device']}, this is {command.device}"
            raise wheels.Unusable(f"{told}: add ARGS='--out DIR' with another folder, or move that one away")
        if name == command.name and not (command.only or command.rehearse) and found["git_commit"] != command.commit:
            told = f"{file} is of commit {found['git_commit']}, this is {command.commit}"
            raise wheels.Unusable(f"{told}: add ARGS='--out DIR', or ARGS='--only PART' to put that part in its place")


def heed_sigint() -> None:
    """What a shell starts in the background ignores it, and so would the parts, which are stopped by it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_part(arguments: list[str], log: Path, seconds: float, environment: dict[str, str]) -> dict:
    """Run it to its end or its limit. What it prints is added to the log as it comes."""
    began, late = time.monotonic(), False
    with open(log, "a") as file:
        file.write(f"\n$ python {' '.join(arguments)}\n")
        file.flush()
        at = file.tell()
        options = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True, "preexec_fn": heed_sigint}
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **options)
        try:
            for number, patience in ((signal.SIGINT, seconds), (signal.SIGKILL, PATIENCE)):
                try:
                    process.wait(max(1.0, patience))
                    break
                except subprocess.TimeoutExpired:
                    late = True
                    os.killpg(process.pid, number)
        finally:  # whoever is left of it, and where Ctrl-C ended the waiting, must not run beside the next part
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line.strip() for line in log.read_bytes()[at:].decode(errors="replace").splitlines() if line.strip()]
    state = "cut" if late else "whole" if process.returncode == 0 else f"failed (exit {process.returncode})"
    said = "" if state == "whole" else (lines[-1][:300] if lines else "it said nothing")
    return {"state": state, "seconds": round(time.monotonic() - began, 1), "limit": round(seconds), "said": said}


def compiled_in(cache: Path | None) -> int:
    """Kernels in a cache of Triton's."""
    return len(list(cache.glob("*/*.cubin"))) if cache else 0


def run(command: argparse.Namespace, began: float, packages: Path) -> int:
    """All parts of one command. Returns the exit code: 1 where a part failed, or was cut."""
    file, parts = command.out / f"{command.name}.json", PARTS[command.name]
    kept = sections.read(file) if command.only else {}
    about = {"device": command.device, "git_commit": command.commit, "date": date.today().isoformat()}
    about |= {"versions": wheels.versions(), "rehearsal": command.rehearse, "lacking": command.lacking}
    log = file.with_suffix(".txt")
    if not command.only:
        log.write_text("")
    cache = {"TRITON_CACHE_DIR": str(command.cache.resolve())} if command.cache else {}
    about["compiled_before"] = compiled_in(command.cache)
    sections.write(file, kept | {"about": about, "parts": kept.get("parts", {})})
    path = os.pathsep.join(filter(None, (str(ROOT), str(packages), os.environ.get("PYTHONPATH"))))
    places = {"json": str(file), "out": str(command.out)}
    wanted = [part for part in parts if not command.only or part.name in command.only]
    for part in wanted:
        left = (EXTRA if command.rehearse else ALLOWED[command.name] - (time.monotonic() - began)) - PATIENCE
        limit = min(left, EXTRA if command.rehearse else part.seconds)
        arguments = [word.format(**places) for word in (part.rehearsal if command.rehearse else part.arguments)]
        environment = os.environ | cache | {"PYTHONPATH": path} | (dict(part.environment) if command.rehearse else {})
        found = {"state": "cut", "seconds": 0, "limit": 0, "said": "no time was left for it"}
        if limit > 5:
            print(f"{part.name}: at most {limit:.0f} s", flush=True)
            found = run_part(arguments, log, limit, environment)
        print(f"  {found['state']}, {found['seconds']} s  {found['said']}", flush=True)
        found["git_commit"] = command.commit
        sections.write(Path(f"{file}#parts"), sections.read(file)["parts"] | {part.name: found})
    if command.cache:
        about["compiled_now"] = compiled_in(command.cache) - about["compiled_before"]
        sections.write(Path(f"{file}#about"), about)
    print(f"wrote {file} and {log.name}")
    states = [found["state"] for found in sections.read(file)["parts"].values()]
    return int(any(state != "whole" for state in states))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=[*PARTS, "wheels"])
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="a folder with wheels of what this Python lacks")
    parser.add_argument("--for", dest="python", default="3.12", metavar="VERSION", help="`wheels`: the Python they are for")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="kernels compiled before: Triton's cache, as gpu-cache fills it"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts; what others left in the file stays")
    parser.add_argument("--rehearse", action="store_true", help="at sizes of seconds, on whatever device there is")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results/GPU-DATE)")
    return parser.parse_args()


def main() -> int:
    began, command = time.monotonic(), arguments()
    if command.name == "wheels":
        if command.wheels is None:
            raise wheels.Unusable("name the folder that is to be filled: make gpu-wheels WHEELS=DIR")
        print(wheels.fetch(command.wheels, command.python))
        return 0
    names = [part.name for part in PARTS[command.name]]
    if unknown := set(command.only) - set(names):
        raise wheels.Unusable(f"{command.name} has no part {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    gpu = name_of_gpu()
    if gpu is None and not command.rehearse:
        raise wheels.Unusable("there is no GPU here (nvidia-smi names none); ARGS=--rehearse runs the same parts without")
    command.device, command.commit = gpu or "cpu", git_commit()
    default = ROOT / (
        "out/rehearsal" if command.rehearse else f"bench/results/{short(command.device)}-{date.today().isoformat()}"
    )
    command.out = (command.out or default).resolve()
    refuse_others(command)
    if command.cache and not command.cache.is_dir():
        raise wheels.Unusable(f"there is no folder {command.cache}: `make gpu-cache CACHE={command.cache}` fills it")
    with TemporaryDirectory(prefix="nanostack-wheels-") as packages:
        command.lacking = wheels.complete(command.wheels, Path(packages), tests=command.name == "right")
        command.out.mkdir(parents=True, exist_ok=True)
        return run(command, began, Path(packages))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (wheels.Unusable, sections.Damaged) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
