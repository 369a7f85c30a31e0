"""Prompts: of files, the built-in set, and pictures that are there; for sample.py and eval_fid.py alike."""
import contextlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from common.files import read_bytes, reading
from common.images import open_image
from pictures import captions, emoji, shapes
from pictures.sources import EMOJI, UNREAD, find_parts, pictures_below

SHAPES = {"shapes": False, "shapes_unseen": True}  # kinds of the built-in set: are its pairs held out of training?
SETS = {"shapes": tuple(SHAPES), "emoji": ("emoji", "emoji_unseen"),  # what a network of each is judged by
        "emoji_all": ("emoji_all",)}
OF_SETS, FEW = sum(SETS.values(), ()), 256  # number of prompts where none is given
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


def read_prompts(source, count=0, font=""):
    """Return the Prompts of a .txt, a table (of each picture the first), a folder or archive, or of a built-in set.

    count: number of scenes; font: of emoji.
    """
    if source in SHAPES:
        scenes = [shapes.scene(FIRST_SCENE + i, SHAPES[source]) for i in range(count or FEW)]
        return [Prompt(caption, attributes=attributes) for _, caption, attributes in scenes]
    if source in EMOJI:
        return [Prompt(emoji.name(text), emoji.label(text)) for text in emoji.texts(font, EMOJI[source])]
    if Path(source).is_dir() or source.lower().endswith(captions.ARCHIVES):
        if Path(source).is_dir() and not any(pictures_below(source)):  # as DPG-Bench has its prompts
            return [Prompt(captions.decoded(path.read_bytes()).strip()) for path in sorted(Path(source).rglob("*.txt"))]
        entries = (entry for part in find_parts(source, 4096) for entry in part.entries())
        if found := [Prompt(caption.strip(), name) for name, _, caption in entries if (caption or "").strip()]:
            return found
    if not source.lower().endswith((".txt", *captions.TABLES)):
        raise ValueError(f"{source} is no file of prompts: give a .txt, one a line, or {', '.join(captions.TABLES)}")
    with reading(source):
        data, prompts, columns = read_bytes(source), {}, {}
        records = (captions.records(Path(source).name, data, columns) if not in_order(source) else
                   [((), line.strip().lstrip("\ufeff"), None) for line in captions.decoded(data).splitlines()])
        for number, (names, caption, _) in enumerate(records, 1):
            if {"\ufffd", "\0"} & {*(caption or "")}:
                raise ValueError(f"its entry {number} is neither UTF-8 nor marked as UTF-16: save it as UTF-8")
            if caption:
                prompts.setdefault((*names, number)[0], Prompt(caption, names[0] if names else ""))
        if not prompts:
            raise captions.no_captions(columns) if columns else ValueError("it is empty")
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
    """Return the paths of a folder's pictures, 2.png before 10.png, without the grids that sample.py makes of them."""
    there = sorted((path for path, _ in pictures_below(folder) if not re.fullmatch(r"\d{5,}_grid\.png", path.name)),
                   key=lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))])
    paths = [path for path in there if not path.name.lower().endswith(UNREAD)]
    if unread := len(there) - len(paths):
        print(f"{unread:,} pictures in {folder} are of formats that are not read ({', '.join(UNREAD)})")
    if not paths:
        raise ValueError(f"{folder} is no folder, or holds no pictures that can be read")
    return paths


def prompts_of(folder, paths, source):
    """Return the Prompt of each picture in a folder, where source is "" from inside it."""
    if in_order(source):
        if len(prompts := read_prompts(source, len(paths))) != len(paths):
            raise ValueError(f"{source} has {len(prompts):,} prompts, and {folder} {len(paths):,} pictures")
        return prompts
    look_up = captions.read_captions(source) if source else None
    prompts = [Prompt(look_up(path.absolute().as_posix()) if source else prompt_inside(path)) for path in paths]
    if without := [str(path) for path, prompt in zip(paths, prompts) if not prompt.caption]:
        raise ValueError(f"{len(without):,} of {len(paths):,} pictures have no caption, the first is {without[0]}: "
                         "give --captions")
    return prompts


def prompt_inside(path):
    """Return the prompt inside a PNG of sample.py or eval_fid.py, or None."""
    with contextlib.suppress(Exception), open_image(path) as image:  # damage is named when the picture is measured
        return image.text["prompt"] if "seed" in image.text else None
