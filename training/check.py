"""
What `train.py --check` finds out before a run of days: links between the processes, the speed of a step, memory, room
for checkpoints, hours and dollars. It writes nothing.
"""
import math
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from training.checkpoint import steps_of
from training.log import duration

STEPS = 3       # timed after the first, which compiles
TIGHT = 0.93    # of a GPU's memory: what is left the allocator loses between its blocks


def try_run(make_step, masked_steps, state, settings, processes):
    """Make a few steps of a run and print a line for each finding; ValueError if it cannot be made.

    make_step(masked) makes a step, and returns the norm of its gradients. masked_steps: how many of the steps that are
    left are masked.
    """
    def say(line):
        if processes.rank == 0:
            print(line, flush=True)

    if processes.world > 1:
        say(f"links: {processes.world} processes, " + all_reduce_rate(processes.device))
    left, seconds = settings["max_steps"] - state.step, 0.0
    parts = [("masked", True, masked_steps), ("unmasked", False, left - masked_steps)]
    for name, masked, steps in parts:
        if steps:
            first, each = time_steps(lambda masked=masked: make_step(masked), name, processes)
            seconds += steps * each
            say(f"{name}: {each:.3f} s a step, {settings['batch_size'] / each:,.0f} images/s; the first took "
                f"{duration(first)}; {steps:,} steps")
    say(f"memory: {memory(state, processes.device)}")
    say(f"disk: {disk(state, settings)}")
    price = f", ${settings['price'] * processes.world * seconds / 3600:,.0f}" if settings["price"] else ""
    say(f"in all: {duration(seconds)}{price}, without validation, pictures and checkpoints. Nothing was written: "
        "without --check the run starts")


def time_steps(step, name, processes):
    """Return the seconds of the first step and of each further one; ValueError if a gradient is not finite."""
    began = time.perf_counter()
    norms = [step().item()]  # which waits for the device
    first, began = time.perf_counter() - began, time.perf_counter()
    norms += [norm.item() for norm in [step() for _ in range(STEPS)]]
    each = (time.perf_counter() - began) / STEPS
    if not all(map(math.isfinite, norms)):
        raise ValueError(f"the gradients of {name} steps are not finite, from the start: look at the data and at "
                         "--init_from, or try a lower learning_rate")
    slowest = torch.tensor([first, each], dtype=torch.float64)
    if processes.world > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX, processes.group)
    return slowest.tolist()


def all_reduce_rate(device):
    """Measure how fast the processes add up their gradients, as a text."""
    numbers = torch.ones(2 ** 26 if device.type == "cuda" else 2 ** 22, device=device)
    for _ in range(2):  # the first connects them
        began = time.perf_counter()
        dist.all_reduce(numbers)
        numbers[0].item()
        seconds = time.perf_counter() - began
    return f"an all-reduce of {numbers.nbytes / 1e6:,.0f} MB at {numbers.nbytes / seconds / 1e9:.1f} GB/s"


def memory(state, device):
    """Say what the steps took; ValueError if the average that comes later will not fit."""
    if device.type != "cuda":
        return "not measured without a GPU"
    most, there = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    if state.average.decay and not state.average.net:
        most += sum(p.nbytes for p in state.net.parameters())
    if most > TIGHT * there:
        raise ValueError(f"memory: {most / 1e9:.1f} of {there / 1e9:.1f} GB on {device} is too close: halve "
                         "micro_batch_size")
    return f"{most / 1e9:.1f} of {there / 1e9:.1f} GB on {device}, with what the run will keep later"


def disk(state, settings):
    """Say what checkpoints take; ValueError if the disk has no room for them."""
    size = sum(p.nbytes for p in state.net.parameters()) * (1 + (settings["ema_decay"] > 0))
    size += sum(t.nbytes for t in state.optimizer.tensors().values())
    out = Path(settings["out"]).absolute()
    folder = next(p for p in (out, *out.parents) if p.exists())
    most, free = settings["keep_checkpoints"] + 1, shutil.disk_usage(folder).free  # one more while it is written
    new = max(1, most - len(steps_of(out)))
    if new * size > free:
        raise ValueError(f"{new} more checkpoints of {size / 1e6:,.0f} MB do not fit on the disk of {folder}, where "
                         f"{free / 1e6:,.0f} MB are free: free some, or lower keep_checkpoints")
    return f"checkpoints of {size / 1e6:,.0f} MB, at most {most} at a time; {free / 1e9:,.1f} GB free in {folder}"
