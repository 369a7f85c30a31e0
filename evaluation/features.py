"""Picture files -> their features, Inception's and CLIP's, for FID, CLIP-FID and CLIP score."""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from pictures.decode import Unusable, load_picture, square


def prepare(networks, resolution, side, item):
    """Return (Prompt, what each network wants to see, the file's hash) of (path, Prompt). side: of the file, or 0."""
    path, prompt = item
    data = path.read_bytes()
    try:
        image = load_picture(data, 1)
    except Unusable as reason:
        raise ValueError(f"{path}: {reason}. Mend or remove it") from None
    if side and image.size != (side, side):
        raise ValueError(f"{path} is {image.width} x {image.height}, where {side} x {side} is wanted")
    shown = Image.fromarray(square(image, resolution))
    inputs = {metric: network.prepare(shown) for metric, network in networks.items()}
    return prompt, inputs, hashlib.sha256(data).digest()


def extract(networks, prepared):
    """Return ({metric: rows of features or scores}, the files' hashes) of a batch from prepare()."""
    rows = {}
    for metric, network in networks.items() if prepared else ():
        features = network.image([inputs[metric] for _, inputs, _ in prepared]).cpu()
        if metric == "clip_score":  # 100 times the cosine, and at least 0
            texts = network.text([prompt.caption for prompt, _, _ in prepared]).cpu()
            features = 100 * cosine_similarity(features.double(), texts.double()).clamp_min(0)[:, None]
        rows[metric] = features.numpy()
    return rows, [digest for _, _, digest in prepared]


def measure(networks, items, resolution, side, batch_size, title, processes):
    """Return ({metric: rows of features or scores}, {count and hash}) of [(path, Prompt)], in every process."""
    batches = [items[i:i + batch_size] for i in range(0, len(items), batch_size)]
    batches += [[] for _ in range(-len(batches) % processes.world)]
    mine, look = processes.share(batches), partial(prepare, networks, resolution, side)
    rows, hashes = {metric: [] for metric in networks}, []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // processes.world)) as pool, \
            tqdm(total=len(items), unit=" pictures", desc=title, disable=processes.rank > 0) as bar:
        ahead = pool.map(look, mine[0])
        for following in [*mine[1:], []]:
            prepared, ahead = list(ahead), pool.map(look, following)
            for of_batch, digests in processes.gather(extract(networks, prepared)):
                for metric, features in of_batch.items():
                    rows[metric].append(features)
                hashes += digests
                bar.update(len(digests))
    return ({metric: np.concatenate(parts) for metric, parts in rows.items()},
            {"pictures": len(hashes), "pictures_sha256": hashlib.sha256(b"".join(hashes)).hexdigest()})
