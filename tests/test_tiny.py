"""The small autoencoder: from train_vae.py to a run that has moved away."""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, launch, log_of, weights
from safetensors.torch import load_file, save_file
from test_sample import CONFIG, draw, write_run

import encoders
import sample
from common.images import to_images
from encoders.tiny import TinyAutoencoder, config_for
from model import MicroDiTConfig
from pictures import shapes

VAE = ("--resolution=16", "--limit=60", "--max_steps=30", "--width=48", "--latent_channels=4", "--eval_every=10")


def scenes(count, size):
    """Pictures (B,3,size,size) in [-1, 1]"""
    images = np.stack([np.asarray(shapes.scene(i, size=size)[0]) for i in range(count)])
    return torch.from_numpy(images / 127.5 - 1).float().permute(0, 3, 1, 2)


def write_vae(path, without=()):
    """Write a random autoencoder as train_vae.py does, or as it did before its config had some keys"""
    torch.manual_seed(0)
    vae = TinyAutoencoder({key: value for key, value in config_for(8, 4, 48).items() if key not in without})
    save_file(vae.state_dict(), path, {"run": json.dumps({"config": vae.config})})
    return path


def write_run_with(vae, folder, **changes):
    """Write a checkpoint that carries an autoencoder; changes: of what it says of the autoencoder"""
    described = encoders.describe_vae(encoders.load_vae(str(vae)), vae) | changes
    tensors = {f"vae.{name}": t for name, t in load_file(vae).items()}
    return write_run(folder, described, MicroDiTConfig(**vars(CONFIG) | {"latent_channels": 4}), tensors)


@pytest.mark.parametrize("without, last", [((), "8.bias"), (("outer_norms",), "6.bias")])  # as older files have it
def test_a_checkpoint_that_carries_one_draws_without_it_and_exports_it(tmp_path, without, last):
    vae, exported = write_vae(tmp_path / "vae.safetensors", without), tmp_path / "x.safetensors"
    assert load_file(vae)[f"encoder.layers.{last}"].shape == (4,)
    run = write_run_with(vae, tmp_path / "run")
    before = draw(sample.load(run, "cpu", vae=str(vae)))
    vae.unlink()
    launch("training.export", "--run", run, "--out", exported, "--dtype=float32")
    for path in (run, exported):
        pictures = draw(sample.load(path, "cpu"))
        assert pictures.shape == (1, 64, 64, 3) and (pictures == before).all()


@pytest.mark.parametrize("changes, words", [
    ({"sha256": "0" * 64}, "is not the one that made the latents"),
    ({"config": config_for(8, 4, 48) | {"num_encoder_blocks": [0, 10 ** 9, 1]}}, "more layers than"),
    ({"config": config_for(8, 4, 96)}, "do not fit its config"), ({"config": 5}, "cannot be used")])
def test_a_checkpoint_that_carries_another_one_is_refused(tmp_path, changes, words):
    run = write_run_with(write_vae(tmp_path / "vae.safetensors"), tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=words):
        sample.load(run, "cpu")


def train_vae(out, *args, **kw):
    return launch("train_vae.py", f"--out={out}", *VAE, *args, **kw)


def prepare(vae, out, **kw):
    return launch("prepare_latents.py", f"--vae={vae}", f"--out={out}", "--resolutions=32", "--limit=120", **kw)


def train(data, out, *args, **kw):
    return launch("train.py", f"--data={data}", f"--out={out}", *SMALL, "--latent_size=4", "--max_steps=4", *args, **kw)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an autoencoder (vae/), data prepared with it (data/) and a run on them (run/)"""
    folder = tmp_path_factory.mktemp("made")
    train_vae(folder / "vae")
    prepare(folder / "vae/vae.safetensors", folder / "data")
    train(folder / "data", folder / "run")
    return folder


def test_it_learns_and_its_latents_have_the_variance_that_the_diffusion_expects(made):
    errors = [entry["val_loss"] for entry in log_of(made / "vae") if "val_loss" in entry]
    assert len(errors) == 3 and errors[-1] < 0.9 * errors[0]
    vae = encoders.load_vae(str(made / "vae/vae.safetensors"))
    assert json.loads((made / "data/dataset.json").read_text())["vae"]["sha256"] == vae.sha256
    latents = vae.encode(scenes(64, 16))
    assert latents.shape == (64, 4, 2, 2) and vae.decode(latents).shape == (64, 3, 16, 16)
    assert (latents.std((0, 2, 3)) - 0.9).abs().max() < 0.15 and latents.mean((0, 2, 3)).abs().max() < 0.15


@pytest.mark.parametrize("args, message", [
    (["--resolution=20"], "a multiple of downsample 8"), (["--width=40"], "width is 40: it must be a multiple of 48"),
    (["--source=nowhere"], "no source nowhere"), (["--learning_rate=1e9"], "ry a lower learning_rate")])
def test_clear_errors(tmp_path, args, message):
    assert message in train_vae(tmp_path / "vae", *args, fails=True)
    assert not (tmp_path / "vae/vae.safetensors").exists()


def test_a_state_without_the_layers_of_today_is_refused(made, tmp_path):
    folder = shutil.copytree(made / "vae", tmp_path / "vae")
    described = json.loads((folder / "vae.json").read_text())
    (folder / "vae.json").write_text(json.dumps({k: v for k, v in described.items() if k != "outer_norms"}))
    assert "outer_norms: None there, True now" in train_vae(folder, "--max_steps=99", fails=True)


def test_a_folder_of_pictures(tmp_path):
    args = f"--source={tmp_path}", "--max_steps=2"
    (tmp_path / "7.png").write_bytes(b"not a picture")
    assert "0 pictures, 1 cannot be used, the first is 7.png" in train_vae("v", *args, fails=True)
    for i, image in enumerate(to_images(scenes(6, 20))):
        image.save(tmp_path / f"{i}.png")
    printed = train_vae(tmp_path / "vae", *args)
    assert "6 pictures, 1 cannot be used" in printed and "5 pictures, 1 to validate on, 2 steps" in printed


def test_a_run_has_its_autoencoder_with_it(made, tmp_path):
    """After that has been moved or trained anew, it goes on with what its checkpoint carries."""
    run, vae = tmp_path / "run", made / "vae/vae.safetensors"
    train(made / "data", run, "--schedule=constant")
    for steps, other in ((5, None), (6, write_vae(tmp_path / "other.safetensors"))):
        kept = vae.rename(tmp_path / "kept.safetensors")
        try:
            if other:
                shutil.copy(other, vae)
            printed = train(made / "data", run, f"--max_steps={steps}", "--schedule=constant", "--sample_every=1")
        finally:
            kept.rename(vae)
        assert f"going on from step {steps - 1}" in printed and "warning" not in printed
        carried = {n: t for n, t in weights(run).items() if n.startswith("vae.")}
        assert carried and all(torch.equal(t, load_file(vae)[n[4:]]) for n, t in carried.items())


def test_another_autoencoder_under_the_same_name_is_refused(made, tmp_path):
    vae = write_vae(tmp_path / "vae.safetensors")
    prepare(vae, tmp_path / "data")
    assert "use the same" in train(tmp_path / "data", tmp_path / "run", f"--init_from={made / 'run'}", fails=True)
    for replace, message in ((lambda: shutil.copy(made / "vae/vae.safetensors", vae), "is not the one that made"),
                             (vae.unlink, "neither here")):
        replace()
        assert message in train(tmp_path / "data", tmp_path / "run", fails=True)
