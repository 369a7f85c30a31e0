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


def run_script(name, main):
    """Call the main() of a script, and end the script with one line if that fails or is stopped."""
    try:
        main()
    except (ValueError, OSError) as error:
        # a ValueError is met by all processes alike, as settings and files are the same for them
        alike = isinstance(error, ValueError) and processes()[0] > 0
        raise SystemExit(1 if alike else f"{name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{name}: stopped. The same command goes on where it was") from None
