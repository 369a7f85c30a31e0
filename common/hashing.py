"""Hashes that tell networks apart."""
import hashlib

import torch


def tensors_hash(*modules):
    """Return the sha256 of the names and bytes of all parameters and buffers that a checkpoint holds."""
    digest = hashlib.sha256()
    for module in modules:
        for name, t in sorted(module.state_dict().items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
