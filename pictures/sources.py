"""
Where pictures come from: folders, tars, zips, manifests and the drawn set, as a list of parts.

A part gives its samples in an order that never changes. A sample is a picture with its caption, [(name, picture,
caption)], where the picture is a Path, a file's bytes, a drawn image, or Lost with the reason. Captions lie beside
the pictures, as .txt or as .json {"caption": ...} of the same name, or in a captions file (captions.py).
"""
import functools
import glob
import hashlib
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pictures import shapes
from pictures.captions import TABLES, Bounded, captions_by_name, decoded, look_up, records, table_of
from pictures.decode import Lost

READ = (".txt", ".json")  # of what lies beside pictures
PICTURES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
ARCHIVES = (".tar", ".tgz", ".tar.gz", ".zip")
MOST_ZEROS = 2 ** 21  # at the end of a tar; it is filled up to a multiple of 10 kB, or of what tar -b says
COUNTED = 2 ** 30  # bytes of archives that are counted before the rest is estimated
MOST_BYTES = 2 ** 28  # of a file in an archive: no harmless picture or caption is larger


@dataclass
class Part:
    """An archive, or a piece of a list of pictures"""
    names: tuple        # the archive's name, or those of the pictures
    size: int           # of an archive, in bytes; of a piece, in pictures
    samples: Callable   # (wanted) -> iterator of samples; None for those with not wanted(position), which are not read
    known: int = None   # how many samples it has, where that needs no looking

    def count(self):
        return sum(1 for _ in self.samples(lambda position: False)) if self.known is None else self.known


def find_parts(source, piece, root=""):
    """Return the parts of a source, at most `piece` pictures of a list in each; ValueError if there is nothing."""
    paths = [Path(source)] if Path(source).exists() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    if len(paths) == 1 and paths[0].is_dir():
        folder, files = paths[0], sorted(p for p in paths[0].iterdir() if p.is_file())
        paths = [p for p in files if p.name.lower().endswith(ARCHIVES)]
        if paths and any(is_picture(p.name) for p in files):
            raise ValueError(f"{source} holds pictures and archives: give the archives as a pattern, "
                             f"'{source}/*{paths[0].suffix}', or the pictures a folder of their own")
        if not paths:
            pictures = [(str(p.relative_to(folder)), p) for p in sorted(pictures_below(folder))]
            if not pictures:
                raise ValueError(f"no pictures ({', '.join(PICTURES)}) and no archives ({', '.join(ARCHIVES)}) in "
                                 f"{source}")
            return pieces(pictures, piece, file_sample)
    if len(paths) == 1 and paths[0].suffix.lower() in TABLES:
        return pieces(read_manifest(paths[0], root), piece, manifest_sample)
    if not paths or not all(p.name.lower().endswith(ARCHIVES) for p in paths):
        raise ValueError(f"no source {source}: give 'shapes', a folder of pictures, {', '.join(ARCHIVES)} files (path, "
                         f"folder or glob pattern), or a list of pictures ({', '.join(TABLES)})")
    above = os.path.commonpath([p.absolute().parent for p in paths])
    parts = []
    for path in paths:
        label = str(path.absolute().relative_to(above))
        samples = zip_samples if path.suffix.lower() == ".zip" else tar_samples
        parts.append(Part((label,), path.stat().st_size, functools.partial(samples, path, label)))
    return parts


def drawn_parts(seeds, size, piece):
    """Return the parts of the drawn set: shapes.scene of each seed."""
    def samples(seeds, wanted):
        for position, seed in enumerate(seeds):
            if wanted(position):
                image, caption, _ = shapes.scene(seed, size=size)
            yield [(f"shapes/{seed}", image, caption)] if wanted(position) else None
    groups = [seeds[i:i + piece] for i in range(0, len(seeds), piece)]
    return [Part((f"shapes/{group[0]} to {group[-1]}",), len(group), functools.partial(samples, group), len(group))
            for group in groups]


def fingerprint(parts):
    """Return a hash of what the parts are, to notice a source that has changed."""
    described = "".join("\0".join((*part.names, str(part.size))) for part in parts)
    return hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()[:16]


def estimated_count(parts):
    """Return the number of samples; that of large sources is estimated from their first archives."""
    counted = size = 0
    for part in parts:
        counted, size = counted + part.count(), size + part.size
        if size > COUNTED:
            break
    return round(counted * sum(p.size for p in parts) / max(size, 1))


def share_out(parts, limit):
    """Return how many samples of each part are used so that there are `limit` in all."""
    limits = []
    for part in parts:
        limits.append(min(limit, part.count()) if limit else 0)
        limit -= limits[-1]
    return limits


# ---------------------------------------------------------------------------------------------------------------------
# Lists of pictures


def pictures_below(folder):
    """Yield the pictures, and what is named like one, in a folder and those below it, linked ones too."""
    seen = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # links may go in circles
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(directory, name) for name in files if is_picture(name))


def is_picture(name):
    return name.lower().endswith(PICTURES)


def pieces(entries, piece, sample):
    """Return parts of `piece` entries (name, ...) each, of which sample(*entry) makes (name, picture, caption)."""
    def samples(entries, wanted):
        for position, entry in enumerate(entries):
            yield [sample(*entry)] if wanted(position) else None
    groups = [entries[i:i + piece] for i in range(0, len(entries), piece)]
    return [Part(tuple(name for name, *_ in group), len(group), functools.partial(samples, group), len(group))
            for group in groups]


def file_sample(name, path):
    texts = (path.with_suffix(".txt"), path.with_suffix(".json"))
    caption = caption_among({text.name: text.read_bytes() for text in texts if text.is_file()}, path.stem)
    return name, path if path.is_file() else Lost("not a file"), caption  # it may be a pipe, or a link to nowhere


def read_manifest(path, root):
    """Read [(picture name, its path, the first of its captions)] of a list of pictures with names below `root`."""
    try:
        rows = records(path.name, path.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not any(names for names, _ in rows):
        raise ValueError(f"{path} names no pictures: see captions.py for the layouts that are understood")
    captions = {}
    for number, (names, caption) in enumerate(rows, 1):
        name = names[0] if names else f"record {number}"  # which will be listed as a file that is not there
        captions[name] = captions.get(name) or caption
    return [(name, Path(root or path.parent, name), caption) for name, caption in captions.items()]


def manifest_sample(name, path, caption):
    candidates = (path, *(Path(f"{path}{ending}") for ending in PICTURES))
    file = next(filter(os.path.isfile, candidates), None)  # which, unlike Path.is_file, takes any name
    return name, file or Lost(f"no such file: {path}"), caption


# ---------------------------------------------------------------------------------------------------------------------
# Archives


class Header(Bounded):
    """Raises ReadError for a damaged header and for zeros in the middle, which tarfile takes for the archive's end."""
    @classmethod
    def fromtarfile(cls, tar):
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # a block of zeros: the end, or that of the first of several tars
            tar.zeros = getattr(tar, "zeros", 0) + tarfile.BLOCKSIZE
            raise
        except tarfile.EmptyHeaderError:
            if not 0 < getattr(tar, "zeros", 0) <= MOST_ZEROS:
                raise tarfile.ReadError("no zeros at its end, or too many: an incomplete download?") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        tar.zeros = 0
        return header


def tar_samples(path, label, wanted):
    """Yield the samples of a WebDataset tar: consecutive files whose names agree up to the first dot."""
    position, files = 0, {}
    try:
        with tarfile.open(path, tarinfo=Header, ignore_zeros=True) as tar:
            members = (m for m in tar if not m.isdir() and m.name.lower().endswith(PICTURES + READ))
            for _, group in groupby(members, lambda m: sample_key(m.name)):
                read, files = wanted(position), {}
                for member in group:  # in order and only once: a compressed tar cannot go back
                    tar.members = []  # tarfile would keep every header
                    if member.name in files or not member.isfile():
                        files[member.name] = Lost("a link, or there twice")
                    else:
                        files[member.name] = Lost("cut off")  # if the next line fails
                        files[member.name] = content(member.size, lambda m=member: tar.extractfile(m).read(), read)
                if any(map(is_picture, files)):
                    yield sample(label, files) if read else None
                    position += 1
                files = {}
    except Exception as error:  # tarfile, gzip, bz2, lzma and zlib raise errors of their own
        if any(map(is_picture, files)):
            yield sample(label, files)
        yield [lost(label, f"the archive breaks off here: {type(error).__name__}: {error}")]


def zip_samples(path, label, wanted):
    """Yield the samples of a zip by name. A .json that belongs to no picture (DiffusionDB's) gives captions to all."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = (name for name in archive.namelist() if name.lower().endswith(PICTURES + READ))
            files = sorted(files, key=lambda name: (sample_key(name), name))
            groups = [list(group) for _, group in groupby(files, sample_key)]
            captions, position = {}, 0
            for name in (group[0] for group in groups if len(group) == 1 and group[0].lower().endswith(".json")):
                try:
                    captions |= captions_by_name(name, table_of(archive, name))
                except Exception as error:
                    yield [lost(label, f"{name} cannot be read: {error}")]
                    position += 1
            for group in groups:
                if any(map(is_picture, group)):
                    yield zip_sample(label, archive, group, captions) if wanted(position) else None
                    position += 1
    except Exception as error:
        yield [lost(label, f"the archive cannot be read: {error}")]


def zip_sample(label, archive, names, captions):
    files = {}
    for name in names:
        try:
            files[name] = Lost("there twice") if name in files else content(
                archive.getinfo(name).file_size, lambda name=name: archive.read(name))
        except Exception as error:  # zlib, bz2 and lzma raise their own errors
            files[name] = Lost(f"cannot be read: {error}")
    return [(name, picture, look_up(captions.get, name) if caption is None else caption)
            for name, picture, caption in sample(label, files)]


def content(size, read, wanted=True):
    """Return read() of a file of `size` bytes, b"" if it is not wanted, or Lost if it is too large."""
    if size > MOST_BYTES:
        return Lost(f"{size:,} bytes, more than is harmless")
    try:
        return read() if wanted else b""
    except MemoryError:
        return Lost(f"no memory for its {size:,} bytes")


def lost(label, reason):
    """Return an entry that only lists its reason among the skipped pictures."""
    return label, Lost(reason), None


def sample_key(name):
    folder, _, base = name.rpartition("/")
    return folder, base.partition(".")[0]


def sample(label, files):
    """Return [(name, picture, caption)] of the pictures among {name: bytes or Lost}, with captions from beside them.

    A caption belongs to the picture whose name it has (7.5.txt to 7.5.png); else that of the name up to the first dot
    belongs to the picture NAME.png, or where there is none, to all (0.txt to 0.left.png and 0.right.png).
    """
    stems = {name: name.rpartition(".")[0] for name in files if is_picture(name)}
    entries = []
    for name, stem in stems.items():
        folder, slash, base = name.rpartition("/")
        start = folder + slash + base.partition(".")[0]
        caption = caption_among(files, stem)
        if caption is None and (stem == start or start not in stems.values()):
            caption = caption_among(files, start)
        entries.append((f"{label}/{name}", files[name], caption))
    return entries


def caption_among(files, stem):
    """Return the caption in STEM.txt or STEM.json, or None."""
    beside = {name[len(stem):].lower(): data for name, data in files.items()
              if name.startswith(stem) and isinstance(data, bytes)}
    if ".txt" in beside:
        return decoded(beside[".txt"]).strip()
    try:
        return json.loads(beside[".json"])["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # there is no .json, or it is none of captions
