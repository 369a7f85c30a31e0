"""
Nearest pictures: is what a network draws nearer to the picture that was meant than to all others of a small set? The
distance is that between an autoencoder's latents, so nothing is downloaded.
"""
import itertools
import math

import numpy as np
import torch

from pictures.decode import Unusable, squares
from pictures.sources import find_parts

RANKS = (1, 5)


class Latents:
    """An autoencoder's latents as features of pictures, as features.measure() wants them"""

    def __init__(self, vae, device):
        self.vae, self.device, self.name = vae, device, getattr(vae, "name", "pixels")
        self.about = {"vae_sha256": getattr(vae, "sha256", None)}

    def prepare(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    def image(self, prepared):
        return self.vae.encode(torch.stack(prepared).to(self.device)).flatten(1).float()


def read_reference(source, choose, latents, side, font=""):
    """Return (captions, their pictures' latents (N,D)) of a source; choose: as caption_chooser() gives it."""
    if side % latents.vae.downsample:
        raise ValueError(f"{side} px do not suit the autoencoder: give a --resolution that is a multiple of "
                         f"{latents.vae.downsample}")
    captions, rows, unusable = [], [], []
    for part in find_parts(source, 4096, font):
        for name, picture, caption in itertools.starmap(choose, part.entries()):
            picture = squares(picture, (side,)) if caption else Unusable("no caption")
            if isinstance(picture, Unusable):
                unusable.append(f"{name}: {picture}")
            else:
                captions.append(caption.strip())
                rows.append(latents.image([latents.prepare(picture[2][0])]).cpu())
    if unusable:
        print(f"{source}: {len(unusable):,} pictures are left out, the first is {unusable[0]}")
    if not rows:
        raise ValueError(f"{source} has no picture with a caption")
    return captions, torch.cat(rows)


def score(rows, wanted, captions, reference):
    """Count how often a picture of the wanted caption is among the nearest of the reference.

    rows: latents (M,D) of the pictures that are judged. Returns {"top 1": (right, of, chance), "top 5": ...}, where
    chance is what pictures that have nothing to do with their captions are expected to get.
    """
    places = {}
    for i, caption in enumerate(captions):
        places.setdefault(caption, set()).add(i)
    scores, order = {}, torch.cdist(rows, reference).argsort(1)
    for k in RANKS:
        right = sum(not places[caption].isdisjoint(nearest) for caption, nearest in zip(wanted, order[:, :k].tolist()))
        n, k_there = len(captions), min(k, len(captions))
        none = [math.comb(n - len(places[caption]), k_there) / math.comb(n, k_there) for caption in wanted]
        scores[f"top {k}"] = right, len(wanted), 1 - sum(none) / len(none)
    return scores
