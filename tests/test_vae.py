"""vae.py against diffusers' AutoencoderKL, on random models written to disk in the published formats."""
import json

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
    for p in theirs.parameters():  # every norm and bias different from its start
        p.data += 0.2 * torch.randn(p.shape) * (p.ndim == 1)
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return published(folder, SMALL), folder


def moments(ours, images):
    """The mean and log-variance of the posterior of images"""
    return ours.in_parts(ours.latents_of, images).chunk(2, dim=1)


def assert_equal_networks(ours, theirs, images):
    posterior, (mean, logvar) = theirs.encode(images).latent_dist, moments(ours, images)
    for a, b in ((mean, posterior.mean), (logvar, posterior.logvar),
                 (ours.decode(mean * ours.scaling_factor), theirs.decode(posterior.mean).sample)):
        assert a.shape == b.shape and (a - b).abs().max() <= 3e-5 * b.abs().max()


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
    ours, images = encoders.load_vae(str(tmp_path)), torch.randn(1, 3, 32, 48)
    shift, ours.shift = ours.shift, 0.0  # diffusers leaves the shift to its pipelines
    assert_equal_networks(ours, theirs, images)
    ours.shift, mean = shift, moments(ours, images)[0]
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
    for name in (tmp_path / "vae", tmp_path / "vae" / WEIGHTS):  # a file beside its config.json is read, too
        assert_equal_networks(encoders.load_vae(str(name)), theirs, torch.randn(1, 3, 32, 32))


def test_draws_have_the_posteriors_spread_and_a_picture_does_not_depend_on_its_batch(small):
    ours = encoders.load_vae(str(small[1]))
    images = torch.randn(ours.at_once + 1, 3, 16, 16)
    mean, logvar = moments(ours, images)
    together = ours.encode(images, [torch.Generator().manual_seed(i) for i in range(len(images))])
    torch.testing.assert_close(together[4:], ours.encode(images[4:], [torch.Generator().manual_seed(4)]))
    torch.testing.assert_close(ours.decode(together)[4:], ours.decode(together[4:]))
    torch.testing.assert_close(ours.encode(images), mean * 0.5)
    z = torch.cat([mean, logvar], 1)
    draws = torch.stack([ours.draw(z, torch.Generator().manual_seed(i)) for i in range(300)])
    z = (draws - mean) / (0.5 * logvar).exp()
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    assert ours.bfloat16().decode(together).dtype == torch.float32
    with pytest.raises(ValueError, match="16, 17.: sides must be multiples of 4"):
        ours.encode(torch.zeros(1, 3, 16, 17))


def in_shards(folder, out):
    """Write an autoencoder as diffusers writes large ones, and return the shards."""
    tensors = load_file(folder / WEIGHTS)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: t for key, t in tensors.items() if weight_map[key] == name}, out / name)
    (out / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [out / name for name in names]


def test_shards_and_variants_load(small, tmp_path):
    theirs, folder = small
    in_shards(folder, tmp_path / "shards")
    (tmp_path / "fp16").mkdir()
    (tmp_path / "fp16/config.json").write_bytes((folder / "config.json").read_bytes())
    half = tmp_path / "fp16/diffusion_pytorch_model.fp16.safetensors"
    save_file({key: t.half() for key, t in load_file(folder / WEIGHTS).items()}, half)
    assert_equal_networks(encoders.load_vae(tmp_path / "shards"), theirs, torch.randn(1, 3, 32, 32))
    for name in (tmp_path / "fp16", half):
        loaded = encoders.load_vae(name).state_dict()
        assert all((loaded[key] == t.half()).all() for key, t in theirs.state_dict().items())


@pytest.mark.parametrize("changes, message", [
    ({"scaling_factor": "none"}, "scaling_factor' is missing"), ({"latent_channels": 8}, "do not fit its config"),
    ({"layers_per_block": 10 ** 9}, "more layers than there are"), ({"layers_per_block": "a"}, "cannot be used"),
    ({"_class_name": "AutoencoderTiny"}, "kind AutoencoderTiny"), ({"latents_mean": [1, 2, 3, 4]}, "latents_mean"),
    ({"block_out_channels": [10 ** 18] * 3}, "cannot be used")])
def test_a_config_that_does_not_fit_is_refused(small, tmp_path, changes, message):
    config = json.loads((small[1] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "none"}))
    (tmp_path / WEIGHTS).symlink_to(small[1] / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        encoders.load_vae(tmp_path)


def test_what_cannot_be_loaded_says_why(small, tmp_path):
    whole = (small[1] / WEIGHTS).read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/diffusion_pytorch_model.bin").write_bytes(b"x")
    save_file({"first_stage_model.encoder.conv_in.bias": torch.zeros(1)}, tmp_path / "original.safetensors")
    in_shards(small[1], tmp_path / "part")[1].unlink()
    for file, data in (("cut.safetensors", whole[:5000]), ("ldm.safetensors", whole), ("vae.pt", b"x")):
        (tmp_path / file).write_bytes(data)
    for name, message in (
            ("no/such-model", "neither here nor.*--vae FOLDER"), (tmp_path, "there is no such file"),
            (tmp_path / "cut.safetensors", "cut.safetensors cannot be used"),
            (tmp_path / "ldm.safetensors", "no config.json: give a folder"),
            (tmp_path / "folder", "folder/diffusion_pytorch_model.bin is a pickle"),
            (tmp_path / "original.safetensors", "names of the first latent diffusion code: give a folder of"),
            (tmp_path / "part", "part.* do not fit its config.* is missing in the file"),
            (tmp_path / "vae.pt", "vae.pt is a pickle, which may run code: give the same weights as .safetensors")):
        with pytest.raises(ValueError, match=message):
            encoders.load_vae(str(name))
