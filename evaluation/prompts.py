"""
The prompts of an evaluation: captions files, the drawn set, and the captions of pictures that are there already.
"""
import random
import re
from dataclasses import dataclass
from pathlib import Path

from common.images import open_image
from pictures import captions, shapes
from pictures.sources import pictures_below

DRAWN = {"shapes": False, "shapes_unseen": True}  # kinds of the drawn set: are its pairs held out of training?
FIRST_SCENE = 10_000_000  # no training set uses the seeds from here on


@dataclass
class Prompt:
    """What a picture should show"""
    caption: str
    picture: str = ""           # name of the picture that the caption belongs to, where it has one
    attributes: dict = None     # of the drawn set: what the picture should show


def in_order(source):
    """Return whether prompts name no pictures, so that the i-th belongs to the i-th picture."""
    return source in DRAWN or source.lower().endswith(".txt")


def read(source, count=0):
    """Return the Prompts of a captions file, or of `count` scenes of the drawn set.

    A .txt has a prompt a line. Of a list (captions.TABLES) the first caption of each picture counts.
    """
    path, kind = Path(source), Path(source).suffix.lower()
    if source in DRAWN:
        scenes = [shapes.scene(FIRST_SCENE + i, DRAWN[source]) for i in range(count or 256)]
        return [Prompt(caption, attributes=attributes) for _, caption, attributes in scenes]
    if not path.is_file() or kind not in (".txt", *captions.TABLES):
        raise ValueError(f"no captions file {source}: give a .txt with a prompt a line, or a list "
                         f"({', '.join(captions.TABLES)})")
    try:
        if kind == ".txt":
            text = captions.decoded(path.read_bytes())
            if captions.UNREADABLE in text:
                raise ValueError("it is neither UTF-8 nor marked as UTF-16")
            lines = text.split("\n")
            prompts = [Prompt(line.strip()) for line in lines if line.strip()]
        else:
            first = {}
            for number, (names, caption) in enumerate(captions.records(path.name, path.read_bytes())):
                if caption:
                    first.setdefault(names[0] if names else number, Prompt(caption, names[0] if names else ""))
            prompts = list(first.values())
    except Exception as error:  # whatever a file of another layout provokes
        raise ValueError(f"captions file {path} cannot be read ({type(error).__name__}: {error})") from None
    if not prompts:
        raise ValueError(f"captions file {source} holds no captions")
    return prompts


def choose(prompts, count, seed, source):
    """Return `count` of the prompts (0: all) drawn by the seed, in their order."""
    if len(prompts) < count:
        raise ValueError(f"{source} has {len(prompts):,} captions, and count is {count:,}")
    rng = random.Random(seed)
    ranks = [rng.random() for _ in prompts]  # the one method whose sequence Python promises to keep
    chosen = sorted(range(len(prompts)), key=ranks.__getitem__)[:count or len(prompts)]
    return [prompts[i] for i in sorted(chosen)]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that are there already


def pictures_of(folder):
    """Return the paths of a folder's pictures, 2.png before 10.png."""
    paths = sorted(pictures_below(folder), key=lambda path: [
        int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))])
    if not paths:
        raise ValueError(f"no folder of pictures {folder}")
    return paths


def captions_for(folder, paths, source, prompts):
    """Return the caption of each picture in a folder. A ValueError names the pictures that have none.

    It is that of the captions file `source`, whose prompts are `prompts` if they have an order; else NAME.txt beside
    the picture; else what sample.py and eval_fid.py wrote into it.
    """
    if prompts and len(prompts) != len(paths):
        raise ValueError(f"{source} has {len(prompts):,} prompts, {folder} {len(paths):,} pictures: prompt i must "
                         "belong to the i-th picture in the order of their names")
    if prompts:
        return [prompt.caption for prompt in prompts]
    look_up = captions.read_captions(source) if source else lambda name: None
    texts = [look_up(path.relative_to(folder).as_posix()) or captions.text_of(path.parent, path.name)
             or prompt_inside(path) for path in paths]
    if without := [str(path) for path, text in zip(paths, texts) if not text]:
        raise ValueError(f"{len(without):,} of {len(paths):,} pictures have no caption, which the CLIP score needs: "
                         f"{', '.join(without[:10])}. Name a file with --captions, or choose --metrics fid clip_fid")
    return texts


def prompt_inside(path):
    """Return the prompt inside a PNG of sample.py or eval_fid.py, or None."""
    try:
        with open_image(path) as image:
            text = getattr(image, "text", {})
            return text.get("prompt") if "seed" in text else None
    except Exception:
        return None  # what is wrong with the picture is said when it is measured
