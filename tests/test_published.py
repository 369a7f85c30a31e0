"""Published models, small and random but in their real formats: released checkpoints, and the way through them."""
import json
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from test_text import write_clip
from test_vae import SMALL, published

import encoders
import model
import sample
from encoders import hub, released
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
    torch.save(released.to_official(net), folder / "dit.pt")
    return folder


@pytest.fixture(scope="module")
def load(models):
    """load(**options) -> the pipeline of the small published models"""
    return partial(sample.load, models / "dit.pt", vae=str(models / "vae"), text_encoder=str(models / "clip"),
                   device="cpu")


def test_the_weights_come_through(models, tmp_path, capsys):
    state = torch.load(models / "dit.pt", weights_only=True)
    inner = {f"dit.{n}": t for n, t in state.items()} | {"vae.encoder.conv_in.bias": torch.zeros(2)}
    composer = {"state": {"model": inner, "rank_zero_seed": 17}, "rng": [1, 2]}
    half = {n: t.bfloat16() for n, t in state.items()}
    raw = {n: t + 1 for n, t in state.items()}
    wrapped = [{f"{prefix}{n}": t for n, t in state.items()} for prefix in (
        "module.", "_orig_mod.module.", "module._orig_mod.dit.", "dit.module.", "_orig_mod.dit._orig_mod.")]
    blocks = {n.replace("blocks.1.", "blocks.1._orig_mod."): t for n, t in state.items()}  # each compiled by itself
    averaged = [{"model": raw, "ema": state}, {"state": {"model": raw, "ema": inner}}, {"ema": {"state_dict": state}},
                {"model": raw, "EMA": {"module": state}}]
    averaged_are_none = [{"model": state, "ema": {}}, {"model": state, "ema": {"decay": 0.9, "shadow_params": [1]}}]
    for content, old, atol in ((state, False, 0), (state, True, 0), ({"state_dict": state}, False, 0),
                               (composer, False, 0), (half, False, 0.01), (blocks, False, 0),
                               *((content, False, 0) for content in wrapped + averaged + averaged_are_none)):
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
        net, run = checkpoint.load_network(tmp_path / "x.pt")
        assert net.config == model.MicroDiTConfig(**NETWORK)
        for name, tensor in released.to_official(net).items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=atol)
        assert run["data"]["vae"]["name"] == "stabilityai/stable-diffusion-xl-base-1.0/vae"
        said = capsys.readouterr().err
        assert "head_dim 64, expert_capacity 2, text encoder apple/DFN5B" in said
        assert ("weights are used, which are under 'ema" in said.lower()) == any(content is a for a in averaged)


def test_files_that_are_not_released_checkpoints(models, tmp_path):
    state, file = torch.load(models / "dit.pt", weights_only=True), tmp_path / "x.pt"
    endless = torch.zeros(1, 1, 1).expand(1, 10 ** 12, 128)  # a number that is repeated without end
    for content, words in (
            (state | {"pos_embed": endless}, "more numbers than the file"), (None, "x.pt cannot be used"),
            ({"state": {"model": {}, "algorithm": tmp_path}}, "x.pt.*it holds code.*docs/settings.md"),
            ({"other.weight": torch.zeros(2)}, "x_embedder.proj.weight' is missing"),
            ({n: t for n, t in state.items() if n != "final_layer.linear.bias"}, "final.linear.bias is missing in"),
            (state | {"x_embedder.proj.bias": torch.zeros(3)}, r"patch_embed.bias is \(3,\)")):
        torch.save(content, file)
        if content is None:
            file.write_bytes((models / "dit.pt").read_bytes()[:100_000])
        with pytest.raises(ValueError, match=words):
            checkpoint.load_network(checkpoint.find(file))


def test_a_hub_that_does_not_answer_is_asked_once(models, monkeypatch):
    asked = MagicMock(side_effect=ConnectionError)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: MagicMock(head=asked))
    hub.reach_hub.cache_clear()
    advice = "by hand: give --checkpoint FILE, --vae FOLDER, --text_encoder FOLDER"
    with pytest.raises(ValueError, match=f"does not answer.*{advice}"):
        checkpoint.find("VSehwag24/MicroDiT/ckpts/none.pt")
    for options in ({}, {"vae": str(models / "vae")}):  # the weights are on this disk, and an encoder is not
        with pytest.raises(ValueError, match=advice):
            sample.load(models / "dit.pt", "cpu", **options)
    assert asked.call_count == 1


def test_prepare_train_from_a_released_network_and_sample(script, models, load, tmp_path):
    photos, data = tmp_path / "photos", tmp_path / "data"
    photos.mkdir()
    for i in range(12):
        Image.effect_noise((36 + i, 40), 90).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"A photo of {i} cats!")
    script("prepare_latents.py", "--source", photos, "--out", data, "--vae", models / "vae", "--text_encoder",
           models / "clip", "--resolutions=32", "--workers=0")
    assert np.load(data / "00000.latents32.npy").shape == (12, 4, 8, 8)
    assert np.load(data / "00000.captions.npy").shape == (12, 77, 32)
    described = json.loads((data / "dataset.json").read_text())["text_encoder"]
    assert described["sha256"] == encoders.load_text_encoder(str(models / "clip")).about["sha256"]
    sizes = [f"--{k}={v}" for k, v in NETWORK.items() if k not in ("latent_channels", "caption_dim")]
    script("train.py", "--data", data, "--init_from", models / "dit.pt", "--out", tmp_path / "run", "--max_steps=2",
           "--batch_size=4", "--micro_batch_size=4", "--unmasked_steps=1", "--sample_every=0", "--mask_ratio=0.5",
           "--learning_rate=1e-9", *sizes)
    trained, start = sample.load(tmp_path / "run", "cpu"), load()
    for (name, a), b in zip(trained.net.named_parameters(), start.net.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
    assert trained.vae.shift == 0.1 and start.vae.shift == 0  # which the paper's networks were trained without
    write_clip(tmp_path / "clip", num_hidden_layers=1)  # another one under the same name
    path = checkpoint.find(tmp_path / "run")
    described, tensors = checkpoint.read_checkpoint(path, ("",))
    described["data"]["text_encoder"]["name"] = str(tmp_path / "clip")
    checkpoint.save(path, tensors, described)
    with pytest.raises(ValueError, match="is not the one that .* was trained with: restore it"):
        sample.load(tmp_path / "run", "cpu")
    assert start.guidance_scale == 5 and sample.generate(trained, "a cat", 2)[0].size == (32, 32)


def test_a_picture_is_what_its_parts_give_offloaded_and_in_bfloat16_too(load, monkeypatch):
    moves, move = [], torch.nn.Module.to

    def spy(module, *args, **kwargs):
        moves.append((type(module).__name__, str(args[0])))
        return move(module, *args, **kwargs)

    def draw(loaded):
        return np.stack(sample.generate(loaded, ["a cat", "a dog", "a fox"], 3, 2.0, 5, batch_size=2)) + 0.0

    loaded, offloaded, half = load(), load(offload="yes"), load(dtype="bfloat16")
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5)).unsqueeze(0)
    latents = model.sample(loaded.net, noise, loaded.text_encoder(["a cat"]), 3, 2.0)
    pixels = loaded.vae.decoder(loaded.vae.post_quant_conv(latents / 0.5))  # no shift
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    plain = draw(loaded)
    assert abs(plain[0] - expected).max() <= 1
    offloaded.device = torch.device("cpu", 0)  # a name that differs from the "cpu" of a part at rest
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", spy)
        assert (draw(offloaded) == plain).all()
    assert moves == 2 * [(part, device) for part in ("CLIPTextModel", "MicroDiT", "KLAutoencoder")
                         for device in ("cpu:0", "cpu")]
    assert half.net.final.linear.weight.dtype == torch.float32
    assert half.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    assert abs(draw(half) - plain).mean() < 4
