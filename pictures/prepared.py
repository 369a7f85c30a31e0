"""
The prepared folder. dataset.json describes it, skipped.jsonl lists the pictures that could not be used, and each shard
is a few files with one row per picture:

    00000.latents32.npy  (rows, C, h, w) float16, the scaled latents of the 32 px pictures; one file per resolution
    00000.captions.npy   (rows, L, D) float16, or int8 with 00000.scales.npy (rows, L, D/32) float16
    00000.rows.jsonl     {"caption", "source", "width", "height"} of each row, as they were before the resize
"""
import json
import math
import os
import re
from itertools import groupby
from pathlib import Path
from shlex import quote

import numpy as np
import torch

from common.files import read_bytes, read_json, reading, write_array, write_lines
from common.folders import differences

SHARD_SIZE = 4096  # rows at most; so many pictures of a folder are a part
FORMAT = "nanomicrodit-dataset-1"
BLOCK = 32  # neighbouring numbers of an int8 caption embedding that share a scale
PARTS = 16  # pieces of a batch that threads read side by side
COPY = re.compile(r" (mirrored|moved \d+)$")  # at the end of a row's source, see decode.copies
AGAIN = ": delete the folder and prepare it again"


def write_shard(folder, name, latents, captions, rows, caption_dtype="float16"):
    """Write a shard: latents {resolution: (n,C,h,w)}, captions (n,L,D), rows a list of n dicts."""
    arrays = {f"latents{r}": a.astype(np.float16) for r, a in latents.items()}
    if caption_dtype == "int8":
        arrays["captions"], arrays["scales"] = quantize(captions)
    else:
        arrays["captions"] = captions.astype(np.float16)
    for kind, array in arrays.items():
        write_array(Path(folder) / f"{name}.{kind}.npy", array)
    write_lines(Path(folder) / f"{name}.rows.jsonl", rows)


def quantize(captions):
    """Return (n,L,D) float as int8 and float16 scales (n,L,D/32): the largest of every 32 neighbours becomes 127."""
    # not one scale for a token, because a few channels of CLIP's are many times larger than the others
    blocks = captions.astype(np.float32).reshape(*captions.shape[:2], -1, math.gcd(captions.shape[2], BLOCK))
    scales = (np.abs(blocks).max(-1) / 127).astype(np.float16)
    rounded = blocks / np.maximum(scales.astype(np.float32), 1e-7)[..., None]
    return rounded.round().clip(-127, 127).astype(np.int8).reshape(captions.shape), scales


def decoded_captions(batch):
    """Return the captions (n,L,D) of what Dataset.read gave, wherever that is now. It undoes quantize()."""
    if "scales" not in batch:
        return batch["captions"]
    blocks = batch["captions"].unflatten(-1, (batch["scales"].shape[-1], -1))
    return (blocks.float() * batch["scales"].float().unsqueeze(-1)).flatten(-2)


def read_info(folder):
    """Return dataset.json; ValueError if the folder is none that was prepared."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        pictures, out = (folder, "data/NAME") if path.parent.is_dir() else ("PICTURES", folder)
        raise ValueError(f"no prepared data in {folder}: `python prepare_latents.py --source {quote(str(pictures))} "
                         f"--out {quote(str(out))}` prepares pictures; docs/datasets.md has the published sets")
    with reading(path, AGAIN):
        info = read_json(path)
        if info["format"] != FORMAT:
            raise ValueError(f"its format is {info['format']!r}, this version reads {FORMAT!r}")
        vae, text, shards = info["vae"], info["text_encoder"], info["shards"]
        numbers = [vae["latent_channels"], vae["downsample"], text["length"], text["dim"], *info["resolutions"],
                   *(shard["rows"] for shard in shards)]
        if any(type(n) is not int or n < 1 for n in numbers) or not all(
                re.fullmatch(r"\d{5,}(-\d{4,})?", shard["name"]) for shard in shards):
            raise ValueError("a number is not above 0, or a shard's name is not of this format")
        return info | {"rows": int(info["rows"]), "words": [str(word) for word in info["words"]],
                       "settings": dict(info["settings"]), "complete": info["complete"] is True}


def check_same_encoders(info, folder, other, other_name):
    """Raise ValueError if `folder` was prepared with another autoencoder or text encoder than `other`."""
    for key in ("vae", "text_encoder"):
        hashed = "sha256" in info[key] and "sha256" in other[key]  # then it counts, and the name does not
        if differ := differences(other[key], info[key], {"name"} if hashed else {"sha256", "config"}):
            raise ValueError(f"{folder} was prepared with {key} {info[key].get('name')}, unlike {other_name} "
                             f"({'; '.join(differ)}): use the same")


class Array:
    """Reads rows of an .npy file, opened anew for each row: that is five times as fast as a memory map."""

    def __init__(self, path, rows, shape, dtype):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        with reading(path, AGAIN):
            if not os.path.isfile(path):  # a pipe would wait for ever
                raise OSError("no such file")
            array = np.lib.format.open_memmap(path, mode="r")
            if (array.shape, array.dtype, array.flags.c_contiguous) != ((rows, *shape), self.dtype, True):
                raise ValueError(f"it holds {array.dtype} {array.shape}, dataset.json says {self.dtype} "
                                 f"{(rows, *shape)} in C's order")
        self.offset, self.size = array.offset, math.prod(shape) * self.dtype.itemsize

    def read(self, row, out):
        """Fill the array `out` with a row, and return whether its numbers are finite."""
        with open(self.path, "rb") as file:
            file.seek(self.offset + int(row) * self.size)
            if file.readinto(out.reshape(-1).view(np.uint8)) != self.size:
                raise ValueError(f"{self.path} was cut short: row {row} is not there")
        # an exponent of all ones means not finite; looking for it is ten times as fast as np.isfinite
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
    """Reads the rows of prepared folders at one latent size; of FOLDER@512 those whose shorter side had 512 pixels."""

    def __init__(self, folders, latent_size):
        folders = [folders] if isinstance(folders, (str, Path)) else folders
        self.shards, self.starts, self.pictures, infos = [], [0], [], []
        self.not_finite = []  # where numbers were read that are not finite
        for name in map(str, folders):
            folder, side = min_side(name)
            infos.append(self._add(folder, side, latent_size))
            check_same_encoders(infos[-1], folder, infos[0], folders[0])
        self.starts = np.array(self.starts)
        self.info = infos[0] if len(infos) == 1 else infos[0] | {
            "words": sorted({w for info in infos for w in info["words"]}), "settings": [i["settings"] for i in infos],
            "source_hash": " ".join(str(i.get("source_hash", "")) for i in infos)}
        if len({info.get("caption_dtype", "float16") for info in infos}) > 1:
            raise ValueError(f"{', '.join(map(str, folders))} differ in caption_dtype: prepare them with the same")

    def _add(self, folder, side, latent_size):
        info, first = read_info(folder), self.starts[-1]
        if not info["complete"]:
            raise ValueError(f"{folder} is only partly prepared: run its prepare_latents.py command again, it goes on")
        vae, tokens, dim = info["vae"], info["text_encoder"]["length"], info["text_encoder"]["dim"]
        resolution, int8 = latent_size * vae["downsample"], info.get("caption_dtype") == "int8"
        if resolution not in info["resolutions"]:
            prepared = ", ".join(f"{r // vae['downsample']} ({r} px)" for r in info["resolutions"])
            raise ValueError(f"{folder} has latents of size {prepared}, not {latent_size}: set latent_size, or prepare "
                             f"it with --resolutions {resolution}")
        layout = {"latents": ((vae["latent_channels"], latent_size, latent_size), np.float16),
                  "captions": ((tokens, dim), np.int8 if int8 else np.float16)}
        if int8:
            layout["scales"] = (tokens, dim // math.gcd(dim, BLOCK)), np.float16
        for shard in info["shards"]:
            path, rows = f"{folder}/{shard['name']}", range(shard["rows"])
            arrays = {kind: Array(f"{path}.{kind}{resolution if kind == 'latents' else ''}.npy", len(rows), *of)
                      for kind, of in layout.items()}
            if side:
                rows = np.flatnonzero(of_each_row(path, lambda row: min(row["width"], row["height"]) >= side))
            self.shards.append((path, arrays, rows))
            self.starts.append(self.starts[-1] + len(rows))
        if self.starts[-1] == first:
            raise ValueError(f"{folder} has no rows" + (f" with a short side of {side}" if side else ""))
        self.pictures.append((first, self.starts[-1], info["settings"].get("flips") or info["settings"].get("shifts")))
        return info

    def __len__(self):
        return int(self.starts[-1])

    def split(self, most):
        """Return (rows to train on, rows to validate on), which come from all over every folder.

        Validation takes a hundredth, but 16 pictures if there are 160, and at most `most`. Their copies are in neither.
        """
        train, held, done = [], [], 0
        for start, end, copied in self.pictures:
            firsts = range(start, end + 1)
            if copied:
                sources = self.texts(firsts[:-1], "source")
                firsts = [i for i, source in zip(firsts, sources) if not COPY.search(source)] + [end]
            pictures = len(firsts) - 1
            n = min(max(pictures // 100, min(16, pictures // 10), 1), max(1, most * (end - start) // len(self)))
            for place in range(pictures // (2 * n), pictures, max(1, pictures // n))[:n]:
                train.append(range(done, firsts[place]))
                held.append(range(firsts[place], firsts[place] + 1))
                done = firsts[place + 1]
        return Rows([*train, range(done, len(self))]), Rows(held)

    def _locate(self, ids):
        """Return [(path of the shard, its arrays, row in its files)] of these rows."""
        numbers = np.searchsorted(self.starts, ids, side="right") - 1
        shards = [self.shards[number] for number in numbers]
        return [(path, arrays, int(rows[i])) for (path, arrays, rows), i in zip(shards, ids - self.starts[numbers])]

    def read(self, ids, pool=None):
        """Read {"latents": (n,C,h,w), "captions": (n,L,D), maybe "scales"} of these rows."""
        places = self._locate(ids)
        arrays = {name: np.empty((len(ids), *a.shape), a.dtype) for name, a in places[0][1].items()}

        def fill(part):
            for i in range(part, len(places), PARTS):
                _, files, row = places[i]
                for name, out in arrays.items():
                    if not files[name].read(row, out[i]):
                        self.not_finite.append(f"{files[name].path} row {row}")
        list((pool.map if pool else map)(fill, range(PARTS)))
        return {name: torch.from_numpy(a) for name, a in arrays.items()}

    def texts(self, ids, field="caption"):
        """Return the captions of these rows, or what else their files say of them."""
        texts, places = [""] * len(ids), sorted((path, row, i) for i, (path, _, row) in enumerate(self._locate(ids)))
        for path, group in groupby(places, lambda place: place[0]):
            of_shard = of_each_row(path, lambda row: str(row[field]))
            for _, row, i in group:
                texts[i] = of_shard[row]
        return texts


def of_each_row(path, function):
    """Return function(description) of each row of a shard."""
    path = f"{path}.rows.jsonl"
    with reading(path, AGAIN):
        return [function(json.loads(line)) for line in read_bytes(path).splitlines()]


def min_side(name):
    """Return ("FOLDER", 512) of "FOLDER@512", ("FOLDER", 0) of "FOLDER"."""
    folder, _, side = name.rpartition("@")
    return (folder, int(side)) if folder and side.isdigit() else (name, 0)
