"""What a training run lives through: signals, crashes of a process, gradients that are not finite. And what a step is:
one graph, no waiting for the device.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, launch
from safetensors.torch import load_file
from test_kills import processes
from test_train import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from training import checkpoint
from training.batches import Batches
from training.dataset import Dataset, Rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes16"
    launch("prepare_latents.py", "--out", folder, "--limit=120", "--resolutions", "16")
    return folder


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


def last(folder):
    return load_file(checkpoint.steps_of(folder)[-1])


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


STEPS = ("--max_steps=80", "--checkpoint_every=1000", "--seed=3")


@pytest.mark.parametrize("nproc, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_a_run_with_a_checkpoint(data, tmp_path, nproc, number):
    out = tmp_path / "run"
    run = start(data, out, *STEPS, nproc=nproc)
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
    assert logged[-1] == reached < 80 and not processes(str(out))
    if nproc == 1:
        assert run.returncode == 128 + number
    assert start(data, out, *STEPS, nproc=nproc).wait(120) == 0
    assert f"going on from step {reached}" in Path(f"{out}.txt").read_text()
    whole = tmp_path / "whole"
    assert start(data, whole, *STEPS, nproc=nproc).wait(120) == 0
    assert_equal(last(out), last(whole))


def test_a_crashed_process_is_started_again_and_goes_on(data, tmp_path):
    out = tmp_path / "run"
    launch("train.py", f"--data={data}", *SMALL, f"--out={out}", "--max_steps=1")  # to be deleted by --overwrite, once
    (out / "log.jsonl").unlink()
    steps = ("--max_steps=80", "--checkpoint_every=20", "--seed=3")
    run = start(data, out, *steps, "--overwrite", restarts=2)
    wait_for_step(out, 30)
    ranks = [pid for pid in processes(str(out)) if pid != run.pid]
    os.kill(ranks[-1], signal.SIGKILL)
    assert run.wait(120) == 0
    text = Path(f"{out}.txt").read_text()
    assert "going on from step" in text, text
    assert start(data, tmp_path / "whole", *steps).wait(120) == 0
    assert_equal(last(out), last(tmp_path / "whole"))


# --- inside a step ---------------------------------------------------------------------------------------------------


context = contextlib.nullcontext
TINY = model.MicroDiTConfig(latent_size=8, latent_channels=12, caption_dim=128, dim=32, depth=2, head_dim=8,
                            mlp_multiple=8, mixer_depth=1, mixer_dim=16, num_experts=2)  # fmt: skip


@pytest.fixture
def trainer(monkeypatch, data):
    """(trainer, micro-batches): one micro-batch of four pictures a step"""
    for name, value in {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.9}.items():
        monkeypatch.setattr(train, name, value)
    made = train.Trainer(TINY, torch.device("cpu"), {"data": {}})
    rows = Rows([range(100)])
    return made, Batches(Dataset(data, 8), rows, 4, 1, TINY.tokens, 0, -0.6, 1.2, 0.1)


def step(made, batches, number, net=None, masked=True):
    made.accumulate(made.net if net is None else net, batches(number, 0), 1, masked, context)
    made.update(1e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_finite_gradients_changes_nothing(monkeypatch, data, optimizer):
    monkeypatch.setattr(train, "optimizer", optimizer)
    for name, value in {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "ema_decay": 0.9}.items():
        monkeypatch.setattr(train, name, value)
    batches = Batches(Dataset(data, 8), Rows([range(100)]), 4, 1, TINY.tokens, 0, -0.6, 1.2, 0.1)
    made = train.Trainer(TINY, torch.device("cpu"), {"data": {}})
    for i in range(3):
        step(made, batches, i)
    state = [t.clone() for t in made.net.parameters()] + [t.clone() for t in made.ema.parameters()]
    moments = [v.clone() for opt, _ in made.optimizers for s in opt.state.values() for v in s.values()]
    for i, value in enumerate((float("nan"), float("inf"))):
        batch = batches(3 + i, 0)
        batch["latents"][1, 0, 0, 0] = value
        made.accumulate(made.net, batch, 1, True, context)
        made.update(1e-2)
        assert int(made.skipped) == int(made.skipped_in_a_row) == i + 1
    after = [*made.net.parameters(), *made.ema.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(state, after))
    assert all(torch.equal(a, b) for a, b in zip(moments, (v for opt, _ in made.optimizers for s in opt.state.values()
                                                           for v in s.values())))  # fmt: skip
    assert made.sums.isfinite().all() and int(made.sums[1].sum()) == 4 * 3 + 2 * 3
    step(made, batches, 5)
    assert int(made.skipped) == 2 and int(made.skipped_in_a_row) == 0
    assert not any(torch.equal(a, b) for a, b in zip(state, made.net.parameters()) if a.ndim > 1)


def test_such_steps_are_shown_and_many_in_a_row_end_the_run(monkeypatch, trainer, tmp_path, capsys):
    made, batches = trainer
    monkeypatch.setattr(train, "max_steps", 50)
    monkeypatch.setattr(train, "price", 3.0)
    meter = train.Meter(made, torch.device("cpu"), False, 1)
    (tmp_path / "step_00000001.safetensors").write_bytes(b"")
    log = train.Log(tmp_path, 0, True)
    for i in range(train.MOST_SKIPPED):
        batch = batches(i, 0)
        batch["latents"] *= float("nan") if i else 1
        made.accumulate(made.net, batch, 1, True, context)
        made.update(1e-2)
    train.report(made, log, meter, 1e-2, True, torch.device("cpu"), 1)
    line = capsys.readouterr().out
    assert (
        all(word in line for word in ("9 steps skipped", "MFU", "images/s", "$")) and "nan" not in line.split("grad")[0]
    )
    made.accumulate(made.net, batch, 1, True, context)
    made.update(1e-2)
    with pytest.raises(ValueError, match="last 10 steps .*step_00000001.safetensors"):
        train.report(made, log, meter, 1e-2, True, torch.device("cpu"), 1)


class Reads(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor, which on a GPU waits for the device"""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_step_reads_nothing_from_the_device(monkeypatch, trainer, masked, optimizer):
    monkeypatch.setattr(train, "optimizer", optimizer)
    made, batches = trainer
    made.optimizers = made.make_optimizers(True)
    step(made, batches, 0, masked=masked)  # the optimizer makes its state
    ready = batches(1, 0)  # the host's own work, which a thread does beforehand
    with Reads() as reads:
        made.accumulate(made.net, ready, 1, masked, context)
        made.update(1e-2)
    assert not reads.found
    with Reads() as reads:  # the counter counts
        made.grad_norm.item()
    assert len(reads.found) == 1


def test_one_graph_and_no_recompilation(trainer):
    made, batches = trainer
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = torch.compile(made.net, backend=backend, fullgraph=True)
    for i in range(4):
        step(made, batches, i, net, masked=True)
    assert len(graphs) == 1
    for i in range(4, 8):
        step(made, batches, i, net, masked=False)
    assert len(graphs) == 2  # the unmasked part has shapes of its own
    for i in range(8, 12):
        step(made, batches, i, net, masked=bool(i % 2))
    assert len(graphs) == 2


def test_activation_checkpointing_gives_the_same_gradients(trainer):
    made, batches = trainer
    for _ in range(2):
        step(made, batches, 0)  # away from the zeros of the start
    grads = []
    for made.net.activation_checkpointing in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            made.accumulate(made.net, batches(7, 0), 1, True, context)
        grads.append(([p.grad.clone() for p in made.net.parameters()], sum(saved)))
        made.net.zero_grad()
    for a, b in zip(grads[0][0], grads[1][0]):
        torch.testing.assert_close(a, b)
    assert grads[1][1] < 0.5 * grads[0][1]


def test_weights_and_biases_is_optional(data, tmp_path, monkeypatch):
    message = launch("train.py", f"--data={data}", *SMALL, f"--out={tmp_path / 'run'}", "--max_steps=2", "--wandb=mine",
                     fails=True)  # fmt: skip
    assert "pip install wandb" in message
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "wandb.py").write_text(
        "import json\n"
        "def init(**kw):\n    print('init', kw['project'], kw['name'], kw['config']['max_steps'])\n    return Run()\n"
        "class Run:\n    def log(self, values, step):\n        print('logged', step, json.dumps(sorted(values)))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(fake))
    printed = launch("train.py", f"--data={data}", *SMALL, f"--out={tmp_path / 'run'}", "--max_steps=2", "--wandb=mine")
    assert "init mine run 2" in printed and "logged 2" in printed and "val_loss" in printed
