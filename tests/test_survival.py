"""What a training run lives through: signals, crashes, several nodes, and whatever else raises in its loop."""

import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, WORK, launch, log_of, weights
from test_kills import processes

from common import machine
from common.processes import Processes
from training import checkpoint
from training.signals import Signals

STEPS = ("--max_steps=48", "--checkpoint_every=16", "--seed=3", "--eval_every=0")
TWO = ("--rdzv-endpoint=localhost:0", "--nproc_per_node=2")


def start(data, out, *torchrun, more=(), stdout=None, stderr=None, **env):
    """Start train.py, with arguments of torchrun under that; what it prints goes to OUT.txt."""
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", *torchrun] if torchrun else []
    with open(f"{out}.txt", "a") as log:
        return subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", f"--data={data}", *SMALL, *STEPS,
                                 *more, f"--out={out}"], cwd=WORK.name, stdout=stdout or log, stderr=stderr or log,
                                start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def said(out):
    return Path(f"{out}.txt").read_text()


def wait_for_step(out, step, seconds=90):
    deadline = time.time() + seconds
    while not (out / "log.jsonl").exists() or not (log := log_of(out)) or log[-1]["step"] < step:
        assert time.time() < deadline, said(out)
        time.sleep(0.02)


def workers(out, *launchers):
    """The numbers of the run's processes without those of its launchers"""
    return [pid for pid in processes(f"--out={out}") if pid not in [p.pid for p in launchers]]


def assert_stopped(out, name):
    """It ended after a step whose checkpoint is there, and said how to go on -> that step"""
    assert f"stopped by {name}. The same command goes on" in said(out), said(out)
    reached = checkpoint.step_of(checkpoint.steps_of(out)[-1])
    assert log_of(out)[-1]["step"] == reached < 48 and not workers(out)
    return reached


def assert_equal(run, whole):
    a, b = weights(run), weights(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def whole(shapes16, tmp_path_factory):
    """A run that was left alone"""
    out = tmp_path_factory.mktemp("whole") / "run"
    launch("train.py", f"--data={shapes16}", *SMALL, *STEPS, f"--out={out}")
    return out


def test_ctrl_c_ends_a_run_with_a_checkpoint(shapes16, whole, tmp_path):
    out, args = tmp_path / "run", ("train.py", f"--data={shapes16}", *SMALL, *STEPS)
    run = start(shapes16, out)
    wait_for_step(out, 5)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 128 + signal.SIGINT
    reached = assert_stopped(out, "SIGINT")
    assert f"going on from step {reached}" in launch(*args, f"--out={out}")
    assert_equal(out, whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signals_that_stop_a_run(name):
    number, before = getattr(signal, name), {n: signal.getsignal(n) for n in signal.valid_signals()}
    try:
        signals = Signals(Processes(0, 1))
        assert not signals.agreed()
        os.kill(os.getpid(), number)
        assert signals.agreed() == number
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        signals = Signals(Processes(0, 1))
        os.kill(os.getpid(), signal.SIGHUP)
        assert not signals.agreed()
    finally:
        for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(n, before[n])


def test_outputs_that_go_away_end_no_run(shapes16, whole, tmp_path):
    """A closed pipe and a closed terminal, as of `| tee log` and of what goes on after the window; and a full disk"""
    master, terminal = pty.openpty()
    runs = [start(shapes16, tmp_path / "gone", stdout=subprocess.PIPE, stderr=terminal)]
    with open("/dev/full", "w") as full:
        runs += [start(shapes16, tmp_path / "full", stdout=full),
                 start(shapes16, tmp_path / "both", stdout=full, stderr=full)]
    assert b"steps of 16" in runs[0].stdout.readline()
    runs[0].stdout.close()
    os.close(terminal)
    os.close(master)
    wait_for_step(tmp_path / "gone", 5)
    runs[0].send_signal(signal.SIGINT)  # to say so fails, too
    assert [run.wait(60) for run in runs] == [128 + signal.SIGINT, 0, 0]
    assert checkpoint.step_of(checkpoint.steps_of(tmp_path / "gone")[-1]) == log_of(tmp_path / "gone")[-1]["step"] < 48
    assert said(tmp_path / "full").count("No space left") == 1, said(tmp_path / "full")
    for name in ("full", "both"):
        assert_equal(tmp_path / name, whole)


def test_data_that_go_away_end_a_run_with_a_checkpoint(shapes16, whole, tmp_path):
    out, data = tmp_path / "run", shutil.copytree(shapes16, tmp_path / "data")
    run = start(data, out)
    wait_for_step(out, 5)
    with open(data / "00000.captions.npy", "r+b") as file:
        content = file.read()
        file.truncate(1000)
    assert run.wait(60) == 1 and "captions.npy was cut short" in said(out)
    reached = checkpoint.step_of(checkpoint.steps_of(out)[-1])
    assert f"step {reached} was saved before this:" in said(out) and log_of(out)[-1]["step"] == reached < 48
    (data / "00000.captions.npy").write_bytes(content)
    assert f"going on from step {reached}" in launch("train.py", f"--data={data}", *SMALL, *STEPS, f"--out={out}")
    assert_equal(out, whole)


FAILING = {  # what raises in a run's loop, and is worth no run: (code that makes it raise, what is said)
    "wandb": ("sys.modules['wandb'] = fake; fake.init = lambda **kw: fake; fake.log = fail", "Weights & Biases"),
    "its start": ("sys.modules['wandb'] = fake; fake.init = fail", "Weights & Biases"),
    "pictures": ("report.draw_latents = fail", "a grid of sample pictures"),
    "memory": ("report.decode_images = lambda *_: fail(torch.OutOfMemoryError('no memory'))", "a grid of sample"),
    "validation": ("report.edm_loss = fail", "validation"), "plot": ("report.line_plot = fail", "progress.png"),
    "log": ("log.append_lines = lambda *_: fail(OSError('no disk'))", "log.jsonl")}


def train_after(code, folder, *args):
    """Run train.py into folder/run after some code, and return what it printed."""
    (folder / "after.py").write_text(f"""import importlib.machinery, runpy, sys, types
import torch
from training import log, report
def fail(error=None, *args, **kw): raise error if isinstance(error, Exception) else RuntimeError("broken")
fake = types.ModuleType("wandb")
fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
{code}
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    return launch(folder / "after.py", *SMALL, *args, f"--out={folder / 'run'}")


@pytest.mark.parametrize("name", FAILING)
def test_what_is_not_worth_a_run(name, shapes16, whole, tmp_path):
    """It is said once, and the run ends as if nothing had happened"""
    code, words = FAILING[name]
    more = ["--wandb=mine"] if "wandb" in code else []
    printed = train_after(code, tmp_path, f"--data={shapes16}", *STEPS, "--sample_every=12", "--eval_every=12", *more)
    assert printed.count("Training goes on") == 1 and words in printed, printed
    assert_equal(tmp_path / "run", whole)


def test_an_id_at_weights_and_biases_is_that_of_the_run(shapes16, tmp_path):
    """A run that is begun anew in a folder is another, and one that goes on is the same"""
    code = "sys.modules['wandb'] = fake; fake.init = lambda **kw: print(kw['id']) or fake; fake.log = print"
    ids = []
    for steps in (4, 8, 4):
        if len(ids) == 2:
            shutil.rmtree(tmp_path / "run")
        printed = train_after(code, tmp_path, f"--data={shapes16}", f"--max_steps={steps}", "--schedule=constant",
                              "--wandb=mine")
        ids += re.findall("^[0-9a-f]{16}$", printed, re.M)
        assert f'"id": "{ids[-1]}"' in (tmp_path / "run/run.json").read_text()
    assert ids[0] == ids[1] != ids[2]


def test_two_processes_live_through_a_signal_and_a_crash(shapes16, tmp_path):
    out = tmp_path / "run"
    run = start(shapes16, out, *TWO)
    wait_for_step(out, 5)
    os.kill(workers(out, run)[-1], signal.SIGTERM)  # the other process has to hear of it from this one
    assert run.wait(60) != 0
    reached = assert_stopped(out, "SIGTERM")
    run = start(shapes16, out, *TWO, "--max-restarts=2")
    wait_for_step(out, 18)
    os.kill(workers(out, run)[-1], signal.SIGKILL)
    assert run.wait(120) == 0, said(out)
    assert f"going on from step {reached}" in said(out)
    assert int(re.findall(r"going on from step (\d+)", said(out))[-1]) >= 16  # the other process may save what was done
    launch("train.py", f"--data={shapes16}", *SMALL, *STEPS, f"--out={tmp_path / 'whole'}", processes=2)
    assert_equal(out, tmp_path / "whole")


def test_processes_whose_launcher_is_gone_save_their_last_step(shapes16, tmp_path):
    """SIGUSR1, as a cluster sends it before the time is up, ends torchrun at once"""
    out = tmp_path / "run"
    run = start(shapes16, out, *TWO, more=("--max_steps=50000", "--checkpoint_every=0"))
    wait_for_step(out, 5)
    run.send_signal(signal.SIGUSR1)
    run.wait(60)
    deadline = time.time() + 30
    while workers(out, run):
        assert time.time() < deadline, said(out)
        time.sleep(0.1)
    assert 4 < checkpoint.step_of(checkpoint.steps_of(out)[-1]) == log_of(out)[-1]["step"] < 50000, said(out)


def test_two_nodes_come_back_after_a_crash(shapes16, tmp_path, monkeypatch):
    """Two agents on this machine, one process each; the crash of one process starts both again"""
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        port = opened.getsockname()[1]
    out, nodes = tmp_path / "run", ("--nnodes=2", "--nproc_per_node=1", "--max-restarts=2", "--rdzv-id=a")
    agents = [start(shapes16, out, *nodes, f"--rdzv-endpoint=localhost:{port}",
                    TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for _ in range(2)]
    wait_for_step(out, 18)
    os.kill(workers(out, *agents)[-1], signal.SIGKILL)
    assert [agent.wait(120) for agent in agents] == [0, 0], said(out)
    assert int(re.findall(r"going on from step (\d+)", said(out))[-1]) >= 16
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_MAX_RESTARTS": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        machine.shared_store()
