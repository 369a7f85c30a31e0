"""The network, the loss and the sampler against what the released implementation computed, and its tensor names."""
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import model
from encoders import released
from model import MicroDiTConfig

pytestmark = pytest.mark.paper  # the released network itself
DATA = Path(__file__).parent / "data"
MANIFESTS = json.loads((DATA / "state_dict_shapes.json").read_text())
NAMES = {  # of the released configuration
    "latent_size": "input_size", "latent_channels": "in_channels", "patch_size": "patch_size", "dim": "dim",
    "depth": "depth", "head_dim": "head_dim", "mlp_multiple": "multiple_of", "caption_dim": "caption_channels",
    "pos_scale": "pos_interp_scale", "mixer_depth": "patch_mixer_depth", "mixer_dim": "patch_mixer_dim",
    "mixer_mlp_ratio": "patch_mixer_mlp_ratio", "num_experts": "num_experts", "expert_capacity": "expert_capacity",
    "moe_every": "experts_every_n"}


@pytest.fixture(scope="module")
def reference():
    with safe_open(DATA / "narrow_mixer.safetensors", "pt") as f:
        tensors, theirs = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])
    config = {ours: theirs[name] for ours, name in NAMES.items()}
    for ours, name in (("attn_ratio", "qkv_multipliers"), ("mlp_ratio", "ffn_multipliers")):
        config[ours] = (theirs[name][0], theirs[name][-1])
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    tensors["in.caption"] = tensors["in.caption"].squeeze(1)
    tensors["ids_keep"] = model.kept_patches(tensors["in.mask_noise"], 0.75)
    return released.from_official(state, MicroDiTConfig(**config)).eval(), tensors, state


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def test_outputs_and_losses(reference):
    net, t, _ = reference
    x, c_noise, caption, sigma = t["in.x"], t["in.c_noise"], t["in.caption"], t["in.sigma"].flatten()
    plain, uncond = net(x, c_noise, caption), net(x, c_noise, torch.zeros_like(caption))
    denoised = model.denoise(net, x + t["in.noise"] * t["in.sigma"].view(-1, 1, 1, 1), sigma, caption)
    losses = [model.edm_loss(net, x, caption, sigma, t["in.noise"], ids_keep=kept) for kept in (None, t["ids_keep"])]
    for ours, name in ((plain, "unmasked"), (uncond + 3 * (plain - uncond), "cfg3"), (denoised, "denoised"),
                       (net(x, c_noise, caption, ids_keep=t["ids_keep"]), "masked"),
                       (losses[0], "loss_unmasked"), (losses[1], "loss_masked")):
        assert relative(ours, t[f"out.{name}"]) < 1e-5, name
    assert torch.equal(torch.ones_like(t["out.mask"]).scatter(1, t["ids_keep"], 0), t["out.mask"])


@pytest.mark.parametrize("guidance", ["1", "2.5"])
def test_heun(reference, guidance):
    net, t, _ = reference
    out = model.sample(net, t["in.latent_start"], t["in.caption"], steps=6, guidance_scale=float(guidance))
    assert relative(out, t[f"out.heun_6_cfg{guidance}"].float()) < 5e-5


def test_official_round_trip(reference):
    net, _, state = reference
    written = released.to_official(net)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6 if name == "pos_embed" else 0)


PUBLISHED = {
    "MicroDiT_XL_2 4ch 256px": MicroDiTConfig(),
    "MicroDiT_XL_2 16ch 512px": MicroDiTConfig(latent_channels=16, latent_size=64, pos_scale=2.0),
    "MicroDiT_XL_2 4ch 512px": MicroDiTConfig(latent_size=64, pos_scale=2.0),
    "MicroDiT_Tiny_2 4ch 256px": MicroDiTConfig(dim=512, depth=16, head_dim=32, mixer_depth=4, mixer_dim=512)}


@pytest.mark.parametrize("name", MANIFESTS)
def test_released_manifests(name):
    manifest = MANIFESTS[name]
    state = {k: torch.empty(shape, device="meta") for k, shape in manifest["state_dict"].items()}
    net = released.from_official(state, PUBLISHED[name])
    assert sum(p.numel() for p in net.parameters()) == manifest["parameters"]
    if "XL" in name:  # whose config is found out from the weights
        table = model.position_table(net.config).unsqueeze(0)
        assert released.infer_config(state | {"pos_embed": table}) == net.config
    assert {k: list(v.shape) for k, v in released.to_official(net).items()} == manifest["state_dict"]
