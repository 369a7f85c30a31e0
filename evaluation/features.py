"""
Picture files -> sums of their features, Inception's and CLIP's, for FID, CLIP-FID and CLIP score.

The processes of torchrun share the batches, and each adds up the results of all in the order of the batches, in
float64: so the numbers do not depend on how many processes there are.
"""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from PIL import Image
from tqdm import tqdm

from common.images import open_image
from evaluation.clip import clip_scores
from evaluation.frechet import Statistics
from evaluation.processes import gathered, processes
from pictures.decode import Unusable, load, square


@dataclass
class Sums:
    """The sums over pictures that the metrics follow from"""
    statistics: dict = field(default_factory=dict)          # {metric: frechet.Statistics}; clip_score's are of scores
    count: int = 0
    sha256: object = field(default_factory=hashlib.sha256)  # of the hashes of all files
    bad: list = field(default_factory=list)                 # what is wrong with those that cannot be used

    def add(self, rows, digests, bad):
        """Add what extract() found in a batch."""
        for metric, features in rows.items():
            self.statistics.setdefault(metric, Statistics(features.shape[1])).add(features)
        self.count += len(digests)
        self.sha256.update(b"".join(digests))
        self.bad += bad


def prepare(networks, resolution, side, item):
    """Return (caption, what each network wants to see, the file's hash) of (path, caption), or what is Unusable in it.

    The shorter side becomes `resolution` (bicubic), then the centre is taken. `side` is what the file must have, or 0.
    """
    path, caption = item
    try:
        data = path.read_bytes()
        image = load(data, 1)
        if side and image.size != (side, side):
            raise Unusable(f"is {image.width} x {image.height}, and the first picture {side} x {side}")
    except (Unusable, OSError) as reason:
        return Unusable(f"{path}: {reason}")
    shown = Image.fromarray(square(image, resolution))
    inputs = {metric: network.prepare(shown) for metric, network in networks.items()}
    return caption, inputs, hashlib.sha256(data).digest()


def extract(networks, prepared):
    """Return ({metric: rows of features or scores}, the files' hashes, what cannot be used) of what prepare() gave."""
    good, rows = [p for p in prepared if not isinstance(p, Unusable)], {}
    for metric, network in networks.items() if good else ():
        features = network.image([inputs[metric] for _, inputs, _ in good]).cpu()
        if metric == "clip_score":
            features = clip_scores(features, network.text([caption for caption, _, _ in good]).cpu())[:, None]
        rows[metric] = features.numpy()
    return rows, [digest for _, _, digest in good], [str(p) for p in prepared if isinstance(p, Unusable)]


def measure(networks, items, resolution, side, batch_size, title):
    """Return the Sums over pictures [(path, caption)]. A ValueError names those that cannot be used.

    networks: {"fid": Inception, "clip_fid": Clip, "clip_score": Clip}, or some of these. See prepare() for the rest.
    """
    rank, world = processes()
    batches = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    batches += [[] for _ in range(-len(batches) % world)]
    mine, sums, look = batches[rank::world], Sums(), partial(prepare, networks, resolution, side)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world)) as pool, \
            tqdm(total=len(items), unit=" pictures", desc=title, disable=rank > 0) as bar:
        ahead = [pool.map(look, batch) for batch in mine[:2]]
        for i in range(len(mine)):
            prepared = list(ahead.pop(0))
            ahead += [pool.map(look, batch) for batch in mine[i + 2:i + 3]]
            for rows, digests, bad in gathered(extract(networks, prepared)):
                sums.add(rows, digests, bad)
                bar.update(len(digests))
    if sums.bad:
        raise ValueError(f"{len(sums.bad):,} of {len(items):,} pictures cannot be used ({title}): "
                         f"{'; '.join(sums.bad[:10])}. Mend or remove them: no picture is left out silently")
    return sums


def side_of(path):
    """Return the side of a picture. Refuse one that is not square."""
    with open_image(path) as image:
        width, height = image.size
    if width != height:
        raise ValueError(f"{path} is {width} x {height}: pictures must be square, as Inception would squash them")
    return width
