"""The circumstances of a result: versions, device, commit, tokenizer."""

import platform
import subprocess
import sys
from pathlib import Path

import torch

from nanostack.version import __version__


def versions() -> dict[str, str]:
    found = {"nanostack": __version__, "python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    """The commit of this repository, with -dirty where tracked files differ from it.

    None for what is installed, be it somewhere within a repository of others.
    """
    here = Path(__file__)
    try:
        git(here.parent, "ls-files", "--error-unmatch", here.name)
        return git(here.parent, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout.strip()


def tokenizer_name(manifest: dict) -> str:
    """The name of the tokenizer of prepared data, with a hash that tells it from others."""
    return f"{manifest['tokenizer']['name']} {manifest['tokenizer']['sha256'][:12]}"
