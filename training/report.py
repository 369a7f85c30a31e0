"""
How good a network is while it trains: its validation loss, sample pictures, and both on one page, progress.png.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import not_worth_a_run, read_jsonl
from common.images import BACKGROUND, GAP, decode_images, picture_grid, save_picture
from common.plot import line_plot
from model import edm_loss
from model import sample as draw_latents
from training.batches import generator
from training.checkpoint import steps_of
from training.dataset import decoded_captions
from training.log import BINS, Log, Losses, Meter, by_level, duration, noise_bins

# Validation is at these noise levels whatever the run trains on, so that runs can be compared
VAL_P_MEAN, VAL_P_STD, VAL_ROWS = -0.6, 1.2, 2048
DRAWN = 16  # sample pictures
BUSY = 0.7  # of its threads' time: with less, a process is not alone on its cores
MOST_SKIPPED = 10  # steps in a row without a finite gradient, after which a run stops


class Report:
    """Says how a run does while it trains. The loop adds to `losses`; `meter` is paused during reports."""

    def __init__(self, state, settings, train_set, validation, autocast, processes):
        """settings are train.py's, validation is (data set, its rows), autocast(device) is the loop's; train_set is
        asked for what was not finite."""
        s = self.settings = settings
        self.folder, self.processes, self.train_set = Path(s["out"]), processes, train_set
        (self.val_set, self.val_rows), self.autocast = validation, lambda: autocast(processes.device)
        info, main = self.val_set.info, processes.rank == 0
        with self.autocast():
            half = torch.is_autocast_enabled(processes.device.type)
        self.meter = Meter(state.net.config, s, info["text_encoder"]["length"], half, processes)
        self.losses = Losses(s["p_mean"], s["p_std"], processes)
        self.log = Log(self.folder, state.step, not main, s["wandb"], s)
        self.warned = False

    def log_step(self, state, lr, grad_norm, masked):
        """Log the steps since the last time; ValueError if too many in a row had to be skipped."""
        loss, by_sigma = self.losses.read()
        self.warn_of_busy_cores(state.step)
        norm, skipped, measured = grad_norm.item(), int(state.optimizer.skipped), self.meter.read(state.step)
        mfu = f"MFU {100 * measured['mfu']:.0f} %" if measured["mfu"] is not None else "MFU not known"
        parts = [f"step {state.step:6,}/{self.settings['max_steps']:,}", f"loss {loss:.4f}", f"lr {lr:.2e}",
                 f"grad norm {norm:.3f}", f"{measured['images_per_s']:,.0f} images/s", mfu,
                 f"{duration(measured['eta_s'])} left"]
        if price := self.settings["price"]:
            measured["dollars_left"] = price * self.processes.world * measured["eta_s"] / 3600
            parts.append(f"${measured['dollars_left']:,.2f} left")
        if self.settings["mask_ratio"] and not masked:
            parts.append("unmasked")
        if skipped:
            parts.append(f"{skipped:,} steps skipped")
        self.log(" | ".join(parts), step=state.step, loss=loss, lr=lr, grad_norm=norm, skipped=skipped, **measured,
                 loss_by_sigma=by_sigma)
        if (in_a_row := int(state.optimizer.skipped_in_a_row)) >= MOST_SKIPPED:
            saved = (steps_of(self.folder) or ["none yet"])[-1]
            data = self.train_set.not_finite
            advice = (f"The data are not finite, {', '.join(data[:3])}: prepare them again" if data else
                      "Try a lower learning_rate or grad_clip")
            raise ValueError(f"the last {in_a_row} steps had gradients that are not finite and were skipped. The last "
                             f"good checkpoint is {saved}. {advice}")

    def warn_of_busy_cores(self, step):
        """Say once what helps beside another program: the threads of a step wait for whichever of them it holds up."""
        threads, share = torch.get_num_threads(), self.meter.cpu_share()
        measured = step >= self.meter.first + 10 and self.processes.device.type == "cpu" and threads > 1
        if measured and share < BUSY and not self.warned and self.processes.rank == 0:
            self.warned = True
            print(f"note: other programs take {100 * (1 - share):.0f} % of the time of this run's {threads} threads, "
                  "which wait for each other. Beside them it is faster with OMP_NUM_THREADS=1 in front of the command: "
                  "stop it with Ctrl-C, and it goes on from there", file=sys.stderr)

    def validate(self, state):
        """Log the validation loss of the averaged weights, and draw progress.png."""
        with self.meter.paused():
            loss, by_sigma = validate(state.averaged_net, self.val_set, self.val_rows,
                                      self.settings["micro_batch_size"], self.autocast, self.processes)
            self.log(f"step {state.step:6,} | validation loss {loss:.4f} | by noise level "
                     + "  ".join(f"{sigma}: {value:.3f}" for sigma, value in by_sigma.items()),
                     step=state.step, val_loss=loss, val_loss_by_sigma=by_sigma)
            if self.processes.rank == 0:
                with not_worth_a_run(self.folder / "progress.png"):
                    draw_progress(self.folder)

    def draw(self, state):
        """Write sample pictures of the averaged weights, and draw progress.png again."""
        how = {"steps": self.settings["sample_steps"], "guidance_scale": self.settings["sample_guidance"]}
        with self.meter.paused():
            images, texts = draw_samples(state.averaged_net, self.val_set, self.val_rows, state.vae, self.autocast, how)
            with not_worth_a_run(self.folder / "samples"):
                self.log.picture(save_samples(self.folder, state.step, images, texts), state.step)
                draw_progress(self.folder)


@torch.no_grad()
def validate(net, val_set, ids, size, autocast, processes):
    """Return (loss, {noise level: loss}) without masking, on noise that never changes; `size` rows at a time."""
    n, device = len(ids), processes.device
    ids = ids[np.arange(n)]
    quantiles = (torch.randperm(n, generator=generator(7)) + 0.5) / n  # one noise level a row, evenly spread
    sigma = (VAL_P_MEAN + VAL_P_STD * torch.special.ndtri(quantiles.double())).exp().float()
    total, count = torch.zeros(2, BINS, dtype=torch.float64)
    net.eval()
    for b in range(processes.rank * size, n, processes.world * size):
        rows = list(range(b, min(n, b + size)))
        batch = {name: t.to(device) for name, t in val_set.read(ids[rows]).items()}
        latents, captions = batch["latents"].float(), decoded_captions(batch).float()
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator(8, i)) for i in rows]).to(device)
        with autocast():
            loss = edm_loss(net, latents, captions, sigma[rows].to(device), noise, reduce=False)
        bins = noise_bins(sigma[rows], VAL_P_MEAN, VAL_P_STD)
        total.index_add_(0, bins, loss.cpu().double())
        count.index_add_(0, bins, torch.ones(len(rows), dtype=torch.float64))
    net.train()
    sums = processes.sum(torch.stack([total, count]))
    return (sums[0].sum() / sums[1].sum()).item(), by_level(*sums, VAL_P_MEAN, VAL_P_STD)


def draw_samples(net, val_set, ids, vae, autocast, how):
    """Return (pictures, their captions) of the first validation rows. how: steps and guidance_scale of model.sample"""
    c, device = net.config, next(net.parameters()).device
    ids = ids[np.arange(min(DRAWN, len(ids)))]
    captions = torch.from_numpy(val_set.rows(ids)[1]).float().to(device)
    noise = torch.stack([torch.randn(c.latent_channels, c.latent_size, c.latent_size, generator=generator(9, i))
                         for i in range(len(ids))]).to(device)
    net.eval()
    with autocast():
        latents = draw_latents(net, noise, captions, **how)
    net.train()
    return decode_images(vae, latents), val_set.texts(ids)


def save_samples(folder, step, images, texts):
    """Write samples/step_N.png, a grid, and return its path; add a column to samples/strip.png: the same captions over
    the steps."""
    folder = Path(folder) / "samples"
    folder.mkdir(exist_ok=True)
    columns = math.ceil(len(images) ** 0.5)
    save_picture(folder / f"step_{step:08d}.png", picture_grid(images, columns, texts))
    (folder / "captions.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    column = picture_grid(images[:8], 1, cell=64)
    strip, steps = Image.new("RGB", (0, column.height)), []
    if (folder / "strip.png").exists():
        with Image.open(folder / "strip.png") as old:
            steps = [s for s in json.loads(old.text["steps"]) if s < step]  # later ones are done again
            strip = old.convert("RGB").crop((0, 0, len(steps) * (column.width - GAP), old.height))
    wider = Image.new("RGB", (strip.width + column.width, column.height), BACKGROUND)
    wider.paste(strip)
    wider.paste(column, (strip.width, 0))
    save_picture(folder / "strip.png", wider, steps=json.dumps([*steps, step]))
    return folder / f"step_{step:08d}.png"


def is_number(value):
    return type(value) in (int, float) and 0 < value < 1e30


def draw_progress(folder):
    """Write progress.png: the losses so far, and below them the newest sample pictures with their captions."""
    folder = Path(folder)
    entries = read_jsonl(folder / "log.jsonl")
    lines = {name: [(e["step"], e[key]) for e in entries if is_number(e.get("step")) and is_number(e.get(key))]
             for name, key in (("training (at its own noise levels)", "loss"), ("validation", "val_loss"))}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return
    parts = [line_plot(lines, "step", "loss", title=folder.name, log="y")]
    if grids := sorted((folder / "samples").glob("step_*.png")):
        with Image.open(grids[-1]) as grid:
            parts.append(grid.convert("RGB"))
    page = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, ((page.width - part.width) // 2, top))
        top += part.height
    save_picture(folder / "progress.png", page)
