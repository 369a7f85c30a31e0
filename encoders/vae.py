"""
The KL autoencoder of latent diffusion (Rombach et al. 2022), for inference, with the tensor names of diffusers' files.

    vae = load("stabilityai/sdxl-vae")          # a hub id, a folder, or one .safetensors file in the LDM format
                                                # (or a small autoencoder, which tiny.py builds, as such or our file)
    latents = vae.encode(images, generator)     # scaled, as the diffusion network sees them
    images = vae.decode(latents)

Nothing about its shape is assumed: it is built from config.json, or for a single file from the tensors.
"""
import json
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from common.hashing import tensors_hash
from encoders import tiny

SLICE = 4  # pictures that go through the network at once: memory depends on it and not on the batch
# what diffusers assumes where a config.json says nothing; the scaling factor is not among them, on purpose
DEFAULTS = {"latent_channels": 4, "block_out_channels": [64], "layers_per_block": 1, "norm_num_groups": 32,
            "shift_factor": None, "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True}
# what else a config.json may say: all published ones say this, and nothing else is built
BUILT = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True, "latents_mean": None,
         "latents_std": None}
# from the tensor names of the LDM code and of early diffusers to those of today, replaced in this order
RENAMED = {
    "encoder.down.": "encoder.down_blocks.", ".mid.block_1.": ".mid_block.resnets.0.",
    ".mid.block_2.": ".mid_block.resnets.1.", ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
    ".mid.attn_1.proj_out.": ".mid_block.attentions.0.to_out.0.", ".mid.attn_1.": ".mid_block.attentions.0.to_",
    ".block.": ".resnets.", ".downsample.": ".downsamplers.0.", ".upsample.": ".upsamplers.0.",
    ".nin_shortcut.": ".conv_shortcut.", ".norm_out.": ".conv_norm_out.",
    ".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


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
    """Attend from every position to all, in one head as wide as the layer."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)                                       # (B, H*W, C)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))        # (B, 1, H*W, C)
        h = self.to_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Two ResNet blocks at the coarsest resolution, with attention between them."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = resnets([channels] * 3, groups)
        self.attentions = nn.Sequential(Attention(channels, groups))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def chain(**layers):
    """Return the layers one after another, each under its name."""
    return nn.Sequential(OrderedDict(layers))


def resnets(widths, groups):
    return nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:])))


def halve(channels):  # padded on one side only, as it was trained
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def double(channels):
    return chain(larger=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))


def build_levels(widths, layers, groups, name, resample):
    """Return the levels, each of one resolution; all but the last end with a resampler, which is called `name`."""
    levels = nn.Sequential()
    for before, width in zip([widths[0], *widths], widths):
        levels.append(chain(resnets=resnets([before] + [width] * layers, groups)))
        if len(levels) < len(widths):
            levels[-1].add_module(name, nn.Sequential(resample(width)))
    return levels


def build_encoder(c):
    widths, groups, layers = c["block_out_channels"], c["norm_num_groups"], c["layers_per_block"]
    return chain(conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
                 down_blocks=build_levels(widths, layers, groups, "downsamplers", halve),
                 mid_block=MidBlock(widths[-1], groups),
                 conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), activation=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[-1], 2 * c["latent_channels"], 3, padding=1))


def build_decoder(c):
    widths, groups, layers = c["block_out_channels"][::-1], c["norm_num_groups"], c["layers_per_block"] + 1
    return chain(conv_in=nn.Conv2d(c["latent_channels"], widths[0], 3, padding=1),
                 mid_block=MidBlock(widths[0], groups),
                 up_blocks=build_levels(widths, layers, groups, "upsamplers", double),
                 conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), activation=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[-1], 3, 3, padding=1))


class KLAutoencoder(nn.Module):
    """Images (B,3,H,W) in [-1, 1], H and W multiples of `downsample`; latents (B,latent_channels,H/f,W/f).

    Scaled latents are (z - shift) * scaling_factor, where shift is the config's shift_factor or 0.
    """

    def __init__(self, config, name=""):
        super().__init__()
        c = self.config = DEFAULTS | config
        self.name, self.latent_channels = name, c["latent_channels"]
        self.downsample = 2 ** (len(c["block_out_channels"]) - 1)
        self.encoder, self.decoder, n = build_encoder(c), build_decoder(c), self.latent_channels
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1) if c["use_quant_conv"] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(n, n, 1) if c["use_post_quant_conv"] else nn.Identity()
        self.scaling_factor, self.shift = c["scaling_factor"], c["shift_factor"] or 0.0

    @torch.no_grad()
    def posterior(self, images):
        """Return mean and log-variance of the unscaled latents, each (B,C,h,w), in float32."""
        tiny.check_sides(images, self.downsample)
        weight = self.encoder.conv_in.weight
        moments = torch.cat([self.quant_conv(self.encoder(part.to(weight))) for part in images.split(SLICE)])
        mean, logvar = moments.float().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images, generator=None):
        """Return scaled latents: one draw from the posterior, or its mean without a generator.

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
        """Return the images of scaled latents, in about [-1, 1], in float32."""
        z = latents.float() / self.scaling_factor + self.shift
        weight = self.decoder.conv_in.weight
        return torch.cat([self.decoder(self.post_quant_conv(part.to(weight))).float() for part in z.split(SLICE)])


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(name, device="cpu", dtype=None, scaling_factor=None):
    """Load the autoencoder of a hub id ("stabilityai/sdxl-vae", "ORG/NAME/SUBFOLDER"), a folder or a .safetensors file.

    dtype None is bfloat16 on a GPU and float32 elsewhere. ValueError says what is missing or does not fit.
    """
    path, device = Path(name), torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config, tensors = read_single_file(path) if path.is_file() else read_folder(name)
    vae = build(config | ({"scaling_factor": scaling_factor} if scaling_factor else {}), tensors, name)
    if dtype == torch.float16 and vae.config["force_upcast"]:
        raise ValueError(f"autoencoder {name} overflows in float16, which gives black pictures (its config has "
                         "force_upcast): use bfloat16 or float32, or madebyollin/sdxl-vae-fp16-fix")
    return vae.to(device, dtype)


def build(config, tensors, name):
    """Return the autoencoder of a config and tensors; ValueError if they do not fit together."""
    kind = tiny.TinyAutoencoder if config.get("_class_name") == tiny.TINY else KLAutoencoder
    if kind is KLAutoencoder:
        tensors = renamed(tensors, len((DEFAULTS | config)["block_out_channels"]))
    check_config(config, name, kind)
    with torch.device("meta"):
        vae = kind(config, str(name))
    try:
        vae.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"autoencoder {name}: its weights do not fit its config: "
                         + " ".join(str(error).split())[:500]) from None
    vae.sha256 = tensors_hash(vae)
    return vae.eval().requires_grad_(False)


def check_config(config, name, kind):
    unknown = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    unknown -= {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    built = tiny.BUILT if kind is tiny.TinyAutoencoder else BUILT
    unknown |= {f"{key} {config[key]}" for key, value in built.items() if config.get(key, value) != value}
    if unknown:
        raise ValueError(f"autoencoder {name} is not of the kind that this code builds: {', '.join(unknown)}")
    if kind is KLAutoencoder and not config.get("scaling_factor"):
        raise ValueError(f"autoencoder {name} does not name its scaling factor (a single file never does): give "
                         "scaling_factor (SDXL's is 0.13025)")


def read_folder(name):
    """Read (config, tensors) of a folder or hub id in the diffusers format; a pipeline's folder has them under vae/."""
    folder = Path(name) if Path(name).is_dir() else download(name)
    if not (folder / "config.json").is_file() and (folder / "vae/config.json").is_file():
        folder = folder / "vae"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"autoencoder {name}: {folder / 'config.json'} cannot be read ({error})") from None
    return config, read_safetensors(folder / "diffusion_pytorch_model.safetensors")[1]


def read_safetensors(path):
    """Return (metadata, {name: tensor})."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or not a whole safetensors file ({error}): fetch it again") from None


def download(name):
    """Fetch a hub repository and return its folder on this disk."""
    from huggingface_hub import snapshot_download
    parts = str(name).split("/")
    if len(parts) < 2 or parts[0] in ("", ".", "..", "~"):
        raise ValueError(f"autoencoder {name}: there is no such file or folder, and a hub id looks like "
                         "stabilityai/sdxl-vae")
    folder = "/".join(parts[2:])
    files = [f"{start}{file}" for start in (f"{folder}/".lstrip("/"), "vae/")
             for file in ("config.json", "diffusion_pytorch_model.safetensors")]
    try:
        return Path(snapshot_download("/".join(parts[:2]), allow_patterns=files)) / folder
    except (OSError, ValueError) as error:  # the hub's errors are one or the other
        raise ValueError(f"autoencoder {name}: neither a file or folder here, nor could it be fetched from the hub "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None


def renamed(tensors, levels):
    """Return the tensors under the names of today's diffusers, in which the LDM code's decoder counts backwards."""
    result = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        # attention layers were once 1x1 convolutions
        result[name] = tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
    return result


def read_single_file(path):
    """Read (config, tensors) of one file: train_vae.py's, a tiny autoencoder of diffusers, or one with the names of the
    LDM code. Where the file has no config, the tensors' shapes tell it."""
    if path.suffix != ".safetensors":
        raise ValueError(f"autoencoder {path}: a file must be .safetensors, as others may run code when opened")
    (metadata, tensors), prefix = read_safetensors(path), "first_stage_model."
    if "run" in metadata and "config" in (run := json.loads(metadata["run"])):  # of train_vae.py
        return run["config"], tensors
    if {"encoder.layers.0.weight", "decoder.layers.0.weight"} <= tensors.keys():
        return tiny.config_of(tensors) | {"_class_name": tiny.TINY}, tensors
    if any(n.startswith(prefix) for n in tensors):  # a whole checkpoint, with its autoencoder in it
        tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if "encoder.down.0.block.0.conv1.weight" not in tensors:
        raise ValueError(f"autoencoder {path}: not an LDM autoencoder (no encoder.down.0.block.0.conv1.weight), nor a "
                         "whole tiny one (no encoder.layers.0.weight and decoder.layers.0.weight); a diffusers file "
                         "belongs into a folder with its config.json")
    levels = len({n.split(".")[2] for n in tensors if n.startswith("encoder.down.")})
    return {
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "layers_per_block": len({n.split(".")[4] for n in tensors if n.startswith("encoder.down.0.block.")}),
        "block_out_channels": [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
        "use_quant_conv": "quant_conv.weight" in tensors, "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }, tensors
