"""Numbers on a GPU against the CPU's in float64; without a GPU the same on the CPU, in small.

python -m pytest -n 0 -s tests/test_gpu.py prints the errors.
"""

import copy
import os

import pytest
import torch

import model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = ({"dim": 512, "depth": 16, "head_dim": 32, "mixer_depth": 4, "mixer_dim": 512} if DEVICE.type == "cuda" else
        {"dim": 64, "depth": 4, "head_dim": 16, "mixer_depth": 2, "mixer_dim": 48, "mlp_multiple": 16,
         "caption_dim": 32, "latent_size": 8})  # fmt: skip


PICTURES = 2  # float64 on the CPU takes most of the time


def network():
    """A network whose zero-initialised weights are not zero, in float64, and a batch"""
    config = model.MicroDiTConfig(**SIZE)
    torch.manual_seed(0)
    net = model.MicroDiT(config).double()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    latents, noise = torch.randn(2, PICTURES, 4, config.latent_size, config.latent_size, dtype=torch.float64)
    captions = torch.randn(PICTURES, 12, config.caption_dim, dtype=torch.float64)
    return net, (latents, captions, torch.rand(PICTURES, dtype=torch.float64) * 3 + 0.1, noise)


def results(net, batch, module=None, masked=True):
    """(F, loss, all gradients as one vector) as float64 on the CPU; module: what is called in place of net"""
    latents, captions, sigma, noise = batch
    ids = model.kept_patches(torch.rand(PICTURES, net.config.tokens, generator=torch.Generator().manual_seed(1)), 0.75)
    c_skip, c_out, c_in, c_noise = model.preconditioning(sigma.view(-1, 1, 1, 1))
    x = latents + sigma.view(-1, 1, 1, 1) * noise
    module = net if module is None else module
    out = module(c_in * x, c_noise.flatten(), captions, ids.to(x.device) if masked else None)
    net.zero_grad()
    loss = (out.to(x.dtype) - (latents - c_skip * x) / c_out).square().mean()  # edm_loss, which is in float32
    loss.backward()
    return [t.detach().double().cpu() for t in (out, loss, torch.cat([p.grad.flatten() for p in net.parameters()]))]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def exact():
    if DEVICE.type == "cuda":
        torch.set_num_threads(os.cpu_count())  # one, says conftest.py
    net, batch = network()
    return net, batch, {masked: results(net, batch, masked=masked) for masked in (True, False)}


def on_device(exact):
    net, batch, expected = exact
    return copy.deepcopy(net).float().to(DEVICE), [t.float().to(DEVICE) for t in batch], expected


@pytest.mark.parametrize("masked", [True, False])
def test_gpu_float32(exact, masked):
    torch.backends.cuda.matmul.allow_tf32 = False
    net, batch, expected = on_device(exact)
    errors = [relative(a, b) for a, b in zip(results(net, batch, masked=masked), expected[masked])]
    print(f"{DEVICE.type}, float32, masked {masked}: F, loss, gradients", errors)
    assert max(errors) < 1e-4


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_bfloat16(exact, masked, compiled):
    if compiled and DEVICE.type == "cpu":
        pytest.skip("compiling takes minutes on a CPU")
    net, batch, expected = on_device(exact)
    module = torch.compile(net) if compiled else net
    with torch.autocast(DEVICE.type, torch.bfloat16):
        errors = [relative(a, b) for a, b in zip(results(net, batch, module, masked), expected[masked])]
    print(f"{DEVICE.type}, bfloat16, compiled {compiled}, masked {masked}: F, loss, gradients", errors)
    assert max(errors) < 2e-2


@pytest.mark.parametrize("sampler", sorted(model.SAMPLERS))
def test_gpu_samplers(exact, sampler):
    net, (noise, captions, *_), _ = on_device(exact)
    expected = model.sample(exact[0], exact[1][3], exact[1][1], 6, 3.0, sampler)
    drawn = model.sample(net, exact[1][3].float().to(DEVICE), captions, 6, 3.0, sampler)
    print(f"{DEVICE.type}, {sampler}:", relative(drawn.double().cpu(), expected.double()))
    assert relative(drawn.double().cpu(), expected.double()) < 1e-3
