"""A step of train.py's loop: one graph, no wait for the device, nothing at all if a gradient is not finite; the parts
that it calls."""

import math
import os
import stat
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from common.files import write_json
from common.schema import COUNT
from configurator import script_settings
from training import checkpoint, state
from training.batches import Batches, prefetched, to_device
from training.dataset import Dataset, Rows, write_shard
from training.log import BINS, Log, Losses, Meter, by_level, noise_bins
from training.optimizer import Average, Muon, Optimizer, orthogonal
from training.processes import Processes
from training.report import Report
from training.state import State

CPU = Processes(0, 1, torch.device("cpu"))
TINY = model.MicroDiTConfig(latent_size=8, latent_channels=12, caption_dim=128, dim=32, depth=2, head_dim=8,
                            mlp_multiple=8, mixer_depth=1, mixer_dim=16, num_experts=2, moe_every=1)


@pytest.fixture
def run(monkeypatch, shapes16):
    """run(to, state=None, net=None, **settings) trains to a step, one micro-batch of four pictures a step"""
    made = Batches(Dataset(shapes16, 8), Rows([range(100)]), 4, 1, tokens=TINY.tokens, seed=0, p_mean=-0.6, p_std=1.2,
                   caption_dropout=0.1)
    batches = [made(i, 0) for i in range(12)]
    ready = SimpleNamespace(stream=lambda keys, device: (to_device(batches[step], device) for step, _ in keys))
    quiet = MagicMock(losses=Losses(-0.6, 1.2, CPU))

    def run(to, old=None, net=None, **settings):
        values = {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "max_steps": to, "ema_decay": 0.9,
                  "schedule": "constant", "warmup_steps": 0, "dtype": "float32", "optimizer": "adamw",
                  "mask_ratio": 0.75, "unmasked_steps": 0, "eval_every": 0, "sample_every": 0}
        for name, value in (values | settings).items():
            monkeypatch.setattr(train, name, value)
        made = old or train.new_state(TINY, {}, CPU.device)
        with monkeypatch.context() as patch:
            patch.setattr(State, "save", MagicMock())
            patch.setattr(State, "begin", MagicMock())
            train.train(made, made.net if net is None else net, ready, quiet, CPU)
        return made

    run.batches = batches
    return run


def everything(made):
    return [t.clone() for t in (*made.net.parameters(), *made.average.net.parameters(),
                                *made.optimizer.tensors().values())]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_finite_gradients_changes_nothing(run, optimizer):
    made = run(3, optimizer=optimizer)
    before = everything(made)
    for i, value in enumerate((float("nan"), float("inf"))):
        run.batches[3 + i]["latents"][1, 0, 0, 0] = value
        run(4 + i, made, optimizer=optimizer)
        assert int(made.optimizer.skipped) == int(made.optimizer.skipped_in_a_row) == i + 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(made), strict=True))
    run(6, made, optimizer=optimizer)
    assert int(made.optimizer.skipped) == 2 and int(made.optimizer.skipped_in_a_row) == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, made.net.parameters()) if a.ndim > 1)


def test_bfloat16_is_of_the_computation_alone(run):
    half, full = (list(run(2, dtype=dtype).net.parameters()) for dtype in ("bfloat16", "float32"))
    assert {p.dtype for p in half} == {torch.float32} and not all(torch.equal(a, b) for a, b in zip(half, full))


def test_losses_that_are_not_finite_are_left_out():
    losses = Losses(-0.6, 1.2, CPU)
    losses.add(torch.tensor([0.1, 0.5, 2.0]), torch.tensor([1.0, math.nan, 3.0]))
    mean, levels = losses.read()
    assert mean == 2 and list(levels.values()) == [1, 3] and not losses.sums.any()


class Reads(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor, which on a GPU waits for the device"""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.0])
def test_a_step_reads_nothing_from_the_device(run, mask_ratio, optimizer):
    made = run(1, mask_ratio=mask_ratio, optimizer=optimizer)  # the optimizer makes its state
    with Reads() as reads:
        run(3, made, mask_ratio=mask_ratio, optimizer=optimizer)
    assert reads.found == 0
    with reads:  # the counter counts
        made.optimizer.skipped.item()
    assert reads.found == 1


def test_one_graph_and_no_recompilation(run):
    torch._dynamo.reset()
    made, graphs = run(1), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = torch.compile(made.net, backend=backend, fullgraph=True)
    run(3, made, net)
    assert len(graphs) == 1
    run(6, made, net, mask_ratio=0.0)
    assert len(graphs) == 2  # the unmasked part has shapes of its own
    run(9, made, net, unmasked_steps=2)
    assert len(graphs) == 2
    plain = run(9, run(6, run(3), mask_ratio=0.0), unmasked_steps=2)
    for a, b in zip(made.net.parameters(), plain.net.parameters()):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing_gives_the_same_gradients(run):
    made = run(2)  # away from the zeros of the start
    grads = []
    for made.net.activation_checkpointing in (False, True):
        saved = []
        latents, captions, sigma, noise, uniforms = to_device(run.batches[7], CPU.device)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            model.edm_loss(made.net, latents, captions, sigma, noise, model.kept_patches(uniforms, 0.75)).backward()
        grads.append(([p.grad.clone() for p in made.net.parameters()], sum(saved)))
        made.net.zero_grad()
    for a, b in zip(grads[0][0], grads[1][0]):
        torch.testing.assert_close(a, b)
    assert grads[1][1] < 0.5 * grads[0][1]


# --- Muon ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 6), (1, 5, 30)])
def test_updates_are_about_orthogonal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    lengths = u.mT @ orthogonal(x) @ vh.mT  # in the singular vectors' coordinates: diagonal, near 1
    diagonal = lengths.diagonal(dim1=1, dim2=2)
    assert (diagonal > 0.5).all() and (diagonal < 1.35).all()
    assert (lengths - torch.diag_embed(diagonal)).abs().max() < 0.05  # it may compute in bfloat16


@pytest.mark.parametrize("momentum", [0.95, 0.8])
def test_muon_steps_as_the_librarys_and_makes_its_state_once(monkeypatch, momentum):
    g, made, real = torch.Generator().manual_seed(0), [], torch.zeros_like
    start = [torch.randn(shape, generator=g) for shape in ((16, 8), (8, 8), (16, 8))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    library = torch.optim.Muon(theirs, 0.02, weight_decay=0.1, momentum=momentum, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon(ours, 0.02, weight_decay=0.1, momentum=momentum)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        library.step()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros_like", lambda t: made.append(t) or real(t))
            optimizer.step()
    assert len(made) == 3
    for a, b, s in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - s).norm()  # theirs is in bfloat16


def test_momentum_is_muons(run):
    adamw, muon = (part.param_groups[0] for part, _ in run(0, optimizer="muon", momentum=0.5).optimizer.parts)
    assert muon["momentum"] == 0.5 and adamw["betas"] == (train.beta1, train.beta2)


def test_experts_are_matrices_of_their_own():
    g = torch.Generator().manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(4, 6, 8, generator=g))
    alone = [torch.nn.Parameter(w.detach().clone()) for w in stacked]
    stacked.grad = torch.randn(4, 6, 8, generator=g)
    for w, grad in zip(alone, stacked.grad):
        w.grad = grad.clone()
    Muon([stacked], 0.1).step()
    Muon(alone, 0.1).step()
    torch.testing.assert_close(stacked, torch.stack(alone))


# --- schedules, batches, the meter -----------------------------------------------------------------------------------


def test_learning_rate_schedules(monkeypatch):
    def rates(schedule):
        for name, value in {"learning_rate": 1.0, "warmup_steps": 4, "max_steps": 20, "min_learning_rate": 0.1,
                            "schedule": schedule}.items():
            monkeypatch.setattr(train, name, value)
        return [train.learning_rate_at(s) for s in range(21)]

    cosine, trapezoid, constant = rates("cosine"), rates("trapezoid"), rates("constant")
    assert cosine[:4] == trapezoid[:4] == constant[:4] == [0.25, 0.5, 0.75, 1.0] and set(constant[4:]) == {1.0}
    assert cosine[4] == 1 and cosine[12] == pytest.approx(0.55) and cosine[20] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(cosine[4:], cosine[5:]))
    assert set(trapezoid[4:13]) == {1.0} and trapezoid[16:] == pytest.approx([0.55, 0.4375, 0.325, 0.2125, 0.1])


def test_prefetched_batches_come_in_order_and_errors_come_through():
    assert list(prefetched(lambda a, b: (a, b), ((i, 2 * i) for i in range(5)))) == [(i, 2 * i) for i in range(5)]
    assert list(prefetched(lambda a: a, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda a: 1 / a, [(1,), (0,), (2,)]))


def test_noise_bins_are_equally_probable():
    sigma = (0.3 + 0.8 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))).exp()
    counts = torch.bincount(noise_bins(sigma, 0.3, 0.8), minlength=BINS)
    assert len(counts) == BINS and (counts / 20_000 - 0.2).abs().max() < 0.02
    levels = by_level(torch.arange(5.0), torch.tensor([1.0, 1, 0, 1, 2]), 0.3, 0.8)
    assert list(levels.values()) == [0, 1, 3, 2]
    assert noise_bins(torch.tensor([float(s) for s in levels]), 0.3, 0.8).tolist() == [0, 1, 3, 4]


def test_weights_and_biases_gets_the_log_too(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", client := MagicMock())
    log = Log(tmp_path / "run", 0, wandb="mine", settings={"max_steps": 2})
    log.path.parent.mkdir()
    log("said", step=2, val_loss=0.5)
    asked = client.init.call_args.kwargs
    assert (asked["project"], asked["name"], asked["config"]) == ("mine", "run", {"max_steps": 2})
    client.init.return_value.log.assert_called_once_with({"step": 2, "val_loss": 0.5}, step=2)
    log.picture(tmp_path / "step_2.png", 2)
    client.Image.assert_called_once_with(str(tmp_path / "step_2.png"))
    client.init.return_value.log.assert_called_with({"samples": client.Image.return_value}, step=2)


def test_an_epoch_visits_every_row_once_whatever_the_micro_batch():
    for micro in (3, 5):
        made = Batches(None, Rows([range(5), range(10, 20)]), micro, 2, tokens=4, seed=0, p_mean=0, p_std=1,
                       caption_dropout=0)
        ids = [int(i) for step in range(10) for m in (0, 1) for i in made.row_ids(step, m)][:30]
        assert sorted(ids[:15]) == sorted(ids[15:30]) == [*range(5), *range(10, 20)]
        assert ids[:15] != ids[15:30]
    assert ids == [int(i) for step in range(10) for m in (0, 1) for i in made.row_ids(step, m)][:30]


def test_the_meter_counts_the_captions_that_there_are(monkeypatch):
    run = {"batch_size": 4, "max_steps": 10, "unmasked_steps": 4, "mask_ratio": 0.75}
    monkeypatch.setattr("training.log.matmul_rate", lambda *_: 1e9)
    short, long = (Meter(TINY, run, length, False, CPU) for length in (16, 77))
    assert long.cost(0, 10) > 1.2 * short.cost(0, 10)
    assert short.cost(0, 10) == short.cost(0, 6) + short.cost(6, 10) and short.cost(6, 10) > short.cost(0, 4)
    assert short.expected(0) == pytest.approx(short.cost(0, 10) / 0.3e9)
    short.peak = 1e15  # a GPU, whose small steps are launches
    assert short.expected(0) == pytest.approx(0.3)
    monkeypatch.setattr("training.log.forward_flops", lambda *_: None)
    unknown = Meter(TINY, run, 16, False, CPU)
    unknown.restart(0)
    assert unknown.expected(0) is None and unknown.read(5)["mfu"] is None


# --- files -----------------------------------------------------------------------------------------------------------


def saved(folder):
    net = model.MicroDiT(TINY)
    optimizer = Optimizer(net, "adamw", 1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    run = {"settings": {"max_steps": 5}, "data": {}, "config": {}}
    return State(net, optimizer, Average(0.0, 0), run, step=1).save(folder, keep=2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_optimizers_state_is_whole_or_of_a_parameter_without_gradients(run, optimizer):
    made = run(2, optimizer=optimizer)
    whole, name = made.optimizer.tensors(), "blocks.0.attn.qkv.weight"
    made.optimizer.load({key: value for key, value in whole.items() if not key.endswith(name)})
    assert not any(key.endswith(name) for key in made.optimizer.tensors())
    part = {"adamw": "exp_avg_sq", "muon": "momentum_buffer"}[optimizer]
    renamed = {f"x.{name}" if key == f"{part}.{name}" else key: value for key, value in whole.items()}
    with pytest.raises(ValueError, match=rf"the file: tensor optimizer\.{part}\.{name} is missing: take another"):
        made.optimizer.load(renamed, "the file")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["net", "average", "moment"])
def test_no_checkpoint_that_is_not_finite(run, tmp_path, where, value):
    made = run(3)
    made.run = {"settings": {"max_steps": 5}, "data": {}, "config": {}}
    made.save(tmp_path, keep=1)
    tensor = {"net": made.net.final.linear.weight, "average": made.average.net.blocks[0].norm1.weight,
              "moment": made.optimizer.tensors()["exp_avg_sq.final.linear.weight"]}[where]
    tensor.data.view(-1)[0] = value
    made.step = 4
    with pytest.raises(ValueError, match="is not finite at step 4, so no checkpoint was written. The last one is .*03"):
        made.save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.safetensors"]


def test_what_is_synced_is_what_counts(tmp_path, monkeypatch):
    """The file whose bytes were synced is the one that is renamed, with the mode that the umask leaves"""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number)))
    old = os.umask(0o027)
    try:
        path = saved(tmp_path)
    finally:
        os.umask(old)
    assert (path.stat().st_ino, path.stat().st_size) in [(file.st_ino, file.st_size) for file in synced]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_file(path)["model.final.linear.weight"].shape == (48, 32)  # as the safetensors package reads it
    assert checkpoint.read(path, schema={"step": COUNT}, whole=True)[0]["step"] == 1


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path, monkeypatch, error):
    path = saved(tmp_path)

    def fail(name, *args, **kwargs):
        if str(name) == str(path):
            raise error
        return open(name, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "open", fail, raising=False)
    with pytest.raises(type(error)):
        state.find_resume(tmp_path, {"settings": {"max_steps": 5}, "data": {}})
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == [path.name]


def test_a_hundred_shards_with_64_open_files(shapes16, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    info, (latents, captions) = Dataset(shapes16, 8).info, Dataset(shapes16, 8).rows(range(100))
    for i in range(100):
        write_shard(tmp_path, f"{i:05d}", {16: latents[i:i + 1]}, captions[i:i + 1], [{"caption": str(i)}])
    shards = [{"name": f"{i:05d}", "rows": 1} for i in range(100)]
    write_json(tmp_path / "dataset.json", info | {"rows": 100, "shards": shards})
    many = Dataset(tmp_path, 8)
    monkeypatch.delattr(os, "preadv", raising=False)  # as on Windows
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        assert (many.rows(range(100))[0] == latents).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("share, warned", [(0.5, 1), (0.9, 0)])
def test_a_busy_machine_is_noticed_once(run, shapes16, tmp_path, capsys, monkeypatch, share, warned):
    settings = script_settings("train.py") | {"out": str(tmp_path), "sample_every": 0, "batch_size": 4}
    data = Dataset(shapes16, 8)
    report = Report(run(1), settings, data, (data, Rows([range(4)])), train.autocast, CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(report.meter, "cpu_share", lambda: share)
    for step in (5, 20, 40):
        report.warn_of_busy_cores(step)
    assert capsys.readouterr().err.count("OMP_NUM_THREADS=1") == warned
