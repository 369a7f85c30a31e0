"""
Prepared data -> checkpoints.

    python train.py config/tiny.py                                   # the laptop run, some ten minutes
    python train.py config/tiny.py --mask_ratio 0 --out runs/unmasked
    torchrun --nproc_per_node=8 train.py config/small.py             # one process per GPU (or CPU)

A step's random numbers depend only on the seed, the step and the micro-batch's index in the global batch. So the number
of processes changes nothing, and a run that is started again goes on as if it had never stopped, bit by bit on a CPU.
On GPUs the order of additions varies.
"""
from common.machine import exit_with_launcher
from configurator import configure, read_config

# data and output
data = ("data/shapes",)       # prepared folders (prepare_latents.py), used as one set; FOLDER@512 leaves out pictures
                              # whose shorter side had fewer pixels
val_data = ()                 # prepared folders to validate on; empty: the last 1 % of each of `data`, never trained on
out = ""                      # run folder; empty: runs/ and the config's name
overwrite = False             # replace the run in `out`, unless it is this very run and not finished: that goes on
go_back = 0                   # go on from this step's checkpoint with other settings; later ones are set aside (>= 0)
init_from = ""                # start from the weights of this checkpoint or run folder
init_optimizer = False        # and from the state of its optimizer
# training
batch_size = 2048             # pictures per step, over all processes (>= 1)
micro_batch_size = 256        # pictures per forward pass of one process (>= 1)
max_steps = 250_000           # steps in all (>= 1)
unmasked_steps = 0            # number of final steps without masking (>= 0)
mask_ratio = 0.75             # fraction of the patches dropped after the mixer (>= 0, < 1)
mask = "random"               # which ones: any, or as many of each 2 x 2 patches (random | grouped)
learning_rate = 2.4e-4        # at its peak (> 0)
warmup_steps = 2500           # steps of linear warmup from 0 (>= 0)
schedule = "cosine"           # after the warmup; trapezoid: falls in the second half (cosine | trapezoid | constant)
min_learning_rate = 0.33      # where it ends, as a fraction of the peak (>= 0, <= 1)
optimizer = "adamw"           # muon: Muon for the blocks' matrices, AdamW for all else (adamw | muon)
beta1 = 0.9                   # AdamW (>= 0, < 1)
beta2 = 0.999                 # AdamW (>= 0, < 1)
momentum = 0.95               # Muon (>= 0, < 1)
weight_decay = 0.1            # on every parameter (>= 0)
grad_clip = 0.25              # largest gradient norm; 0: no clipping (>= 0)
p_mean = -0.6                 # ln sigma ~ N(p_mean, p_std^2)
p_std = 1.2                   # standard deviation of ln sigma (> 0)
caption_dropout = 0.1         # captions replaced by zeros, for guidance (>= 0, < 1)
ema_decay = 0.0               # moving average of the weights; 0: none (>= 0, < 1)
ema_start = 0                 # step at which the average starts (>= 0)
seed = 2024                   # of weights, data order, noise, masks and dropout (>= 0)
# machine
device = "auto"               # cuda, mps or cpu; auto: the best there is
dtype = "auto"                # of products, not of weights; auto: bfloat16 on cuda (auto | bfloat16 | float32)
compile = False               # torch.compile: minutes at the start, faster steps on a GPU
activation_checkpointing = False  # compute the blocks again in the backward pass: less memory, a third more work
loader_threads = 4            # threads that read data for a GPU (>= 0)
# reporting
log_every = 50                # steps between console lines (>= 1)
eval_every = 500              # steps between validations; 0: never (>= 0)
sample_every = 1000           # steps between grids of sample pictures; 0: never (>= 0)
sample_steps = 30             # sampler steps of those pictures (>= 1)
sample_guidance = 5.0         # guidance scale of those pictures, and of sample.py where it is not told another
checkpoint_every = 1000       # steps between checkpoints, besides the last; 0: only the last (>= 0)
keep_checkpoints = 2          # older ones are deleted (>= 1)
price = 0.0                   # dollars for an hour of one GPU, to show what the run costs; 0: not shown (>= 0)
wandb = ""                    # Weights & Biases project that gets the log too (pip install wandb); empty: none
check = False                 # try data, disk, memory, links and a few steps; write nothing, say what was found
# and the network: every field of model.MicroDiTConfig but the two that the data decide, as settings["dim"]

if __name__ == "__main__":
    settings = configure(globals(), network="model.MicroDiTConfig")
    exit_with_launcher()

import contextlib
import importlib.util
import inspect
import itertools
import math
import os
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from common.machine import keep_freed_memory, pick_device
from encoders import load_described_vae
from model import MicroDiT, MicroDiTConfig, edm_loss, expert_tokens, kept_patches
from training import checkpoint
from training.batches import Batches
from training.check import try_run
from training.dataset import Dataset, Rows, check_same_encoders
from training.log import duration
from training.optimizer import Average, Optimizer
from training.processes import Signals, join
from training.report import VAL_ROWS, Report
from training.state import State, find_resume

MOST_WORDS = 100_000  # of the stand-in's vocabulary, which checkpoints carry so that sample.py can name unknown words

# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train(state, net, batches, report, processes):
    """Train until max_steps or a signal, and return the signal's number or 0. net is state.net in DDP and compile."""
    micros, stream = own_batches(batches, range(state.step, max_steps), processes)
    signals, first_step, stop_signal = Signals(processes), state.step + 1, 0
    report.meter.restart(state.step)

    while state.step < max_steps and not stop_signal:
        lr, masked = learning_rate_at(state.step), is_masked(state.step)
        grad_norm = make_step(state, net, stream, micros, masked, report.losses)

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


def make_step(state, net, stream, micros, masked, losses):
    """Make a step of this process's next `micros` micro-batches, and return the norm of its gradients, unclipped.

    net is state.net in DDP and compile.
    """
    for m in range(micros):
        latents, captions, sigma, noise, uniforms = next(stream)
        ids_keep = kept_patches(uniforms, mask_ratio, mask) if masked else None  # (B,K)
        with accumulating(net, last=m == micros - 1):
            with autocast(latents.device):
                loss = edm_loss(net, latents, captions, sigma, noise, ids_keep, reduce=False)  # (B,)
            (loss.mean() / micros).backward()
        losses.add(sigma, loss)
    grad_norm = clip_grad_norm_(state.net.parameters(), grad_clip or math.inf)
    # if the norm is not finite, the weights stay as they are; `bad` is on the device, and nobody waits for it here
    bad = state.optimizer.step(learning_rate_at(state.step), grad_norm, zero_in_place=dist.is_initialized())
    state.step += 1
    state.average.update(state.net, state.step, bad)
    return grad_norm


def own_batches(batches, steps, processes):
    """Return (number of this process's micro-batches in a step, a stream of those of the steps)."""
    micros = range(processes.rank, batch_size // micro_batch_size, processes.world)
    return len(micros), batches.stream(((step, m) for step in steps for m in micros), processes.device)


def check_run(state, net, batches, report, processes):
    """Try what the run will do, and say how it went (--check)."""
    micros, stream = own_batches(batches, itertools.count(state.step), processes)
    masked_steps = sum(map(is_masked, range(state.step, max_steps)))
    try_run(lambda masked: make_step(state, net, stream, micros, masked, report.losses), masked_steps, state, settings,
            processes)


def learning_rate_at(step, steps=None):
    """Rise linearly over warmup_steps, then stay, or fall to min_learning_rate of the peak: as a cosine, or linearly in
    the second half.

    steps: of the whole run, if not max_steps.
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    if schedule == "constant":
        return learning_rate
    progress = min(1, (step - warmup_steps) / max(1, (steps or max_steps) - warmup_steps))
    height = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else min(1, 2 * (1 - progress))
    return learning_rate * (min_learning_rate + (1 - min_learning_rate) * height)


def is_masked(step, steps=None):
    """Return whether a step of a run of so many steps (max_steps) drops patches: all do but the last unmasked_steps."""
    return mask_ratio > 0 and step < (steps or max_steps) - unmasked_steps


def is_due(step, every):
    """Return whether something is to be done after this step; every 0 means never."""
    return every > 0 and (step % every == 0 or step == max_steps)


def computes_in_bfloat16(device):
    return dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"


def autocast(device):
    """Compute matrix products in bfloat16 where that is wanted. The weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device))


def accumulating(net, last):
    """Average the gradients over the processes only with the last micro-batch of a step."""
    return net.no_sync() if dist.is_initialized() and not last else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Checks and set-up


def check_settings():
    """Refuse what cannot work, before anything is loaded."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if batch_size % (micro_batch_size * world):
        raise ValueError(f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {world} "
                         "processes")
    if wandb and not importlib.util.find_spec("wandb"):
        raise ValueError("--wandb needs Weights & Biases: pip install wandb")
    for name in ("attn_ratio", "mlp_ratio"):
        if len(settings[name]) != 2:
            raise ValueError(f"{name} is {settings[name]}: it needs two numbers, for the first and the last block")
    if unmasked_steps > max_steps:
        raise ValueError(f"unmasked_steps is {unmasked_steps}: it must be at most max_steps {max_steps}")


def open_data():
    """Return (training set, its rows, validation set, its rows)."""
    if not data:
        raise ValueError("data is empty: name a prepared folder")
    train_set = Dataset(data, settings["latent_size"])
    if val_data:
        val_set = Dataset(val_data, settings["latent_size"])
        check_same_encoders(val_set.info, val_data[0], train_set.info, data[0])
        return train_set, Rows([range(len(train_set))]), val_set, Rows([range(min(VAL_ROWS, len(val_set)))])
    rows, held = train_set.split(VAL_ROWS)
    if not len(rows):
        raise ValueError(f"{', '.join(data)} has {len(train_set)} rows: too few to keep some for validation")
    return train_set, rows, train_set, held


def network_config(info):
    """Return the MicroDiTConfig of the settings and the data set; ValueError if masking leaves too few patches."""
    given = {f.name: settings[f.name] for f in fields(MicroDiTConfig) if f.name in settings}
    config = MicroDiTConfig(**given, latent_channels=info["vae"]["latent_channels"],
                            caption_dim=info["text_encoder"]["dim"])
    kept = kept_patches(torch.zeros(1, config.tokens), mask_ratio, mask).shape[1]
    for tokens in (config.tokens, kept) if config.num_experts else ():
        expert_tokens(config.expert_capacity, tokens, config.num_experts)
    return config


def new_state(config, run, device):
    """Return the State of a run that has not made a step, with weights of its seed or of another run."""
    torch.manual_seed(seed)
    net = MicroDiT(config).to(device)
    net.activation_checkpointing = activation_checkpointing
    optimizers = Optimizer(net, optimizer, learning_rate, betas=(beta1, beta2), momentum=momentum,
                           weight_decay=weight_decay)
    return State(net, optimizers, Average(ema_decay, ema_start), run)


def load_autoencoder(about, processes):
    """Load the autoencoder of the data if checkpoints are to carry it, or sample pictures are to be drawn with it."""
    if "config" in about:  # in float32, as checkpoints keep it
        return load_described_vae(about, processes.device, torch.float32)
    return load_described_vae(about, processes.device) if sample_every and processes.rank == 0 else None


def wrap_network(net, processes):
    """Wrap the network in DDP for several processes, and compile it if asked."""
    if processes.world > 1:
        # torch.compile outside DDP cuts the graph at each gradient bucket, so that reduction overlaps the backward
        # pass. Large buckets keep the graphs few: about ten for XL/2, against some hundred with DDP's 25 MB.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # of older versions
        for p in net.parameters():  # else the first step of a run that goes on makes them beside DDP's buckets
            p.grad = torch.zeros_like(p)
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, bucket_cap_mb=512, **{sync: False})
    return torch.compile(net) if compile else net


def announce(state, rows, report, processes):
    """Say in one line what will happen."""
    if processes.rank:
        return
    parameters = sum(p.numel() for p in state.net.parameters())
    line = (f"{out}: {parameters / 1e6:.1f} M parameters, {len(rows):,} pictures, {max_steps:,} steps of {batch_size} "
            f"on {processes.world} x {processes.device.type}")
    if state.step:
        line += f", going on from step {state.step:,}"
    if (seconds := report.meter.expected(state.step)) is not None:
        line += f", perhaps {duration(seconds)}"
    if report.meter.measured:
        line += f" (MFU is against {report.meter.measured / 1e9:,.0f} GFLOP/s, measured on matrix products just now)"
    print(f"{line}. It writes checkpoints, log.jsonl and progress.png there", flush=True)
    if state.step:
        warn_of_longer_schedule(state)
    if not init_from and not state.step and init_from_of_config():
        print(f"warning: from scratch, as --init_from is empty: {init_from_of_config()} was meant", file=sys.stderr)


def warn_of_longer_schedule(state):
    """Say so if a larger max_steps takes back what the schedule has done."""
    before, step = state.earlier["max_steps"], state.step
    last = min(step, before - 1)
    old, new = learning_rate_at(last, before), learning_rate_at(step)
    masks = is_masked(step) and not is_masked(last, before)
    if before < max_steps and (new > 1.001 * old or masks):
        again = f", and patches are dropped again until step {max_steps - unmasked_steps:,}" if masks else ""
        print(f"warning: max_steps was {before:,} and is {max_steps:,} now, so the learning rate goes from {old:.2e} "
              f"to {new:.2e}{again}. The weights will not be those of a run that had so many steps from the start. "
              f"To train on as it was, begin another run: --init_from {out} --schedule constant --learning_rate "
              f"{old:.2e} --out ANOTHER", file=sys.stderr)


def init_from_of_config():
    """Return the init_from of the config file, which the command line may have emptied."""
    config_given = sys.argv[1:] and not sys.argv[1].startswith("--")
    return read_config(sys.argv[1], settings).get("init_from", "") if config_given else ""


# ---------------------------------------------------------------------------------------------------------------------


def main():
    check_settings()
    train_set, rows, val_set, val_rows = open_data()
    config = network_config(train_set.info)
    kept = ("vae", "text_encoder", "resolutions", "words", "settings", "source_hash")
    about_data = {k: v for k, v in train_set.info.items() if k in kept}
    if len(about_data["words"]) > MOST_WORDS:
        about_data["words"] = []
    run = {"config": asdict(config), "settings": settings, "data": about_data | {"rows": len(rows)},
           "model_sha256": checkpoint.code_hash()}
    processes = join(tune_for(pick_device(device)))
    resume, replaces = processes.from_first(lambda: find_resume(out, run, overwrite))
    processes.check_same((str(resume), resume and resume.exists() and resume.stat().st_size, len(rows)),
                         "checkpoints or data")

    state = new_state(config, run, processes.device)
    state.vae = load_autoencoder(train_set.info["vae"], processes)
    if resume:
        state.load(resume)
    elif init_from:
        state.start_from(init_from, init_optimizer)
    state.replaces = replaces
    told = settings | {"wandb": ""} if check else settings
    report = Report(state, told, train_set, (val_set, val_rows), autocast, processes)
    announce(state, rows, report, processes)
    batches = Batches(train_set, rows, micro_batch_size, batch_size // micro_batch_size, tokens=config.tokens,
                      seed=seed, p_mean=p_mean, p_std=p_std, caption_dropout=caption_dropout,
                      threads=loader_threads if processes.device.type == "cuda" else 0)
    net = wrap_network(state.net, processes)
    if check:
        check_run(state, net, batches, report, processes)
        return processes.leave()
    stop_signal = train(state, net, batches, report, processes)
    processes.leave()  # together, as torchrun may end the others while process 0 still writes
    if processes.rank == 0 and not stop_signal:
        path = checkpoint.steps_of(out)[-1]
        print(f"done: {path}. Draw with: python sample.py --checkpoint {path} --prompt \"...\"")
    if stop_signal:
        if processes.rank == 0:
            print(f"stopped by {signal.Signals(stop_signal).name}. The same command goes on from {out}", flush=True)
        raise SystemExit(128 + stop_signal)


def tune_for(device):
    """Set process-wide options for this device, and return it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    if device.type == "cpu":
        keep_freed_memory()
    return device


if __name__ == "__main__":
    config_given = sys.argv[1:] and not sys.argv[1].startswith("--")
    out = settings["out"] = out or f"runs/{Path(sys.argv[1]).stem if config_given else 'train'}"
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None
    except torch.OutOfMemoryError:
        raise SystemExit(f"train.py: the GPU's memory is too small for micro_batch_size {micro_batch_size}. Half "
                         "of it, with the same batch_size, makes the same run") from None
    except KeyboardInterrupt:
        raise SystemExit(f"train.py: stopped. The same command goes on from the last checkpoint in {out}, if there is "
                         "one") from None
