"""Arithmetic: what a network costs to run and to train, and what machines can do at most."""
import functools
import sys
import time
from dataclasses import astuple, fields

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


def on_meta(config):
    """Return the network without numbers in it, which takes no memory and computes shapes alone."""
    with torch.device("meta"):
        return MicroDiT(config)


def random_batch(config, n, mask_ratio, device, caption_length=77):
    """Return random arguments of edm_loss, those after the network, for n pictures."""
    latents, noise = torch.randn(2, n, config.latent_channels, config.latent_size, config.latent_size, device=device)
    captions = torch.randn(n, caption_length, config.caption_dim, device=device)
    ids_keep = kept_patches(torch.rand(n, config.tokens), mask_ratio).to(device) if mask_ratio else None
    return latents, captions, torch.rand(n, device=device) + 0.1, noise, ids_keep


def forward_flops(config, mask_ratio=0.0, caption_length=77):
    """Return the floating-point operations of one picture's forward pass, or None where they are not known."""
    return counted_flops(astuple(config), mask_ratio, caption_length)


@functools.cache  # XL/2 takes seconds
def counted_flops(config, mask_ratio, caption_length):
    """Count them on the meta device, as on CPU tensors the counter misses attention.

    A multiply-add is two operations; norms and gates are none. What depends on data, as nonzero does, cannot run there.
    """
    config = MicroDiTConfig(*config)
    try:
        net = on_meta(config)
        with FlopCounterMode(display=False) as counter:
            edm_loss(net, *random_batch(config, 1, mask_ratio, "meta", caption_length))
    except RuntimeError as error:  # or its kind, NotImplementedError
        cause = f"{error}".partition("\n")[0][:100]
        warn_once(f"FLOPs and MFU are not known, as model.py depends on data ({type(error).__name__}: {cause} ...)")
        return None
    return counter.get_total_flops()


@functools.cache
def warn_once(text):
    print(f"warning: {text}", file=sys.stderr)


def run_flops(settings, config):
    """Return the FLOPs of a whole run, three times those of its forward passes; None where they are not known."""
    masked, unmasked = forward_flops(config, settings["mask_ratio"]), forward_flops(config)
    if masked is None or unmasked is None:
        return None
    masked_steps = settings["max_steps"] - settings["unmasked_steps"]
    return 3 * settings["batch_size"] * (masked_steps * masked + settings["unmasked_steps"] * unmasked)


def parameters(config):
    """Return (all parameters, those that a token meets: of the experts, as many as take it on average)."""
    sizes = {name: p.numel() for name, p in on_meta(config).named_parameters()}
    experts = sum(size for name, size in sizes.items() if name.endswith(("mlp.w1", "mlp.w2")))
    idle = experts * (1 - config.expert_capacity / config.num_experts) if config.num_experts else 0
    return sum(sizes.values()), round(sum(sizes.values()) - idle)


def peak_flops(device):
    """Return the dense bf16 peak of a CUDA device from its datasheet; None if it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def matmul_rate(device, dtype, size=0, rounds=10):
    """Return FLOP/s of square matrix products, the fastest of a few; size 0: one that keeps the device busy."""
    size, products = (size or 8192, 10) if device.type == "cuda" else (size or 1024, 1)
    a, seconds = torch.randn(size, size, device=device).to(dtype), []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(products):
            b = a @ a
        b[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return products * 2 * size ** 3 / min(seconds)
