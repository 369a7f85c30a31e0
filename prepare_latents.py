"""
Pictures and captions -> latents and caption embeddings on disk, ready for train.py.

    python prepare_latents.py                                             # the built-in drawn set, into data/shapes
    python prepare_latents.py --source photos --out data/photos --resolutions 256
    python prepare_latents.py --source 'shards/*.tar' --out data/web --resolutions 256 512

A source is "shapes" (the drawn set), a folder of pictures with a .txt caption beside each, or WebDataset tars (a .tar,
a folder of them or a glob pattern) with a .txt or a .json {"caption": ...} beside each picture. Pictures that cannot be
used are listed with their reason in skipped.jsonl. Killed and started again, it goes on after the last finished shard.
"""
from configurator import configure

source = "shapes"           # "shapes", a folder of pictures, or .tar files (path, folder, glob)
out = "data/shapes"         # folder to write
vae = "pixels"              # autoencoder
text_encoder = "words"      # text encoder
resolutions = (32,)         # sides of the square pictures, in pixels; latents of every one are stored
limit = 0                   # use at most so many pictures; 0: all (of the drawn set: 20,000)
min_size = 0                # pictures with a shorter side are skipped; 0: the smallest of resolutions
first_seed = 0              # of the drawn set: picture i is shapes.scene(first_seed + i)
shard_size = 4096           # rows per shard
batch_size = 64             # pictures encoded at once
device = "auto"             # cuda, mps or cpu; auto: the best there is
overwrite = False           # delete what an earlier run left in `out`

if __name__ == "__main__":
    settings = configure(globals())

import glob
import hashlib
import io
import json
import os
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import shapes
from dataset import FORMAT, read_info, write_atomic, write_json, write_shard
from encoders import load_text_encoder, load_vae, words_of
from machine import pick_device

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SHAPES_ROWS = 20_000


class Unusable(Exception):
    """A picture that is skipped, with the reason"""


# ---------------------------------------------------------------------------------------------------------------------
# Sources: (number of pictures, iterator of (name, open_picture() -> PIL image, caption or None))


def find_source(source):
    if source == "shapes":
        n = limit or SHAPES_ROWS
        return n, shape_pictures(n)
    paths = [Path(source)] if Path(source).exists() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        tars = sorted(folder.glob("*.tar"))
        if not tars:
            names = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
            if not names:
                raise ValueError(f"no pictures ({', '.join(PICTURES)}) and no .tar files in {source}")
            return len(names), folder_pictures(folder, names)
        paths = tars
    if not paths or any(p.suffix != ".tar" for p in paths):
        raise ValueError(f"no source {source}: give 'shapes', a folder of pictures, or .tar files (path, folder or "
                         "glob pattern)")
    return sum(count_pictures(p) for p in paths), (item for p in paths for item in tar_pictures(p))


def shape_pictures(n):
    for i in range(n):
        image, caption, _ = shapes.scene(first_seed + i, size=max(resolutions))
        yield f"shapes/{first_seed + i}", (lambda image=image: image), caption


def folder_pictures(folder, names):
    for path in names:
        caption = path.with_suffix(".txt")
        yield (str(path.relative_to(folder)), (lambda path=path: Image.open(path)),
               caption.read_text(encoding="utf-8", errors="replace").strip() if caption.is_file() else None)


def count_pictures(path):
    try:
        with tarfile.open(path) as tar:
            return sum(m.isfile() and m.name.lower().endswith(PICTURES) for m in tar)
    except (tarfile.TarError, EOFError):
        return 0  # for the progress bar only: reading it reports the damage


def tar_pictures(path):
    """The samples of a WebDataset tar: consecutive files whose names agree up to the first dot"""
    try:
        with tarfile.open(path) as tar:
            key, files = None, {}
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if (folder, stem) != key:
                    yield from tar_sample(path, files)
                    key, files = (folder, stem), {}
                files[member.name, "." + extension.lower()] = tar.extractfile(member).read()
            yield from tar_sample(path, files)
        with open(path, "rb") as file:
            file.seek(-1024, os.SEEK_END)
            if any(file.read()):
                raise tarfile.ReadError("no end marker")
    except (tarfile.TarError, EOFError, OSError) as error:
        def broken(error=error):
            raise Unusable(f"the tar breaks off here: {error}")
        yield path.name, broken, "lost"  # listed among the skipped pictures


def tar_sample(path, files):
    texts = {extension: data for (_, extension), data in files.items()}
    caption = None
    if ".txt" in texts:
        caption = texts[".txt"].decode("utf-8", "replace").strip()
    elif ".json" in texts:
        try:
            caption = json.loads(texts[".json"])["caption"]
        except (ValueError, KeyError, TypeError):
            pass  # a .json without a caption is not a caption
    found = [item for item in files.items() if item[0][1] in PICTURES]
    # a name with more dots (7.5.png) is a picture too, unless the sample has a plain one and this is its .mask.png, say
    found = found or [item for item in files.items() if item[0][1].endswith(PICTURES)]
    for (name, _), data in found:
        yield f"{path.name}/{name}", (lambda data=data: Image.open(io.BytesIO(data))), caption


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def load_picture(open_picture, shortest):
    """An RGB picture, upright, transparency on white; Unusable with the reason"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = open_picture()
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
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def square(image, side):
    """Shorter side resized to `side` (bicubic), centre crop -> (3,side,side) float32 in [-1, 1]"""
    if image.size != (side, side):
        scale = side / min(image.size)
        image = image.resize([max(side, round(n * scale)) for n in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def generator(text):
    """Of a picture's one draw from its posterior: a function of its name, so that nothing depends on order or batch"""
    seed = int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------


class Encoder:
    """Pictures of one batch -> rows of the current shard"""

    def __init__(self, vae, text):
        self.vae, self.text, self.pending = vae, text, []
        self.start_shard()

    def start_shard(self):
        self.latents, self.captions, self.rows = {r: [] for r in resolutions}, [], []

    def add(self, image, row):
        self.pending.append(([square(image, r) for r in resolutions], row))
        if len(self.pending) == batch_size:
            self.flush()

    def flush(self):
        if not self.pending:
            return
        for i, r in enumerate(resolutions):
            images = torch.stack([squares[i] for squares, _ in self.pending])
            draws = [generator(f"{row['source']} {r}") for _, row in self.pending]
            self.latents[r].append(self.vae.encode(images, draws).half().cpu().numpy())
        rows = [row for _, row in self.pending]
        self.captions.append(self.text([row["caption"] for row in rows]).half().cpu().numpy())
        self.rows += rows
        self.pending = []

    def count(self):
        return len(self.rows) + len(self.pending)

    def write(self, folder, name):
        self.flush()
        n = len(self.rows)
        latents = {r: np.concatenate(a) for r, a in self.latents.items()}
        write_shard(folder, name, latents, np.concatenate(self.captions), self.rows)
        words = {word for row in self.rows for word in words_of(row["caption"])}
        too_long = sum(len(words_of(row["caption"])) > self.text.length for row in self.rows)
        self.start_shard()
        return n, words, too_long


def starting_point(folder, new):
    """dataset.json to go on from: what an unfinished run with the same settings left, or else `new`"""
    path = folder / "dataset.json"
    if overwrite and folder.is_dir():
        for old in [path, *folder.glob("[0-9]*.npy"), *folder.glob("[0-9]*.jsonl"), folder / "skipped.jsonl"]:
            old.unlink(missing_ok=True)
    if not path.exists():
        return new
    info = read_info(folder)
    old = info["settings"]
    differ = [f"{k}: {old.get(k)!r} there, {v!r} now" for k, v in new["settings"].items() if old.get(k) != v]
    if differ:
        raise ValueError(f"{folder} was prepared with other settings ({'; '.join(differ)}): give another --out, or "
                         "--overwrite")
    return info


def check_settings():
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size),
                        ("resolutions", min(resolutions, default=0))):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if limit < 0 or min_size < 0:
        raise ValueError("limit and min_size must not be negative")


def main():
    check_settings()
    folder = Path(out)
    where = pick_device(device)
    autoencoder, text = load_vae(vae, where), load_text_encoder(text_encoder, where)
    for r in resolutions:
        if r % autoencoder.downsample:
            raise ValueError(f"resolution {r} is not a multiple of {autoencoder.downsample}, by which '{vae}' shrinks "
                             "pictures")
    total, pictures = find_source(source)
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()
            if k not in ("out", "device", "overwrite", "batch_size")}
    info = starting_point(folder, {
        "format": FORMAT, "complete": False, "rows": 0, "skipped": {}, "captions_cut": 0, "shards": [], "words": [],
        "vae": {"name": vae, "scaling_factor": autoencoder.scaling_factor,
                "latent_channels": autoencoder.latent_channels, "downsample": autoencoder.downsample},
        "text_encoder": {"name": text_encoder, "length": text.length, "dim": text.dim},
        "resolutions": list(resolutions), "settings": kept})
    if info["complete"]:
        print(f"{folder} is already prepared: {info['rows']:,} rows")
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, info, total, pictures, autoencoder, text)
    if not info["rows"]:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in info["skipped"].items())
        raise ValueError(f"none of the pictures of {source} could be used ({reasons}): see {folder / 'skipped.jsonl'}")
    print(f"{folder}: {info['rows']:,} rows in {len(info['shards'])} shards, {len(info['words'])} different words")
    if info["captions_cut"]:
        print(f"{info['captions_cut']:,} captions are longer than {text.length} words and were cut there")
    for reason, n in sorted(info["skipped"].items()):
        print(f"skipped {n:,}: {reason} (listed in {folder / 'skipped.jsonl'})")


def prepare(folder, info, total, pictures, autoencoder, text):
    """Encode the pictures after those of the finished shards; after each shard, dataset.json says where it stands."""
    encoder = Encoder(autoencoder, text)
    done = info["shards"][-1]["source_end"] if info["shards"] else 0
    skipped = read_lines(folder / "skipped.jsonl")[:sum(info["skipped"].values())]
    words = set(info["words"])
    bar = tqdm(total=min(total, limit) if limit else total, initial=0, unit=" pictures", smoothing=0.05)
    position = 0

    def finish_shard():
        name = f"{len(info['shards']):05d}"
        if encoder.count():
            n, new_words, cut = encoder.write(folder, name)
            words.update(new_words)
            info["shards"].append({"name": name, "rows": n, "source_end": position})
            info["rows"] += n
            info["captions_cut"] += cut
        info["words"] = sorted(words)
        info["skipped"] = dict(Counter(s["reason"].split(":")[0] for s in skipped))
        lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in skipped)
        write_atomic(folder / "skipped.jsonl", lambda file: file.write(lines.encode()))
        write_json(folder / "dataset.json", info)

    for name, open_picture, caption in pictures:
        if limit and position == limit:
            break
        position += 1
        bar.update()
        if position <= done:
            continue
        try:
            if caption is None or not str(caption).strip():
                raise Unusable("no caption")
            image = load_picture(open_picture, min_size or min(resolutions))
            encoder.add(image, {"caption": str(caption), "source": name, "width": image.width, "height": image.height})
        except Unusable as reason:
            skipped.append({"source": name, "reason": str(reason)})
        if encoder.count() == shard_size:
            finish_shard()
    bar.close()
    info["complete"] = True
    finish_shard()


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_latents.py: {error}") from None
