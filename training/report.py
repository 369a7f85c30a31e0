"""How good a network is while it trains: its validation loss, sample pictures, and both on one page, progress.png."""
import math
from pathlib import Path

import numpy as np
import torch

from common.files import not_worth_a_run, read_jsonl
from common.images import decode_images, one_below_the_other, open_image, picture_grid, save_picture
from common.machine import autocast
from common.plot import line_plot
from model import edm_loss
from model import sample as draw_latents
from pictures.prepared import decoded_captions
from training.batches import generator
from training.checkpoint import last_of
from training.log import Log, Losses
from training.meter import duration, percent

# Validation is at these noise levels whatever the run trains on, so that runs can be compared
VAL_P_MEAN, VAL_P_STD, VAL_ROWS = -0.6, 1.2, 2048
SHOWN = 16  # sample pictures
MOST_SKIPPED = 10  # steps in a row without a finite gradient, after which a run stops


class Report:
    """Says how a run does while it trains. The loop adds to `losses`."""

    def __init__(self, state, settings, train_set, validation, dtype, meter, processes):
        """settings are train.py's, validation is (data set, its rows), dtype is that of the loop's matrix products."""
        s = self.settings = settings
        self.folder, self.processes, self.train_set, self.dtype = Path(s["out"]), processes, train_set, dtype
        (self.val_set, self.val_rows), self.meter = validation, meter
        self.losses = Losses(s["p_mean"], s["p_std"], processes)
        self.log = Log(self.folder, state.step, processes.rank > 0, s["wandb"], state.run)

    def log_step(self, state, lr, grad_norm, masked):
        """Log the steps since the last time; ValueError if too many in a row had to be skipped."""
        loss, extra, by_sigma = self.losses.read()
        norm, skipped, measured = grad_norm.item(), int(state.optimizer.skipped), self.meter.read(state.step)
        parts = [f"step {state.step:6,}/{self.settings['max_steps']:,}", f"loss {loss:.4f}"]
        if extra is not None:
            measured["extra_loss"] = extra
            parts.append(f"including an extra loss of {extra:.4f}")
        parts += [f"lr {lr:.2e}", f"grad norm {norm:.3f}", f"{measured['images_per_s']:,.0f} images/s",
                  f"MFU {percent(measured['mfu'])}", f"{duration(measured['eta_s'])} left"]
        if self.settings["mask_ratio"] and not masked:
            parts.append("unmasked")
        if skipped:
            parts.append(f"{skipped:,} steps skipped")
        self.log(" | ".join(parts), step=state.step, loss=loss, lr=lr, grad_norm=norm, skipped=skipped, **measured,
                 loss_by_sigma=by_sigma)
        if (in_a_row := int(state.optimizer.skipped_in_a_row)) >= MOST_SKIPPED:
            data = ", ".join(self.train_set.not_finite[:3])
            advice = (f"The data are not finite, {data}: prepare them again" if data else
                      "Try a lower learning_rate or grad_clip")
            raise ValueError(f"the last {in_a_row} steps had no finite gradients, the last good checkpoint is "
                             f"{last_of(self.folder)}. {advice}")

    def validate(self, state):
        """Log the validation loss of the averaged weights, and draw progress.png."""
        with self.meter.paused(), not_worth_a_run("validation"):
            loss, by_sigma = validate(state.averaged_net, self.val_set, self.val_rows,
                                      self.settings["micro_batch_size"], self.dtype, self.processes)
            self.log(f"step {state.step:6,} | validation loss {loss:.4f} | by noise level "
                     + "  ".join(f"{sigma}: {value:.3f}" for sigma, value in by_sigma.items()),
                     step=state.step, val_loss=loss, val_loss_by_sigma=by_sigma)
            if self.processes.rank == 0:
                draw_progress(self.folder)

    def draw(self, state):
        """Write sample pictures of the averaged weights, and draw progress.png again."""
        path = self.folder / "samples" / f"step_{state.step:08d}.png"
        with self.meter.paused(), not_worth_a_run("a grid of sample pictures"):
            images, texts = draw_samples(state.averaged_net, self.val_set, self.val_rows, state.vae, self.dtype,
                                         self.settings["sample_guidance"])
            path.parent.mkdir(exist_ok=True)
            save_picture(path, picture_grid(images, math.ceil(len(images) ** 0.5), texts))
            self.log.send(state.step, {}, path)
            draw_progress(self.folder)
        state.averaged_net.train()


@torch.no_grad()
def validate(net, val_set, ids, size, dtype, processes):
    """Return (loss, {noise level: loss}) without masking, on noise that never changes; `size` rows at a time."""
    n, device = len(ids), processes.device
    ids = ids[np.arange(n)]
    quantiles = (torch.randperm(n, generator=generator(7)) + 0.5) / n  # one noise level a row, evenly spread
    sigma = (VAL_P_MEAN + VAL_P_STD * torch.special.ndtri(quantiles.double())).exp().float()
    losses, failed = Losses(VAL_P_MEAN, VAL_P_STD, processes), None
    net.eval()
    try:
        for b in range(processes.rank * size, n, processes.world * size):
            rows = list(range(b, min(n, b + size)))
            batch = {name: t.to(device) for name, t in val_set.read(ids[rows]).items()}
            latents, levels = batch["latents"].float(), sigma[rows].to(device)
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator(8, i)) for i in rows]).to(device)
            with autocast(device, dtype):
                loss = edm_loss(net, latents, decoded_captions(batch).float(), levels, noise, reduce=False)
            losses.add(levels, loss)
    except Exception as error:  # the other processes wait for this one
        failed = str(error) or repr(error)
    net.train()
    if failed := next(filter(None, processes.gather(failed)), None):
        raise ValueError(failed)
    loss, _, by_sigma = losses.read()
    return loss, by_sigma


def draw_samples(net, val_set, ids, vae, dtype, guidance):
    """Return (pictures, their captions) of validation rows that are spread over all of them."""
    c, device = net.config, next(net.parameters()).device
    ids = ids[np.arange(min(SHOWN, len(ids))) * len(ids) // min(SHOWN, len(ids))]
    captions = decoded_captions(val_set.read(ids)).float().to(device)
    noise = torch.stack([torch.randn(c.latent_channels, c.latent_size, c.latent_size, generator=generator(9, i))
                         for i in range(len(ids))]).to(device)
    with autocast(device, dtype):
        latents = draw_latents(net.eval(), noise, captions, guidance_scale=guidance)
    return decode_images(vae, latents), val_set.texts(ids)


def draw_progress(folder):
    """Write progress.png: the losses so far, and below them the newest sample pictures with their captions."""
    with not_worth_a_run(f"drawing {folder}/progress.png"):
        folder, lines = Path(folder), {}
        for entry in read_jsonl(folder / "log.jsonl"):
            for name, key in (("training (at its own noise levels)", "loss"), ("validation", "val_loss")):
                point = entry.get("step"), entry.get(key)
                if all(type(number) in (int, float) and 0 < number < 1e30 for number in point):
                    lines.setdefault(name, []).append(point)
        parts = [line_plot(lines, "step", "loss", title=folder.name, log="y")] if lines else []
        if grids := sorted((folder / "samples").glob(f"step_{8 * '[0-9]'}.png")):
            with open_image(grids[-1]) as grid:
                parts.append(grid.convert("RGB"))
        if parts:
            save_picture(folder / "progress.png", one_below_the_other(parts))
