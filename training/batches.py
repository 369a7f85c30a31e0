"""
What a training step is made of: rows in a random order, noise levels, noise, mask, caption dropout. Everything random
is a function of (seed, step, a picture's place in the global batch), so processes and micro-batches do not matter.
"""
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pictures.prepared import decoded_captions

READERS = 4  # threads that read rows for a GPU


def generator(*key):
    """Return a CPU generator that is a function of these whole numbers."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def random_words(seed, step, places, count):
    """Return `count` random uint32 for each picture at these places of a step's batch, (n, count).

    Philox (Salmon et al. 2011) makes 8 of them from a key and a counter, so each picture has counters of its own.
    """
    blocks = -(-count // 8)
    philox = np.random.Philox(key=[seed, 0], counter=[places.start * blocks, 0, step, 0])
    return philox.random_raw(len(places) * blocks * 4).view(np.uint32).reshape(len(places), -1)[:, :count]


def uniform(words):
    """Turn random uint32 into float32 from 0 on and below 1."""
    return torch.from_numpy((words >> np.uint32(8)).astype(np.float32) * np.float32(2 ** -24))


def normal(words):
    """Turn an even number of random uint32 a row into as many normal numbers (Box and Muller 1958)."""
    numbers = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2 ** -32)  # never 0, for the logarithm
    first, second = np.split(numbers, 2, 1)
    radius, angle = np.sqrt(-2 * np.log(first)), np.float32(2 * np.pi) * second
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1))


def own_places(batch_size, most, rank=0, world=1):
    """Return this process's places of the batch as ranges of at most `most`, as equal as can be."""
    first, last = batch_size * rank // world, batch_size * (rank + 1) // world
    n = -(-(last - first) // most)
    edges = [first + (last - first) * i // n for i in range(n + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:])]


class Batches:
    """Makes the micro-batch of some places of a step. Every epoch has its own seeded permutation of the rows.

    batch_size: pictures of a whole step. read_ahead: read in threads while the device works, for a GPU alone.
    """

    def __init__(self, dataset, rows, batch_size, *, tokens, seed, p_mean, p_std, caption_dropout, read_ahead=False):
        self.dataset, self.rows, self.batch_size, self.tokens = dataset, rows, batch_size, tokens
        self.seed, self.p_mean, self.p_std, self.caption_dropout = seed, p_mean, p_std, caption_dropout
        self.epoch, self.order = None, None
        self.pool = ThreadPoolExecutor(READERS) if read_ahead else None

    def row_ids(self, step, places):
        """Return the rows (n,) at these places of a step."""
        n = len(self.rows)
        positions = step * self.batch_size + np.arange(places.start, places.stop)
        ids = np.empty(len(places), np.int64)
        for epoch in range(positions[0] // n, positions[-1] // n + 1):
            if epoch != self.epoch:
                order = torch.randperm(n, generator=generator(self.seed, 1, epoch)).numpy()
                self.epoch, self.order = epoch, order.astype(np.int32) if n < 2 ** 31 else order
            inside = positions // n == epoch
            ids[inside] = self.order[positions[inside] % n]
        return self.rows[ids]

    def __call__(self, step, places):
        """Return what the data set reads, and sigma (B,), noise (B,C,H,W), uniforms (B,T), kept_captions (B,)."""
        batch = self.dataset.read(self.row_ids(step, places), self.pool)
        shape, size = batch["latents"].shape, batch["latents"][0].numel()
        normals = size + 2 - size % 2  # an even number above size, the last of which makes the noise level
        words = random_words(self.seed, step, places, normals + self.tokens + 1)
        numbers, uniforms = normal(words[:, :normals]), uniform(words[:, normals:])
        batch["noise"] = numbers[:, :size].reshape(shape)
        batch["sigma"] = (self.p_mean + self.p_std * numbers[:, -1]).exp()
        batch["uniforms"], batch["kept_captions"] = uniforms[:, :-1], uniforms[:, -1] >= self.caption_dropout
        return {name: t.pin_memory() for name, t in batch.items()} if self.pool else batch

    def stream(self, steps, pieces, device):
        """Yield the micro-batch of every piece (a range of places) of every step, as to_device gives it."""
        keys = ((step, places) for step in steps for places in pieces)
        batches = prefetched(self, keys) if self.pool else (self(*key) for key in keys)
        return (to_device(batch, device) for batch in batches)


def to_device(batch, device):
    """Move a batch to the device: latents, captions (zeros where dropped), sigma, noise, uniforms, all float32."""
    batch = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
    captions = decoded_captions(batch).float() * batch["kept_captions"].view(-1, 1, 1)
    return batch["latents"].float(), captions, batch["sigma"], batch["noise"], batch["uniforms"]


def prefetched(make, keys, ahead=2):
    """Yield make(*key) for each key, computed up to `ahead` calls early in a thread."""
    keys = iter(keys)
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(make, *key) for key in itertools.islice(keys, ahead)]
        while pending:
            pending += [pool.submit(make, *key) for key in itertools.islice(keys, 1)]
            yield pending.pop(0).result()


class RandomRows:
    """Stands in for a prepared folder in `train.py --check --data random`: rows of the right shapes."""

    def __init__(self, latent_size, channels, caption_dim, length=77):
        self.latents, self.captions = torch.randn(channels, latent_size, latent_size), torch.randn(length, caption_dim)
        self.info = {"vae": {"name": "random", "latent_channels": channels},
                     "text_encoder": {"name": "random", "length": length, "dim": caption_dim}}

    def __len__(self):
        return 2 ** 20

    def __getitem__(self, ids):
        return ids

    def read(self, ids, pool=None):
        return {"latents": self.latents.repeat(len(ids), 1, 1, 1), "captions": self.captions.repeat(len(ids), 1, 1)}
