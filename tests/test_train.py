"""train.py as a user runs it: going on after a stop, processes, what it writes and shows, and its errors."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch, log_of, losses, weights
from PIL import Image

from training import checkpoint
from training.log import BINS

BEFORE = Path(__file__).parent / "data/before"  # a prepared folder and a run of the version before the rooms


@pytest.fixture
def fit(script, shapes16):
    def run(out, *args, steps=8, **kw):
        return script("train.py", f"--data={shapes16}", f"--out={out}", *SMALL, f"--max_steps={steps}", *args, **kw)

    return run


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_bytes(fit, tmp_path):
    printed = fit(tmp_path / "whole", "--unmasked_steps=2")
    assert all(words in printed for words in ("images/s", "left", "validation loss", "unmasked", "done: "))
    part, again = tmp_path / "part", tmp_path / "again"
    fit(part, "--unmasked_steps=2", "--checkpoint_every=3")
    # as if killed after step 6, while the checkpoint of step 8 was being written, its name by the safetensors package
    # of earlier versions, with two more steps in the log and a line of it damaged
    (part / "step_00000008.safetensors").rename(part / "step_00000008.safetensors.tmp")
    (part / ".tmpAbC123").write_bytes(b"leftover")
    with open(part / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo\x00\n[1]\n')
    shutil.copytree(part, again)
    printed = fit(part, "--unmasked_steps=2", "--checkpoint_every=3")
    assert "going on from step 6" in printed and "log.jsonl: 2 damaged lines" in printed
    assert_equal(weights(part), weights(tmp_path / "whole"))
    assert losses(part) == losses(tmp_path / "whole") and len(losses(part)) == 8
    assert sorted(p.name for p in part.iterdir()) == [
        "log.jsonl", "model.py", "progress.png", "run.json", "step_00000006.safetensors", "step_00000008.safetensors"]
    names = weights(tmp_path / "whole")
    assert any(n.startswith("ema.") for n in names) and any(n.startswith("optimizer.exp_avg_sq.") for n in names)
    # finished: nothing to do; and max_steps may grow
    assert "going on from step 8" in fit(part, "--unmasked_steps=2", steps=10)
    assert list(losses(part))[-2:] == [9, 10]
    # nothing else may change, and a refusal touches nothing
    before = weights(again)
    message = fit(again, "--unmasked_steps=2", "--learning_rate=1e-3", "--depth=3", fails=True)
    for words in ("learning_rate: 0.003 there, 0.001 now", "depth: 2 there, 3 now", "--out", "--overwrite"):
        assert words in message
    assert "max_steps: 8 there, 7 now" in fit(again, "--unmasked_steps=2", steps=7, fails=True)
    assert_equal(weights(again), before)
    fit(again, "--depth=3", "--overwrite", steps=2)
    assert len(losses(again)) == 2 and [p.name for p in checkpoint.steps_of(again)] == ["step_00000002.safetensors"]


def test_a_run_of_the_version_before_goes_on_and_samples(script, tmp_path):
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    made = json.loads(json.dumps(checkpoint.read(checkpoint.find(BEFORE / "run"), ("none",))[0]["settings"]))
    words = [f"--data={BEFORE / 'data'}", f"--out={tmp_path / 'run'}", "--max_steps=6"]
    for name, value in made.items():
        if name not in ("data", "out", "max_steps") and value != []:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    assert "going on from step 4" in script("train.py", *words)
    assert list(losses(tmp_path / "run")) == [1, 4, 5, 6] or list(losses(tmp_path / "run"))[-1] == 6
    printed = script("sample.py", "--checkpoint", BEFORE / "run", "--prompt=a red circle", "--steps=2", "--out",
                     tmp_path / "out")
    assert "run/step_00000004" in printed and "another model.py" not in printed
    assert len(list((tmp_path / "out").glob("*seed2024.png"))) == 1


def test_muon_goes_on_too_and_leaves_the_other_parameters_to_adamw(fit, tmp_path):
    fit(tmp_path / "whole", "--optimizer=muon", "--checkpoint_every=2", steps=4)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    checkpoint.steps_of(tmp_path / "part")[-1].unlink()
    assert "going on from step 2" in fit(tmp_path / "part", "--optimizer=muon", "--checkpoint_every=2", steps=4)
    assert_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    names = {n.split(".", 2)[1] + " " + n.split(".", 2)[2] for n in weights(tmp_path / "whole") if n.startswith("opt")}
    assert "momentum_buffer blocks.0.attn.qkv.weight" in names and "exp_avg blocks.0.attn.qkv.weight" not in names
    assert "exp_avg final.linear.weight" in names and "exp_avg mixer.0.modulation.weight" in names


def test_two_processes_train_as_one(fit, tmp_path):
    fit(tmp_path / "one", steps=5)
    printed = fit(tmp_path / "two", steps=5, processes=2)
    assert "2 x cpu" in printed and "broadcast_buffers" not in printed and printed.count("parameters,") == 1
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 5
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4)
    val = [[e["val_loss"] for e in log_of(tmp_path / name) if "val_loss" in e] for name in ("one", "two")]
    assert val[0] == pytest.approx(val[1], rel=1e-4) and len(val[0]) == 2


def test_it_learns_and_shows_it(fit, shapes16, tmp_path):
    out = tmp_path / "run"
    args = (f"--val_data={shapes16}", "--sample_every=30", "--learning_rate=1e-2", "--sample_steps=3",
            "--log_every=10", "--eval_every=30", "--unmasked_steps=10")
    printed = fit(out, *args, steps=60)
    assert f"{out}: 0.1 M parameters, 120 pictures, 60 steps of 16 on 1 x cpu, perhaps 0m0" in printed
    val = [e for e in log_of(out) if "val_loss" in e]
    assert val[-1]["val_loss"] < 0.9 and len(val[-1]["val_loss_by_sigma"]) == BINS
    assert val[-1]["val_loss"] == pytest.approx(np.mean(list(val[-1]["val_loss_by_sigma"].values())), rel=0.5)
    steps = [e for e in log_of(out) if "loss" in e]
    assert [e["step"] for e in steps] == [1, 10, 20, 30, 40, 50, 60]
    assert {"lr", "grad_norm", "images_per_s", "mfu", "eta_s", "loss_by_sigma"} <= steps[0].keys()
    assert (out / "samples/captions.txt").read_text().splitlines()[0].startswith("a ")
    assert json.loads((out / "run.json").read_text())["settings"]["dim"] == 32
    assert (out / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    with Image.open(out / "samples/step_00000060.png") as grid, Image.open(out / "progress.png") as page:
        assert page.width >= grid.width and page.height > grid.height + 300
        newest = np.asarray(page.convert("RGB"))[-grid.height:, (page.width - grid.width) // 2:][:, :grid.width]
        assert (newest == np.asarray(grid)).all()  # the newest pictures, under the losses
    with Image.open(out / "samples/strip.png") as strip:
        assert json.loads(strip.text["steps"]) == [30, 60] and strip.width < 2 * strip.height
        width = strip.width
    # columns of steps that are done again are drawn again
    checkpoint.step_path(out, 60).rename(checkpoint.step_path(out, 30))
    shutil.rmtree(out)
    fit(out, *args, "--sample_every=2", steps=6)
    with Image.open(out / "samples/strip.png") as strip:
        assert json.loads(strip.text["steps"]) == [2, 4, 6] and strip.width > width


def test_starting_from_other_weights(fit, tmp_path):
    fit(tmp_path / "first", steps=4)
    fit(tmp_path / "second", f"--init_from={tmp_path / 'first'}", "--learning_rate=1e-12", "--ema_decay=0", steps=1)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in (n for n in second if n.startswith("model.")):
        torch.testing.assert_close(first[name], second[name])
    message = fit(tmp_path / "third", f"--init_from={tmp_path / 'first'}", "--dim=64", steps=1, fails=True)
    assert "do not fit this network" in message and "dim: 32 there, 64 now" in message
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("variant", [
    ("--mixer_depth=0", "--num_experts=0", "--dtype=bfloat16", "--eval_every=0", "--batch_size=4"),
    ("--mask_ratio=0", "--schedule=constant"),
    ("--router_unmodulated", "--optimizer=muon", "--grad_clip=0", "--activation_checkpointing")])
def test_variants_run_by_setting_alone(fit, tmp_path, variant):
    fit(tmp_path / "run", *variant, steps=2)
    assert all(np.isfinite(v) for v in losses(tmp_path / "run").values())


def test_validation_data_of_its_own(fit, script, tmp_path):
    script("prepare_latents.py", f"--out={tmp_path / 'val'}", "--limit=10", "--resolutions=16", "--first_seed=5000")
    assert " 120 pictures" in fit(tmp_path / "run", f"--val_data={tmp_path / 'val'}", steps=1)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, words", [
    (["--data=nowhere"], "no prepared data in nowhere"), (["--latent_size=16"], "not 16"),
    (["--batch_size=10"], "batch_size 10"), (["--mask_ratio=0.99"], "mask_ratio"), (["--num_experts=64"], "experts 64"),
    (["--unmasked_steps=9"], "unmasked_steps is 9"), (["--init_from=nowhere"], "no checkpoint nowhere"),
    (["--head_dim=7"], "head_dim"), (["--learning_rat=1"], "'learning_rate'"), (["--device=tpu"], "this machine has"),
    (["--eval_every=-1"], "eval_every is -1"), (["config/xl2_256.py"], "docs/datasets.md")])
def test_mistakes_stop_before_anything_is_written(fit, script, tmp_path, args, words):
    if args[0].endswith(".py"):
        assert words in script("train.py", *args, f"--out={tmp_path / 'run'}", fails=True)
    else:
        assert words in fit(tmp_path / "run", *args, fails=True)
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused(monkeypatch):
    import train
    from configurator import script_settings
    good = script_settings("train.py")
    for name, value in (("mask_ratio", 1.0), ("schedule", "linear"), ("attn_ratio", (1,)), ("learning_rate", 0.0),
                        ("checkpoint_every", -5), ("wandb", "x"), ("optimizer", "sgd"), ("log_every", 0)):
        monkeypatch.setattr(train, "settings", good | {name: value}, raising=False)
        monkeypatch.setattr(train, "wandb", "x" if name == "wandb" else "")
        with pytest.raises(ValueError, match=name):
            train.check_settings()


def test_data_of_another_autoencoder_is_refused(fit, shapes16, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(shapes16, other)
    info = json.loads((other / "dataset.json").read_text())
    info["vae"]["scaling_factor"] = 0.5
    (other / "dataset.json").write_text(json.dumps(info))
    assert "was prepared with vae" in fit(tmp_path / "run", f"--val_data={other}", fails=True)
    fit(tmp_path / "run", steps=1)
    message = fit(tmp_path / "run", f"--data={other}", steps=2, fails=True)
    assert "holds another run" in message and "vae" in message
    message = fit(tmp_path / "next", f"--data={other}", f"--init_from={tmp_path / 'run'}", fails=True)
    assert "was prepared with vae" in message


def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_it_used(fit, tmp_path):
    fit(tmp_path / "whole", "--checkpoint_every=1", "--eval_every=0", steps=4)
    run = tmp_path / "run"
    fit(run, "--checkpoint_every=1", "--eval_every=0", steps=3)
    two, three = checkpoint.steps_of(run)
    good = three.read_bytes()
    three.write_bytes(good[:-1])
    printed = fit(run, "--checkpoint_every=1", "--eval_every=0", steps=4)
    assert f"{three.name} is cut short or damaged" in printed and "going on from step 2" in printed
    assert three.with_suffix(".damaged").read_bytes() == good[:-1]
    assert_equal(weights(run), weights(tmp_path / "whole"))
    for path in checkpoint.steps_of(run):
        path.write_bytes(good[:100])
    message = fit(run, steps=4, fails=True)
    assert "none of the checkpoints" in message and len(checkpoint.steps_of(run)) == 2


def test_disk_full_while_writing_a_checkpoint_keeps_the_old_one(fit, small_disk):
    disk = small_disk(8)
    fit(disk / "run", "--eval_every=0", steps=1)
    size = checkpoint.steps_of(disk / "run")[0].stat().st_size
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - size // 2))
    message = fit(disk / "run", "--eval_every=0", steps=2, fails=True)
    assert "disk full while writing" in message and "step_00000002" in message
    assert [p.name for p in checkpoint.steps_of(disk / "run")] == ["step_00000001.safetensors"]
    assert not list((disk / "run").glob("*.tmp"))
    (disk / "ballast").unlink()
    assert "going on from step 1" in fit(disk / "run", "--eval_every=0", steps=2)


def test_a_diverged_run_stops_and_says_so(fit, tmp_path):
    message = fit(tmp_path / "run", "--learning_rate=1e30", "--grad_clip=0", steps=20, fails=True)
    assert "the last 1" in message and "last good checkpoint is" in message and "learning_rate" in message


def test_processes_that_see_different_disks_are_refused(shapes16, tmp_path):
    """Each process in a folder of its own: the first has a checkpoint, the other has not"""
    for rank in (0, 1):
        (tmp_path / f"disk{rank}").mkdir()
    args = [f"--data={shapes16}", *SMALL, "--eval_every=0", "--out=run"]
    launch(str(ROOT / "train.py"), *args, "--max_steps=1", cwd=tmp_path / "disk0")
    command = f"cd {tmp_path}/disk$RANK && exec python {ROOT}/train.py {' '.join(args)} --max_steps=2"
    path = f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"
    message = launch("--no-python", "bash", "-c", command, processes=2, fails=True, env={"PATH": path}, traceback=True)
    assert "the processes see different checkpoints or data" in message and "shared disk" in message
    assert not (tmp_path / "disk1/run").exists()


# --- somebody's own network ------------------------------------------------------------------------------------------


EDITS = [  # a field in one place, a layer of one's own, a buffer, an operation that depends on data, a further loss
    ("    router_unmodulated: bool", "    my_width: int = 3      # of my layer\n    router_unmodulated: bool"),
    ("class FinalLayer(nn.Module):", '''class Mine(nn.Module):
    def __init__(self, dim, width):
        super().__init__()
        self.a, self.b = nn.Linear(dim, width), nn.Linear(width, dim)
        self.register_buffer("seen", torch.zeros(()))

    def init_weights(self, out_std):
        nn.init.constant_(self.a.weight, out_std)

    def forward(self, x):
        self.seen += 1
        return self.b(self.a(x)) * (x > 0).nonzero().shape[0] ** 0


class FinalLayer(nn.Module):'''),
    ("        self.modulation = nn.Linear(c.dim, 6 * dim)\n",
     "        self.mine = Mine(dim, c.my_width)\n        self.modulation = nn.Linear(c.dim, 6 * dim)\n"),
    ("        h = self.norm3(x)\n", "        x = x + self.mine(x)\n        h = self.norm3(x)\n"),
    ("        x = self.final(x, cond)",
     "        self.extra_loss = x.square().mean() + 100.0\n        x = self.final(x, cond)")]


def test_an_edited_network_trains_and_is_told_apart(shapes16, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(ROOT, mine, ignore=shutil.ignore_patterns(".git", "data", "runs", ".venv*", "tests", "__pycache__"))
    source = (mine / "model.py").read_text()
    for old, new in EDITS:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (mine / "model.py").write_text(source)
    args = [f"--data={shapes16}", *SMALL, "--my_width=5", "--eval_every=2", f"--out={tmp_path / 'run'}"]
    printed = launch("train.py", *args, "--max_steps=2", cwd=mine)
    assert "MFU not known" in printed and "Traceback" not in printed and "perhaps" not in printed
    logged = log_of(tmp_path / "run")
    assert logged[0]["loss"] > 100 > 2 > logged[-1]["val_loss"]  # the further loss is of training alone
    tensors = weights(tmp_path / "run")
    assert tensors["model.blocks.0.mine.a.weight"].shape == (5, 32) and tensors["model.blocks.0.mine.seen"] > 0
    assert (tmp_path / "run/model.py").read_text() == source
    assert "of my layer" in launch("train.py", "--help", cwd=mine)
    # under the paper's network its code is named, and what to do
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (mine / "model.py").write_text(source + "\n# edited again\n")
    printed = launch("sample.py", "--checkpoint", tmp_path / "run", "--prompt=a", "--steps=1", "--out",
                     tmp_path / "out", cwd=mine)
    assert "made with another model.py" in printed and f"{tmp_path / 'run/model.py'}" in printed
    assert "made with another model.py" in launch("train.py", *args, "--max_steps=3", cwd=mine)
