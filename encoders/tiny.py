"""
A small convolutional autoencoder: diffusers' AutoencoderTiny (TAESD, TAESDXL), and the one that train_vae.py trains.

TAESD (Bohan 2023) is 3x3 convolutions and ReLU: no norm, no attention, and no noise in the latents. train_vae.py's adds
what makes it learn in minutes: norms in the blocks, widths that differ, and pixels taken in squares from the start.
"""
import re
from itertools import pairwise

import torch
import torch.nn as nn

TINY = "AutoencoderTiny"  # the class in a config.json
GROUP = 16  # channels that share a norm
SLICE = 64  # pictures that go through the network at once
# what diffusers assumes where a config.json says nothing, and three entries of our own
DEFAULTS = {"encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [64] * 4, "latent_channels": 4,
            "num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1], "scaling_factor": 1.0,
            "shift_factor": 0.0, "patch_size": 1, "norm": False}
# what else a config.json may say: all published ones say this, and nothing else is built
BUILT = {"in_channels": 3, "out_channels": 3, "act_fn": "relu", "upsample_fn": "nearest",
         "upsampling_scaling_factor": 2}


class Block(nn.Module):
    """Three convolutions beside a skip connection, as in TAESD."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(conv(channels, channels), nn.ReLU(), conv(channels, channels), nn.ReLU(),
                                  conv(channels, channels))

    def forward(self, x):
        return (self.conv(x) + x).relu()


class NormedBlock(nn.Module):
    """Two convolutions beside a skip connection, each behind a norm and ReLU."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(*(layer for _ in range(2) for layer in (
            nn.GroupNorm(channels // GROUP, channels), nn.ReLU(), conv(channels, channels))))

    def forward(self, x):
        return self.conv(x) + x


def check_sides(images, downsample):
    """Raise ValueError for images whose sides cannot be divided: the network would drop what is left over."""
    if images.shape[2] % downsample or images.shape[3] % downsample:
        raise ValueError(f"images of {images.shape[3]} x {images.shape[2]}: both must be multiples of {downsample}")


def conv(channels, out_channels, **options):
    return nn.Conv2d(channels, out_channels, 3, padding=1, **options)


def build_encoder(c):
    widths, block, p = c["encoder_block_out_channels"], NormedBlock if c["norm"] else Block, c["patch_size"]
    layers = [nn.PixelUnshuffle(p)] * (p > 1) + [conv(3 * p * p, widths[0])]
    for before, width, n in zip([None, *widths], widths, c["num_encoder_blocks"]):
        if before:
            layers.append(conv(before, width, stride=2, bias=False))
        layers += [block(width) for _ in range(n)]
    return nn.Sequential(*layers, conv(widths[-1], c["latent_channels"]))


def build_decoder(c):
    widths, block, p = c["decoder_block_out_channels"], NormedBlock if c["norm"] else Block, c["patch_size"]
    blocks = c["num_decoder_blocks"]
    layers = [conv(c["latent_channels"], widths[0]), nn.ReLU(), *(block(widths[0]) for _ in range(blocks[0]))]
    for (before, width), n in zip(pairwise(widths), blocks[1:]):
        layers += [nn.Upsample(scale_factor=2.0), conv(before, width, bias=False)]
        layers += [block(width) for _ in range(n)]
    return nn.Sequential(*layers, conv(widths[-1], 3 * p * p), *[nn.PixelShuffle(p)] * (p > 1))


class Layers(nn.Module):
    """Holds layers under the name that they have in diffusers' files."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


class TinyAutoencoder(nn.Module):
    """Images (B,3,H,W) in [-1, 1], H and W multiples of `downsample`; latents (B,latent_channels,H/f,W/f).

    config: that of diffusers' AutoencoderTiny, and DEFAULTS. Scaled latents are (z - shift_factor) * scaling_factor.
    """
    carried = True  # it is small enough to travel in checkpoints

    def __init__(self, config, name=""):
        super().__init__()
        c = self.config = DEFAULTS | config
        self.name, self.latent_channels = name, c["latent_channels"]
        self.downsample = c["patch_size"] * 2 ** (len(c["num_decoder_blocks"]) - 1)
        self.scaling_factor, self.shift = c["scaling_factor"], c["shift_factor"] or 0.0
        self.encoder, self.decoder = Layers(build_encoder(c)), Layers(build_decoder(c))

    @torch.no_grad()
    def absorb(self, norm):
        """Let the encoder's last layer do what a BatchNorm2d without weights does to the latents."""
        last, std = self.encoder.layers[-1], (norm.running_var + norm.eps).sqrt()
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(norm.running_mean).div_(std)

    def latents_of(self, images):
        """Return the unscaled latents, with gradients."""
        return self.encoder((images + 1) / 2)

    def images_of(self, z):
        """Return the images of unscaled latents, with gradients. Numbers far outside of [-3, 3] are bent back."""
        return self.decoder(torch.tanh(z / 3) * 3) * 2 - 1

    @torch.no_grad()
    def posterior(self, images):
        """Return mean and log-variance of the unscaled latents, in float32; nothing is drawn, so it is almost zero."""
        check_sides(images, self.downsample)
        weight = next(self.encoder.parameters())
        mean = torch.cat([self.latents_of(part.to(weight)) for part in images.split(SLICE)]).float()
        return mean, torch.full_like(mean, -30.0)

    def encode(self, images, generator=None):
        """Return scaled latents. There is no noise to draw, so the generator is not used."""
        return (self.posterior(images)[0] - self.shift) * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents):
        """Return the images of scaled latents, in about [-1, 1], in float32."""
        z = latents.float() / self.scaling_factor + self.shift
        weight = next(self.decoder.parameters())
        return torch.cat([self.images_of(part.to(weight)).float() for part in z.split(SLICE)])


def config_for(downsample, latent_channels, width):
    """Return the config of train_vae.py's autoencoder, `width` channels wide where pictures are smallest.

    Its latents have variance 1. scaling_factor makes that sigma_data, which the diffusion expects.
    """
    levels = downsample.bit_length() - 1
    widths, blocks = [width * (i + 1) // levels for i in range(levels)], [0] + [1] * (levels - 1)
    if min(widths) < GROUP or any(w % GROUP for w in widths):
        raise ValueError(f"width is {width}: it must be a multiple of {GROUP * levels}, as its {levels} levels have "
                         f"channels in groups of {GROUP}")
    return DEFAULTS | {
        "_class_name": TINY, "latent_channels": latent_channels, "scaling_factor": 0.9, "patch_size": 2, "norm": True,
        "encoder_block_out_channels": widths, "decoder_block_out_channels": widths[::-1],
        "num_encoder_blocks": blocks, "num_decoder_blocks": blocks[::-1]}  # no blocks where pictures are largest


def config_of(tensors):
    """Return what the tensors of a file tell of its config."""
    config = {}
    for side in ("encoder", "decoder"):
        names = (name for name in tensors if re.fullmatch(side + r"\.layers\.\d+\.(conv\.0\.)?weight", name))
        shapes = {int(n.split(".")[2]): (n.endswith("conv.0.weight"), tensors[n].shape[0]) for n in names}
        widths, blocks = [], []
        for is_block, channels in [shapes[i] for i in sorted(shapes)][:-1]:  # the last one gives latents or images
            if is_block:
                blocks[-1] += 1
            else:
                widths.append(channels)
                blocks.append(0)
        config |= {f"{side}_block_out_channels": widths, f"num_{side}_blocks": blocks}
    return config | {"latent_channels": tensors["decoder.layers.0.weight"].shape[1]}
