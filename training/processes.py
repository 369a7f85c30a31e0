"""
The processes of a run under torchrun: who they are, what they agree on, and how a signal ends them together.
"""
import os
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.machine import shared_store

PATIENCE = timedelta(hours=1)  # how long to wait for another process; a large checkpoint takes time on a slow disk


@dataclass
class Processes:
    """Knows this process's number, how many there are, its device, and a group on the host, which waits for no GPU."""
    rank: int
    world: int
    device: torch.device
    group: object = None

    def sum(self, tensor):
        """Return the sum of all processes' tensors, on the CPU."""
        if self.world > 1:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor.cpu()

    def from_first(self, function):
        """Call the function in the first process alone, and return its value or raise its error in all of them."""
        if self.world == 1:
            return function()
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except (ValueError, OSError) as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, group=self.group)
        if box[1]:
            raise ValueError(box[1])
        return box[0]

    def check_same(self, value, what):
        """Raise a ValueError in all of them if not all have the same value."""
        if self.world == 1:
            return
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        other = [rank for rank, v in enumerate(values) if v != values[0]]
        if other:
            raise ValueError(f"the processes see different {what}: process 0 {values[0]}, process {other[0]} "
                             f"{values[other[0]]}. All nodes need the same folders, on a shared disk")

    def leave(self):
        """Wait for each other and end the connection."""
        if self.world > 1:
            dist.barrier(self.group)
            dist.destroy_process_group()


def join(device):
    """Return the Processes of this launch, connected."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Processes(rank, world, device)
    if device.type == "mps":
        raise ValueError("several processes cannot share a Mac's GPU: start one with python, or give --device cpu")
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=shared_store(), rank=rank, world_size=world,
                            timeout=PATIENCE, device_id=device if on_gpu else None)
    return Processes(rank, world, device, dist.new_group(backend="gloo", timeout=PATIENCE))


class Signals:
    """Makes all processes stop after the same step, on SIGTERM or SIGINT.

    Each step starts a reduction of the signals received, without waiting, and reads the result of the step before. A
    second Ctrl-C ends it at once; SIGTERM may come twice, as schedulers send it to all and torchrun passes its own on.
    """

    def __init__(self, processes):
        self.received, self.work, self.group = 0, None, processes.group
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.received = number
        if number == signal.SIGINT:
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
