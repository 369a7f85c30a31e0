"""
A picture file -> square RGB arrays. This runs in the worker processes of prepare_latents.py and imports no torch.
"""
import io
import itertools
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections import deque
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.images import open_image
from common.machine import exit_with_parent

MOST_SIDE = 65_500  # pixels, as in a JPEG

# load() makes an error of it, for which a filter would not do: threads share the filters
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Unusable(Exception):
    """A picture that is skipped, with the reason"""


class Lost(str):
    """In the place of a picture that could not even be found or read: the reason"""


def squares(picture, resolutions, shortest):
    """Return (width, height, [uint8 (r,r,3) for each resolution r]) of a Path, a file's bytes, or an image.

    The shorter side is resized to r (bicubic), then the centre is cut out. Return an Unusable if that cannot be done.
    """
    if isinstance(picture, Lost):
        return Unusable(picture)
    try:
        image = picture if isinstance(picture, Image.Image) else load(picture, shortest)
        return image.width, image.height, [square(image, r) for r in resolutions]
    except Unusable as reason:
        return reason
    except MemoryError:
        return Unusable("no memory for it")


def load(picture, shortest):
    """Open a picture as RGB, upright, with white behind what is transparent."""
    try:
        with open_image(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS or max(image.size) > MOST_SIDE:
                raise Unusable(f"DecompressionBomb: {image.width} x {image.height}, more than is harmless")
            if min(image.size) < shortest:
                raise Unusable(f"too small: {image.width} x {image.height}, the shorter side must have {shortest}")
            image.load()
            return to_rgb(upright(image))
    except Unusable:
        raise
    except Exception as error:  # decoders raise whatever a damaged file provokes
        raise Unusable(f"{type(error).__name__}: {error}") from None


def upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image  # the orientation tag is damaged, the picture is not


def to_rgb(image):
    if image.mode in ("F", "I"):
        raise Unusable("its pixels have 32 bits, and nothing says how much is white: convert it to 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, side):
    if image.size != (side, side):
        scale = side / min(image.size)
        image = image.resize([max(side, round(n * scale)) for n in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.array(image)


def copies(name, squares, flips, shifts):
    """Yield (name, squares) of a picture, and of its copies: one that is mirrored, and `shifts` that are moved.

    Those are moved by up to a twelfth of the side, at random but the same for the same name, with what is at the border
    repeated; with flips every second one is mirrored too.
    """
    yield name, squares
    if flips:
        yield f"{name} mirrored", [s[:, ::-1] for s in squares]
    rng = random.Random(name)
    for i in range(shifts):
        dx, dy = ((2 * rng.random() - 1) / 12 for _ in "xy")
        kept = [s[:, ::-1] if flips and i % 2 else s for s in squares]
        yield f"{name} moved {i + 1}", [moved(s, round(dx * len(s)), round(dy * len(s))) for s in kept]


def moved(square, dx, dy):
    rows, columns = ((np.arange(len(square)) - d).clip(0, len(square) - 1) for d in (dy, dx))
    return square[rows][:, columns]


# ---------------------------------------------------------------------------------------------------------------------
# In worker processes


class InThisProcess(Executor):
    """Stand in for a pool of worker processes where there are none."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


class Workers(Executor):
    """A pool of n processes, which goes on when a picture has ended one of them."""

    def __init__(self, n, method):
        self.n, self.method = n, method
        self.start()

    def start(self):
        self.pool = ProcessPoolExecutor(self.n, multiprocessing.get_context(self.method), begin_worker)

    def submit(self, function, *args):
        try:
            return self.pool.submit(function, *args)
        except BrokenExecutor:
            self.method = "spawn"  # by now there may be threads and a GPU, with which a process must not be forked
            self.start()
            return self.pool.submit(function, *args)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self.pool.shutdown(wait, cancel_futures=cancel_futures)


def start_workers(n):
    """Start n processes that decode pictures, or for -1 as many as this process has cores to itself.

    They are forked on Linux, so start them before there are threads or a GPU.
    """
    if n < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        n = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if n == 0:
        return InThisProcess()
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = Workers(n, method)
    pool.submit(int).result()
    return pool


def begin_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    exit_with_parent()


def decode_ahead(pictures, pool, ahead, resolutions, shortest):
    """Yield each (shard, (name, picture, caption)) with what squares() gives for the picture; (shard, None) stays.

    The next `ahead` pictures are decoded in the meantime.
    """
    waiting = deque()
    for shard, entry in itertools.chain(pictures, [(None, None)] * ahead):  # so many, to push out the last ones
        if entry:
            name, picture, caption = entry
            args = squares, picture, resolutions, shortest
            entry = name, (pool.submit(*args), args), caption
        waiting.append((shard, entry))
        if len(waiting) > ahead:
            shard, entry = waiting.popleft()
            yield shard, entry and (entry[0], outcome(*entry[1]), entry[2])


def outcome(future, args):
    """Return the future's result. If a process has ended over it or over another picture, try it again alone."""
    try:
        return future.result()
    except BrokenExecutor:
        with Workers(1, "spawn") as alone:
            try:
                return alone.submit(*args).result()
            except BrokenExecutor:
                return Unusable("decoding it ends the process: for want of memory, or by an error in its decoder")


def read_squares(parts, limit, side, workers):
    """Decode the first `limit` pictures of a source's parts into uint8 (n, side, side, 3); ValueError if under two.

    What cannot be used, or has a shorter side than `side`, is skipped, and counted on the console.
    """
    samples = itertools.chain.from_iterable(part.samples(lambda position: True) for part in parts)
    entries = itertools.islice(itertools.chain.from_iterable(samples), limit)
    found, skipped = [], []
    with start_workers(workers) as pool:
        decoded = decode_ahead(((None, entry) for entry in entries), pool, 64, (side,), side)
        for _, (name, picture, _) in tqdm(decoded, desc="reading pictures", unit=""):
            if isinstance(picture, Unusable):
                skipped.append(f"{name}: {picture}")
            else:
                found.append(picture[2][0])
    first = f", {len(skipped):,} cannot be used, the first is {skipped[0]}" if skipped else ""
    if len(found) < 2:
        raise ValueError(f"{len(found)} pictures are too few{first}: at least 2 are needed")
    if skipped:
        print(f"{len(found):,} pictures{first}")
    return np.stack(found)
