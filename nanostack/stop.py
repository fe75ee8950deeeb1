"""The signals that end a run: it ends the step at hand, saves, and exits with 128 + the signal's number."""

import signal

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """A signal stopped what cannot be gone on with in its middle, and is not saved."""


class StopFlag:
    """SIGTERM, Ctrl-C and SIGHUP ask the run to end; the ranks agree on it when a step ends."""

    def __init__(self):
        self.number = 0  # of the signal, once the ranks have agreed that it ends the run
        self._asked = 0
        self._vote = torch.zeros(1)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it, and shall
                signal.signal(number, self._ask)  # a second signal asks again, which changes nothing

    def _ask(self, number: int, _) -> None:
        self._asked = self._asked or number

    def agreed(self) -> bool:
        """Whether any rank has been asked by now; all ranks must call it. A message between hosts, which waits for no GPU."""
        self.number = self._asked
        if dist.is_initialized():
            self._vote.fill_(self._asked)
            dist.all_reduce(self._vote, dist.ReduceOp.MAX)
            self.number = int(self._vote)
        return self.number != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.number if self.number else 0
