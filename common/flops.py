"""Arithmetic: what a network costs to run and to train, and what machines can do at most."""
import functools
import re
import sys
import time
from dataclasses import asdict, fields

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import MicroDiT, MicroDiTConfig, edm_loss, kept_patches

PEAKS = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12}  # dense bf16 FLOP/s, by datasheet


def network_of(settings, info=None):
    """Return the network of train.py's settings; `info`, the dataset.json, adds what depends on the data."""
    known = {f.name: settings[f.name] for f in fields(MicroDiTConfig) if f.name in settings}
    if info:
        known |= {"latent_channels": info["vae"]["latent_channels"], "caption_dim": info["text_encoder"]["dim"]}
    return MicroDiTConfig(**known)


def random_batch(config, n, mask_ratio, device, caption_length=77):
    """Return random arguments of edm_loss, those after the network, for n pictures."""
    shape = (n, config.latent_channels, config.latent_size, config.latent_size)
    latents, noise = (torch.randn(shape, device=device) for _ in range(2))
    captions = torch.randn(n, caption_length, config.caption_dim, device=device)
    ids_keep = kept_patches(torch.rand(n, config.tokens), mask_ratio).to(device) if mask_ratio else None
    return latents, captions, torch.rand(n, device=device) + 0.1, noise, ids_keep


def forward_flops(config, mask_ratio=0.0, caption_length=77):
    """Return the floating-point operations of one picture's forward pass, counted on the meta device.

    There, as on CPU tensors the counter misses attention. A multiply-add is two operations; norms and gates are none.
    Return None after a warning if an operation depends on data, for instance nonzero, as it cannot run there.
    """
    counts = flops_by_module(tuple(asdict(config).items()), mask_ratio, caption_length)
    return counts and counts["Global"]


@functools.cache  # XL/2 takes seconds
def flops_by_module(fields, mask_ratio, caption_length=77):
    """Return {name of a module: FLOPs of its forward pass}, or None."""
    config = MicroDiTConfig(**dict(fields))
    try:
        with torch.device("meta"):
            net = MicroDiT(config)
        with FlopCounterMode(display=False) as counter:
            edm_loss(net, *random_batch(config, 1, mask_ratio, "meta", caption_length))
    except RuntimeError as error:  # or its kind, NotImplementedError
        cause = f"{error}".partition("\n")[0][:100]
        warn_once(f"FLOPs and MFU are not known, as model.py depends on data ({type(error).__name__}: {cause} ...)")
        return None
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


@functools.cache
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


def flop_shares(config, mask_ratio=0.0):
    """Return {part of the network: its share of the forward FLOPs}, by the names of the modules."""
    counts = flops_by_module(tuple(asdict(config).items()), mask_ratio)
    shares = dict.fromkeys(("patch mixer", "backbone attention", "dense MLPs", "experts"), 0.0)
    for name, flops in counts.items():
        mlp = "experts" if f"{name}.router" in counts else "dense MLPs"
        part = {"mixer.N": "patch mixer", "blocks.N.attn": "backbone attention", "blocks.N.mlp": mlp,
                "blocks.N.cross_attn": "backbone attention"}.get(re.sub(r"\d+", "N", name.removeprefix("MicroDiT.")))
        if part:
            shares[part] += flops / counts["Global"]
    return shares | {"all else": 1 - sum(shares.values())}


def run_flops(settings, config):
    """Return the FLOPs of a whole run, three times those of its forward passes; None where they are not known."""
    masked, unmasked = forward_flops(config, settings["mask_ratio"]), forward_flops(config)
    if masked is None or unmasked is None:
        return None
    masked_steps = settings["max_steps"] - settings["unmasked_steps"]
    return 3 * settings["batch_size"] * (masked_steps * masked + settings["unmasked_steps"] * unmasked)


def activation_bytes(config, mask_ratio):
    """Return what the backward pass of one picture keeps, by estimate: every saved tensor once, in bf16."""
    with torch.device("meta"):
        net = MicroDiT(config)
    weights, kept = {id(p) for p in net.parameters()}, {}

    def keep(tensor):
        storage = tensor if tensor._base is None else tensor._base
        if not {id(tensor), id(storage)} & weights:
            kept[id(storage)] = storage  # held, so that no other gets its id
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        edm_loss(net, *random_batch(config, 1, mask_ratio, "meta"))
    return 2 * sum(tensor.numel() for tensor in kept.values())


def parameters(config):
    """Return (all parameters, those that a token meets: of the experts, as many as take it on average)."""
    with torch.device("meta"):
        net = MicroDiT(config)
    total = sum(p.numel() for p in net.parameters())
    experts = sum(p.numel() for n, p in net.named_parameters() if n.endswith(("mlp.w1", "mlp.w2")))
    active = total - experts * (1 - config.expert_capacity / config.num_experts) if config.num_experts else total
    return total, round(active)


def peak_flops(device):
    """Return the dense bf16 peak of a CUDA device from its datasheet; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def matmul_rate(device, dtype, size=0, rounds=10):
    """Return FLOP/s of square matrix products, the fastest of a few; size 0: one that keeps the device busy."""
    size, products = (size or 8192, 10) if device.type == "cuda" else (size or 1024, 1)
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(products):
            b = a @ a
        b[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return products * 2 * size ** 3 / best
