"""What a Python without a network lacks, taken from a folder of wheels; and how that folder is filled where there is one.

Nothing but the standard library and pip.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = {  # by the name it is imported by
    **{name: name for name in ("numpy", "tiktoken", "tyro", "rich", "matplotlib", "zstandard", "rustbpe", "typeguard")},
    "docstring_parser": "docstring-parser",
}
TESTS = {  # what the tests need, with what that needs; all of it travels
    **{name: name for name in ("pytest", "iniconfig", "packaging", "pluggy", "pygments", "execnet", "hypothesis")},
    **{"xdist": "pytest-xdist", "sortedcontainers": "sortedcontainers"},
}
PEERS = {"liger_kernel": "liger-kernel", "transformers": "transformers"}  # without one, its own column is missing
TRAVEL = ("tyro", "docstring-parser", "typeguard", "zstandard", "rustbpe", "liger-kernel", *TESTS.values())
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]


class Unusable(Exception):
    """This Python cannot be used as it is. The message is one line that says what to do."""


def missing(packages: dict[str, str]) -> list[str]:
    return [package for module, package in packages.items() if find_spec(module) is None]


def complete(folder: Path | None, target: Path, tests: bool) -> list[str]:
    """Install into `target` what this Python lacks of NEEDED and PEERS, and of TESTS where they are to run, from wheels in
    `folder`. Returns what is still lacking of PEERS. Raises Unusable."""
    this = f"{sys.executable} (Python {sys.version_info.major}.{sys.version_info.minor})"
    for name in ("torch", "triton"):
        if find_spec(name) is None:
            raise Unusable(f"{this} has no {name}: name a Python that has it, as in PYTHON=python3")
    needed, peers = missing(NEEDED | (TESTS if tests else {})), missing(PEERS)
    if needed and folder is None:
        told = f"{this} lacks {', '.join(needed)}: add WHEELS=DIR"
        raise Unusable(f"{told}, a folder that `make gpu-wheels WHEELS=DIR` fills where there is a network")
    if folder is None:
        return peers
    if not folder.is_dir():
        raise Unusable(f"there is no folder {folder}: `make gpu-wheels WHEELS={folder}` fills it where there is a network")
    there = {package: files_of(package, folder) for package in needed + peers}
    for package in needed:
        if not there[package]:
            how = f"make gpu-wheels WHEELS={folder} fetches it" if package in TRAVEL else "install it there"
            raise Unusable(f"{this} lacks {package}, and {folder} has no wheel of it; {how}")
    wanted = [package for package, files in there.items() if files]
    if wanted:
        install(wanted, there, folder, target, this)
    return [package for package in peers if package not in wanted]


def files_of(package: str, folder: Path) -> list[str]:
    stem = re.sub(r"[-_.]+", "_", package).lower()
    return [path.name for path in sorted(folder.glob("*.whl")) if path.name.split("-")[0].lower() == stem]


def install(packages: list[str], there: dict[str, list[str]], folder: Path, target: Path, this: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--find-links", str(folder), "--target", str(target), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        return
    refused = re.search(r"No matching distribution found for ([\w.-]+)", done.stderr)
    if refused and there.get(refused[1]):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        told = f"{folder} has {' and '.join(there[refused[1]])}, which is for another Python than {this}"
        raise Unusable(f"{told}: fill a folder with make gpu-wheels WHEELS=DIR FOR={version}")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise Unusable(f"pip could not install {', '.join(packages)} from {folder}: {lines[-1] if lines else done.returncode}")


def fetch(folder: Path, python: str) -> str:
    """Download the wheels of TRAVEL for that Python (as in 3.12) on 64-bit Linux, in the versions of constraints.txt. Returns
    their list with sizes. Raises Unusable where pip finds none."""
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    wanted = [f"{name}=={pinned[name]}" if name in pinned else name for name in TRAVEL]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
    ]
    command += ["--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS), "--dest", str(folder), *wanted]
    done = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True)
    if done.returncode:
        raise Unusable(f"pip could not fetch them for Python {python}: {done.stderr.strip().splitlines()[-1]}")
    sizes = {path.name: path.stat().st_size for name in TRAVEL for path in [folder / f for f in files_of(name, folder)]}
    rows = [f"{size / 1e6:6.2f} MB  {name}" for name, size in sizes.items()]
    return "\n".join([*rows, f"{sum(sizes.values()) / 1e6:6.2f} MB  in {folder}, for Python {python}"])


def versions() -> dict[str, str]:
    """Versions of what decides a measurement, found without importing it."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "triton", "transformers", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
