"""
The shards that a preparation is made of: which samples they hold, which process writes them, which are finished.

Shard k of a part is made of its samples from k * shard_size, whatever becomes of them, so that it depends on nothing
else. NAME.done.json is the record of a finished shard: {"part", "shard", "last": whether the part ends with it, ...}.
"""
import itertools
import json
import re
from collections import Counter

from common.files import write_atomic

# the files of a prepared folder, of its shards and of the whole
OURS = re.compile(r"(\d{5}(-\d{4,})?\.((latents\d+|captions|scales)\.npy|(rows|skipped)\.jsonl|done\.json)"
                  r"|dataset\.json|skipped\.jsonl)(\.tmp)?")


def name_of(part, shard):
    return f"{part:05d}" + (f"-{shard:04d}" if shard else "")


def read_records(folder, known=()):
    """Read the records of the finished shards, {name: record} in order; those in `known` are taken from there."""
    names = [path.name.removesuffix(".done.json") for path in folder.glob("[0-9]*.done.json")]
    records = {name: known[name] if name in known else json.loads((folder / f"{name}.done.json").read_text("utf-8"))
               for name in names}
    return dict(sorted(records.items(), key=lambda item: (item[1]["part"], item[1]["shard"])))


def all_written(records, limits):
    """Return whether each part that is used has its last shard and all before it."""
    lasts = {record["part"]: record["shard"] for record in records.values() if record["last"]}
    return all(p in lasts and all(name_of(p, shard) in records for shard in range(lasts[p] + 1))
               for p, limit in enumerate(limits) if limit != 0)


def gather(folder, info, records):
    """Put what the shards' records say into info, and their lists of skipped pictures into skipped.jsonl."""
    def concatenate(file):
        for name in records:
            file.write((folder / f"{name}.skipped.jsonl").read_bytes())
    write_atomic(folder / "skipped.jsonl", concatenate)
    skipped = sum((Counter(record["skipped"]) for record in records.values()), Counter())
    info["shards"] = [{"name": name, "rows": record["rows"]} for name, record in records.items() if record["rows"]]
    info["rows"] = sum(shard["rows"] for shard in info["shards"])
    info["captions_cut"] = sum(record["captions_cut"] for record in records.values())
    info["words"] = sorted({word for record in records.values() for word in record["words"]})
    info["skipped"] = dict(sorted(skipped.items()))


def delete_prepared(folder):
    """Delete what a preparation has left in a folder, and nothing else that lies there."""
    for path in prepared(folder):
        path.unlink()


def prepared(folder):
    """Return what a preparation has left in a folder."""
    return [path for path in folder.iterdir() if OURS.fullmatch(path.name)] if folder.is_dir() else []


def missing(folder, info):
    """Return the files of shards that should be there and are not."""
    kinds = [f"latents{r}.npy" for r in info["resolutions"]] + ["captions.npy", "rows.jsonl"]
    paths = (folder / f"{shard['name']}.{kind}" for shard in info["shards"] for kind in kinds)
    return [path for path in paths if not path.exists()]


def delete_records(folder):
    for path in [*folder.glob("[0-9]*.done.json"), *folder.glob("[0-9]*.skipped.jsonl")]:
        path.unlink()


def pictures_of_process(parts, limits, shard_size, finished, rank, world):
    """Yield (shard, (name, picture, caption)) for the pictures of this process's shards, and (shard, None) after each.

    A shard is (its part, its number, whether it is the last of the part); finished: those that need no writing.
    """
    written = {(part, shard) for part, shard, _ in finished}
    lasts = {part: shard for part, shard, last in finished if last}
    # of many parts each is one process's; few parts are read by all processes, which write every world-th shard
    whole_parts = sum(limit != 0 for limit in limits) >= 4 * world

    def is_mine(part, shard):
        owner = part if whole_parts else part + shard
        return owner % world == rank and (part, shard) not in written

    for p, (part, limit) in enumerate(zip(parts, limits)):
        if limit == 0 or whole_parts and p % world != rank:
            continue
        if p in lasts and not any(is_mine(p, shard) for shard in range(lasts[p] + 1)):
            continue
        samples = itertools.islice(part.samples(lambda position: is_mine(p, position // shard_size)), limit)
        for position, (sample, last) in enumerate(with_last(samples)):
            shard = position // shard_size
            if is_mine(p, shard):
                yield from (((p, shard, last), picture) for picture in sample)
                if last or (position + 1) % shard_size == 0:
                    yield (p, shard, last), None


def with_last(samples):
    """Yield (sample, whether it is the last); of no samples an empty one, as an empty part has a shard too."""
    samples = iter(samples)
    current = next(samples, [])
    for following in samples:
        yield current, False
        current = following
    yield current, True
