"""A picture file -> square RGB arrays, in processes that import no torch."""
import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor

import numpy as np
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

from common.images import open_image
from common.machine import exit_with_parent

MOST_SIDE = 65_500  # pixels, as in a JPEG
# load_picture() makes an error of it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Unusable(Exception):
    """Says why a picture is skipped. It stands in its place."""


def squares(picture, resolutions):
    """Return (width, height, [uint8 (r,r,3) of each resolution]) of a Path, a file's bytes or an image, or Unusable."""
    if isinstance(picture, Unusable):
        return picture
    try:
        image = picture if isinstance(picture, Image.Image) else load_picture(picture, min(resolutions))
        return image.width, image.height, [square(image, r) for r in resolutions]
    except Unusable as reason:
        return reason


def load_picture(picture, shortest):
    """Open a picture as RGB, upright, with white behind what is transparent."""
    try:
        with open_image(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS or max(image.size) > MOST_SIDE:
                raise Unusable(f"DecompressionBomb: {image.width} x {image.height}, more than is harmless")
            if min(image.size) < shortest:
                raise Unusable(f"too small: {image.width} x {image.height}, the shorter side must have {shortest}")
            image.load()
            with contextlib.suppress(Exception):  # the orientation tag may be damaged, the picture is not
                image = ImageOps.exif_transpose(image)
            return to_rgb(to_srgb(image))
    except Unusable:
        raise
    except Exception as error:  # decoders raise whatever a damaged file provokes
        raise Unusable(f"{type(error).__name__}: {error}") from None


def to_srgb(image):
    """Convert the colours from the picture's own profile, as of a phone or a printer. A damaged one is passed over."""
    with contextlib.suppress(Exception):
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if "sRGB" not in ImageCms.getProfileDescription(profile):
            image = image.convert("RGBA") if image.mode in ("P", "PA") or "transparency" in image.info else image
            shown = ImageCms.profileToProfile(image.convert(image.mode.rstrip("A")), profile,
                                              ImageCms.createProfile("sRGB"), outputMode="RGB")
            if image.mode.endswith("A"):
                shown.putalpha(image.getchannel("A"))
            return shown
    return image


def to_rgb(image):
    if image.mode in ("F", "I"):
        raise Unusable("its pixels have 32 bits, which may mean anything")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, side):
    """Resize the shorter side (bicubic), and cut the centre out."""
    if image.size != (side, side):
        scale = side / min(image.size)
        image = image.resize([max(side, round(n * scale)) for n in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.array(image)


def copies(name, squares, flips, shifts):
    """Yield (name, squares) of a picture and its copies: a mirrored one, and `shifts` that are moved a little."""
    mirrored = [s[:, ::-1] for s in squares]
    yield name, squares
    if flips:
        yield f"{name} mirrored", mirrored
    rng = random.Random(name)
    for i in range(shifts):
        dx, dy = ((2 * rng.random() - 1) / 12 for _ in "xy")
        yield f"{name} moved {i + 1}", [moved(s, dx, dy) for s in (mirrored if flips and i % 2 else squares)]


def moved(square, dx, dy):
    """Move a picture by parts of its side, and repeat its border."""
    n = len(square)
    rows, columns = ((np.arange(n) - round(d * n)).clip(0, n - 1) for d in (dy, dx))
    return square[rows][:, columns]


class Workers:
    """Calls squares() in n processes; -1: one for each core; 0: here. A picture that crashes one is lost alone."""

    def __init__(self, n):
        if n < 0:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            n = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.n, self.pool = n, n and new_pool(n, "fork" if sys.platform == "linux" else "spawn")
        if n:
            self.pool.submit(int).result()  # which starts them, before there are threads or a GPU

    def begin(self, *args):
        """Begin with squares(*args); return a function that gives its result."""
        if not self.n:
            return functools.partial(squares, *args)
        with contextlib.suppress(BrokenExecutor):
            return functools.partial(result, self.pool.submit(squares, *args), args)
        self.pool = new_pool(self.n)
        return self.begin(*args)

    def close(self):
        if self.n:
            self.pool.shutdown(cancel_futures=True)


def new_pool(n, method="spawn"):  # by now there may be threads and a GPU, which a forked process must not inherit
    return ProcessPoolExecutor(n, multiprocessing.get_context(method), begin_worker)


def begin_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    exit_with_parent()


def result(future, args):
    """Return the future's result. If a process has ended over this or another picture, try again alone."""
    with contextlib.suppress(BrokenExecutor):
        return future.result()
    with new_pool(1) as alone, contextlib.suppress(BrokenExecutor):
        return alone.submit(squares, *args).result()
    return Unusable("decoding it ends the process")


def decode_ahead(entries, workers, ahead, resolutions):
    """Yield (name, what squares() gives, caption) of each entry, while the next `ahead` entries are being decoded."""
    waiting = deque()
    for name, picture, caption in entries:
        waiting.append((name, workers.begin(picture, resolutions), caption))
        if len(waiting) > ahead:
            name, result, caption = waiting.popleft()
            yield name, result(), caption
    yield from ((name, result(), caption) for name, result, caption in waiting)


def read_squares(parts, limit, side, workers):
    """Decode the first `limit` pictures of the parts into uint8 (n, side, side, 3)."""
    entries = itertools.islice(itertools.chain.from_iterable(part.entries() for part in parts), limit)
    with contextlib.closing(Workers(workers)) as pool:
        decoded = list(tqdm(decode_ahead(entries, pool, 64, (side,)), "reading pictures", unit=""))
    usable = [picture[2][0] for _, picture, _ in decoded if not isinstance(picture, Unusable)]
    skipped = [f"{name}: {picture}" for name, picture, _ in decoded if isinstance(picture, Unusable)]
    report = f"{len(usable):,} pictures" + (
        f", {len(skipped):,} cannot be used, the first is {skipped[0]}" if skipped else "")
    if len(usable) < 2:
        raise ValueError(f"{report}: at least 2 are needed")
    print(report)
    return np.stack(usable)
