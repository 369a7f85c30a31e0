"""The processes of a script under torchrun: who they are, what they agree on, and how the script ends."""
import atexit
import functools
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.machine import shared_store

PATIENCE = timedelta(days=2)  # how long to wait for another process, which may have a large share of pictures to draw


@dataclass
class Processes:
    """Knows this process's number, how many there are, its device, and a group on the host, which waits for no GPU."""
    rank: int
    world: int
    device: torch.device = torch.device("cpu")
    group: object = None

    def share(self, items):
        """Return every world-th of the items, which are this process's."""
        return items[self.rank::self.world]

    def sum(self, tensor):
        """Return the sum of all processes' tensors, on the CPU."""
        if self.world > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor.cpu()

    def gather(self, value=None):
        """Return what all processes have, in their order, after waiting for all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, function):
        """Call the function in the first process alone, and return its value or raise its error in all of them."""
        if self.world == 1:
            return function()
        box = [None, None]  # value and error
        if self.rank == 0:
            try:
                box[0] = function()
            except (ValueError, OSError) as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, group=self.group)
        if box[1]:
            raise ValueError(box[1])
        return box[0]

    def leave(self):
        """Wait for each other and end the connection."""
        if self.world > 1:
            dist.barrier(self.group)
            dist.destroy_process_group()


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device=None, patience=PATIENCE):
    """Return the Processes of this launch, connected. With a device, tensors on it can be added up."""
    rank, world = int(os.environ.get("RANK", 0)), world_size()
    device = device or torch.device("cpu")
    if world == 1:
        return Processes(rank, world, device)
    if device.type == "mps":
        raise ValueError("several processes cannot share a Mac's GPU: start one with python, or give --device cpu")
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=shared_store(), rank=rank, world_size=world,
                            timeout=patience, device_id=device if on_gpu else None)
    return Processes(rank, world, device, dist.new_group(backend="gloo", timeout=patience))


def make_lasting(stream):
    """Let a stream lose what it cannot write, after a closed terminal or pipe or on a full disk. That is said once."""
    def attempt(function, *args):
        try:
            return function(*args)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            if not hasattr(stream, "failed"):
                stream.failed = True
                print(f"warning: {error}: lines of the output are lost", file=sys.stderr)
                atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno()))  # for a last flush
    for name in ("write", "flush") if "write" not in vars(stream) else ():
        setattr(stream, name, functools.partial(attempt, getattr(stream, name)))


KNOWN = {  # errors of torch, and what a user can do
    "Expected to have finished": "a parameter gets no gradient, which several processes do not allow: use or remove it",
    r"C(\+\+)? compiler": "--compile needs a C++ compiler: install g++ (apt install g++), or leave --compile out"}


def run_script(name, main, stopped="The same command goes on where it was"):
    """Call the main() of a script. If that fails for a reason of the user's, or is stopped, end with one line.

    Under torchrun all processes mostly meet an error alike. The first says it at once, and the others only if the
    launcher has not ended them by then.
    """
    list(map(make_lasting, filter(None, (sys.__stdout__, sys.__stderr__))))
    try:
        return main()
    except KeyboardInterrupt:
        line = f"{name}: stopped. {stopped}"
    except torch.OutOfMemoryError:
        line = f"{name}: the GPU's memory is too small: lower --micro_batch_size (train.py; same run) or --batch_size"
    except (ValueError, OSError) as error:
        line = f"{name}: {error}"
    except RuntimeError as error:
        line = next((f"{name}: {advice}" for words, advice in KNOWN.items() if re.search(words, str(error))), None)
        if not line:
            raise
    if int(os.environ.get("RANK", 0)) > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(1)
