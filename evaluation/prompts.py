"""
The prompts of an evaluation: captions files, the drawn set, and the captions of pictures that are there already.
"""
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pictures import captions, shapes
from pictures.sources import PICTURES, pictures_below

DRAWN = {"shapes": False, "shapes_unseen": True}  # of the drawn set: only pairs that were held out of training?
FIRST_SCENE = 10_000_000  # as in eval_shapes.py: no training set uses these seeds
TEXTS = (*captions.TABLES, ".txt", ".md", ".html", ".npz", ".ds_store")  # what else may lie in a folder of pictures
LISTED = "captions.jsonl"  # beside pictures that eval_fid.py drew: {"image", "caption", "seed"} of each


@dataclass
class Prompt:
    caption: str
    picture: str = ""           # name of the picture that the caption belongs to, where it has one
    attributes: dict = None     # of the drawn set: what the picture should show


def in_order(source):
    """Whether prompts name no pictures, so that the i-th belongs to the i-th picture"""
    return source in DRAWN or source.lower().endswith(".txt")


def read(source, count=0, side=32):
    """([Prompt], names of pictures without a caption) of a captions file, or of `count` scenes of the drawn set.

    A .txt has a prompt a line; of a list (captions.TABLES) the first caption of each picture counts. ValueError says
    what is wrong with the file.
    """
    if source in DRAWN:
        scenes = [shapes.scene(FIRST_SCENE + i, DRAWN[source], side) for i in range(count or 256)]
        return [Prompt(caption, attributes=attributes) for _, caption, attributes in scenes], []
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no captions file {source}: give a .txt with a prompt a line, or a list "
                         f"({', '.join(captions.TABLES)})")
    if in_order(source):
        found, without = [Prompt(line) for line in lines_of(path)], []
    elif path.suffix.lower() in captions.TABLES:
        found, without = first_of_each(records_of(path))
    else:
        raise ValueError(f"captions file {source}: it must be .txt or {', '.join(captions.TABLES)}")
    if not found:
        raise ValueError(f"captions file {source} holds no captions")
    return found, without


def lines_of(path):
    """The lines of a text file that are not empty"""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from None


def records_of(path):
    """[(names of the picture, caption or None)]; unlike in training no line may be damaged"""
    try:
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError(f"line {number} is no JSON object")
        return captions.records(path.name, path.read_bytes())
    except Exception as error:  # whatever a file of another layout provokes
        raise ValueError(f"captions file {path} cannot be read ({type(error).__name__}: {error})") from None


def first_of_each(records):
    """([Prompt] with the first caption of every picture, [names of pictures without any])"""
    found, without = {}, {}
    for number, (names, caption) in enumerate(records):
        name = names[0] if names else ""
        if caption:
            found.setdefault(name or number, Prompt(caption, name))
        else:
            without[name or f"record {number + 1}"] = True
    return list(found.values()), [name for name in without if name not in found]


def choose(found, count, seed, source):
    """`count` of them (0: all) drawn by the seed, in their order"""
    if not count or len(found) == count:
        return found
    if len(found) < count:
        raise ValueError(f"{source} has {len(found):,} captions, and count is {count:,}")
    rng = random.Random(seed)
    ranks = [rng.random() for _ in found]  # the one method whose sequence Python promises to keep
    return [found[i] for i in sorted(sorted(range(len(found)), key=ranks.__getitem__)[:count])]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that are there already


def note_others(folder):
    """Say so if a folder holds files that are neither pictures nor texts by their names: nothing is dropped silently"""
    files = Path(folder).rglob("*") if folder and Path(folder).is_dir() else ()
    others = [p for p in files if p.is_file() and not p.name.lower().endswith((*PICTURES, *TEXTS))]
    if others:
        print(f"note: {len(others):,} files in {folder} are not taken for pictures, as {others[0].name}: pictures end "
              f"with {', '.join(PICTURES)}")


def by_number(path):
    """Sorts 2.png before 10.png"""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in re.split(r"(\d+)", str(path)) if part]


def pictures_of(folder):
    """[path] of a folder's pictures; if eval_fid.py drew them, exactly those that it lists"""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder of pictures {folder}")
    paths = sorted(pictures_below(folder), key=by_number)
    if lines := listed(folder):
        there, wanted = {p.relative_to(folder).as_posix(): p for p in paths}, [line["image"] for line in lines]
        for problem, names in (("are not there", [n for n in wanted if n not in there]),
                               ("are there and not in it", sorted(there.keys() - set(wanted)))):
            if names:
                raise ValueError(f"{len(names):,} pictures of {folder / LISTED} {problem}: {', '.join(names[:10])}")
        paths = [there[name] for name in wanted]
    if not paths:
        raise ValueError(f"no pictures in {folder}")
    return paths


def listed(folder):
    """The lines of captions.jsonl, or None; ValueError if it is damaged or something else"""
    path = Path(folder) / LISTED
    if not path.exists():
        return None
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not lines or not all(isinstance(line["image"], str) and isinstance(line["caption"], str) for line in lines):
            raise ValueError("a line lacks its image or its caption")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or not of eval_fid.py ({type(error).__name__}: {error}): move it "
                         "away, or make the pictures again") from None
    return lines


def captions_for(folder, paths, source, found):
    """The caption of each picture: as eval_fid.py listed them, else from the captions file `source`, whose prompts are
    `found`, else NAME.txt beside it, else what sample.py wrote into it. ValueError names those that have none.
    """
    lines, folder = listed(folder), Path(folder)
    if in_order(source) and len(found) != len(paths):
        raise ValueError(f"{source} has {len(found):,} prompts, {folder} {len(paths):,} pictures: prompt i must belong "
                         "to the i-th picture in the order of their names")
    ordered = [prompt.caption for prompt in found] if in_order(source) else None
    if lines:
        texts = [line["caption"] for line in lines]
        if ordered and texts != ordered:
            raise ValueError(f"{folder / LISTED} says that the pictures are of other prompts than those of {source}")
    elif ordered:
        texts = ordered
    elif source:
        look_up = captions.read_captions(source)
        texts = [look_up(path.relative_to(folder).as_posix()) for path in paths]
    else:
        texts = [captions.text_of(path.parent, path.name) or prompt_inside(path) for path in paths]
    without = [str(path) for path, text in zip(paths, texts) if not text]
    if without:
        raise ValueError(f"{len(without):,} of {len(paths):,} pictures have no caption, which the CLIP score needs: "
                         f"{', '.join(without[:10])}. Name a file with --captions, or choose --metrics fid clip_fid")
    return texts


def prompt_inside(path):
    """The prompt that sample.py wrote into a PNG, or None"""
    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {})
            return text.get("prompt") if "seed" in text else None
    except Exception:
        return None  # what is wrong with the picture is said when it is measured
