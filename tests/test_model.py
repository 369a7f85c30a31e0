"""Masking, experts, configurations and samplers, through the functions of model.py."""
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
    """(network, latents, sigma, captions, noise, ids of kept patches) of SMALL with changes.

    random: weights everywhere, as the real initialisation starts as the identity.
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


# --- masking ---


@given(st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 99))
@settings(max_examples=50)
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


@given(st.integers(1, 6), st.sampled_from([0.0, 0.25, 0.5, 0.75]), st.integers(0, 99))
@settings(max_examples=30)
def test_a_grouped_mask_keeps_the_smallest_draws_of_every_2_by_2(half, ratio, seed):
    uniforms = torch.rand(3, 4 * half * half, generator=torch.Generator().manual_seed(seed))
    ids = model.kept_patches(uniforms, ratio, "grouped")
    assert ids.shape == (3, int(4 * half * half * (1 - ratio)))
    kept = torch.zeros(uniforms.shape, dtype=torch.bool).scatter(1, ids, True)
    kept, draws = (t.view(3, half, 2, half, 2).transpose(2, 3).flatten(3) for t in (kept, uniforms))
    in_order = kept.gather(3, draws.argsort(3))
    assert torch.equal(in_order, (torch.arange(4) < 4 * (1 - ratio)).expand_as(in_order))


@torch.no_grad()
def test_masked_output_is_zero_elsewhere_and_kept_only_agrees():
    net, x, sigma, caption, noise, ids = case()
    full = model.patchify(net(x, sigma, caption, ids_keep=ids), 2)
    kept = net(x, sigma, caption, ids_keep=ids, kept_only=True)
    assert torch.equal(model.gather_tokens(full, ids), kept)
    assert (full.abs().sum(-1) > 0).sum() == ids.numel()
    everything = torch.arange(16).expand(2, 16)  # every patch in order is no masking
    torch.testing.assert_close(net(x, sigma, caption, ids_keep=everything), net(x, sigma, caption))


@pytest.mark.parametrize("changes, seen", [({}, True), (dict(mixer_depth=0), False)])
@torch.no_grad()
def test_the_mixer_sees_removed_patches_and_naive_masking_does_not(changes, seen):
    net, x, sigma, caption, _, ids = case(B=1, **changes)
    changed = model.patchify(x, 2).clone()
    changed[:, next(i for i in range(16) if i not in ids[0].tolist())] += 1
    before, after = (net(v, sigma, caption, ids_keep=ids) for v in (x, model.unpatchify(changed, 2)))
    assert (before - after).abs().max() > 1e-3 if seen else torch.equal(before, after)
    assert any(name.startswith("mixer") for name, _ in net.named_parameters()) == seen


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_loss_is_the_weighted_error_of_the_denoised_picture(masked):
    net, x, sigma, caption, noise, ids = case()
    ids = ids if masked else None
    D = model.denoise(net, x + sigma.view(-1, 1, 1, 1) * noise, sigma, caption, ids)
    error = model.patchify((D - x) ** 2, 2)
    error = model.gather_tokens(error, ids) if masked else error
    weight = (sigma ** 2 + 0.9 ** 2) / (sigma * 0.9) ** 2
    per_picture = model.edm_loss(net, x, caption, sigma, noise, ids, reduce=False)
    torch.testing.assert_close(per_picture, weight * error.mean((1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.edm_loss(net, x, caption, sigma, noise, ids), per_picture.mean())


# --- layers and configurations ---


def loop_over_experts(moe, x):
    """Do expert choice in its plainest form."""
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
def test_the_mixers_convolution_starts_as_nothing_and_adds_neighbours():
    net, plain = case(random=False, mixer_conv=True)[0], case(random=False)[0]
    assert net.state_dict().keys() - plain.state_dict().keys() == {
        f"mixer.{i}.neighbours.conv.weight" for i in range(2)}
    grid, layer = torch.randn(2, 4, 4, 16), net.mixer[1].neighbours
    assert torch.equal(layer(grid.flatten(1, 2)), grid.flatten(1, 2))
    layer.conv.weight[:, 0, 1, 2] = 1  # each patch gets its right neighbour added, and the last ones nothing
    shifted = torch.cat([grid[:, :, 1:], torch.zeros(2, 4, 1, 16)], 2)
    torch.testing.assert_close(layer(grid.flatten(1, 2)), (grid + shifted).flatten(1, 2))


@pytest.mark.parametrize("changes", [
    dict(num_experts=0), dict(mixer_depth=0), dict(mixer_dim=32), dict(patch_size=4, num_experts=1),
    dict(mixer_conv=True), dict(attn_ratio=(1, 1), mlp_ratio=(4, 4)),
    dict(attn_ratio=(0.001, 1), mlp_ratio=(0.001, 4), mixer_mlp_ratio=0.001)])
def test_variants_train_by_config_alone(changes):
    net, x, sigma, caption, noise, ids = case(B=4, random=False, **changes)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = model.edm_loss(net, x, caption, sigma, noise, ids)
        loss.backward()
        assert all(p.grad is not None and p.numel() for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_initial_network_denoises_to_the_skip_path():
    net, x, sigma, caption, *_ = case(random=False)
    assert net(x, sigma, caption).abs().max() == 0
    for block, depth in ((net.blocks[1], 4), (net.mixer[1], 8)):
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(depth), rel=0.2)


# --- samplers ---


class GaussianData(torch.nn.Module):
    """Is the exact network for data ~ N(mean(caption), spread^2), whose paths are known in closed form."""

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
    net, all_steps = GaussianData(), (20, 40, 80, 160)
    noise = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    caption = torch.full((4, 3, 5), 0.5, dtype=torch.float64)
    exact = net.solution(noise, guidance * 0.5)  # guidance moves the mean, as the negative branch has mean 0
    errors = [(model.sample(net, noise, caption, steps, guidance, sampler) - exact).abs().max().item()
              for steps in all_steps]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(1.7 < order < 2.4 for order in orders), (errors, orders)
    assert errors[-1] < 3e-3
    # guidance runs both branches in one batch, guidance 1 runs one
    evaluations = sum(2 * steps - 1 if sampler == "heun" else steps for steps in all_steps)
    assert net.batches == [4 if guidance == 1 else 8] * evaluations


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_negative_captions_sigma_max_and_single_steps(sampler):
    net, noise, caption = GaussianData(), torch.ones(1, 1, 2, 2), torch.full((1, 1, 1), 0.5)
    out = model.sample(net, noise, caption, 80, 3.0, sampler, sigma_max=10.0, negative_caption=-caption)
    exact = net.solution(noise.double(), -0.5 + 3.0, 10.0)  # the negative caption in the place of the empty one
    torch.testing.assert_close(out.double(), exact, atol=5e-3, rtol=0)
    assert model.sample(net, noise, caption, 1, 1, sampler).isfinite().all()


def draw(**options):
    return model.sample(GaussianData(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1), **options)


def forward(height=8, width=12, **changes):
    net, x, sigma, caption, _, ids = case(**changes)
    return net(x[:, :, :height], sigma, caption[..., :width], ids_keep=ids)


@pytest.mark.parametrize("function, arguments, words", [
    (forward, dict(latent_size=9), "multiple of patch_size"), (forward, dict(mixer_dim=20), "mixer_dim 20"),
    (forward, dict(dim=36), "dim 36 is not a multiple of head"), (forward, dict(dim=34, head_dim=2), "multiple of 4"),
    (forward, dict(height=4), "do not fit the network"), (forward, dict(width=3), "do not fit the network"),
    (forward, dict(num_experts=16, expert_capacity=1.0), r"capacity 1.0 \* tokens 4 / experts 16"),
    (model.kept_patches, dict(uniforms=torch.rand(1, 9), mask_ratio=0.75, mask="grouped"), "a grouped mask drops 0,"),
    (model.kept_patches, dict(uniforms=torch.rand(1, 16), mask_ratio=0.6, mask="grouped"), "a grouped mask drops 0,"),
    (draw, dict(sampler="euler"), "sampler euler"), (draw, dict(steps=0), "steps at least 1"),
    (draw, dict(sigma_max=0.001), "0 < sigma_min <= sigma_max")])
def test_what_cannot_be_is_refused(function, arguments, words):
    with pytest.raises(ValueError, match=words):
        function(**arguments)
