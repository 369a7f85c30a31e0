"""
MicroDiT ("Stretching Each Dollar", CVPR 2025, arXiv 2407.15811) and the EDM diffusion around it (Karras et al. 2022).

    noisy latent -> patches -> patch mixer over ALL of them -> drop 75 % -> backbone over the kept ones -> denoised

Letters in the shape comments: B images, T = (H/p)(W/p) patches, K kept patches, L caption tokens, d width of a block,
D width of the backbone, E experts, k tokens an expert takes per image.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SIGMA_DATA = 0.9  # standard deviation that the latents are scaled to


@dataclass
class MicroDiTConfig:
    """The defaults are the paper's XL/2 at 256 px with a 4-channel autoencoder."""
    latent_size: int = 32                       # height and width of the latents (>= 1, <= 4096)
    latent_channels: int = 4                    # of the autoencoder (>= 1)
    patch_size: int = 2                         # latent pixels per patch and axis (>= 1)
    dim: int = 1024                             # width of the backbone (>= 1, <= 65536)
    depth: int = 28                             # backbone blocks (>= 1, <= 1000)
    head_dim: int = 64                          # width of an attention head (>= 1)
    mlp_multiple: int = 256                     # hidden widths of the MLPs are rounded up to a multiple of it (>= 1)
    caption_dim: int = 1024                     # width of the caption embedding (>= 1)
    pos_scale: float = 1.0                      # positions are divided by it: 1 at 256 px, 2 at 512 px (> 0)
    attn_ratio: tuple[float, float] = (0.5, 1.0)  # layer-wise scaling: attention width / dim, first, last (> 0, <= 100)
    mlp_ratio: tuple[float, float] = (0.5, 4.0)   # layer-wise scaling: MLP width / dim, first, last (> 0, <= 100)
    mixer_depth: int = 6                        # patch mixer blocks; 0: no mixer, naive masking (>= 0, <= 1000)
    mixer_dim: int = 768                        # width of the mixer (>= 1, <= 65536)
    mixer_mlp_ratio: float = 4.0                # MLP width / mixer_dim (> 0, <= 100)
    num_experts: int = 8                        # 0: dense MLPs everywhere (>= 0, <= 4096)
    expert_capacity: float = 2.0                # experts that process a token, on average (> 0)
    moe_every: int = 2                          # of so many successive blocks, the last one has experts (>= 1)
    mixer_conv: bool = False                    # a depthwise 3x3 convolution in front of the mixer's MLPs; not the
                                                # paper's, docs/masking.md says what it gains

    def __post_init__(self):
        self.attn_ratio, self.mlp_ratio = tuple(self.attn_ratio), tuple(self.mlp_ratio)  # JSON gives lists
        for name, value, divisor, of in (
                ("latent_size", self.latent_size, self.patch_size, f"patch_size {self.patch_size}"),
                ("dim", self.dim, self.head_dim, f"head_dim {self.head_dim}"),
                ("mixer_dim", self.mixer_dim * (self.mixer_depth > 0), self.head_dim, f"head_dim {self.head_dim}"),
                ("dim", self.dim, 4, "4, which the position table needs")):
            if value % divisor:
                raise ValueError(f"{name} {value} is not a multiple of {of}")

    @property
    def tokens(self):
        return (self.latent_size // self.patch_size) ** 2


def round_up(n, multiple):
    """Round n up to a multiple of `multiple`, and to one of it at least."""
    return max(1, -(-n // multiple)) * multiple


def expert_tokens(capacity, tokens, experts):
    """Return how many tokens each expert takes per image, int(capacity * tokens / experts); ValueError if none."""
    k = int(capacity * tokens / experts)
    if k < 1:
        raise ValueError(f"int(capacity {capacity} * tokens {tokens} / experts {experts}) is 0: raise expert_capacity, "
                         "keep more tokens, or use fewer experts")
    return min(k, tokens)


def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-6, bias=False)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


# --- Layers ---


class Attention(nn.Module):
    """Multi-head attention of x (B,T,d) to itself, or with cross=True to a caption (B,L,d), `width` wide inside."""

    def __init__(self, dim, width, head_dim, cross=False):
        super().__init__()
        self.heads, self.width, self.cross = width // head_dim, width, cross
        if cross:
            self.q = nn.Linear(dim, width, bias=False)
            self.kv = nn.Linear(dim, 2 * width, bias=False)
        else:
            self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.proj = nn.Linear(width, dim, bias=False)

    def init_weights(self, out_std):
        for linear in (self.q, self.kv) if self.cross else (self.qkv,):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)

    def forward(self, x, caption=None):
        q, k, v = (self.q(x), *self.kv(caption).chunk(2, -1)) if self.cross else self.qkv(x).chunk(3, -1)
        # normalised over all heads together, before they are split
        q, k = (F.layer_norm(t, (self.width,), eps=1e-6) for t in (q, k))
        q, k, v = (t.to(v.dtype).unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(hidden, dim, bias=False)

    def init_weights(self, out_std):
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        for linear in (self.w2, self.w3):
            nn.init.trunc_normal_(linear.weight, std=out_std)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class ExpertChoiceMLP(nn.Module):
    """Expert-choice mixture of experts (Zhou et al. 2022): every expert takes its top k tokens of each image.

    So the load is balanced without an auxiliary loss. A token that no expert takes comes out as zero.
    """

    def __init__(self, dim, hidden, num_experts, capacity):
        super().__init__()
        self.capacity, self.num_experts = capacity, num_experts
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))

    def init_weights(self, out_std):
        for weight, std in ((self.w1, 0.02), (self.w2, out_std), (self.router.weight, 0.02)):
            nn.init.trunc_normal_(weight, std=std)

    def forward(self, x):
        B, T, d = x.shape
        k = expert_tokens(self.capacity, T, self.num_experts)
        probs = self.router(x).float().softmax(-1)                                              # (B, T, E)
        weight, index = probs.permute(2, 0, 1).topk(k, dim=-1)                                  # (E, B, k)
        rows = (index + T * torch.arange(B, device=x.device).view(1, B, 1)).flatten()           # rows of (B*T, d)
        taken = x.reshape(B * T, d).index_select(0, rows).view(self.num_experts, B * k, d)
        out = torch.bmm(F.gelu(torch.bmm(taken, self.w1)), self.w2)                             # (E, B*k, d)
        out = (out * weight.reshape(self.num_experts, B * k, 1)).view(-1, d)
        return out.new_zeros(B * T, d).index_add(0, rows, out).view(B, T, d).to(x.dtype)


class Neighbours(nn.Module):
    """Adds a depthwise 3x3 convolution over the grid of all patches (B,T,d); zero at first."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)

    def init_weights(self, out_std):
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        side = math.isqrt(x.shape[1])
        return x + self.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """x += gate * SelfAttn(adaLN(x));  x += CrossAttn(LN(x), caption);  x += gate * MLP(adaLN(x))"""

    def __init__(self, config, dim, attn_ratio, mlp_ratio, sparse, conv=False):
        super().__init__()
        c = config
        self.norm1, self.norm2, self.norm3 = layer_norm(dim), layer_norm(dim), layer_norm(dim)
        width = dim if attn_ratio == 1 else round_up(int(dim * attn_ratio), 2 * c.head_dim)
        self.attn = Attention(dim, width, c.head_dim)
        self.cross_attn = Attention(dim, dim, c.head_dim, cross=True)
        if sparse:
            hidden = round_up(int(dim * mlp_ratio), c.mlp_multiple)
            self.mlp = ExpertChoiceMLP(dim, hidden, c.num_experts, c.expert_capacity)
        else:
            self.mlp = SwiGLU(dim, swiglu_hidden(dim, mlp_ratio, c.mlp_multiple))
        self.modulation = nn.Linear(c.dim, 6 * dim)
        self.neighbours = Neighbours(dim) if conv else nn.Identity()

    def init_weights(self, out_std):
        """Have each child with an init_weights(out_std) initialise itself. Zero gates make the block the identity."""
        for layer in self.children():
            if hasattr(layer, "init_weights"):
                layer.init_weights(out_std)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x, caption, cond):
        """Map x (B,T,d), caption (B,L,d) and cond (B,D), already through its GELU, to (B,T,d)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(cond).chunk(6, -1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        x = x + self.cross_attn(self.norm2(x), caption)
        h = self.neighbours(modulate(self.norm3(x), shift_m, scale_m))
        return x + gate_m.unsqueeze(1) * self.mlp(h)


class CaptionBlock(nn.Module):
    """Pre-norm transformer block that refines the caption tokens once, before every cross-attention reads them."""

    def __init__(self, dim, head_dim, mlp_multiple):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(dim), layer_norm(dim)
        self.attn = Attention(dim, dim, head_dim)
        self.mlp = SwiGLU(dim, swiglu_hidden(dim, 4, mlp_multiple))

    def init_weights(self):
        for layer in (self.attn, self.mlp):
            layer.init_weights(out_std=0.02)
        nn.init.zeros_(self.attn.proj.weight)  # it starts as the identity
        nn.init.zeros_(self.mlp.w3.weight)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CaptionMLP(nn.Module):
    def __init__(self, in_dim, dim):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(in_dim, dim), layer_norm(dim), nn.Linear(dim, dim)

    def init_weights(self):
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x):
        return self.fc2(self.norm(gelu_tanh(self.fc1(x))))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm, self.modulation, self.linear = layer_norm(dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, out_dim)

    def init_weights(self):
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x, cond):
        return self.linear(modulate(self.norm(x), *self.modulation(cond).chunk(2, -1)))


def swiglu_hidden(dim, ratio, multiple):
    return round_up(int(2 / 3 * int(dim * ratio)), multiple)


def position_table(config):
    """Return the fixed 2D sin-cos table (T, dim): half of the channels for the column, then half for the row."""
    side, quarter = config.latent_size // config.patch_size, config.dim // 4
    freq = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.arange(side, dtype=torch.float64)[:, None] / config.pos_scale * freq           # (side, dim/4)
    axis = torch.cat([angle.sin(), angle.cos()], -1)                                             # (side, dim/2)
    column, row = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([column, row], -1).flatten(0, 1).float()


def noise_level_features(c_noise, size=512):
    """Return sinusoidal features of ln(sigma)/4: (B,) -> (B, size)."""
    half = size // 2
    freq = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=c_noise.device) / half)
    angle = c_noise.float().unsqueeze(1) * freq
    return torch.cat([angle.cos(), angle.sin()], -1)


def patchify(x, p):
    """Cut (B,C,H,W) into (B, T, p*p*C), patches row by row, each in (row, column, channel) order."""
    B, C, H, W = x.shape
    return x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x, p):
    """Undo patchify for square pictures."""
    B, T, n = x.shape
    side = math.isqrt(T)
    return x.view(B, side, side, p, p, n // (p * p)).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, side * p, side * p)


def kept_patches(uniforms, mask_ratio, mask="random"):
    """Choose the patches that masking keeps: uniforms (B,T) -> ids_keep (B, int(T(1-r))), smallest draws, ascending.

    "grouped" keeps as many of each cell of 2 x 2 patches, cell by cell, so that no part of the picture goes unseen.
    """
    if mask == "grouped":
        B, T = uniforms.shape
        side, keep = math.isqrt(T), 4 * (1 - mask_ratio)
        if side % 2 or keep not in (1, 2, 3, 4):
            raise ValueError(f"mask_ratio {mask_ratio} of {side} x {side} patches: a grouped mask drops 0, 0.25, 0.5 "
                             "or 0.75 of each 2 x 2 patches, and needs an even number of patches on a side")
        cells = patchify(torch.arange(T, device=uniforms.device).view(1, 1, side, side), 2)[0]   # (T/4, 4)
        order = uniforms[:, cells].argsort(-1)[..., :int(keep)]                                  # (B, T/4, kept ones)
        return cells.expand(B, -1, -1).gather(2, order).flatten(1)
    keep = int(uniforms.shape[1] * (1 - mask_ratio))
    if not 1 <= keep <= uniforms.shape[1]:
        raise ValueError(f"mask_ratio {mask_ratio} keeps {keep} of {uniforms.shape[1]} patches: it must be at least 0 "
                         "and leave one patch")
    return uniforms.argsort(1)[:, :keep]


def gather_tokens(x, ids):
    """Pick tokens: x (B,T,d), ids (B,K) -> (B,K,d)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# --- The network ---


class MicroDiT(nn.Module):
    """F(c_in x; c_noise, caption) of EDM: patch mixer, deferred masking, layer-wise scaled backbone (paper, sec. 3)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.activation_checkpointing = False
        self.patch_embed = nn.Conv2d(c.latent_channels, c.dim, c.patch_size, stride=c.patch_size)
        self.register_buffer("pos_embed", position_table(c), persistent=False)
        self.noise_embed = nn.Sequential(nn.Linear(512, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))
        self.caption_embed = CaptionMLP(c.caption_dim, c.dim)
        self.caption_block = CaptionBlock(c.dim, c.head_dim, c.mlp_multiple)
        self.pooled_embed = CaptionMLP(c.dim, c.dim)

        def bridge(a, b):  # between the widths of backbone and mixer
            same = a == b or not c.mixer_depth
            return nn.Identity() if same else nn.Sequential(layer_norm(a), nn.Linear(a, b, bias=False))
        self.mixer_in, self.mixer_caption = bridge(c.dim, c.mixer_dim), bridge(c.dim, c.mixer_dim)
        self.mixer_out = bridge(c.mixer_dim, c.dim)
        sparse = [c.num_experts > 0 and (i + 1) % c.moe_every == 0 for i in range(max(c.depth, c.mixer_depth))]
        self.mixer = nn.ModuleList(Block(c, c.mixer_dim, 1, c.mixer_mlp_ratio, sparse[i] and i > 0, c.mixer_conv)
                                   for i in range(c.mixer_depth))
        ratios = zip(linspace(*c.attn_ratio, c.depth), linspace(*c.mlp_ratio, c.depth))
        self.blocks = nn.ModuleList(Block(c, c.dim, attn_ratio, mlp_ratio, sparse[i] and i < c.depth - 1)
                                    for i, (attn_ratio, mlp_ratio) in enumerate(ratios))
        self.final = FinalLayer(c.dim, c.patch_size ** 2 * c.latent_channels)
        self.init_weights()

    def forward(self, x, c_noise, caption, ids_keep=None, kept_only=False, clean=None):
        """Map x (B,C,H,W) scaled by c_in, c_noise (B,) = ln(sigma)/4, caption (B,L,Dc) and ids_keep (B,K) to (B,C,H,W).

        With ids_keep the other patches come back zero; with kept_only they do not come back: (B, K, p*p*C). clean
        (B,C,H,W) are the latents without noise, which edm_loss gives to losses of your own (docs/settings.md).
        """
        c = self.config
        if x.shape[1:] != (c.latent_channels, c.latent_size, c.latent_size) or caption.shape[2:] != (c.caption_dim,):
            raise ValueError(f"latents {tuple(x.shape)} and captions {tuple(caption.shape)} do not fit the network: "
                             f"(B, {c.latent_channels}, {c.latent_size}, {c.latent_size}) and (B, L, {c.caption_dim})")
        # the table is float32, and so are all sums of the blocks' outputs, under autocast too.
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed                      # (B, T, D)
        caption = self.caption_block(self.caption_embed(caption))                                # (B, L, D)
        noise = self.noise_embed(noise_level_features(c_noise).to(self.noise_embed[0].weight.dtype))
        cond = gelu_tanh(noise + self.pooled_embed(caption.mean(1)))                             # (B, D), of all adaLNs

        x, mixer_caption = self.mixer_in(x).to(x.dtype), self.mixer_caption(caption)             # (B, T, d), (B, L, d)
        for block in self.mixer:
            x = self._run(block, x, mixer_caption, cond)
        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)                                                       # (B, K, d)
        x = self.mixer_out(x).to(x.dtype)                                                        # (B, K, D)
        for block in self.blocks:
            x = self._run(block, x, caption, cond)
        x = self.final(x, cond)                                                                  # (B, K, p*p*C)

        if kept_only:
            return x
        if ids_keep is not None:
            x = x.new_zeros(x.shape[0], c.tokens, x.shape[2]).scatter(1, ids_keep.unsqueeze(-1).expand_as(x), x)
        return unpatchify(x, c.patch_size)

    def _run(self, block, *inputs):
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing random inside
        return block(*inputs)

    @torch.no_grad()
    def init_weights(self):
        """Draw Linears Xavier-uniform, except where a layer's own init_weights says otherwise (the paper's code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.normal_(self.noise_embed[0].weight, std=0.02)
        nn.init.normal_(self.noise_embed[2].weight, std=0.02)
        for layer in (self.caption_embed, self.pooled_embed, self.caption_block):
            layer.init_weights()
        for i, block in enumerate(self.blocks):
            block.init_weights(out_std=0.02 / math.sqrt(2 * (i + 1)))
        for block in self.mixer:
            block.init_weights(out_std=0.02 / math.sqrt(2 * self.config.depth))
        self.final.init_weights()


def linspace(first, last, n):
    return torch.linspace(first, last, n, dtype=torch.float64, device="cpu").tolist()


# --- EDM: preconditioning, loss, samplers ---


def denoise(net, x, sigma, caption, ids_keep=None):
    """Compute D(x; sigma) = c_skip x + c_out F(c_in x, ln(sigma)/4) (EDM, eq. 7): x (B,C,H,W), sigma (B,) -> (B,C,H,W).

    Computed in x's precision, except inside the network. With ids_keep ignore the other patches: their F is zero.
    """
    c_skip, c_out, c_in, c_noise = preconditioning(sigma.view(-1, 1, 1, 1).to(x.dtype))
    first = next(iter(getattr(net, "parameters", tuple)()), None)
    dtype = torch.float32 if first is None else first.dtype
    out = net((c_in * x).to(dtype), c_noise.flatten().float(), caption.to(dtype), ids_keep=ids_keep)
    return c_skip * x + c_out * out.to(x.dtype)


def preconditioning(sigma):
    """Return c_skip, c_out, c_in and c_noise of EDM's table 1, each shaped like sigma."""
    total = sigma ** 2 + SIGMA_DATA ** 2
    return SIGMA_DATA ** 2 / total, sigma * SIGMA_DATA / total.sqrt(), total.rsqrt(), sigma.log() / 4


def edm_loss(net, latents, caption, sigma, noise, ids_keep=None, *, reduce=True):
    """Compute the weighted squared error of D (EDM, eq. 8) in float32: latents, noise (B,C,H,W), sigma (B,) -> scalar.

    It is the mean over each picture's kept patches, then over pictures; with reduce=False the B means. noise ~ N(0, 1).
    If the network's forward() sets its attribute extra_loss, a scalar or (B,), that is added in training, and its value
    stays there for the log.
    """
    inner = getattr(net, "module", net)  # of DDP
    inner.extra_loss = None
    sigma_ = sigma.float().view(-1, 1, 1, 1)
    c_skip, c_out, c_in, c_noise = preconditioning(sigma_)
    x = latents.float() + sigma_ * noise.float()
    masked = {} if ids_keep is None else {"ids_keep": ids_keep, "kept_only": True}
    out = net(c_in * x, c_noise.flatten(), caption, clean=latents, **masked).float()
    # (D - latents) / c_out = F - target, and the weight is 1 / c_out^2: so the loss is a plain squared error of F
    target = (latents.float() - c_skip * x) / c_out
    if out.ndim == 3:  # the kept patches alone
        target = gather_tokens(patchify(target, math.isqrt(out.shape[-1] // latents.shape[1])), ids_keep)
    loss = (out - target).square().flatten(1).mean(1)
    if inner.extra_loss is not None and inner.training:
        loss = loss + inner.extra_loss
        inner.extra_loss = inner.extra_loss.detach()  # a network that holds a graph cannot be copied
    return loss.mean() if reduce else loss


def noise_levels(steps, sigma_max=80.0, sigma_min=0.002, rho=7.0):
    """Return a list of `steps` levels from sigma_max down to sigma_min (EDM, eq. 5), and 0 at its end."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigma = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return [*sigma.tolist(), 0.0]


@torch.no_grad()
def sample(net, noise, caption, steps=30, guidance_scale=5.0, sampler="heun", *, sigma_max=80.0, sigma_min=0.002,
           rho=7.0, negative_caption=None, on_step=None):
    """Draw latents (B,C,H,W) from noise ~ N(0, 1) of that shape and captions (B,L,Dc).

    Guidance is D_negative + w (D_caption - D_negative); 1 is none. negative_caption (B,L,Dc) defaults to zeros, which
    caption dropout trains. "heun" costs 2*steps-1 evaluations, "dpmpp_2m" `steps`. on_step(D) is called at each step.
    """
    if sampler not in SAMPLERS or steps < 1 or not 0 < sigma_min <= sigma_max:
        raise ValueError(f"sampler {sampler}, steps {steps}, sigma_min {sigma_min}, sigma_max {sigma_max}: the sampler "
                         f"must be {' or '.join(SAMPLERS)}, steps at least 1, and 0 < sigma_min <= sigma_max")
    if guidance_scale != 1:
        caption = torch.cat([caption, torch.zeros_like(caption) if negative_caption is None else negative_caption])

    def denoised(x, sigma):
        if guidance_scale == 1:
            return denoise(net, x, x.new_full((len(x),), sigma), caption)
        both = denoise(net, torch.cat([x, x]), x.new_full((2 * len(x),), sigma), caption)
        with_caption, without = both.chunk(2)
        return without + guidance_scale * (with_caption - without)

    sigmas = noise_levels(steps, sigma_max, sigma_min, rho)
    x = noise.to(torch.float32 if noise.device.type == "mps" else torch.float64) * sigmas[0]  # Macs lack float64
    return SAMPLERS[sampler](denoised, x, sigmas, on_step or (lambda denoised: None)).float()


def heun(denoised, x, sigmas, on_step):
    """Follow EDM's algorithm 1 without churn: second order, but for Euler's last step to sigma 0."""
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        h = next_sigma - sigma
        d = denoised(x, sigma)
        slope = (x - d) / sigma
        euler = x + h * slope
        if next_sigma > 0:
            slope = (slope + (euler - denoised(euler, next_sigma)) / next_sigma) / 2
        x = x + h * slope
        on_step(d)
    return x


def dpmpp_2m(denoised, x, sigmas, on_step):
    """Follow DPM-Solver++(2M) (Lu et al. 2022) with lambda = -ln sigma: second order from one evaluation a step."""
    previous, previous_h = None, None
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        d = now = denoised(x, sigma)
        h = math.log(sigma / next_sigma) if next_sigma else math.inf  # the last step returns the denoised picture
        if previous is not None and next_sigma > 0:
            d = now + (now - previous) * (h / (2 * previous_h))
        x = next_sigma / sigma * x - math.expm1(-h) * d
        previous, previous_h = now, h
        on_step(now)
    return x


SAMPLERS = {"heun": heun, "dpmpp_2m": dpmpp_2m}
