"""The signals that end a run: it ends the step at hand, saves, and exits with 128 + the signal's number."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Answer Ctrl-C and SIGTERM when the block ends; a second one at once.

    What they raise in the midst of torch's writers is told as a failed save, or, from C++, ends the process with SIGABRT.
    """
    came: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            before[number](number, frame)
        came.append(number)

    if threading.current_thread() is threading.main_thread():  # no other is ever interrupted
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(answer := signal.getsignal(number)):
                before[number] = answer
    try:
        for held in before:
            signal.signal(held, note)
        yield
    finally:
        for held, answer in before.items():
            signal.signal(held, answer)
    if came:
        before[came[0]](came[0], None)


class Stopped(Exception):
    """A signal stopped what cannot be gone on with in its middle, and is not saved."""


class StopFlag:
    """SIGTERM, Ctrl-C and SIGHUP ask the run to end; the ranks agree on it when a step ends."""

    def __init__(self):
        self.number = 0  # of the signal, once the ranks have agreed that it ends the run
        self.save_again = False  # whether any rank asked for that in the last vote
        self._asked = 0
        self._vote = torch.zeros(2)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it, and shall
                signal.signal(number, self._ask)  # a second signal asks again, which changes nothing

    def _ask(self, number: int, _) -> None:
        self._asked = self._asked or number

    def agreed(self, save_again: bool = False) -> bool:
        """Whether any rank has been asked by now; all ranks must call it. A message between hosts, which waits for no GPU.

        The vote is also on `save_again`: a rank's last save has failed.
        """
        self.number, self.save_again = self._asked, save_again
        if dist.is_initialized():
            self._vote[0], self._vote[1] = self._asked, save_again
            dist.all_reduce(self._vote, dist.ReduceOp.MAX)
            self.number, self.save_again = int(self._vote[0]), bool(self._vote[1])
        return self.number != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.number if self.number else 0
