"""How a signal ends all processes of a run after the same step."""
import contextlib
import os
import signal

import torch
import torch.distributed as dist


class Signals:
    """Makes all processes stop after the same step, on a signal or Ctrl-C; a second Ctrl-C ends them at once.

    Each step starts a reduction of the signals received, without waiting, and reads the result of the step before.
    """

    def __init__(self, processes):
        self.received, self.work, self.group = 0, None, processes.group
        for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")):
            if number and (number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN):  # as under nohup
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"\nfinishing this step; Ctrl-C again ends at once\n")
            signal.signal(number, signal.default_int_handler)

    def agreed(self):
        """Return the signal that a process got, or 0. Called once a step."""
        if self.group is None:
            return self.received
        said = 0
        if self.work:
            self.work.wait()
            said = int(self.flag.numpy()[0])
        self.flag = torch.tensor([self.received])
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        return said
