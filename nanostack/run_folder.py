"""The folder of a run: whether a run may have it and where it goes on from, made out before anything in it is touched."""

import os
import shutil
import socket
from pathlib import Path

from nanostack import checkpoint, track
from nanostack.config import Train
from nanostack.errors import UserError

MARK = ".torchrun"  # names the torchrun whose run is in a folder


def claim(config: Train) -> str | None:
    """The checkpoint that the run goes on from, None for a new run. Touches nothing that is there."""
    out = Path(config.out)
    if config.resume and config.overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    found = [*checkpoint.numbered_checkpoints(out / "ckpt.pt"), *([out / "ckpt.pt"] if (out / "ckpt.pt").exists() else [])]
    mark = out / MARK
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and mark.exists() and mark.read_text() == agent()
    if config.resume or restarted:
        return str(found[-1]) if found else None  # a run that died before its first checkpoint starts again
    if (found or (out / "metrics.jsonl").exists()) and not config.overwrite:
        raise UserError(
            f"{out} holds a run already: go on with it (--resume), delete it (--overwrite), or choose another --out"
        )
    return None


def agent() -> str:
    """Which torchrun this process belongs to. It repeats the command line after a crash, and must find its own run only."""
    job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return job if job != "none" else f"{socket.gethostname()}:{os.getppid()}"


def make_ready(config: Train, resuming: bool) -> None:
    """Make the folder ready for the run; by now everything else is known to be right."""
    out, ckpt = Path(config.out), Path(config.out) / "ckpt.pt"
    old = [] if resuming else [ckpt, *checkpoint.numbered_checkpoints(ckpt), *track.files(out)]
    try:
        if config.init_from and Path(config.init_from).resolve() in [file.resolve() for file in old if file.exists()]:
            raise UserError(f"--overwrite would delete {config.init_from}, from which the run starts")
        out.mkdir(parents=True, exist_ok=True)
        for file in [*old, *out.glob("ckpt*.partial")]:  # a killed process leaves half a checkpoint behind
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        (out / MARK).write_text(agent())
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}") from error
