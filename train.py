"""
Prepared data -> checkpoints. A run that is started again goes on as if it had never stopped.

    python train.py config/tiny.py                                   # the laptop run, some nine minutes
    python train.py config/tiny.py --mixer_depth 0 --out runs/no_mixer
    torchrun --nproc_per_node=8 train.py config/small.py             # one process per GPU (or CPU)
"""
from common.machine import exit_with_launcher, keep_compiled
from configurator import COMMANDS, configure

# In the comments below, what stands in parentheses is checked: a range as (>= 0, < 1), or the words that are allowed.
# data and output
data = ("data/shapes",)       # prepared folders (prepare_latents.py), used as one set; FOLDER@512 leaves out pictures
                              # whose shorter side had fewer pixels; random: rows for --check, without any folder
val_data = ()                 # prepared folders to validate on; empty: some rows of each of `data`, never trained on
out = ""                      # run folder; empty: runs/ and the config's name
init_from = ""                # start from the weights of this checkpoint or run folder
init_optimizer = False        # with init_from: take the state of its optimizer, too
# training
batch_size = 2048             # pictures per step, over all processes (>= 1)
micro_batch_size = 256        # pictures per forward pass of one process, at most (>= 1)
max_steps = 250_000           # steps in all (>= 1)
unmasked_steps = 0            # number of final steps without masking (>= 0)
mask_ratio = 0.75             # fraction of the patches dropped after the mixer (>= 0, < 1)
mask = "random"               # which patches stay: any, or equally many in each cell of 2 x 2 (random | grouped)
learning_rate = 2.4e-4        # learning rate at its peak (> 0)
warmup_steps = 2500           # steps of linear warmup from 0 (>= 0)
schedule = "cosine"           # how the rate falls after the warmup; trapezoid: in the second half of the run
                              # (cosine | trapezoid | constant)
min_learning_rate = 0.33      # where the rate ends, as a fraction of its peak (>= 0, <= 1)
optimizer = "adamw"           # muon: Muon for the blocks' matrices and AdamW for the rest; adamw16: AdamW with its
                              # averages in 16 bits, which saves 4.7 GB with XL/2 (adamw | adamw16 | muon)
beta2 = 0.999                 # AdamW's decay of the average of squared gradients; beta1 is 0.9 (>= 0, < 1)
momentum = 0.95               # Muon's momentum (>= 0, < 1)
weight_decay = 0.1            # weight decay of every parameter (>= 0)
grad_clip = 0.25              # largest gradient norm; 0: no clipping (>= 0)
p_mean = -0.6                 # noise levels are ln sigma ~ N(p_mean, p_std^2)
p_std = 1.2                   # standard deviation of ln sigma (> 0)
caption_dropout = 0.1         # share of captions that are replaced by zeros, which guidance needs (>= 0, < 1)
ema_decay = 0.0               # decay of a moving average of the weights; 0: no average (>= 0, < 1)
ema_start = 0                 # step at which the average starts (>= 0)
seed = 2024                   # decides weights, data order, noise, masks and dropout (>= 0, < 9e18)
# machine
device = "auto"               # cuda, mps or cpu; auto: the best there is
dtype = "auto"                # type of matrix products, while weights stay in float32; auto: bfloat16 on cuda, but
                              # float16 with loss scaling on older cards (auto | bfloat16 | float16 | float32)
compile = False               # compile the network: it takes minutes at the start, and steps on a GPU are faster
activation_checkpointing = False  # compute the blocks again in the backward pass: less memory for a third more work
# reporting
log_every = 50                # steps between console lines (>= 1)
eval_every = 500              # steps between validations; 0: never (>= 0)
sample_every = 1000           # steps between grids of sample pictures; 0: never (>= 0)
sample_guidance = 5.0         # guidance scale of those pictures, and of sample.py where --guidance_scale is not given
checkpoint_every = 1000       # steps between checkpoints; 0: only at the end (>= 0)
keep_checkpoints = 2          # how many checkpoints are kept; older ones are deleted (>= 1)
price = 0.0                   # dollars for an hour of one GPU, for --check (>= 0)
wandb = ""                    # Weights & Biases project that gets the log, too (pip install wandb); empty: none
check = False                 # try links, memory, disk and a few steps, say what the run would take, and write nothing
# The fields of model.MicroDiTConfig are settings, too (settings["dim"]), except latent_channels and caption_dim

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()
    if compile:
        keep_compiled()

import contextlib
import importlib.util
import inspect
import itertools
import math
import signal
import sys
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from shlex import quote

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.files import not_worth_a_run
from common.machine import autocast, compute_dtype, keep_freed_memory, pick_device
from common.processes import join, run_script, world_size
from common.tensors import read_tensors, strip
from encoders import load_described_vae
from model import MicroDiT, MicroDiTConfig, edm_loss, kept_patches
from pictures.prepared import Dataset, Rows, check_same_encoders
from training import checkpoint
from training.batches import Batches, RandomRows, own_places
from training.check import try_run
from training.log import Losses
from training.meter import Meter
from training.optimizer import Average, Optimizer
from training.report import VAL_ROWS, Report
from training.signals import Signals
from training.state import State, take_folder

PATIENCE = timedelta(hours=1)  # how long to wait for another process; a large checkpoint takes time on a slow disk

# --- The loop ---


def train(state, net, batches, report, processes):
    """Train until max_steps or a signal; return the signal's number or 0. net is state.net, wrapped and compiled."""
    places = own_places(batch_size, micro_batch_size, processes.rank, processes.world)
    stream = batches.stream(range(state.step, max_steps), places, processes.device)
    signals, first_step, stop_signal = Signals(processes), state.step + 1, 0
    report.meter.restart(state.step)

    while state.step < max_steps and not stop_signal:
        lr, masked = learning_rate_at(state.step), is_masked(state.step)
        grad_norm = make_step(state, net, stream, len(places), masked, report.losses, processes.world)

        if state.step == first_step and processes.rank == 0:
            state.begin(out)
        stop_signal, done = signals.agreed(), state.step == max_steps
        if state.step % log_every == 0 or done or stop_signal or state.step == first_step:
            report.log_step(state, lr, grad_norm, masked)
        if is_due(state.step, eval_every) and not stop_signal:  # a launcher gives a process seconds to end
            report.validate(state)
        if is_due(state.step, sample_every) and not stop_signal and processes.rank == 0:
            report.draw(state)
        if (is_due(state.step, checkpoint_every) or done or stop_signal) and processes.rank == 0:
            with report.meter.paused():
                state.save(out, keep_checkpoints)
    return stop_signal if state.step < max_steps else 0


def make_step(state, net, stream, micros, masked, losses, world=1):
    """Make a step of this process's next `micros` micro-batches, and return the norm of its gradients, unclipped.

    net is state.net, wrapped in DDP and compiled where that is wanted.
    """
    for m in range(micros):
        latents, captions, sigma, noise, uniforms = next(stream)
        ids_keep = kept_patches(uniforms, mask_ratio, mask) if masked else None  # (B,K)
        # the processes average the sum of their gradients once, behind a step's last micro-batch
        with net.no_sync() if world > 1 and m < micros - 1 else contextlib.nullcontext():
            with autocast(latents.device, compute_dtype(dtype, latents.device)):
                loss = edm_loss(net, latents, captions, sigma, noise, ids_keep, reduce=False)  # (B,)
            scaled = state.optimizer.scaled(loss.sum() * (world / batch_size))  # DDP takes the mean over the processes
            scaled.backward()
        losses.add(sigma, loss, state.net.extra_loss)
    state.optimizer.unscale()
    grad_norm = clip_grad_norm_(state.net.parameters(), grad_clip or math.inf)
    # if the norm is not finite, the weights stay as they are; `bad` is on the device, and nobody waits for it here
    bad = state.optimizer.step(learning_rate_at(state.step), grad_norm, zero_in_place=world > 1)
    state.step += 1
    state.average.update(state.net, state.step, bad)
    return grad_norm


def learning_rate_at(step):
    """Return the rate of a step: a rise, and then what `schedule` says, down to min_learning_rate of the peak."""
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if schedule == "constant":
        return learning_rate
    progress = min(1, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else min(1, 2 * (1 - progress))
    return learning_rate * (min_learning_rate + (1 - min_learning_rate) * height)


def masked_steps(first, last):
    """Return how many steps from `first` to before `last` drop patches: all but the last unmasked_steps of the run."""
    return max(0, min(last, max_steps - unmasked_steps) - first) if mask_ratio else 0


def is_masked(step):
    return masked_steps(step, step + 1) > 0


def is_due(step, every):
    """Return whether something is to be done after this step; every 0 means never."""
    return every > 0 and (step % every == 0 or step == max_steps)


# --- Checks and set-up ---


def check_settings():
    """Refuse what cannot work, before anything is loaded."""
    if batch_size < world_size():
        raise ValueError(f"batch_size {batch_size} is too small: each of {world_size()} processes needs a picture")
    if not data or "random" in data and not check:
        raise ValueError(f"data is {data}: name prepared folders; random is for --check alone")
    if wandb and not importlib.util.find_spec("wandb"):
        raise ValueError("--wandb needs Weights & Biases: pip install wandb")
    for name in ("attn_ratio", "mlp_ratio"):
        if len(settings[name]) != 2:
            raise ValueError(f"{name} is {settings[name]}: it needs two numbers, for the first and the last block")
    if unmasked_steps > max_steps:
        raise ValueError(f"unmasked_steps is {unmasked_steps}: it must be at most max_steps {max_steps}")


def open_data():
    """Return (training set, its rows, validation set, its rows)."""
    if not Path(data[0]).exists() and any(f"--out {data[0]}" in command for command in COMMANDS):
        raise ValueError(f"no prepared data in {data[0]}: run the commands of {sys.argv[1]}: {' && '.join(COMMANDS)}")
    if "random" in data:
        rows = RandomRows(settings["latent_size"], MicroDiTConfig.latent_channels, MicroDiTConfig.caption_dim)
        return rows, rows, rows, rows
    train_set = Dataset(data, settings["latent_size"])
    if val_data:
        val_set = Dataset(val_data, settings["latent_size"])
        check_same_encoders(val_set.info, val_data[0], train_set.info, data[0])
        return train_set, Rows([range(len(train_set))]), val_set, Rows([range(min(VAL_ROWS, len(val_set)))])
    rows, held = train_set.split(VAL_ROWS)
    if not len(rows):
        raise ValueError(f"{', '.join(data)} has {len(train_set)} rows: too few to hold some out for validation")
    return train_set, rows, train_set, held


def network_config(info):
    """Return the MicroDiTConfig of the settings and the data set."""
    config = {f.name: settings[f.name] for f in fields(MicroDiTConfig) if f.name in settings}
    return MicroDiTConfig(**config, latent_channels=info["vae"]["latent_channels"],
                          caption_dim=info["text_encoder"]["dim"])


def new_state(config, run, device):
    """Return the State of a run that has not made a step."""
    torch.manual_seed(seed)
    net = MicroDiT(config).to(device)
    net.activation_checkpointing = activation_checkpointing
    optimizers = Optimizer(net, optimizer, learning_rate, betas=(0.9, beta2), momentum=momentum,
                           weight_decay=weight_decay, float16=compute_dtype(dtype, device) == torch.float16)
    return State(net, optimizers, Average(ema_decay, ema_start), run)


def load_autoencoder(described, path, processes):
    """Load the data's autoencoder if checkpoints such as `path` carry it (in float32), or sample pictures need it."""
    carried = path and strip(read_tensors(path, ("vae.",))[1], "vae.")
    if "config" in described:
        return load_described_vae(described, processes.device, torch.float32, carried)
    with not_worth_a_run("loading the autoencoder for sample pictures") if path else contextlib.nullcontext():
        return load_described_vae(described, processes.device) if sample_every and processes.rank == 0 else None


def wrap_network(net, processes):
    """Wrap the network in DDP for several processes, and compile it if asked."""
    if processes.world > 1:
        # torch.compile outside DDP cuts the graph at each gradient bucket, so that reduction overlaps the backward
        # pass. Large buckets keep the graphs few: about ten for XL/2.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # of older versions
        for p in net.parameters():  # else the first step after a restart allocates gradients besides DDP's buckets
            p.grad = torch.zeros_like(p)
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=512, **{sync: False})
    return torch.compile(net) if compile else net


def announce(state, rows, held, meter, processes):
    if processes.rank:
        return
    parameters = sum(p.numel() for p in state.net.parameters())
    print(f"{out}: {parameters / 1e6:.1f} M parameters, {len(rows):,} pictures, {len(held):,} to validate on, "
          f"{max_steps:,} steps of {batch_size} on {processes.world} x {processes.device.type}"
          + f", going on from step {state.step:,}" * (state.step > 0)
          + (f" (100 % MFU: {meter.measured / 1e9:,.0f} GFLOP/s, measured now)" if meter.measured else ""), flush=True)


def main():
    check_settings()
    train_set, rows, val_set, val_rows = open_data()
    config = network_config(train_set.info)
    of_data = {k: v for k, v in train_set.info.items()
               if k in ("vae", "text_encoder", "resolutions", "words", "settings", "source_hash")}
    run = {"config": asdict(config), "settings": settings, "data": of_data | {"pictures": len(rows)},
           "model_sha256": checkpoint.code_hash(), "training_sha256": checkpoint.training_hash()}
    device = pick_device(settings["device"])
    processes = join(device, PATIENCE)
    resume = None if check else processes.from_first(lambda: take_folder(out, run))
    if len({*processes.gather((len(rows), bool(resume) and resume.exists()))}) > 1:
        raise ValueError("the nodes see different data or checkpoints: they need the same folders, on a shared disk")
    torch.backends.cuda.matmul.allow_tf32 = True
    if device.type == "cpu":
        keep_freed_memory()
    state = new_state(config, run, device)
    if resume:
        state.load(resume)
    elif init_from and "random" not in data:
        state.start_from(init_from, init_optimizer)
    meter = Meter(config, settings, train_set.info["text_encoder"]["length"], compute_dtype(dtype, device), processes,
                  masked_steps)
    if processes.world > 1 and meter.without_gradient:
        raise ValueError(f"the parameters {', '.join(meter.without_gradient[:5])} get no gradient, which several "
                         "processes do not allow: use them in the network's forward(), or remove them")
    batches = Batches(train_set, rows, batch_size, tokens=config.tokens, seed=seed, p_mean=p_mean, p_std=p_std,
                      caption_dropout=caption_dropout, read_ahead=device.type == "cuda")
    announce(state, rows, val_rows, meter, processes)
    net = wrap_network(state.net, processes)
    if check:
        places = own_places(batch_size, micro_batch_size, processes.rank, processes.world)
        stream, losses = batches.stream(itertools.count(), places, device), Losses(p_mean, p_std, processes)
        try_run(lambda masked: make_step(state, net, stream, len(places), masked, losses, processes.world), state,
                settings, meter, processes)
        return processes.leave()
    state.vae = load_autoencoder(train_set.info["vae"], resume, processes)
    report = Report(state, settings, train_set, (val_set, val_rows), compute_dtype(dtype, device), meter, processes)
    try:
        stop_signal = train(state, net, batches, report, processes)
    except Exception:
        if processes.rank == 0 and state.step and not checkpoint.step_path(out, state.step).exists():
            with contextlib.suppress(Exception):  # what ends the run may also keep this from being saved
                state.save(out, keep=max_steps)
                print(f"step {state.step:,} was saved before this:", file=sys.stderr)
        raise
    processes.leave()  # together, as torchrun may end the others while process 0 still writes
    if processes.rank == 0 and not stop_signal:
        path = checkpoint.step_path(out, state.step)
        print(f"done: {path}. Draw with: python sample.py --checkpoint {quote(str(path))} --prompt \"...\"")
    if stop_signal:
        if processes.rank == 0:
            print(f"stopped by {signal.Signals(stop_signal).name}. The same command goes on from {out}", flush=True)
        raise SystemExit(128 + stop_signal)


if __name__ == "__main__":
    config_given = sys.argv[1:] and not sys.argv[1].startswith("--")
    out = settings["out"] = out or f"runs/{Path(sys.argv[1]).stem if config_given else 'train'}"
    run_script("train.py", main, f"The same command goes on from the last checkpoint in {out}, if there is one")
