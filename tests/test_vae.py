"""vae.py against diffusers' AutoencoderKL, on random models written to disk in the published formats."""
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import encoders
from encoders import vae

# the shapes of stabilityai/sdxl-vae and ostris/vae-kl-f8-d16
SDXL = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "layers_per_block": 2, "scaling_factor": 1.0}
OSTRIS = SDXL | {"block_out_channels": [128, 128, 256, 512], "latent_channels": 16}
SMALL = {"block_out_channels": [32, 64, 64], "latent_channels": 4, "layers_per_block": 2, "scaling_factor": 0.5}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def published(folder, config):
    """A random model of this config, written by diffusers"""
    from diffusers import AutoencoderKL

    n = len(config["block_out_channels"])
    torch.manual_seed(0)
    theirs = AutoencoderKL(**config, down_block_types=["DownEncoderBlock2D"] * n,
                           up_block_types=["UpDecoderBlock2D"] * n).eval()
    with torch.no_grad():
        for _, p in theirs.named_parameters():  # every norm and bias different from its start
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return published(folder, SMALL), folder


def assert_equal_networks(ours, theirs, images):
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.posterior(images)
        pairs = ((mean, posterior.mean), (logvar, posterior.logvar),
                 (ours.decode(mean * ours.scaling_factor), theirs.decode(posterior.mean).sample))
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).abs().max() <= 3e-5 * b.abs().max()


def some_images(*shape):
    return torch.rand(*shape) * 2 - 1


@pytest.mark.parametrize("config, parameters", [(SDXL, 83_653_863), (OSTRIS, 57_266_643)])
def test_the_published_shapes(config, parameters):
    with torch.device("meta"):
        ours = vae.KLAutoencoder(config)
    assert sum(p.numel() for p in ours.parameters()) == parameters and len(list(ours.parameters())) == 248
    assert (ours.latent_channels, ours.downsample) == (config["latent_channels"], 8)


@pytest.mark.parametrize("changes", [
    {}, {"use_quant_conv": False}, {"use_post_quant_conv": False}, {"shift_factor": 0.25},
    {"block_out_channels": [32, 32, 64, 96], "layers_per_block": 1}])
def test_equal_to_diffusers(tmp_path, changes):
    theirs = published(tmp_path, SMALL | changes)
    ours, images = encoders.load_vae(str(tmp_path)), some_images(1, 3, 32, 48)
    shift, ours.shift = ours.shift, 0.0  # diffusers leaves the shift to its pipelines
    assert_equal_networks(ours, theirs, images)
    ours.shift, mean = shift, ours.posterior(images)[0]
    torch.testing.assert_close(ours.encode(images), (mean - changes.get("shift_factor", 0)) * 0.5)
    torch.testing.assert_close(ours.decode(ours.encode(images)), theirs.decode(mean).sample, atol=1e-4, rtol=1e-4)


def test_a_pipelines_folder_and_legacy_attention_names(small, tmp_path):
    theirs, folder = small
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {n.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "vae" / WEIGHTS)
    assert_equal_networks(vae.load(tmp_path), theirs, some_images(1, 3, 32, 32))


LDM_NAMES = (  # patterns of diffusers' names in the order in which they are replaced, the LDM code's names
    (r"encoder\.down_blocks\.", "encoder.down."), (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."), (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"\.resnets\.", ".block."), (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."), (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
    *((rf"decoder\.up_blocks\.{i}", f"decoder.up.{2 - i}") for i in range(3)))  # of three levels, from the finest


def ldm_names(tensors):
    """The tensors as in the LDM code's files, whose attention is of 1x1 convolutions"""
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in LDM_NAMES:
            name = re.sub(pattern, new, name)
        out[name] = tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    return out


def test_a_single_file_in_the_ldm_format(small, tmp_path):
    theirs, folder = small
    tensors = ldm_names(load_file(folder / WEIGHTS))
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="give scaling_factor"):
        vae.load(tmp_path / "vae.safetensors")
    # the same inside a whole checkpoint
    whole = {f"first_stage_model.{n}": t for n, t in tensors.items()} | {"model.diffusion_model.x": torch.zeros(1)}
    save_file(whole, tmp_path / "whole.safetensors")
    for name in ("vae", "whole"):
        ours = vae.load(tmp_path / f"{name}.safetensors", scaling_factor=0.5)
        assert_equal_networks(ours, theirs, some_images(1, 3, 32, 32))


def test_draws_have_the_posteriors_spread_and_a_picture_does_not_depend_on_its_batch(small):
    ours, images = vae.load(small[1]), some_images(vae.SLICE + 1, 3, 16, 16)
    mean, logvar = ours.posterior(images)
    together = ours.encode(images, [torch.Generator().manual_seed(i) for i in range(len(images))])
    torch.testing.assert_close(together[4:], ours.encode(images[4:], [torch.Generator().manual_seed(4)]))
    torch.testing.assert_close(ours.decode(together)[4:], ours.decode(together[4:]))
    torch.testing.assert_close(ours.encode(images), mean * 0.5)
    ours.posterior = lambda images: (mean, logvar)
    draws = torch.stack([ours.encode(images, torch.Generator().manual_seed(i)) for i in range(300)]) / 0.5
    z = (draws - mean) / (0.5 * logvar).exp()
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_sides_that_cannot_be_divided_are_refused(small):
    with pytest.raises(ValueError, match="17 x 16: both must be multiples of"):
        vae.load(small[1]).encode(torch.zeros(1, 3, 16, 17))


def edited(folder, to, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    to.mkdir()
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "none"}))
    (to / WEIGHTS).symlink_to(folder / WEIGHTS)
    return to


@pytest.mark.parametrize("changes, message", [
    ({"scaling_factor": "none"}, "does not name its scaling factor"), ({"latent_channels": 8}, "size mismatch"),
    ({"block_out_channels": [32, 64]}, "do not fit its config"), ({"act_fn": "mish"}, "mish"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
    ({"latents_mean": [1, 2, 3, 4]}, "latents_mean"), ({"mid_block_add_attention": False}, "mid_block_add_attention")])
def test_a_config_that_does_not_fit_is_refused(small, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        vae.load(edited(small[1], tmp_path / "v", **changes))


@pytest.mark.parametrize("name, message", [
    ("pixel", "unknown autoencoder"), ("./nothing", "no such file or folder"), ("no/such-model", "neither a file"),
    ("{folder}", "config.json cannot be read"), ("{folder}/cut.safetensors", "not a whole safetensors file"),
    ("{folder}/other.safetensors", "not an LDM autoencoder"), ("{folder}/vae.pt", "must be .safetensors")])
def test_what_cannot_be_loaded_says_why(small, tmp_path, name, message):
    whole = (small[1] / WEIGHTS).read_bytes()
    for file, data in (("cut.safetensors", whole[:5000]), ("other.safetensors", whole), ("vae.pt", b"x")):
        (tmp_path / file).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        encoders.load_vae(name.format(folder=tmp_path), scaling_factor=1.0)


def test_precision(small, tmp_path):
    with pytest.raises(ValueError, match="overflows in float16"):
        vae.load(small[1], dtype=torch.float16)
    fixed = edited(small[1], tmp_path / "fixed", force_upcast=False)
    assert vae.load(fixed, dtype=torch.float16).encoder.conv_in.weight.dtype == torch.float16
    assert vae.load(small[1], dtype=torch.bfloat16).decode(torch.zeros(1, 4, 2, 2)).dtype == torch.float32
