"""What a training run lives through: signals, crashes of a process, several nodes."""

import os
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
from training import checkpoint

STEPS = ("--max_steps=48", "--checkpoint_every=16", "--seed=3", "--eval_every=0")
TWO = ("--rdzv-endpoint=localhost:0", "--nproc_per_node=2")


def start(data, out, *torchrun, **env):
    """Start train.py, with arguments of torchrun under that; what it prints goes to OUT.txt."""
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", *torchrun] if torchrun else []
    with open(f"{out}.txt", "a") as log:
        return subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", f"--data={data}", *SMALL, *STEPS,
                                 f"--out={out}"], cwd=WORK.name, stdout=log, stderr=log, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


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


def test_ctrl_c_ends_a_run_with_a_checkpoint(shapes16, tmp_path):
    out, args = tmp_path / "run", ("train.py", f"--data={shapes16}", *SMALL, *STEPS)
    run = start(shapes16, out)
    wait_for_step(out, 5)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 128 + signal.SIGINT
    reached = assert_stopped(out, "SIGINT")
    assert f"going on from step {reached}" in launch(*args, f"--out={out}")
    launch(*args, f"--out={tmp_path / 'whole'}")
    assert_equal(out, tmp_path / "whole")


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
    assert f"going on from step {reached}" in said(out) and "going on from step 16" in said(out)
    launch("train.py", f"--data={shapes16}", *SMALL, *STEPS, f"--out={tmp_path / 'whole'}", processes=2)
    assert_equal(out, tmp_path / "whole")


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
    assert "going on from step 16" in said(out)
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_MAX_RESTARTS": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        machine.shared_store()
