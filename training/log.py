"""What a run says while it trains: console lines, log.jsonl, and the loss by noise level, as one mean hides much."""
from pathlib import Path

import torch

from common.files import append_lines, check_still_there, not_worth_a_run, read_jsonl, write_lines

BINS = 5  # noise levels are reported in so many bins of equal probability


class Losses:
    """Sums the losses of pictures by noise level, on the device, until they are read. Only finite ones count.

    Levels fall into bins that are equally probable under ln sigma ~ N(p_mean, p_std^2).
    """

    def __init__(self, p_mean, p_std, processes):
        self.p_mean, self.p_std, self.processes = p_mean, p_std, processes
        dtype = torch.float32 if processes.device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, BINS, dtype=dtype, device=processes.device)  # of losses, pictures, extra losses
        self.has_extra = False

    def add(self, sigma, loss, extra=None):
        """Add the losses (B,) of pictures at noise levels sigma (B,), and the extra loss that is part of them."""
        loss, quantile = loss.detach(), torch.special.ndtr((sigma.log() - self.p_mean) / self.p_std)
        finite, bins = loss.isfinite(), (quantile * BINS).long().clamp(0, BINS - 1)
        parts = [loss, torch.ones_like(loss)]
        if extra is not None:
            self.has_extra = True
            parts.append(extra.detach().expand_as(loss))
        for total, part in zip(self.sums, parts):
            total.index_add_(0, bins, torch.where(finite, part, 0).to(total.dtype))

    def read(self):
        """Return (mean loss, mean extra loss or None, {median of a bin: loss}) of all processes, and start anew."""
        total, count, extra = self.processes.sum(self.sums).clone()
        self.sums.zero_()
        middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
        sigmas = (self.p_mean + self.p_std * torch.special.ndtri(middle)).exp().tolist()
        by_sigma = {f"{s:.2g}": (t / n).item() for s, t, n in zip(sigmas, total, count) if n}
        n = count.sum()
        return (total.sum() / n).item(), (extra.sum() / n).item() if self.has_extra else None, by_sigma


class Log:
    """Prints lines, and writes the same as JSON lines and to Weights & Biases if wanted."""

    def __init__(self, folder, step, silent=False, wandb="", run=None):
        self.path, self.silent, self.wandb = Path(folder) / "log.jsonl", silent, None
        self.first_step, self.waiting = step, []  # lines that could not be written yet
        with not_worth_a_run("Weights & Biases"):
            if wandb and not silent:
                import wandb as client
                self.wandb = client.init(project=wandb, name=Path(folder).name, id=run["id"], resume="allow",
                                         dir=str(folder), config=run["settings"])

    def __call__(self, text, **values):
        if self.silent:
            return
        print(text, flush=True)
        check_still_there(self.path)
        self.waiting.append(values)
        with not_worth_a_run(f"writing {self.path}"):
            if self.first_step is not None and self.path.exists():  # without the lines of steps that are done again
                write_lines(self.path, [entry for entry in read_jsonl(self.path) if self.first_step
                                        and type(entry.get("step")) is int and entry["step"] <= self.first_step])
            self.first_step = None
            append_lines(self.path, self.waiting)
            self.waiting = []
        self.send(values["step"], values)

    def send(self, step, values, picture=""):
        """Send values, and maybe a picture's file, to Weights & Biases, if wanted."""
        with not_worth_a_run("Weights & Biases"):
            if self.wandb:
                import wandb as client
                self.wandb.log(values | ({"samples": client.Image(str(picture))} if picture else {}), step=step)
