"""
Picture files -> sums of their features: Inception's and CLIP's, for FID, CLIP-FID and CLIP score.

The processes of torchrun share the batches, and the first one adds up what all found in the order of the batches, in
float64: so the numbers do not depend on how many processes there were.
"""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from evaluation import inception
from evaluation.clip import similarity
from evaluation.frechet import Statistics
from pictures.decode import Unusable, load, square

NAMED = 10  # bad pictures that an error names


@dataclass
class Networks:
    """What pictures are shown to; None: not wanted"""
    inception: object = None
    resize: str = "clean"       # of inception.RESIZES
    clip_fid: object = None     # clip.Clip
    clip_score: object = None   # clip.Clip
    device: torch.device = torch.device("cpu")


@dataclass
class Sums:
    """Of pictures: statistics {"fid", "clip_fid"}, the sum of CLIP scores, how many, how many of them were smaller than
    the resolution, a hash of their files' bytes in their order, and what is wrong with those that cannot be used
    """
    statistics: dict = field(default_factory=dict)
    clip_score: float = 0.0
    count: int = 0
    smaller: int = 0
    sha256: object = field(default_factory=hashlib.sha256)
    bad: list = field(default_factory=list)

    def add(self, found):
        for name, features in found["features"].items():
            self.statistics.setdefault(name, Statistics(features.shape[1])).add(features)
        self.clip_score += float(found["clip_scores"].sum())
        self.count += found["count"]
        self.smaller += found["smaller"]
        self.sha256.update(found["digests"])
        self.bad += found["bad"]


def picture_at(data, resolution, size):
    """(PIL RGB square, whether it was smaller) of a file's bytes; Unusable with the reason.

    resolution: its shorter side becomes that (bicubic), then the centre. size: what it must have, (w, h), or None.
    """
    image = load(data, 1)
    if size and image.size != size:
        raise Unusable(f"is {image.width} x {image.height}, and the first picture {size[0]} x {size[1]}")
    return Image.fromarray(square(image, resolution)), min(image.size) < resolution


def prepared(networks, path, resolution, size):
    """What the networks want to see of a picture, or the Unusable that says why there is none"""
    try:
        data = path.read_bytes()
        image, smaller = picture_at(data, resolution, size)
    except Unusable as reason:
        return reason
    except OSError as error:
        return Unusable(str(error))
    clips = {id(c): c for c in (networks.clip_fid, networks.clip_score) if c}
    return {"inception": inception.RESIZES[networks.resize](image) if networks.inception else None, "smaller": smaller,
            "digest": hashlib.sha256(data).digest(), "clip": {key: clip.prepare(image) for key, clip in clips.items()}}


def extract(networks, batch, ready):
    """What Sums.add wants of a batch [(path, caption)], ready being what `prepared` made of each"""
    bad = [f"{path}: {r}" for (path, _), r in zip(batch, ready) if isinstance(r, Unusable)]
    kept = [(caption, r) for (_, caption), r in zip(batch, ready) if not isinstance(r, Unusable)]
    found = {"features": {}, "clip_scores": np.zeros(0), "bad": bad, "count": len(kept),
             "smaller": sum(r["smaller"] for _, r in kept), "digests": b"".join(r["digest"] for _, r in kept)}
    if not kept:
        return found
    n = networks
    if n.inception:
        images = torch.stack([r["inception"] for _, r in kept]).to(n.device)
        found["features"]["fid"] = n.inception(images).cpu().numpy()
    rows = {key: clip.image([r["clip"][key] for _, r in kept])
            for key, clip in {id(c): c for c in (n.clip_fid, n.clip_score) if c}.items()}
    if n.clip_fid:
        found["features"]["clip_fid"] = rows[id(n.clip_fid)].cpu().numpy()
    if n.clip_score and kept[0][0] is not None:
        texts = n.clip_score.text([caption for caption, _ in kept])
        found["clip_scores"] = (100 * similarity(rows[id(n.clip_score)], texts)).clamp_min(0).cpu().numpy()
    return found


def measure(networks, items, resolution, same_size, batch_size, what):
    """Sums (of the first process; None in the others) of pictures [(path, caption or None)].

    same_size: all must be square and as large as the first. ValueError names those that cannot be used.
    """
    size = size_of_first(items[0][0], resolution) if same_size else None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    rounds = -(-len(batches) // world)
    mine = [batches[i] if i < len(batches) else [] for i in range(rank, rounds * world, world)]
    sums = Sums()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world)) as pool, \
            tqdm(total=len(items), unit=" pictures", desc=what, disable=rank > 0) as bar:
        def submit(batch):
            return [pool.submit(prepared, networks, path, resolution, size) for path, _ in batch]
        ahead = [submit(batch) for batch in mine[:2]]
        for i, batch in enumerate(mine):
            ready = [work.result() for work in ahead.pop(0)]
            if i + 2 < len(mine):
                ahead.append(submit(mine[i + 2]))
            for found in gathered(extract(networks, batch, ready), rank, world):
                sums.add(found)
                bar.update(found["count"])
    bad = shared(sums.bad, world)
    if bad:
        more = f", and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
        raise ValueError(f"{len(bad):,} of {len(items):,} pictures cannot be used ({what}): {'; '.join(bad[:NAMED])}"
                         f"{more}. Mend or remove them: no picture is left out silently")
    return sums if rank == 0 else None


def size_of_first(path, resolution):
    """(w, h) that all pictures must have; ValueError if the first cannot be used"""
    try:
        size = load(path.read_bytes(), 1).size
    except Unusable as reason:
        raise ValueError(f"{path} cannot be used: {reason}") from None
    if size[0] != size[1]:
        raise ValueError(f"{path} is {size[0]} x {size[1]}: pictures must be square, as Inception would squash them")
    if size[0] < resolution:
        raise ValueError(f"{path} is {size[0]} x {size[1]}, smaller than resolution {resolution}: enlarged pictures "
                         f"would be judged for the enlarging. Give a --resolution of at most {size[0]}")
    return size


def gathered(value, rank, world):
    """In the first process a list of what every process has, in their order; elsewhere an empty one"""
    if world == 1:
        return [value]
    values = [None] * world if rank == 0 else None
    dist.gather_object(value, values)
    return values or []


def shared(value, world):
    """The first process's value, in all of them"""
    if world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
