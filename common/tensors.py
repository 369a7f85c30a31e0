"""What the scripts ask of tensors from files."""
import hashlib
import json
import os

import torch
from safetensors import safe_open

from common.files import reading


def read_tensors(path, prefixes=()):
    """Return (description, {name: tensor}) of a safetensors file, with the tensors under these prefixes.

    The description is the JSON under "run" in its metadata, and {} in the files of others.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    open(path, "rb").close()  # safetensors does not tell a missing permission from damage
    with reading(path), safe_open(path, "pt") as file:
        run = json.loads((file.metadata() or {}).get("run", "{}"))
        return run, {name: file.get_tensor(name) for name in file.keys() if name.startswith(tuple(prefixes))}


def tensors_hash(*modules):
    """Return the sha256 of the names and bytes of all parameters and buffers that a checkpoint holds."""
    digest = hashlib.sha256()
    for module in modules:
        for name, t in sorted(module.state_dict().items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def check_tensors(module, tensors, where):
    """Raise ValueError if {name: tensor} are not, in their shapes, the parameters and buffers of a module.

    It may be built on the device "meta", without memory: what a file says of its own network may be anything.
    """
    wanted, found = ({name: tuple(t.shape) for name, t in group.items()} for group in (module.state_dict(), tensors))
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{where}: tensor {name} is {found.get(name, 'missing')} in the file and "
                             f"{wanted.get(name, 'missing')} in the network")


def not_finite(tensors):
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    # a sum is three times as fast, and where it is finite, so is all that is in it
    return next((name for name, t in tensors.items() if not t.sum().isfinite() and not t.isfinite().all()), None)


def strip(tensors, prefix):
    """Return the tensors whose names begin with a prefix, without it."""
    return {name[len(prefix):]: t for name, t in tensors.items() if name.startswith(prefix)}
