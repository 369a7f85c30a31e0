"""
Nearest pictures: is what a network draws nearer to the picture that was meant than to all others of a small set? The
distance is that between an autoencoder's latents, so nothing is downloaded.
"""
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


def read_reference(source, wanted, latents, side, batch_size, font=""):
    """Return (captions, their pictures' latents (N,D)) of a source; ValueError if a wanted caption is not there."""
    entries = (entry for part in find_parts(source, batch_size, font) for entry in part.entries())
    found = [(caption.strip(), squares(picture, (side,))) for _, picture, caption in entries if caption]
    found = [(caption, picture[2][0]) for caption, picture in found if not isinstance(picture, Unusable)]
    if missing := {*wanted} - {caption for caption, _ in found}:
        raise ValueError(f"{source} has no picture for {len(missing):,} of the prompts, as '{min(missing)}'")
    rows = [latents.image([latents.prepare(picture) for _, picture in found[i:i + batch_size]]).cpu()
            for i in range(0, len(found), batch_size)]
    return [caption for caption, _ in found], torch.cat(rows)


def score(rows, wanted, captions, reference):
    """Count how often a picture of the wanted caption is among the nearest of the reference.

    rows: latents (M,D) of the pictures that are judged. Returns {"top 1": (right, of, chance), "top 5": ...}, where
    chance is what pictures that have nothing to do with their captions are expected to get.
    """
    places = {}
    for i, caption in enumerate(captions):
        places.setdefault(caption, set()).add(i)
    order = torch.cdist(rows, reference).argsort(1)
    shares = np.array([len(places[caption]) / len(captions) for caption in wanted])
    return {f"top {k}": (sum(not places[caption].isdisjoint(nearest) for caption, nearest in
                             zip(wanted, order[:, :k].tolist())), len(wanted), (1 - (1 - shares) ** k).mean().item())
            for k in RANKS}
