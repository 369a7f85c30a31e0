"""train.py as a user runs it: going on after a stop, processes, what it writes and shows, its export and errors."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch, log_of, losses, weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train
from configurator import check, read_defaults, script_settings
from model import MicroDiT, MicroDiTConfig
from training import checkpoint, export
from training.log import BINS
from training.report import save_samples

BEFORE = Path(__file__).parent / "data/before"  # a prepared folder and a run of the version before the rooms


@pytest.fixture(scope="module")
def fit(shapes16):
    def run(out, *args, steps=8, **kw):
        return launch("train.py", f"--data={shapes16}", f"--out={out}", *SMALL, f"--max_steps={steps}", *args, **kw)

    return run


WHOLE = ("--unmasked_steps=2", "--checkpoint_every=3")


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """A run of eight steps, to copy, and what it printed"""
    out = tmp_path_factory.mktemp("runs") / "whole"
    (out.parent / "printed.txt").write_text(fit(out, *WHOLE))
    return out


def assert_equal(run, other):
    torch.testing.assert_close(weights(run), weights(other), rtol=0, atol=0)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_bytes(fit, whole, tmp_path):
    printed = (whole.parent / "printed.txt").read_text()
    assert all(words in printed for words in ("images/s", "left", "validation loss", "unmasked", "done: "))
    names = weights(whole)
    assert any(n.startswith("ema.") for n in names) and any(n.startswith("optimizer.exp_avg_sq.") for n in names)
    # as if killed after step 6, while the checkpoint of step 8 was being written, its name by the safetensors package
    # of earlier versions, with two more steps in the log and a line of it damaged
    part = shutil.copytree(whole, tmp_path / "part")
    (part / "step_00000008.safetensors").rename(part / "step_00000008.safetensors.tmp")
    (part / ".tmpAbC123").write_bytes(b"leftover")
    with open(part / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo\x00\n[1]\n')
    printed = fit(part, *WHOLE)
    assert "going on from step 6" in printed and "log.jsonl: 2 damaged lines" in printed
    assert_equal(part, whole)
    assert losses(part) == losses(whole) and len(losses(part)) == 8
    assert sorted(p.name for p in part.iterdir()) == [
        ".lock", "log.jsonl", "model.py", "progress.png", "run.json", "step_00000006.safetensors",
        "step_00000008.safetensors"]
    # finished: nothing to do; max_steps may grow, and another model.py is named, with what to do
    last = checkpoint.steps_of(part)[-1]
    run, tensors = checkpoint.read(last, ("",))
    checkpoint.save(last, tensors, run | {"model_sha256": "another"})
    for printed in (launch("sample.py", "--checkpoint", part, "--prompt=a", "--steps=1", "--out", tmp_path / "out"),
                    fit(part, *WHOLE, steps=10)):
        assert "made with another model.py" in printed and f"{part / 'model.py'}" in printed
    assert "going on from step 8" in printed and list(losses(part))[-2:] == [9, 10]
    # nothing else may change, and a refusal touches nothing
    again = shutil.copytree(whole, tmp_path / "again")
    message = fit(again, *WHOLE, "--learning_rate=1e-3", "--depth=3", steps=7, fails=True)
    for words in ("learning_rate: 0.003 there, 0.001 now", "depth: 2 there, 3 now", "max_steps: 8 there, 7 now",
                  "--out", "--overwrite"):
        assert words in message
    assert_equal(again, whole)
    fit(again, "--depth=3", "--overwrite", steps=2)
    assert len(losses(again)) == 2 and [p.name for p in checkpoint.steps_of(again)] == ["step_00000002.safetensors"]


def test_a_run_of_the_version_before_goes_on_and_samples(tmp_path):
    run = shutil.copytree(BEFORE / "run", tmp_path / "run")
    words = [f"--data={BEFORE / 'data'}", f"--out={run}", "--max_steps=6"]
    for name, value in checkpoint.read(checkpoint.find(run))[0]["settings"].items():
        if name not in ("data", "out", "max_steps") and value != []:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    assert "going on from step 4" in launch("train.py", *words)
    assert list(losses(run))[-1] == 6
    printed = launch("sample.py", "--checkpoint", BEFORE / "run", "--prompt=a red circle", "--steps=2", "--out",
                     tmp_path / "out")
    assert "run/step_00000004" in printed and "another model.py" not in printed
    assert len(list((tmp_path / "out").glob("*seed2024.png"))) == 1


def test_muon_goes_on_too_and_leaves_the_other_parameters_to_adamw(fit, tmp_path):
    out, args = tmp_path / "run", ("--optimizer=muon", "--checkpoint_every=2", "--router_unmodulated", "--grad_clip=0",
                                   "--activation_checkpointing")
    fit(out, *args, steps=4)
    part = shutil.copytree(out, tmp_path / "part")
    checkpoint.steps_of(part)[-1].unlink()
    assert "going on from step 2" in fit(part, *args, steps=4)
    assert_equal(part, out)
    names = {name.removeprefix("optimizer.") for name in weights(out)}
    assert "momentum_buffer.blocks.0.attn.qkv.weight" in names and "exp_avg.blocks.0.attn.qkv.weight" not in names
    assert {"exp_avg.final.linear.weight", "exp_avg.mixer.0.modulation.weight"} <= names


def test_two_processes_train_as_one(fit, whole, tmp_path):
    printed = fit(tmp_path / "two", *WHOLE, processes=2)
    assert "2 x cpu" in printed and "broadcast_buffers" not in printed and printed.count("parameters,") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)
    one, two = ([e["val_loss"] for e in log_of(run) if "val_loss" in e] for run in (whole, tmp_path / "two"))
    assert two == pytest.approx(one, rel=1e-4) and len(one) == 2


def test_it_learns_and_shows_it(fit, shapes16, tmp_path):
    out = tmp_path / "run"
    printed = fit(out, f"--val_data={shapes16}", "--sample_every=30", "--learning_rate=1e-2", "--sample_steps=3",
                  "--log_every=10", "--eval_every=30", "--unmasked_steps=10", steps=60)
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
    sizes = []
    for step in (90, 50, 60):  # a strip of the same captions; columns of steps that are done again are drawn again
        save_samples(out, step, [Image.new("RGB", (16, 16))] * 16, [""] * 16)
        with Image.open(out / "samples/strip.png") as strip:
            sizes.append((json.loads(strip.text["steps"]), strip.width))
    assert [steps for steps, _ in sizes] == [[30, 60, 90], [30, 50], [30, 50, 60]]
    assert sizes[1][1] < sizes[0][1] == sizes[2][1]


def test_starting_from_other_weights(fit, whole, tmp_path):
    fit(tmp_path / "run", f"--init_from={whole}", "--learning_rate=1e-12", "--ema_decay=0", steps=1)
    first, second = ({n: t for n, t in weights(run).items() if n[:6] == "model."} for run in (whole, tmp_path / "run"))
    torch.testing.assert_close(first, second)
    message = fit(tmp_path / "third", f"--init_from={whole}", "--dim=64", steps=1, fails=True)
    assert "do not fit this network" in message and "dim: 32 there, 64 now" in message
    assert not (tmp_path / "third").exists()


def test_exported_weights_are_the_runs(whole, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"results": [{
        "folder": "guidance_2", "fid": 12.5, "attributes": {"color": [3, 4]}}]}))
    for dtype, name in (("float32", "x.safetensors"), ("bfloat16", "x.pt")):
        file = tmp_path / name
        for setting, value in {"run": str(whole), "out": str(file), "dtype": dtype,
                               "scores": str(tmp_path / "results.json")}.items():
            monkeypatch.setattr(export, setting, value)
        export.main()
        if file.suffix == ".pt":
            tensors = torch.load(file, weights_only=True)
        else:
            with safe_open(file, "pt") as opened:
                tensors, config = load_file(file), json.loads(opened.metadata()["config"])
        assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
        net, kept = MicroDiT.from_official(tensors, MicroDiTConfig(**config)), weights(whole)
        for n, p in net.named_parameters():  # the averaged ones
            torch.testing.assert_close(p, kept[f"ema.{n}"], rtol=0 if dtype == "float32" else 0.01, atol=1e-4)
        card = file.with_suffix(".md").read_text()
        for words in ("step 8 of whole", "validation loss at step 8", "fid 12.5, color 3 of 4", "- dim: 32",
                      "- seed: 2024"):
            assert words in card
    monkeypatch.setattr(export, "out", "x.bin")
    with pytest.raises(ValueError, match="FILE.safetensors or FILE.pt"):
        export.main()


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, words", [
    (["--data=nowhere"], "no prepared data in nowhere"), (["--latent_size=16"], "not 16"),
    (["--mask_ratio=0.99"], "mask_ratio"), (["--num_experts=64"], "experts 64"), (["--head_dim=7"], "head_dim"),
    (["--init_from=nowhere"], "no checkpoint nowhere"), (["--learning_rat=1"], "'learning_rate'"),
    (["--device=tpu"], "this machine has"), (["config/xl2_256.py"], "docs/datasets.md")])
def test_mistakes_stop_before_anything_is_written(fit, tmp_path, args, words):
    out, config = tmp_path / "run", args[0].endswith(".py")
    assert words in (launch("train.py", *args, f"--out={out}", fails=True) if config else fit(out, *args, fails=True))
    assert not out.exists()


def test_settings_out_of_range_are_refused(monkeypatch):
    good, described = script_settings("train.py"), read_defaults(ROOT / "train.py")
    for name, value in (("mask_ratio", 1.0), ("schedule", "linear"), ("learning_rate", 0.0), ("checkpoint_every", -5),
                        ("grad_clip", -1.0), ("optimizer", "sgd"), ("log_every", 0), ("p_mean", math.nan), ("dim", 0),
                        ("head_dim", 0), ("depth", -1), ("mixer_depth", -1), ("expert_capacity", math.inf),
                        ("seed", -1), ("attn_ratio", (0.5, math.nan))):
        with pytest.raises(ValueError, match=name):
            check(good | {name: value}, described)
    for name, value in (("attn_ratio", (1,)), ("batch_size", 10), ("unmasked_steps", 250_001), ("wandb", "mine")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=name):
            patch.setattr(train, "settings", good | {name: value}, raising=False)
            patch.setattr(train, name, value, raising=False)
            train.check_settings()


def test_data_of_another_autoencoder_is_refused(fit, whole, shapes16, tmp_path):
    other = shutil.copytree(shapes16, tmp_path / "other")
    info = json.loads((other / "dataset.json").read_text())
    info["vae"]["scaling_factor"] = 0.5
    (other / "dataset.json").write_text(json.dumps(info))
    assert "was prepared with vae" in fit(tmp_path / "run", f"--val_data={other}", fails=True)
    message = fit(whole, *WHOLE, f"--data={other}", fails=True)
    assert "holds another run" in message and "vae" in message
    message = fit(tmp_path / "next", f"--data={other}", f"--init_from={whole}", fails=True)
    assert "was prepared with vae" in message


def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_it_used(fit, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    six, eight = checkpoint.steps_of(run)
    good = eight.read_bytes()
    eight.write_bytes(good[:-1])
    printed = fit(run, *WHOLE)
    assert f"{eight.name} is cut short or damaged" in printed and "going on from step 6" in printed
    assert eight.with_suffix(".damaged").read_bytes() == good[:-1]
    assert_equal(run, whole)
    for path in checkpoint.steps_of(run):
        path.write_bytes(good[:100])
    message = fit(run, *WHOLE, fails=True)
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
    printed = fit(tmp_path / "run", "--learning_rate=1e30", "--grad_clip=0", "--warmup_steps=0", "--checkpoint_every=1",
                  steps=20, fails=True, traceback=True)
    for words in ("9 steps skipped", "the last 10 steps", "last good checkpoint is", "step_0000001", "learning_rate"):
        assert words in printed and "Traceback" not in printed, printed


def test_processes_that_see_different_disks_are_refused(whole, shapes16, tmp_path):
    """Each process in a folder of its own: the first has a checkpoint, the other has not"""
    (tmp_path / "disk1").mkdir()
    args = [f"--data={shapes16}", *SMALL, *WHOLE, "--out=run"]
    shutil.copytree(whole, tmp_path / "disk0/run")
    command = f"cd {tmp_path}/disk$RANK && exec python {ROOT}/train.py {' '.join(args)} --max_steps=9"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
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


def test_an_edited_network_trains(shapes16, tmp_path):
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
    tensors, (run, _) = weights(tmp_path / "run"), checkpoint.read(checkpoint.find(tmp_path / "run"))
    assert tensors["model.blocks.0.mine.a.weight"].shape == (5, 32) and tensors["model.blocks.0.mine.seen"] > 0
    assert (tmp_path / "run/model.py").read_text() == source and run["model_sha256"] != checkpoint.code_hash()
    assert "of my layer" in launch("train.py", "--help", cwd=mine)
    # under the paper's network, and after a further edit, its code is named
    draw = ("sample.py", "--checkpoint", tmp_path / "run", "--prompt=a", "--steps=1", "--out", tmp_path / "out")
    assert "is of another network than today's model.py builds" in launch(*draw, fails=True)
    (mine / "model.py").write_text(source + "\n# edited again\n")
    assert f"Its own is {tmp_path / 'run/model.py'}" in launch(*draw, cwd=mine)
    assert f"Its own is {tmp_path / 'run/model.py'}" in launch("train.py", *args, "--max_steps=3", cwd=mine)
    (again,) = (tmp_path / "run").glob("model.*.py")  # the first copy is kept, the run's last steps have their own
    assert (tmp_path / "run/model.py").read_text() == source and again.read_text().endswith("again\n")
    assert f"Its own is {again}" in launch(*draw, fails=True, traceback=True)
