"""The small autoencoder: TAESD's against diffusers', and ours from train_vae.py to a run that has moved away."""
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch, log_of
from PIL import Image
from safetensors.torch import save_file
from test_vae import WEIGHTS, some_images

import encoders
from common.images import to_images
from encoders import tiny
from pictures import shapes

TAESD = {"latent_channels": 4}  # everything else is the default, as in madebyollin/taesd and taesdxl
CONFIGS = [TAESD, {"latent_channels": 16, "encoder_block_out_channels": [32] * 3, "num_encoder_blocks": [0, 2, 1],
                   "decoder_block_out_channels": [16] * 3, "num_decoder_blocks": [1, 0, 2], "scaling_factor": 0.5}]
VAE = ("--resolution=16", "--limit=60", "--max_steps=30", "--width=48", "--latent_channels=4", "--eval_every=10")


@pytest.mark.parametrize("config", CONFIGS)
def test_equal_to_diffusers(tmp_path, config):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    theirs = AutoencoderTiny(**config).eval()
    theirs.save_pretrained(tmp_path)
    images = some_images(3, 3, 32, 48)
    with torch.no_grad():
        z = theirs.encode(images).latents
        made = theirs.decode(z).sample
    shutil.copy(tmp_path / WEIGHTS, tmp_path / "taesd.safetensors")
    for name, scale in ((tmp_path, config.get("scaling_factor", 1.0)), (tmp_path / "taesd.safetensors", 1.0)):
        ours = encoders.load_vae(str(name))
        assert (ours.latent_channels, ours.scaling_factor) == (config["latent_channels"], scale)
        assert images.shape[2] // ours.downsample == z.shape[2]
        torch.testing.assert_close(ours.posterior(images)[0], z, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.encode(images), z * scale, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.decode(z * scale), made, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes, message", [
    ({"act_fn": "gelu"}, "act_fn gelu"), ({"latent_channels": 8}, "do not fit")])
def test_another_kind_of_it_is_refused(tmp_path, changes, message):
    from diffusers import AutoencoderTiny
    AutoencoderTiny(**TAESD).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        encoders.load_vae(str(tmp_path))


def test_half_of_one_is_refused(tmp_path):
    half = {n: t for n, t in tiny.TinyAutoencoder(TAESD).state_dict().items() if n.startswith("decoder")}
    save_file(half, tmp_path / "decoder.safetensors")
    with pytest.raises(ValueError, match="nor a whole tiny one"):
        encoders.load_vae(str(tmp_path / "decoder.safetensors"))


def train_vae(out, *args, **kw):
    return launch("train_vae.py", f"--out={out}", *VAE, *args, **kw)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an autoencoder (vae/), data prepared with it (data/) and a run on them (run/)"""
    folder = tmp_path_factory.mktemp("made")
    train_vae(folder / "vae")
    prepare(folder / "vae/vae.safetensors", folder / "data")
    train(folder / "data", folder / "run")
    return folder


def prepare(vae, out, **kw):
    return launch("prepare_latents.py", f"--vae={vae}", f"--out={out}", "--resolutions=32", "--limit=120", **kw)


def train(data, out, *args, **kw):
    return launch("train.py", f"--data={data}", f"--out={out}", *SMALL, "--latent_size=4", "--max_steps=4", *args, **kw)


def test_it_learns_and_describes_itself(made):
    errors = [entry["val_loss"] for entry in log_of(made / "vae") if "val_loss" in entry]
    assert len(errors) == 3 and errors[-1] < 0.9 * errors[0]
    vae = encoders.load_vae(str(made / "vae/vae.safetensors"))
    assert (vae.latent_channels, vae.downsample, vae.scaling_factor) == (4, 8, 0.9)
    info = json.loads((made / "data/dataset.json").read_text())
    assert info["vae"]["sha256"] == vae.sha256 and info["vae"]["downsample"] == 8
    assert sorted(p.name for p in (made / "vae").iterdir()) == [
        ".lock", "log.jsonl", "reconstructions.png", "vae.safetensors"]


@pytest.mark.parametrize("downsample, side", [(4, 24), (8, 48)])
def test_latents_have_the_variance_that_the_diffusion_expects(tmp_path, downsample, side):
    train_vae(tmp_path, f"--downsample={downsample}", f"--resolution={side}", "--width=96", "--max_steps=20")
    vae = encoders.load_vae(str(tmp_path / "vae.safetensors"))
    latents = vae.encode(torch.stack([tiny_scene(i, side) for i in range(64)]))
    assert latents.shape == (64, 4, side // downsample, side // downsample)
    assert (latents.std((0, 2, 3)) - 0.9).abs().max() < 0.15 and latents.mean((0, 2, 3)).abs().max() < 0.15


def tiny_scene(seed, size):
    return torch.from_numpy(np.asarray(shapes.scene(seed, size=size)[0]) / 127.5 - 1).float().permute(2, 0, 1)


def test_a_killed_training_ends_the_same(tmp_path):
    args = ("--max_steps=60", "--eval_every=10")
    train_vae(tmp_path / "whole", *args)
    command = [sys.executable, ROOT / "train_vae.py", f"--out={tmp_path / 'cut'}", *VAE, *args]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut/state.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (tmp_path / "cut/state.safetensors").exists()
    assert "seed: 2024 there, 1 now" in train_vae(tmp_path / "cut", *args, "--seed=1", fails=True)
    assert "going on from step" in train_vae(tmp_path / "cut", *args)
    assert (tmp_path / "cut/vae.safetensors").read_bytes() == (tmp_path / "whole/vae.safetensors").read_bytes()
    assert "is there already" in train_vae(tmp_path / "cut", *args)
    train_vae(tmp_path / "cut", "--overwrite", "--source=nowhere", fails=True)  # and deletes nothing
    assert (tmp_path / "cut/vae.safetensors").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.png").write_bytes(b"not a picture")
    train_vae(tmp_path / "cut", "--overwrite", f"--source={tmp_path / 'empty'}", fails=True)
    assert (tmp_path / "cut/vae.safetensors").exists()
    assert not (tmp_path / "cut/state.safetensors").exists()


@pytest.mark.parametrize("args, message", [
    (["--downsample=16"], "downsample is 16"), (["--resolution=20"], "divide the resolution 20"),
    (["--width=40"], "width is 40: it must be a multiple of 48"), (["--latent_noise=nan"], "latent_noise is nan"),
    (["--source=nowhere"], "no source nowhere"), (["--learning_rate=1e9"], "try a lower --learning_rate"),
    (["--source={tmp}/photos"], "0 pictures are too few, 1 cannot be used, the first is a.jpg")])
def test_clear_errors(tmp_path, args, message):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"not a picture")
    assert message in train_vae(tmp_path / "vae", *(a.format(tmp=tmp_path) for a in args), fails=True)
    assert not (tmp_path / "vae/vae.safetensors").exists()


def test_a_folder_of_pictures(tmp_path):
    for i in range(6):
        to_images(tiny_scene(i, 20)[None])[0].save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"not a picture")
    printed = train_vae(tmp_path / "vae", f"--source={tmp_path}", "--max_steps=2")
    assert "6 pictures, 1 cannot be used, the first is 7.png" in printed and "5 pictures, 2 steps" in printed


def test_a_run_draws_without_its_data_and_autoencoder(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "else/where")
    prompt = ("--prompt=a red circle", "--steps=2")
    launch("sample.py", f"--checkpoint={made / 'run'}", *prompt, f"--out={tmp_path / 'before'}")
    for name in ("data", "vae"):
        (made / name).rename(made / f"{name}_gone")
    try:
        launch("sample.py", f"--checkpoint={tmp_path / 'else/where'}", *prompt, f"--out={tmp_path / 'after'}")
    finally:
        for name in ("data", "vae"):
            (made / f"{name}_gone").rename(made / name)
    a, b = (next((tmp_path / name).glob("00000_*.png")) for name in ("before", "after"))
    assert Image.open(a).tobytes() == Image.open(b).tobytes() and Image.open(a).size == (32, 32)


def test_another_autoencoder_under_the_same_name_is_refused(made, tmp_path):
    vae = tmp_path / "vae/vae.safetensors"
    shutil.copytree(made / "vae", vae.parent)
    prepare(vae, tmp_path / "data")
    train(tmp_path / "data", tmp_path / "run")
    train_vae(vae.parent, "--seed=5", "--overwrite")
    message = "is not the one that the latents are of"
    assert message in train(tmp_path / "data", tmp_path / "run2", fails=True)
    assert not (tmp_path / "run2").exists()
    prepare(vae, tmp_path / "data2")
    assert "use the same" in train(tmp_path / "data2", tmp_path / "run3", f"--init_from={tmp_path / 'run'}", fails=True)
    assert "use the same" in train(tmp_path / "data2", tmp_path / "run3", f"--val_data={tmp_path / 'data'}", fails=True)
    assert "use the same" in prepare(vae, tmp_path / "data", fails=True)


def test_the_same_autoencoder_under_another_name_is_not(made, tmp_path):
    shutil.copytree(made / "vae", tmp_path / "vae")
    prepare(tmp_path / "vae/vae.safetensors", tmp_path / "data")
    train(tmp_path / "data", tmp_path / "run", f"--init_from={made / 'run'}", f"--val_data={made / 'data'}")


def test_damaged_and_missing_files_are_clear_errors(made, tmp_path):
    vae = tmp_path / "vae.safetensors"
    shutil.copy(made / "vae/vae.safetensors", vae)
    prepare(vae, tmp_path / "data")
    vae.write_bytes(vae.read_bytes()[:-100])
    assert "not a whole safetensors file" in prepare(vae, tmp_path / "data2", fails=True)
    assert "not a whole safetensors file" in train(tmp_path / "data", tmp_path / "run", fails=True)
    vae.unlink()
    assert "restore it, or prepare them again" in train(tmp_path / "data", tmp_path / "run", fails=True)


def test_a_tiny_one_draws_for_a_network_of_another_with_the_same_latents(made, tmp_path):
    from diffusers import AutoencoderTiny
    AutoencoderTiny().save_pretrained(tmp_path / "taesdxl")
    launch("sample.py", f"--checkpoint={made / 'run'}", f"--vae={tmp_path / 'taesdxl'}", "--prompt=a", "--steps=2",
           f"--out={tmp_path / 'drawn'}")
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
