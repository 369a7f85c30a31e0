"""
Pictures -> a small autoencoder of your own, for prepare_latents.py, where no published one is at hand.

    python train_vae.py                                             # of the built-in set, 2 to 4 minutes on two cores
    python train_vae.py --source photos --out runs/photos_vae
    python prepare_latents.py --vae runs/vae/vae.safetensors --resolutions 64 --out data/shapes64

vae.safetensors in the run folder is the autoencoder; reconstructions.png shows held-out pictures above what it makes of
them. It takes pictures of any size. A run goes on with the same command, a finished one with a larger --max_steps.
"""
from configurator import configure

# What stands in parentheses is checked.
source = "shapes"           # "shapes", "emoji", a folder of pictures or archives, as in prepare_latents.py
font = ""                   # file of the font that emoji are from; empty: this computer's
out = "runs/vae"            # run folder
resolution = 64             # side of the square pictures, in pixels (>= 8)
limit = 8000                # use the first so many pictures of the source; they are kept in memory (>= 2)
downsample = 8              # how many times smaller the sides of the latents are than those of the picture (4 | 8)
latent_channels = 4         # numbers at each place of the latents; with few of them, networks learn faster (>= 1)
width = 96                  # channels at the coarsest level; finer ones have fewer (>= 1)
latent_noise = 0.6          # most noise that is added to latents of variance 1, so that the decoder mends errors (>= 0)
max_steps = 1500            # steps in all (>= 1)
batch_size = 16             # pictures per step (>= 2)
learning_rate = 4e-3        # learning rate, which falls in the second half (> 0)
seed = 2024                 # decides weights, data order, flips and noise (>= 0, < 9e18)
eval_every = 400            # steps between validations, reconstructions and saves of the state to go on from (>= 1)
device = "auto"             # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())

import math
import time
from pathlib import Path
from shlex import quote

import torch

from common.folders import claim, described, lock
from common.images import picture_grid, save_picture, to_images
from common.machine import keep_freed_memory, pick_device
from common.processes import run_script, world_size
from common.tensors import check_tensors, read_tensors, strip
from encoders.tiny import TinyAutoencoder, config_for
from pictures.decode import read_squares
from pictures.sources import BUILT_IN, find_parts, fingerprint, shapes_parts
from training.batches import generator
from training.checkpoint import save
from training.log import Log
from training.meter import duration
from training.optimizer import Optimizer

WARMUP = 40                 # steps
MOMENTUM = 0.85             # Muon's: of 0.95 the error after 1,150 steps is a sixth larger
ABSOLUTE_ERROR = 0.2        # weight of the absolute error beside the squared one
LOG_EVERY = 100             # steps between console lines
MOST_HELD, SHOWN = 256, 8   # pictures to validate on, every hundredth; of these in reconstructions.png
OURS = r"(vae|state)\.safetensors|log\.jsonl|vae\.json|reconstructions\.png"  # what it writes into its folder


class Trained(torch.nn.Module):
    """Holds what is trained: an autoencoder, and a norm that gives its latents variance 1 until the encoder has it."""

    def __init__(self, config):
        super().__init__()
        self.net = TinyAutoencoder(config).to(memory_format=torch.channels_last)
        self.norm = torch.nn.BatchNorm2d(latent_channels, affine=False, momentum=0.05)

    def forward(self, images, noise=0.0):
        """Return what comes out of the images' normed latents with noise (B,C,h,w) added."""
        return self.net.images_of(self.norm(self.net.latents_of(images)) + noise)

    @torch.no_grad()
    def absorb_norm(self, images):
        """Make the norm part of the encoder, with the mean and variance of all pictures as they are now."""
        self.norm.reset_running_stats()
        self.norm.momentum = None  # a plain mean, in place of a moving one, which lags behind
        for part in images[:512].split(16):
            self.norm(self.net.latents_of(as_input(part)))
        self.net.absorb(self.norm)


def train(model, optimizer, step, images, held, save_state):
    """Train until max_steps on the error of pictures that come out of noisy latents."""
    log, clock, first_step = Log(out, step), time.time(), step
    shape = (batch_size, latent_channels, resolution // downsample, resolution // downsample)
    while step < max_steps:
        g = generator(seed, step)
        batch = images[torch.randint(len(images), (batch_size,), generator=g)]
        flipped = torch.rand(batch_size, 1, 1, 1, generator=g) < 0.5
        x = as_input(torch.where(flipped, batch.flip(2), batch))
        noise = latent_noise * torch.rand(batch_size, 1, 1, 1, generator=g) * torch.randn(shape, generator=g)
        wrong = model(x, noise.to(x)) - x
        (wrong.square().mean() + ABSOLUTE_ERROR * wrong.abs().mean()).backward()
        lr = learning_rate * min(1, (step + 1) / WARMUP, 2 * (1 - step / max_steps))  # it falls in the second half
        optimizer.step(lr, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        step += 1
        last = step == max_steps
        if step % LOG_EVERY == 0 or last:
            error, rate = wrong.detach().square().mean().item(), (step - first_step) / (time.time() - clock)
            log(f"step {step:6,}/{max_steps:,} | squared error {error:.4f} | {rate * batch_size:,.0f} images/s | "
                f"{duration((max_steps - step) / rate)} left", step=step, loss=error, images_per_s=rate * batch_size)
            if not math.isfinite(error):
                raise ValueError(f"the error at step {step:,} is {error}: try a lower --learning_rate")
        if step % eval_every == 0 or last:
            validate(model, step, held, log)
            save_state(step)


def as_input(pictures):
    """Turn uint8 (B,H,W,3) into (B,3,H,W) in [-1, 1] on the device."""
    return pictures.to(pick_device(device)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def validate(model, step, held, log):
    """Log the error of held-out pictures, and show the first of them above their reconstructions."""
    model.eval()
    shown = torch.cat([as_input(part) for part in held.split(16)])
    made = torch.cat([model(part) for part in shown.split(16)])
    model.train()
    squared, absolute = (made - shown).square().mean().item(), (made - shown).abs().mean().item()
    log(f"step {step:6,} | held out: squared error {squared:.4f}, absolute {absolute:.4f}, "
        f"PSNR {10 * math.log10(4 / squared):.1f} dB", step=step, val_loss=squared, val_absolute_error=absolute)
    grid = picture_grid(to_images(shown[:SHOWN]) + to_images(made[:SHOWN]), min(SHOWN, len(shown)))
    save_picture(Path(out) / "reconstructions.png", grid)


def main():
    if resolution % downsample:
        raise ValueError(f"resolution is {resolution}: it must be a multiple of downsample {downsample}")
    if world_size() > 1:
        raise ValueError("train_vae.py trains in one process: start it with python, not with torchrun")
    lock(out)
    file, state_file = Path(out) / "vae.safetensors", Path(out) / "state.safetensors"
    builtin = source == "shapes" and not font
    parts = shapes_parts(limit, resolution, limit) if builtin else find_parts(source, limit, font)
    config = config_for(downsample, latent_channels, width)
    known = described(out, "vae.json", OURS) or {}  # refuses a folder of others before the pictures are read
    content = {} if "source_hash" in known else fingerprint(parts)  # an earlier version wrote source_hash instead
    command = {key: value for key, value in (settings | content).items()
               if not key.startswith("captions") and (key, value) != ("font", "")}  # earlier versions had neither
    command["outer_norms"] = config["outer_norms"]  # earlier versions lack these layers, so their states do not fit
    images = torch.from_numpy(read_squares(parts, limit, resolution, workers=0 if source in BUILT_IN else -1))
    held = torch.arange(len(images)) % max(100, len(images) // MOST_HELD) == 0  # of all classes of a sorted source
    images, held = images[~held], images[held]
    claim(out, "vae.json", OURS, command)
    old, tensors = read_tensors(state_file, ("",)) if state_file.exists() else ({"step": 0}, {})
    step = old["step"]
    if step >= max_steps and file.exists():
        return print(f"{file} is already finished: this same command made it")

    keep_freed_memory()
    torch.manual_seed(seed)
    model = Trained(config).to(pick_device(device))
    optimizer = Optimizer(model, "muon", learning_rate, betas=(0.9, 0.99), momentum=MOMENTUM, weight_decay=0.0,
                          is_matrix=lambda name, parameter: parameter.ndim == 4)
    if step:
        check_tensors(model, strip(tensors, "model."), state_file)
        model.load_state_dict(strip(tensors, "model."))
        optimizer.load(strip(tensors, "optimizer."), state_file)

    def save_state(step):
        tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.tensors().items()}
        save(state_file, tensors, {"step": step})
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(images):,} pictures, "
          f"{len(held):,} to validate on, {max_steps:,} steps of {batch_size}"
          + f", going on from step {step:,}" * (step > 0), flush=True)
    train(model, optimizer, step, images, held, save_state)
    model.absorb_norm(images)
    save(file, model.net.state_dict(), {"config": config})
    print(f"done: {file}, for: python prepare_latents.py --vae {quote(str(file))} --resolutions {resolution} ...")


if __name__ == "__main__":
    run_script("train_vae.py", main, f"The same command goes on from the state in {out}, if there is one")
