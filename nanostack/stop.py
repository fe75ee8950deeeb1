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
