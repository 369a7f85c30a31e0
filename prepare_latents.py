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
scaling_factor = 0.0        # of an autoencoder whose files do not name it (a single .safetensors file); 0: they do
text_encoder = "words"      # text encoder
resolutions = (32,)         # sides of the square pictures, in pixels; latents of every one are stored
limit = 0                   # use at most so many pictures; 0: all (of the drawn set: 20,000)
min_size = 0                # pictures with a shorter side are skipped; 0: the smallest of resolutions
clean_captions = False      # for captions from the web: take out what is not about the picture (captions.py)
nsfw_scores = ""            # DiffusionDB's metadata.parquet: leave out what it rates higher than max_nsfw
max_nsfw = 0.2              # of the picture's score and of the prompt's
caption_dtype = "float16"   # of the stored caption embeddings: float16, or int8 for half the space
first_seed = 0              # of the drawn set: picture i is shapes.scene(first_seed + i)
shard_size = 4096           # pictures per shard
batch_size = 64             # pictures encoded at once
workers = -1                # processes that decode pictures; 0: none; -1: this machine's cores, shared out
device = "auto"             # cuda, mps or cpu; auto: the best there is
ignore_disk = False         # start even if the estimate does not fit on the disk
overwrite = False           # delete what an earlier run left in `out`

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.files import write_atomic, write_json, write_lines
from common.machine import pick_device, shared_store
from encoders import load_text_encoder, load_vae, words_of
from pictures.captions import clean_web_caption, harmless, read_captions
from pictures.decode import Lost, Unusable, attempt, worker
from pictures.sources import drawn_source, estimated_count, find_source, fingerprint
from training.dataset import FORMAT, read_info, write_shard

SHAPES_ROWS = 20_000
# what may change between a run and its continuation
NOT_COMPARED = ("out", "device", "ignore_disk", "overwrite", "workers")
# the files of a shard
OURS = re.compile(r"\d{5}(-\d{4,})?\.((latents\d+|captions|scales)\.npy|(rows|skipped)\.jsonl|done\.json)(\.tmp)?")


# ---------------------------------------------------------------------------------------------------------------------
# The work of one process: events of its shards, in order


def shard_name(part, shard):
    return f"{part:05d}" + (f"-{shard:04d}" if shard else "")


def events(parts, take, rank, world, done):
    """("picture", (name, picture, caption)) for the pictures of this process, and ("end", (part, shard, whether it is
    the part's last)) after those of a shard. A shard is the samples k * shard_size to (k + 1) * shard_size of a part,
    whatever becomes of them, so that it depends on nothing else. done: {name of a finished shard: its record}
    """
    by_part = sum(most > 0 for most in take) >= 4 * world  # else all go through all parts, and share the shards
    lasts = {record["part"]: record["shard"] for record in done.values() if record["last"]}
    for p, (part, most) in enumerate(zip(parts, take)):
        def mine(shard):
            return (p if by_part else p + shard) % world == rank and shard_name(p, shard) not in done
        if not most or by_part and p % world != rank or p in lasts and not any(map(mine, range(lasts[p] + 1))):
            continue
        position = -1
        for position, sample in enumerate(part.samples(lambda position: mine(position // shard_size))):
            if position == most:
                position -= 1
                break
            shard, first = divmod(position, shard_size)
            if position and not first and mine(shard - 1):
                yield "end", (p, shard - 1, False)
            if mine(shard):
                yield from (("picture", item) for item in sample)
        last = max(position, 0) // shard_size
        if mine(last):
            yield "end", (p, last, True)


def decoded(events, pool, usable, ahead):
    """The same events, a picture as (name, caption, (width, height, squares) or Unusable); `ahead` of them are decoded
    meanwhile.
    """
    waiting = deque()

    def finish():
        kind, value, work = waiting.popleft()
        return kind, (*value, work.result() if hasattr(work, "result") else work) if kind == "picture" else value

    for kind, value in events:
        work = None
        if kind == "picture":
            name, picture, caption = value
            caption, reason = usable(name, picture, caption)
            value, args = (name, caption), (picture, resolutions, min_size or min(resolutions))
            work = Unusable(reason) if reason else pool.submit(attempt, *args) if pool else attempt(*args)
        waiting.append((kind, value, work))
        if len(waiting) > ahead:
            yield finish()
    while waiting:
        yield finish()


def filters():
    """usable(name, picture, caption) -> (caption, reason why the picture is left out, or "")"""
    find = read_captions(captions) if captions else None
    allowed = harmless(nsfw_scores, max_nsfw) if nsfw_scores else None

    def usable(name, picture, caption):
        if isinstance(picture, Lost):
            return caption, str(picture)
        if allowed is not None and name.rpartition("/")[2] not in allowed:
            return caption, f"NSFW score above {max_nsfw}, or none"
        caption = find(name) if find else caption
        caption = caption if isinstance(caption, str) else ""
        caption = caption.encode("utf-8", "replace").decode()  # halves of surrogate pairs, which no tokenizer takes
        caption = clean_web_caption(caption) if clean_captions else caption.strip()
        return caption, "" if caption else "no caption"
    return usable


def generator(text):
    """Of a picture's one draw from its posterior: a function of its name, so that nothing depends on order or batch"""
    seed = int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


class Encoder:
    """Pictures of one batch -> rows of the current shard"""

    def __init__(self, vae, text, device):
        self.vae, self.text, self.device = vae, text, device
        self.seconds = dict.fromkeys(("waiting for pictures", "encoding them", "encoding captions", "writing"), 0.0)
        self.clock = time.time()
        self.start_shard()

    def start_shard(self):
        self.latents, self.captions, self.rows = {r: [] for r in resolutions}, [], []
        self.pending, self.skipped, self.samples = [], [], 0

    def lap(self, stage):
        now = time.time()
        self.seconds[stage] += now - self.clock
        self.clock = now

    def add(self, name, caption, found):
        self.samples += 1
        if isinstance(found, Unusable):
            self.skipped.append({"source": name, "reason": str(found)})
            return
        width, height, squares = found
        self.pending.append((squares, {"caption": caption, "source": name, "width": width, "height": height}))
        if len(self.pending) == batch_size:
            self.flush()

    def flush(self):
        if not self.pending:
            return
        self.lap("waiting for pictures")
        rows = [row for _, row in self.pending]
        for i, r in enumerate(resolutions):
            images = torch.from_numpy(np.stack([squares[i] for squares, _ in self.pending])).to(self.device)
            images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
            draws = [generator(f"{row['source']} {r}") for row in rows]
            self.latents[r].append(self.vae.encode(images, draws).half().cpu().numpy())
        self.lap("encoding them")
        self.captions.append(self.text([row["caption"] for row in rows]).half().cpu().numpy())
        self.lap("encoding captions")
        self.rows += rows
        self.pending = []

    def write(self, folder, part, shard, last):
        """The files of the shard; the last of them, NAME.done.json, says that all are there."""
        self.flush()
        self.lap("waiting for pictures")
        name = shard_name(part, shard)
        if self.rows:
            latents = {r: np.concatenate(a) for r, a in self.latents.items()}
            write_shard(folder, name, latents, np.concatenate(self.captions), self.rows, caption_dtype)
        write_lines(folder / f"{name}.skipped.jsonl", self.skipped)
        record = {"part": part, "shard": shard, "last": last, "rows": len(self.rows), "samples": self.samples,
                  "skipped": Counter(s["reason"].split(":")[0] for s in self.skipped), "words": [], "captions_cut": 0}
        if hasattr(self.text, "vectors"):  # the stand-in, whose vocabulary sample.py wants to know
            texts = [words_of(row["caption"]) for row in self.rows]
            record["words"] = sorted({word for words in texts for word in words})
            record["captions_cut"] = sum(len(words) > self.text.length for words in texts)
        write_json(folder / f"{name}.done.json", record)
        self.start_shard()
        self.lap("writing")


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def starting_point(folder, new):
    """dataset.json to go on from: what an unfinished run with the same settings left, or else `new`"""
    path = folder / "dataset.json"
    if overwrite and folder.is_dir():
        for old in [path, folder / "skipped.jsonl", *(p for p in folder.iterdir() if OURS.fullmatch(p.name))]:
            old.unlink(missing_ok=True)
    if not path.exists():
        return new
    info = read_info(folder)
    old = info["settings"]
    differ = [f"{k}: {old.get(k)!r} there, {v!r} now" for k, v in new["settings"].items() if old.get(k, v) != v]
    if differ:
        raise ValueError(f"{folder} was prepared with other settings ({'; '.join(differ)}): give another --out, or "
                         "--overwrite")
    if not info["complete"] and info.get("source_hash", new["source_hash"]) != new["source_hash"]:
        raise ValueError(f"{source} has changed since {folder} was begun (files came, went or were renamed): finished "
                         "shards would no longer be what they were. --overwrite begins again, or restore the source")
    return info


def finished(folder):
    """{name: record} of the finished shards, in order"""
    found = [(path.name.removesuffix(".done.json"), json.loads(path.read_text(encoding="utf-8")))
             for path in folder.glob("[0-9]*.done.json")]
    return dict(sorted(found, key=lambda item: (item[1]["part"], item[1]["shard"])))


def complete(folder, info):
    """Gather what the shards' records say in dataset.json and skipped.jsonl"""
    done = finished(folder)

    def concatenate(file):
        for name in done:
            with open(folder / f"{name}.skipped.jsonl", "rb") as part:
                shutil.copyfileobj(part, file)
    write_atomic(folder / "skipped.jsonl", concatenate)
    skipped = sum((Counter(record["skipped"]) for record in done.values()), Counter())
    info["shards"] = [{"name": name, "rows": record["rows"]} for name, record in done.items() if record["rows"]]
    info["rows"] = sum(shard["rows"] for shard in info["shards"])
    info["captions_cut"] = sum(record["captions_cut"] for record in done.values())
    info["words"] = sorted({word for record in done.values() for word in record["words"]})
    info["skipped"] = dict(sorted(skipped.items()))
    if not info["rows"]:
        reasons = "; ".join(f"{n} x {reason}" for reason, n in skipped.items())
        tidy(folder)  # the next start looks again: captions may have come
        raise ValueError(f"none of the pictures of {source} could be used ({reasons}): see {folder / 'skipped.jsonl'}")
    info["complete"] = True
    write_json(folder / "dataset.json", info)


def tidy(folder):
    for pattern in ("[0-9]*.done.json", "[0-9]*.skipped.jsonl"):
        for path in folder.glob(pattern):
            path.unlink()


def check_disk(folder, pictures, autoencoder, text):
    """Print how much will be written; ValueError if the disk has not so much left"""
    latents = sum(2 * autoencoder.latent_channels * (r // autoencoder.downsample) ** 2 for r in resolutions)
    each = latents + text.length * text.dim * (2 if caption_dtype == "float16" else 1 + 2 / 32) + 300
    there = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
    above = next(p for p in [folder, *folder.absolute().parents] if p.is_dir())
    free = shutil.disk_usage(above).free
    print(f"{folder}: about {pictures:,} pictures, {each / 1e3:,.1f} kB each, {size(pictures * each)} in all; "
          f"{size(free)} free", flush=True)
    if pictures * each - there > free and not ignore_disk:
        raise ValueError(f"{folder} would need about {size(pictures * each)}, and {size(free)} are free: give another "
                         "--out, --caption_dtype int8, fewer --resolutions, a --limit, or --ignore_disk if many of the "
                         "pictures will be left out")


def size(n):
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.1f} TB"


def check_settings():
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size),
                        ("resolutions", min(resolutions, default=0))):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if limit < 0 or min_size < 0:
        raise ValueError("limit and min_size must not be negative")
    if caption_dtype not in ("float16", "int8"):
        raise ValueError(f"caption_dtype is '{caption_dtype}': it must be float16 or int8")


# ---------------------------------------------------------------------------------------------------------------------


class Progress:
    """One bar for all processes"""

    def __init__(self, store, total, before, shown):
        self.store, self.before, self.new = store, before, 0
        self.bar = tqdm(total=total, initial=before, unit=" pictures", smoothing=0.05, disable=not shown)

    def add(self):
        self.new += 1
        if self.new == 16:  # not for each picture: it may be a message to another machine
            self.show()

    def show(self):
        n = self.before + self.store.add("pictures", self.new)
        self.bar.total, self.new = max(self.bar.total, n), 0
        self.bar.update(n - self.bar.n)


def start_workers():
    """The processes that decode pictures, or None. Early, as they are forked where the system can: nothing has threads
    or a GPU yet.
    """
    n = workers
    if n < 0:  # the drawn set has nothing to decode
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        n = 0 if source == "shapes" else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if not n:
        return None
    pool = ProcessPoolExecutor(n, multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn"), worker)
    pool.submit(int).result()
    return pool


def parts_and_shares(rank):
    """(parts of the source, how many samples of each are used, how many in all, large sources estimated)"""
    if source == "shapes":
        n = limit or SHAPES_ROWS
        return (parts := drawn_source(range(first_seed, first_seed + n), max(resolutions), shard_size),
                [part.size for part in parts], n)
    parts = find_source(source, shard_size, root)
    if not limit:  # one process has to know the number, for the bar and the disk
        return parts, [math.inf] * len(parts), 0 if rank else estimated_count(parts)
    take, left = [], limit
    for part in parts:
        take.append(min(left, part.count()) if left else 0)
        left -= take[-1]
    return parts, take, sum(take)


def set_up(folder, autoencoder, text, parts, total):
    """The folder's dataset.json, of a new or an unfinished preparation"""
    for r in resolutions:
        if r % autoencoder.downsample:
            raise ValueError(f"resolution {r} is not a multiple of {autoencoder.downsample}, by which '{vae}' shrinks "
                             "pictures")
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items() if k not in NOT_COMPARED}
    info = starting_point(folder, {
        "format": FORMAT, "complete": False, "rows": 0, "skipped": {}, "captions_cut": 0, "shards": [], "words": [],
        "vae": {"name": vae, "scaling_factor": autoencoder.scaling_factor,
                "latent_channels": autoencoder.latent_channels, "downsample": autoencoder.downsample},
        "text_encoder": {"name": text_encoder, "length": text.length, "dim": text.dim},
        "source_hash": fingerprint(parts), "caption_dtype": caption_dtype, "resolutions": list(resolutions),
        "settings": kept})
    if info["complete"]:
        print(f"{folder} is already prepared: {info['rows']:,} rows")
        tidy(folder)
    else:
        check_disk(folder, total, autoencoder, text)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "dataset.json", info)
    return info


def main():
    check_settings()
    if source != "shapes" and Path(out).absolute() == Path(source).absolute():
        raise ValueError(f"out is the source, {source}: give a folder of its own")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    pool = start_workers()
    # all that the processes share besides the folder: a few counters
    store = shared_store() if world > 1 else dist.HashStore()
    try:
        run(rank, world, store, pool)
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)


def run(rank, world, store, pool):
    if rank:  # the first process fetches models and may refuse the settings
        store.wait(["ready"], timedelta(days=1))
        if store.get("ready") == b"complete":
            return
    where = pick_device(device)
    autoencoder = load_vae(vae, where, scaling_factor=scaling_factor or None)
    text = load_text_encoder(text_encoder, where)
    parts, take, total = parts_and_shares(rank)
    usable = filters()
    folder = Path(out)
    if rank == 0:
        info = set_up(folder, autoencoder, text, parts, total)
        store.set("ready", "complete" if info["complete"] else "go")
        if info["complete"]:
            return
    done, encoder, started = finished(folder), Encoder(autoencoder, text, where), time.time()
    progress = Progress(store, total, sum(record["samples"] for record in done.values()), rank == 0)
    for kind, value in decoded(events(parts, take, rank, world, done), pool, usable, 2 * batch_size):
        if kind == "end":
            encoder.write(folder, *value)
        else:
            encoder.add(*value)
            progress.add()
    progress.show()
    store.add("finished", 1)
    if rank == 0:
        while store.add("finished", 0) < world:
            time.sleep(0.2)
            progress.show()
        progress.bar.close()
        complete(folder, info)
        report(folder, info, text, encoder.seconds, progress.bar.n - progress.before, time.time() - started)
        tidy(folder)


def report(folder, info, text, seconds, pictures, elapsed):
    words = f", {len(info['words'])} different words" if info["words"] else ""
    print(f"{folder}: {info['rows']:,} rows in {len(info['shards'])} shards{words}")
    if total := sum(seconds.values()):
        print(f"{pictures / elapsed:,.1f} pictures/s; of the first process's time: "
              + ", ".join(f"{stage} {100 * s / total:.0f} %" for stage, s in seconds.items()))
    if info["captions_cut"]:
        print(f"{info['captions_cut']:,} captions are longer than {text.length} words and were cut there")
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
