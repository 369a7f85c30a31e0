"""
The frozen ends of the model: an autoencoder between pictures and latents, a text encoder from captions to embeddings.

"pixels" and "words" stand in for the published ones: nothing to download, the same on every machine, and no weights.
The published ones are in vae.py and text.py, and the small autoencoder that train_vae.py trains is in tiny.py.
"""
import hashlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from common.schema import NUMBER, SIZE, TABLE, TEXT, optional

# what data and checkpoints say of their frozen ends; the paper's released networks leave some of it out
VAE = {"name": TEXT, "scaling_factor": optional(NUMBER), "latent_channels": SIZE, "downsample?": SIZE, "sha256?": TEXT,
       "config?": TABLE}
TEXT_ENCODER = {"name": TEXT, "length?": SIZE, "dim": SIZE}


def load_vae(name, device="cpu", dtype=None, scaling_factor=None):
    """Load the autoencoder `name`: "pixels", train_vae.py's file, or a published one's folder, file or hub id.

    .posterior(images) -> mean, logvar; .encode(images, generator=None) -> scaled latents; .decode(latents) -> images.
    """
    if name == "pixels":
        return Pixels(scaling_factor)
    check_name(name, "autoencoder", "pixels", "a folder, a .safetensors file or a hub id such as stabilityai/sdxl-vae")
    from encoders import vae
    return vae.load(name, device, dtype, scaling_factor)


def describe_vae(vae, name):
    """Return what data and checkpoints say of an autoencoder: its shape, and the hash of its weights where it has any.

    One that travels in checkpoints is described well enough to be built from its tensors there.
    """
    about = {"name": str(name), "scaling_factor": vae.scaling_factor, "latent_channels": vae.latent_channels,
             "downsample": vae.downsample}
    if hasattr(vae, "sha256"):
        about["sha256"] = vae.sha256
    return about | ({"config": vae.config} if getattr(vae, "carried", False) else {})


def load_described_vae(about, device="cpu", dtype=None, tensors=None):
    """Load the autoencoder that describe_vae described, from the tensors of a checkpoint that carries it, or by name.

    ValueError if there is another one under its name now.
    """
    if tensors:
        from encoders import vae
        return vae.build(about["config"], tensors, about["name"]).to(device, dtype)
    try:
        found = load_vae(about["name"], device, dtype, about["scaling_factor"])
    except ValueError as error:
        raise ValueError(f"{error}. The latents are of this autoencoder: restore it, or prepare them again") from None
    if about.get("sha256", getattr(found, "sha256", None)) != getattr(found, "sha256", None):
        raise ValueError(f"autoencoder {about['name']} is not the one that the latents are of (their weights' sha256 "
                         f"is {about['sha256'][:12]}..., that of today's {found.sha256[:12]}...): restore it, or "
                         "prepare the latents again")
    return found


def load_text_encoder(name, device="cpu", dtype=None):
    """Load the text encoder `name`: "words", or CLIP or T5 as a folder or hub id. It turns captions into (B,L,D)."""
    if name == "words":
        return Words(device)
    check_name(name, "text encoder", "words", "a folder or a hub id such as apple/DFN5B-CLIP-ViT-H-14-378")
    from encoders import text
    return text.load(name, device, dtype)


def check_name(name, kind, stand_in, others):
    """Raise ValueError for a single word that is nothing on this disk: a misspelt name rather than a hub id."""
    if "/" not in str(name) and not Path(name).exists():
        raise ValueError(f"unknown {kind} '{name}': there is '{stand_in}', or give {others}")


class Pixels:
    """Lossless stand-in for an autoencoder: 2x2 pixels become 12 channels (space to depth).

    Images (B,3,H,W) in [-1, 1], H and W even; latents (B,12,H/2,W/2).
    """
    latent_channels = 12
    downsample = 2

    def __init__(self, scaling_factor=None):
        # the drawn set has a standard deviation of 0.66: this brings it to sigma_data
        self.scaling_factor = scaling_factor or 1.36

    def posterior(self, images):
        """Return mean and log-variance of the unscaled latents; the variance is almost zero, as nothing is lost."""
        mean = F.pixel_unshuffle(images, self.downsample)
        return mean, torch.full_like(mean, -30.0)

    def encode(self, images, generator=None):
        """Return scaled latents. A draw from so narrow a posterior is its mean, so the generator is not used."""
        return self.posterior(images)[0] * self.scaling_factor

    def decode(self, latents):
        return F.pixel_shuffle(latents / self.scaling_factor, self.downsample)


class Words:
    """Stand-in for a text encoder: (B, 16, 128), for each word a fixed vector plus its position's, zeros after the end.

    The position must be in the embedding because the network's caption block has none of its own. Unit variance.
    """
    length = 16
    dim = 128

    def __init__(self, device="cpu"):
        self.device = device
        self.vectors = {}
        # no word can contain a space, so no word shares its vector with a position
        self.positions = [self.vector(f"position {i}") for i in range(self.length)]

    def __call__(self, captions):
        out = torch.zeros(len(captions), self.length, self.dim)
        for row, caption in zip(out, captions):
            for i, word in enumerate(words_of(caption)[:self.length]):
                row[i] = (self.vector(word) + self.positions[i]) * 0.5 ** 0.5
        return out.to(self.device)

    def vector(self, text):
        """Return uniform numbers of unit variance, made from a hash of the text alone."""
        if text not in self.vectors:
            digest = hashlib.shake_256(text.encode()).digest(self.dim)
            self.vectors[text] = (torch.tensor(list(digest), dtype=torch.float32) - 127.5) / 73.9
        return self.vectors[text]


def words_of(caption):
    """Return the lower-case words of a caption, without punctuation."""
    return re.findall(r"[^\W_]+", caption.lower())
