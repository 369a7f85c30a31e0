"""train.py as a user runs it: going on after a stop, processes, what it writes and shows, --check, errors."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, edit, hunks, launch, log_of, losses, weights
from PIL import Image

from configurator import script_settings
from training import checkpoint
from training.log import BINS

BEFORE = Path(__file__).parent / "data/before"  # a prepared folder and a run of an earlier version
WHOLE = ("--unmasked_steps=2", "--checkpoint_every=3")
LAST, ONE_BEFORE = "step_00000008.safetensors", "step_00000006.safetensors"  # what such a run of eight steps keeps


@pytest.fixture(scope="module")
def fit(shapes16):
    def run(out, *args, steps=8, script="train.py", **kw):
        return launch(script, f"--data={shapes16}", f"--out={out}", *SMALL, f"--max_steps={steps}", *args, **kw)

    return run


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """A run of eight steps, beside what it printed"""
    out = tmp_path_factory.mktemp("runs") / "whole"
    (out.parent / "printed.txt").write_text(fit(out, *WHOLE))
    return out


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that run, which a test may change"""
    return shutil.copytree(whole, tmp_path / "run")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def assert_equal(one, other, within=0.0):
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=within)


# --- going on ---


def test_a_stopped_run_goes_on_to_the_same_bytes(fit, whole, run):
    printed = (whole.parent / "printed.txt").read_text()
    assert all(words in printed for words in ("images/s", "left", "validation loss", "unmasked", "done: "))
    names = weights(whole)
    assert any(n.startswith("ema.") for n in names) and any(n.startswith("optimizer.exp_avg_sq.") for n in names)
    (run / LAST).unlink()  # as if killed after step 6, with two more steps in the log and a line of it damaged
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo\x00\n[1]\n')
    printed = fit(run, *WHOLE)
    assert "going on from step 6" in printed and "log.jsonl: 2 damaged lines" in printed
    assert_equal(run, whole)
    assert losses(run) == losses(whole) and len(losses(run)) == 8
    assert sorted(contents(run)) == ["log.jsonl", "model.py", "progress.png", "run.json", ONE_BEFORE, LAST]
    before = contents(run)
    printed = fit(run, *WHOLE)  # finished: nothing to do
    assert "going on from step 8" in printed and "done: " in printed and "step      " not in printed
    message = fit(run, *WHOLE, "--learning_rate=1e-3", "--depth=3", fails=True)
    assert "learning_rate: 0.003 there, 0.001 now; depth: 2 there, 3 now" in message and "give another --out" in message
    assert contents(run) == before


def test_muon_goes_on_too_and_leaves_the_other_parameters_to_adamw(fit, tmp_path):
    out, args = tmp_path / "run", ("--optimizer=muon", "--checkpoint_every=2", "--mixer_conv", "--mask=grouped",
                                   "--grad_clip=0", "--activation_checkpointing", "--dtype=float16")
    fit(out, *args, steps=4)
    part = shutil.copytree(out, tmp_path / "part")
    checkpoint.steps_of(part)[-1].unlink()
    assert "going on from step 2" in fit(part, *args, steps=4)
    assert_equal(part, out)
    names = {name.removeprefix("optimizer.") for name in weights(out)}
    assert "momentum_buffer.blocks.0.attn.qkv.weight" in names and "exp_avg.blocks.0.attn.qkv.weight" not in names
    assert {"exp_avg.final.linear.weight", "exp_avg.mixer.0.neighbours.conv.weight", "loss_scale"} <= names


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    run = shutil.copytree(BEFORE / "run", tmp_path / "run")
    known, words = script_settings("train.py"), [f"--data={BEFORE / 'data'}", f"--out={run}", "--schedule=constant"]
    for name, value in checkpoint.read_checkpoint(checkpoint.find(run))[0]["settings"].items():
        if name in known.keys() - {"data", "out"} and value != []:
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    assert "going on from step 4" in launch("train.py", *words, "--max_steps=4")


def test_fields_that_the_network_had_once(whole, tmp_path):
    described, tensors = checkpoint.read_checkpoint(whole / LAST, ("",))
    for dropped in ({"router_unmodulated": False, "mixer_skip": False, "fused_blocks": -1}, {"fused_blocks": 2}):
        checkpoint.save(tmp_path / f"{len(dropped)}.safetensors", tensors,
                        described | {"config": described["config"] | dropped})
    assert torch.equal(checkpoint.load_network(tmp_path / "3.safetensors")[0].final.linear.weight,
                       weights(whole)["ema.final.linear.weight"])
    with pytest.raises(ValueError, match="1.safetensors cannot be used .*unexpected keyword argument 'fused_blocks'"):
        checkpoint.load_network(tmp_path / "1.safetensors")


def test_neither_processes_nor_micro_batches_change_a_run(fit, tmp_path):
    def forty(name, micro, processes=1, steps=40):
        fit(tmp_path / name, f"--micro_batch_size={micro}", "--learning_rate=5e-4", "--schedule=constant",
            "--log_every=40", "--eval_every=40", "--checkpoint_every=0", steps=steps, processes=processes)

    forty("one", 16)
    for name, micro, processes in (("8", 8, 1), ("4", 4, 1), ("two", 4, 2)):
        forty(name, micro, processes)
    forty("middle", 8, 2, steps=20)
    forty("middle", 4, 1)  # max_steps may grow, as nothing is taken back
    for name in ("8", "4", "two", "middle"):
        assert_equal(tmp_path / "one", tmp_path / name, within=1e-6)
        a, b = (log_of(tmp_path / run)[-1]["val_loss_by_sigma"] for run in ("one", name))
        assert a == pytest.approx(b, rel=1e-5)


def test_uneven_shares(fit, tmp_path):
    for name, processes in (("one", 1), ("three", 3)):
        printed = fit(tmp_path / name, "--batch_size=10", "--learning_rate=5e-4", processes=processes)
    assert "3 x cpu" in printed and printed.count("parameters,") == 1
    assert_equal(tmp_path / "one", tmp_path / "three", within=1e-6)
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert "batch_size 2 is too small" in fit(tmp_path / "four", "--batch_size=2", processes=3, fails=True)


def test_max_steps_grows_where_nothing_is_taken_back(fit, run, tmp_path):
    before = contents(run)
    assert "max_steps: 8 there, 7 now (it may only grow)" in fit(run, *WHOLE, steps=7, fails=True)
    message = fit(run, *WHOLE, steps=10, fails=True)
    assert "max_steps: 8 there, 10 now, alters the schedule" in message and contents(run) == before
    (words,) = re.findall(r"to train on: (.*) --out ANOTHER", message)
    fit(tmp_path / "on", *words.split(), "--optimizer=adamw", steps=1)
    # the weights and the optimizer's state are those of the old run
    assert weights(tmp_path / "on")["optimizer.step.final.linear.bias"] == 9
    for args, steps in ((("--schedule=constant", "--unmasked_steps=2"), 2), (("--schedule=trapezoid",), 3)):
        fit(tmp_path / args[0][-8:], *args, steps=steps)
        assert "alters the schedule" in fit(tmp_path / args[0][-8:], *args, steps=4, fails=True)


# --- what lies in a run's folder ---


def test_the_newest_checkpoint_that_can_be_read_is_used(fit, run):
    good = (run / LAST).read_bytes()
    bad = {8: good[:-1], 9: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
           10: bytes(len(good)), 11: b"my notes"}
    for step, content in bad.items():
        checkpoint.step_path(run, step).write_bytes(content)
    printed = fit(run, *WHOLE)
    assert "going on from step 6" in printed and printed.count("warning: ") == 1
    assert all(f"{checkpoint.step_path(run, step)} cannot be used" in printed for step in bad)
    assert all(checkpoint.step_path(run, step).read_bytes() == bad[step] for step in (9, 10, 11))
    assert checkpoint.read_checkpoint(run / LAST)[0]["step"] == 8  # which the run itself has written anew
    for path in checkpoint.steps_of(run):
        path.write_bytes(good[:100])
    assert f"No checkpoint in {run} can be read" in fit(run, *WHOLE, fails=True)
    assert all(path.read_bytes() == good[:100] for path in checkpoint.steps_of(run))


def test_only_checkpoints_of_this_run_are_used_and_deleted(fit, whole, run):
    (run / LAST).unlink()
    described, tensors = checkpoint.read_checkpoint(whole / LAST, ("",))
    checkpoint.save(run / "step_00000003.safetensors", tensors, described | {"id": "another", "step": 3})
    others = ("step_00000008_best.safetensors", "step_00000008 copy.safetensors", "step_best.safetensors", "thesis.tmp",
              "step_8.safetensors", "step_00000008.safetensors.tmp", "run.json.tmp")
    for name in others:
        shutil.copyfile(whole / LAST, run / name)
    (run / ".lock").symlink_to("thesis.tmp")
    before = contents(run)
    assert "going on from step 6" in fit(run, *WHOLE, "--keep_checkpoints=1")
    assert (run / LAST).exists() and not (run / ONE_BEFORE).exists()
    assert all(contents(run)[name] == before[name] for name in (*others, "step_00000003.safetensors"))


def test_disk_full_while_writing_a_checkpoint_keeps_the_old_one(fit, small_disk):
    run, args = small_disk(8) / "run", ("--eval_every=0", "--schedule=constant")
    fit(run, *args, steps=1)
    first, ballast = run / "step_00000001.safetensors", run.parent / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(run).free - first.stat().st_size // 2))
    message = fit(run, *args, steps=2, fails=True)
    assert "disk full while writing" in message and "step_00000002" in message
    assert checkpoint.steps_of(run) == [first] and not list(run.glob(".*"))
    assert "do not fit on the disk of" in fit(run, *args, "--check", fails=True)
    ballast.unlink()
    assert "going on from step 1" in fit(run, *args, steps=2)


# --- what it says ---


def test_it_learns_and_shows_it(fit, shapes16, tmp_path):
    out = tmp_path / "run"
    printed = fit(out, f"--val_data={shapes16}", "--sample_every=30", "--learning_rate=1e-2", "--log_every=10",
                  "--eval_every=30", "--unmasked_steps=10", steps=60)
    assert f"{out}: 0.1 M parameters, 120 pictures, 120 to validate on, 60 steps of 16 on 1 x cpu" in printed
    first, *_, last = log_of(out)
    assert last["val_loss"] < 0.9 and len(last["val_loss_by_sigma"]) == BINS
    assert last["val_loss"] == pytest.approx(np.mean(list(last["val_loss_by_sigma"].values())), rel=0.5)
    assert {"lr", "grad_norm", "images_per_s", "mfu", "eta_s", "loss_by_sigma"} <= first.keys()
    assert [*losses(out)] == [1, 10, 20, 30, 40, 50, 60]
    assert (out / "model.py").read_bytes() == (ROOT / "model.py").read_bytes()
    with Image.open(out / "samples/step_00000060.png") as grid, Image.open(out / "progress.png") as page:
        assert page.width >= grid.width and page.height > grid.height + 300
        newest = np.asarray(page.convert("RGB"))[-grid.height:, (page.width - grid.width) // 2:][:, :grid.width]
        assert (newest == np.asarray(grid)).all()  # the newest pictures, under the losses


# --- errors ---


@pytest.mark.parametrize("args, words", [
    (["--data=nowhere"], "no prepared data in nowhere"), (["--latent_size=16"], "not 16"),
    (["--data=random"], "for --check alone"), (["--data="], "name prepared folders"),
    (["--mask_ratio=0.99"], "mask_ratio"), (["--num_experts=64", "--depth=4"], "experts 64"),
    (["--device=tpu"], "this machine has"), (["--device=cuda:zz"], "device is 'cuda:zz'"),
    (["--init_from=nowhere"], "no checkpoint nowhere"),
    (["--init_from=runs/xl2_256"], "run `train.py config/xl2_256.py` first"),
    (["--attn_ratio", "1"], "attn_ratio is (1.0,): it needs two numbers"), (["--wandb=mine"], "pip install wandb"),
    (["--unmasked_steps=9"], "must be at most max_steps 8"), ([f"--seed={10 ** 30}"], "it must be >= 0, < 9e18")])
def test_mistakes_stop_before_anything_is_written(fit, tmp_path, args, words):
    assert words in fit(tmp_path / "run", *args, fails=True)
    assert not (tmp_path / "run").exists()


def test_without_data_a_config_names_its_commands(tmp_path):
    message = launch("train.py", "config/tiny.py", cwd=tmp_path, fails=True)
    assert message.endswith("tiny.py: python train_vae.py && python prepare_latents.py --vae runs/vae/vae.safetensors "
                            "--resolutions 64 --out data/shapes64 && python train.py config/tiny.py")
    assert "small.py: python train_va" in launch("train.py", "config/small.py", cwd=tmp_path, fails=True)
    for args in (("config/tiny.py", "--data=my photos"), ("config/xl2_256.py",)):
        message = launch("train.py", *args, cwd=tmp_path, fails=True)
        assert "`python prepare_latents.py --source PICTURES --out" in message and "run the commands" not in message
    assert "--out 'my photos'" in launch("train.py", "--data=my photos", cwd=tmp_path, fails=True)


@pytest.mark.parametrize("error, words", [
    ("RuntimeError('Expected to have finished reduction in the prior iteration')", "gets no gradient, which several"),
    ("RuntimeError('InvalidCxxCompiler: No working C++ compiler found in torch')", "needs a C++ compiler: install g++"),
    ("RuntimeError('Failed to find C compiler. Please specify')", "needs a C++ compiler"),
    ("torch.OutOfMemoryError('CUDA out of memory')", "lower --micro_batch_size"),
    ("RuntimeError('another one')", "")])
def test_errors_of_torch_that_users_can_mend_are_one_line(error, words, tmp_path):
    (tmp_path / "it.py").write_text(f"import torch\nfrom common.processes import run_script\n"
                                    f"def main(): raise {error}\nrun_script('it.py', main)\n")
    printed = launch(tmp_path / "it.py", fails=True, traceback=True)
    assert words in printed and ("Traceback" in printed) == (not words), printed
    assert words == "" or printed.startswith("it.py: ") and len(printed.splitlines()) == 1


def test_starting_from_other_weights(fit, whole, tmp_path):
    fit(tmp_path / "run", f"--init_from={whole}", "--learning_rate=1e-12", "--ema_decay=0", steps=1)
    first, second = ({n: t for n, t in weights(run).items() if n[:6] == "model."} for run in (whole, tmp_path / "run"))
    torch.testing.assert_close(first, second)
    described, tensors = checkpoint.read_checkpoint(whole / LAST, ("",))
    described["settings"]["max_steps"] = 9
    checkpoint.save(tmp_path / LAST, tensors, described)
    for start, *args, words in (
            (whole, "--dim=64", "do not fit this network (dim: 32 there, 64 now)"),
            (whole, "--init_optimizer", "--optimizer=muon", "has no state of the optimizer muon"),
            (tmp_path, "has only reached step 8 of 9: finish that run first")):
        assert words in fit(tmp_path / "third", f"--init_from={start}", *args, fails=True)
        assert not (tmp_path / "third").exists()


def test_data_of_another_autoencoder_is_refused(fit, whole, shapes16, tmp_path):
    other = shutil.copytree(shapes16, tmp_path / "other")
    info = json.loads((other / "dataset.json").read_text())
    info["vae"]["scaling_factor"] = 0.5
    (other / "dataset.json").write_text(json.dumps(info))
    for out, *args in ((tmp_path / "a", f"--val_data={other}"), (tmp_path / "b", f"--data={other}",
                       f"--init_from={whole}"), (whole, *WHOLE, f"--data={other}")):
        assert "was prepared with vae" in fit(out, *args, fails=True)


def test_a_diverged_run_stops_and_says_so(fit, tmp_path):
    printed = fit(tmp_path / "run", "--learning_rate=1e30", "--grad_clip=0", "--warmup_steps=0", "--checkpoint_every=1",
                  steps=20, fails=True, traceback=True)
    for words in ("9 steps skipped", "the last 10 steps", "good checkpoint is", "step_0000001", "learning_rate"):
        assert words in printed and "Traceback" not in printed, printed


def test_processes_that_see_different_disks_are_refused(whole, shapes16, tmp_path):
    """The first process has a checkpoint in its folder, the other has none"""
    (tmp_path / "disk1").mkdir()
    shutil.copytree(whole, tmp_path / "disk0/run")
    (tmp_path / "there.py").write_text("import os, runpy\nos.chdir('disk' + os.environ['RANK'])\n"
                                       f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    message = launch(tmp_path / "there.py", f"--data={shapes16}", *SMALL, *WHOLE, "--out=run", "--max_steps=8",
                     processes=2, fails=True, cwd=tmp_path)
    assert "the nodes see different data or checkpoints" in message and "shared disk" in message
    assert not (tmp_path / "disk1/run").exists()


# --- somebody's own network ---


EDITS = [  # a field in one place, a layer and a buffer, an operation that depends on data, a further loss
    ("    mixer_conv: bool", "    my_width: int = 3      # of my layer\n    mixer_conv: bool"),
    ("        self.modulation = nn.Linear(c.dim, 6 * dim)\n",
     "        self.mine = nn.Sequential(nn.Linear(dim, c.my_width), nn.Linear(c.my_width, dim))\n"
     "        self.register_buffer('seen', torch.zeros(()))\n"
     "        self.modulation = nn.Linear(c.dim, 6 * dim)\n"),
    ("        h = self.neighbours(", "        self.seen += (x > 0).nonzero().shape[0] ** 0\n"
     "        x = x + self.mine(x)\n        h = self.neighbours("),
    ("        x = self.final(x, cond)",
     "        self.extra_loss = x.square().mean() + 100.0\n        x = self.final(x, cond)")]


@pytest.fixture
def mine(tmp_path):
    """The Python files of the repository, copied"""
    for path in (path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"))):
        (tmp_path / "mine" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / "mine" / path)
    return tmp_path / "mine"


def test_a_loss_that_sees_the_clean_latents(fit, mine, tmp_path):
    """The example of docs/settings.md, masked and whole; compiled it is in test_loop.py"""
    edit(mine / "model.py", hunks("docs/settings.md"))
    out = tmp_path / "run"
    fit(out, "--unmasked_steps=2", "--activation_checkpointing", steps=4, script=mine / "train.py", processes=2)
    *steps, last = log_of(out)
    assert len(steps) == 4 and all(0 < entry["extra_loss"] < entry["loss"] for entry in steps) and "val_loss" in last
    assert weights(out)["optimizer.exp_avg.early.weight"].any()


def test_an_edited_network_trains(fit, mine, tmp_path, capsys):
    def train_mine(steps, **kw):
        return fit(out, "--my_width=5", "--schedule=constant", steps=steps, script=mine / "train.py", **kw)

    source, out, copy = edit(mine / "model.py", EDITS), tmp_path / "run", tmp_path / "run/model.py"
    printed = train_mine(4)
    assert "MFU not known" in printed and "Traceback" not in printed and "including an extra loss of 100." in printed
    first, *_, last = log_of(out)
    assert first["loss"] > first["extra_loss"] > 100 > 2 > last["val_loss"]  # it is of training alone
    assert weights(out)["model.blocks.0.mine.0.weight"].shape == (5, 32) and weights(out)["model.blocks.0.seen"] > 0
    assert copy.read_text() == source and "of my layer" in launch(mine / "train.py", "--help")
    with pytest.raises(ValueError, match="unexpected keyword argument 'my_width'"):
        checkpoint.load_network(checkpoint.find(out))
    assert f"was made by another model.py, {copy}" in capsys.readouterr().err
    # another model.py is refused, unless its copy in the folder is deleted
    (mine / "model.py").write_text(source + "\n# edited again\n")
    before = contents(out)
    assert f"model.py differs from {copy}, which made this run: delete that copy" in train_mine(5, fails=True)
    assert contents(out) == before
    copy.unlink()
    assert "going on from step 4" in train_mine(5) and copy.read_text().endswith("# edited again\n")
    # another train.py is a line of warning
    (mine / "training/log.py").write_text((mine / "training/log.py").read_text() + "\n")
    printed = train_mine(6)
    assert printed.count("warning: train.py or training/ has changed") == 1 and "going on from step 5" in printed


def test_a_parameter_without_a_gradient(fit, mine, tmp_path):
    start = "        self.init_weights()\n\n"
    edit(mine / "model.py", [(start, f"        self.unused = nn.Linear(2, 2)\n{start}")])
    assert "done: " in fit(tmp_path / "one", steps=1, script=mine / "train.py")
    message = fit(tmp_path / "two", steps=1, script=mine / "train.py", processes=2, fails=True)
    assert message.startswith("train.py: the parameters unused.bias, unused.weight get no gradient")


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("chosen", ["", "mine"])
def test_what_is_compiled_is_kept_at_home(script, chosen, tmp_path):
    """The script is asked to compile, and ends before it does, as there is nothing to work on"""
    code = (f"import os, runpy, sys\nsys.argv = ['{script}', '--compile', 'true']\ntry:\n"
            f"    runpy.run_path('{ROOT / script}', run_name='__main__')\nexcept SystemExit:\n"
            "    import torch.optim, torch._dynamo\n    print(os.environ['TORCHINDUCTOR_CACHE_DIR'])")
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / chosen)} if chosen else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout.split()[-1] == str(tmp_path / (chosen or ".cache/nanomicrodit")), done.stderr
