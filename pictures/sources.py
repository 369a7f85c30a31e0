"""
Where pictures come from: folders, tars, zips, manifests and the drawn set, as a list of parts.

A part gives its samples in an order that never changes; a sample is a picture with its caption, [(name, picture,
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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pictures import shapes
from pictures.captions import TABLES, look_up, records
from pictures.decode import Lost

PICTURES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
TARS = (".tar", ".tgz", ".tar.gz")
ARCHIVES = (*TARS, ".zip")
MOST_ZEROS = 2 ** 21  # at the end of a tar; it is filled up to a multiple of 10 kB, or of what tar -b says
COUNTED = 2 ** 30  # bytes of archives that are counted before the rest is estimated


@dataclass
class Part:
    """An archive, or a piece of a list of pictures"""
    names: tuple        # the archive's name, or those of the pictures
    size: int           # of an archive, in bytes; of a piece, in pictures
    samples: Callable   # (wanted) -> iterator of samples; None for those with not wanted(position), which are not read

    def count(self):
        return sum(1 for _ in self.samples(lambda position: False))


def find_source(source, piece, root=""):
    """The parts of a source, at most `piece` pictures of a list in each; ValueError if there is nothing there."""
    paths = [Path(source)] if Path(source).exists() else [Path(p) for p in sorted(glob.glob(source, recursive=True))]
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        inside = sorted(p for p in folder.iterdir() if p.is_file())
        paths = [p for p in inside if p.name.lower().endswith(ARCHIVES)]
        if paths and any(map(is_picture, map(str, inside))):
            raise ValueError(f"{source} holds pictures and archives ({paths[0].name}): give the archives as a pattern, "
                             f"'{source}/*{paths[0].suffix}', or the pictures a folder of their own")
        if not paths:
            found = sorted(pictures_below(folder))
            if not found:
                raise ValueError(f"no pictures ({', '.join(PICTURES)}) and no archives ({', '.join(ARCHIVES)}) in "
                                 f"{source}")
            return pieces([(str(p.relative_to(folder)), p) for p in found], piece, file_sample)
    if len(paths) == 1 and paths[0].suffix.lower() in TABLES:
        return pieces(manifest(paths[0], root), piece, manifest_sample)
    if not paths or not all(p.name.lower().endswith(ARCHIVES) for p in paths):
        raise ValueError(f"no source {source}: give 'shapes', a folder of pictures, {', '.join(ARCHIVES)} files (path, "
                         f"folder or glob pattern), or a list of pictures ({', '.join(TABLES)})")
    above = os.path.commonpath([p.absolute().parent for p in paths])
    return [archive_part(p, str(p.absolute().relative_to(above))) for p in paths]


def archive_part(path, label):
    samples = zip_samples if path.suffix.lower() == ".zip" else tar_samples
    return Part((label,), path.stat().st_size, functools.partial(samples, path, label))


def fingerprint(parts):
    """A hash of what the parts are, to notice a source that has changed"""
    described = hashlib.sha256()
    for part in parts:
        described.update("\0".join((*part.names, str(part.size))).encode(errors="surrogateescape"))
    return described.hexdigest()[:16]


def pictures_below(folder):
    """Pictures, and what is named like one, in a folder and those below it, linked ones too"""
    seen = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # links may go in circles
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(directory, name) for name in files if is_picture(name))


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
    return [Part(tuple(name for name, *_ in part), len(part), functools.partial(samples, part)) for part in found]


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
    except Exception:  # it says nothing then; the pictures are listed without a caption
        return {}


def by_name(name, data):
    found = {}
    for names, caption in records(name, data):
        if names and caption:
            found.setdefault(names[0], caption)
    return found


def manifest(path, root):
    """[(picture name, its path, caption)] of a list of pictures, the first caption of each; names start from `root`"""
    root = Path(root or path.parent)
    try:
        found = records(path.name, path.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not any(names for names, _ in found):
        raise ValueError(f"{path} names no pictures: see captions.py for the layouts that are understood")
    first = {}
    for i, (names, caption) in enumerate(found):
        name = names[0] if names else f"record {i + 1}"
        if not first.get(name, (None, None))[1]:
            first[name] = (root / names[0] if names else None, caption)
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
    """tarfile takes a damaged header, or zeros in the middle, for the end of the archive"""
    @classmethod
    def fromtarfile(cls, tar):
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # a block of zeros: the end, or that of the first of several tars
            tar.zeros = getattr(tar, "zeros", 0) + tarfile.BLOCKSIZE
            raise
        except tarfile.EmptyHeaderError:
            if not getattr(tar, "zeros", 0):
                raise tarfile.ReadError("no end marker") from None
            if tar.zeros > MOST_ZEROS:
                raise tarfile.ReadError(f"its last {tar.zeros:,} bytes are zeros: an incomplete download?") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        tar.zeros = 0
        return header


def tar_samples(path, label, wanted):
    """The samples of a WebDataset tar: consecutive files whose names agree up to the first dot"""
    position, files = 0, {}
    try:
        with tarfile.open(path, tarinfo=Header, ignore_zeros=True) as tar:
            entries = (m for m in tar if not m.isdir() and (m.isfile() or is_picture(m.name)))
            for _, same in groupby(entries, lambda m: sample_key(m.name)):
                read, files = wanted(position), {}
                for member in same:  # in order and only once: a compressed tar cannot go back
                    name = member.name
                    if name in files:
                        files[f"{name}/again"] = Lost(f"{name} is there twice, the first is used")
                        continue
                    files[name] = Lost("cut off" if member.isfile() else "a link, which is not followed")
                    if member.isfile():
                        files[name] = tar.extractfile(member).read() if read else b""
                    tar.members = []  # tarfile would keep every header
                if any(map(is_picture, files)):
                    yield sample(label, files) if read else None
                    position += 1
                files = {}
    except Exception as error:  # tarfile, gzip, bz2, lzma and zlib raise errors of their own
        if any(map(is_picture, files)):
            yield sample(label, files)
        yield [lost(label, f"the archive breaks off here: {error}")]


def zip_samples(path, label, wanted):
    """The samples of a zip by name. A .json that belongs to no picture (DiffusionDB's parts) gives captions to all."""
    try:
        with zipfile.ZipFile(path) as archive:
            there = Counter(n for n in archive.namelist() if not n.endswith("/"))
            names = sorted(there, key=lambda n: (sample_key(n), n))
            keys = Counter(map(sample_key, names))
            whole, position = {}, 0
            bad = [lost(label, f"{n} is there {k} times, the last is used") for n, k in there.items() if k > 1]
            for name in (n for n in names if n.lower().endswith(".json") and keys[sample_key(n)] == 1):
                try:
                    whole |= by_name(name, archive.read(name))
                except Exception as error:
                    bad.append(lost(label, f"{name} cannot be read: {error}"))
            if bad:
                yield bad
                position += 1
            for _, same in groupby(names, sample_key):
                same = list(same)
                if any(map(is_picture, same)):
                    yield zip_sample(label, archive, same, whole) if wanted(position) else None
                    position += 1
    except Exception as error:
        yield [lost(label, f"the archive cannot be read: {error}")]


def zip_sample(label, archive, names, whole):
    files, bad = {}, []
    for name in names:
        try:
            files[name] = archive.read(name)
        except Exception as error:  # zlib, bz2 and lzma raise their own errors
            bad.append(lost(label, f"{name} cannot be read: {error}"))
    found = sample(label, files)
    return bad + [(n, picture, look_up(whole, n) if caption is None else caption) for n, picture, caption in found]


def lost(label, reason):
    """An entry that only lists its reason among the skipped pictures"""
    return label, Lost(reason), "lost"


def sample_key(name):
    folder, _, base = name.rpartition("/")
    return folder, base.partition(".")[0]


def is_picture(name):
    return name.lower().endswith(PICTURES)


def sample(label, files):
    """[(name, picture, caption)] of the pictures among {name: bytes or Lost}, with the captions that lie beside them.

    A caption belongs to the picture whose name it has (7.5.txt to 7.5.png); else that of the name up to the first dot
    belongs to the picture NAME.png, or where there is none, to all (0.txt to 0.left.png and 0.right.png).
    """
    pictures = [name for name in files if is_picture(name)]
    if not pictures:  # none that could be read
        return []
    folder, slash, base = next(iter(files)).rpartition("/")
    start = folder + slash + base.partition(".")[0]
    plain = [name for name in pictures if name.rpartition(".")[0] == start]
    found = []
    for name in pictures:
        caption = caption_among(files, name.rpartition(".")[0])
        if caption is None and (name in plain or not plain):
            caption = caption_among(files, start)
        found.append((f"{label}/{name}", files[name], caption))
    return found + [lost(label, str(f)) for name, f in files.items() if name.endswith("/again")]


def caption_among(files, stem):
    """The caption in STEM.txt or STEM.json, or None"""
    for name, data in files.items():
        if name[:len(stem)] == stem and name[len(stem):].lower() == ".txt" and isinstance(data, bytes):
            return data.decode("utf-8", "replace").strip()
    for name, data in files.items():
        if name[:len(stem)] == stem and name[len(stem):].lower() == ".json" and isinstance(data, bytes):
            return json_caption(data)
    return None


def json_caption(data):
    try:
        return json.loads(data)["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # a .json without a caption is not a caption
