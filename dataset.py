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
import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

FORMAT = "nanomicrodit-dataset-1"
BLOCK = 32  # neighbouring numbers of an int8 caption embedding that share a scale


def write_atomic(path, write):
    """write(file) into a temporary file beside `path`, then rename it: the file is there whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # safetensors has an error of its own, which has no errno
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise DiskFull(f"disk full while writing {path}: nothing that was there before is lost. Free some space "
                           "and run the same command again, it goes on from there") from None
        raise


class DiskFull(OSError):
    pass


def write_json(path, value):
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=1, ensure_ascii=False).encode()))


def write_array(path, array):
    array = np.ascontiguousarray(array)

    def write(file):  # not np.save: its error on a full disk does not say so
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    write_atomic(path, write)


def write_lines(path, values):
    # names of files may hold what is no text; JSON's own escape keeps it readable
    lines = (json.dumps(v, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for v in values)
    write_atomic(path, lambda file: file.writelines(lines))


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
    """(n,L,D) float -> int8 (n,L,D) and float16 scales (n,L,D/32): the largest of every 32 neighbours becomes 127.

    One scale per 32 and not per token, because a few channels of CLIP's are many times larger than the others.
    """
    n, length, dim = captions.shape
    blocks = captions.astype(np.float32).reshape(n, length, -1, math.gcd(dim, BLOCK))
    scales = (np.abs(blocks).max(-1) / 127).astype(np.float16)
    rounded = blocks / np.maximum(scales.astype(np.float32), 1e-7)[..., None]
    return rounded.round().clip(-127, 127).astype(np.int8).reshape(captions.shape), scales


def dequantize(captions, scales):
    """The inverse of quantize, for tensors on any device -> (n,L,D) float32"""
    blocks = captions.unflatten(-1, (scales.shape[-1], -1)).float() * scales.float().unsqueeze(-1)
    return blocks.flatten(-2)


def read_info(folder):
    """dataset.json as a dict; ValueError if the folder is not a finished data set."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise ValueError(f"no prepared data in {folder} (no dataset.json there): make it with "
                         f"`python prepare_latents.py --out {folder}`")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}): prepare the folder again") from None
    if info.get("format") != FORMAT:
        raise ValueError(f"{path} has format {info.get('format')!r}, this version reads {FORMAT!r}: prepare it again")
    return info


def check_same_encoders(info, folder, other, other_name):
    """ValueError if `folder` was prepared with another autoencoder or text encoder than `other` says"""
    for key in ("vae", "text_encoder"):
        if info[key] != other[key]:
            raise ValueError(f"{folder} was prepared with {key} {info[key]}, but {other_name} with {other[key]}: use "
                             "the same")


class Dataset:
    """The rows of a prepared folder at one latent size, read from disk as they are asked for."""

    def __init__(self, folder, latent_size):
        self.folder, self.info = Path(folder), read_info(folder)
        if not self.info["complete"]:
            raise ValueError(f"{folder} is only partly prepared: run its prepare_latents.py command again, it goes on "
                             "from there")
        vae, text = self.info["vae"], self.info["text_encoder"]
        sizes = {r // vae["downsample"]: r for r in self.info["resolutions"]}
        if latent_size not in sizes:
            there = ", ".join(f"{s} ({r} px)" for s, r in sizes.items())
            raise ValueError(f"{folder} has latents of size {there}, not {latent_size}: set latent_size, or prepare it "
                             f"with --resolutions {latent_size * vae['downsample']}")
        latent_shape = (vae["latent_channels"], latent_size, latent_size)
        dtype = np.dtype(self.info.get("caption_dtype", "float16"))
        self.latents, self.captions, self.scales = [], [], []
        for shard in self.info["shards"]:
            name, n = shard["name"], shard["rows"]
            self.latents.append(self._open(f"{name}.latents{sizes[latent_size]}.npy", (n, *latent_shape)))
            self.captions.append(self._open(f"{name}.captions.npy", (n, text["length"], text["dim"]), dtype))
            if dtype == np.int8:
                blocks = text["dim"] // math.gcd(text["dim"], BLOCK)
                self.scales.append(self._open(f"{name}.scales.npy", (n, text["length"], blocks)))
        self.starts = np.cumsum([0] + [shard["rows"] for shard in self.info["shards"]])

    def _open(self, name, shape, dtype=np.float16):
        path = self.folder / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or cut short ({error}): prepare the folder again with "
                             "--overwrite") from None
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{path} holds {array.dtype} {array.shape}, dataset.json says {np.dtype(dtype)} {shape}: "
                             "prepare the folder again with --overwrite")
        return array

    def __len__(self):
        return int(self.starts[-1])

    def rows(self, ids):
        """latents (n,C,h,w) and captions (n,L,D) of these rows, float16 (captions stored as int8: float32)"""
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        where = list(zip(shards, np.asarray(ids) - self.starts[shards]))
        latents, captions = (np.stack([a[s][i] for s, i in where]) for a in (self.latents, self.captions))
        if self.scales:
            scales = np.stack([self.scales[s][i] for s, i in where])
            captions = dequantize(torch.from_numpy(captions), torch.from_numpy(scales)).numpy()
        return latents, captions

    def texts(self, ids):
        """The caption texts of these rows"""
        wanted, found = sorted(set(map(int, ids))), {}
        for s, shard in enumerate(self.info["shards"]):
            local = {i - int(self.starts[s]) for i in wanted if self.starts[s] <= i < self.starts[s + 1]}
            if local:
                with open(self.folder / f"{shard['name']}.rows.jsonl", encoding="utf-8") as file:
                    lines = {n: line for n, line in enumerate(file) if n in local}
                found |= {int(self.starts[s]) + n: json.loads(line)["caption"] for n, line in lines.items()}
        return [found[int(i)] for i in ids]
