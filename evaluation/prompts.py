"""The prompts of an evaluation: captions files, the built-in set, and the captions of pictures that are there."""
import contextlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from common.files import read_bytes, reading
from common.images import open_image
from pictures import captions, shapes
from pictures.sources import pictures_below

SHAPES = {"shapes": False, "shapes_unseen": True}  # kinds of the built-in set: are its pairs held out of training?
FIRST_SCENE = 10_000_000  # no training set uses the seeds from here on


@dataclass
class Prompt:
    """What a picture should show"""
    caption: str
    picture: str = ""  # name of the picture that the caption belongs to, where it has one
    attributes: dict = None  # what shapes.score() asks for


def in_order(source):
    """Return whether prompts name no pictures, so that the i-th belongs to the i-th picture."""
    return source in SHAPES or source.lower().endswith(".txt")


def read_prompts(source, count=0):
    """Return the Prompts of a captions file, of each picture the first, or of `count` scenes of the built-in set."""
    if source in SHAPES:
        scenes = [shapes.scene(FIRST_SCENE + i, SHAPES[source]) for i in range(count or 256)]
        return [Prompt(caption, attributes=attributes) for _, caption, attributes in scenes]
    if not source.lower().endswith((".txt", *captions.TABLES)):
        raise ValueError(f"no captions file '{source}': give a .txt, {', '.join(captions.TABLES)}, or shapes")
    with reading(source):
        data, prompts = read_bytes(source), {}
        records = (captions.records(Path(source).name, data) if not in_order(source) else
                   [((), line.strip()) for line in data.decode("utf-8-sig").split("\n")])
        for number, (names, caption) in enumerate(records):
            if caption:
                prompts.setdefault(names[0] if names else number, Prompt(caption, names[0] if names else ""))
    if not prompts:
        raise ValueError(f"{source} holds no captions")
    return list(prompts.values())


def choose(prompts, count):
    """Return `count` of the prompts (0: all) by chance, but always the same ones, in their order."""
    if len(prompts) < count:
        raise ValueError(f"there are {len(prompts):,} captions, and count is {count:,}")
    rng = random.Random(0)
    ranks = [rng.random() for _ in prompts]  # as in shapes.scene
    chosen = sorted(range(len(prompts)), key=ranks.__getitem__)[:count or len(prompts)]
    return [prompts[i] for i in sorted(chosen)]


def scores_folder(out, judged, ending=""):
    """Return the folder of an evaluation's files, scores/NAME if --out names none; NAME is that of what is judged."""
    judged = Path(judged).resolve()
    folder = Path(out or f"scores/{judged.name}{ending}")
    if judged in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"{folder} lies in {judged}, where nothing is written: give another --out")
    return folder


def pictures_of(folder):
    """Return the paths of a folder's pictures, 2.png before 10.png."""
    paths = sorted(pictures_below(folder), key=lambda path: [
        int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))])
    if not paths:
        raise ValueError(f"no folder of pictures {folder}")
    return paths


def prompts_of(folder, paths, source):
    """Return the Prompt of each picture in a folder, where source is "" from inside it."""
    if in_order(source):
        if len(prompts := read_prompts(source, len(paths))) != len(paths):
            raise ValueError(f"{source} has {len(prompts):,} prompts, and {folder} {len(paths):,} pictures")
        return prompts
    look_up = captions.read_captions(source) if source else None
    prompts = [Prompt(look_up(path.relative_to(folder).as_posix()) if source else prompt_inside(path))
               for path in paths]
    if without := [str(path) for path, prompt in zip(paths, prompts) if not prompt.caption]:
        raise ValueError(f"{len(without):,} of {len(paths):,} pictures have no caption: {without[0]}: give --captions")
    return prompts


def prompt_inside(path):
    """Return the prompt inside a PNG of sample.py or eval_fid.py, or None."""
    with contextlib.suppress(Exception), open_image(path) as image:  # damage is named when the picture is measured
        return image.text["prompt"] if "seed" in image.text else None
