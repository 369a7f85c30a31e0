"""
The processes of torchrun in an evaluation. With a single process all of it does nothing.
"""
import os
from datetime import timedelta

import torch.distributed as dist

from common.machine import shared_store


def processes():
    """Return (rank, number of processes) under torchrun, (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join():
    """Connect the processes over CPUs. One may have to wait for the others' pictures for long."""
    rank, world = processes()
    if world > 1:
        dist.init_process_group("gloo", store=shared_store(), rank=rank, world_size=world, timeout=timedelta(days=2))
    return rank, world


def gathered(value):
    """Return what all processes have, in their order, after waiting for all."""
    values = [value] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values
