"""
A checkpoint is one safetensors file, runs/NAME/step_00002000.safetensors, so it is there whole or not at all:

    model.*                      the weights and buffers
    ema.*                        their moving average, once the run has one
    optimizer.{exp_avg,...}.*    the optimizers' state
    metadata["run"]              JSON: step, config (MicroDiTConfig), settings, data (what the data set says of itself),
                                 model_sha256 (of the model.py that made it)
"""
import hashlib
import json
import os
import struct
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import model
from common.files import write_atomic
from encoders import released
from model import MicroDiT, MicroDiTConfig

PATTERN = "step_*.safetensors"
TRIAL = 100  # steps below which a run is not taken for the newest, if there is another
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
         torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}  # of the safetensors format


class Damaged(ValueError):
    """Says that a file does not hold a whole checkpoint."""


def code_hash():
    """Return the sha256 of model.py as it is now."""
    return hashlib.sha256(Path(model.__file__).read_bytes()).hexdigest()


def step_path(folder, step):
    return Path(folder) / f"step_{step:08d}.safetensors"


def save(path, tensors, run):
    """Write tensors and the run's description, whole or not at all.

    The safetensors package would write a temporary file of its own and rename that, so that what is synced to the disk
    is not what counts. Its format is a length, a JSON header and the buffers one after another.
    """
    header, start = {"__metadata__": {"run": json.dumps(run)}}, 0
    tensors = dict(sorted(tensors.items()))
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": TYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors.values():
            file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write)


def steps_of(folder):
    """Return the checkpoints of a run, oldest first."""
    return sorted(Path(folder).glob(PATTERN))


def newest(root="runs"):
    """Return the last checkpoint of the newest run that is no mere trial; ValueError if there is no run."""
    last = {path.parent: path for path in sorted(Path(root).glob(f"*/{PATTERN}"))}
    paths = sorted(last.values(), key=os.path.getmtime, reverse=True)
    if not paths:
        raise ValueError(f"no checkpoint in {root}/*/: train one with `python train.py config/tiny.py`, or name one "
                         "with --checkpoint")
    return next((path for path in paths if int(path.stem.removeprefix("step_")) >= TRIAL), paths[0])


def find(path):
    """Resolve a path: a file, a run folder (its last checkpoint), "" (the newest run), or the paper's on the hub."""
    if not path:
        return newest()
    if str(path).endswith(released.SUFFIXES) and not Path(path).exists() and str(path).count("/") >= 2:
        return released.download(str(path))
    path = Path(path)
    if path.is_dir():
        steps = steps_of(path)
        if not steps:
            raise ValueError(f"no checkpoint ({PATTERN}) in {path}")
        return steps[-1]
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}")
    return path


def read(path, prefixes=()):
    """Return (run, {name: tensor}) of the tensors under these prefixes.

    Damaged if the content is cut short or something else; OSError if the file cannot be read, which is no damage.
    """
    with open(path, "rb") as file:  # safetensors does not tell a missing permission or a broken disk from damage
        file.read(8)
    try:
        with safe_open(path, "pt") as file:
            run = json.loads((file.metadata() or {})["run"])
            return run, {name: file.get_tensor(name) for name in file.keys() if name.startswith(tuple(prefixes))}
    except (SafetensorError, KeyError, ValueError) as error:
        others = [str(p) for p in steps_of(Path(path).parent) if p != Path(path)]
        more = f" Other checkpoints of this run: {', '.join(others)}" if others else ""
        raise Damaged(f"{path} is not a whole checkpoint of this project ({type(error).__name__}: {error}).{more}"
                      ) from None


def strip(tensors, prefix):
    return {name[len(prefix):]: t for name, t in tensors.items() if name.startswith(prefix)}


def load_network(path, use_ema=True):
    """Return (network, run), with the averaged weights if wanted and there. A released .pt file gives its weights."""
    if str(path).endswith(released.SUFFIXES):
        return released.load(path)
    run, tensors = read(path, ("model.", "ema.") if use_ema else ("model.",))
    warn_of_other_code(run, path)
    try:
        net = MicroDiT(MicroDiTConfig(**run["config"]))
        net.load_state_dict(strip(tensors, "ema.") or strip(tensors, "model."))
    except (TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path} is of another network than today's model.py builds ({reason}): see the model.py in "
                         "its folder") from None
    return net, run


def code_copy(folder, sha256):
    """Return where a run keeps the copy of a model.py that it went on with."""
    return Path(folder) / f"model.{sha256[:8]}.py"


def warn_of_other_code(run, path):
    """Say so if a checkpoint was made by another model.py than today's."""
    made_by = run.get("model_sha256", code_hash())
    if made_by != code_hash():
        copy = code_copy(Path(path).parent, made_by)
        copy = copy if copy.exists() else copy.with_name("model.py")
        print(f"warning: {path} was made with another model.py, so it may draw or train differently now. Its own is "
              f"{copy}: copy it over model.py to have what made it", file=sys.stderr)
