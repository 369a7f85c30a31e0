"""
What training costs: arithmetic, the speed of a step, and the whole recipe in hours and dollars.

    python bench.py                         # this machine: a step of Tiny/2 against the machine's own matmul rate
    python bench.py config/xl2_256.py config/xl2_256_unmasked.py config/xl2_512.py config/xl2_512_unmasked.py
    python bench.py --loader data/shapes    # how fast random rows are read, from the page cache and from the disk

With configs and a GPU: a step of each (a GPU's share of the batch, optimizer and all), compiled and eager, with MFU
against the datasheet's dense bf16 peak and memory; and the recipe from these. With configs and no GPU: what the step's
products, bytes and launches would take an H100, counted from model.py as it is (common/roofline.py has the assumptions;
a minute or two for the paper's network). FLOPs are three times those of the forward pass.
"""
import sys

from configurator import configure, script_settings

configs = ()                # config files; they may also come first, without --configs
batch_size = 4              # pictures per step of the small run without configs (>= 1)
mask_ratio = 0.75           # of that run (>= 0, < 1)
rounds = 5                  # everything is timed so often; the median counts (>= 1)
gpus = 8                    # for the recipe; every one has its share of the global batch (>= 1)
price = 3.75                # dollars for an hour of one GPU (>= 0)
loader = ""                 # prepared folder whose rows are to be read
profile = False             # also list the operators that take longest, or without a GPU the float32 that moves most
device = "auto"             # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--configs")
    settings = configure(globals())

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import flops, roofline
from common.machine import keep_freed_memory, pick_device
from model import MicroDiT, MicroDiTConfig, edm_loss
from training.dataset import Dataset, min_side, read_info
from training.optimizer import Average, Optimizer

TINY_2 = MicroDiTConfig(dim=512, depth=16, head_dim=32, mixer_depth=4, mixer_dim=512)


def main(device):
    if device.type == "cpu":
        keep_freed_memory()  # as train.py does
    if loader:
        return measure_loader(loader)
    runs, peak, hours = [read_run(path) for path in configs], flops.peak_flops(device) or roofline.PEAK, 0.0
    if configs and device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: peak {peak / 1e12:,.1f} TFLOP/s, "
              f"{flops.matmul_rate(device, torch.bfloat16) / 1e12:,.1f} on bf16 matrix products")
    elif not configs:
        measure_here(device)
    for run in runs:
        hours += print_run(*run, measure_run(*run, device, peak) if device.type == "cuda" else None)
    if configs:
        print(f"together {hours:.1f} hours, ${hours * gpus * price:,.0f}, without data preparation, checkpoints, "
              "validation, and what the GPUs wait for each other")


def read_run(path):
    """Return (name, settings, network) of a config file; the network fits the data, if they are there."""
    settings = script_settings("train.py", path)
    folder = min_side(settings["data"][0])[0]
    info = read_info(folder) if Path(folder, "dataset.json").is_file() else None
    return Path(path).stem, settings, flops.network_of(settings, info)


def print_run(name, settings, network, rate=None):
    """Print what a run costs, and return its hours. rate: images per second of a GPU, where it was measured."""
    total, active = flops.parameters(network)
    images, whole = settings["max_steps"] * settings["batch_size"], flops.run_flops(settings, network)
    print(f"{name}: {total / 1e6:,.1f} M parameters ({active / 1e6:,.1f} M active); "
          f"{settings['max_steps']:,} steps of {settings['batch_size']:,}")
    if not whole and not rate:
        raise ValueError(f"{name}: neither its FLOPs nor its speed are known, so neither is its price")
    if whole:
        print(f"  {whole:.2e} FLOP, forward {flops.forward_flops(network, settings['mask_ratio']) / 1e9:,.1f} GFLOP a "
              "picture")
    how = "measured" if rate else "counted, not measured"
    hours = (images / (gpus * rate) if rate else count_run(settings, network, total)) / 3600
    print(f"  {images / hours / 3600 / gpus:,.0f} images/s per GPU ({how}): {hours:.1f} hours, "
          f"${hours * gpus * price:,.0f} on {gpus} GPUs at ${price} an hour each")
    return hours


def count_run(settings, network, total):
    """Print what the steps of a run would take on H100s, by counting, and return the seconds of all."""
    masked = settings["max_steps"] - settings["unmasked_steps"] if settings["mask_ratio"] else 0
    seconds = 0.0
    for mask, steps in ((settings["mask_ratio"], masked), (0.0, settings["max_steps"] - masked)):
        if not steps:
            continue
        e = roofline.estimate(settings | {"mask_ratio": mask}, network, total, gpus)
        m, share = e.step, max(1, settings["batch_size"] // gpus)
        print(f"  {'masked' if mask else 'unmasked'}: {1e3 * e.seconds:,.0f} ms a step of {share} pictures on a GPU, "
              f"MFU {efficiency(network, mask, share / e.seconds, roofline.PEAK)}: {e.micros} micro-batches of "
              f"{1e3 * m.products:.0f} ms products, {1e3 * m.elementwise:.0f} ms elementwise ({m.moved / 1e9:.0f} GB), "
              f"{1e3 * m.attention:.0f} ms attention, {m.launches:,} launches; update {1e3 * e.update:.0f} ms\n"
              f"  memory {e.memory / 1e9:.1f} GB: {e.state / 1e9:.1f} GB of weights, gradients and moments, "
              f"{m.copies / 1e9:.1f} GB of weights in bf16, {m.saved / 1e9:.3f} GB a picture, and what is in the works")
        if profile:
            for shape, moved in m.wide.most_common(12):
                print(f"    {moved / 1e9:6.2f} GB of float32 {shape}")
        seconds += steps * e.seconds
    return seconds


def timed(function, device, before=lambda: None):
    """Return (median, least, most) seconds of calls of the function, each after a call of before()."""
    seconds = []
    for _ in range(rounds + 1):  # the first round warms up
        before()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if profile:
        with torch.profiler.profile() as recorded:
            function()
        print(recorded.key_averages().table(f"self_{device.type}_time_total", row_limit=20, max_name_column_width=60))
    return statistics.median(seconds[1:]), min(seconds[1:]), max(seconds[1:])


def efficiency(network, mask, images_per_second, peak):
    """Return the share of `peak` that the useful FLOPs of training make, as a text."""
    forward = flops.forward_flops(network, mask)
    return f"{100 * 3 * forward * images_per_second / peak:.1f} %" if forward else "not known"


def measure_here(device):
    """Time forward and backward of Tiny/2, in float32, against square matrix products."""
    torch.manual_seed(0)
    net, batch = MicroDiT(TINY_2).to(device), flops.random_batch(TINY_2, batch_size, mask_ratio, device)

    def step():
        edm_loss(net, *batch).backward()
        net.zero_grad()

    rate, (seconds, low, high) = flops.matmul_rate(device, torch.float32, 2048), timed(step, device)
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32: matrix products of "
          f"2048 at {rate / 1e9:.0f} GFLOP/s")
    print(f"Tiny/2, batch {batch_size}, mask ratio {mask_ratio}: {seconds:.3f} s a step ({low:.3f} to {high:.3f}), "
          f"useful FLOPs at {efficiency(TINY_2, mask_ratio, batch_size / seconds, rate)} of that rate")


def measure_run(name, settings, network, device, peak):
    """Time a GPU's share of a step; return images per second of the compiled one, None if it did not fit."""
    share = max(1, settings["batch_size"] // gpus)
    micro, rates = min(settings["micro_batch_size"], share), {}
    torch.cuda.empty_cache()
    try:
        net, step = make_step(settings, network, device, micro, share // micro)
        for version, module in (("compiled", torch.compile(net)), ("eager", net)):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            # train.py does not wait for the device between steps either
            three = timed(lambda module=module: [step(module) for _ in range(3)], device)
            seconds, low, high = (s / 3 for s in three)
            rate = rates[version] = share / seconds
            print(f"{name}, {version}: {seconds:.3f} s a step of {share} ({low:.3f} to {high:.3f}), {rate:,.0f} "
                  f"images/s, MFU {efficiency(network, settings['mask_ratio'], rate, peak)}, most memory "
                  f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    except torch.cuda.OutOfMemoryError:
        print(f"{name}: out of memory with {micro} pictures: try a smaller micro_batch_size in a copy of the config")
    return rates.get("compiled")


def make_step(settings, network, device, micro, micros):
    """Return (network, function that makes a step of training with it or its compiled form)."""
    torch.manual_seed(0)
    net, batch = MicroDiT(network).to(device), flops.random_batch(network, micro, settings["mask_ratio"], device)
    optimizer = Optimizer(net, settings["optimizer"], 1e-5, betas=(0.9, 0.999), weight_decay=settings["weight_decay"])
    average = Average(settings["ema_decay"], 0)

    def step(module):
        for _ in range(micros):
            with torch.autocast(device.type, torch.bfloat16):
                loss = edm_loss(module, *batch)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), settings["grad_clip"])
        average.update(net, 1, optimizer.step(1e-5, norm))
    return net, step


def measure_loader(folder):
    """Time the reading of random rows of a prepared folder, from the page cache and from the disk."""
    info = read_info(folder)
    dataset = Dataset(folder, max(info["resolutions"]) // info["vae"]["downsample"])
    ids = np.random.default_rng(0).integers(0, len(dataset), 256)
    size = sum(tensor.nbytes for tensor in dataset.read(ids).values())

    def forget():
        for path in Path(folder).glob("*.npy"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    print(f"{folder}: {len(dataset):,} rows of {size / 256e3:.1f} kB, 256 random ones at a time; medians of {rounds}")
    states = {"page cache": lambda: None, "disk": forget}
    for state in states if hasattr(os, "posix_fadvise") else ["page cache"]:  # Linux alone can forget a file
        for name, pool in (("1 thread", None), ("4 threads", ThreadPoolExecutor(4))):
            seconds, *_ = timed(partial(dataset.read, ids, pool), torch.device("cpu"), states[state])
            print(f"  {state:10}, {name:9} {size / seconds / 1e9:6.2f} GB/s, {256 / seconds:9,.0f} rows/s")


if __name__ == "__main__":
    try:
        main(pick_device(device))
    except (ValueError, OSError) as error:
        raise SystemExit(f"bench.py: {error}") from None
