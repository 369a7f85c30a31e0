"""
Arithmetic: what a network costs to run, and what machines can do at most.
"""
import functools
import time
from dataclasses import asdict

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import MicroDiT, MicroDiTConfig, kept_patches

# dense bf16 peak of the datasheets, FLOP/s
PEAKS = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12}


def forward_flops(config, mask_ratio=0.0, caption_length=77):
    """Floating-point operations of one picture's forward pass, counted on the meta device.

    There, as on CPU tensors the counter misses attention. A multiply-add is two operations; norms and gates are none.
    """
    return count(tuple(asdict(config).items()), mask_ratio, caption_length)


@functools.cache  # XL/2 takes seconds
def count(fields, mask_ratio, caption_length):
    config = MicroDiTConfig(**dict(fields))
    with torch.device("meta"):
        net = MicroDiT(config)
        x = torch.empty(1, config.latent_channels, config.latent_size, config.latent_size)
        caption = torch.empty(1, caption_length, config.caption_dim)
        c_noise = torch.empty(1)
    ids = kept_patches(torch.zeros(1, config.tokens), mask_ratio).to("meta") if mask_ratio else None
    with FlopCounterMode(display=False) as counter:
        net(x, c_noise, caption, ids, kept_only=ids is not None)
    return counter.get_total_flops()


def parameters(config):
    """(all parameters, those that a token meets: of the experts, as many as take it on average)"""
    with torch.device("meta"):
        net = MicroDiT(config)
    total = sum(p.numel() for p in net.parameters())
    experts = sum(p.numel() for n, p in net.named_parameters() if n.endswith(("mlp.w1", "mlp.w2")))
    active = total - experts * (1 - config.expert_capacity / config.num_experts) if config.num_experts else total
    return total, round(active)


def peak_flops(device):
    """Dense bf16 peak of a CUDA device from its datasheet; None if it is not in the table"""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def matmul_rate(device, dtype, size=0, rounds=10):
    """FLOP/s of square matrix products on this device, the fastest of a few; size 0: one that keeps the device busy"""
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
