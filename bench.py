"""
What training costs: arithmetic, the speed of a step and where it goes, and the whole recipe in hours and dollars.

    python bench.py                         # this machine: Tiny/2 against its own matmul rate and one-hot dispatch
    python bench.py config/xl2_256.py config/xl2_256_unmasked.py config/xl2_512.py config/xl2_512_unmasked.py
    python bench.py --loader data/shapes    # how fast rows are read, against the disk and the page cache

With configs and a GPU: a step of each (its share of the global batch, in micro-batches, optimizer and all), compiled,
eager, and eager with one-hot expert dispatch as in the released code, in one run; MFU against the datasheet's dense
bf16 peak; memory; and the recipe from these. With configs and no GPU: the arithmetic, and this machine's own speed.
FLOPs are three times the forward pass of the network as it runs, counted on the meta device.
"""
import sys

from configurator import configure

configs = ()                # config files; may also be given without --configs
batch_size = 4              # pictures per step of the small run without configs
mask_ratio = 0.75           # of that run
rounds = 5                  # every version is timed so often, in turn; the median counts
gpus = 8                    # for the recipe; every one has its share of the global batch
price = 3.75                # dollars for an hour of one GPU
assumed_mfu = 0.5           # for the recipe where there is no measurement
loader = ""                 # prepared folder whose rows are to be read
backend = "inductor"        # of torch.compile
keep_memory = True          # have the C library keep freed memory, as train.py does on a CPU
profile = False             # also list the operators that take longest
device = "auto"             # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    files = [arg for arg in sys.argv[1:] if arg.endswith(".py") and not arg.startswith("-")]
    if files and "--configs" not in sys.argv:
        sys.argv = [sys.argv[0], "--configs", *files, *(arg for arg in sys.argv[1:] if arg not in files)]
    settings = configure(globals())

import contextlib
import copy
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from common.flops import forward_flops, matmul_rate, parameters, peak_flops
from common.machine import keep_freed_memory, pick_device
from configurator import read_config, setting_names
from model import MicroDiT, MicroDiTConfig, edm_loss, expert_tokens, kept_patches
from training.dataset import Dataset, min_side, read_info

TINY_2 = MicroDiTConfig(dim=512, depth=16, head_dim=32, mixer_depth=4, mixer_dim=512)
H100 = 989.4e12


def one_hot_forward(self, x, router_input=None):
    """ExpertChoiceMLP.forward with one-hot dispatch, for comparison"""
    k = expert_tokens(self.capacity, x.shape[1], self.num_experts)
    probs = self.router(x if router_input is None else router_input).float().softmax(-1)
    weight, index = probs.transpose(1, 2).topk(k, dim=-1)                        # (B, E, k)
    one_hot = F.one_hot(index, x.shape[1]).to(x.dtype)                           # (B, E, k, T)
    taken = torch.einsum("bekt,btd->bekd", one_hot, x)
    hidden = F.gelu(torch.einsum("bekd,edh->bekh", taken, self.w1))
    out = torch.einsum("bekh,ehd->bekd", hidden, self.w2)
    return torch.einsum("bekt,bek,bekd->btd", one_hot, weight.to(x.dtype), out)


@contextlib.contextmanager
def one_hot_dispatch():
    ours = model.ExpertChoiceMLP.forward
    model.ExpertChoiceMLP.forward = one_hot_forward
    try:
        yield
    finally:
        model.ExpertChoiceMLP.forward = ours


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def run_of(path, more=None):
    """(name, settings, network) of a config file, with train.py's defaults and what its data say, if they are there.

    more: {setting: value} that the command line of train.py would change.
    """
    source = Path(train.__file__).read_text(encoding="utf-8")
    defaults = {name: getattr(train, name) for name in setting_names(source)}
    found = defaults | read_config(path, defaults) | (more or {})
    network = {f.name: found[f.name] for f in fields(MicroDiTConfig) if f.name in found}
    with contextlib.suppress(ValueError):
        info = read_info(min_side(found["data"][0])[0])
        network |= {"latent_channels": info["vae"]["latent_channels"], "caption_dim": info["text_encoder"]["dim"]}
    return Path(path).stem, found, MicroDiTConfig(**network)


def run_flops(s, network):
    """Of a whole run, forward and backward"""
    unmasked = s["unmasked_steps"] if s["mask_ratio"] else s["max_steps"]
    each = (s["max_steps"] - unmasked) * forward_flops(network, s["mask_ratio"]) + unmasked * forward_flops(network)
    return 3 * s["batch_size"] * each


def activation_bytes(network, mask):
    """What the backward pass of one picture keeps, by estimate: every saved tensor once, 2 bytes a number (bf16)"""
    with torch.device("meta"):
        net = MicroDiT(network)
    weights, kept = {id(p) for p in net.parameters()}, {}

    def keep(tensor):
        if id(tensor) not in weights and (tensor._base is None or id(tensor._base) not in weights):
            storage = tensor if tensor._base is None else tensor._base
            kept[id(storage)] = storage  # held, so that no other gets its id
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        edm_loss(net, *inputs(network, 1, mask, "meta"))
    return 2 * sum(t.numel() for t in kept.values())


def where_it_goes(network, mask):
    """{part: share of the forward FLOPs}, by the modules that do them"""
    with torch.device("meta"):
        net = MicroDiT(network)
    with FlopCounterMode(display=False) as counter:
        edm_loss(net, *inputs(network, 1, mask, "meta"))
    totals = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    shares = dict.fromkeys(PARTS, 0.0)
    for name, part, _ in parts_of(net):
        shares[part] += totals.get(f"MicroDiT.{name}", 0) / totals["Global"]
    return shares | {"all else": 1 - sum(shares.values())}


PARTS = ("patch mixer", "backbone attention", "dense MLPs", "experts")


def parts_of(net):
    """(name of a module, which of PARTS it belongs to, the module)"""
    for i, block in enumerate(net.mixer):
        yield f"mixer.{i}", "patch mixer", block
    for i, block in enumerate(net.blocks):
        yield f"blocks.{i}.attn", "backbone attention", block.attn
        yield f"blocks.{i}.cross_attn", "backbone attention", block.cross_attn
        sparse = isinstance(block.mlp, model.ExpertChoiceMLP)
        yield f"blocks.{i}.mlp", "experts" if sparse else "dense MLPs", block.mlp


def time_shares(net, forward_backward, where):
    """{part: share of the time} of an eager forward and backward pass, waiting for the device around every part"""
    spent, began, hooks = dict.fromkeys(PARTS, 0.0), {}, []

    def now():
        if where.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(name):
        def hook(*_):
            began[name] = now()
        return hook

    def stop(name, part):
        def hook(*_):
            spent[part] += now() - began[name]
        return hook

    for name, part, module in parts_of(net):
        hooks += [module.register_forward_pre_hook(start(name)), module.register_forward_hook(stop(name, part)),
                  module.register_full_backward_pre_hook(start(name)),
                  module.register_full_backward_hook(stop(name, part))]
    total = -now()
    forward_backward()
    total += now()
    for hook in hooks:
        hook.remove()
    shares = {part: seconds / total for part, seconds in spent.items()}
    return shares | {"all else": 1 - sum(shares.values())}


def percentages(shares):
    return ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items())


def print_arithmetic(runs):
    print("Arithmetic (bytes by estimate: activations in bf16, weights, gradients and AdamW's moments in float32):")
    for name, s, network in runs:
        total, active = parameters(network)
        forward = forward_flops(network, s["mask_ratio"])
        state = total * 4 * (4 + (s["ema_decay"] > 0))  # weights, gradients, two moments, average
        pictures = activation_bytes(network, s["mask_ratio"])
        whole, row = run_flops(s, network), 2 * network.latent_channels * network.latent_size ** 2 + 77 * 1024 * 2
        print(f"  {name}: {total / 1e6:,.1f} M parameters ({active / 1e6:,.1f} M active), forward "
              f"{forward / 1e9:,.1f} GFLOP a picture; {s['max_steps']:,} steps of {s['batch_size']:,} are {whole:.2e}")
        print(f"    memory {state / 1e9:.1f} GB + {pictures / 1e6:,.0f} MB a picture "
              f"({(state + pictures * s['micro_batch_size']) / 1e9:.0f} GB with its micro-batches of "
              f"{s['micro_batch_size']}); {row / 1000:.0f} kB read a picture; FLOPs: "
              + percentages(where_it_goes(network, s["mask_ratio"])))


def print_recipe(runs, rates):
    """rates: {name: images per second of one GPU}; where there is none, assumed_mfu of an H100's peak"""
    print(f"The recipe on {gpus} GPUs at ${price} an hour each:")
    hours = 0.0
    for name, s, network in runs:
        pictures = s["max_steps"] * s["batch_size"]
        rate = rates.get(name) or pictures * assumed_mfu * H100 / run_flops(s, network)
        h = pictures / (gpus * rate) / 3600
        hours += h
        how = "measured" if name in rates else f"if at {100 * assumed_mfu:.0f} % of an H100's peak"
        print(f"  {name:20} {rate:7,.0f} images/s per GPU ({how}): {h:6.1f} hours, ${h * gpus * price:,.0f}")
    print(f"  together {hours:.1f} hours, ${hours * gpus * price:,.0f}, without data preparation, checkpoints, "
          "validation, and what the GPUs wait for each other")


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def inputs(config, n, mask, where):
    """Arguments of edm_loss after the network"""
    shape = (n, config.latent_channels, config.latent_size, config.latent_size)
    ids = kept_patches(torch.rand(n, config.tokens, device="cpu"), mask).to(where) if mask else None
    latents, noise = (torch.randn(shape, device=where) for _ in range(2))
    caption = torch.randn(n, 77, config.caption_dim, device=where)
    return latents, caption, torch.rand(n, device=where) + 0.1, noise, ids


def timed(function, where):
    started = time.perf_counter()
    function()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def medians(versions, where):
    """{name: (median, least, most)} seconds of each function, in turn"""
    times = {name: [] for name in versions}
    for i in range(rounds + 1):
        for name, function in versions.items():
            seconds = timed(function, where)
            if i:  # the first round warms up
                times[name].append(seconds)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def measure_config(name, s, network, where, peak):
    """A GPU's share of a step of this run, in three versions -> images per second of the compiled one"""
    share = s["batch_size"] // gpus
    micro = min(s["micro_batch_size"], share)
    torch.manual_seed(0)
    net = MicroDiT(network).to(where)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5, weight_decay=s["weight_decay"], fused=True)
    average = copy.deepcopy(net).requires_grad_(False) if s["ema_decay"] else None
    batch = inputs(network, micro, s["mask_ratio"], where)
    compiled = torch.compile(net, backend=backend)

    def forward_backward(f):
        with torch.autocast(where.type, torch.bfloat16):
            loss = edm_loss(f, *batch)
        loss.backward()

    def update():
        torch.nn.utils.clip_grad_norm_(net.parameters(), s["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        if average:
            torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in net.parameters()], 0.001)

    def one_hot():
        with one_hot_dispatch():
            forward_backward(net)

    most = "not measured"
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # compiles, and makes the optimizer's state
        forward_backward(compiled)
        update()
    if where.type == "cuda":
        most = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    versions = {"compiled": lambda: forward_backward(compiled), "eager": lambda: forward_backward(net),
                "eager, one-hot": one_hot}
    for version, function in list(versions.items()):
        try:
            function()
        except torch.cuda.OutOfMemoryError:
            print(f"  {name:18} {version:15} out of memory with {micro} pictures")
            del versions[version]
    time_of = medians(versions, where)
    optimizing = medians({"optimizer": lambda: (forward_backward(compiled), update())}, where)["optimizer"][0]
    optimizing = max(0.0, optimizing - time_of["compiled"][0])
    useful = 3 * forward_flops(network, s["mask_ratio"])
    rates = {}
    for version, (seconds, low, high) in time_of.items():
        step = seconds * share / micro + optimizing
        rates[version] = share / step
        print(f"  {name:18} {version:15} {step:7.3f} s a step of {share} ({low:.3f} to {high:.3f} s for {micro}), "
              f"{share / step:6,.0f} images/s, MFU {100 * useful * share / step / peak:.1f} %")
    print(f"    optimizer {optimizing:.3f} s of it; most memory (compiled) {most}; time of the eager version: "
          + percentages(time_shares(net, lambda: forward_backward(net), where)))
    if profile:
        with torch.profiler.profile() as recorded:
            forward_backward(compiled)
        print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=20, max_name_column_width=60))
    return rates["compiled"]


def measure_here(where):
    """Tiny/2 in float32 against the machine's own matmul rate, and against one-hot dispatch"""
    torch.manual_seed(0)
    net, arguments = MicroDiT(TINY_2).to(where), inputs(TINY_2, batch_size, mask_ratio, where)
    a = torch.randn(2048, 2048, device=where)

    def step():
        edm_loss(net, *arguments).backward()
        net.zero_grad()

    def one_hot_step():
        with one_hot_dispatch():
            step()

    def matmuls():
        for _ in range(10):
            a @ a

    times = medians({"this code": step, "one-hot dispatch": one_hot_step, "matmul 2048": matmuls}, where)
    rate = 10 * 2 * 2048 ** 3 / times["matmul 2048"][0]
    useful, one_hot = step_flops(TINY_2), step_flops(TINY_2, one_hot_dispatch)
    print(f"{where.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads), "
          f"torch {torch.__version__}, float32; "
          f"Tiny/2, batch {batch_size}, mask ratio {mask_ratio}, median of {rounds}")
    print(f"matmul 2048 x 2048: {rate / 1e9:.0f} GFLOP/s")
    for name, flops in (("this code", useful), ("one-hot dispatch", one_hot)):
        seconds, low, high = times[name]
        print(f"{name:17}: {seconds:.3f} s a step ({low:.3f} to {high:.3f}), {flops / 1e9:.0f} GFLOP, "
              f"useful FLOPs at {100 * useful / seconds / rate:.0f} % of the matmul rate")
    print("time: " + percentages(time_shares(net, step, where)))
    print(f"one-hot dispatch takes {times['one-hot dispatch'][0] / times['this code'][0]:.2f} x the time of this code")
    if profile:
        with torch.profiler.profile() as recorded:
            step()
        print(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))


def step_flops(config, context=contextlib.nullcontext):
    """Floating-point operations of the small run's step: three times the forward pass"""
    with torch.device("meta"):
        net = MicroDiT(config)
    with FlopCounterMode(display=False) as counter, context():
        edm_loss(net, *inputs(config, batch_size, mask_ratio, "meta"))
    return 3 * counter.get_total_flops()


def measure_loader(folder):
    """Random rows of a prepared folder, against reading its files from front to back, cached and not"""
    info = Dataset(folder, largest_latents(folder))
    files = sorted(Path(folder).glob("*.npy"))
    one = sum(a.size for a in info.shards[0][1].values())
    rng, pool = np.random.default_rng(0), ThreadPoolExecutor(4)

    def forget():
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def front_to_back():
        left = 256 * one
        buffer = bytearray(1 << 20)
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while left > 0 and (n := file.readinto(buffer)):
                    left -= n
        return 256 * one - left

    def random(pool=None):
        ids = rng.integers(0, len(info), 256)
        info.read(ids, pool)
        return 256 * one

    ways = {"front to back": front_to_back, "random rows": random, "random rows, 4 threads": lambda: random(pool)}
    print(f"{folder}: {len(info):,} rows of {one / 1000:.1f} kB, 256 at a time; medians of {rounds}")
    for state in ("page cache", "disk"):
        rates = {name: [] for name in ways}
        for path in files if state == "page cache" else ():
            path.read_bytes()
        for i in range(rounds + 1):
            for name, way in ways.items():
                if state == "disk":
                    forget()
                started = time.perf_counter()
                done = way()
                if i:
                    rates[name].append(done / (time.perf_counter() - started))
        for name, found in rates.items():
            rate = statistics.median(found)
            print(f"  {state:10} {name:24} {rate / 1e9:6.2f} GB/s, {rate / one:9,.0f} rows/s")


def largest_latents(folder):
    info = read_info(folder)
    return max(info["resolutions"]) // info["vae"]["downsample"]


def main():
    where = pick_device(device)
    if where.type == "cpu" and keep_memory:
        keep_freed_memory()
    if loader:
        measure_loader(loader)
        return
    runs = [run_of(path) for path in configs]
    if not runs:
        measure_here(where)
        return
    print_arithmetic(runs)
    rates = {}
    if where.type == "cuda":
        peak = peak_flops(where) or H100
        print(f"{torch.cuda.get_device_name(where)}, torch {torch.__version__}: peak {peak / 1e12:,.1f} TFLOP/s by its "
              f"datasheet, {matmul_rate(where, torch.bfloat16, 8192) / 1e12:,.1f} on bf16 matrix products of 8192")
        for name, s, network in runs:
            try:
                rates[name] = measure_config(name, s, network, where, peak)
            except torch.cuda.OutOfMemoryError:
                print(f"  {name}: out of memory; try a smaller micro_batch_size in a copy of the config")
            torch.cuda.empty_cache()
    else:
        measure_here(where)
    print_recipe(runs, rates)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"bench.py: {error}") from None
