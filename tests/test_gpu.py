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
         "caption_dim": 32, "latent_size": 8})
PICTURES = 2  # float64 on the CPU takes most of the time


def results(net, batch, module=None, masked=True):
    """Return (F, loss, all gradients as one vector) as float64 on the CPU; module: what is called in place of net."""
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


@pytest.fixture(scope="module")
def exact():
    """A network without zeros, a batch, and their results, all in float64"""
    if DEVICE.type == "cuda":
        torch.set_num_threads(os.cpu_count())  # one, says conftest.py
    config = model.MicroDiTConfig(**SIZE)
    torch.manual_seed(0)
    net = model.MicroDiT(config).double()
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    latents, noise = torch.randn(2, PICTURES, 4, config.latent_size, config.latent_size, dtype=torch.float64)
    captions = torch.randn(PICTURES, 12, config.caption_dim, dtype=torch.float64)
    batch = latents, captions, torch.rand(PICTURES, dtype=torch.float64) * 3 + 0.1, noise
    return net, batch, {masked: results(net, batch, masked=masked) for masked in (True, False)}


def on_device(exact):
    net, batch, expected = exact
    return copy.deepcopy(net).float().to(DEVICE), [t.float().to(DEVICE) for t in batch], expected


def assert_near(what, found, expected, most):
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected)]
    print(f"{DEVICE.type}, {what}:", errors)
    assert max(errors) < most


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype, compiled, most", [("float32", False, 1e-4), ("bfloat16", False, 2e-2),
                                                   ("bfloat16", True, 2e-2)])
def test_gpu_gradients(exact, masked, dtype, compiled, most):
    if compiled and DEVICE.type == "cpu":
        pytest.skip("compiling takes minutes on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    net, batch, expected = on_device(exact)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        found = results(net, batch, torch.compile(net) if compiled else net, masked)
    assert_near(f"{dtype}, compiled {compiled}, masked {masked}", found, expected[masked], most)
