"""
Where pictures come from: folders, archives and the built-in set, as a list of parts.

A part gives (name, picture, caption) in an order that never changes. The picture is a Path, a file's bytes, an image,
or Unusable with the reason. Captions lie beside the pictures, as .txt or as .json {"caption": ...} of the same name.
"""
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

from pictures import shapes
from pictures.archives import ARCHIVES, members
from pictures.captions import decoded
from pictures.decode import Unusable

PICTURES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
TEXTS = (".txt", ".json")  # what is read of what lies beside pictures
MOST_BYTES = 2 ** 28  # of a file in an archive: nothing harmless is larger


@dataclasses.dataclass
class Part:
    """An archive, or a piece of a folder or of `shapes`."""
    names: tuple  # the archive's name, or those of the pictures
    size: int  # of an archive in bytes, of a piece in pictures
    read: Callable  # () -> iterator of (name, picture, caption)
    most: int = None  # use at most so many pictures; None: use all of an archive
    archive: Path = None

    def entries(self):
        return itertools.islice(self.read(), self.most)


def find_parts(source, piece):
    """Return the parts of a source, at most `piece` pictures of a folder in each."""
    paths = [Path(source)] if Path(source).exists() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    if len(paths) == 1 and paths[0].is_dir():
        folder, files = paths[0], sorted(p for p in paths[0].iterdir() if p.is_file())
        paths = [p for p in files if is_archive(p)]
        if paths and any(is_picture(p.name) for p in files):
            raise ValueError(f"{source} holds pictures and archives: give each a folder of their own")
        if not paths and (pictures := sorted(pictures_below(folder))):
            return pieces([(str(path.relative_to(folder)), path) for path in pictures], piece, entry_of_file)
    if not paths or not all(map(is_archive, paths)):
        raise ValueError(f"no source {source}: give 'shapes', a folder of pictures ({', '.join(PICTURES)}), or "
                         f"archives ({', '.join(ARCHIVES)})")
    above = os.path.commonpath([p.absolute().parent for p in paths])
    labels = [str(p.absolute().relative_to(above)) for p in paths]
    return [Part((label,), path.stat().st_size, functools.partial(entries_of_archive, path, label), archive=path)
            for path, label in zip(paths, labels)]


def shapes_parts(count, size, piece):
    """Return the parts of the built-in set: the scene of each seed below `count`."""
    named = [(f"shapes/{seed}", seed) for seed in range(count)]
    return pieces(named, piece, lambda name, seed: (name, *shapes.scene(seed, size=size)[:2]))


def pieces(named, piece, read):
    """Return parts of `piece` of these (name, item), with the entries read(name, item)."""
    groups = [named[i:i + piece] for i in range(0, len(named), piece)]
    return [Part(tuple(name for name, _ in group), len(group), functools.partial(itertools.starmap, read, group),
                 len(group)) for group in groups]


def fingerprint(parts):
    """Return a hash of names and sizes, to notice a source that has changed."""
    described = "".join("\0".join((*part.names, str(part.size))) for part in parts)
    return hashlib.sha256(described.encode(errors="surrogateescape")).hexdigest()[:16]


def limited(parts, limit):
    """Return the first of the parts, in which `limit` pictures are used in all."""
    used = []
    for part in parts:
        if limit > 0:
            pictures = count_pictures(part.archive) if part.archive else part.size
            used.append(dataclasses.replace(part, most=min(limit, pictures)))
            limit -= used[-1].most
    return used


def pictures_below(folder):
    """Yield the pictures, by their names, in a folder and those below it, linked ones too."""
    seen = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(directory)) in seen:  # links may go in circles
            folders.clear()
        else:
            yield from (Path(directory, name) for name in files if is_picture(name))
        seen.add(real)


def is_picture(name):
    return name.lower().endswith(PICTURES)


def is_archive(path):
    return path.is_file() and path.name.lower().endswith(ARCHIVES)


def entry_of_file(name, path):
    texts = [text for text in map(path.with_suffix, TEXTS) if text.is_file()]
    picture = path if path.is_file() else Unusable(f"no such file: {path}")  # a pipe, a link to nowhere
    return name, picture, caption_among({text.name: text.read_bytes() for text in texts})


def caption_among(files):
    """Return the caption that a .txt or .json among {name: bytes or Unusable} holds, or None."""
    beside = {Path(name).suffix.lower(): data for name, data in files.items() if isinstance(data, bytes)}
    if ".txt" in beside:
        return decoded(beside[".txt"])
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # none of captions
        return json.loads(beside[".json"])["caption"]


def entries_of_archive(path, label):
    """Yield an archive's entries: files that share their name up to the last dot, and in a tar lie together."""
    files = {}
    try:
        relevant = (member for member in members(path) if member[0].lower().endswith((*PICTURES, *TEXTS)))
        for _, group in itertools.groupby(relevant, lambda member: member[0].rpartition(".")[0]):
            for name, size, read in group:
                files[name] = content(size, read) if read and name not in files else Unusable("a link, or there twice")
            yield from entries_of_files(label, files)
            files = {}
    except Exception as error:  # tarfile, zipfile, gzip, bz2, lzma and zlib raise errors of their own
        yield from entries_of_files(label, files)
        yield label, Unusable(f"the archive breaks off here: {type(error).__name__}: {error}"), None


def count_pictures(archive):
    n = 0
    with contextlib.suppress(Exception):  # what is damaged is listed when it is read
        for name, *_ in members(archive):
            n += is_picture(name)
    return n


def content(size, read):
    """Return read() of a file of `size` bytes, or Unusable if it is too large or damaged."""
    if size > MOST_BYTES:
        return Unusable(f"{size:,} bytes, more than is harmless")
    try:
        return read()
    except Exception as error:  # for want of memory, or one of the archive's own
        return Unusable(f"cannot be read: {type(error).__name__}: {error}")


def entries_of_files(label, files):
    """Return an entry for each picture among {name: bytes or Unusable}, all with the same caption."""
    caption = caption_among(files)
    return ((f"{label}/{name}", data, caption) for name, data in files.items() if is_picture(name))
