"""
The KL autoencoder of latent diffusion (Rombach et al. 2022), for inference, with the tensor names of diffusers' files.

    vae = load("stabilityai/sdxl-vae")          # a hub id, a folder, or one .safetensors file in the LDM format
    latents = vae.encode(images, generator)     # scaled, as the diffusion network sees them
    images = vae.decode(latents)

Nothing about its shape is assumed: it is built from config.json, or for a single file from the tensors.
"""
import json
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

SLICE = 4  # pictures that go through the network at once: memory depends on it and not on the batch
# what diffusers assumes where a config.json says nothing; the scaling factor is not among them, on purpose
DEFAULTS = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [64], "layers_per_block": 1,
    "norm_num_groups": 32, "act_fn": "silu", "shift_factor": None, "force_upcast": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True, "latents_mean": None, "latents_std": None}


class ResnetBlock(nn.Module):
    def __init__(self, channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention of all positions, in one head as wide as the layer"""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)                                       # (B, H*W, C)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))        # (B, 1, H*W, C)
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one-sided, as it was trained


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The ResNet blocks of one resolution, then a change of resolution if it has one"""

    def __init__(self, channels, out_channels, layers, groups, down=False, up=False):
        super().__init__()
        widths = [channels] + [out_channels] * layers
        self.resnets = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        if down:
            self.downsamplers = nn.ModuleList([Downsample(out_channels)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(out_channels)])

    def forward(self, x):
        for layer in [*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())]:
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x):
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, groups = c["block_out_channels"], c["norm_num_groups"]
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, c["layers_per_block"], groups, down=i < len(widths) - 1)
            for i, w in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], groups, c["mid_block_add_attention"])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c["latent_channels"], 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, groups = c["block_out_channels"][::-1], c["norm_num_groups"]
        self.conv_in = nn.Conv2d(c["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, c["mid_block_add_attention"])
        self.up_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, c["layers_per_block"] + 1, groups, up=i < len(widths) - 1)
            for i, w in enumerate(widths))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c["out_channels"], 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class KLAutoencoder(nn.Module):
    """Images (B,3,H,W) in [-1, 1], H and W multiples of `downsample`; latents (B,latent_channels,H/f,W/f).

    Scaled latents are (z - shift) * scaling_factor, where shift is the config's shift_factor or 0.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = DEFAULTS | config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        latent = c["latent_channels"]
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if c["use_quant_conv"] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if c["use_post_quant_conv"] else nn.Identity()
        self.latent_channels, self.downsample = latent, 2 ** (len(c["block_out_channels"]) - 1)
        self.scaling_factor, self.shift = c["scaling_factor"], c["shift_factor"] or 0.0

    @torch.no_grad()
    def posterior(self, images):
        """Mean and log-variance of the unscaled latents, each (B,C,h,w), in float32"""
        weight = self.encoder.conv_in.weight
        moments = torch.cat([self.quant_conv(self.encoder(part.to(weight))) for part in images.split(SLICE)])
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images, generator=None):
        """Scaled latents: one draw from the posterior, or its mean without a generator.

        generator: one torch.Generator, or a list of B so that a picture's draw does not depend on its batch.
        """
        mean, logvar = self.posterior(images)
        if generator is not None:
            parts = zip(mean.split(1), generator) if isinstance(generator, (list, tuple)) else [(mean, generator)]
            noise = torch.cat([torch.randn(m.shape, generator=g, device=g.device).to(m) for m, g in parts])
            mean = mean + (0.5 * logvar).exp() * noise
        return (mean - self.shift) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents -> images in about [-1, 1], float32"""
        z = latents.float() / self.scaling_factor + self.shift
        weight = self.decoder.conv_in.weight
        return torch.cat([self.decoder(self.post_quant_conv(part.to(weight))).float() for part in z.split(SLICE)])


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(name, device="cpu", dtype=None, scaling_factor=None):
    """The autoencoder of a hub id ("stabilityai/sdxl-vae", "ORG/NAME/SUBFOLDER"), a folder or a .safetensors file.

    dtype None: bfloat16 on a GPU, float32 elsewhere. ValueError says what is missing or does not fit.
    """
    path = Path(name)
    if path.is_file():
        config, tensors = single_file(path)
    else:
        config, tensors = folder_files(path if path.is_dir() else download(name), name)
    if scaling_factor is None:
        scaling_factor = config.get("scaling_factor")
    if not scaling_factor:
        where = "a single file does not hold one" if path.is_file() else "its config.json does not name one"
        raise ValueError(f"autoencoder {name}: {where}, so give scaling_factor (SDXL's is 0.13025); a wrong one would "
                         "train on latents of the wrong scale")
    check_config(config, name)
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if dtype == torch.float16 and (DEFAULTS | config)["force_upcast"]:
        raise ValueError(f"autoencoder {name} overflows in float16, which gives black pictures (its config has "
                         "force_upcast): use bfloat16 or float32, or madebyollin/sdxl-vae-fp16-fix")
    with torch.device("meta"):
        vae = KLAutoencoder(config | {"scaling_factor": scaling_factor})
    tensors = {new_name(n): squeeze_attention(n, t) for n, t in tensors.items()}
    wanted = {n: p.shape for n, p in vae.named_parameters()}
    problems = [f"missing {n}" for n in wanted if n not in tensors]
    problems += [f"left over {n}" for n in tensors if n not in wanted]
    problems += [f"{n} is {tuple(tensors[n].shape)}, the config wants {tuple(s)}" for n, s in wanted.items()
                 if n in tensors and tensors[n].shape != s]
    if problems:
        raise ValueError(f"autoencoder {name}: its weights do not fit its config in {len(problems)} tensors: "
                         + "; ".join(problems[:5]))
    vae.load_state_dict({n: t.to(device, dtype) for n, t in tensors.items()}, assign=True)
    vae.name = str(name)
    return vae.eval().requires_grad_(False)


def check_config(config, name):
    c = DEFAULTS | config
    unknown = [t for t in c.get("down_block_types", []) if t != "DownEncoderBlock2D"]
    unknown += [t for t in c.get("up_block_types", []) if t != "UpDecoderBlock2D"]
    if unknown or c["act_fn"] != "silu" or c["latents_mean"] or c["latents_std"]:
        what = unknown or f"act_fn {c['act_fn']}, latents_mean {c['latents_mean']}, latents_std {c['latents_std']}"
        raise ValueError(f"autoencoder {name} is not of the kind that this code builds: {what}")


def folder_files(folder, name):
    """(config, tensors) of a folder in the diffusers format; a whole pipeline's folder has it under vae/"""
    folder = Path(folder)
    if not (folder / "config.json").is_file() and (folder / "vae/config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise ValueError(f"autoencoder {name}: no config.json in {folder}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"autoencoder {name}: {folder / 'config.json'} is not JSON ({error})") from None
    for weights in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        if (folder / weights).is_file():
            return config, read_safetensors(folder / weights)
    if (folder / "diffusion_pytorch_model.bin").is_file():
        return config, torch.load(folder / "diffusion_pytorch_model.bin", map_location="cpu", weights_only=True)
    raise ValueError(f"autoencoder {name}: no diffusion_pytorch_model.safetensors in {folder}")


def read_safetensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from None


def download(name):
    """The folder of a hub repository, fetched with the hub client that transformers brings"""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    parts = name.split("/")
    if len(parts) < 2 or name.startswith((".", "/", "~")) or not all(parts):
        raise ValueError(f"autoencoder {name}: there is no such file or folder, and a hub id looks like "
                         "stabilityai/sdxl-vae")
    repo, sub = "/".join(parts[:2]), "/".join(parts[2:])
    start = f"{sub}/" if sub else ""
    files = [f"{start}{f}" for f in ("config.json", "diffusion_pytorch_model.safetensors")]
    if not sub:
        files += [f"vae/{f}" for f in files]
    try:
        return Path(snapshot_download(repo, allow_patterns=files)) / sub
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"autoencoder {name}: neither a file or folder here, nor could it be fetched from the hub "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None


LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def new_name(name):
    """Today's name of an attention tensor of early diffusers"""
    return re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{LEGACY[m[2]]}.", name)


def squeeze_attention(name, tensor):
    """Attention layers were once 1x1 convolutions"""
    return tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor


def single_file(path):
    """(config without a scaling factor, tensors) of one file with the names of the LDM code, read off its shapes"""
    if path.suffix != ".safetensors":
        raise ValueError(f"autoencoder {path}: a single file must be .safetensors, as others may run code when opened")
    tensors = read_safetensors(path)
    if any(n.startswith("first_stage_model.") for n in tensors):  # a whole checkpoint, with its autoencoder in it
        tensors = {n.removeprefix("first_stage_model."): t for n, t in tensors.items()
                   if n.startswith("first_stage_model.")}
    if "encoder.down.0.block.0.conv1.weight" not in tensors:
        raise ValueError(f"autoencoder {path}: not an LDM autoencoder (no encoder.down.0.block.0.conv1.weight); a "
                         "diffusers file belongs into a folder with its config.json")
    levels = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.down."))
    layers = 1 + max(int(n.split(".")[4]) for n in tensors if re.match(r"encoder\.down\.0\.block\.", n))
    config = {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1], "layers_per_block": layers,
        "block_out_channels": [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
        "use_quant_conv": "quant_conv.weight" in tensors, "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in tensors}
    return config, {ldm_name(n, levels): t for n, t in tensors.items()}


def ldm_name(name, levels):
    """The diffusers name of a tensor of the LDM code"""
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    for old, new in ((".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."), (".block.", ".resnets."),
                     (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
                     (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
                     (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
                     (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
                     (".downsample.conv.", ".downsamplers.0.conv."), (".upsample.conv.", ".upsamplers.0.conv."),
                     (".nin_shortcut.", ".conv_shortcut."), (".norm_out.", ".conv_norm_out.")):
        name = name.replace(old, new)
    return name
