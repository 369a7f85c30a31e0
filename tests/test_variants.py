"""What is not the paper's and off by default: grouped masks, a skip around the mixer, its convolution, fusion."""

import copy

import pytest
import torch
from conftest import launch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import SMALL, case

import model
from common.flops import forward_flops
from model import MicroDiTConfig
from studies.ablate import update_flops
from training import checkpoint
from training.optimizer import Optimizer

VARIANTS = {"skip": dict(mixer_skip=True), "conv": dict(mixer_conv=True), "fused": dict(fused_blocks=0),
            "all": dict(mixer_skip=True, mixer_conv=True, fused_blocks=2),
            "no mixer": dict(mixer_depth=0, fused_blocks=1)}
every = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


@given(st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_grouped_mask_keeps_the_smallest_draws_of_every_2_by_2(half, ratio, seed):
    uniforms = torch.rand(3, 4 * half * half, generator=torch.Generator().manual_seed(seed))
    ids = model.kept_patches(uniforms, ratio, "grouped")
    assert ids.shape == (3, int(4 * half * half * (1 - ratio)))
    kept = torch.zeros(3, 4 * half * half, dtype=torch.bool).scatter(1, ids, True).view(3, 2 * half, 2 * half)
    draws = uniforms.view_as(kept)
    for row in range(0, 2 * half, 2):
        for column in range(0, 2 * half, 2):
            cell = [t[:, row:row + 2, column:column + 2].flatten(1) for t in (kept, draws)]
            order = cell[1].argsort(1)
            assert torch.equal(cell[0].gather(1, order), torch.arange(4).expand(3, 4) < 4 * (1 - ratio))


@pytest.mark.parametrize("tokens, ratio", [(9, 0.75), (16, 0.6), (16, 0.9)])
def test_what_cannot_be_grouped_is_refused(tokens, ratio):
    with pytest.raises(ValueError, match="a grouped mask drops 0, 0.25, 0.5 or 0.75"):
        model.kept_patches(torch.rand(1, tokens), ratio, "grouped")


def loss_and_gradients(net, *inputs):
    net.zero_grad()
    loss = model.edm_loss(net, *inputs)
    loss.backward()
    return [loss.detach()] + [p.grad for p in net.parameters()]


@every
def test_shapes_gradients_and_checkpointing(changes):
    net, x, sigma, caption, noise, ids = case(**changes)
    fused = "fused_blocks" in changes
    caption[0] = 0  # without caption, of which the fused network sees the mixer's output alone
    assert net(x, sigma, caption).shape == net(x, sigma, caption, ids_keep=ids).shape == x.shape
    assert net(x, sigma, caption, ids_keep=ids, kept_only=True).shape == (x.shape if fused else (2, 4, 12))
    for keep in (ids, None):
        plain = loss_and_gradients(net, x, caption, sigma, noise, keep)
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in plain)
        net.activation_checkpointing = True
        torch.testing.assert_close(loss_and_gradients(net, x, caption, sigma, noise, keep), plain)
        net.activation_checkpointing = False


@every
def test_one_graph_with_and_without_masking(changes):
    net, x, sigma, caption, noise, ids = case(**changes)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for keep in (ids, None):
        torch.testing.assert_close(loss_and_gradients(compiled, x, caption, sigma, noise, keep),
                                   loss_and_gradients(net, x, caption, sigma, noise, keep), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["graph_break"] == {} and not torch._dynamo.utils.counters["recompile_limit"]


@torch.no_grad()
def test_they_are_what_they_say():
    net, x, sigma, caption, noise, ids = case(mixer_skip=True)
    plain = case()[0]
    plain.load_state_dict(net.state_dict())
    for keep in (None, ids):
        with_skip, without = (n(x, sigma, caption, ids_keep=keep) for n in (net, plain))
        assert not torch.allclose(with_skip, without)
        net.mixer_out[1].weight.zero_()  # the mixer says nothing: what entered goes on, and here alone
        alone = case(mixer_depth=0)[0]
        alone.load_state_dict({n: t for n, t in net.state_dict().items() if not n.startswith("mixer")})
        torch.testing.assert_close(net(x, sigma, caption, ids_keep=keep), alone(x, sigma, caption, ids_keep=keep))
        net.load_state_dict(plain.state_dict())

    assert all(block.neighbours.conv.weight.abs().max() == 0 for block in case(random=False, mixer_conv=True)[0].mixer)
    net = case(mixer_conv=True)[0]
    weights = net.state_dict()
    for name in [n for n in weights if "neighbours" in n]:
        weights.pop(name).zero_()
    plain.load_state_dict(weights)
    assert torch.equal(net(x, sigma, caption, ids_keep=ids), plain(x, sigma, caption, ids_keep=ids))
    conv = net.mixer[1].neighbours
    conv.conv.weight[:, 0, 1, 2] = 1  # each patch gets its right neighbour added, and the last ones nothing
    grid = torch.randn(2, 4, 4, 16)
    shifted = torch.cat([grid[:, :, 1:], torch.zeros(2, 4, 1, 16)], 2)
    torch.testing.assert_close(conv(grid.flatten(1, 2)), (grid + shifted).flatten(1, 2))


@torch.no_grad()
def test_a_fused_network_sees_dropped_patches_and_the_mixer_alone_without_caption():
    net, x, sigma, caption, noise, ids = case(fused_blocks=0)
    fusion, D = net.fusion, net.config.dim
    dense, deep = torch.randn(2, 16, D), torch.randn(2, 4, D)
    fusion.linear.weight.copy_(torch.cat([torch.eye(D), 2 * torch.eye(D)], 1))
    caption[1] = 0
    wanted = dense + 2 * fusion.token
    wanted[0] = wanted[0].scatter_add(0, ids[0][:, None].expand(-1, D), 2 * (deep[0] - fusion.token))
    torch.testing.assert_close(fusion(dense, deep, ids, caption), wanted)
    other = copy.deepcopy(net)
    other.blocks[1].attn.proj.weight.add_(1)
    for keep in (None, ids):
        outputs = [n(x, sigma, caption, ids_keep=keep) for n in (net, other)]
        changed = (outputs[0] - outputs[1]).abs().amax((1, 2, 3))
        assert changed[0] > 1e-3 and changed[1] == 0
    everything = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(net(x, sigma, caption, ids_keep=everything), net(x, sigma, caption))


def test_its_last_blocks_see_all_patches():
    net, x, sigma, caption, _, ids = case(fused_blocks=1)
    seen = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].shape[1]))
    net(x, sigma, caption, ids_keep=ids)
    assert seen == [4, 4, 4, 16]


@pytest.mark.parametrize("changes, words", [
    (dict(mixer_skip=True, mixer_dim=32), "mixer_skip needs a mixer of another width"),
    (dict(mixer_skip=True, mixer_depth=0), "mixer_skip needs"), (dict(fused_blocks=4), "must be below depth 4")])
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        MicroDiTConfig(**SMALL | changes)


def test_what_they_cost():
    config = MicroDiTConfig(**SMALL | dict(num_experts=0))
    flops = {name: forward_flops(MicroDiTConfig(**SMALL | dict(num_experts=0) | changes), 0.75, 5)
             for name, changes in VARIANTS.items()}
    paper, T, K, D, d = forward_flops(config, 0.75, 5), 16, 4, 32, 16
    assert flops["skip"] == paper
    assert flops["conv"] == paper + 2 * (2 * 9 * T * d)  # two mixer blocks
    # the bridge and the last layer for all patches instead of the kept ones, and the fusion
    assert flops["fused"] == paper + 2 * (T - K) * (d * D + D * 12) + 2 * T * 2 * D * D


def test_products_of_the_optimizer():
    config = MicroDiTConfig(**SMALL | dict(num_experts=0, depth=1, mixer_depth=0))
    assert update_flops(config, "adamw") == 0
    # a matrix of r x c, r <= c, costs five steps of x x^T, its square and what they multiply
    net = model.MicroDiT(config)
    sides = [sorted(p.shape) for n, p in net.named_parameters() if n in Optimizer(
        net, "muon", 1e-3, betas=(0.9, 0.99), weight_decay=0).parts[1][1]]
    assert update_flops(config, "muon") == sum(5 * (4 * r * r * c + 2 * r ** 3) for r, c in sides)


def test_a_depthwise_convolution_is_not_muons():
    net = case(mixer_conv=True)[0]
    (_, rest), (_, matrices) = Optimizer(net, "muon", 1e-3, betas=(0.9, 0.99), weight_decay=0).parts
    assert "mixer.0.neighbours.conv.weight" in rest and "mixer.0.attn.qkv.weight" in matrices


def test_training_saving_and_drawing(shapes32, tmp_path):
    given = ("config/masking.py", "--data", shapes32, "--latent_size", 16, "--patch_size", 2, "--dim", 32,
             "--mixer_dim", 16, "--depth", 2, "--batch_size", 4, "--micro_batch_size", 4, "--out", tmp_path / "run",
             "--mask", "grouped", "--mixer_skip", "--mixer_conv", "--fused_blocks", 1, "--warmup_steps", 1,
             "--eval_every", 0, "--ema_start", 1)
    launch("train.py", *given, "--max_steps", 2)
    assert "going on from step 2" in launch("train.py", *given, "--max_steps", 3)
    assert "mask: 'grouped' there, 'random' now" in launch("train.py", *given, "--max_steps", 3, "--mask", "random",
                                                           fails=True)
    net, run = checkpoint.load_network(tmp_path / "run/step_00000003.safetensors")
    assert (net.config.mixer_skip, net.config.mixer_conv, net.config.fused_blocks) == (True, True, 1)
    assert run["settings"]["mask"] == "grouped" and net.mixer[0].neighbours.conv.weight.abs().max() > 0
    launch("sample.py", "--checkpoint", tmp_path / "run", "--prompt", "a red disc", "--steps", 2, "--out",
           tmp_path / "drawn")
    assert list((tmp_path / "drawn").rglob("*.png"))
