"""
What a training step is made of: rows of the data set in a random order, noise levels, noise, mask, caption dropout.

Everything random is a function of (seed, step, index of the micro-batch in the global batch), so the number of
processes, threads or restarts does not matter.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from training.dataset import decoded_captions


def generator(*key):
    """Return a CPU generator that is a function of these whole numbers."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


class Batches:
    """Makes micro-batch m of step s. Every epoch has its own seeded permutation of the rows.

    rows: the data set's rows to train on (dataset.Rows). micros: micro-batches of a step, of `size` pictures each.
    threads: number of reader threads, for a GPU alone: on a CPU they would take turns with the step's own.
    """

    def __init__(self, dataset, rows, size, micros, *, tokens, seed, p_mean, p_std, caption_dropout, threads=0):
        self.dataset, self.rows, self.size, self.micros, self.tokens = dataset, rows, size, micros, tokens
        self.seed, self.p_mean, self.p_std, self.caption_dropout = seed, p_mean, p_std, caption_dropout
        self.epoch, self.order = None, None
        self.pool = ThreadPoolExecutor(threads) if threads else None

    def row_ids(self, step, micro):
        """Return the rows (size,) of a micro-batch."""
        n = len(self.rows)
        positions = (step * self.micros + micro) * self.size + np.arange(self.size)
        ids = np.empty(self.size, np.int64)
        for epoch in range(positions[0] // n, positions[-1] // n + 1):
            if epoch != self.epoch:
                order = torch.randperm(n, generator=generator(self.seed, 1, epoch)).numpy()
                self.epoch, self.order = epoch, order.astype(np.int32) if n < 2 ** 31 else order
            inside = positions // n == epoch
            ids[inside] = self.order[positions[inside] % n]
        return self.rows[ids]

    def __call__(self, step, micro):
        """Return {"latents" (B,C,H,W), "captions" (B,L,D), "sigma" (B,), "noise" (B,C,H,W), "uniforms" (B,T),
        "kept_captions" (B,)}, latents and captions as they lie on disk."""
        g = generator(self.seed, 2, step, micro)
        batch = self.dataset.read(self.row_ids(step, micro), self.pool)
        batch["sigma"] = (self.p_mean + self.p_std * torch.randn(self.size, generator=g)).exp()
        batch["noise"] = torch.randn(batch["latents"].shape, generator=g)
        batch["uniforms"] = torch.rand(self.size, self.tokens, generator=g)
        batch["kept_captions"] = torch.rand(self.size, generator=g) >= self.caption_dropout
        return {name: t.pin_memory() for name, t in batch.items()} if self.pool else batch

    def stream(self, keys, device):
        """Yield the micro-batch of each (step, m) of the keys, as to_device gives it."""
        batches = prefetched(self, keys) if self.pool else (self(*key) for key in keys)
        return (to_device(batch, device) for batch in batches)


def to_device(batch, device):
    """Move a batch to the device: latents, captions (dropped ones zero), sigma, noise, uniforms, all float32"""
    batch = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
    captions = decoded_captions(batch).float() * batch["kept_captions"].view(-1, 1, 1)
    return batch["latents"].float(), captions, batch["sigma"], batch["noise"], batch["uniforms"]


def prefetched(make, keys, ahead=2):
    """Yield make(*key) for each key, computed up to `ahead` calls early in a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending = []
        for key in keys:
            pending.append(pool.submit(make, *key))
            if len(pending) > ahead:
                yield pending.pop(0).result()
        for work in pending:
            yield work.result()
