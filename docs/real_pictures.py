"""
Copy two public sets into folders of pictures with a caption beside each, to train on and to hold out.

    python docs/real_pictures.py data/noto-emoji/png/72 data/emoji              # captions: the emoji's Unicode names
    python docs/real_pictures.py data/clothing-dataset-small data/clothing      # "a photo of a t-shirt", by folder

They are OUT/train and OUT/val: of emoji a hundred at random are held out, of clothing the set's own validation part.
"""
import random
import re
import shutil
import sys
import unicodedata
from pathlib import Path

CALLED = {"longsleeve": "a long-sleeved shirt", "outwear": "a coat or jacket", "pants": "pants", "shoes": "shoes",
          "shorts": "shorts"}  # other classes are "a" and their folder's name


def emoji(folder):
    """Yield (picture, caption, part) of emoji with one code point, emoji_u1f34e.png: "red apple"."""
    codes = {path: re.fullmatch(r"emoji_u([0-9a-f]+)", path.stem) for path in sorted(folder.glob("*.png"))}
    named = {path: unicodedata.name(chr(int(code[1], 16)), "").lower() for path, code in codes.items() if code}
    named = {path: name for path, name in named.items() if name}
    held = set(random.Random(0).sample(sorted(named), min(100, len(named) // 2)))
    yield from ((path, name, "val" if path in held else "train") for path, name in named.items())


def clothing(folder):
    """Yield (picture, caption, part) of train/CLASS/*.jpg and validation/CLASS/*.jpg."""
    for part, name in (("train", "train"), ("val", "validation")):
        for path in sorted(folder.glob(f"{name}/*/*.jpg")):
            kind = path.parent.name
            yield path, f"a photo of {CALLED.get(kind, f'a {kind}')}", part


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    found = list(clothing(source) if (source / "train").is_dir() else emoji(source))
    if not found:
        raise SystemExit(f"real_pictures.py: neither emoji_u*.png nor train/CLASS/*.jpg in {source}")
    for path, caption, part in found:
        copy = out / part / f"{path.parent.name}-{path.name}"  # names of two classes may be the same
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copy.with_suffix(".txt").write_text(caption, encoding="utf-8")
    counts = {part: sum(p == part for _, _, p in found) for part in ("train", "val")}
    print(f"{out}: " + ", ".join(f"{n:,} pictures in {part}/" for part, n in counts.items()))


if __name__ == "__main__":
    main()
