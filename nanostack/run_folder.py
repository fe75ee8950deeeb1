"""The folder of a run: whether a run may have it and where it goes on from, made out before anything in it is touched."""

import os
import re
import shutil
import sys
from pathlib import Path

from nanostack import files, kept, lock, sharded, track
from nanostack.config import Train
from nanostack.errors import UserError
from nanostack.launch import Launch

PARTIAL = r"ckpt(-\d+)?\.(.*\.)?partial"  # half a checkpoint of a run: not one that grow.py is writing beside it


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
            old = [] if resuming else [*self._checkpoints(), *track.files(out), *out.glob(f"*{kept.LEFT}")]
            if config.init_from and self._would_delete(Path(config.init_from), old):
                raise UserError(f"--overwrite would delete {config.init_from}, from which the run starts")
            half = [file for file in out.glob("ckpt*.partial") if re.fullmatch(PARTIAL, file.name)]  # left by a killed process
            for file in [*old, *half]:
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
            if resuming:
                self._set_aside(samples)
            if self.launch is not None:  # last: the next attempt of the launch takes what it finds, and no resume_from any more
                self.launch.mark(out)
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror}") from error

    def _take(self) -> None:
        self._lock = lock.take(self.out, self.launch.key if self.launch is not None else None)

    def _checkpoints(self) -> list[Path]:
        """Those of the run, the last one last."""
        numbered, name = kept.numbered_checkpoints(self.ckpt), sharded.pointed_to(self.ckpt)
        named = self.out / name if name else self.ckpt
        other = [named] if named.is_dir() and named not in numbered and sharded.folder_of(named) else []
        return [*other, *numbered, *([self.ckpt] if self.ckpt.exists() else [])]

    def _would_delete(self, source: Path, old: list[Path]) -> bool:
        """Whether a checkpoint, or the folder that it points to, is among these files."""
        found = kept.found(source)
        places = {found.resolve(), (sharded.folder_of(found) or found).resolve()}
        return any(file.resolve() in places for file in old if file.exists())

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
        return self.launch is not None and self.launch.claimed(self.out)

    def _set_aside(self, samples: int) -> None:
        """Rename what the run leaves behind where it goes back to an earlier checkpoint: nothing of it is deleted."""
        source, records = Path(self._source or self.ckpt), self.out / "metrics.jsonl"
        ahead = [file for file in self._checkpoints() if kept.number_of(file, self.ckpt) > samples]
        if (self._goes_back or ahead) and records.exists():  # first: a process that is killed now has them still
            with open(records, "rb") as whole, files.replacing(kept.left_name(records), "wb") as copy:
                shutil.copyfileobj(whole, copy)
        if source.resolve() != self.ckpt.resolve():
            if self.ckpt.exists() and kept.samples_of(self.ckpt) is None:  # damaged
                os.replace(self.ckpt, kept.left_name(self.ckpt))
            kept.go_back(source, self.ckpt)
        later = [file for file in kept.numbered_checkpoints(self.ckpt) if kept.number_of(file, self.ckpt) > samples]
        left = [kept.left_name(file) for file in later]
        for file, new in zip(later, left, strict=True):
            os.replace(file, new)
        if later:
            names = ", ".join(new.name for new in left)
            print(f"note: {self.out} goes on from {samples} samples; what it leaves behind is kept as {names}", file=sys.stderr)
