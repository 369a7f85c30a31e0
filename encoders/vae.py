"""The autoencoder of latent diffusion (Rombach et al. 2022), a stand-in for it, and how autoencoders are loaded."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.files import read_json, reading
from common.machine import compute_dtype, without_float16
from common.tensors import check_tensors, read_tensors, tensors_hash
from encoders.hub import fetch, local
from encoders.tiny import Autoencoder, TinyAutoencoder, chain, conv

WEIGHTS = "diffusion_pytorch_model"
# the attention layers' names in files of early diffusers, where they are 1x1 convolutions
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class Pixels:
    """Lossless stand-in without weights: 2x2 pixels (B,3,H,W) become 12 channels (B,12,H/2,W/2)."""
    latent_channels = 12
    downsample = 2
    scaling_factor = 1.36  # the set `shapes` has a standard deviation of 0.66: this brings it to sigma_data

    def encode(self, images, generator=None):
        return F.pixel_unshuffle(images, self.downsample) * self.scaling_factor

    def decode(self, latents):
        return F.pixel_shuffle(latents / self.scaling_factor, self.downsample)


class ResnetBlock(nn.Module):
    def __init__(self, before, width, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps=1e-6)
        self.conv1 = conv(before, width)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = conv(width, width)
        self.conv_shortcut = nn.Conv2d(before, width, 1) if before != width else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # one head: (B, 1, H*W, C)
        h = self.to_out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = resnets([channels] * 3, groups)
        self.attentions = nn.Sequential(Attention(channels, groups))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def resnets(widths, groups):
    return nn.Sequential(*(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:])))


def build_half(name, widths, layers, groups, channels, out_channels):
    """Return the encoder ("down") or the decoder ("up")."""
    levels, down = nn.Sequential(), name == "down"
    for before, width in zip([widths[0], *widths], widths):
        levels.append(chain(resnets=resnets([before] + [width] * layers, groups)))
        if len(levels) < len(widths):  # the encoder pads on one side only, as it was trained
            resize = (chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)) if down else
                      chain(larger=nn.Upsample(scale_factor=2), conv=conv(width, width)))
            levels[-1].add_module(f"{name}samplers", nn.Sequential(resize))
    middle = MidBlock(widths[-1] if down else widths[0], groups)
    blocks = {"down_blocks": levels, "mid_block": middle} if down else {"mid_block": middle, "up_blocks": levels}
    return chain(conv_in=conv(channels, widths[0]), **blocks, conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
                 activation=nn.SiLU(), conv_out=conv(widths[-1], out_channels))


class KLAutoencoder(Autoencoder):
    """The autoencoder of diffusers' config.json, with its tensor names."""
    at_once = 4

    def __init__(self, config, name=""):
        if config.get("latents_mean"):
            raise ValueError("its config.json has latents_mean, which is not supported")
        widths, layers, n = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
        groups = config.get("norm_num_groups", 32)
        super().__init__(config, name, 2 ** (len(widths) - 1))
        self.encoder = build_half("down", widths, layers, groups, 3, 2 * n)
        self.decoder = build_half("up", widths[::-1], layers + 1, groups, n, 3)
        self.quant_conv = nn.Conv2d(2 * n, 2 * n, 1) if config.get("use_quant_conv", True) else nn.Identity()
        self.post_quant_conv = nn.Conv2d(n, n, 1) if config.get("use_post_quant_conv", True) else nn.Identity()

    def latents_of(self, images):
        return self.quant_conv(self.encoder(images))  # mean and log-variance, one after the other

    def images_of(self, z):
        return self.decoder(self.post_quant_conv(z))

    def draw(self, z, generator):
        """Draw from the posterior with one torch.Generator or one for each picture; None gives its mean."""
        mean, logvar = z.chunk(2, dim=1)
        if generator is None:
            return mean
        parts = zip(mean.split(1), generator) if isinstance(generator, (list, tuple)) else [(mean, generator)]
        noise = torch.cat([torch.randn(m.shape, generator=g, device=g.device).to(m) for m, g in parts])
        return mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise


def load_vae(name, device="cpu", dtype=None):
    """Load "pixels", a hub id (ORG/NAME or ORG/NAME/SUBFOLDER), a folder or a .safetensors file."""
    if name == "pixels":
        return Pixels()
    path, inside = local(name), "/".join(str(name).split("/")[2:])
    for ending in () if path else (".safetensors", "*.safetensors*"):  # the plain file alone, if there is one
        files = [f"{inside}/{file}".lstrip("/") for file in ("config.json", WEIGHTS + ending)]
        path = path if path and [*path.glob(f"{WEIGHTS}*")] else fetch(name, files) / inside
    path = path / "vae" if (path / "vae" / "config.json").exists() else path  # of a pipeline
    run, tensors = read_weights(path)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    ldm = any(key.startswith(("first_stage_model.", "encoder.down.")) for key in tensors)
    if "config" not in run and (ldm or not beside.is_file()):
        raise ValueError(f"{name} has {'names of the first latent diffusion code' if ldm else 'no config.json'}: give "
                         "a folder of diffusers, a hub id as stabilityai/sdxl-vae, or train_vae.py's file")
    vae = build(run["config"] if "config" in run else read_json(beside), tensors, name)
    return vae.to(device, without_float16(dtype or compute_dtype("auto", torch.device(device))))


def read_weights(path):
    """Return (description, tensors) of a file, or of diffusers' folder: of one file, a variant as fp16, or shards."""
    files, folder = [path], path if path.is_dir() else path.parent
    if path.is_dir():
        there = sorted(path.glob(f"{WEIGHTS}*.safetensors"), key=lambda file: len(file.name))  # the plain one first
        files = [file for file in there if file.name.split("-0")[0] == there[0].name.split("-0")[0]]
    pickles = [file for file in (*folder.glob("*.bin"), path) if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles and not all(file.suffix == ".safetensors" and file.exists() for file in files or [path / "none"]):
        raise ValueError(f"{pickles[-1]} is a pickle, which may run code: give the same weights as .safetensors")
    parts = [read_tensors(file, ("",)) for file in files or [path / f"{WEIGHTS}.safetensors"]]
    return parts[0][0], {name: t for _, tensors in parts for name, t in tensors.items()}


def build(config, tensors, name):
    """Return the autoencoder of a config and tensors; ValueError if they do not fit."""
    with reading(f"autoencoder {name}"):
        kind = config.get("_class_name", "AutoencoderKL")
        if kind != "AutoencoderKL" and not config.get("norm"):
            raise ValueError(f"it is of the kind {kind}: give an AutoencoderKL or train_vae.py's file")
        counts = (config.get("layers_per_block", 1), *config.get("num_encoder_blocks", ()),
                  *config.get("num_decoder_blocks", ()))
        if max(counts) > len(tensors):
            raise ValueError("its config has more layers than there are tensors")
        with torch.device("meta"):  # without memory, as a config may say anything
            vae = (KLAutoencoder if kind == "AutoencoderKL" else TinyAutoencoder)(config, str(name))
        tensors = dict(map(renamed, tensors.items()))
        check_tensors(vae, tensors, "its weights do not fit its config")
        vae.load_state_dict(tensors, assign=True)
        vae.sha256 = tensors_hash(vae)
    return vae.eval().requires_grad_(False)


def renamed(item):
    """Return a tensor's (name, tensor) as today's diffusers has them."""
    name, tensor = item
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name, tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor


def describe_vae(vae, name):
    """Return what data and checkpoints say of an autoencoder."""
    keys = ("scaling_factor", "latent_channels", "downsample", "sha256", "config")
    return {"name": str(name)} | {key: getattr(vae, key) for key in keys if hasattr(vae, key)}


def load_described_vae(described, device="cpu", dtype=None, tensors=None):
    """Load a described autoencoder from the tensors of a checkpoint, or else by its name."""
    name, sha256 = described["name"], described.get("sha256")
    vae = (build(described["config"], tensors, name).to(device, without_float16(dtype)) if tensors else
           load_vae(name, device, dtype))
    if sha256 and getattr(vae, "sha256", None) != sha256:
        raise ValueError(f"autoencoder {name} is not the one that made the latents: restore it, or prepare them again")
    vae.scaling_factor = described.get("scaling_factor") or vae.scaling_factor
    return vae
