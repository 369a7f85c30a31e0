"""
A picture file -> square RGB arrays. This runs in the worker processes of prepare_latents.py and imports no torch.
"""
import io
import signal
import warnings

import numpy as np
from PIL import Image, ImageOps

from common.machine import exit_with_parent

# load() makes an error of it, for which a filter would not do: threads share the filters
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Unusable(Exception):
    """A picture that is skipped, with the reason"""


class Lost(str):
    """In the place of a picture that could not even be found or read: the reason"""


def squares(picture, resolutions, shortest):
    """(width, height, [uint8 (r,r,3) for each resolution r]) of a Path, a file's bytes, or an image.

    Resized so that the shorter side is r (bicubic), then the centre; Unusable with the reason if that cannot be done.
    """
    if isinstance(picture, Lost):
        raise Unusable(str(picture))
    image = picture if isinstance(picture, Image.Image) else load(picture, shortest)
    return image.width, image.height, [square(image, r) for r in resolutions]


def load(picture, shortest):
    """An RGB picture, upright, transparency on white"""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
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
    # of 32 bits, in which it is not said how much is white: 255 and 65,535 are meant here
    if image.mode in ("F", "I") and (most := image.getextrema()[1]) <= {"F": 1, "I": 255}[image.mode]:
        raise Unusable(f"its 32-bit pixels reach only {most:g} and would be black: convert it to 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square(image, side):
    if image.size != (side, side):
        scale = side / min(image.size)
        image = image.resize([max(side, round(n * scale)) for n in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return np.array(image)


def attempt(picture, resolutions, shortest):
    """What squares() gives, or the Unusable that it raises"""
    try:
        return squares(picture, resolutions, shortest)
    except Unusable as reason:
        return reason


def worker():
    """How a process that decodes pictures begins: Ctrl-C is the main process's affair"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
