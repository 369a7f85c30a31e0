"""
Pictures -> a small autoencoder of your own, for prepare_latents.py, where no published one is at hand.

    python train_vae.py                                                  # of the drawn set, two minutes on two cores
    python train_vae.py --source photos --out runs/photos_vae
    python prepare_latents.py --vae runs/vae/vae.safetensors --resolutions 64 --out data/shapes64

vae.safetensors in the run folder is the autoencoder; reconstructions.png shows held-out pictures, and below them what
it makes of them. It is convolutional, so it takes pictures of any size. A stopped run goes on with the same command.
"""
from configurator import configure

source = "shapes"           # "shapes", a folder of pictures, archives, or a list of pictures, as in prepare_latents.py
root = ""                   # folder that the names in a list of pictures start from; empty: where the list lies
out = "runs/vae"            # run folder
resolution = 64             # side of the square pictures, in pixels
limit = 8000                # use the first so many pictures of the source; they are kept in memory
downsample = 8              # how many times smaller the sides of the latents are: 4 or 8
latent_channels = 4         # numbers at each place of the latents: few, so that they say more than pixels do
width = 96                  # channels at the coarsest level; finer ones have fewer
latent_noise = 0.6          # most noise added to latents of variance 1: the decoder learns to clean up small errors
max_steps = 1600            # steps in all
batch_size = 8              # pictures per step
learning_rate = 4e-3        # of Muon for the convolutions, and of AdamW for all else; falls in the second half
seed = 2024                 # of weights, data order, flips and noise
eval_every = 600            # steps between validations, reconstructions and states to go on from
device = "auto"             # cuda, mps or cpu; auto: the best there is
overwrite = False           # delete what an earlier run left in `out`

if __name__ == "__main__":
    settings = configure(globals())

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.files import write_atomic
from common.images import picture_grid, to_images
from common.machine import keep_freed_memory, pick_device
from encoders.tiny import TinyAutoencoder, config_for
from pictures.decode import read_squares
from pictures.sources import drawn_parts, find_parts, fingerprint
from training import checkpoint
from training.batches import generator
from training.log import Log, duration
from training.optimizer import Optimizer
from training.state import as_json, differences

WARMUP = 40                 # steps
ABSOLUTE_ERROR = 0.2        # weight of the absolute error beside the squared one
LOG_EVERY = 100             # steps between console lines
MOST_HELD, SHOWN = 256, 8   # pictures to validate on, the last hundredth; of these in reconstructions.png
NOT_COMPARED = ("out", "device", "overwrite", "eval_every")


@dataclass
class State:
    """Holds what a run goes on with. norm gives the latents variance 1; at the end the encoder absorbs it."""
    net: TinyAutoencoder
    norm: torch.nn.BatchNorm2d
    optimizer: Optimizer
    step: int = 0

    def save(self, path, about):
        parts = {"net": self.net.state_dict(), "norm": self.norm.state_dict(), "optimizer": self.optimizer.tensors()}
        tensors = {f"{part}.{name}": t for part, found in parts.items() for name, t in found.items()}
        checkpoint.save(path, tensors, about | {"step": self.step})

    def load(self, path):
        run, tensors = checkpoint.read(path, ("",))
        self.net.load_state_dict(checkpoint.strip(tensors, "net."))
        self.norm.load_state_dict(checkpoint.strip(tensors, "norm."))
        self.optimizer.load(checkpoint.strip(tensors, "optimizer."))
        self.step = run["step"]


def train(state, images, held, save):
    """Train until max_steps on the squared and absolute error of pictures, which come out of noisy latents."""
    net, log, clock, done = state.net, Log(out, state.step), time.time(), state.step
    while state.step < max_steps:
        g = generator(seed, state.step)
        batch = images[torch.randint(len(images), (batch_size,), generator=g)]
        flipped = torch.rand(batch_size, 1, 1, 1, generator=g) < 0.5
        x = as_input(torch.where(flipped, batch.flip(2), batch), net)
        z = state.norm(net.latents_of(x))  # (B,C,h,w) of variance 1
        noise = latent_noise * torch.rand(batch_size, 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
        wrong = net.images_of(z + noise.to(z)) - x
        (wrong.square().mean() + ABSOLUTE_ERROR * wrong.abs().mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        state.optimizer.step(learning_rate_at(state.step), norm)
        state.step += 1
        step, last = state.step, state.step == max_steps
        if step % LOG_EVERY == 0 or last:
            error, rate = wrong.detach().square().mean().item(), (step - done) / (time.time() - clock)
            log(f"step {step:6,}/{max_steps:,} | squared error {error:.4f} | {rate * batch_size:,.0f} images/s | "
                f"{duration((max_steps - step) / rate)} left", step=step, loss=error, images_per_s=rate * batch_size)
            if not math.isfinite(error):
                raise ValueError(f"the error at step {step:,} is {error}: try a lower --learning_rate")
        if step % eval_every == 0 or last:
            validate(state, held, log)
            if not last:
                save()
        if step % LOG_EVERY == 0 or step % eval_every == 0:
            clock, done = time.time(), step


def learning_rate_at(step):
    """Rise in WARMUP steps, stay, and fall over the second half of all steps."""
    return learning_rate * min(1, (step + 1) / WARMUP, 2 * (1 - step / max_steps))


def as_input(pictures, net):
    """Turn uint8 (B,H,W,3) into (B,3,H,W) in [-1, 1] on the network's device; in memory the channels stay last."""
    return pictures.to(next(net.parameters()).device).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def validate(state, held, log):
    """Log the error of held-out pictures, and show the first of them above their reconstructions."""
    net, norm, step = state.net, state.norm.eval(), state.step
    given = [as_input(part, net) for part in held.split(16)]
    made = [net.images_of(norm(net.latents_of(x))) for x in given]
    norm.train()
    given, made = torch.cat(given), torch.cat(made)
    squared, absolute = (made - given).square().mean().item(), (made - given).abs().mean().item()
    log(f"step {step:6,} | held out: squared error {squared:.4f}, absolute {absolute:.4f}, "
        f"PSNR {10 * math.log10(4 / squared):.1f} dB", step=step, val_loss=squared, val_absolute_error=absolute)
    grid = picture_grid(to_images(given[:SHOWN]) + to_images(made[:SHOWN]), min(SHOWN, len(given)))
    write_atomic(Path(out) / "reconstructions.png", lambda file: grid.save(file, "PNG"))


def check_settings():
    for name, least in (("resolution", 8), ("limit", 2), ("latent_channels", 1), ("max_steps", 1), ("batch_size", 2),
                        ("eval_every", 1), ("learning_rate", 0), ("latent_noise", 0)):
        if not least <= settings[name] < math.inf:
            raise ValueError(f"{name} is {settings[name]}: it must be a number from {least} on")
    if downsample not in (4, 8) or resolution % downsample:
        raise ValueError(f"downsample is {downsample}: it must be 4 or 8, and divide the resolution {resolution}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("it trains in one process: start it with python, not with torchrun")


def load_pictures(parts):
    """Return (pictures to train on, pictures to validate on), uint8 (n, resolution, resolution, 3)."""
    images, skipped = read_squares(parts, limit, resolution, workers=0 if source == "shapes" else -1)
    if skipped:
        print(f"{len(skipped):,} pictures cannot be used, the first is {skipped[0]}")
    if len(images) < 2:
        raise ValueError(f"{source} has {len(images)} pictures that can be used: at least 2 are needed")
    held = min(MOST_HELD, math.ceil(len(images) / 100))
    return torch.from_numpy(images).split([len(images) - held, held])


def is_there(path, about):
    """Return whether this very run has left a file; ValueError if it is another's, or damaged."""
    if not path.exists():
        return False
    old = checkpoint.read(path)[0]
    if differ := differences(old["settings"], about["settings"]) + differences(old, {"source": about["source"]}):
        raise ValueError(f"{path} is of another run ({'; '.join(differ)}): give another --out, or --overwrite")
    return True


def new_state(config):
    """Return a State with random weights, of the seed."""
    torch.manual_seed(seed)
    net = TinyAutoencoder(config).to(pick_device(device), memory_format=torch.channels_last)
    norm = torch.nn.BatchNorm2d(latent_channels, affine=False, momentum=0.05).to(pick_device(device))
    return State(net, norm, Optimizer(net, "muon", learning_rate, betas=(0.9, 0.99), weight_decay=0.0,
                                      is_matrix=lambda name, parameter: parameter.ndim == 4))


@torch.no_grad()
def absorb_norm(state, images):
    """Make the norm part of the encoder, with the mean and variance of pictures as they are now."""
    state.norm.reset_running_stats()
    state.norm.momentum = None  # the mean of all that follow, in place of a moving one, which lags behind
    for part in images[:512].split(16):
        state.norm(state.net.latents_of(as_input(part, state.net)))
    state.net.absorb(state.norm)


def main():
    check_settings()
    file, state_file = Path(out) / "vae.safetensors", Path(out) / "state.safetensors"
    parts = drawn_parts(range(limit), resolution, limit) if source == "shapes" else find_parts(source, limit, root)
    about = as_json({"settings": {k: v for k, v in settings.items() if k not in NOT_COMPARED},
                     "source": fingerprint(parts), "config": config_for(downsample, latent_channels, width)})
    if not overwrite and is_there(file, about):
        return print(f"{file} is there already, of this very run")
    going_on = not overwrite and is_there(state_file, about)
    images, held = load_pictures(parts)

    keep_freed_memory()
    state = new_state(about["config"])
    if going_on:
        state.load(state_file)
    elif overwrite:  # only after everything that could be refused has been read
        file.unlink(missing_ok=True)
        state_file.unlink(missing_ok=True)
    Path(out).mkdir(parents=True, exist_ok=True)
    where = f", going on from step {state.step:,}" if state.step else ""
    print(f"{out}: {sum(p.numel() for p in state.net.parameters()) / 1e6:.1f} M parameters, {len(images):,} pictures, "
          f"{max_steps:,} steps of {batch_size}{where}", flush=True)
    train(state, images, held, lambda: state.save(state_file, about))
    absorb_norm(state, images)
    checkpoint.save(file, state.net.state_dict(), about)
    state_file.unlink(missing_ok=True)
    print(f"done: {file}. Use it with: python prepare_latents.py --vae {file} --resolutions {resolution} ...")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_vae.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"train_vae.py: stopped. The same command goes on from the last state in {out}") from None
