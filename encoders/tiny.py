"""
What autoencoders have in common, and the small one that train_vae.py trains: 3x3 convolutions without noise in the
latents, like TAESD (Bohan 2023), with norms, widths that differ and squares of pixels, so that it learns fast.
"""
from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn as nn

GROUP = 16  # channels that share a norm


class Autoencoder(nn.Module):
    """Images (B,3,H,W) in [-1, 1] <-> latents (B,latent_channels,H/downsample,W/downsample), which are scaled."""
    at_once = 64  # number of pictures in the network together, which decides the memory

    def __init__(self, config, name, downsample):
        super().__init__()
        self.name, self.latent_channels, self.downsample = name, config["latent_channels"], downsample
        self.scaling_factor, self.shift = config["scaling_factor"], config.get("shift_factor") or 0.0

    @torch.no_grad()
    def in_parts(self, function, x):
        """Return function(x) in float32, computed a few pictures at a time in the precision of the weights."""
        weight = next(self.parameters())
        return torch.cat([function(part.to(weight)).float() for part in x.split(self.at_once)])

    def encode(self, images, generator=None):
        if any(side % self.downsample for side in images.shape[2:]):  # the network would drop what is left over
            raise ValueError(f"images are {tuple(images.shape)}: sides must be multiples of {self.downsample}")
        return (self.draw(self.in_parts(self.latents_of, images), generator) - self.shift) * self.scaling_factor

    def draw(self, z, generator):  # where latents have no noise
        return z

    def decode(self, latents):
        return self.in_parts(self.images_of, latents.float() / self.scaling_factor + self.shift)


def conv(channels, out_channels, **options):
    return nn.Conv2d(channels, out_channels, 3, padding=1, **options)


def norm_relu(channels):
    return nn.GroupNorm(channels // GROUP, channels), nn.ReLU()


def chain(**layers):
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(*norm_relu(channels), conv(channels, channels),
                                  *norm_relu(channels), conv(channels, channels))

    def forward(self, x):
        return self.conv(x) + x


def stack(widths, blocks, between):
    """Return the blocks of every width, with the layers of between(before, width) before it."""
    layers = [Block(widths[0]) for _ in range(blocks[0])]
    for (before, width), count in zip(pairwise(widths), blocks[1:]):
        layers += [*between(before, width), *(Block(width) for _ in range(count))]
    return layers


class TinyAutoencoder(Autoencoder):
    """The autoencoder of a config as config_for makes it."""
    carried = True  # it is small enough to travel in checkpoints

    def __init__(self, config, name=""):
        self.config, patch = config, config["patch_size"]
        super().__init__(config, name, patch * 2 ** (len(config["num_decoder_blocks"]) - 1))
        down, up = config["encoder_block_out_channels"], config["decoder_block_out_channels"]
        # files of earlier versions lack these layers, which are worth 2 dB
        outer = norm_relu if config.get("outer_norms") else lambda channels: ()
        self.encoder = chain(layers=nn.Sequential(
            nn.PixelUnshuffle(patch), conv(3 * patch ** 2, down[0]), *outer(down[0]),
            *stack(down, config["num_encoder_blocks"], lambda a, b: [conv(a, b, stride=2, bias=False)]),
            conv(down[-1], self.latent_channels)))
        self.decoder = chain(layers=nn.Sequential(
            conv(self.latent_channels, up[0]), nn.ReLU(), *stack(up, config["num_decoder_blocks"], lambda a, b: [
                nn.Upsample(scale_factor=2), conv(a, b, bias=False)]),
            *outer(up[-1]), conv(up[-1], 3 * patch ** 2), nn.PixelShuffle(patch)))

    @torch.no_grad()
    def absorb(self, norm):
        """Let the encoder's last layer do what a BatchNorm2d without weights does to the latents."""
        last, std = self.encoder.layers[-1], (norm.running_var + norm.eps).sqrt()
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(norm.running_mean).div_(std)

    def latents_of(self, images):
        return self.encoder((images + 1) / 2)

    def images_of(self, z):
        return self.decoder(torch.tanh(z / 3) * 3) * 2 - 1  # numbers far outside of [-3, 3] are bent back


def config_for(downsample, latent_channels, width):
    """Return the config of an autoencoder that is `width` channels wide where pictures are smallest."""
    levels = downsample.bit_length() - 1
    widths, blocks = [width * (i + 1) // levels for i in range(levels)], [0] + [1] * (levels - 1)
    if width < 1 or width % (GROUP * levels):
        raise ValueError(f"width is {width}: it must be a multiple of {GROUP * levels}, {GROUP} for each halving")
    return {  # scaled to sigma_data, as latents have variance 1; no blocks where pictures are largest
        "_class_name": "AutoencoderTiny", "norm": True, "outer_norms": True, "patch_size": 2,
        "latent_channels": latent_channels, "scaling_factor": 0.9, "shift_factor": 0.0,
        "num_encoder_blocks": blocks, "num_decoder_blocks": blocks[::-1],
        "encoder_block_out_channels": widths, "decoder_block_out_channels": widths[::-1]}
