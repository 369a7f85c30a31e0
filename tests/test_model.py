"""Masking, routing, configurations and samplers, through model.py's public functions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
from model import MicroDiT, MicroDiTConfig

SMALL = dict(latent_size=8, latent_channels=3, dim=32, depth=4, head_dim=8, mlp_multiple=8, caption_dim=12,
             mixer_depth=2, mixer_dim=16, num_experts=4)


def case(B=2, random=True, **changes):
    """(network, latents, sigma, captions, noise, kept patches)

    random: weights everywhere, as the real initialisation starts as the identity
    """
    torch.manual_seed(0)
    net = MicroDiT(MicroDiTConfig(**SMALL | changes))
    for name, p in net.named_parameters():
        if random and "norm" not in name:
            torch.nn.init.normal_(p, std=0.2)
    g, c = torch.Generator().manual_seed(1), net.config
    x = torch.randn(B, c.latent_channels, c.latent_size, c.latent_size, generator=g)
    sigma = torch.rand(B, generator=g) + 0.2
    ids = model.kept_patches(torch.rand(B, c.tokens, generator=g), 0.75)
    return net, x, sigma, torch.randn(B, 5, c.caption_dim, generator=g), torch.randn(x.shape, generator=g), ids


# --- masking ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_kept_patches_are_the_smallest_draws_in_ascending_order(tokens, ratio, seed):
    uniforms = torch.rand(3, tokens, generator=torch.Generator().manual_seed(seed))
    keep = int(tokens * (1 - ratio))
    if keep == 0:
        with pytest.raises(ValueError, match="mask_ratio"):
            model.kept_patches(uniforms, ratio)
        return
    ids = model.kept_patches(uniforms, ratio)
    assert ids.shape == (3, keep)
    assert torch.equal(uniforms.gather(1, ids), uniforms.sort(1).values[:, :keep])


def test_patchify_and_back():
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    tokens = model.patchify(x, 2)
    patch = tokens[1, 5].view(2, 2, 3).permute(2, 0, 1)
    assert torch.equal(patch, x[1, :, 2:4, 2:4])  # patch 5 of rows of 4: row 1, column 1
    assert torch.equal(model.unpatchify(tokens, 2), x)


@torch.no_grad()
def test_masked_output_is_zero_elsewhere_and_kept_only_agrees():
    net, x, sigma, caption, noise, ids = case()
    full = model.patchify(net(x, sigma, caption, ids_keep=ids), 2)
    kept = net(x, sigma, caption, ids_keep=ids, kept_only=True)
    assert torch.equal(model.gather_tokens(full, ids), kept)
    assert (full.abs().sum(-1) > 0).sum() == ids.numel()
    everything = torch.arange(16).expand(2, 16)  # every patch in order is no masking
    torch.testing.assert_close(net(x, sigma, caption, ids_keep=everything), net(x, sigma, caption))
    args = net, x, caption, sigma, noise
    torch.testing.assert_close(model.edm_loss(*args, everything), model.edm_loss(*args))


def influence(**changes):
    """How far a change of one removed patch reaches into the kept outputs"""
    net, x, sigma, caption, _, ids = case(B=1, **changes)
    removed = next(i for i in range(16) if i not in ids[0].tolist())
    changed = model.patchify(x, 2).clone()
    changed[:, removed] += 1
    out = [net(v, sigma, caption, ids_keep=ids, kept_only=True) for v in (x, model.unpatchify(changed, 2))]
    return (out[0] - out[1]).abs().max().item()


@torch.no_grad()
def test_the_mixer_sees_removed_patches_and_naive_masking_does_not():
    assert influence() > 1e-3
    assert influence(mixer_depth=0) == 0
    assert not any(name.startswith("mixer") for name, _ in case(mixer_depth=0)[0].named_parameters())


@torch.no_grad()
def test_masked_loss_ignores_the_removed_patches_targets():
    # a network that cannot see removed patches: then nothing of them may reach the loss
    net, x, sigma, caption, noise, ids = case(mixer_depth=0)
    removed = torch.ones(2, 16, dtype=torch.bool).scatter(1, ids, False)

    def loss_with(changed):
        patches = model.patchify(x, 2)
        patches[changed] += 5
        return model.edm_loss(net, model.unpatchify(patches, 2), caption, sigma, noise, ids)

    loss = model.edm_loss(net, x, caption, sigma, noise, ids)
    torch.testing.assert_close(loss_with(removed), loss)
    assert loss_with(~removed) > 1 + loss


@torch.no_grad()
def test_loss_is_the_weighted_error_of_the_denoised_picture():
    net, x, sigma, caption, noise, ids = case()
    for keep in (None, ids):
        D = model.denoise(net, x + sigma.view(-1, 1, 1, 1) * noise, sigma, caption, keep)
        error = model.patchify((D - x) ** 2, 2)
        if keep is not None:
            error = model.gather_tokens(error, keep)
        weight = (sigma ** 2 + 0.9 ** 2) / (sigma * 0.9) ** 2
        per_picture = model.edm_loss(net, x, caption, sigma, noise, keep, reduce=False)
        torch.testing.assert_close(per_picture, weight * error.mean((1, 2)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.edm_loss(net, x, caption, sigma, noise, keep), per_picture.mean())


# --- experts ---------------------------------------------------------------------------------------------------------


def loop_over_experts(moe, x):
    """Expert choice in its plainest form"""
    B, T, _ = x.shape
    probs = moe.router(x).softmax(-1)
    k, out = int(moe.capacity * T / moe.num_experts), torch.zeros_like(x)
    for b in range(B):
        for e in range(moe.num_experts):
            for t in probs[b, :, e].argsort(descending=True)[:k].tolist():
                out[b, t] += probs[b, t, e] * (torch.nn.functional.gelu(x[b, t] @ moe.w1[e]) @ moe.w2[e])
    return out


@pytest.mark.paper
@pytest.mark.parametrize("capacity, experts, tokens", [(2.0, 4, 16), (1.0, 4, 9), (0.5, 2, 6), (4.0, 4, 8)])
@torch.no_grad()
def test_dispatch_equals_a_loop(capacity, experts, tokens):
    torch.manual_seed(0)
    moe = model.ExpertChoiceMLP(8, 16, experts, capacity)
    for p in moe.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, tokens, 8)
    torch.testing.assert_close(moe(x), loop_over_experts(moe, x))


@torch.no_grad()
def test_every_expert_takes_its_capacity_and_unrouted_tokens_get_zero():
    torch.manual_seed(0)
    moe = model.ExpertChoiceMLP(8, 16, 4, 1.0)  # k = 4 of 16 tokens each
    moe.router.weight.zero_()
    for e in range(4):  # expert e wants the tokens with feature e large, and is the only one to answer in channel e
        moe.router.weight[e, e] = 5
        moe.w1[e], moe.w2[e] = 1, 0
        moe.w2[e, :, e] = 1
    x = torch.rand(1, 16, 8)
    assert (moe(x)[0, :, :4] > 0).sum(0).tolist() == [4, 4, 4, 4]
    taken = moe.router(x).softmax(-1)[0].topk(4, dim=0).indices
    unrouted = sorted(set(range(16)) - set(taken.flatten().tolist()))
    assert unrouted and (moe(x)[0, unrouted] == 0).all()


@torch.no_grad()
def test_router_unmodulated_changes_the_routing_alone():
    plain, x, sigma, caption, *_ = case()
    unmodulated = case(router_unmodulated=True)[0]
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in unmodulated.named_parameters()]
    assert not torch.allclose(plain(x, sigma, caption), unmodulated(x, sigma, caption))
    for net in (plain, unmodulated):  # without modulation both read the same
        for block in [*net.mixer, *net.blocks]:
            block.modulation.weight.zero_()
            block.modulation.bias.fill_(0).view(6, -1)[[2, 5]] = 1
    torch.testing.assert_close(plain(x, sigma, caption), unmodulated(x, sigma, caption))


# --- configurations --------------------------------------------------------------------------------------------------


def test_which_blocks_are_sparse():
    net = case(depth=6, mixer_depth=3, moe_every=1)[0]
    sparse = [[isinstance(b.mlp, model.ExpertChoiceMLP) for b in blocks] for blocks in (net.mixer, net.blocks)]
    assert sparse == [[False, True, True], [True] * 5 + [False]]
    assert not any(isinstance(m, model.ExpertChoiceMLP) for m in case(num_experts=0)[0].modules())


@pytest.mark.parametrize("changes", [
    dict(num_experts=0), dict(mixer_depth=0), dict(mixer_dim=32), dict(patch_size=4, num_experts=1),
    dict(router_unmodulated=True), dict(attn_ratio=(1, 1), mlp_ratio=(4, 4))])
def test_variants_train_by_config_alone(changes):
    net, x, sigma, caption, noise, ids = case(B=4, random=False, **changes)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = model.edm_loss(net, x, caption, sigma, noise, ids)
        loss.backward()
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("changes, words", [
    (dict(latent_size=9), "patch_size"), (dict(dim=36), "head_dim"), (dict(mixer_dim=20), "mixer_dim")])
def test_impossible_configs_are_errors(changes, words):
    with pytest.raises(ValueError, match=words):
        MicroDiTConfig(**SMALL | changes)


def test_inputs_that_do_not_fit_are_errors():
    net, x, sigma, caption, *_ = case()
    for bad in ((x[:, :, :4], sigma, caption), (x, sigma, caption[..., :3])):
        with pytest.raises(ValueError, match="do not fit the network"):
            net(*bad)
    net, x, sigma, caption, _, ids = case(num_experts=16, expert_capacity=1.0)
    with pytest.raises(ValueError, match=r"capacity 1.0 \* tokens 4 / experts 16"):
        net(x, sigma, caption, ids_keep=ids)


@torch.no_grad()
def test_initial_network_denoises_to_the_skip_path():
    net, x, sigma, caption, *_ = case(random=False)
    assert net(x, sigma, caption).abs().max() == 0
    for block, depth in ((net.blocks[1], 4), (net.mixer[1], 8)):
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(depth), rel=0.2)


# --- samplers --------------------------------------------------------------------------------------------------------


class GaussianData(torch.nn.Module):
    """The exact network for data ~ N(mean(caption), spread^2), whose sampling trajectories are known in closed form"""

    def __init__(self, spread=0.7):
        super().__init__()
        self.spread, self.batches = torch.nn.Parameter(torch.tensor(spread, dtype=torch.float64)), []

    def forward(self, x, c_noise, caption, ids_keep=None):
        self.batches.append(len(x))
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        c_skip, c_out, c_in, _ = model.preconditioning(sigma)
        noisy, mean = x / c_in, caption.mean((1, 2)).view(-1, 1, 1, 1)
        D = (self.spread ** 2 * noisy + sigma ** 2 * mean) / (self.spread ** 2 + sigma ** 2)
        return (D - c_skip * noisy) / c_out

    def solution(self, noise, mean, sigma_max=80.0):
        return mean + (noise * sigma_max - mean) * (self.spread ** 2 / (self.spread ** 2 + sigma_max ** 2)).sqrt()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
@torch.no_grad()
def test_samplers_converge_with_second_order(sampler, guidance):
    net = GaussianData()
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    caption = torch.full((4, 3, 5), 0.5, dtype=torch.float64)
    exact = net.solution(noise, guidance * 0.5)  # guidance moves the mean, as the negative branch has mean 0
    errors = [(model.sample(net, noise, caption, steps, guidance, sampler) - exact).abs().max().item()
              for steps in (20, 40, 80, 160)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(1.7 < order < 2.4 for order in orders), (errors, orders)
    assert errors[-1] < 3e-3


def test_guidance_runs_both_branches_in_one_batch_and_guidance_1_runs_one():
    noise, caption = torch.zeros(3, 2, 4, 4), torch.zeros(3, 3, 5)
    for guidance, sampler, batches in ((1, "heun", [3] * 11), (2, "heun", [6] * 11), (1, "dpmpp_2m", [3] * 6),
                                       (2, "dpmpp_2m", [6] * 6)):
        net = GaussianData()
        model.sample(net, noise, caption, 6, guidance, sampler)
        assert net.batches == batches


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_negative_captions_sigma_max_and_single_steps(sampler):
    net, noise, caption = GaussianData(), torch.ones(1, 1, 2, 2), torch.full((1, 1, 1), 0.5)
    out = model.sample(net, noise, caption, 80, 3.0, sampler, sigma_max=10.0, negative_caption=-caption)
    exact = net.solution(noise.double(), -0.5 + 3.0, 10.0)  # the negative caption in the place of the empty one
    torch.testing.assert_close(out.double(), exact, atol=5e-3, rtol=0)
    assert model.sample(net, noise, caption, 1, 1, sampler).isfinite().all()


@pytest.mark.parametrize("bad", [dict(sampler="euler"), dict(steps=0), dict(sigma_max=0.001)])
def test_bad_sampler_settings_are_errors(bad):
    with pytest.raises(ValueError, match="sampler|steps|sigma"):
        model.sample(GaussianData(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1), **bad)
