"""
A checkpoint is one safetensors file, runs/NAME/step_00002000.safetensors, so it is there whole or not at all:

    model.*                      the weights
    ema.*                        their moving average, once the run has one
    optimizer.{exp_avg,...}.*    the optimizers' state
    metadata["run"]              JSON: step, config (MicroDiTConfig), settings, data (what the data set says of itself)
"""
import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.files import write_atomic
from encoders import released
from model import MicroDiT, MicroDiTConfig


def save(path, tensors, run):
    """Write tensors and the run's description, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_atomic(path, lambda file: save_file(tensors, file.name, {"run": json.dumps(run)}))


def steps_of(folder):
    """The checkpoints of a run, oldest first"""
    return sorted(Path(folder).glob("step_*.safetensors"))


def newest(root="runs"):
    """The newest checkpoint of all runs; ValueError if there is none"""
    found = sorted(Path(root).glob("*/step_*.safetensors"), key=os.path.getmtime)
    if not found:
        raise ValueError(f"no checkpoint in {root}/*/: train one with `python train.py config/tiny.py`, or name one "
                         "with --checkpoint")
    return found[-1]


def find(path):
    """The file that `path` means: itself, a run folder's last checkpoint, the newest run's for "", or one on the hub"""
    if not path:
        return newest()
    if str(path).endswith(released.SUFFIXES) and not Path(path).exists() and str(path).count("/") >= 2:
        return released.download(str(path))
    path = Path(path)
    if path.is_dir():
        steps = steps_of(path)
        if not steps:
            raise ValueError(f"no checkpoint (step_*.safetensors) in {path}")
        return steps[-1]
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}")
    return path


def read(path, prefixes=()):
    """(run, {name: tensor}) of the tensors under these prefixes; ValueError if it is cut short or something else."""
    try:
        with safe_open(path, "pt") as file:
            run = json.loads((file.metadata() or {})["run"])
            return run, {name: file.get_tensor(name) for name in file.keys() if name.startswith(tuple(prefixes))}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        others = [str(p) for p in steps_of(Path(path).parent) if p != Path(path)]
        raise ValueError(f"{path} is not a whole checkpoint of this project ({type(error).__name__}: {error}). "
                         + (f"Other checkpoints of this run: {', '.join(others)}" if others else "")) from None


def strip(tensors, prefix):
    return {name[len(prefix):]: t for name, t in tensors.items() if name.startswith(prefix)}


def load_network(path, use_ema=True):
    """(network, run): with the averaged weights if wanted and there. A released .pt file gives its weights."""
    if str(path).endswith(released.SUFFIXES):
        return released.load(path)
    run, tensors = read(path, ("model.", "ema.") if use_ema else ("model.",))
    net = MicroDiT(MicroDiTConfig(**run["config"]))
    net.load_state_dict(strip(tensors, "ema.") or strip(tensors, "model."))
    return net, run
