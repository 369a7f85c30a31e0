"""
A checkpoint is one safetensors file, runs/NAME/step_00002000.safetensors, so it is there whole or not at all:

    model.*                      the weights and buffers
    ema.*                        their moving average, once the run has one
    optimizer.{exp_avg,...}.*    the optimizers' state
    metadata["run"]              JSON: step, config (MicroDiTConfig), settings, data (what the data set says of itself),
                                 model_sha256 (of the model.py that made it)
    metadata["sha256"]           of all tensors' bytes in the order of the file
"""
import contextlib
import hashlib
import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import model
from common.files import write_atomic
from common.schema import COUNT, NUMBER, TABLE, TEXT, check, check_tensors
from configurator import check as check_settings
from configurator import checked, read_fields
from encoders import TEXT_ENCODER, VAE, released
from model import MicroDiT, MicroDiTConfig

PATTERN = "step_*.safetensors"
TRIAL = 100  # steps below which a run is not taken for the newest, if there is another
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
         torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL"}  # of the safetensors format


RUN = {"step": COUNT, "config": TABLE, "model_sha256?": TEXT,
       "settings": {"max_steps": COUNT, "optimizer?": TEXT, "sample_guidance?": NUMBER},
       "data": {"vae": VAE, "text_encoder": TEXT_ENCODER, "words?": [TEXT]}}


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
    unknown, sha = "0" * 64, hashlib.sha256()
    header, start = {"__metadata__": {"sha256": unknown, "run": json.dumps(run)}}, 0
    tensors = dict(sorted(tensors.items()))
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": TYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(struct.pack("<Q", len(text)) + text)
        with ThreadPoolExecutor(1) as pool:
            for t in tensors.values():
                content = t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                hashed = pool.submit(sha.update, content)  # while it is written
                file.write(content)
                hashed.result()
        file.seek(8 + text.index(unknown.encode()))  # the first thing in the header
        file.write(sha.hexdigest().encode())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, write)


def steps_of(folder):
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in Path(folder).glob(PATTERN) if path.is_file())


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


def read(path, prefixes=(), whole=False, schema=RUN):
    """Return (run, {name: tensor}) of the tensors under these prefixes.

    Damaged if the content is cut short or something else, and with `whole` if it is not what was written; OSError if
    the file cannot be read, which is no damage.
    """
    with open(path, "rb") as file:  # safetensors does not tell a missing permission or a broken disk from damage
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        found = content_hash(file, 8 + size) if whole else None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            run = json.loads(metadata["run"])
            if whole and found != metadata.get("sha256", found):  # earlier versions wrote none
                raise ValueError("its content is not what was written")
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(tuple(prefixes))}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        others = [str(p) for p in steps_of(Path(path).parent) if p != Path(path)]
        more = f" Other checkpoints of this run: {', '.join(others)}" if others else ""
        raise Damaged(f"{path} is not a whole checkpoint of this project ({type(error).__name__}: {error}).{more}"
                      ) from None
    check(run, schema, path)
    return run, tensors


def is_foreign(path):
    """Return whether a file is whole and of another program."""
    try:
        with safe_open(path, "pt") as file:
            return "run" not in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def content_hash(file, start):
    """Return the sha256 of what follows `start` in an open file."""
    file.seek(start)
    sha = hashlib.sha256()
    while block := file.read(2 ** 24):
        sha.update(block)
    return sha.hexdigest()


def not_finite(tensors):
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    # a sum is three times as fast, and where it is finite, so is all that is in it
    return next((name for name, t in tensors.items() if not t.sum().isfinite() and not t.isfinite().all()), None)


def strip(tensors, prefix):
    return {name[len(prefix):]: t for name, t in tensors.items() if name.startswith(prefix)}


def load_network(path, use_ema=True, whole=False):
    """Return (network, run), with the averaged weights if wanted and there. A released .pt file gives its weights.

    whole: check first that the file is what was written, for which it is read twice.
    """
    if str(path).endswith(released.SUFFIXES):
        return released.load(path)
    run, tensors = read(path, ("model.", "ema.") if use_ema else ("model.",), whole)
    warn_of_other_code(run, path)
    weights = strip(tensors, "ema.") or strip(tensors, "model.")
    try:
        config = config_of(run, path)
        if config.depth + config.mixer_depth > len(weights):
            raise ValueError(f"depth {config.depth} and mixer_depth {config.mixer_depth} are more than it has tensors")
        with contextlib.suppress(RuntimeError), torch.device("meta"):  # an edited network may need numbers to be built
            check_tensors(MicroDiT(config), weights, path)
        net = MicroDiT(config)
        net.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path} is of another network than today's model.py builds ({reason}): see the model.py in "
                         "its folder") from None
    if bad := not_finite(weights):
        raise ValueError(f"{path}: tensor {bad} is not finite, so it can draw nothing: take an earlier checkpoint")
    return net, run


def config_of(run, path):
    """Return the MicroDiTConfig of a checkpoint; ValueError for a field that is none or has no possible value."""
    described = read_fields("model", "MicroDiTConfig")
    config = {name: checked(path, name, value, described[name][0]) if name in described else value
              for name, value in run["config"].items()}
    check_settings({name: value for name, value in config.items() if name in described}, described)
    return MicroDiTConfig(**config)


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
