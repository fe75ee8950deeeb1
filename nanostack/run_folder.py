"""The folder of a run: whether a run may have it and where it goes on from, made out before anything in it is touched."""

import contextlib
import itertools
import os
import shutil
import sys
from pathlib import Path

from nanostack import kept, lock, track
from nanostack.config import Train
from nanostack.errors import UserError
from nanostack.launch import Launch

MARK = ".torchrun"  # names the launch whose run is in a folder
LEFT = ".left"  # ends the names of what a run that went back leaves behind


class RunFolder:
    """The folder `config.out` of a run of this launch, if torchrun launched it. Rank 0 only calls `claim` and `make_ready`.

    In use as a context, the folder is free for others at the end.
    """

    def __init__(self, config: Train, launch: Launch | None):
        self.config, self.launch = config, launch
        self.out, self.ckpt = Path(config.out), Path(config.out) / "ckpt.pt"
        self._lock: lock.Lock | None = None
        self._source: str | None = None
        self._goes_back = False  # to resume_from

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.release()

    def claim(self) -> str | None:
        """The checkpoint that the run goes on from, None for a new run. Locks a folder that exists, touches nothing else."""
        config = self.config
        if config.goes_on and config.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        try:
            if self.out.is_dir():
                self._take()
            self._source = self._find()
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror}") from error
        return self._source

    def make_ready(self, samples: int) -> None:
        """Make the folder ready for a run that has seen so many samples; by now everything else is known to be right."""
        config, out, resuming = self.config, self.out, self._source is not None
        try:
            if self._lock is None:
                out.mkdir(parents=True, exist_ok=True)
                self._take()
                if self._find() != self._source:  # another run came and went meanwhile
                    raise UserError(f"{out} was empty when this run began to load, and now holds another one")
            old = [] if resuming else [*self._checkpoints(), *track.files(out), *out.glob(f"*{LEFT}")]
            if config.init_from and Path(config.init_from).resolve() in [file.resolve() for file in old if file.exists()]:
                raise UserError(f"--overwrite would delete {config.init_from}, from which the run starts")
            for file in [*old, *out.glob("ckpt*.partial")]:  # a killed process leaves half a checkpoint behind
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
            if resuming:
                self._set_aside(samples)
            if self.launch is not None:  # last: the next attempt of the launch takes what it finds, and no resume_from any more
                (out / MARK).write_text(self.launch.mark())
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}") from error

    def _take(self) -> None:
        self._lock = lock.take(self.out, self.launch.key if self.launch is not None else None)

    def _checkpoints(self) -> list[Path]:
        """Those of the run, the last one last."""
        return [*kept.numbered_checkpoints(self.ckpt), *([self.ckpt] if self.ckpt.exists() else [])]

    def _find(self) -> str | None:
        found, restarted = self._checkpoints(), self._restarted()
        if self.config.resume_from is not None and not restarted:  # else the run has gone on from there meanwhile
            wanted = kept.found(Path(self.config.resume_from))
            if not wanted.exists() or (wanted / "ckpt.pt").exists():
                there = f"there are {', '.join(map(str, found))}" if found else "the run has none"
                raise UserError(f"--resume_from: {self.config.resume_from} is no checkpoint; {there}")
            self._goes_back = True
            return str(wanted)
        if self.config.goes_on or restarted:
            return str(found[-1]) if found else None  # a run that died before its first checkpoint starts again
        if (found or (self.out / "metrics.jsonl").exists()) and not self.config.overwrite:
            raise UserError(
                f"{self.out} holds a run already: go on with it (--resume), delete it (--overwrite), or choose another --out"
            )
        return None

    def _restarted(self) -> bool:
        """Whether the run in the folder is that of an earlier attempt of this launch."""
        mark = self.out / MARK
        return self.launch is not None and mark.exists() and self.launch.claimed(mark.read_text())

    def _set_aside(self, samples: int) -> None:
        """Rename what the run leaves behind where it goes back to an earlier checkpoint: nothing of it is deleted."""
        source = Path(self._source or self.ckpt)
        if source.resolve() != self.ckpt.resolve():
            if self.ckpt.exists() and kept.samples_of(self.ckpt) is None:  # damaged
                os.replace(self.ckpt, _left(self.ckpt))
            kept.go_back(source, self.ckpt)
        if self._goes_back:
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(self.out / "metrics.jsonl", _left(self.out / "metrics.jsonl"))
        later = [file for file in kept.numbered_checkpoints(self.ckpt) if (kept.samples_of(file) or 0) > samples]
        left = [_left(file) for file in later]
        for file, new in zip(later, left, strict=True):
            os.replace(file, new)
        if later:
            names = ", ".join(new.name for new in left)
            print(f"note: {self.out} goes on from {samples} samples; what it leaves behind is kept as {names}", file=sys.stderr)


def _left(file: Path) -> Path:
    """NAME.left for what a run leaves behind; NAME.2.left and so on where an earlier one has that."""
    names = (f"{file.name}{f'.{number}' if number > 1 else ''}{LEFT}" for number in itertools.count(1))
    return next(new for name in names if not (new := file.with_name(name)).exists())
