"""What a training run lives through: signals, crashes of a process, several nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, launch, weights
from test_kills import processes

from training import checkpoint


def start(data, out, *args, nproc=2, restarts=0):
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                    f"--nproc_per_node={nproc}", f"--max-restarts={restarts}"]  # fmt: skip
    command += ["train.py", f"--data={data}", *SMALL, "--eval_every=0", *args, f"--out={out}"]
    log = open(f"{out}.txt", "w")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True)  # fmt: skip


def wait_for_step(out, step, seconds=60):
    deadline = time.time() + seconds
    while time.time() < deadline:
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(Path(f"{out}.txt").read_text())


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


STEPS = ("--max_steps=60", "--checkpoint_every=1000", "--seed=3")


@pytest.mark.parametrize("nproc, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_a_run_with_a_checkpoint(shapes16, tmp_path, nproc, number):
    out = tmp_path / "run"
    run = start(shapes16, out, *STEPS, nproc=nproc)
    wait_for_step(out, 5)
    if nproc == 1:
        run.send_signal(number)
    else:  # one of the processes alone: the other has to hear of it from that
        os.kill([pid for pid in processes(str(out)) if pid != run.pid][-1], number)
    assert run.wait(60) != 0
    text = Path(f"{out}.txt").read_text()
    assert f"stopped by {number.name}. The same command goes on" in text, text
    (saved,) = checkpoint.steps_of(out)
    reached = checkpoint.read(saved, ("none",))[0]["step"]
    logged = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert logged[-1] == reached < 60 and not processes(str(out))
    if nproc == 1:
        assert run.returncode == 128 + number
    assert start(shapes16, out, *STEPS, nproc=nproc).wait(120) == 0
    assert f"going on from step {reached}" in Path(f"{out}.txt").read_text()
    whole = tmp_path / "whole"
    assert start(shapes16, whole, *STEPS, nproc=nproc).wait(120) == 0
    assert_equal(weights(out), weights(whole))


def test_a_crashed_process_is_started_again_and_goes_on(shapes16, tmp_path):
    out = tmp_path / "run"
    launch("train.py", f"--data={shapes16}", *SMALL, f"--out={out}", "--max_steps=1")  # for --overwrite to delete, once
    (out / "log.jsonl").unlink()
    steps = ("--max_steps=80", "--checkpoint_every=20", "--seed=3")
    run = start(shapes16, out, *steps, "--overwrite", restarts=2)
    wait_for_step(out, 30)
    ranks = [pid for pid in processes(str(out)) if pid != run.pid]
    os.kill(ranks[-1], signal.SIGKILL)
    assert run.wait(120) == 0
    text = Path(f"{out}.txt").read_text()
    assert "going on from step" in text, text
    assert start(shapes16, tmp_path / "whole", *steps).wait(120) == 0
    assert_equal(weights(out), weights(tmp_path / "whole"))


def free_port():
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


def test_two_nodes_come_back_after_a_crash(shapes16, tmp_path):
    """Two agents on this machine, one process each; the crash of one process starts both again"""
    out, port = tmp_path / "run", free_port()
    nodes = ["--nnodes=2", "--nproc_per_node=1", "--max-restarts=2", "--rdzv-backend=c10d",
             f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=a", "train.py", f"--data={shapes16}", *SMALL,
             "--eval_every=0", "--max_steps=60", "--checkpoint_every=20", f"--out={out}"]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes]

    def agents(**env):
        with open(f"{out}.txt", "a") as log:
            return [subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                                     env=os.environ | {"OMP_NUM_THREADS": "1"} | env) for _ in range(2)]

    assert all(agent.wait(60) for agent in agents())
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in Path(f"{out}.txt").read_text()
    running = agents(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    wait_for_step(out, 25)
    workers = [pid for pid in processes(str(out)) if pid not in [agent.pid for agent in running]]
    os.kill(workers[-1], signal.SIGKILL)
    assert [agent.wait(120) for agent in running] == [0, 0], Path(f"{out}.txt").read_text()
    assert "going on from step 20" in Path(f"{out}.txt").read_text()


def test_weights_and_biases_is_optional(shapes16, tmp_path):
    args = ("train.py", f"--data={shapes16}", *SMALL, f"--out={tmp_path / 'run'}", "--max_steps=2", "--wandb=mine")
    assert "pip install wandb" in launch(*args, fails=True)
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "wandb.py").write_text(
        "import json\n"
        "def init(**kw):\n    print('init', kw['project'], kw['name'], kw['config']['max_steps'])\n    return Run()\n"
        "class Run:\n    def log(self, values, step):\n        print('logged', step, json.dumps(sorted(values)))\n")
    printed = launch(*args, env={"PYTHONPATH": str(fake)})
    assert "init mine run 2" in printed and "logged 2" in printed and "val_loss" in printed
