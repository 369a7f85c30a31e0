"""
The coloured emoji of a font as a set: pictures that are on every desktop, and names that Unicode has for them.

    texts = emoji.texts()                   # every emoji as a str of one or more code points
    emoji.name(texts[0]), emoji.draw(texts[0])

Skin tones are a test of composition: of the emoji that have all five, a tenth of the pairs is held out of training.
"""
import contextlib
import hashlib
import re
import sys
import unicodedata
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

FONTS = ("NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")  # Pillow looks where each system has its fonts
SIZES = (109, 160, 136, 128, 96, 64)  # in pixels: a font of bitmaps has one or a few of them, one of outlines has all
CODES = [*range(0x203C, 0x3300), *range(0x1F000, 0x1FB00)]  # where Unicode has its emoji
KINDS = ("So", "Sm", "Po", "Pd")  # symbols and punctuation: no letters, digits or tones
LETTERS = re.compile(r"REGIONAL INDICATOR|INPUT SYMBOL|LATIN .*LETTER|IDEOGRAPH|SQUARED (?!CROSS)")  # in boxes, mostly
TONES = {"\U0001F3FB": "light", "\U0001F3FC": "medium-light", "\U0001F3FD": "medium", "\U0001F3FE": "medium-dark",
         "\U0001F3FF": "dark"}
JOINER, AS_PICTURE = "\u200d", "\ufe0f"
SEXES, PEOPLE = "\u2640\u2642", "\U0001F9D1\U0001F468\U0001F469"  # signs of female and male; adult, man, woman
HAIR = [chr(c) for c in range(0x1F9B0, 0x1F9B4)]
INK = (255, 0, 255)  # glyphs without colours of their own are drawn in it


@cache
def open_font(font=""):
    """Return the PIL font of a file, or the first of FONTS that this computer has; ValueError if there is none."""
    for name in (font,) if font else FONTS:
        for size in SIZES:
            with contextlib.suppress(OSError):  # no such file, or no pictures of this size
                return ImageFont.truetype(name, size)
    raise ValueError(f"no font of coloured emoji: '{font}' cannot be opened" if font else
                     f"no font of coloured emoji ({', '.join(FONTS)}): on Debian and Ubuntu apt install "
                     "fonts-noto-color-emoji, or give a file with --font")


def texts(font="", held_out=False):
    """Return the emoji that the font has a picture of, each once: those to train on, those held out, or with None all.

    Which are held out depends on nothing but the emoji. ValueError if the font has none at all.
    """
    return [text for text in known_to(font) if held_out is None or is_held_out(text) == held_out]


def is_held_out(text):
    return text[-1] in TONES and int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < 0.1 * 2 ** 32


@cache
def known_to(font):
    if not features.check("raqm"):
        print("warning: Pillow finds no raqm, so no skin tones or other sequences are there: install FriBiDi "
              "(apt install libfribidi0)", file=sys.stderr)
    known = {}  # by what they look like
    for text in candidates(font):
        pixels = np.asarray(draw(text, font, INK))
        if (pixels[..., ::2] < 255).any():  # it has colours of its own: both white and INK have 255 in red and blue
            known.setdefault(hashlib.sha256(pixels).digest(), text)
    if not known:
        raise ValueError(f"the font {open_font(font).path} has no coloured emoji that Pillow can draw")
    return [*known.values()]


def candidates(font):
    """Yield single code points, and the sequences that the font composes: with a tone, a sex, a thing or hair."""
    base = open_font(font)

    def composed(*texts):
        return all(base.getlength(text) == base.getlength(text[0]) for text in texts)
    single = [chr(c) for c in CODES if unicodedata.category(chr(c)) in KINDS
              and not LETTERS.search(unicodedata.name(chr(c))) and has_picture(base, chr(c))]
    for first in single:
        yield first
        for more in ([first + tone for tone in TONES], [f"{first}{JOINER}{sex}{AS_PICTURE}" for sex in SEXES]):
            yield from more if composed(*more) else ()
    for second in single + HAIR:
        more = [f"{person}{JOINER}{second}{AS_PICTURE * (second < HAIR[0])}" for person in PEOPLE]
        yield from more if composed(*more) else ()


def has_picture(font, text):
    left, top, right, bottom = font.getbbox(text)
    return left < right and top < bottom


def name(text):
    """Return the name of an emoji in lower case, as "waving hand, medium skin tone"."""
    parts = [f"{TONES[c]} skin tone" if c in TONES else unicodedata.name(c).lower().removeprefix("emoji component ")
             for c in text if c not in (JOINER, AS_PICTURE)]
    return ", ".join(re.sub(" sign$", "", part) for part in parts) if len(parts) > 1 else parts[0]


def label(text):
    """Return the name of an emoji's picture in a set, as "emoji/1f44b-1f3fd"."""
    return "emoji/" + "-".join(f"{ord(c):x}" for c in text)


def entry(label, font=""):
    """Return (picture, name) of a label()."""
    text = "".join(chr(int(code, 16)) for code in label[6:].split("-"))
    return draw(text, font), name(text)


def draw(text, font="", ink="black"):
    """Return the square picture of an emoji on white."""
    font = open_font(font)
    left, top, right, bottom = font.getbbox(text)
    side = max(right - left, bottom - top, font.size)
    image = Image.new("RGB", (side, side), "white")
    corner = (side - right + left) // 2 - left, (side - bottom + top) // 2 - top
    ImageDraw.Draw(image).text(corner, text, ink, font, embedded_color=True)
    return image
