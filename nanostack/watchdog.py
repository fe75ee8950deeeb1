"""A run that hangs says so, and where, and ends: torchrun can start it anew, and a person can read what it waited for."""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
PATIENCE = {"start": 8, "save": 4}  # times the timeout: a large corpus is hashed, a large checkpoint written or waited for
OTHERS_SECONDS = 3.0  # torchrun kills all ranks when one has ended, so each waits until the others have told theirs too


class Watchdog:
    """Ends the process when nothing is heard of a phase for `timeout` seconds. It watches while it is in use as a context.

    A process that was suspended is not taken for one that hangs.
    """

    def __init__(self, timeout: float, folder: str):
        self.timeout, self.rank, self.folder = timeout, os.environ.get("RANK", "0"), Path(folder)
        self._phase, self._silent, self._ended = "", 0.0, threading.Event()

    def __enter__(self) -> "Watchdog":
        self._silent, self._ended = 0.0, threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()

    def heard(self, *_) -> None:
        """What the run is at goes on."""
        self._silent = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is this phase of the run."""
        before, self._phase, self._silent = self._phase, name, 0.0
        try:
            yield
        finally:
            self._phase, self._silent = before, 0.0

    def _watch(self) -> None:
        ended, tick, before = self._ended, min(10.0, self.timeout / 4), time.monotonic()
        while not ended.wait(tick):
            now = time.monotonic()
            self._silent += min(now - before, 2 * tick)
            before = now
            if self._silent > self.timeout * PATIENCE.get(self._phase, 1) and not ended.is_set():
                self._tell()
                os._exit(EXIT_CODE)

    def _tell(self) -> None:
        where, silent = f"rank {self.rank} on {socket.gethostname()} hangs in: {self._phase}", f"{self._silent:.0f} s"
        print(f"error: {where}; nothing has moved for {silent} (--hang_timeout {self.timeout:g})", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # a standard error that is no file
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            sys.stderr.flush()
        asking = threading.Thread(target=self._dump_collectives, daemon=True)
        asking.start()
        asking.join(OTHERS_SECONDS)
        time.sleep(OTHERS_SECONDS)

    def _dump_collectives(self) -> None:
        """Write NCCL's record of collectives, where there is one, for torch's `torchfrtrace`."""
        with contextlib.suppress(Exception):
            import torch

            if torch.distributed.is_nccl_available() and torch.cuda.is_initialized():
                path = self.folder / f"nccl_trace_rank_{self.rank}"
                path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]
                print(f"rank {self.rank}: its collectives are in {path}", file=sys.stderr, flush=True)
