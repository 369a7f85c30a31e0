"""
Prepared data -> checkpoints.

    python train.py config/tiny.py                                   # the laptop run, about ten minutes
    python train.py config/tiny.py --mask_ratio 0 --out runs/unmasked
    torchrun --nproc_per_node=8 train.py config/small.py             # one process per GPU (or CPU)

Everything random about a step is a function of (seed, step, index of the micro-batch in the global batch): the number
of processes does not matter, and a run that is started again goes on as if it had never stopped, on a CPU bit by bit
(GPUs add up in changing order).
"""
from common.machine import exit_with_launcher
from configurator import configure, read_config

# data and output
data = ("data/shapes",)       # prepared folders (prepare_latents.py), used as one set; FOLDER@512 leaves out pictures
                              # whose shorter side had fewer pixels
val_data = ()                 # prepared folders to validate on; empty: the last 1 % of each of `data`, never trained on
out = ""                      # run folder; empty: runs/ and the config's name
overwrite = False             # delete what an earlier run left in `out`
init_from = ""                # start from the weights of this checkpoint or run folder
init_optimizer = False        # and from the state of its optimizer
# training
batch_size = 2048             # pictures per step, over all processes
micro_batch_size = 256        # pictures per forward pass of one process
max_steps = 250_000           # steps in all
unmasked_steps = 0            # the last so many of them without masking
mask_ratio = 0.75             # patches dropped after the mixer
learning_rate = 2.4e-4        # at its peak
warmup_steps = 2500           # linear from 0
schedule = "cosine"           # after the warmup: cosine or constant
min_learning_rate = 0.33      # where the cosine ends, as a fraction of the peak
optimizer = "adamw"           # adamw; muon: Muon for the blocks' matrices, AdamW for all else (docs/log.md)
beta1 = 0.9                   # AdamW
beta2 = 0.999                 # AdamW
weight_decay = 0.1            # on every parameter
grad_clip = 0.25              # largest gradient norm; 0: no clipping
p_mean = -0.6                 # ln sigma ~ N(p_mean, p_std^2)
p_std = 1.2                   # see p_mean
caption_dropout = 0.1         # captions replaced by zeros, for guidance
ema_decay = 0.0               # moving average of the weights; 0: none
ema_start = 0                 # step at which the average starts
seed = 2024                   # of weights, data order, noise, masks and dropout
# network (MicroDiTConfig; latent_channels and caption_dim come from the data)
latent_size = 32              # height and width of the latents; picks the resolution of the data
patch_size = 2                # latent pixels per patch and axis
dim = 1024                    # width of the backbone
depth = 28                    # backbone blocks
head_dim = 64                 # width of an attention head
mlp_multiple = 256            # hidden widths of the MLPs are rounded up to a multiple of it
pos_scale = 1.0               # positions are divided by it: 1 at 256 px, 2 at 512 px
attn_ratio = (0.5, 1.0)       # layer-wise scaling: attention width / dim, first and last block
mlp_ratio = (0.5, 4.0)        # layer-wise scaling: MLP width / dim, first and last block
mixer_depth = 6               # patch mixer blocks; 0: no mixer, naive masking
mixer_dim = 768               # width of the mixer
mixer_mlp_ratio = 4.0         # MLP width / mixer_dim
num_experts = 8               # experts of a sparse block; 0: dense MLPs everywhere
expert_capacity = 2.0         # experts that process a token, on average
moe_every = 2                 # every so many blocks one is sparse
router_unmodulated = False    # the router reads LN(x) instead of the adaLN-modulated tokens
# machine
device = "auto"               # cuda, mps or cpu; auto: the best there is
dtype = "auto"                # of the computation: bfloat16 or float32 (weights stay float32); auto: bfloat16 on cuda
compile = False               # torch.compile: a minute at the start, faster steps on a GPU
activation_checkpointing = False  # compute the blocks again in the backward pass: less memory, a third more work
loader_threads = 4            # threads that read data for a GPU
# reporting
log_every = 50                # steps between console lines
eval_every = 500              # steps between validations; 0: never
sample_every = 1000           # steps between grids of sample pictures; 0: never
sample_steps = 30             # sampler steps of those pictures
sample_guidance = 5.0         # guidance scale of those pictures, and of sample.py where it is not told another
checkpoint_every = 1000       # steps between checkpoints, besides the last; 0: only the last
keep_checkpoints = 2          # older ones are deleted
price = 0.0                   # dollars for an hour of one GPU, to show what the run costs; 0: not shown
wandb = ""                    # Weights & Biases project that gets the log too (pip install wandb); empty: none

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import contextlib
import copy
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common.files import write_atomic
from common.flops import forward_flops, matmul_rate, peak_flops
from common.machine import keep_freed_memory, pick_device, shared_store
from encoders import load_vae
from model import MicroDiT, MicroDiTConfig, edm_loss, expert_tokens, kept_patches
from model import sample as draw_latents
from sampling.grids import picture_grid
from sampling.pipeline import decode_images
from training import checkpoint
from training.batches import Batches, generator, prefetched, to_device
from training.dataset import Dataset, Rows, check_same_encoders, decoded_captions
from training.muon import Muon

# Validation is at these noise levels whatever the run trains on, so that runs can be compared
VAL_P_MEAN, VAL_P_STD, VAL_ROWS = -0.6, 1.2, 2048
BINS = 5  # the loss is also reported by noise level, in as many bins of equal probability
# what may change between a run and its continuation: nothing of this touches the weights (data is compared by content)
NOT_COMPARED = {"data", "val_data", "out", "overwrite", "max_steps", "device", "compile", "activation_checkpointing",
                "loader_threads", "log_every", "eval_every", "sample_every", "sample_steps", "sample_guidance",
                "checkpoint_every", "keep_checkpoints", "price", "wandb"}
MOST_SKIPPED = 10  # steps in a row without a finite gradient, after which a run stops


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and noise levels


def learning_rate_at(step, peak, warmup, total, schedule="cosine", end=0.0):
    """Linear from 0 over `warmup` steps, then constant, or a cosine that reaches end * peak at step `total`"""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def noise_bins(sigma, mean, std):
    """Bin 0..BINS-1 of each noise level, equally probable under ln sigma ~ N(mean, std^2)"""
    quantile = torch.special.ndtr((sigma.log() - mean) / std)
    return (quantile * BINS).long().clamp(0, BINS - 1)


def by_level(total, count, mean, std):
    """{median noise level of a bin: mean loss}, of the bins that have any"""
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    sigmas = (mean + std * torch.special.ndtri(middle)).exp().tolist()
    return {f"{s:.2g}": (t / n).item() for s, t, n in zip(sigmas, total, count) if n}


# ---------------------------------------------------------------------------------------------------------------------
# Set-up


def check_settings(world):
    for name in ("batch_size", "micro_batch_size", "max_steps", "log_every", "keep_checkpoints", "sample_steps",
                 "learning_rate", "p_std"):
        if globals()[name] <= 0:
            raise ValueError(f"{name} is {globals()[name]}: it must be above 0")
    if batch_size % (micro_batch_size * world):
        raise ValueError(f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {world} "
                         "processes")
    for name, options in (("schedule", ("cosine", "constant")), ("dtype", ("auto", "bfloat16", "float32")),
                          ("optimizer", ("adamw", "muon"))):
        if globals()[name] not in options:
            raise ValueError(f"{name} is '{globals()[name]}': it must be {' or '.join(options)}")
    if wandb and not importlib.util.find_spec("wandb"):
        raise ValueError("--wandb needs Weights & Biases: pip install wandb")
    for name in ("mask_ratio", "caption_dropout", "ema_decay"):
        if not 0 <= globals()[name] < 1:
            raise ValueError(f"{name} is {globals()[name]}: it must be at least 0 and below 1")
    for name in ("attn_ratio", "mlp_ratio"):
        if len(globals()[name]) != 2:
            raise ValueError(f"{name} is {globals()[name]}: it needs two numbers, for the first and the last block")
    if unmasked_steps < 0 or unmasked_steps > max_steps:
        raise ValueError(f"unmasked_steps is {unmasked_steps}: it must lie between 0 and max_steps {max_steps}")


def network_config(info):
    names = {f.name for f in fields(MicroDiTConfig)} - {"latent_channels", "caption_dim"}
    config = MicroDiTConfig(**{name: globals()[name] for name in names},
                            latent_channels=info["vae"]["latent_channels"], caption_dim=info["text_encoder"]["dim"])
    kept = kept_patches(torch.zeros(1, config.tokens), mask_ratio).shape[1]
    if config.num_experts:
        for tokens in {config.tokens, kept}:
            expert_tokens(config.expert_capacity, tokens, config.num_experts)
    return config


def open_data():
    """(training set, its rows, validation set, its rows)"""
    if not data:
        raise ValueError("data is empty: name a prepared folder")
    train_set = Dataset(data, latent_size)
    if val_data:
        val_set = Dataset(val_data, latent_size)
        check_same_encoders(val_set.info, val_data[0], train_set.info, data[0])
        return train_set, Rows([range(len(train_set))]), val_set, Rows([range(min(VAL_ROWS, len(val_set)))])
    rows, held = train_set.split(VAL_ROWS)
    if not len(rows):
        raise ValueError(f"{', '.join(data)} has {len(train_set)} rows: too few to keep some for validation")
    return train_set, rows, train_set, held


def find_resume(folder, run, rank):
    """The last whole checkpoint of this very run, or None; ValueError says what differs if `folder` has another run."""
    damaged, there = [], checkpoint.steps_of(folder)
    for path in reversed(there):
        try:
            old, _ = checkpoint.read(path, ("none",))
            break
        except ValueError:
            damaged.append(path)
    else:
        if damaged:
            raise ValueError(f"none of the checkpoints in {folder} is whole ({', '.join(map(str, damaged))}): "
                             "--overwrite starts again from step 0")
        return None
    differ = [f"{name}: {old['settings'].get(name)!r} there, {value!r} now" for name, value in run["settings"].items()
              if name not in NOT_COMPARED and name in old["settings"]
              and old["settings"][name] != tuple_to_list(value)]
    differ += [f"{name}: {old['data'].get(name)!r} there, {value!r} now" for name, value in run["data"].items()
               if old["data"].get(name) != value]
    if old["settings"]["max_steps"] > max_steps:
        differ.append(f"max_steps: {old['settings']['max_steps']} there, {max_steps} now (it may only grow)")
    if differ:
        raise ValueError(f"{folder} holds another run: {'; '.join(differ)}. Give another --out, or --overwrite to "
                         "delete that run")
    for bad in damaged if rank == 0 else ():
        aside = bad.with_suffix(".damaged")
        print(f"warning: {bad} is cut short or damaged, so {path} is used. It is now {aside}", file=sys.stderr)
        bad.rename(aside)
    return path


def tuple_to_list(value):
    return list(value) if isinstance(value, tuple) else value


class Trainer:
    """The state of a run: network, optimizer, average, step"""

    def __init__(self, config, device, run, init_from=""):
        torch.manual_seed(seed)
        self.run, self.step, self.device = run, 0, device
        self.net = MicroDiT(config).to(device)
        self.net.activation_checkpointing = activation_checkpointing
        self.optimizers = self.make_optimizers(fused=device.type != "mps")
        self.ema = None
        if init_from:
            self.init_weights(init_from)
        # all of this stays on the device until a log line wants to know it
        self.sums = torch.zeros(2, BINS, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.skipped, self.skipped_in_a_row = torch.zeros(2, dtype=torch.int64, device=device)
        self.grad_norm = torch.zeros((), device=device)

    def make_optimizers(self, fused):
        """[(optimizer, names of its parameters)]"""
        named = dict(self.net.named_parameters())
        blocks = [n for n, p in named.items() if p.ndim >= 2 and n.startswith(("mixer.", "blocks.", "caption_block."))
                  and "modulation" not in n and "router" not in n]
        by_muon = blocks if optimizer == "muon" else []
        rest = [n for n in named if n not in by_muon]
        made = [(torch.optim.AdamW([named[n] for n in rest], learning_rate, betas=(beta1, beta2), eps=1e-8,
                                   weight_decay=weight_decay, fused=fused), rest)]
        if by_muon:
            made.append((Muon([named[n] for n in by_muon], learning_rate, weight_decay), by_muon))
        return made

    def init_weights(self, name):
        try:
            path = checkpoint.find(name)
        except ValueError as error:
            phase = f"config/{Path(name).name}.py"
            first = f": run `train.py {phase}` first" if Path(phase).is_file() else ""
            raise ValueError(f"init_from: {error}{first} (or --init_from= to start from scratch)") from None
        source, run = checkpoint.load_network(path, use_ema=False)
        if Path(name).is_dir() and run["step"] < run["settings"]["max_steps"]:
            raise ValueError(f"init_from: {name} has only reached step {run['step']:,} of "
                             f"{run['settings']['max_steps']:,}: finish that run first, or give {path} itself")
        if "released" not in run:  # those name no data set; that their tensors fit is enough
            check_same_encoders(run["data"], path, self.run["data"], ", ".join(data))
        try:
            self.net.load_state_dict(source.state_dict())
        except RuntimeError:
            theirs, ours = json.loads(json.dumps(run["config"])), json.loads(json.dumps(self.run["config"]))
            differ = [f"{k}: {theirs.get(k)} there, {v} now" for k, v in ours.items() if theirs.get(k) != v]
            raise ValueError(f"the weights of {path} do not fit this network ({'; '.join(differ)})") from None
        if init_optimizer:
            if "released" in run or run["settings"]["optimizer"] != optimizer:
                raise ValueError(f"init_optimizer: {path} has no state of the optimizer {optimizer}: --init_optimizer "
                                 "false takes its weights alone")
            self.load_optimizers(checkpoint.read(path, ("optimizer.",))[1])

    def accumulate(self, net, batch, micros, masked, autocast):
        """Forward and backward of one of the step's micro-batches"""
        latents, captions, sigma, noise, uniforms = to_device(batch, self.device)
        ids_keep = kept_patches(uniforms, mask_ratio) if masked else None
        with autocast():
            loss = edm_loss(net, latents, captions, sigma, noise, ids_keep, reduce=False)
            (loss.mean() / micros).backward()
        loss, finite = loss.detach(), loss.detach().isfinite()
        bins = noise_bins(sigma, p_mean, p_std)
        self.sums[0].index_add_(0, bins, torch.where(finite, loss, 0).to(self.sums.dtype))
        self.sums[1].index_add_(0, bins, finite.to(self.sums.dtype))

    def update(self, lr):
        """One step of the optimizers, then of the average: unless a gradient is not finite, which the device decides"""
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), grad_clip or math.inf)
        bad = ~self.grad_norm.isfinite()
        self.skipped = self.skipped + bad
        self.skipped_in_a_row = (self.skipped_in_a_row + bad) * bad
        for opt, _ in self.optimizers:
            opt.param_groups[0]["lr"] = lr
            if self.device.type != "mps":
                opt.found_inf = bad.float()
                opt.step()
            elif not bad.item():  # its AdamW does not know found_inf
                opt.step()
            # DDP's gradients are views of its buckets: set to None, they would be made anew beside them
            opt.zero_grad(set_to_none=not dist.is_initialized())
        self.step += 1
        self.update_ema(bad)

    def update_ema(self, bad):
        """The average starts as a copy of the weights"""
        if not ema_decay or self.step < ema_start:
            return
        if self.ema is None:
            self.ema = copy.deepcopy(self.net).requires_grad_(False)
        else:
            weights = [p.detach() for p in self.net.parameters()]
            share = torch.where(bad, 0.0, 1 - ema_decay)
            torch._foreach_lerp_(list(self.ema.parameters()), weights, [share] * len(weights))

    def best(self):
        return self.ema or self.net

    def save(self, folder):
        tensors = {f"model.{n}": p for n, p in self.net.named_parameters()}
        if self.ema:
            tensors |= {f"ema.{n}": p for n, p in self.ema.named_parameters()}
        for opt, names in self.optimizers:
            state = opt.state_dict()["state"]
            tensors |= {f"optimizer.{key}.{n}": value for i, n in enumerate(names) for key, value in state[i].items()}
        path = Path(folder) / f"step_{self.step:08d}.safetensors"
        checkpoint.save(path, tensors, self.run | {"step": self.step})
        older = [p for p in checkpoint.steps_of(folder) if p.name <= path.name]
        for old in older[:-keep_checkpoints]:
            old.unlink()
        return path

    def load(self, path):
        run, tensors = checkpoint.read(path, ("model.", "ema.", "optimizer."))
        self.step = run["step"]
        self.net.load_state_dict(checkpoint.strip(tensors, "model."))
        if ema := checkpoint.strip(tensors, "ema."):
            self.ema = copy.deepcopy(self.net).requires_grad_(False)
            self.ema.load_state_dict(ema)
        self.load_optimizers(tensors)

    def load_optimizers(self, tensors):
        kept = {}  # {parameter: {key: value}}
        for name, value in checkpoint.strip(tensors, "optimizer.").items():
            key, _, parameter = name.partition(".")
            kept.setdefault(parameter, {})[key] = value
        for opt, names in self.optimizers:
            state = {i: kept[n] for i, n in enumerate(names)}
            opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})


# ---------------------------------------------------------------------------------------------------------------------
# Reporting


class Log:
    """Console lines for people, the same as JSON lines for programs, and for Weights & Biases if wanted"""

    def __init__(self, folder, step, main_process):
        self.path, self.main, self.wandb = Path(folder) / "log.jsonl", main_process, None
        if not self.main:
            return
        if self.path.exists():  # lines of steps that are done again
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            kept = "".join(line for line in lines if json.loads(line)["step"] <= step) if step else ""
            write_atomic(self.path, lambda file: file.write(kept.encode()))
        if wandb:
            import wandb as client
            self.wandb = client.init(project=wandb, name=Path(folder).name, id=Path(folder).name, resume="allow",
                                     dir=str(folder), config=settings)

    def __call__(self, text, **values):
        if self.main:
            print(text, flush=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")
            if self.wandb:
                self.wandb.log(values, step=values["step"])


class Stop:
    """SIGTERM or SIGINT, noticed by all processes at the end of the same step: each tells the others at the end of
    every step, without waiting, and reads what was said a step before. A second Ctrl-C ends it at once; SIGTERM may
    come twice, as schedulers send it to all processes and torchrun passes its own on.
    """

    def __init__(self, world):
        self.signal, self.work = 0, None
        self.group = dist.new_group(backend="gloo") if world > 1 else None  # on the host, which so waits for no GPU
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def agreed(self):
        """The signal that a process got, or 0; to be called once a step"""
        if self.group is None:
            return self.signal
        said = 0
        if self.work:
            self.work.wait()
            said = int(self.flag.numpy()[0])
        self.flag = torch.tensor([self.signal])
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        return said


class Meter:
    """images/s, FLOPs and hours left between two log lines, of training alone"""

    def __init__(self, trainer, where, half, world):
        self.trainer, self.world, self.training, self.pauses = trainer, world, 0.0, 0.0
        config = trainer.net.config
        self.flops = {masked: 3 * forward_flops(config, mask_ratio if masked else 0.0) for masked in (True, False)}
        self.peak = peak_flops(where)
        self.measured = None if self.peak else matmul_rate(where, torch.bfloat16 if half else torch.float32)
        self.restart()

    def restart(self):
        self.started, self.first = time.time(), self.trainer.step

    @contextlib.contextmanager
    def paused(self):
        began = time.time()
        yield
        self.started += time.time() - began
        self.pauses += time.time() - began

    def read(self):
        """{images_per_s, mfu, eta_s} of the steps since restart(). MFU is against the datasheet's dense bf16 peak of
        all GPUs, or, where there is none, against matrix products measured at the start on as many machines.
        """
        steps, seconds = self.trainer.step - self.first, time.time() - self.started
        rate = steps * batch_size / seconds
        done = sum(self.flops[is_masked(s)] for s in range(self.first, self.trainer.step)) * batch_size
        mfu = done / seconds / self.world / (self.peak or self.measured)
        # unmasked steps cost more than the masked ones just measured
        per_flop = seconds / done
        masked_left = max(0, max_steps - unmasked_steps - self.trainer.step) if mask_ratio else 0
        unmasked_left = max_steps - self.trainer.step - masked_left
        eta = per_flop * batch_size * (masked_left * self.flops[True] + unmasked_left * self.flops[False])
        self.training += seconds
        eta *= 1 + self.pauses / self.training  # validation, pictures and checkpoints will go on taking their share
        return {"images_per_s": rate, "mfu": mfu, "eta_s": eta}


def is_masked(step):
    return mask_ratio > 0 and step < max_steps - unmasked_steps


def duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"


@torch.no_grad()
def validate(net, val_set, ids, device, autocast, rank, world):
    """(loss, {noise level: loss}) without masking, on noise and noise levels that never change"""
    n = len(ids)
    ids = ids[np.arange(n)]
    quantiles = (torch.randperm(n, generator=generator(7)) + 0.5) / n  # one noise level a row, evenly spread
    sigma = (VAL_P_MEAN + VAL_P_STD * torch.special.ndtri(quantiles.double())).exp().float()
    total, count = torch.zeros(2, BINS, dtype=torch.float64)
    net.eval()
    for b in list(range(0, n, micro_batch_size))[rank::world]:
        rows = list(range(b, min(n, b + micro_batch_size)))
        found = {name: t.to(device) for name, t in val_set.read(ids[rows]).items()}
        latents, captions = found["latents"].float(), decoded_captions(found).float()
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator(8, i)) for i in rows]).to(device)
        with autocast():
            loss = edm_loss(net, latents, captions, sigma[rows].to(device), noise, reduce=False)
        bins = noise_bins(sigma[rows], VAL_P_MEAN, VAL_P_STD)
        total.index_add_(0, bins, loss.double().cpu())
        count.index_add_(0, bins, torch.ones(len(rows), dtype=torch.float64))
    net.train()
    sums = reduced(torch.stack([total, count]), device, world)
    return (sums[0].sum() / sums[1].sum()).item(), by_level(*sums, VAL_P_MEAN, VAL_P_STD)


def reduced(tensor, device, world):
    """The sum over all processes, on the CPU"""
    if world > 1:
        tensor = tensor.to(device)
        dist.all_reduce(tensor)
    return tensor.cpu()


def draw_samples(net, val_set, ids, vae, device, autocast):
    """A grid of pictures for the first captions of the validation rows, and those captions"""
    ids = ids[np.arange(min(16, len(ids)))]
    captions = torch.from_numpy(val_set.rows(ids)[1]).float().to(device)
    c = net.config
    noise = torch.stack([torch.randn(c.latent_channels, c.latent_size, c.latent_size, generator=generator(9, i))
                         for i in range(len(ids))]).to(device)
    net.eval()
    with autocast():
        latents = draw_latents(net, noise, captions, sample_steps, sample_guidance)
    net.train()
    return picture_grid(decode_images(vae, latents), columns=math.ceil(len(ids) ** 0.5)), val_set.texts(ids)


# ---------------------------------------------------------------------------------------------------------------------


def main():
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # torchrun starts a crashed run again with the same command: its --overwrite was meant for the first start
    fresh = overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    check_settings(world)
    train_set, rows, val_set, val_rows = open_data()
    config = network_config(train_set.info)
    folder = Path(out)
    described = {k: train_set.info[k] for k in ("vae", "text_encoder", "resolutions", "words", "settings")}
    run = {"config": asdict(config), "settings": settings, "data": {**described, "rows": len(rows)}}
    resume = None if fresh else find_resume(folder, run, rank)

    where = pick_device(device)
    if where.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    if where.type == "cpu":
        keep_freed_memory()
    half = dtype == "bfloat16" or (dtype == "auto" and where.type == "cuda")

    def autocast():
        return torch.autocast(where.type, torch.bfloat16) if half else contextlib.nullcontext()

    trainer = Trainer(config, where, run, init_from if not resume else "")
    if fresh and rank == 0:  # not before everything that can be refused was read
        for old in checkpoint.steps_of(folder):
            old.unlink()
        shutil.rmtree(folder / "samples", ignore_errors=True)
    if resume:
        trainer.load(resume)
    if world > 1:
        on_gpu = where.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", store=shared_store(), rank=rank, world_size=world,
                                timeout=timedelta(hours=1),  # a large checkpoint on a slow disk takes its time
                                device_id=where if on_gpu else None)
    stop, meter = Stop(world), Meter(trainer, where, half, world)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        parameters = sum(p.numel() for p in trainer.net.parameters())
        print(f"{folder}: {parameters / 1e6:.1f} M parameters, {len(rows):,} pictures, {max_steps:,} steps of "
              f"{batch_size} on {world} x {where.type}" + (f", going on from step {trainer.step:,}" if resume else ""))
        if meter.measured:
            print(f"MFU is against {meter.measured / 1e9:,.0f} GFLOP/s, measured on matrix products just now")
        if not init_from and not resume and wants_init():
            print(f"warning: from scratch, as --init_from is empty: {wants_init()} was meant", file=sys.stderr)
    ended_by = train(trainer, folder, train_set, rows, val_set, val_rows, where, autocast, stop, meter, rank, world)
    if world > 1:
        dist.barrier(stop.group)  # who leaves first would have the others ended before their checkpoint is written
        dist.destroy_process_group()
    if ended_by:
        if rank == 0:
            print(f"stopped by {signal.Signals(ended_by).name}. The same command goes on from {folder}", flush=True)
        raise SystemExit(128 + ended_by)


def wants_init():
    """The init_from of the config file, which the command line may have emptied"""
    if sys.argv[1:] and not sys.argv[1].startswith("--"):
        return read_config(sys.argv[1], settings).get("init_from", "")
    return ""


def train(trainer, folder, train_set, rows, val_set, val_rows, where, autocast, stop, meter, rank, world):
    """Train to max_steps, or until a signal, which is then returned"""
    log = Log(folder, trainer.step, rank == 0)
    if rank == 0 and sample_every:
        vae = load_vae(train_set.info["vae"]["name"], where, scaling_factor=train_set.info["vae"]["scaling_factor"])
    net, one = trainer.net, trainer.net
    if world > 1:
        # around DDP, torch.compile splits the graph at its buckets, so that gradients are reduced during the backward
        # pass; with large buckets, as every cut is a graph more (XL/2: about ten, with DDP's 25 MB some hundred)
        net = one = torch.nn.parallel.DistributedDataParallel(trainer.net, gradient_as_bucket_view=True,
                                                              broadcast_buffers=False, bucket_cap_mb=512)
    if compile:
        net = torch.compile(one)
    micros = batch_size // micro_batch_size
    mine = range(rank, micros, world)
    on_gpu = where.type == "cuda"
    make_batch = Batches(train_set, rows, micro_batch_size, micros, trainer.net.config.tokens, seed, p_mean, p_std,
                         caption_dropout, threads=loader_threads if on_gpu else 0, pin=on_gpu)
    keys = ((s, m) for s in range(trainer.step, max_steps) for m in mine)
    # a CPU has no use for it: the thread's own pool of OpenMP threads would take turns with the step's
    batches = prefetched(make_batch, keys) if on_gpu else (make_batch(*key) for key in keys)
    first_step, ended_by = trainer.step, 0
    meter.restart()

    while trainer.step < max_steps and not ended_by:
        lr = learning_rate_at(trainer.step, learning_rate, warmup_steps, max_steps, schedule, min_learning_rate)
        masked = is_masked(trainer.step)
        for m in mine:
            with contextlib.nullcontext() if world == 1 or m == mine[-1] else one.no_sync():
                trainer.accumulate(net, next(batches), len(mine), masked, autocast)
        trainer.update(lr)
        step, ended_by = trainer.step, stop.agreed()

        done = step == max_steps
        ended_by = 0 if done else ended_by
        if step % log_every == 0 or done or ended_by or step == first_step + 1:
            report(trainer, log, meter, lr, masked, where, world)
        with meter.paused():  # images/s counts training alone
            if eval_every and (step % eval_every == 0 or done):
                loss, by_sigma = validate(trainer.best(), val_set, val_rows, where, autocast, rank, world)
                log(f"step {step:6,} | validation loss {loss:.4f} | by noise level "
                    + "  ".join(f"{sigma}: {value:.3f}" for sigma, value in by_sigma.items()),
                    step=step, val_loss=loss, val_loss_by_sigma=by_sigma)
            if rank == 0 and sample_every and (step % sample_every == 0 or done):
                grid, texts = draw_samples(trainer.best(), val_set, val_rows, vae, where, autocast)
                (folder / "samples").mkdir(exist_ok=True)
                grid.save(folder / "samples" / f"step_{step:08d}.png")
                (folder / "samples" / "captions.txt").write_text("\n".join(texts) + "\n")
            if rank == 0 and ((checkpoint_every and step % checkpoint_every == 0) or done or ended_by):
                path = trainer.save(folder)
    if rank == 0 and not ended_by:
        path = checkpoint.steps_of(folder)[-1]
        print(f"done: {path}. Draw with: python sample.py --checkpoint {path} --prompt \"...\"")
    return ended_by


def report(trainer, log, meter, lr, masked, where, world):
    """A log line; ValueError if the last steps all had to be skipped"""
    total, count = reduced(trainer.sums, where, world)
    loss, norm = (total.sum() / count.sum()).item(), trainer.grad_norm.item()
    measured, skipped = meter.read(), int(trainer.skipped)
    parts = [f"step {trainer.step:6,}/{max_steps:,}", f"loss {loss:.4f}", f"lr {lr:.2e}", f"grad norm {norm:.3f}",
             f"{measured['images_per_s']:,.0f} images/s", f"MFU {100 * measured['mfu']:.0f} %",
             f"{duration(measured['eta_s'])} left"]
    if price:
        measured["dollars_left"] = price * world * measured["eta_s"] / 3600
        parts.append(f"${measured['dollars_left']:,.2f} left")
    if mask_ratio and not masked:
        parts.append("unmasked")
    if skipped:
        parts.append(f"{skipped:,} steps skipped")
    log(" | ".join(parts), step=trainer.step, loss=loss, lr=lr, grad_norm=norm, skipped=skipped, **measured,
        loss_by_sigma=by_level(total, count, p_mean, p_std))
    if int(trainer.skipped_in_a_row) >= MOST_SKIPPED:
        saved = (checkpoint.steps_of(log.path.parent) or ["none yet"])[-1]
        raise ValueError(f"the last {int(trainer.skipped_in_a_row)} steps had gradients that are not finite and were "
                         f"skipped. The last good checkpoint is {saved}. Try a lower learning_rate or grad_clip")
    trainer.sums.zero_()
    meter.restart()


if __name__ == "__main__":
    config_given = sys.argv[1:] and not sys.argv[1].startswith("--")
    out = settings["out"] = out or f"runs/{Path(sys.argv[1]).stem if config_given else 'train'}"
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"train.py: stopped. The same command goes on from the last checkpoint in {out}") from None
