"""The parts of train.py's loop: a step that does nothing if a gradient is not finite, what is random, optimizers,
schedules, FLOPs, checkpoints. That a step never waits for the device is in test_fake.py."""
import importlib
import math
import os
import shutil
import stat
import sys
from dataclasses import astuple, replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import edit, hunks

import model
import train
from common import machine
from common.processes import Processes
from pictures.prepared import Dataset, Rows
from training import checkpoint, meter, optimizer
from training.batches import Batches, normal, own_places, random_words, to_device, uniform
from training.log import Losses
from training.optimizer import Muon
from training.state import State

CPU = Processes(0, 1, torch.device("cpu"))
TINY = model.MicroDiTConfig(latent_size=8, latent_channels=12, caption_dim=128, dim=32, depth=2, head_dim=8,
                            mlp_multiple=8, mixer_depth=1, mixer_dim=16, num_experts=2, moe_every=1, mixer_conv=True)
RUN = {"settings": {"max_steps": 5}, "data": {}, "config": {}, "id": "mine"}  # what a checkpoint says of its run


def batches_of(dataset, rows=100, batch_size=4, seed=0):
    return Batches(dataset, Rows([range(rows)]), batch_size, tokens=TINY.tokens, seed=seed, p_mean=-0.6, p_std=1.2,
                   caption_dropout=0.1)


@pytest.fixture
def run(monkeypatch, shapes16):
    """run(to, state=None, net=None, **settings) trains to a step, one micro-batch of four pictures a step"""
    made = batches_of(Dataset(shapes16, 8))
    batches = [made(i, range(4)) for i in range(12)]
    ready = SimpleNamespace(stream=lambda steps, places, device: (to_device(batches[i], device) for i in steps))
    quiet = MagicMock(losses=Losses(-0.6, 1.2, CPU))

    def run(to, old=None, net=None, **settings):
        values = {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "max_steps": to, "ema_decay": 0.9,
                  "schedule": "constant", "warmup_steps": 0, "dtype": "float32", "optimizer": "adamw",
                  "mask_ratio": 0.75, "unmasked_steps": 0, "eval_every": 0, "sample_every": 0}
        for name, value in (values | settings).items():
            monkeypatch.setattr(train, name, value)
        made = old or train.new_state(TINY, dict(RUN), CPU.device)
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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw16", "muon"])
def test_a_step_without_finite_gradients_changes_nothing(run, optimizer):
    made = run(3, optimizer=optimizer)
    before = everything(made)
    for i, value in enumerate((math.nan, math.inf)):
        run.batches[3 + i]["latents"][1, 0, 0, 0] = value
        run(4 + i, made, optimizer=optimizer)
        assert int(made.optimizer.skipped) == int(made.optimizer.skipped_in_a_row) == i + 1
    assert all(torch.equal(a, b) for a, b in zip(before, everything(made), strict=True))
    run(6, made, optimizer=optimizer)
    assert int(made.optimizer.skipped) == 2 and int(made.optimizer.skipped_in_a_row) == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, made.net.parameters()) if a.ndim > 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_of_the_computation_alone(run, dtype):
    half, full = (list(run(2, dtype=dtype).net.parameters()) for dtype in (dtype, "float32"))
    assert {p.dtype for p in half} == {torch.float32} and not all(torch.equal(a, b) for a, b in zip(half, full))


def test_averages_of_16_bits_follow_those_of_32(run):
    start, draws = torch.randn(512, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(0)
    a, b = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    theirs, ours = torch.optim.AdamW([a], **options), optimizer.AdamW16([b], **options)
    for _ in range(1500):
        a.grad = torch.randn(512, generator=draws) + 0.3
        b.grad = a.grad.clone()
        theirs.step()
        ours.step()
    ratio = ours.state[b]["exp_avg_sq"].float() / theirs.state[a]["exp_avg_sq"]
    assert abs(ratio.mean() - 1) < 0.005 and ratio.std() < 0.05
    assert (a - b).norm() < 0.02 * (a - start).norm()
    made = run(3, optimizer="adamw16")
    other, kept = train.new_state(TINY, dict(RUN), CPU.device), made.optimizer.tensors()
    other.optimizer.load(dict(kept))
    assert {t.dtype for t in kept.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in other.optimizer.tensors().items():
        assert tensor.dtype == kept[name].dtype and torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("kind", ["adamw", "adamw16", "muon"])
def test_float16_trains_as_float32_and_an_overflow_is_skipped(run, monkeypatch, kind):
    """The network's own gradients hardly fit into float16: it takes the scale for them to come out right"""
    settings = {"dtype": "float16", "optimizer": kind, "learning_rate": 1e-3}
    monkeypatch.setattr(optimizer, "SCALE_STEPS", 3)
    norms = {}
    for dtype in ("float32", "float16"):
        with monkeypatch.context() as patch:
            step = train.make_step
            patch.setattr(train, "make_step", lambda *args: norms.setdefault(dtype, []).append(step(*args)))
            made = run(3, **settings | {"dtype": dtype})
    assert torch.allclose(torch.stack(norms["float16"]), torch.stack(norms["float32"]), rtol=5e-3)
    assert made.optimizer.loss_scale.tolist() == [2.0 ** 17, 0.0]  # three steps without an overflow
    made.optimizer.loss_scale[0], before = 2.0 ** 60, [p.clone() for p in made.net.parameters()]
    run(5, made, **settings)
    assert int(made.optimizer.skipped) == 2 and made.optimizer.loss_scale.tolist() == [2.0 ** 58, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, made.net.parameters()))
    other, made.optimizer.loss_scale[0] = train.new_state(TINY, dict(RUN), CPU.device), 2.0 ** 16
    other.net.load_state_dict(made.net.state_dict())
    other.optimizer.load({name: t.clone() for name, t in made.optimizer.tensors().items()})
    other.step = made.step
    assert torch.equal(other.optimizer.loss_scale, made.optimizer.loss_scale)
    for state in (made, other):  # a resume in the middle, behind skipped steps
        run(8, state, **settings)
    assert all(torch.equal(a, b) for a, b in zip(made.net.parameters(), other.net.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(before, made.net.parameters()) if a.ndim > 1)
    run(6, dtype="float32", optimizer=kind).optimizer.load(made.optimizer.tensors())  # on a card that needs no scale


@pytest.mark.parametrize("capability, name", [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"),
                                              ((12, 0), "bfloat16")])
def test_cards_without_bfloat16_get_float16(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert machine.compute_dtype("auto", torch.device("cuda")) == getattr(torch, name)
    assert machine.compute_dtype("auto", CPU.device) == torch.float32


@pytest.mark.parametrize("edits", [(), hunks("docs/settings.md")])
def test_one_graph_and_no_recompilation(run, tmp_path, monkeypatch, edits):
    """Also with the second loss of docs/settings.md"""
    torch._dynamo.reset()
    shutil.copyfile(model.__file__, tmp_path / "edited.py")
    edit(tmp_path / "edited.py", edits)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "edited", raising=False)
    monkeypatch.setattr(train, "MicroDiT", importlib.import_module("edited").MicroDiT)
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


def test_activation_checkpointing_gives_the_same_gradients(run):
    made = run(2)  # away from the zeros of the start
    grads, numbers = [], []
    for made.net.activation_checkpointing in (False, True):
        saved = []
        latents, captions, sigma, noise, uniforms = to_device(run.batches[7], CPU.device)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            model.edm_loss(made.net, latents, captions, sigma, noise, model.kept_patches(uniforms, 0.75)).backward()
        grads.append([p.grad.clone() for p in made.net.parameters()])
        numbers.append(sum(saved))
        made.net.zero_grad()
    torch.testing.assert_close(grads[1], grads[0])
    assert numbers[1] < 0.5 * numbers[0]


# --- what is random ---


def test_numbers_are_normal_and_uniform():
    words = random_words(3, 7, range(5, 2005), 100)
    for x, mean, variance, fourth in ((normal(words), 0, 1, 3), (uniform(words), 0.5, 1 / 12, 1 / 80)):
        x = x.double()
        d = x - mean
        assert d.mean().abs() < 5 * (variance / x.numel()) ** 0.5
        assert d.square().mean() == pytest.approx(variance, rel=0.02)
        assert d.pow(4).mean() == pytest.approx(fourth, rel=0.05)
        for neighbours in (d[:, 1:] * d[:, :-1], d[1:] * d[:-1], d[:, 50:] * d[:, :50]):  # numbers, pictures, halves
            assert neighbours.mean().abs() < 5 * variance / neighbours.numel() ** 0.5
    assert 0 <= uniform(words).min() and uniform(words).max() < 1
    extremes = normal(torch.tensor([[0, 2 ** 32 - 1, 0, 2 ** 32 - 1]]).numpy().astype("uint32"))
    assert extremes.isfinite().all() and extremes.abs().max() < 7


def test_a_pictures_numbers_are_its_own(shapes16):
    def batch(step=3, places=range(10), seed=0):
        return batches_of(Dataset(shapes16, 8), batch_size=10, seed=seed)(step, places)

    whole, parts = batch(), [batch(places=places) for places in (range(3), range(3, 4), range(4, 10))]
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values), name
    assert len({float(sigma) for sigma in whole["sigma"]}) == 10
    for other in (batch(step=4), batch(seed=1)):
        assert not any((other[name] == whole[name]).any() for name in ("noise", "uniforms", "sigma"))


@pytest.mark.parametrize("batch_size, most, world", [(16, 4, 1), (16, 4, 2), (10, 4, 3), (7, 256, 3), (10, 3, 4)])
def test_places_are_shared_out(batch_size, most, world):
    pieces = [own_places(batch_size, most, rank, world) for rank in range(world)]
    assert [i for own in pieces for piece in own for i in piece] == list(range(batch_size))
    assert max(len(piece) for own in pieces for piece in own) <= most
    shares = [sum(map(len, own)) for own in pieces]
    assert max(shares) - min(shares) <= 1 and all(len(own) == -(-n // most) for own, n in zip(pieces, shares))


def test_an_epoch_visits_every_row_once():
    made = Batches(None, Rows([range(5), range(10, 20)]), 4, tokens=4, seed=0, p_mean=0, p_std=1, caption_dropout=0)
    ids = [int(i) for step in range(8) for i in made.row_ids(step, range(4))]
    assert sorted(ids[:15]) == sorted(ids[15:30]) == [*range(5), *range(10, 20)] and ids[:15] != ids[15:30]


# --- optimizers and schedules ---


def steps_of_muon(start, gradients, **options):
    """The parameters after steps of our Muon and of torch's (of ours alone for more than two dimensions)"""
    results = []
    for kind in (Muon, torch.optim.Muon)[:1 if start[0].ndim > 2 else 2]:
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        more = {} if kind is Muon else {"adjust_lr_fn": "match_rms_adamw"}
        optimizer = kind(parameters, 0.02, weight_decay=0.1, **options, **more)
        for step in gradients:
            for p, grad in zip(parameters, step):
                p.grad = grad.clone()
            optimizer.step()
        results.append([p.detach() for p in parameters])
    return results


def test_muon_steps_as_the_librarys():
    g, shapes = torch.Generator().manual_seed(0), ((16, 8), (8, 8), (16, 8), (5, 30))
    start, *gradients = [[torch.randn(shape, generator=g) for shape in shapes] for _ in range(5)]
    for a, b, s in zip(*steps_of_muon(start, gradients, momentum=0.8), start):
        assert (a - b).norm() < 0.02 * (b - s).norm()  # theirs is in bfloat16


def test_experts_are_matrices_of_their_own_and_convolutions_are_one(run):
    g = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, 4, 6, 8, generator=g)
    (together,) = steps_of_muon([weight], [[grad]])[0]
    alone = steps_of_muon(list(weight), [list(grad)])[0]
    torch.testing.assert_close(together, torch.stack(alone))
    parts = run(0, optimizer="muon", momentum=0.5, beta2=0.9).optimizer.parts
    (adamw, rest), (muon, matrices) = parts
    assert muon.param_groups[0]["momentum"] == 0.5 and adamw.param_groups[0]["betas"] == (0.9, 0.9)
    assert "mixer.0.neighbours.conv.weight" in rest and {"mixer.0.attn.qkv.weight", "blocks.0.mlp.w1"} <= {*matrices}


@pytest.mark.parametrize("name, parts", [
    ("mixer.0.attn.qkv.weight", 3), ("blocks.1.cross_attn.kv.weight", 2), ("caption_block.attn.qkv.weight", 3),
    ("blocks.0.cross_attn.q.weight", 1), ("blocks.1.attn.proj.weight", 1)])
def test_a_fused_matrix_moves_as_its_parts_would(run, name, parts):
    state, g = run(0, optimizer="muon"), torch.Generator().manual_seed(0)
    weight = dict(state.net.named_parameters())[name]
    pieces = [list(torch.randn(weight.shape, generator=g).chunk(parts)) for _ in range(4)]
    before, lr = weight.detach().clone(), 0.02
    for grads in pieces:
        weight.grad = torch.cat(grads)
        state.optimizer.step(lr, torch.tensor(1.0))
    alone = [torch.nn.Parameter(part.clone()) for part in before.chunk(parts)]
    group = state.optimizer.parts[1][0].param_groups[0]
    muon = Muon(alone, lr, group["weight_decay"], group["momentum"])
    for grads in pieces:
        for p, grad in zip(alone, grads):
            p.grad = grad.clone()
        muon.step()
    torch.testing.assert_close(weight.detach(), torch.cat([p.detach() for p in alone]))
    assert (weight - before).norm() > 0.1


def test_processes_share_the_work_of_muon_and_get_the_same(script, tmp_path):
    """Of 2, 5, 4 and 1 matrices of a shape, two processes make half each, if need be with one of zeros"""
    (tmp_path / "steps.py").write_text("""
import sys, torch, torch.distributed as dist
from common.processes import join
from training import optimizer
made, views, orthogonal, all_gather = [], [], optimizer.orthogonal, dist.all_gather
optimizer.orthogonal = lambda matrices: made.append(len(matrices)) or orthogonal(matrices)
dist.all_gather = lambda into, part: views.append(not part.is_contiguous()) or all_gather(into, part)
processes = join()
g = torch.Generator().manual_seed(0)
shapes = (16, 8), (5, 6, 8), (8, 8), (24, 8), (16, 8), (3, 9)
p = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
muon = optimizer.Muon(p, 0.02, pieces=[1, 1, 1, 3, 1, 1])
for _ in range(3):
    for q in p:
        q.grad = torch.randn(q.shape, generator=g)
    muon.step()
name = f"{processes.rank} of {processes.world}"
torch.save({"made": made, "views": any(views), "weights": [q.detach() for q in p]}, f"{sys.argv[1]}/{name}")
processes.leave()
""")
    for processes in (1, 2):
        script(tmp_path / "steps.py", tmp_path, processes=processes)
    alone, *both = (torch.load(tmp_path / name, weights_only=True) for name in ("0 of 1", "0 of 2", "1 of 2"))
    assert alone["made"] == [2, 5, 4, 1] * 3 and both[0]["made"] == both[1]["made"] == [1, 3, 2, 1] * 3
    for shared in both:
        assert all(map(torch.equal, shared["weights"], alone["weights"]))
        assert not shared["views"]  # which gloo takes, and NCCL does not


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


@pytest.mark.parametrize("optimizer, part", [("adamw", "exp_avg_sq"), ("muon", "momentum_buffer")])
def test_an_optimizers_state_is_whole_or_of_a_parameter_without_gradients(run, optimizer, part):
    made = run(2, optimizer=optimizer)
    whole, name = made.optimizer.tensors(), "blocks.0.attn.qkv.weight"
    made.optimizer.load({key: value for key, value in whole.items() if not key.endswith(name)})
    assert not any(key.endswith(name) for key in made.optimizer.tensors())
    renamed = {f"x.{name}" if key == f"{part}.{name}" else key: value for key, value in whole.items()}
    with pytest.raises(ValueError, match=f"the file: the optimizer's state of {name} is damaged"):
        made.optimizer.load(renamed, "the file")


# --- losses, log, FLOPs ---


def test_losses_by_noise_level():
    losses, numbers = Losses(0.3, 0.8, CPU), torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    losses.add((0.3 + 0.8 * numbers).exp(), torch.ones(20_000))
    assert (losses.sums[1] / 20_000 - 0.2).abs().max() < 0.02  # as many pictures in each bin
    medians = torch.tensor([float(level) for level in losses.read()[2]])
    losses.add(medians, torch.tensor([0.0, 1, math.nan, 3, math.inf]))
    mean, extra, levels = losses.read()  # losses that are not finite do not count
    assert list(levels.values()) == [0, 1, 3] and (mean, extra) == (pytest.approx(4 / 3), None)
    for extra in (torch.tensor(0.5), torch.tensor([0.25, 0.75, 9, 0.5, 0])):
        losses.add(medians, torch.tensor([0.0, 1, math.nan, 3, 4]), extra)
        assert losses.read()[:2] == (2, 0.5 if extra.ndim == 0 else 0.375)


def flops(config, mask_ratio=0.0, length=5):
    return meter.count_flops(astuple(config), mask_ratio, "random", length)[0]


def test_flops_are_those_of_forward_and_backward():
    config = model.MicroDiTConfig(latent_size=4, latent_channels=2, dim=8, depth=1, head_dim=4, mlp_multiple=8,
                                  caption_dim=8, mixer_depth=0, num_experts=0, attn_ratio=(1, 1), mlp_ratio=(4, 4))
    t, length, d, hidden = 4, 5, 8, 24  # 2/3 of 4 x 8, rounded up
    attention = 2 * t * d * 3 * d + 4 * t * t * d + 2 * t * d * d
    cross = 2 * t * d * d + 2 * length * d * 2 * d + 4 * t * length * d + 2 * t * d * d
    block = attention + cross + 3 * 2 * t * d * hidden + 2 * d * 6 * d
    patches, captions, noise = 2 * t * d * 8, 2 * length * 8 * d, 2 * 512 * d  # these give no gradient to their input
    caption = captions + 2 * length * d * d + 2 * (d * d + d * d) + (
        2 * length * d * 4 * d + 4 * length * length * d + 3 * 2 * length * d * hidden)
    forward = block + caption + patches + noise + 2 * d * d + 2 * d * 2 * d + 2 * t * d * 8
    assert flops(config) == 3 * forward - patches - captions - noise
    mixed = replace(config, mixer_depth=1, mixer_dim=16)
    assert flops(replace(mixed, mixer_conv=True)) - flops(mixed) == 3 * 2 * t * 16 * 9  # 3 x 3, each channel by itself


@pytest.mark.parametrize("edit", [torch.nonzero, torch.Tensor.item, lambda x: x[x > 0], lambda x: 1 if x > 0 else 0])
def test_what_depends_on_data_leaves_the_flops_unknown(edit, monkeypatch, capsys):
    monkeypatch.setattr(model, "patchify", lambda x, p, real=model.patchify: (edit(x.sum()), real(x, p))[1])
    meter.count_flops.cache_clear()
    assert flops(TINY, 0.75) is None and "FLOPs and MFU are not known" in capsys.readouterr().err
    meter.count_flops.cache_clear()


def test_the_meter_counts_masked_and_unmasked_steps(monkeypatch):
    settings = {"batch_size": 4, "max_steps": 10, "unmasked_steps": 4, "mask_ratio": 0.75}
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(meter, "matmul_rate", lambda *_: 1e9)
    made = meter.Meter(TINY, settings | {"mask": "random"}, 16, torch.float32, CPU, train.masked_steps)
    assert made.cost(0, 10) == 4 * (6 * flops(TINY, 0.75, 16) + 4 * flops(TINY, 0.0, 16))
    assert made.cost(5, 7) == 4 * (flops(TINY, 0.75, 16) + flops(TINY, 0.0, 16))
    assert flops(TINY, 0.0, 77) > 1.2 * flops(TINY, 0.0, 16) and made.utilization(5e8, 2.0) == 0.25


# --- checkpoints ---


@pytest.mark.parametrize("where", ["model", "ema", "optimizer"])
def test_no_checkpoint_that_is_not_finite(run, tmp_path, where):
    made = run(3)
    made.save(tmp_path, keep=1)
    tensor = {"model": made.net.final.linear.weight, "ema": made.average.net.blocks[0].norm1.weight,
              "optimizer": made.optimizer.tensors()["exp_avg_sq.final.linear.weight"]}[where]
    tensor.data.view(-1)[0], made.step = math.inf if where == "ema" else math.nan, 4
    with pytest.raises(ValueError, match="is not finite, so .*04.safetensors was not written, and the last .*03.safe"):
        made.save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003.safetensors"]


def test_a_checkpoint_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "step_00000001.safetensors"
    monkeypatch.setattr("common.files.UMASK", 0o027)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number)))
    checkpoint.save(path, {"model.a": torch.ones(1)}, RUN)
    assert (path.stat().st_ino, path.stat().st_size) in [(file.st_ino, file.st_size) for file in synced]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and os.listdir(tmp_path) == [path.name]
