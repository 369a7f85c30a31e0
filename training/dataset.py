"""
The prepared folder: dataset.json describes it, each shard is a few files with one row per picture.

    dataset.json           format, source, vae, text_encoder, resolutions, rows, shards, words
    00000.latents32.npy    (rows, C, h, w) float16, the scaled latents of the 32 px pictures; one file per resolution
    00000.captions.npy     (rows, L, D) float16, or int8 with 00000.scales.npy (rows, L, D/32) float16
    00000.rows.jsonl       {"caption", "source", "width", "height"} of each row, as they were before the resize
    skipped.jsonl          {"source", "reason"} of the pictures that could not be used

While it is being prepared, 00000.done.json stands for a finished shard and 00000.skipped.jsonl for its part of
skipped.jsonl; both go when dataset.json says "complete".
"""
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch

from common.files import write_array, write_lines
from common.schema import COUNT, FLAG, SIZE, TABLE, TEXT, check, one_of
from encoders import TEXT_ENCODER, VAE

FORMAT = "nanomicrodit-dataset-1"
BLOCK = 32  # neighbouring numbers of an int8 caption embedding that share a scale
INFO = {"complete": FLAG, "rows": COUNT, "resolutions": [SIZE], "words": [TEXT], "skipped": TABLE, "settings": TABLE,
        "shards": [{"name": (lambda v: isinstance(v, str) and re.fullmatch(r"\d{5,}(-\d{4,})?", v), "a shard's name"),
                    "rows": COUNT}],
        "vae": VAE | {"downsample": SIZE}, "text_encoder": TEXT_ENCODER | {"length": SIZE},
        "caption_dtype?": one_of("float16", "int8"), "source_hash?": TEXT, "captions_cut?": COUNT}


def write_shard(folder, name, latents, captions, rows, caption_dtype="float16"):
    """Write one shard: latents {resolution: (n,C,h,w)}, captions (n,L,D) float, rows a list of n dicts."""
    arrays = {f"latents{r}": a.astype(np.float16) for r, a in latents.items()}
    if caption_dtype == "int8":
        arrays["captions"], arrays["scales"] = quantize(captions)
    else:
        arrays["captions"] = captions.astype(np.float16)
    for kind, array in arrays.items():
        write_array(Path(folder) / f"{name}.{kind}.npy", array)
    write_lines(Path(folder) / f"{name}.rows.jsonl", rows)


def quantize(captions):
    """Store (n,L,D) float as int8 and float16 scales (n,L,D/32): the largest of every 32 neighbours becomes 127.

    One scale per 32 and not per token, because a few channels of CLIP's are many times larger than the others.
    """
    n, length, dim = captions.shape
    blocks = captions.astype(np.float32).reshape(n, length, -1, math.gcd(dim, BLOCK))
    scales = (np.abs(blocks).max(-1) / 127).astype(np.float16)
    rounded = blocks / np.maximum(scales.astype(np.float32), 1e-7)[..., None]
    return rounded.round().clip(-127, 127).astype(np.int8).reshape(captions.shape), scales


def dequantize(captions, scales):
    """Undo quantize, for tensors on any device -> (n,L,D) float32."""
    blocks = captions.unflatten(-1, (scales.shape[-1], -1)).float() * scales.float().unsqueeze(-1)
    return blocks.flatten(-2)


def read_info(folder):
    """Return dataset.json as a dict; ValueError if the folder is not a data set."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        how = ("`python prepare_latents.py` makes it" if Path(folder) == Path("data/shapes") else
               f"`python prepare_latents.py --source PICTURES --out {folder}` makes it of your pictures, "
               "docs/datasets.md has the commands for the published data sets")
        raise ValueError(f"no prepared data in {folder} (no dataset.json there): {how}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}): prepare the folder again") from None
    check(info, {"format": TEXT}, path)
    if info["format"] != FORMAT:
        raise ValueError(f"{path} has format {info['format']!r}, this version reads {FORMAT!r}: prepare it again")
    check(info, INFO, path)
    return info


def check_same_encoders(info, folder, other, other_name):
    """Raise a ValueError if `folder` was prepared with another autoencoder or text encoder than `other` says.

    Where both know the hash of the weights, it counts and the name does not.
    """
    for key in ("vae", "text_encoder"):
        a, b = info[key], other[key]
        hashed = "sha256" in a and "sha256" in b
        compared = {*a, *b} - ({"name"} if hashed else {"sha256", "config"})
        if any(a.get(k) != b.get(k) for k in compared):
            raise ValueError(f"{folder} was prepared with {key} {short(a)}, but {other_name} with {short(b)}: use the "
                             "same")


def short(about):
    return {k: v[:12] if k == "sha256" else v for k, v in about.items() if k != "config"}


class Array:
    """Rows of one .npy file. Reading random rows from a disk this way is five times as fast as a memory map.

    The file is opened anew for each row: nothing is kept open, however many shards there are, and on a local disk that
    costs nothing to speak of. On a network disk every opening is a message, so larger shards serve better there.
    """

    def __init__(self, path, rows, shape, dtype):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        try:
            if not os.path.isfile(path):  # which a pipe is not
                raise OSError("no such file")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or cut short ({error}): prepare the folder again with "
                             "--overwrite") from None
        if array.shape != (rows, *shape) or array.dtype != self.dtype or not array.flags.c_contiguous:
            order = "" if array.flags.c_contiguous else " in Fortran's order"
            raise ValueError(f"{path} holds {array.dtype} {array.shape}{order}, dataset.json says {self.dtype} "
                             f"{(rows, *shape)}: prepare the folder again with --overwrite")
        self.offset, self.size = array.offset, math.prod(shape) * self.dtype.itemsize
        self.written = os.stat(path).st_mtime_ns

    def read(self, row, out):
        """Fill out, an array of this shape, with a row, and return whether its numbers are finite."""
        with open(self.path, "rb", buffering=0) as file:
            written = os.fstat(file.fileno()).st_mtime_ns
            file.seek(self.offset + int(row) * self.size)
            buffer, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            while count := file.readinto(buffer[done:]):  # a network disk may give a part at a time
                done += count
        if done != self.size:
            raise ValueError(f"{self.path} is cut short: row {row} gives {done} of {self.size} bytes")
        if written != self.written:
            raise ValueError(f"{self.path} was written anew since this run has begun: start it again, and it goes on "
                             "if the data are the same")
        # of a float16 that is not finite all bits of the exponent are ones; np.isfinite takes ten times as long
        return out.dtype != np.float16 or not ((out.view(np.uint16) & 0x7C00) == 0x7C00).any()


class Rows:
    """Maps 0..n-1 onto several ranges of row numbers; takes arrays of whole numbers."""

    def __init__(self, ranges):
        self.first = np.array([r.start for r in ranges])
        self.starts = np.cumsum([0] + [len(r) for r in ranges])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        part = np.searchsorted(self.starts, i, side="right") - 1
        return self.first[part] + i - self.starts[part]


class Dataset:
    """The rows of prepared folders at one latent size, one folder after another, read from disk as they are asked for.

    folders: one, or several; FOLDER@512 has only the rows whose picture's shorter side had 512 pixels.
    """

    def __init__(self, folders, latent_size):
        self.folders = [str(folders)] if isinstance(folders, (str, Path)) else [str(f) for f in folders]
        self.shards, self.starts, self.ends, infos = [], [0], [], []
        self.not_finite = []  # where numbers were read that are not finite
        for given in self.folders:
            folder, side = min_side(given)
            infos.append(self._add(folder, side, latent_size))
            check_same_encoders(infos[-1], folder, infos[0], self.folders[0])
            self.ends.append(self.starts[-1])
            if self.ends[-1] == ([0] + self.ends)[-2]:
                raise ValueError(f"{given} has no rows" + (f" with a short side of {side}" if side else ""))
        self.starts = np.array(self.starts)
        self.info = infos[0] if len(infos) == 1 else infos[0] | {
            "words": sorted({w for info in infos for w in info["words"]}), "settings": [i["settings"] for i in infos],
            "source_hash": " ".join(i.get("source_hash", "") for i in infos)}
        if len({info.get("caption_dtype", "float16") for info in infos}) > 1:
            raise ValueError(f"{', '.join(self.folders)} differ in caption_dtype: prepare them with the same")

    def _add(self, folder, side, latent_size):
        info = read_info(folder)
        if not info["complete"]:
            raise ValueError(f"{folder} is only partly prepared: run its prepare_latents.py command again, it goes on "
                             "from there")
        vae, text = info["vae"], info["text_encoder"]
        sizes = {r // vae["downsample"]: r for r in info["resolutions"]}
        if latent_size not in sizes:
            prepared = ", ".join(f"{s} ({r} px)" for s, r in sizes.items())
            raise ValueError(f"{folder} has latents of size {prepared}, not {latent_size}: set latent_size, or prepare "
                             f"it with --resolutions {latent_size * vae['downsample']}")
        dtype, tokens = np.dtype(info.get("caption_dtype", "float16")), (text["length"], text["dim"])
        blocks = (text["length"], text["dim"] // math.gcd(text["dim"], BLOCK))
        for shard in info["shards"]:
            path, n = f"{folder}/{shard['name']}", shard["rows"]
            latents = (vae["latent_channels"], latent_size, latent_size)
            arrays = {"latents": Array(f"{path}.latents{sizes[latent_size]}.npy", n, latents, np.float16),
                      "captions": Array(f"{path}.captions.npy", n, tokens, dtype)}
            if dtype == np.int8:
                arrays["scales"] = Array(f"{path}.scales.npy", n, blocks, np.float16)
            kept = rows_at_least(f"{path}.rows.jsonl", side) if side else None
            self.shards.append((path, arrays, kept))
            self.starts.append(self.starts[-1] + (n if kept is None else len(kept)))
        return info

    def __len__(self):
        return int(self.starts[-1])

    def split(self, most):
        """Return (rows to train on, rows to validate on): of every folder the last hundredth, at most `most` in all."""
        train, held = [], []
        for start, end in zip([0, *self.ends], self.ends):
            n = min(max(1, most * (end - start) // len(self)), max(1, (end - start) // 100))
            train.append(range(start, end - n))
            held.append(range(end - n, end))
        return Rows(train), Rows(held)

    def _locate(self, ids):
        """Return [(shard, row in its files)] of these rows."""
        ids = np.asarray(ids)
        numbers = np.searchsorted(self.starts, ids, side="right") - 1
        places = []
        for s, i in zip(numbers, ids - self.starts[numbers]):
            kept = self.shards[s][2]
            places.append((self.shards[s], int(i) if kept is None else int(kept[i])))
        return places

    def read(self, ids, pool=None):
        """Read {"latents": (n,C,h,w), "captions": (n,L,D), maybe "scales"} of these rows, as they lie on disk."""
        places = self._locate(ids)
        arrays = {name: np.empty((len(ids), *a.shape), a.dtype) for name, a in places[0][0][1].items()}

        def fill(part):
            for i in range(part, len(places), PARTS):
                (_, files, _), row = places[i]
                for name, out in arrays.items():
                    if not files[name].read(row, out[i]):
                        self.not_finite.append(f"{files[name].path} row {row}")
        list((pool.map if pool else map)(fill, range(PARTS)))
        return {name: torch.from_numpy(a) for name, a in arrays.items()}

    def rows(self, ids):
        """Return latents (n,C,h,w) and captions (n,L,D) of these rows, float16 (captions stored as int8: float32)."""
        batch = self.read(ids)
        return batch["latents"].numpy(), decoded_captions(batch).numpy()

    def texts(self, ids):
        """Return the caption texts of these rows."""
        wanted = {}  # {file: {line: position}}
        for position, ((path, *_), row) in enumerate(self._locate(ids)):
            wanted.setdefault(f"{path}.rows.jsonl", {}).setdefault(row, []).append(position)
        texts = [""] * len(ids)
        for path, lines in wanted.items():
            with open_rows(path) as file:
                for n, line in enumerate(file):
                    for position in lines.get(n, ()):
                        texts[position] = json.loads(line)["caption"]
        return texts


PARTS = 16  # pieces of a batch that threads read side by side, where there are any


def decoded_captions(batch):
    """Return the captions (n,L,D) of what Dataset.read gave, on whatever device that is now."""
    return dequantize(batch["captions"], batch["scales"]) if "scales" in batch else batch["captions"]


def min_side(given):
    """Return ("FOLDER", 512) of "FOLDER@512", ("FOLDER", 0) of "FOLDER"."""
    folder, at, side = given.rpartition("@")
    return (folder, int(side)) if at and side.isdigit() else (given, 0)


def open_rows(path):
    if not os.path.isfile(path):  # which a pipe is not
        raise ValueError(f"{path} is missing: prepare the folder again with --overwrite")
    return open(path, encoding="utf-8")


def rows_at_least(path, side):
    """Return the numbers of the rows whose picture's shorter side had so many pixels."""
    with open_rows(path) as file:
        sizes = [(row["width"], row["height"]) for row in map(json.loads, file)]
    return np.flatnonzero(np.array(sizes, np.int64).reshape(-1, 2).min(1) >= side)
