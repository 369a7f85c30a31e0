"""
A checkpoint is one safetensors file, runs/NAME/step_00002000.safetensors, so it is there whole or not at all:

    model.*                      the weights and buffers
    ema.*                        their moving average, once the run has one
    optimizer.{exp_avg,...}.*    the optimizers' state
    vae.*                        the autoencoder of the data, if train_vae.py made it
    metadata["run"]              JSON: step, id (of the run), config (MicroDiTConfig), settings, data (what the data set
                                 says of itself), model_sha256 and training_sha256 (the code that made it)
"""
import contextlib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import model
from common.files import reading, whole
from common.tensors import check_tensors, not_finite, read_tensors, strip
from configurator import ROOT, network_fields, typed
from configurator import check as check_settings
from encoders import released
from encoders.hub import fetch
from model import MicroDiT, MicroDiTConfig

NAME = re.compile(r"step_(\d{8,})\.safetensors")
# fields of the network that only earlier versions had: with these values it is the same network as today's
DROPPED = {"router_unmodulated": False, "mixer_skip": False, "fused_blocks": -1}


def code_hash():
    """Return the sha256 of model.py as it is now."""
    return hashlib.sha256(Path(model.__file__).read_bytes()).hexdigest()


def training_hash():
    """Return the sha256 of train.py and training/ as they are now."""
    files = [ROOT / "train.py", *sorted((ROOT / "training").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def step_path(folder, step):
    return Path(folder) / f"step_{step:08d}.safetensors"


def step_of(path):
    """Return the step in a checkpoint's name, None for any other name."""
    match = NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def steps_of(folder):
    """Return the checkpoints of a run, oldest first."""
    return sorted((p for p in Path(folder).glob("step_*") if step_of(p) is not None and p.is_file()), key=step_of)


def last_of(folder):
    """Say which checkpoint of a run is the last one, for an error."""
    return (steps_of(folder) or ["none yet"])[-1]


def save(path, tensors, run):
    """Write tensors and the run's description, whole or not at all; ValueError if a number is not finite."""
    if bad := not_finite(tensors):
        raise ValueError(f"{bad} is not finite, so {path} was not written, and the last checkpoint is "
                         f"{last_of(Path(path).parent)}: try a lower learning_rate or grad_clip")
    seen, copies = set(), {}
    for name, t in tensors.items():  # safetensors takes no tensor twice, as tied weights are
        copies[name] = t.clone() if t.data_ptr() in seen else t.contiguous()
        seen.add(t.data_ptr())
    with whole(path) as temporary:
        save_file(copies, temporary, {"run": json.dumps(run)})


def read_checkpoint(path, prefixes=()):
    """Return (run, {name: tensor}) of the tensors under these prefixes; ValueError if it is no whole checkpoint."""
    run, tensors = read_tensors(path, prefixes)
    with reading(path):
        run["step"], run["settings"], run["config"] = int(run["step"]), dict(run["settings"]), dict(run["config"])
        for end in ("vae", "text_encoder"):
            str(run["data"][end]["name"])
    return run, tensors


def run_of(path):
    """Return what a checkpoint says of its run; {} if it cannot be read or is the released network's."""
    with contextlib.suppress(ValueError, OSError):
        return read_checkpoint(path)[0]
    return {}


def newest_readable(folder):
    """Return (path, run) of a folder's newest checkpoint that can be read, with a warning that names those that cannot.

    (None, None) if there is none at all, ValueError if none can be read.
    """
    unreadable = []
    for path in reversed(steps_of(folder)):
        try:
            run, _ = read_checkpoint(path)
        except ValueError as error:
            unreadable.append(str(error))
            continue
        if unreadable:
            print(f"warning: {'; '.join(unreadable)}. {path} is used instead", file=sys.stderr)
        return path, run
    if unreadable:
        raise ValueError(f"{unreadable[0]}. No checkpoint in {folder} can be read: delete it or give another --out")
    return None, None


def find(path):
    """Resolve a path: a file, a run folder (its last checkpoint), "" (the newest run), or the paper's on the hub."""
    if not path:
        newest = max((p for p in Path("runs").glob("*/step_*") if step_of(p) is not None), key=os.path.getmtime,
                     default=None)
        if not newest:
            raise ValueError("no checkpoint in runs/: `python train.py config/tiny.py` trains one")
        path = newest.parent
    if Path(path).is_dir():
        newest, _ = newest_readable(path)
        if not newest:
            raise ValueError(f"no checkpoint (step_*.safetensors) in {path}")
        return newest
    if str(path).endswith((".pt", ".pth", ".safetensors")) and not Path(path).exists() and str(path).count("/") >= 2:
        return fetch(path, [str(path).split("/", 2)[2]]) / str(path).split("/", 2)[2]
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint {path}")
    return Path(path)


def load_network(path, use_ema=True):
    """Return (network, run), with the averaged weights if wanted and there; also of released or exported weights."""
    if Path(path).suffix != ".safetensors":
        return released.load_released(path)
    run, _ = read_checkpoint(path)
    warn_of_other_code(run, path)
    config, exported = config_of(run, path), "released" in run  # as training/export.py writes
    _, tensors = read_tensors(path, ("",) if exported else ("model.", "ema.") if use_ema else ("model.",))
    weights = strip(tensors, "ema.") or strip(tensors, "model.")
    weights = {n: t for n, t in tensors.items() if not n.startswith("vae.")} if exported else weights
    try:
        if config.depth + config.mixer_depth > len(weights):
            raise ValueError(f"depth {config.depth} and mixer_depth {config.mixer_depth} need more tensors than it has")
        if exported:
            net = released.from_official(weights, config)
        else:
            with contextlib.suppress(RuntimeError), torch.device("meta"):  # an edited model.py may need real numbers
                check_tensors(MicroDiT(config), weights, path)
            net = MicroDiT(config)
            net.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{path} does not fit the network that today's model.py builds ({reason})") from None
    if bad := not_finite(weights):
        raise ValueError(f"{path}: tensor {bad} is not finite: take an earlier checkpoint")
    return net, run


def config_of(run, path):
    """Return the MicroDiTConfig of a checkpoint; ValueError for an unknown field or a value that is not allowed."""
    fields = network_fields()
    config = {name: value for name, value in run["config"].items() if (name, value) not in DROPPED.items()}
    with reading(path):
        config = {name: typed(f"{path}: ", name, value, fields[name][0]) if name in fields else value
                  for name, value in config.items()}
        check_settings({name: value for name, value in config.items() if name in fields}, fields)
        return MicroDiTConfig(**config)


def warn_of_other_code(run, path):
    """Say so if a checkpoint was made by another model.py than today's."""
    if run.get("model_sha256", code_hash()) != code_hash():
        print(f"warning: {path} was made by another model.py, {Path(path).with_name('model.py')}", file=sys.stderr)
