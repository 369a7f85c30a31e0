"""Nothing lost, nothing silently wrong: two at once, --overwrite, damage on the disk, numbers that are not finite."""
import json
import math
import os
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch, log_of, weights
from safetensors.torch import save_file

import prepare_latents
from common.files import HELD, append_lines, lock, read_jsonl
from training import checkpoint, state
from training.dataset import Dataset
from training.log import Log

PREPARE = ("--limit=60", "--resolutions", "16", "--shard_size=10", "--workers=0")


@pytest.fixture
def fit(shapes16):
    def run(out, *args, steps=8, **kw):
        return launch("train.py", f"--data={shapes16}", f"--out={out}", *SMALL, f"--max_steps={steps}", *args, **kw)
    return run


@pytest.fixture(scope="module")
def whole(shapes16, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    launch("train.py", f"--data={shapes16}", f"--out={out}", *SMALL, "--max_steps=8")
    return out


@pytest.fixture
def data(shapes16, tmp_path):
    return shutil.copytree(shapes16, tmp_path / "data")


def steps_in(folder):
    return [int(path.stem[5:]) for path in checkpoint.steps_of(folder)]


# --- two at once -----------------------------------------------------------------------------------------------------


def test_a_folder_is_one_processs_until_it_ends(tmp_path, fit, monkeypatch):
    code = "import sys; from common.files import lock; lock(sys.argv[1]); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"is in use by process {other.pid} on "):
        lock(tmp_path, patience=0.3)
    assert f"is in use by process {other.pid}" in fit(tmp_path, fails=True)
    monkeypatch.setattr(state, "lock", partial(lock, patience=0.1))
    with pytest.raises(ValueError, match="is in use by"):  # of a run that found no folder when it started
        state.State(None, None, None, step=1).begin(tmp_path)
    other.kill()
    lock(tmp_path)
    lock(tmp_path)  # again is no matter
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    HELD.pop(tmp_path).close()
    lock(tmp_path / "not there", create=False)
    assert not (tmp_path / "not there").exists()


def test_where_there_are_no_locks_it_says_so(tmp_path, monkeypatch, capsys):
    import fcntl

    def fail(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", fail)
    lock(tmp_path)
    assert "cannot be locked" in capsys.readouterr().err
    HELD.pop(tmp_path).close()


def test_the_same_preparation_started_twice_loses_nothing(tmp_path):
    command = [sys.executable, "prepare_latents.py", f"--out={tmp_path / 'd'}", *PREPARE]
    both = [subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                             stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    said = [p.communicate() for p in both]
    assert any(p.returncode == 0 for p in both), said
    for p, (out, err) in zip(both, said):
        assert "already prepared" in out or "60 rows" in out if p.returncode == 0 else "in use by" in err
    assert len(Dataset(tmp_path / "d", 8)) == 60 and not list((tmp_path / "d").glob("*.done.json"))


def test_a_shard_that_has_gone_is_noticed_at_the_end(tmp_path, monkeypatch):
    launch("prepare_latents.py", f"--out={tmp_path}", *PREPARE)
    info = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "00002.captions.npy").unlink()
    assert [p.name for p in prepare_latents.shards.missing(tmp_path, info)] == ["00002.captions.npy"]


# --- --overwrite -----------------------------------------------------------------------------------------------------


def test_overwrite_goes_on_with_this_very_run_and_replaces_others(fit, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "step_00000008.safetensors").unlink()
    assert "going on from step 4" in fit(run, "--overwrite")  # a job that is started again with its command
    assert steps_in(run) == [4, 8]
    printed = fit(run, "--overwrite")  # it is finished
    assert "going on" not in printed and [e["step"] for e in log_of(run) if "loss" in e] == [*range(1, 9)]
    (run / "samples").mkdir()
    for name in ("samples/mine.png", "notes.txt", "step_1.txt", "step_00000009.safetensors"):
        (run / name).write_bytes(b"mine")
    save_file({"a": torch.zeros(1)}, run / "step_00000009.safetensors")  # another program's
    for name in ("samples/strip.png", "samples/step_00000004.png"):
        (run / name).write_bytes(b"ours")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    for refused in (("--seed=-1",), ("--mixer_depth=-1",), ("--init_from=nowhere",), ("--data=nowhere",)):
        fit(run, "--overwrite", *refused, fails=True)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    fit(run, "--overwrite", "--seed=5", f"--init_from={run / 'step_00000008.safetensors'}", steps=4)
    assert steps_in(run) == [4, 9] and [p.name for p in (run / "samples").iterdir()] == ["mine.png"]
    assert (run / "notes.txt").exists() and len([e for e in log_of(run) if "loss" in e]) == 4


def test_overwrite_goes_on_with_this_very_preparation(tmp_path):
    launch("prepare_latents.py", f"--out={tmp_path}", *PREPARE)
    info = json.loads((tmp_path / "dataset.json").read_text())
    first = (tmp_path / "00000.latents16.npy").stat().st_mtime_ns
    (tmp_path / "dataset.json").write_text(json.dumps(info | {"complete": False, "shards": [], "rows": 0}))
    for part in range(2):
        record = {"part": part, "shard": 0, "last": True, "rows": 10, "samples": 10, "skipped": {}, "words": [],
                  "captions_cut": 0}
        (tmp_path / f"0000{part}.done.json").write_text(json.dumps(record))
        (tmp_path / f"0000{part}.skipped.jsonl").write_text("")
    (tmp_path / "mine.txt").write_text("mine")
    launch("prepare_latents.py", f"--out={tmp_path}", *PREPARE, "--overwrite")
    assert (tmp_path / "00000.latents16.npy").stat().st_mtime_ns == first
    launch("prepare_latents.py", f"--out={tmp_path}", *PREPARE, "--overwrite", "--vae=nowhere", fails=True)
    assert len(Dataset(tmp_path, 8)) == 60
    launch("prepare_latents.py", f"--out={tmp_path}", *PREPARE, "--overwrite", "--first_seed=7")
    assert (tmp_path / "00000.latents16.npy").stat().st_mtime_ns != first and (tmp_path / "mine.txt").exists()


# --- what is not finite ----------------------------------------------------------------------------------------------


def test_data_that_are_not_finite_are_blamed(data, tmp_path):
    file = next(data.glob("*.latents16.npy"))
    array = np.load(file)
    array[:, 0, 0, 0] = np.nan
    np.save(file, array)
    printed = launch("train.py", f"--data={data}", f"--out={tmp_path / 'run'}", *SMALL, "--max_steps=40", fails=True)
    assert "The data are not finite" in printed and file.name in printed


@pytest.mark.parametrize("factor", ["1e30", "1e-30"])
def test_a_scaling_factor_that_cannot_be_right(tmp_path, factor):
    message = launch("prepare_latents.py", f"--out={tmp_path}", *PREPARE, f"--scaling_factor={factor}", fails=True)
    assert "scaling factor" in message and not json.loads((tmp_path / "dataset.json").read_text())["complete"]


def test_a_picture_whose_latents_are_not_finite_is_skipped(tmp_path, monkeypatch):
    for name, value in (("resolutions", (16,)), ("batch_size", 4), ("caption_dtype", "float16"), ("flips", False),
                        ("shifts", 0)):
        monkeypatch.setattr(prepare_latents, name, value)

    class Odd:
        scaling_factor = 1.0

        def encode(self, images, draws):
            latents = images[:, :, :8, :8].clone()
            latents[images[:, 0, 0, 0] > 0.9] = math.inf
            return latents
    bar = type("Bar", (), {"update": lambda self: None})()
    writer = prepare_latents.ShardWriter(tmp_path, Odd(), lambda texts: torch.ones(len(texts), 2, 3), "cpu", bar)
    for i, color in enumerate((0, 0, 255, 30, 90)):
        writer.add(f"{i}.png", (16, 16, [np.full((16, 16, 3), color, np.uint8)]), "a")
    writer.write(0, 0, True)
    assert [entry["reason"] for entry in read_jsonl(tmp_path / "00000.skipped.jsonl")] == ["its latents are not finite"]
    assert np.load(tmp_path / "00000.latents16.npy").shape == (4, 3, 8, 8)
    assert [row["source"] for row in read_jsonl(tmp_path / "00000.rows.jsonl")] == [f"{i}.png" for i in (0, 1, 3, 4)]


def test_weights_that_are_not_finite_draw_nothing(whole, tmp_path):
    path = checkpoint.steps_of(whole)[-1]
    run, tensors = checkpoint.read(path, ("",))
    tensors["ema.final.linear.bias"][0] = math.nan
    checkpoint.save(tmp_path / path.name, tensors, run)
    message = launch("sample.py", f"--checkpoint={tmp_path}", "--prompt=a", f"--out={tmp_path / 'o'}", fails=True)
    assert "tensor final.linear.bias is not finite" in message


# --- damage and change -----------------------------------------------------------------------------------------------


def test_a_checkpoint_of_zeros_is_noticed(fit, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    last = checkpoint.steps_of(run)[-1]
    content = last.read_bytes()
    last.write_bytes(content[:len(content) // 2] + bytes(len(content) - len(content) // 2))
    printed = fit(run)
    assert "is cut short or damaged" in printed and "going on from step 4" in printed
    assert all(torch.equal(a, weights(run)[n]) for n, a in weights(whole).items())
    last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = fit(tmp_path / "next", f"--init_from={last}", fails=True)
    assert "not what was written" in message


def test_growing_a_schedule_is_said_with_its_numbers(fit, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    printed = fit(run, steps=12)
    assert "max_steps was 8 and is 12 now, so the learning rate goes from 1.18e-03 to 1.82e-03" in printed, printed
    assert "--schedule constant" in printed and "dropped again" not in printed
    run = tmp_path / "masked"
    fit(run, "--schedule=constant", "--unmasked_steps=2")
    assert "max_steps was" not in fit(run, "--schedule=constant", "--unmasked_steps=2")
    assert "patches are dropped again until step 10" in fit(run, "--schedule=constant", "--unmasked_steps=2", steps=12)


def test_a_full_disk_costs_no_run_for_its_log(tmp_path, capsys):
    (tmp_path / "log.jsonl").mkdir()  # as good as a full disk
    log = Log(tmp_path, 0)
    log("first", step=1)
    assert "log.jsonl could not be written" in capsys.readouterr().err
    (tmp_path / "log.jsonl").rmdir()
    log("second", step=2)
    assert log_of(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_grid_that_cannot_be_written_costs_no_run(fit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").write_text("no folder")
    (tmp_path / "run/progress.png").mkdir()
    printed = fit(tmp_path / "run", "--sample_every=4", "--sample_steps=1")
    assert "done: " in printed and "samples could not be written" in printed and "progress.png could not be" in printed


def test_a_line_is_appended_whole_or_not_at_all(tmp_path, monkeypatch):
    append_lines(tmp_path / "a", [{"a": 1}])
    with pytest.raises(OSError):
        append_lines("/dev/full", [{"b": 2}])
    assert read_jsonl(tmp_path / "a") == [{"a": 1}]


def test_data_that_are_not_the_runs_are_refused(fit, whole, data, tmp_path):
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(info | {"source_hash": "another"}))
    assert "source_hash" in launch("train.py", f"--data={data}", f"--out={shutil.copytree(whole, tmp_path / 'run')}",
                                   *SMALL, "--max_steps=12", fails=True)


def test_data_prepared_anew_under_a_run_are_noticed(data):
    dataset = Dataset(data, 8)
    dataset.read([0])
    file = next(data.glob("*.captions.npy"))
    content = file.read_bytes()
    time.sleep(0.01)
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(ValueError, match="was written anew since this run has begun"):
        dataset.read([0])


def test_arrays_in_another_order_and_pipes_are_refused(data):
    file = next(data.glob("*.captions.npy"))
    np.save(file, np.asfortranarray(np.load(file)))
    with pytest.raises(ValueError, match="Fortran"):
        Dataset(data, 8)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="missing or cut short"):
        Dataset(data, 8)


def test_a_vocabulary_that_no_header_holds_is_left_out(data, tmp_path):
    info = json.loads((data / "dataset.json").read_text())
    (data / "dataset.json").write_text(json.dumps(info | {"words": [f"w{i}" for i in range(100_001)]}))
    launch("train.py", f"--data={data}", f"--out={tmp_path / 'run'}", *SMALL, "--max_steps=1")
    assert checkpoint.read(checkpoint.steps_of(tmp_path / "run")[0])[0]["data"]["words"] == []


def test_a_model_py_that_is_not_a_runs_is_never_overwritten(fit, tmp_path):
    (tmp_path / "model.py").write_text("mine")
    for extra in ((), ("--overwrite",)):
        assert "no run's folder" in fit(tmp_path, *extra, fails=True)
    assert "no run's folder" in fit(".", "--overwrite", fails=True)  # the code's own folder
    assert (tmp_path / "model.py").read_text() == "mine" and (ROOT / "model.py").stat().st_size > 20_000


def test_going_back_sets_later_checkpoints_aside_once(fit, whole, tmp_path):
    run, args = shutil.copytree(whole, tmp_path / "run"), ("--go_back=4", "--learning_rate=1e-3", "--seed=5")
    message = fit(run, "--go_back=3", "--seed=5", fails=True)
    assert "go_back: there is no" in message and "step_00000004.safetensors, step_00000008.safetensors" in message
    assert "has no checkpoint" in fit(tmp_path / "none", "--go_back=3", fails=True)
    assert steps_in(run) == [4, 8]
    assert "going on from step 4" in fit(run, *args)
    assert steps_in(run) == [4, 8] and (run / "step_00000008.aside").exists()
    before, after = ({e["step"]: e["loss"] for e in log_of(folder) if "loss" in e} for folder in (whole, run))
    assert list(after) == list(before) and after[4] == before[4] and after[5] != before[5]
    assert "going on from step 8" in fit(run, *args, steps=12)  # with the same command, and not back again


def test_check_tries_everything_and_writes_nothing(fit, small_disk, tmp_path):
    out = tmp_path / "run"
    printed = fit(out, "--check", "--unmasked_steps=4", "--price=2", "--micro_batch_size=8", processes=2)
    for words in ("links: 2 processes", "\nmasked: ", "\nunmasked: ", "memory: ", "disk: checkpoints of 1 MB",
                  "in all: ", "$0", "Nothing was written"):
        assert printed.count(words) == 1, words
    assert not out.exists()
    assert "3 more checkpoints of 1 MB do not fit on the disk of" in fit(small_disk(1) / "run", "--check", fails=True)
