"""sample.py and training.export on a checkpoint of a small random network."""
import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import encoders
import sample
from common import machine
from evaluation.geneval import read_layout
from model import MicroDiT, MicroDiTConfig
from pictures.shapes import scene
from sampling import pipeline
from training import checkpoint

CONFIG = MicroDiTConfig(latent_size=8, latent_channels=12, caption_dim=128, dim=32, depth=2, head_dim=8, mlp_multiple=8,
                        mixer_depth=1, mixer_dim=16, num_experts=2)
WORDS = sorted({word for i in range(200) for word in encoders.words_of(scene(i)[1])})
PROMPTS = ["a small red circle on a white background", "a large blue ring on a black background",
           "a small cyan cross on a gray background"]


def write_run(folder, vae="pixels", config=CONFIG, more=()):
    """Write a run's checkpoint with weights that are not those of its average, and return its path"""
    tensors = dict(more)
    for seed, prefix in enumerate(("model.", "ema.")):
        torch.manual_seed(seed)
        net = MicroDiT(config)
        tensors |= {prefix + n: p.detach() + 0.05 * torch.randn(p.shape) for n, p in net.named_parameters()}
    vae = vae if isinstance(vae, dict) else encoders.describe_vae(encoders.load_vae(vae), vae)
    run = {"config": asdict(config), "step": 6, "settings": {"max_steps": 6, "sample_guidance": 2.0},
           "data": {"vae": vae, "text_encoder": {"name": "words", "length": 20, "dim": 128}, "words": WORDS}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "step_00000006.safetensors", {"run": json.dumps(run)})
    return folder / "step_00000006.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run1").parent


@pytest.fixture(scope="module")
def loaded(run):
    return sample.load(run, "cpu")


def test_captions_are_as_long_as_in_training(loaded):
    assert loaded.text_encoder(PROMPTS).shape == (3, 20, 128)


def draw(loaded, prompts=PROMPTS[:1], steps=2, **options):
    """The numbers of pictures"""
    return np.stack([np.asarray(image, int) for image in sample.generate(loaded, prompts, steps, **options)])


def test_pictures_grid_and_text_chunks(script, run, tmp_path):
    out = tmp_path / "out"
    args = ("--checkpoint", run, "--steps=3", "--out", out)
    printed = script("sample.py", "--prompt", *PROMPTS[:2], "--seed=5", "--negative_prompt=a ring",
                     "--sampler=dpmpp_2m", *args)
    assert "picture steps" in printed and "warning" not in printed
    pictures = sorted(out.glob("*.png"))
    assert [p.name for p in pictures] == ["00000_a-small-red-circle-on-a-white-background_seed5.png",
                                          "00001_a-large-blue-ring-on-a-black-background_seed6.png", "00002_grid.png"]
    image = Image.open(pictures[1])
    assert image.size == (16, 16) and image.text["prompt"] == PROMPTS[1] and image.text["seed"] == "6"
    used = {"sampler": "dpmpp_2m", "negative_prompt": "a ring", "steps": 3, "guidance_scale": 2.0}
    assert json.loads(image.text["settings"]).items() >= (used | {"checkpoint": "run1/step_00000006"}).items()
    before = [p.read_bytes() for p in pictures]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    script("sample.py", "--prompts_file", tmp_path / "prompts.txt", "--images_per_prompt=22", *args, "--steps=1")
    assert [p.read_bytes() for p in pictures] == before  # nothing is replaced
    with Image.open(out / "00069_grid.png") as first, Image.open(out / "00070_grid.png") as second:
        assert first.width == 8 * (128 + 4) + 4 and second.height < first.height / 4  # 64 pictures and 2


def test_pictures_depend_on_seed_and_guidance_and_not_on_their_batch(loaded):
    together = draw(loaded, PROMPTS, seed=7, batch_size=3)
    for i, prompt in enumerate(PROMPTS):
        assert abs(draw(loaded, prompt, seed=7 + i) - together[i]).max() <= 1
    for other in ({"seed": 8}, {"seed": 7, "guidance_scale": 5.0}):
        assert (draw(loaded, **other) != together[0]).any()
    assert (draw(loaded) == draw(loaded, guidance_scale=2.0)).all()  # the run's own


def test_the_averaged_weights_of_the_newest_run_are_the_default(run, tmp_path, monkeypatch):
    for when, name in enumerate(("old", "new")):
        shutil.copytree(run, tmp_path / "runs" / name)
        os.utime(next((tmp_path / "runs" / name).iterdir()), (when, when))
    shutil.copy(next(run.iterdir()), tmp_path / "runs/new/step_00000009 copy.safetensors")  # which is no checkpoint
    monkeypatch.chdir(tmp_path)
    loaded, tensors = sample.load(""), load_file("runs/new/step_00000006.safetensors")
    assert loaded.name == "new/step_00000006"
    assert all(torch.equal(p.cpu(), tensors[f"ema.{name}"]) for name, p in loaded.net.named_parameters())


def test_a_text_is_one_prompt_and_unknown_words_are_named_once(run, capsys):
    loaded = sample.load(run, "cpu")
    for texts in ("a small hat", ["a small hat"]):
        assert len(draw(loaded, texts, negative_prompts="a moon")) == 1
    warning = capsys.readouterr().err
    assert warning.count("was never shown the words hat, moon") == warning.count("warning") == 1 and "circle" in warning
    draw(loaded, " ".join(f"w{i:02d}" for i in range(30)))
    assert "w08, w09 and 20 more. It was shown" in capsys.readouterr().err


@pytest.mark.parametrize("args, words", [
    ([], "no prompt"), (["--prompt", "a", " "], "a prompt is empty"),
    (["--prompts_file={tmp}/pipe.txt"], "no such file"),
    (["--prompt", "a b", "b", "c", "--negative_prompt", "d f", "e"], "3 prompts, 2 negative prompts"),
    (["--prompt", "a", "red", "circle"], 'did you mean --prompt "a red circle"?'), (["--seed=9" + 30 * "0"], "< 9e18"),
    (["--prompt=a", "--negative_prompt", "a", "ring"], 'did you mean --negative_prompt "a ring"?'),
    (["--prompts_file=prompts.parquet"], "is no file of prompts: give a .txt"),
    (["--prompt=a", "--checkpoint=nothing"], "no checkpoint nothing"),
    (["--prompt=a", "--vae=other"], "other is neither here nor"),
    (["--prompt=a", f"--checkpoint={ROOT / 'README.md'}"], "README.md")])
def test_mistakes(script, run, tmp_path, args, words):
    os.mkfifo(tmp_path / "pipe.txt")
    args = ["--checkpoint", run, *(a.format(tmp=tmp_path) for a in args), "--out", tmp_path / "out"]
    assert words in script("sample.py", *args, fails=True)
    assert not list(tmp_path.glob("out/*"))


def test_offloaded_captions_of_the_stand_in_reach_the_device(run, monkeypatch):
    loaded, seen = sample.load(run, "cpu", offload="yes"), []
    loaded.device, config = torch.device("meta"), loaded.net.config
    loaded.net = torch.nn.Module()  # as the weights of another could not come back from this device
    loaded.net.config = config

    def draw_latents(net, noise, caption, *args, negative_caption, **options):
        seen.extend(t.device.type for t in (noise, caption, negative_caption))
        return torch.zeros(1, 12, 8, 8)
    monkeypatch.setattr(pipeline, "draw_latents", draw_latents)
    monkeypatch.setattr(pipeline, "autocast", lambda *args: torch.autocast("cpu"))
    draw(loaded, negative_prompts="a circle")
    assert seen == ["meta"] * 3


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(str(device)))
    for rank, name, picked in (("3", "auto", "cuda:3"), ("3", "cuda:1", "cuda:1"), ("0", None, "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert str(machine.pick_device(name)) == current[-1] == picked


def test_genevals_layout_by_two_processes_and_again(script, run, tmp_path):
    metadata = [{"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
                {"tag": "single_object", "include": [{"class": "car", "count": 1}], "prompt": "a photo of a car"}]
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "geneval"
    prompts.write_text("".join(json.dumps(m) + "\n" for m in metadata))
    args = ("--prompts_file", prompts, "--checkpoint", run, "--steps=2", "--batch_size=3", "--out", out)
    assert "eval_geneval.py --images" in script("sample.py", *args, processes=2)
    assert [m for m, paths in read_layout(out) if len(paths) == 4] == metadata
    with Image.open(out / "00001/samples/0002.png") as image:
        assert image.text["prompt"] == "a photo of a car" and image.text["seed"] == str(2024 + 4 + 2)
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert len(before) == len(set(before.values())) == 8
    (out / "00001/samples/0001.png").unlink()
    script("sample.py", *args)
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == before
    assert "steps: 2 there, 3 now" in script("sample.py", *args, "--steps=3", fails=True)


def test_exported_weights_are_read_back(script, run, loaded, tmp_path):
    file, card = tmp_path / "x.safetensors", tmp_path / "x.md"
    args = ("training.export", "--run", run, "--out", file)
    script(*args, "--dtype=float32")
    again = sample.load(file, "cpu")
    assert again.net.config == loaded.net.config and again.words == loaded.words
    assert (draw(again) == draw(loaded)).all()
    assert "for 6 steps" in card.read_text() and "autoencoder: pixels" in card.read_text()
    for there in (file, card):  # neither is replaced
        assert f"{there} is there already" in script(*args, fails=True)
        there.unlink()
    script(*args)  # in bfloat16
    half, _ = checkpoint.load_network(file)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half.parameters(), loaded.net.parameters()))
    assert "must be FILE.safetensors" in script(*args[:-1], "x.pt", fails=True)
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["run"])
    for changes, words in (({"depth": 10 ** 9}, "depth is"), ({"latent_size": 4096}, "pos_embed is"),
                           ({}, "is not finite")):
        if not changes:
            tensors["pos_embed"][0, 0, 0] = torch.nan
        save_file(tensors, file, {"run": json.dumps(said | {"config": said["config"] | changes})})
        with pytest.raises(ValueError, match=f"x.safetensors.*{words}"):
            sample.load(file, "cpu")
