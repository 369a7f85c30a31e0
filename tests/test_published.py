"""Published models, small and random but in their real formats: released checkpoints, and the way through them."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_text import write_clip
from test_vae import SMALL, published

import model
import sample
from training import checkpoint

# XL/2 but for its size: what a state dict does not tell has the default value
NETWORK = dict(latent_size=8, latent_channels=4, dim=128, depth=4, mixer_depth=2, mixer_dim=64, caption_dim=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    published(folder / "vae", SMALL | {"shift_factor": 0.1})
    write_clip(folder / "clip")
    torch.manual_seed(0)
    net = model.MicroDiT(model.MicroDiTConfig(**NETWORK))
    for p in net.parameters():
        p.data.add_(0.02 * torch.randn(p.shape))
    torch.save(net.to_official(), folder / "dit.pt")
    return folder


@pytest.mark.parametrize("kind", ["bare", "wrapped", "composer", "bfloat16", "old file"])
def test_the_weights_come_through(models, tmp_path, kind):
    state = torch.load(models / "dit.pt", weights_only=True)
    if kind == "bfloat16":
        state = {n: t.bfloat16() for n, t in state.items()}
    elif kind == "wrapped":
        state = {"state_dict": state}
    elif kind == "composer":
        inner = {f"dit.{n}": t for n, t in state.items()} | {"vae.encoder.conv_in.bias": torch.zeros(2)}
        state = {"state": {"model": inner, "rank_zero_seed": 17}, "rng": [1, 2]}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=kind != "old file")
    net, run = checkpoint.load_network(tmp_path / "x.pt")
    again = net.to_official()
    assert net.config == model.MicroDiTConfig(**NETWORK)
    for name, tensor in torch.load(models / "dit.pt", weights_only=True).items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0.01 if kind == "bfloat16" else 0)
    assert run["data"]["vae"]["name"] == "stabilityai/stable-diffusion-xl-base-1.0/vae"


class Foreign:
    """Of another project"""


def test_files_that_are_not_released_checkpoints(models, tmp_path):
    whole = (models / "dit.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state": {"model": {}, "algorithm": Foreign()}}, tmp_path / "unsafe.pt")
    torch.save({"other.weight": torch.zeros(2)}, tmp_path / "other.pt")
    state = torch.load(models / "dit.pt", weights_only=True)
    torch.save({n: t for n, t in state.items() if n != "final_layer.linear.bias"}, tmp_path / "less.pt")
    for name, words in (("cut", "not a whole checkpoint"), ("unsafe", r"Foreign.*take the weights out"),
                        ("other", "no x_embedder"), ("less", "missing final_layer.linear.bias")):
        with pytest.raises(ValueError, match=words):
            checkpoint.load_network(checkpoint.find(tmp_path / f"{name}.pt"))
    with pytest.raises(ValueError, match="could it be fetched from the hub"):
        checkpoint.find("VSehwag24/MicroDiT/ckpts/none.pt")


def test_prepare_train_from_a_released_network_and_sample(script, models, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i}.png")
        (tmp_path / f"photos/{i}.txt").write_text(f"A photo of {i} cats!")
    ends = ("--vae", models / "vae", "--text_encoder", models / "clip")
    data = tmp_path / "data"
    script("prepare_latents.py", "--source", tmp_path / "photos", "--out", data, *ends, "--resolutions=32")
    info = json.loads((data / "dataset.json").read_text())
    assert info["vae"]["scaling_factor"] == 0.5 and info["text_encoder"]["dim"] == 32
    assert np.load(data / "00000.latents32.npy").shape == (12, 4, 8, 8)
    assert np.load(data / "00000.captions.npy").shape == (12, 77, 32)

    sizes = [f"--{k}={v}" for k, v in NETWORK.items() if k not in ("latent_channels", "caption_dim")]
    script("train.py", "--data", data, "--init_from", models / "dit.pt", "--out", tmp_path / "run", "--max_steps=2",
           "--batch_size=4", "--micro_batch_size=4", "--unmasked_steps=1", "--sample_every=0", "--mask_ratio=0.5",
           "--learning_rate=1e-9", *sizes)
    trained, _ = checkpoint.load_network(checkpoint.find(tmp_path / "run"))
    start, _ = checkpoint.load_network(models / "dit.pt")
    for (name, a), b in zip(trained.named_parameters(), start.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)

    draw = ("sample.py", "--prompt", "a cat", "a dog", "--steps=2", "--out")
    script(*draw, tmp_path / "own", "--checkpoint", tmp_path / "run")
    printed = script(*draw, tmp_path / "theirs", "--checkpoint", models / "dit.pt", *ends)
    assert "without the shift of 0.1" in printed
    own, theirs = (sorted((tmp_path / n).glob("*seed*.png")) for n in ("own", "theirs"))
    assert len(own) == len(theirs) == 2 and Image.open(theirs[0]).size == (32, 32)
    assert json.loads(Image.open(theirs[0]).text["settings"])["guidance_scale"] == 5.0


@pytest.fixture(scope="module")
def load(models):
    """load(**options) -> the pipeline of the small published models"""
    return partial(sample.load, models / "dit.pt", vae=str(models / "vae"), text_encoder=str(models / "clip"),
                   device="cpu")


def test_a_picture_of_a_released_network_is_what_its_parts_give(load):
    loaded = load()
    (image,) = sample.generate(loaded, ["a cat"], steps=3, guidance_scale=2.0, seed=5)
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)).unsqueeze(0)
    latents = model.sample(loaded.net, noise, loaded.text_encoder(["a cat"]), 3, 2.0)
    pixels = loaded.vae.decoder(loaded.vae.post_quant_conv(latents / 0.5))  # no shift
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    assert abs(np.asarray(image, float) - expected).max() <= 1


def test_bfloat16_offload_and_compile_draw_the_same_picture(load, monkeypatch):
    moves, move = [], torch.nn.Module.to

    def spy(module, *args, **kwargs):
        moves.append((type(module).__name__, str(args[0])))
        return move(module, *args, **kwargs)

    def draw(loaded, count=3):
        prompts = ["a cat", "a dog", "a fox"][:count]
        return np.stack(sample.generate(loaded, prompts, steps=2, batch_size=2, guidance_scale=2.0))

    plain, offloaded = draw(load()).astype(float), load(offload="yes")
    offloaded.device = torch.device("cpu", 0)  # a name that differs from the "cpu" of a part at rest
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", spy)
        assert (draw(offloaded) == plain).all()
    assert moves == [(part, device) for part in ("CLIPTextModel", "MicroDiT", "KLAutoencoder")
                     for device in ("cpu:0", "cpu")]
    half = load(dtype="bfloat16")
    assert half.net.final.linear.weight.dtype == torch.float32
    assert half.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    assert abs(draw(half) - plain).mean() < 4
    compiled = load()
    compiled.net.compile(backend="eager")  # what --compile does, without a compiler
    assert abs(draw(compiled, 2) - plain[:2]).max() <= 1
    with pytest.raises(ValueError, match="dtype is 'float8'"):
        load(dtype="float8")
