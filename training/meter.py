"""What a training step costs, what machines can do at most, and how fast a run is."""
import contextlib
import functools
import math
import sys
import time
from dataclasses import astuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from model import MicroDiT, MicroDiTConfig, edm_loss, kept_patches

PEAKS = {"H200": 989.4e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12}  # dense bf16 FLOP/s, by datasheet
# torch 2.13 forgets a convolution's groups in the gradient of its weights; this is not for transposed convolutions
FORMULAS = {torch.ops.aten.convolution_backward: lambda grad, x, weight, *rest, **_:
            2 * math.prod(grad) * math.prod(weight[1:]) * sum(rest[-1][:2])}


@functools.cache  # XL/2 takes seconds
def count_flops(config, mask_ratio, mask, caption_length):
    """Return (FLOPs of a picture's forward and backward pass, None if not known; parameters that get no gradient).

    config: the values of a MicroDiTConfig. FLOPs are counted on the meta device, so not if model.py depends on data.
    A multiply-add counts as two operations; norms and gates count as none.
    """
    c = MicroDiTConfig(*config)  # ValueError, below too, if masking or the experts leave too few patches
    ids_keep = kept_patches(torch.rand(1, c.tokens), mask_ratio, mask).to("meta") if mask_ratio else None
    try:
        with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            latents = torch.empty(1, c.latent_channels, c.latent_size, c.latent_size)
            captions = torch.empty(1, caption_length, c.caption_dim)
            net = MicroDiT(c)
            edm_loss(net, latents, captions, torch.empty(1), latents, ids_keep).backward()
    except RuntimeError as error:
        print(f"warning: FLOPs and MFU are not known, as model.py depends on data ({error!r:.100})", file=sys.stderr)
        return None, ()
    return counter.get_total_flops(), tuple(name for name, p in net.named_parameters() if p.grad is None)


def matmul_rate(device, dtype, rounds=10):
    """Return FLOP/s of square matrix products, the fastest of a few, of a size that keeps the device busy."""
    size, seconds = 8192 if device.type == "cuda" else 1024, []
    a = torch.randn(size, size, device=device).to(dtype)
    for _ in range(rounds):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size ** 3 / min(seconds)


class Meter:
    """Measures images/s, MFU and the time left, of training alone.

    MFU is relative to the datasheet's dense bf16 peak of all processes, or else to a matrix product timed at the start.
    """

    def __init__(self, config, settings, caption_length, dtype, processes, masked_steps):
        """settings are train.py's; masked_steps(first, last) counts the masked ones among some steps."""
        self.settings, self.world, self.masked_steps = settings, processes.world, masked_steps
        self.pauses = self.training = 0.0  # seconds
        counted = [count_flops(astuple(config), ratio, settings["mask"], caption_length)
                   for ratio in (0.0, settings["mask_ratio"])]
        flops, self.without_gradient = [f for f, _ in counted], sorted({name for _, names in counted for name in names})
        self.known = None not in flops
        # without FLOPs, the time left counts steps; [unmasked, masked]
        self.flops = [settings["batch_size"] * f for f in flops] if self.known else [1, 1]
        name = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else ""
        self.peak, self.measured = next((peak for key, peak in PEAKS.items() if key in name), None), None
        if self.known and not self.peak:
            self.peak = self.measured = matmul_rate(processes.device, dtype)
        self.restart(0)

    def cost(self, first, last):
        """Return the FLOPs of the steps from `first` to before `last`, over all processes."""
        masked = self.masked_steps(first, last)
        return masked * self.flops[1] + (last - first - masked) * self.flops[0]

    def utilization(self, flops, seconds):
        """Return which share of the processes' peak these FLOPs in these seconds are (MFU), None if it is not known."""
        return flops / seconds / self.world / self.peak if self.known else None

    def restart(self, step):
        self.started, self.first = time.perf_counter(), step

    @contextlib.contextmanager
    def paused(self):
        """Do not count what happens within as training."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began
        self.pauses += time.perf_counter() - began

    def read(self, step):
        """Return {images_per_s, mfu, eta_s} since restart(), and restart."""
        seconds, done = time.perf_counter() - self.started, self.cost(self.first, step)
        self.training += seconds
        # validation, pictures and checkpoints will go on taking their share
        left = self.cost(step, self.settings["max_steps"]) * (1 + self.pauses / self.training)
        rate = (step - self.first) * self.settings["batch_size"] / seconds
        self.restart(step)
        return {"images_per_s": rate, "mfu": self.utilization(done, seconds), "eta_s": seconds / done * left}


def percent(share):
    """Format an MFU."""
    return "not known" if share is None else f"{100 * share:.0f} %"


def duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"
