"""The network, the loss and the sampler against what the released implementation computed, and its tensor names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import model
from encoders import released
from model import MicroDiT, MicroDiTConfig

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
        tensors, given = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])
    config = {ours: given[theirs] for ours, theirs in NAMES.items()}
    for ours, theirs in (("attn_ratio", "qkv_multipliers"), ("mlp_ratio", "ffn_multipliers")):
        config[ours] = (given[theirs][0], given[theirs][-1])
    state = {k.removeprefix("state."): t for k, t in tensors.items() if k.startswith("state.")}
    tensors["in.caption"] = tensors["in.caption"].squeeze(1)
    return MicroDiT.from_official(state, MicroDiTConfig(**config)).eval(), tensors, state


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def ids_keep(t):
    return model.kept_patches(t["in.mask_noise"], 0.75)


@torch.no_grad()
def test_network_outputs(reference):
    net, t, _ = reference
    x, c_noise, caption = t["in.x"], t["in.c_noise"], t["in.caption"]
    plain = net(x, c_noise, caption)
    assert relative(plain, t["out.unmasked"]) < 1e-5
    uncond = net(x, c_noise, torch.zeros_like(caption))
    assert relative(uncond + 3 * (plain - uncond), t["out.cfg3"]) < 1e-5
    ids = ids_keep(t)
    assert relative(net(x, c_noise, caption, ids_keep=ids), t["out.masked"]) < 1e-5
    removed = torch.ones_like(t["out.mask"]).scatter(1, ids, 0)
    assert torch.equal(removed, t["out.mask"])


@torch.no_grad()
def test_denoised_and_losses(reference):
    net, t, _ = reference
    noisy = t["in.x"] + t["in.noise"] * t["in.sigma"].view(-1, 1, 1, 1)
    assert relative(model.denoise(net, noisy, t["in.sigma"].flatten(), t["in.caption"]), t["out.denoised"]) < 1e-5
    args = net, t["in.x"], t["in.caption"], t["in.sigma"].flatten(), t["in.noise"]
    assert relative(model.edm_loss(*args), t["out.loss_unmasked"]) < 1e-5
    assert relative(model.edm_loss(*args, ids_keep=ids_keep(t)), t["out.loss_masked"]) < 1e-5


@pytest.mark.parametrize("guidance", ["1", "2.5"])
def test_heun(reference, guidance):
    net, t, _ = reference
    out = model.sample(net, t["in.latent_start"], t["in.caption"], steps=6, guidance_scale=float(guidance))
    assert relative(out, t[f"out.heun_6_cfg{guidance}"].float()) < 5e-5


def test_official_round_trip(reference):
    net, _, state = reference
    written = net.to_official()
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
    net = MicroDiT.from_official(state, PUBLISHED[name])
    assert sum(p.numel() for p in net.parameters()) == manifest["parameters"]
    if "XL" in name:  # whose config is found out from the weights
        table = model.position_table(net.config).unsqueeze(0)
        assert released.infer_config(state | {"pos_embed": table}) == net.config
    assert {k: list(v.shape) for k, v in net.to_official().items()} == manifest["state_dict"]


def test_from_official_names_what_does_not_fit(reference):
    net, _, state = reference
    broken = {k: v for k, v in state.items() if k != "blocks.0.norm1.weight"} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="missing blocks.0.norm1.weight.*left over extra"):
        MicroDiT.from_official(broken, net.config)
    with pytest.raises(ValueError, match="x_embedder.proj.bias is \\(3,\\)"):
        MicroDiT.from_official(state | {"x_embedder.proj.bias": torch.zeros(3)}, net.config)
