"""
Pictures and captions -> latents and caption embeddings on disk, ready for train.py. docs/datasets.md says how pictures
and captions may lie on disk, and has the commands for the paper's data.

    python prepare_latents.py  # the built-in set `shapes`, into data/shapes
    python prepare_latents.py --source photos --out data/photos --resolutions 256
    torchrun --nproc_per_node=8 prepare_latents.py --source 'cc12m/*.tar' --out data/cc12m --resolutions 256 512 \
        --vae stabilityai/stable-diffusion-xl-base-1.0/vae --text_encoder apple/DFN5B-CLIP-ViT-H-14-378
"""
from common.machine import exit_with_launcher
from configurator import configure

# What stands in parentheses is checked.
source = "shapes"          # a folder of pictures, archives (.tar, .tgz, .zip), "shapes" (the built-in set), or "emoji"
font = ""                  # file of the font that emoji are from; empty: this computer's
captions = ""              # a table of captions by picture name, or an archive of texts; empty: beside each picture
folder_captions = ""       # "a photo of a {}": the caption of pictures that have none, with the name of their folder
out = "data/shapes"        # folder to write
vae = "pixels"             # autoencoder: "pixels", a folder, a .safetensors file or a hub id
text_encoder = "words"     # text encoder: "words", a folder or a hub id
caption_length = 0         # tokens of a caption to keep; 0: 77 for CLIP, 120 for T5, 16 for "words", else 256 (>= 0)
resolutions = (32,)        # sides of the square pictures in pixels; pictures that are smaller are skipped (>= 1)
limit = 0                  # use at most so many pictures; 0: all, but 20,000 of "shapes" (>= 0)
flips = False              # store a mirrored copy of every picture, too, which helps small sets
shifts = 0                 # store so many copies that are moved by up to a twelfth of the side (>= 0)
caption_dtype = "float16"  # type of stored caption embeddings; int8 takes half the space (float16 | int8)
workers = -1               # processes that decode pictures; 0: none; -1: one for each core (>= -1)
device = "auto"            # cuda, mps or cpu; auto: the best that this machine has

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import functools
import hashlib
import re
from collections import Counter
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.files import hash_of, line_of, read_json, whole, write_json
from common.folders import FREE, described, differences, lock, same_command
from common.machine import pick_device
from common.processes import join, run_script
from encoders import describe_vae, load_text_encoder, load_vae, warn_of_cut, words_of
from pictures.captions import caption_chooser
from pictures.decode import Unusable, Workers, copies, decode_ahead
from pictures.prepared import COPY, FORMAT, SHARD_SIZE, check_same_encoders, of_each_row, read_info, write_shard
from pictures.sources import BUILT_IN, find_parts, fingerprint, limited, no_captions, shapes_parts

BATCH_SIZE = 64  # pictures encoded at once
# Settings that not all versions have: a command without one is compared as if it had this value
FORMER = {"root": "", "scaling_factor": 0.0, "min_size": 0, "nsfw_scores": "", "first_seed": 0, "clean_captions": False,
          "folder_captions": "", "font": "", "caption_length": 0}
RECORDS = r"\d{5,}(-\d{4,})?\.(done\.json|skipped\.jsonl)"  # deleted at the end; earlier versions wrote the second
# every file that this script writes, except dataset.json
OURS = rf"{RECORDS}|\d{{5,}}(-\d{{4,}})?\.((latents\d+|captions|scales)\.npy|rows\.jsonl)|skipped\.jsonl"


def main():
    if source not in BUILT_IN and Path(out).absolute() == Path(source).absolute():
        raise ValueError(f"out is the source, {source}: give another folder")
    with closing(Workers(0 if workers < 0 and source in BUILT_IN else workers)) as pool:  # BUILT_IN need no decoding
        processes = join()
        unwritten = processes.from_first(set_up)
        if unwritten is not None:
            for number in processes.share(unwritten):
                write_part(number, pool, processes.rank > 0)
            processes.gather()
            processes.from_first(complete)
        processes.leave()


@functools.cache
def load_models():
    picked = pick_device(device)
    autoencoder = load_vae(vae, picked)
    if any(r % autoencoder.downsample for r in resolutions):
        raise ValueError(f"resolutions is {resolutions}: '{vae}' needs multiples of {autoencoder.downsample}")
    return autoencoder, load_text_encoder(text_encoder, picked, length=caption_length), picked


@functools.cache
def open_source():
    """Return (all parts of the source, those that are used, the function that chooses captions)."""
    parts = (shapes_parts(limit or 20_000, max(resolutions), SHARD_SIZE) if source == "shapes" and not font else
             find_parts(source, SHARD_SIZE, font))
    return parts, limited(parts, limit) if limit else parts, caption_chooser(captions, folder_captions)


def set_up():
    """Take the folder; return the numbers of the parts that are not written, None if it is complete."""
    folder = Path(out)
    lock(folder)
    (autoencoder, text, _), (every, parts, choose) = load_models(), open_source()
    for path, _ in chain.from_iterable(part.files for part in parts if choose.find):
        choose.find(path.absolute().as_posix())  # ValueError if a caption fits two
    content = fingerprint(every, captions)
    info = {"format": FORMAT, "complete": False, "rows": 0, "shards": [], "words": [], "caption_dtype": caption_dtype,
            "vae": describe_vae(autoencoder, vae), "text_encoder": {"name": text_encoder} | text.about, **content,
            "resolutions": list(resolutions), "settings": {k: v for k, v in settings.items() if k not in FREE},
            "source_hash": hash_of(content | {"times in the source": ""})}  # a run does not depend on the times
    before = described(folder, "dataset.json", OURS)
    if before is None or before.get("skipped") and not before["rows"]:  # at that time no picture could be used
        write_json(folder / "dataset.json", info)
    old = read_info(folder)
    same_command(folder, FORMER | old["settings"], FORMER | info["settings"], differences(old, content))
    check_same_encoders(info, "this command", old, folder)
    if old["complete"]:
        delete_records(folder)  # which a kill at the very end has left
        print(f"{folder} is already prepared: {old['rows']:,} rows")
        return None
    # records of earlier versions name no shards
    return [n for n in range(len(parts)) if not (record_of(n).exists() and "shards" in read_json(record_of(n)))]


def write_part(number, pool, quiet):
    """Write the shards of a part one after another, and last its record."""
    (_, parts, choose), (_, text, _) = open_source(), load_models()
    record = {"shards": [], "skipped": [], "cut": 0}
    entries = decode_ahead((choose(*entry) for entry in parts[number].entries()), pool, 2 * BATCH_SIZE, resolutions)
    entries = tqdm(entries, f"part {number + 1} of {len(parts)}", parts[number].most, leave=False, disable=quiet)
    pictures = with_copies(entries, record["skipped"])
    while batches := list(encode_batches(islice(pictures, SHARD_SIZE), record["skipped"])):
        rows = [row for batch, _ in batches for row in batch]
        if not rows:
            continue
        shard = {"name": name_of(number, len(record["shards"])), "rows": len(rows)}
        arrays = {kind: np.concatenate([encoded[kind] for _, encoded in batches]) for kind in batches[0][1]}
        write_shard(out, shard["name"], arrays, arrays.pop("captions"), rows, caption_dtype)
        record["shards"].append(shard)
        record["cut"] += text.longer([row["caption"] for row in rows])
    write_json(record_of(number), record)


def name_of(part, shard=0):
    return f"{part:05d}" + (f"-{shard:04d}" if shard else "")


def record_of(part):
    return Path(out, f"{name_of(part)}.done.json")


def with_copies(entries, skipped):
    """Yield (squares, row) of each picture and its copies; list in `skipped` what cannot be used."""
    for name, picture, caption in entries:
        if isinstance(picture, Unusable):
            skipped.append({"source": name, "reason": str(picture)})
            continue
        width, height, squares = picture
        for source, copy in copies(name, squares, flips, shifts):
            yield copy, {"caption": caption, "source": source, "width": width, "height": height}


def encode_batches(pictures, skipped):
    """Yield (rows, {resolution or "captions": array}) of BATCH_SIZE pictures at a time."""
    autoencoder, text, device = load_models()
    while batch := list(islice(pictures, BATCH_SIZE)):
        rows, encoded = [row for _, row in batch], {}
        for i, r in enumerate(resolutions):
            images = torch.from_numpy(np.stack([squares[i] for squares, _ in batch])).to(device)
            images = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, r, r)
            generators = [generator_of(f"{row['source']} {r}") for row in rows]
            encoded[r] = autoencoder.encode(images, generators).half().cpu().numpy()
        encoded["captions"] = text([row["caption"] for row in rows]).half().cpu().numpy()
        good = np.logical_and.reduce([np.isfinite(a).reshape(len(a), -1).all(1) for a in encoded.values()])
        for i in np.flatnonzero(~good):
            skipped.append({"source": rows[i]["source"], "reason": "its latents or embeddings are not finite"})
        yield [row for row, ok in zip(rows, good) if ok], {kind: a[good] for kind, a in encoded.items()}


def generator_of(text):
    """Return the generator of a picture's draw from its posterior, which depends on the picture's name alone."""
    seed = int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def delete_records(folder):
    for path in [path for path in folder.iterdir() if re.fullmatch(RECORDS, path.name)]:
        path.unlink()


def complete():
    """Write skipped.jsonl and dataset.json; ValueError if no picture could be used."""
    folder, reasons, words, silent, cut = Path(out), Counter(), set(), [], 0
    info, (_, parts, choose) = read_info(folder), open_source()
    with whole(folder / "skipped.jsonl") as temporary, open(temporary, "wb") as file:
        for number in range(len(parts)):
            record = read_json(record_of(number), ": delete it, and its part is written again")
            info["shards"] += record["shards"]
            reasons.update(picture["reason"].split(":")[0] for picture in record["skipped"])
            silent += [picture["source"] for picture in record["skipped"] if picture["reason"] == "no caption"][:3]
            cut += record.get("cut", 0)
            file.writelines(map(line_of, record["skipped"]))
    for shard in info["shards"] if choose.find and parts[0].archive else ():  # of other processes and starts, too
        list(map(choose.find, of_each_row(folder / shard["name"], lambda row: COPY.sub("", row["source"]))))
    for shard in info["shards"] if text_encoder == "words" else ():  # whose vocabulary sample.py wants to know
        words.update(*of_each_row(folder / shard["name"], lambda row: words_of(row["caption"])))
    info |= {"complete": True, "rows": sum(shard["rows"] for shard in info["shards"]), "words": sorted(words),
             "captions_cut": cut, "skipped": dict(sorted(reasons.items()))}
    write_json(folder / "dataset.json", info | {"complete": info["rows"] > 0})
    delete_records(folder)
    skipped = "; ".join(f"{n:,} x {reason}" for reason, n in info["skipped"].items())
    report = f"{info['rows']:,} rows" + (f", skipped {skipped} (listed in skipped.jsonl)" if skipped else "")
    most = reasons["no caption"] > info["rows"] // (1 + flips + shifts)
    why = f". {no_captions(parts, silent, getattr(choose.find, 'names', ()))}" if most else ""
    if not info["rows"]:
        raise ValueError(f"none of the pictures of {source} could be used: {folder} has {report}{why}")
    print(f"{folder}: {report}{why}")
    warn_of_cut(cut, load_models()[1])


if __name__ == "__main__":
    run_script("prepare_latents.py", main)
