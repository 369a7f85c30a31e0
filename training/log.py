"""
What a run tells: console lines, log.jsonl, speed and hours left, and the loss by noise level, because one mean over all
levels hides what is happening.
"""
import contextlib
import time
from pathlib import Path

import torch

from common.files import append_lines, not_worth_a_run, read_jsonl, write_lines
from common.flops import forward_flops, matmul_rate, peak_flops

BINS = 5  # noise levels are reported in so many bins of equal probability
GUESSED_MFU = 0.3  # before the first steps are measured: what one H100 made of the paper's network
LAUNCHES = 0.03    # likewise: seconds of a GPU's smallest step, in which it waits for launches


def noise_bins(sigma, mean, std):
    """Return the bin 0..BINS-1 of each noise level. All are equally probable under ln sigma ~ N(mean, std^2)."""
    quantile = torch.special.ndtr((sigma.log() - mean) / std)
    return (quantile * BINS).long().clamp(0, BINS - 1)


def by_level(total, count, mean, std):
    """Return {median noise level of a bin: mean loss} of the bins that have any."""
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    sigmas = (mean + std * torch.special.ndtri(middle)).exp().tolist()
    return {f"{s:.2g}": (t / n).item() for s, t, n in zip(sigmas, total, count) if n}


class Losses:
    """Sums the losses of pictures by noise level, on the device, until they are read. Only finite ones count."""

    def __init__(self, p_mean, p_std, processes):
        self.p_mean, self.p_std, self.processes = p_mean, p_std, processes
        dtype = torch.float32 if processes.device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, BINS, dtype=dtype, device=processes.device)

    def add(self, sigma, loss):
        """Add the losses (B,) of pictures at noise levels sigma (B,)."""
        loss = loss.detach()
        finite, bins = loss.isfinite(), noise_bins(sigma, self.p_mean, self.p_std)
        self.sums[0].index_add_(0, bins, torch.where(finite, loss, 0).to(self.sums.dtype))
        self.sums[1].index_add_(0, bins, finite.to(self.sums.dtype))

    def read(self):
        """Return (mean loss, {noise level: loss}) of all processes' pictures, and begin again."""
        total, count = self.processes.sum(self.sums)
        found = (total.sum() / count.sum()).item(), by_level(total, count, self.p_mean, self.p_std)
        self.sums.zero_()
        return found


class Log:
    """Prints lines for people, and writes the same as JSON lines for programs and to Weights & Biases if wanted."""

    def __init__(self, folder, step, silent=False, wandb="", settings=None):
        self.path, self.silent, self.wandb = Path(folder) / "log.jsonl", silent, None
        self.first_step, self.waiting = step, []  # lines that could not be written yet
        if wandb and not silent:
            import wandb as client
            name = Path(folder).name
            self.wandb = client.init(project=wandb, name=name, id=name, resume="allow", dir=str(folder),
                                     config=settings)

    def __call__(self, text, **values):
        if self.silent:
            return
        print(text, flush=True)
        self.waiting.append(values)
        with not_worth_a_run(self.path):
            if self.first_step is not None and self.path.exists():  # without the lines of steps that are done again
                write_lines(self.path, [entry for entry in read_jsonl(self.path) if self.first_step
                                        and type(entry.get("step")) is int and entry["step"] <= self.first_step])
            self.first_step = None
            append_lines(self.path, self.waiting)
            self.waiting = []
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def picture(self, path, step):
        """Send a picture to Weights & Biases, if wanted."""
        if self.wandb:
            import wandb as client
            self.wandb.log({"samples": client.Image(str(path))}, step=step)


class Meter:
    """Measures images/s, MFU and time left, of training alone.

    MFU is relative to the datasheet's dense bf16 peak, or else to a matrix product timed at the start, times the number
    of processes.
    """

    def __init__(self, config, run, caption_length, half, processes):
        """run holds the settings batch_size, max_steps, unmasked_steps and mask_ratio."""
        self.run, self.world, self.pauses, self.training = run, processes.world, 0.0, 0.0
        flops = [forward_flops(config, ratio, caption_length) for ratio in (0.0, run["mask_ratio"])]
        self.known = None not in flops
        # without FLOPs, time left counts steps; [unmasked, masked] of a training step, forward and backward
        self.flops = [3 * run["batch_size"] * f for f in flops] if self.known else [1, 1]
        self.peak, self.measured = peak_flops(processes.device), None
        if self.known and not self.peak:
            self.measured = matmul_rate(processes.device, torch.bfloat16 if half else torch.float32)
        self.restart(0)

    def cost(self, first, last):
        """Return the FLOPs of the steps from `first` to before `last`, over all processes."""
        masked_until = self.run["max_steps"] - self.run["unmasked_steps"] if self.run["mask_ratio"] else 0
        masked = max(0, min(last, masked_until) - first)
        return masked * self.flops[1] + (last - first - masked) * self.flops[0]

    def expected(self, step):
        """Estimate the seconds from this step to the end before anything is measured; None if FLOPs are not known."""
        rate = (self.peak or self.measured or 0) * self.world * GUESSED_MFU
        least = (self.run["max_steps"] - step) * LAUNCHES if self.peak else 0
        return max(least, self.cost(step, self.run["max_steps"]) / rate) if rate else None

    def restart(self, step):
        self.started, self.cpu_started, self.first = time.perf_counter(), time.process_time(), step

    @contextlib.contextmanager
    def paused(self):
        """Do not count what happens within as training."""
        began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self.started += time.perf_counter() - began
        self.cpu_started += time.process_time() - cpu_began
        self.pauses += time.perf_counter() - began

    def cpu_share(self):
        """Return how much of its threads' time this process had since restart(), 0 to 1. They spin while they wait for
        each other, so on a machine of their own they have nearly all of it."""
        return (time.process_time() - self.cpu_started) / (time.perf_counter() - self.started) / torch.get_num_threads()

    def read(self, step):
        """Return {images_per_s, mfu, eta_s} since restart(), and restart. mfu is None if FLOPs are not known."""
        seconds, done = time.perf_counter() - self.started, self.cost(self.first, step)
        self.training += seconds
        # validation, pictures and checkpoints will go on taking their share
        eta = seconds / done * self.cost(step, self.run["max_steps"]) * (1 + self.pauses / self.training)
        mfu = done / seconds / self.world / (self.peak or self.measured) if self.known else None
        rate = (step - self.first) * self.run["batch_size"] / seconds
        self.restart(step)
        return {"images_per_s": rate, "mfu": mfu, "eta_s": eta}


def duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"
