"""What a GPU would run, on tensors that have a device and a shape and no numbers: everything stays on the device, and
nothing is read back from it."""
import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import train
from common.processes import Processes
from encoders.tiny import TinyAutoencoder, config_for
from training import report
from training.log import Losses

CONFIG = model.MicroDiTConfig(latent_size=8, latent_channels=4, caption_dim=16, dim=32, depth=2, head_dim=8,
                              mlp_multiple=8, mixer_depth=2, mixer_dim=16, num_experts=2, mixer_conv=True)
META = torch.device("meta")


class Stays(TorchDispatchMode):
    """Refuses operations whose result is on another device, and collects the dtypes of the layers' products."""

    def __init__(self, device):
        super().__init__()
        self.device, self.products = device, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{function} makes a tensor on {tensor.device}"
                if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                    self.products.add(tensor.dtype)
        return result


@pytest.fixture
def steps(monkeypatch):
    """steps(optimizer, checkpointing) makes a masked and an unmasked step of train.py on the meta device"""
    supported = "_get_fused_kernels_supported_devices"  # torch's kernels for AdamW have a meta form, and it says no
    for module in (optimizers, sys.modules["torch.optim.adam"], sys.modules["torch.optim.adamw"]):
        if hasattr(module, supported):
            monkeypatch.setattr(module, supported, lambda: ["cuda", "meta"])
    monkeypatch.setattr(train, "autocast", lambda *_: contextlib.nullcontext())  # meta has none

    def steps(optimizer, checkpointing=False, mask="random", dtype="float32"):
        for name, value in {"optimizer": optimizer, "ema_decay": 0.9, "mask_ratio": 0.75, "mask": mask,
                            "dtype": dtype}.items():
            monkeypatch.setattr(train, name, value)
        state, losses = train.new_state(CONFIG, {}, META), Losses(-0.6, 1.2, Processes(0, 1, META))
        state.net.activation_checkpointing = checkpointing
        with Stays("meta"):
            shapes = ((4, 4, 8, 8), (4, 7, 16), (4,), (4, 4, 8, 8), (4, CONFIG.tokens))
            batch = [torch.empty(shape, device=META) for shape in shapes]  # latents, captions, sigma, noise, uniforms
            stream = iter([batch] * 4)
            for masked in (True, False):
                norm = train.make_step(state, state.net, stream, 2, masked, losses)
        assert norm.device == META and state.step == 2
        return state

    return steps


@pytest.mark.parametrize("arguments", [("adamw",), ("muon", True), ("adamw", True, "grouped"),
                                       ("muon", False, "random", "float16")])
def test_a_training_step_stays_on_its_device(steps, arguments):
    state = steps(*arguments)
    held = [*state.optimizer.tensors().values(), *state.average.net.parameters(), state.optimizer.skipped]
    assert len(held) > 40 and all(t.device == META for t in held)


def test_validation_reads_back_only_the_losses(monkeypatch):
    def read(ids):
        return {"latents": torch.empty(len(ids), 4, 8, 8, dtype=torch.half), "captions": torch.empty(len(ids), 7, 16)}

    monkeypatch.setattr(report, "autocast", lambda *_: contextlib.nullcontext())
    with META:
        net = model.MicroDiT(CONFIG)
    with pytest.raises(NotImplementedError) as error:  # meta has no numbers to give
        report.validate(net, SimpleNamespace(read=read), np.arange(8), 4, torch.float32, Processes(0, 1, META))
    (line,) = [str(entry.statement) for entry in error.traceback if entry.path.name == "report.py"]
    assert "losses.read()" in line


# --- the forward pass, under a GPU's own autocast: the autograd engine of a torch without CUDA knows none ---


@pytest.fixture
def on_cuda(monkeypatch):
    """on_cuda(module) has a module's weights on a GPU that is not there"""
    levels = model.noise_levels(3)
    monkeypatch.setattr(model, "noise_levels", lambda *args: levels)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)

    def on_cuda(module):
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        tensors[name] = torch.empty(t.shape, dtype=t.dtype, device="cuda")
        return module

    with torch.device("meta"):
        on_cuda.net, on_cuda.vae = model.MicroDiT(CONFIG), TinyAutoencoder(config_for(8, 4, 48))
    with FakeTensorMode(), torch.no_grad():
        yield on_cuda


@pytest.mark.parametrize("sampler, guidance", [("heun", 1), ("heun", 3), ("dpmpp_2m", 3)])
def test_sampling_stays_on_its_device(on_cuda, sampler, guidance):
    net, noise = on_cuda(on_cuda.net), torch.empty(2, 4, 8, 8, device="cuda")
    caption, stream = torch.empty(2, 7, 16, device="cuda"), set()
    for block in (*net.mixer, *net.blocks):
        block.register_forward_pre_hook(lambda module, inputs: stream.add(inputs[0].dtype))
    with Stays("cuda") as seen, torch.autocast("cuda", torch.bfloat16):
        made = model.sample(net, noise, caption, 3, guidance, sampler)
    assert made.device.type == "cuda" and made.dtype == torch.float32 and seen.products == {torch.bfloat16}
    assert stream == {torch.float32}  # what the blocks add to


def test_encoding_and_decoding_stay_on_their_device(on_cuda):
    vae = on_cuda(on_cuda.vae)
    with Stays("cuda"):
        latents = vae.encode(torch.empty(2, 3, 32, 32, device="cuda"))
        pictures = vae.decode(latents)
    assert latents.shape == (2, 4, 4, 4) and pictures.shape == (2, 3, 32, 32)
