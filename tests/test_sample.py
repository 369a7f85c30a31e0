"""sample.py on a small trained checkpoint."""

import json
import os
import shutil
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import SMALL, launch, weights
from PIL import Image

import sample
from common import machine
from sampling import pipeline
from training import checkpoint


@pytest.fixture(scope="module")
def runs(shapes16, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        launch("train.py", *SMALL, f"--data={shapes16}", f"--out={folder / f'run{seed}'}", "--max_steps=6",
               f"--seed={seed}", "--ema_decay=0.99", "--learning_rate=1e-2", "--sample_guidance=2", "--eval_every=0")
    return folder


@pytest.fixture(scope="module")
def loaded(runs):
    return sample.load(runs / "run1", "cpu")


PROMPTS = ["a small red circle on a white background", "a large blue ring on a black background",
           "a small cyan cross on a gray background"]


def test_pictures_grid_and_text_chunks(script, runs, tmp_path):
    out = tmp_path / "out"
    args = ("--checkpoint", runs / "run1", "--steps=3", "--out", out)
    printed = script("sample.py", "--prompt", *PROMPTS[:2], "--seed=5", "--negative_prompt=a ring",
                     "--sampler=dpmpp_2m", *args)
    assert "picture steps" in printed and "warning" not in printed
    pictures = sorted(out.glob("*.png"))
    assert [p.name for p in pictures] == ["00000_a-small-red-circle-on-a-white-background_seed5.png",
                                          "00001_a-large-blue-ring-on-a-black-background_seed6.png", "00002_grid.png"]
    image = Image.open(pictures[1])
    assert image.size == (16, 16) and image.text["prompt"] == PROMPTS[1] and image.text["seed"] == "6"
    used = json.loads(image.text["settings"])
    told = {"sampler": "dpmpp_2m", "negative_prompt": "a ring", "steps": 3}
    assert used.items() >= (told | {"guidance_scale": 2.0}).items()  # the run's own samples have that guidance
    assert "run1/step_" in used["checkpoint"]
    before = [p.read_bytes() for p in pictures]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    script("sample.py", "--prompts_file", tmp_path / "prompts.txt", "--images_per_prompt=2", *args)
    assert [p.read_bytes() for p in pictures] == before  # nothing overwritten
    assert len(list(out.glob("*.png"))) == 3 + 6 + 1


def test_several_checkpoints_share_seeds_and_make_rows(script, runs, tmp_path):
    script("sample.py", "--prompt", *PROMPTS, "--checkpoint", runs / "run1", runs / "run2", runs / "run1",
           "--steps=3", "--out", tmp_path)
    images = [np.asarray(Image.open(p)) for p in sorted(tmp_path.glob("*seed*.png"))]
    assert len(images) == 9
    for a, b, c in zip(images[:3], images[3:6], images[6:]):
        assert (a == c).all() and (a != b).any()
    grid = Image.open(next(tmp_path.glob("*grid.png")))
    assert grid.width == 3 * (128 + 4) + 4 < grid.height  # and below each picture its caption


def test_a_picture_does_not_depend_on_the_batch_it_was_drawn_in(loaded):
    together = sample.generate(loaded, PROMPTS, steps=4, seed=7, batch_size=3)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = sample.generate(loaded, [prompt], steps=4, seed=7 + i)
        assert abs(np.asarray(alone, int) - np.asarray(together[i], int)).max() <= 1
    (other,) = sample.generate(loaded, PROMPTS[:1], steps=4, seed=8)
    assert (np.asarray(other) != np.asarray(together[0])).any()


def test_guidance_and_averaged_weights_are_the_runs_own_unless_told(loaded, runs):
    by_default, told, other = (np.asarray(sample.generate(loaded, PROMPTS[:1], steps=4, **given)[0])
                               for given in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 5.0}))
    assert (by_default == told).all() and (by_default != other).any()
    kept, raw = weights(runs / "run1"), sample.load(runs / "run1", "cpu", ema=False)
    for net, prefix in ((loaded.net, "ema."), (raw.net, "model.")):
        assert all(torch.equal(p, kept[prefix + name]) for name, p in net.named_parameters())


def test_the_newest_run_that_is_no_trial_is_the_default(tmp_path):
    for when, (name, step) in enumerate((("old", 200), ("new", 100), ("trial", 1))):
        path = checkpoint.step_path(tmp_path / name, step)
        path.parent.mkdir()
        path.touch()
        os.utime(path, (when, when))
    assert checkpoint.newest(tmp_path).parent.name == "new"
    for name in ("new", "old"):
        shutil.rmtree(tmp_path / name)
    assert checkpoint.newest(tmp_path).parent.name == "trial"


@pytest.mark.parametrize("args, words", [
    ([], "no prompt"), (["--prompt", "a", " "], "prompt 2 is empty"), (["--prompt="], "no prompt"),
    (["--prompts_file=none.txt"], "none.txt"), (["--prompt=a", "--sampler=euler"], "must be heun or dpmpp_2m"),
    (["--prompt=a", "--steps=0"], "steps is 0"), (["--prompt=a", "--sigma_max=-1"], "sigma_max"),
    (["--prompt", "a", "b", "c", "--negative_prompt", "d", "e"], "2 negative prompts for 3 prompts"),
    (["--prompt=a", "--checkpoint=nothing"], "no checkpoint nothing"),
    (["--prompt=a", "--vae=other"], "unknown autoencoder"),
    (["--prompt=a", "--checkpoint=README.md"], "README.md is not a whole checkpoint")])
def test_mistakes(script, runs, tmp_path, args, words):
    given = [] if any("--checkpoint" in a for a in args) else ["--checkpoint", runs / "run1"]
    assert words in script("sample.py", *args, *given, "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


def test_grids_strips_and_which_run(script, runs, tmp_path):
    """At most 64 pictures a grid, with captions; a strip of one picture's denoising"""
    printed = script("sample.py", "--prompt", PROMPTS[0], "--images_per_prompt=66", "--checkpoint", runs / "run1",
                     "--steps=1", "--batch_size=33", "--out", tmp_path / "many")
    assert "drawing 66 pictures of 16 px with run1/step_00000006" in printed
    with Image.open(tmp_path / "many/00066_grid.png") as first, Image.open(tmp_path / "many/00067_grid.png") as second:
        assert first.width == 8 * (128 + 4) + 4 and second.height < first.height / 4
        pixels = np.asarray(second)
    assert tuple(pixels[0, 0]) == (208, 208, 208) and (pixels[140:160, :132] < 100).any()  # grey around, black letters
    printed = script("sample.py", "--prompt", "a small red elephant on a moon", "--checkpoint", runs / "run1",
                     "--steps=12", "--progress_strip", "--out", tmp_path / "strip")
    assert "never shown the words elephant, moon" in printed and "circle" in printed
    with Image.open(tmp_path / "strip/00000_strip.png") as strip:
        assert strip.width == 8 * (128 + 4) + 4 and "00000_strip.png" in printed
        noisy, last = (np.asarray(strip.crop((4 + k * 132, 4, 132 + k * 132, 132))) for k in (0, 7))
    with Image.open(next((tmp_path / "strip").glob("*seed2024.png"))) as image:
        assert (last[::8, ::8] == np.asarray(image)).all() and (noisy != last).any()


def test_pictures_are_written_batch_by_batch(runs, tmp_path, monkeypatch):
    for name, value in {"prompt": tuple(PROMPTS), "checkpoint": (str(runs / "run1"),), "steps": 1, "batch_size": 1,
                        "out": str(tmp_path), "device": "cpu"}.items():
        monkeypatch.setattr(sample, name, value)
    pictures = [Image.new("RGB", (16, 16))]
    monkeypatch.setattr(pipeline, "decode_images", MagicMock(side_effect=[pictures, pictures, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        sample.main()
    assert [p.name[:5] for p in sorted(tmp_path.glob("*.png"))] == ["00000", "00001"]


def test_bfloat16_computes_as_training_does(runs):
    half = sample.load(runs / "run1", "cpu", dtype="bfloat16")
    assert {p.dtype for p in half.net.parameters()} == {half.net.pos_embed.dtype} == {torch.float32}
    x = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    args = x, torch.zeros(2), half.text_encoder(PROMPTS[:2])
    with half.autocast():
        ours = half.net(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours, half.net(*args))
    assert not torch.equal(ours, half.net(*args))


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(machine.pick_device("auto")) == str(machine.pick_device("cuda")) == "cuda:3"
    assert str(machine.pick_device("cuda:1")) == "cuda:1" and str(machine.pick_device("cpu")) == "cpu"
    monkeypatch.delenv("LOCAL_RANK")
    assert str(machine.pick_device(None)) == "cuda:0"
    assert list(map(str, current)) == ["cuda:3", "cuda:3", "cuda:1", "cuda:0"]
    with pytest.raises(ValueError, match="this machine has cuda"):
        machine.pick_device("mps" if not torch.backends.mps.is_available() else "tpu")


def test_genevals_layout_by_two_processes_and_again(script, runs, tmp_path):
    metadata = [
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
         "prompt": "a photo of two cups"},
        {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"}]
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text("".join(json.dumps(m) + "\n" for m in metadata))
    out = tmp_path / "geneval"
    args = ("--prompts_file", prompts, "--checkpoint", runs / "run1", "--steps=2", "--batch_size=3", "--out", out)
    printed = script("sample.py", *args, processes=2)
    assert "eval_geneval.py --images" in printed
    for i, m in enumerate(metadata):
        folder = out / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == m
        assert [p.name for p in sorted((folder / "samples").iterdir())] == [f"{k:04d}.png" for k in range(4)]
        with Image.open(folder / "samples/0002.png") as image:
            assert image.text["prompt"] == m["prompt"] and image.text["seed"] == str(2024 + 4 * i + 2)
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert len(before) == len(set(before.values())) == 8
    (out / "00001/samples/0001.png").unlink()
    script("sample.py", *args)
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == before
    assert "steps: 2 there, 3 now" in script("sample.py", *args, "--steps=3", fails=True)
    prompts.write_text(json.dumps(metadata[0] | {"tag": "colours"}) + "\n")
    assert "line 1" in script("sample.py", *args, fails=True)
