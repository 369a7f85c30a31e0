"""sample.py on a small trained checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import launch
from PIL import Image
from test_train import SMALL

import sample
from common import machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    launch("prepare_latents.py", "--out", folder / "data", "--limit=60", "--resolutions=16")
    for seed in (1, 2):
        launch(
            "train.py",
            *SMALL,
            f"--data={folder / 'data'}",
            f"--out={folder / f'run{seed}'}",
            "--max_steps=6",
            f"--seed={seed}",
            "--ema_decay=0.99",
            "--learning_rate=1e-2",
            "--sample_guidance=2",
        )
    return folder


PROMPTS = [
    "a small red circle on a white background",
    "a large blue ring on a black background",
    "a small cyan cross on a gray background",
]


def test_pictures_grid_and_text_chunks(script, runs, tmp_path):
    out = tmp_path / "out"
    args = ("--checkpoint", runs / "run1", "--steps=3", "--out", out)
    printed = script(
        "sample.py", "--prompt", *PROMPTS[:2], "--seed=5", "--negative_prompt=a ring", "--sampler=dpmpp_2m", *args
    )
    assert "picture steps" in printed and "warning" not in printed
    pictures = sorted(out.glob("*.png"))
    assert [p.name for p in pictures] == [
        "00000_a-small-red-circle-on-a-white-background_seed5.png",
        "00001_a-large-blue-ring-on-a-black-background_seed6.png",
        "00002_grid.png",
    ]
    image = Image.open(pictures[1])
    assert image.size == (16, 16) and image.text["prompt"] == PROMPTS[1] and image.text["seed"] == "6"
    used = json.loads(image.text["settings"])
    assert (
        used["sampler"] == "dpmpp_2m"
        and used["negative_prompt"] == "a ring"
        and used["steps"] == 3
        and used["guidance_scale"] == 2.0  # that of the run's own samples
        and "run1/step_" in used["checkpoint"]
    )
    before = [p.read_bytes() for p in pictures]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    script("sample.py", "--prompts_file", tmp_path / "prompts.txt", "--images_per_prompt=2", *args)
    assert [p.read_bytes() for p in pictures] == before  # nothing overwritten
    assert len(list(out.glob("*.png"))) == 3 + 6 + 1


def test_several_checkpoints_share_seeds_and_make_rows(script, runs, tmp_path):
    script(
        "sample.py",
        "--prompt",
        *PROMPTS,
        "--checkpoint",
        runs / "run1",
        runs / "run2",
        runs / "run1",
        "--steps=3",
        "--out",
        tmp_path,
    )
    images = [np.asarray(Image.open(p)) for p in sorted(tmp_path.glob("*seed*.png"))]
    assert len(images) == 9
    for a, b, c in zip(images[:3], images[3:6], images[6:]):
        assert (a == c).all() and (a != b).any()
    grid = Image.open(next(tmp_path.glob("*grid.png")))
    assert grid.width == 3 * (128 + 4) + 4 < grid.height  # and below each picture its caption


def test_a_picture_does_not_depend_on_the_batch_it_was_drawn_in(runs):
    model = sample.load(runs / "run1", "cpu")
    together = sample.generate(model, PROMPTS, steps=4, seed=7, batch_size=3)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = sample.generate(model, [prompt], steps=4, seed=7 + i)
        assert abs(np.asarray(alone, int) - np.asarray(together[i], int)).max() <= 1
    (other,) = sample.generate(model, PROMPTS[:1], steps=4, seed=8)
    assert (np.asarray(other) != np.asarray(together[0])).any()


def test_guidance_is_the_runs_own_unless_told(runs):
    model = sample.load(runs / "run1", "cpu")
    by_default, told, other = (
        np.asarray(sample.generate(model, PROMPTS[:1], steps=4, **kw)[0])
        for kw in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 5.0})
    )
    assert (by_default == told).all() and (by_default != other).any()


def test_averaged_weights_are_the_default(runs):
    averaged, raw = (sample.load(runs / "run1", "cpu", ema=ema) for ema in (True, False))
    assert any((a != b).any() for a, b in zip(averaged.net.parameters(), raw.net.parameters()))


def test_newest_run_is_the_default(script, runs, tmp_path, monkeypatch):
    from training import checkpoint

    shutil.copytree(runs / "run1", tmp_path / "runs/old")
    new = shutil.copytree(runs / "run2", tmp_path / "runs/new")
    for path in new.glob("*.safetensors"):
        path.touch()
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find("").parent.name == "new"


def test_unknown_words_are_named_with_the_known_ones(script, runs, tmp_path):
    printed = script(
        "sample.py",
        "--prompt",
        "a small red elephant on a moon",
        "--checkpoint",
        runs / "run1",
        "--steps=1",
        "--out",
        tmp_path,
    )
    assert "never shown the words elephant, moon" in printed and "circle" in printed


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "no prompt"),
        (["--prompt", "a", " "], "prompt 2 is empty"),
        (["--prompt="], "no prompt"),
        (["--prompts_file=none.txt"], "none.txt"),
        (["--prompt=a", "--sampler=euler"], "unknown sampler 'euler'"),
        (["--prompt=a", "--steps=0"], "steps is 0"),
        (["--prompt", "a", "b", "c", "--negative_prompt", "d", "e"], "2 negative prompts for 3 prompts"),
        (["--prompt=a", "--sigma_max=-1"], "sigma_max"),
        (["--prompt=a", "--checkpoint=nothing"], "no checkpoint nothing"),
        (["--prompt=a", "--vae=other"], "unknown autoencoder"),
        (["--prompt=a", "--checkpoint=README.md"], "not a whole checkpoint"),
    ],
)
def test_mistakes(script, runs, tmp_path, args, words):
    where = [] if any("--checkpoint" in a for a in args) else ["--checkpoint", runs / "run1"]
    assert words in script("sample.py", *args, *where, "--out", tmp_path / "out", fails=True)
    assert not (tmp_path / "out").exists()


def test_a_truncated_checkpoint_is_named(script, runs, tmp_path):
    path = tmp_path / "step_00000006.safetensors"
    path.write_bytes(next((runs / "run1").glob("step_00000006*")).read_bytes()[:-10])
    assert f"{path} is not a whole checkpoint" in script("sample.py", "--prompt=a", "--checkpoint", path, fails=True)


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(machine.pick_device("auto")) == str(machine.pick_device("cuda")) == "cuda:3"
    assert str(machine.pick_device("cuda:1")) == "cuda:1" and str(machine.pick_device("cpu")) == "cpu"
    monkeypatch.delenv("LOCAL_RANK")
    assert str(machine.pick_device(None)) == "cuda:0" and list(map(str, current)) == [
        "cuda:3",
        "cuda:3",
        "cuda:1",
        "cuda:0",
    ]
    with pytest.raises(ValueError, match="this machine has cuda"):
        machine.pick_device("mps" if not torch.backends.mps.is_available() else "tpu")


def test_genevals_layout_by_two_processes_and_again(script, runs, tmp_path):
    metadata = [
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
         "prompt": "a photo of two cups"},
        {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
    ]  # fmt: skip
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
    assert len(before) == 12 and len(set(before.values())) == 12
    (out / "00001/samples/0001.png").unlink()
    script("sample.py", *args)
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == before
    assert "steps: 2 there, 3 now" in script("sample.py", *args, "--steps=3", fails=True)
    prompts.write_text(json.dumps(metadata[0] | {"tag": "colours"}) + "\n")
    assert "line 1" in script("sample.py", *args, fails=True)
