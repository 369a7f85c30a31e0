"""
How much memory steps of training and drawing take, counted on shapes alone: in seconds, and without a GPU.

    python -m studies.memory config/xl2_512.py --micro_batch_size 4 --optimizer adamw16 --activation_checkpointing

Settings are those of train.py. Products are in 16 bits, and all else is as train.py has it, but not compiled. What CUDA
takes for itself comes on top.
"""
import sys
import weakref
from dataclasses import fields

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.processes import run_script
from configurator import parse_command_line, script_settings
from model import MicroDiT, MicroDiTConfig, denoise, edm_loss
from training.optimizer import Optimizer

TOKENS = 77  # of a caption


class Peak(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, and keeps the most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive = {}

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, storage._cdata).atexit = False

    def drop(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return result


def step(net, peak, settings, pictures, masked):
    """Make two steps of so many pictures, or draw them where masked is None."""
    c = net.config
    latents = torch.empty(pictures, c.latent_channels, c.latent_size, c.latent_size)
    captions, sigma = torch.empty(pictures, TOKENS, c.caption_dim), torch.ones(pictures)
    if masked is None:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # with guidance, as model.sample
            return denoise(net, torch.cat([latents] * 2).double(), torch.cat([sigma] * 2), torch.cat([captions] * 2))
    ids = torch.zeros(pictures, int(c.tokens * (1 - settings["mask_ratio"])), dtype=torch.long) if masked else None
    optimizer = Optimizer(net, settings["optimizer"], 1e-4, betas=(0.9, 0.999), weight_decay=0.1)
    for _ in range(2):  # the first makes the optimizer's state
        with torch.autocast("cpu", torch.bfloat16):
            loss = edm_loss(net, latents, captions, sigma, torch.empty_like(latents), ids)
            loss.backward()
        optimizer.step(1e-4, torch.ones(()))


def count(config, settings, pictures, masked):
    """Return the most bytes that steps take together."""
    with torch.device("meta"):
        net = MicroDiT(config)
    net.activation_checkpointing, peak = settings["activation_checkpointing"], Peak()
    with FakeTensorMode():
        for module in net.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in [item for item in tensors.items() if item[1] is not None]:
                    new = torch.empty(old.shape)
                    tensors[name] = torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new
        for tensor in (*net.parameters(), *net.buffers()):
            peak.hold(tensor)
        average = sum(p.nbytes for p in net.parameters()) if settings["ema_decay"] and masked is not None else 0
        with peak:
            step(net, peak, settings, pictures, masked)
    return peak.most + average


def main():
    config_file, given = parse_command_line(sys.argv[1:], script_settings("train.py"))
    settings = script_settings("train.py", config_file) | given
    config = MicroDiTConfig(**{f.name: settings[f.name] for f in fields(MicroDiTConfig) if f.name in settings})
    micro = settings["micro_batch_size"]
    for masked, name in ((True, "masked"), (False, "whole"))[not settings["mask_ratio"]:]:
        print(f"training, {micro} {name} pictures at a time: {count(config, settings, micro, masked) / 1e9:.1f} GB")
    for pictures in (1, 16):
        most = count(config, settings, pictures, None)
        print(f"drawing {pictures} at a time, the network alone: {most / 1e9:.1f} GB")


if __name__ == "__main__":
    run_script("studies.memory", main)
