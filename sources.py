"""
Where pictures come from: folders, tars, zips, manifests and the drawn set, as a list of parts.

A part gives its samples in an order that never changes; a sample is a picture with its caption, [(name, picture,
caption)], where the picture is a Path, a file's bytes, a drawn image, or Lost with the reason. Captions lie beside
the pictures, as .txt or as .json {"caption": ...} of the same name, or in a captions file (captions.py).
"""
import functools
import glob
import json
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import shapes
from captions import TABLES, look_up, records
from pictures import Lost

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TARS = (".tar", ".tgz", ".tar.gz")
ARCHIVES = (*TARS, ".zip")
COUNTED = 2 ** 30  # bytes of archives that are counted before the rest is estimated


@dataclass
class Part:
    """An archive, or a piece of a list of pictures"""
    size: int           # of an archive, in bytes; of a piece, in pictures
    samples: Callable   # (wanted) -> iterator of samples; None for those with not wanted(position), which are not read

    def count(self):
        return sum(1 for _ in self.samples(lambda position: False))


def find_source(source, piece, root=""):
    """The parts of a source, at most `piece` pictures of a list in each; ValueError if there is nothing there."""
    paths = [Path(source)] if Path(source).exists() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        paths = sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(ARCHIVES))
        if not paths:
            found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and not p.is_dir())
            if not found:
                raise ValueError(f"no pictures ({', '.join(PICTURES)}) and no archives ({', '.join(ARCHIVES)}) in "
                                 f"{source}")
            return pieces([(str(p.relative_to(folder)), p) for p in found], piece, file_sample)
    if len(paths) == 1 and paths[0].suffix.lower() in TABLES:
        return pieces(manifest(paths[0], root), piece, manifest_sample)
    if not paths or not all(p.name.lower().endswith(ARCHIVES) for p in paths):
        raise ValueError(f"no source {source}: give 'shapes', a folder of pictures, {', '.join(ARCHIVES)} files (path, "
                         f"folder or glob pattern), or a list of pictures ({', '.join(TABLES)})")
    return [Part(p.stat().st_size, functools.partial(zip_samples if p.suffix.lower() == ".zip" else tar_samples, p))
            for p in paths]


def estimated_count(parts):
    """Number of samples, that of large sources estimated from their first archives"""
    counted = size = 0
    for part in parts:
        counted, size = counted + part.count(), size + part.size
        if size > COUNTED:
            break
    return round(counted * sum(p.size for p in parts) / max(size, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Lists of pictures


def pieces(entries, piece, sample):
    def samples(entries, wanted):
        for position, entry in enumerate(entries):
            yield [sample(*entry)] if wanted(position) else None
    found = [entries[i:i + piece] for i in range(0, len(entries), piece)]
    return [Part(len(part), functools.partial(samples, part)) for part in found]


def drawn_source(seeds, size, piece):
    """The parts of the drawn set: shapes.scene of each seed"""
    def drawn(name, seed):
        image, caption, _ = shapes.scene(seed, size=size)
        return name, image, caption
    return pieces([(f"shapes/{i}", i) for i in seeds], piece, drawn)


def file_sample(name, path):
    if not path.is_file():  # a link to nowhere, a pipe
        return name, Lost("not a file"), None
    caption = path.with_suffix(".txt")
    if caption.is_file():
        return name, path, caption.read_text(encoding="utf-8", errors="replace").strip()
    if path.with_suffix(".json").is_file():
        return name, path, json_caption(path.with_suffix(".json").read_bytes())
    return name, path, look_up(captions_of_folder(path.parent), path.name)


@functools.lru_cache(8)
def captions_of_folder(folder):
    """{picture name: caption} of FOLDER/FOLDER.json, as in DiffusionDB's parts"""
    path = folder / f"{folder.resolve().name}.json"
    try:
        return by_name(path.name, path.read_bytes()) if path.is_file() else {}
    except (ValueError, KeyError, TypeError, OSError):
        return {}


def by_name(name, data):
    return {names[0]: caption for names, caption in records(name, data) if names}


def manifest(path, root):
    """[(picture name, its path, caption)] of a list of pictures, the first record of each; names start from `root`"""
    root = Path(root or path.parent)
    try:
        found = records(path.name, path.read_bytes())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not any(names for names, _ in found):
        raise ValueError(f"{path} names no pictures: see captions.py for the layouts that are understood")
    first = {}
    for i, (names, caption) in enumerate(found):
        first.setdefault(names[0] if names else f"record {i + 1}", (root / names[0] if names else None, caption))
    return [(name, *rest) for name, rest in first.items()]


def manifest_sample(name, path, caption):
    if path is None:
        return name, Lost("the record names no picture"), caption
    try:
        there = [p for p in (path, *(path.with_name(path.name + e) for e in PICTURES)) if p.is_file()]
    except (OSError, ValueError) as error:  # a name that no file can have
        return name, Lost(f"no such file: {error}"), caption
    return name, there[0] if there else Lost(f"no such file: {path}"), caption


# ---------------------------------------------------------------------------------------------------------------------
# Archives


class Header(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive"""
    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError("no end marker" if "empty" in str(error) else str(error)) from None


def tar_samples(path, wanted):
    """The samples of a WebDataset tar: consecutive files whose names agree up to the first dot"""
    position, files = 0, {}
    try:
        with tarfile.open(path, tarinfo=Header) as tar:
            for _, same in groupby((m for m in tar if m.isfile()), lambda m: sample_key(m.name)):
                read, files = wanted(position), {}
                for member in same:  # in order and only once: a compressed tar cannot go back
                    files[member.name] = tar.extractfile(member).read() if read else b""
                    tar.members = []  # tarfile would keep every header
                if any(map(is_picture, files)):
                    yield sample(path, files) if read else None
                    position += 1
                files = {}
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        if any(map(is_picture, files)):  # those of the last sample that are whole
            yield sample(path, files)
        yield [lost(path, f"the archive breaks off here: {error}")]


def zip_samples(path, wanted):
    """The samples of a zip by name. A .json that belongs to no picture (DiffusionDB's parts) gives captions to all."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted((n for n in archive.namelist() if not n.endswith("/")), key=lambda n: (sample_key(n), n))
            keys = Counter(map(sample_key, names))
            tables = [n for n in names if n.lower().endswith(".json") and keys[sample_key(n)] == 1]
            whole, position = {}, 0
            for name in tables:
                try:
                    whole |= by_name(name, archive.read(name))
                except (ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, OSError) as error:
                    yield [lost(path, f"{name} cannot be read: {error}")]
                    position += 1
            for _, same in groupby(names, sample_key):
                same = list(same)
                if any(map(is_picture, same)):
                    yield zip_sample(path, archive, same, whole) if wanted(position) else None
                    position += 1
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        yield [lost(path, f"the archive cannot be read: {error}")]


def zip_sample(path, archive, names, whole):
    files, bad = {}, []
    for name in names:
        try:
            files[name] = archive.read(name)
        except Exception as error:  # zlib, bz2 and lzma raise their own errors
            bad.append(lost(path, f"{name} cannot be read: {error}"))
    found = sample(path, files)
    return bad + [(n, picture, look_up(whole, n) if caption is None else caption) for n, picture, caption in found]


def lost(path, reason):
    """An entry that only lists its reason among the skipped pictures"""
    return path.name, Lost(reason), "lost"


def sample_key(name):
    folder, _, base = name.rpartition("/")
    return folder, base.partition(".")[0]


def is_picture(name):
    return name.lower().endswith(PICTURES)


def sample(path, files):
    """[(name, picture, caption)] of the pictures among {name: bytes}, with the caption that lies beside them"""
    extension = {name: "." + name.rpartition("/")[2].partition(".")[2].lower() for name in files}
    texts = {extension[name]: data for name, data in files.items()}
    caption = None
    if ".txt" in texts:
        caption = texts[".txt"].decode("utf-8", "replace").strip()
    elif ".json" in texts:
        caption = json_caption(texts[".json"])
    found = [name for name in files if extension[name] in PICTURES]
    # a name with more dots (7.5.png) is a picture too, unless the sample has a plain one and this is its .mask.png, say
    return [(f"{path.name}/{name}", files[name], caption) for name in found or filter(is_picture, files)]


def json_caption(data):
    try:
        return json.loads(data)["caption"]
    except (ValueError, KeyError, TypeError):
        return None  # a .json without a caption is not a caption
