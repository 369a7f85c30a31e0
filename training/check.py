"""What `train.py CONFIG --check` says before a run of days: links, speed, memory, disk, hours and dollars."""
import math
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from training.meter import duration, percent

STEPS = 3       # timed after the first, which compiles
TIGHT = 0.93    # of a GPU's memory, as the allocator loses some


def try_run(make_step, state, settings, meter, processes):
    """Make a few steps by make_step(masked), and print a line for each finding; ValueError if the run would fail."""
    def say(line):
        if processes.rank == 0:
            print(line, flush=True)

    if processes.world > 1:
        say(f"links: {processes.world} processes, " + all_reduce_rate(processes.device))
    max_steps, hours = settings["max_steps"], 0.0
    masked_steps = meter.masked_steps(0, max_steps)
    for masked, name, steps in ((True, "masked", masked_steps), (False, "unmasked", max_steps - masked_steps)):
        if steps:
            first, each = time_steps(lambda masked=masked: make_step(masked), name, processes)
            hours += steps * each / 3600
            say(f"{name}: {each:.3f} s a step, {settings['batch_size'] / each:,.1f} images/s, MFU "
                f"{percent(meter.utilization(meter.flops[masked], each))}; the first took {duration(first)}; "
                f"{steps:,} steps")
    dollars = f", ${settings['price'] * processes.world * hours:,.0f}" if settings["price"] else ""
    say(f"memory: {memory(state, processes.device)}")
    say(f"disk: {disk(state, settings)}")
    say(f"in all: {max_steps:,} steps, {hours:,.1f} hours{dollars}, without validation, pictures and checkpoints. "
        "Nothing was written: without --check the run starts")


def time_steps(step, name, processes):
    """Return the seconds of the first step and of each further one; ValueError if a gradient is not finite."""
    began = time.perf_counter()
    norms = [step().item()]  # which waits for the device
    first, began = time.perf_counter() - began, time.perf_counter()
    norms += [norm.item() for norm in [step() for _ in range(STEPS)]]
    each = (time.perf_counter() - began) / STEPS
    if not all(map(math.isfinite, norms)):
        raise ValueError(f"the gradients of {name} steps are not finite: try a lower learning_rate")
    return [max(values) for values in zip(*processes.gather((first, each)))]


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
        import resource  # which Windows lacks
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:,.1f} GB at most in this process"
    most, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    if state.average.decay and not state.average.net:
        most += sum(p.nbytes for p in state.net.parameters())
    line = f"{most / 1e9:.1f} of {total / 1e9:.1f} GB on {device}, including what the run will allocate later"
    if most > TIGHT * total:
        raise ValueError(f"memory: {line}, is too much: halve micro_batch_size, which leaves the result the same")
    return line


def disk(state, settings):
    """Say what checkpoints take; ValueError if the disk has no room for them."""
    size = sum(p.nbytes for p in state.net.parameters()) * (1 + (settings["ema_decay"] > 0))
    size += sum(t.nbytes for t in state.optimizer.tensors().values())
    folder = next(p for p in (Path(settings["out"]), *Path(settings["out"]).absolute().parents) if p.exists())
    most, free = settings["keep_checkpoints"] + 1, shutil.disk_usage(folder).free  # one more while it is written
    if most * size > free:
        raise ValueError(f"{most} checkpoints of {size / 1e6:,.0f} MB do not fit on the disk of {folder}, where "
                         f"{free / 1e6:,.0f} MB are free: free some, or lower keep_checkpoints")
    return f"checkpoints of {size / 1e6:,.0f} MB, at most {most} at a time; {free / 1e9:,.1f} GB free in {folder}"
