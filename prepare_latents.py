"""
Pictures and captions -> latents and caption embeddings on disk, ready for train.py.

    python prepare_latents.py                                             # the built-in drawn set, into data/shapes
    python prepare_latents.py --source photos --out data/photos --resolutions 256
    torchrun --nproc_per_node=8 prepare_latents.py --source 'cc12m/*.tar' --out data/cc12m --resolutions 256 512 \
        --vae stabilityai/stable-diffusion-xl-base-1.0/vae --text_encoder apple/DFN5B-CLIP-ViT-H-14-378

A source is "shapes" (the drawn set), a folder of pictures, archives (.tar, .tgz, .zip; a file, a folder of them or a
glob pattern), or a list of pictures (.json, .jsonl, .tsv, .csv). Captions lie beside the pictures as .txt or .json, or
come from --captions; sources.py and captions.py have the layouts, docs/datasets.md the commands for the paper's data.

Pictures that cannot be used are listed with their reason in skipped.jsonl. Killed and started again, it goes on after
the finished shards, and the result is the same.
"""
from common.machine import exit_with_launcher
from configurator import configure

source = "shapes"           # "shapes", a folder of pictures, archives, or a list of pictures
captions = ""               # captions by picture name (a table, or an archive or folder of them); empty: beside each
root = ""                   # folder that the names in a list of pictures start from; empty: where the list lies
out = "data/shapes"         # folder to write
vae = "pixels"              # autoencoder
scaling_factor = 0.0        # of an autoencoder in a single .safetensors file, which does not name it; 0: it does (>= 0)
text_encoder = "words"      # text encoder
resolutions = (32,)         # sides of the square pictures, in pixels; latents of every one are stored (>= 1)
limit = 0                   # use at most so many pictures; 0: all (of the drawn set: 20,000) (>= 0)
flips = False               # small sets: store a mirrored copy of every picture too
shifts = 0                  # small sets: and so many copies that are moved by up to a twelfth of the side (>= 0)
min_size = 0                # pictures with a shorter side are skipped; 0: the smallest of resolutions (>= 0)
clean_captions = False      # for captions from the web: take out what is not about the picture (captions.py)
nsfw_scores = ""            # DiffusionDB's metadata.parquet: leave out what it rates higher than max_nsfw
max_nsfw = 0.2              # of the picture's score and of the prompt's (>= 0)
caption_dtype = "float16"   # of the stored caption embeddings; int8: half the space (float16 | int8)
first_seed = 0              # of the drawn set: picture i is shapes.scene(first_seed + i) (>= 0)
shard_size = 4096           # pictures per shard (>= 1)
batch_size = 64             # pictures encoded at once (>= 1)
workers = -1                # processes that decode pictures; 0: none; -1: this machine's cores, shared out (>= -1)
device = "auto"             # cuda, mps or cpu; auto: the best there is
ignore_disk = False         # start even if the estimate does not fit on the disk
overwrite = False           # replace what is in `out`, unless it is of this very command and not finished: that goes on

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.files import lock, write_json, write_lines
from common.machine import pick_device, shared_store
from encoders import describe_vae, load_text_encoder, load_vae, words_of
from pictures import shards
from pictures.captions import caption_chooser
from pictures.decode import Unusable, copies, decode_ahead, start_workers
from pictures.sources import drawn_parts, estimated_count, find_parts, fingerprint, share_out
from training.dataset import FORMAT, check_same_encoders, read_info, write_shard

SHAPES_ROWS = 20_000
# settings that may change between a run and its continuation
NOT_COMPARED = ("out", "device", "ignore_disk", "overwrite", "workers")


def main():
    check_settings()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with start_workers(0 if workers < 0 and source == "shapes" else workers) as pool:  # "shapes" needs no decoding
        store = shared_store() if world > 1 else dist.HashStore()
        if rank == 0:
            prepare_as_first(store, world, pool)
        else:
            prepare_as_another(store, rank, world, pool)


def prepare_as_first(store, world, pool):
    """Set up the folder, let the other processes begin, write this one's shards, and complete the folder."""
    folder, models = Path(out), load_models()
    lock(folder, create=False)
    parts, limits, choose_caption = open_source()
    total = sum(limits) if limit else estimated_count(parts)
    info = set_up(folder, models, parts, total)
    records = shards.read_records(folder)
    # the others are told what is finished: the records in the folder may be gone when the last process looks for them
    finished = [(record["part"], record["shard"], record["last"]) for record in records.values()]
    store.set("finished", json.dumps(None if info["complete"] else finished))
    if info["complete"]:
        return
    before = sum(record["samples"] for record in records.values())
    name = f"process 1 of {world}" if world > 1 else None
    with tqdm(desc=name, total=(total - before) // world, unit=" pictures") as bar:
        writer = ShardWriter(folder, *models, bar)
        pictures = shards.pictures_of_process(parts, limits, shard_size, finished, 0, world)
        write_shards(writer, pictures, choose_caption, pool)
        while not shards.all_written(records := shards.read_records(folder, records), limits):  # by the others
            time.sleep(0.2)
    complete(folder, info, records)
    report(folder, info, writer, sum(record["samples"] for record in records.values()) - before)
    shards.delete_records(folder)


def prepare_as_another(store, rank, world, pool):
    """Write this process's shards, once the first process has fetched the models and accepted the settings."""
    store.wait(["finished"], timedelta(days=1))
    finished = json.loads(store.get("finished"))
    if finished is not None:
        parts, limits, choose_caption = open_source()
        pictures = shards.pictures_of_process(parts, limits, shard_size, finished, rank, world)
        write_shards(ShardWriter(Path(out), *load_models(), tqdm(disable=True)), pictures, choose_caption, pool)


def write_shards(writer, pictures, choose_caption, pool):
    chosen = ((shard, picture and choose_caption(*picture)) for shard, picture in pictures)
    for shard, picture in decode_ahead(chosen, pool, 2 * batch_size, resolutions, min_size or min(resolutions)):
        if picture:
            writer.add(*picture)
        else:
            writer.write(*shard)


# ---------------------------------------------------------------------------------------------------------------------
# Before the first picture


def check_settings():
    if not resolutions:
        raise ValueError("resolutions is empty: give at least one")
    if source != "shapes" and Path(out).absolute() == Path(source).absolute():
        raise ValueError(f"out is the source, {source}: give a folder of its own")


def load_models():
    """Load (autoencoder, text encoder, the device that they are on)."""
    picked = pick_device(device)
    autoencoder = load_vae(vae, picked, scaling_factor=scaling_factor or None)
    for r in resolutions:
        if r % autoencoder.downsample:
            raise ValueError(f"resolution {r} is not a multiple of {autoencoder.downsample}, by which '{vae}' shrinks "
                             "pictures")
    return autoencoder, load_text_encoder(text_encoder, picked), picked


def open_source():
    """Return the parts of the source, how many samples of each are used (None: all), and the choice of captions."""
    if source == "shapes":
        seeds = range(first_seed, first_seed + (limit or SHAPES_ROWS))
        parts = drawn_parts(seeds, max(resolutions), shard_size)
    else:
        parts = find_parts(source, shard_size, root)
    limits = share_out(parts, limit) if limit else [None] * len(parts)
    return parts, limits, caption_chooser(captions, clean_captions, nsfw_scores, max_nsfw)


def set_up(folder, models, parts, total):
    """Write the dataset.json of a new preparation, or check that an earlier one may go on; return what it says."""
    autoencoder, text, _ = models
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k not in NOT_COMPARED}
    info = {"format": FORMAT, "complete": False, "rows": 0, "skipped": {}, "captions_cut": 0, "shards": [], "words": [],
            "vae": describe_vae(autoencoder, vae),
            "text_encoder": {"name": text_encoder, "length": text.length, "dim": text.dim},
            "source_hash": fingerprint(parts), "caption_dtype": caption_dtype, "resolutions": list(resolutions),
            "settings": kept}
    old = earlier(folder, info)
    if not old:
        check_disk(folder, total, autoencoder, text)
        lock(folder)
        shards.delete_prepared(folder)  # only after everything that could be refused
        write_json(folder / "dataset.json", info)
        return info
    if old["complete"]:
        print(f"{folder} is already prepared: {old['rows']:,} rows")
        shards.delete_records(folder)  # which a kill at the very end has left
    return old


def earlier(folder, info):
    """Return dataset.json of the earlier start of this very preparation, or None if there is none to go on with.

    --overwrite replaces one that is finished or another one, but not one that was begun with the same command.
    """
    if not (folder / "dataset.json").exists():
        return None
    try:
        old = read_info(folder)
        check_continuation(folder, old, info)
    except ValueError:
        if overwrite:
            return None
        raise
    return None if overwrite and old["complete"] else old


def check_continuation(folder, old, new):
    """Raise ValueError if the settings or the source are not those of the unfinished run that `old` describes."""
    before = old["settings"]
    differ = [f"{k}: {before[k]!r} there, {v!r} now" for k, v in new["settings"].items() if before.get(k, v) != v]
    if differ:
        raise ValueError(f"{folder} was prepared with other settings ({'; '.join(differ)}): give another --out, or "
                         "--overwrite")
    check_same_encoders(new, "now", old, folder)
    if not old["complete"] and old.get("source_hash", new["source_hash"]) != new["source_hash"]:
        raise ValueError(f"{source} has changed since {folder} was begun (files came, went or were renamed): restore "
                         "it, or begin again with --overwrite")


def check_disk(folder, pictures, autoencoder, text):
    """Print how much will be written; raise ValueError if the disk has not so much left."""
    latents = sum(2 * autoencoder.latent_channels * (r // autoencoder.downsample) ** 2 for r in resolutions)
    each = latents + text.length * text.dim * (2 if caption_dtype == "float16" else 1 + 2 / 32) + 300
    above = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    pictures *= 1 + flips + shifts
    replaced = sum(path.stat().st_size for path in shards.prepared(folder))
    needed, free = pictures * each / 1e9, (shutil.disk_usage(above).free + replaced) / 1e9
    print(f"{folder}: about {pictures:,} pictures, {each / 1e3:,.1f} kB each, {needed:,.3f} GB in all; {free:,.3f} GB "
          "free", flush=True)
    if needed > free and not ignore_disk:
        raise ValueError(f"{folder} would need about {needed:,.3f} GB, and {free:,.3f} GB are free: give another "
                         "--out, --caption_dtype int8, fewer --resolutions, a --limit, or --ignore_disk")


# ---------------------------------------------------------------------------------------------------------------------
# From pictures to the files of a shard


class ShardWriter:
    """Encodes pictures and captions in batches and writes them as the files of a shard."""

    def __init__(self, folder, autoencoder, text, device, bar):
        self.folder, self.autoencoder, self.text, self.device, self.bar = folder, autoencoder, text, device, bar
        self.seconds, self.checked = Counter(), False  # of each stage; whether the latents were looked at
        self.started = self.clock = time.time()
        self.begin_shard()

    def begin_shard(self):
        self.batch, self.rows, self.skipped = [], [], []
        self.arrays = {name: [] for name in (*resolutions, "captions")}  # of each batch

    def lap(self, stage):
        now = time.time()
        self.seconds[stage] += now - self.clock
        self.clock = now

    def add(self, name, decoded, caption):
        """Add a picture as (width, height, squares), or the Unusable that says why it is left out."""
        self.bar.update()
        if isinstance(decoded, Unusable):
            self.skipped.append({"source": name, "reason": str(decoded)})
            return
        width, height, squares = decoded
        for source, copy in copies(name, squares, flips, shifts):
            self.batch.append((copy, {"caption": caption, "source": source, "width": width, "height": height}))
            if len(self.batch) == batch_size:
                self.encode()

    def encode(self):
        self.lap("waiting for pictures")
        rows, made = [row for _, row in self.batch], {}
        for i, r in enumerate(resolutions):
            images = torch.from_numpy(np.stack([squares[i] for squares, _ in self.batch])).to(self.device)
            images = images.permute(0, 3, 1, 2).float() / 127.5 - 1                                # (B, 3, r, r)
            draws = [generator_of(f"{row['source']} {r}") for row in rows]
            made[r] = self.autoencoder.encode(images, draws).half().cpu().numpy()
        self.lap("encoding them")
        made["captions"] = self.text([row["caption"] for row in rows]).half().cpu().numpy()
        self.lap("encoding captions")
        self.check_scale(made)
        finite = {name: np.isfinite(a).reshape(len(a), -1).all(1) for name, a in made.items()}
        good = np.logical_and.reduce(list(finite.values()))
        for i in np.flatnonzero(~good):
            what = "its caption's embedding" if finite[resolutions[0]][i] else "its latents"
            self.skipped.append({"source": rows[i]["source"], "reason": f"{what} are not finite"})
        for name, a in made.items():
            self.arrays[name].append(a[good])
        self.rows += [row for row, ok in zip(rows, good) if ok]
        self.batch = []

    def check_scale(self, made):
        """Raise ValueError if the first latents are far from what the diffusion expects: they would train nothing."""
        if not self.checked:
            latents = made[resolutions[0]].astype(np.float64)
            rms = float(np.sqrt(np.mean(latents[np.isfinite(latents)] ** 2))) if np.isfinite(latents).any() else np.inf
            if not 0.01 < rms < 100:
                raise ValueError(f"the latents of the first pictures have a root mean square of {rms:.3g}, which "
                                 f"should be about 1: the scaling factor, {self.autoencoder.scaling_factor}, is wrong")
            self.checked = True

    def write(self, part, shard, last):
        """Write the files of a shard; the last of them, NAME.done.json, says that all are there."""
        if self.batch:
            self.encode()
        self.lap("waiting for pictures")
        name, samples = shards.name_of(part, shard), len(self.rows) + len(self.skipped)
        if self.rows:
            latents = {kind: np.concatenate(a) for kind, a in self.arrays.items()}
            embeddings = latents.pop("captions")
            write_shard(self.folder, name, latents, embeddings, self.rows, caption_dtype)
        write_lines(self.folder / f"{name}.skipped.jsonl", self.skipped)
        record = {"part": part, "shard": shard, "last": last, "rows": len(self.rows), "samples": samples,
                  "skipped": Counter(s["reason"].split(":")[0] for s in self.skipped), "words": [], "captions_cut": 0}
        if hasattr(self.text, "vectors"):  # the stand-in, whose vocabulary sample.py wants to know
            texts = [words_of(row["caption"]) for row in self.rows]
            record["words"] = sorted({word for words in texts for word in words})
            record["captions_cut"] = sum(len(words) > self.text.length for words in texts)
        write_json(self.folder / f"{name}.done.json", record)
        self.begin_shard()
        self.lap("writing")


def generator_of(text):
    """Return the generator of a picture's draw from its posterior, which depends on the name alone, not on a batch."""
    seed = int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# After the last picture


def complete(folder, info, records):
    """Write dataset.json and skipped.jsonl of all shards; raise ValueError if no picture could be used."""
    shards.gather(folder, info, records)
    if not info["rows"]:
        shards.delete_records(folder)  # the next start looks again: captions may have come
        reasons = "; ".join(f"{n} x {reason}" for reason, n in info["skipped"].items())
        raise ValueError(f"none of the pictures of {source} could be used ({reasons}): see {folder / 'skipped.jsonl'}")
    if missing := shards.missing(folder, info):
        raise ValueError(f"{missing[0]} has gone while {folder} was being prepared: begin again with --overwrite")
    info["complete"] = True
    write_json(folder / "dataset.json", info)


def report(folder, info, writer, pictures):
    words = f", {len(info['words'])} different words" if info["words"] else ""
    print(f"{folder}: {info['rows']:,} rows in {len(info['shards'])} shards{words}")
    if total := sum(writer.seconds.values()):
        rate = pictures / (time.time() - writer.started)
        print(f"{rate:,.{2 if rate < 10 else 1}f} pictures/s; of the first process's time: " + ", ".join(
            f"{stage} {100 * s / total:.0f} %" for stage, s in writer.seconds.items()))
    if info["captions_cut"]:
        print(f"{info['captions_cut']:,} captions are longer than {writer.text.length} words and were cut there")
    for reason, n in info["skipped"].items():
        print(f"skipped {n:,}: {reason} (listed in {folder / 'skipped.jsonl'})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_latents.py: {error}") from None
    except BrokenProcessPool:
        raise SystemExit("prepare_latents.py: a process that decodes pictures was killed, perhaps for want of memory. "
                         "The same command goes on after the last finished shard; --workers sets their number"
                         ) from None
    except KeyboardInterrupt:
        raise SystemExit(f"prepare_latents.py: stopped. The same command goes on after the last finished shard in {out}"
                         ) from None
