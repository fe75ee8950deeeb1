"""Documents to tokens on several cores, in order: the processes behind nanostack.text.corpus."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

import numpy as np

from nanostack.errors import UserError
from nanostack.text.tokenizer import Tokenizer


def encode(
    batches: Iterable[tuple[str, list[str]]], encoder: Tokenizer, workers: int
) -> Generator[tuple[str, np.ndarray], None, None]:
    """(split, its documents) to (split, their tokens), in order; in `workers` processes, or here if that is one.

    Each worker has a pipe of its own and one batch at a time, so memory is bounded, and the end of a process at either
    end of the pipe is seen at the other: no worker outlives a killed parent, no parent waits for a killed worker.
    """
    if workers == 1:
        yield from ((split, encoder.encode_documents(texts)) for split, texts in batches)
        return
    started: list[multiprocessing.process.BaseProcess] = []
    busy: deque[tuple[str, Connection]] = deque()
    try:
        for split, texts in batches:
            if len(busy) < workers:
                pipe = _start_worker(encoder, started)
            else:
                done, pipe = busy.popleft()
                yield done, np.frombuffer(pipe.recv_bytes(), encoder.dtype)
            pipe.send(texts)
            busy.append((split, pipe))
        for split, pipe in busy:
            yield split, np.frombuffer(pipe.recv_bytes(), encoder.dtype)
    except (EOFError, ConnectionError):
        raise UserError("a worker process was killed, perhaps for want of memory; try fewer --workers") from None
    finally:
        for process in started:
            process.kill()
            process.join()


def _start_worker(encoder: Tokenizer, started: list[multiprocessing.process.BaseProcess]) -> Connection:
    ours, theirs = multiprocessing.Pipe()
    # Spawned, for a fork would copy rustbpe's threads half alive; and with the signals blocked, which it inherits, since
    # Ctrl-C in a terminal goes to every process and is for this one to answer.
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(encoder, theirs), daemon=True)
    resource_tracker.ensure_running()  # of multiprocessing itself; its start would unblock the signals
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process.start()
        started.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    return ours


def _work(encoder: Tokenizer, pipe: Connection):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is done, or gone
        while True:
            pipe.send_bytes(encoder.encode_documents(pipe.recv()).data)
