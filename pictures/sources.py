"""
Where pictures come from: folders, archives and the built-in set, as a list of parts.

A part gives (name, picture, caption) in an order that never changes. The picture is a Path, a file's bytes, an image,
or Unusable with the reason. Captions lie beside the pictures, see captions.beside().
"""
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pictures import emoji, shapes
from pictures.archives import ARCHIVES, members
from pictures.captions import TEXTS, beside, caption_among, plain, stem
from pictures.decode import Unusable

PICTURES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
UNREAD = (".heic", ".heif", ".hif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".dng", ".cr2", ".cr3", ".nef", ".arw")
MOST_BYTES = 2 ** 28  # of a file in an archive: nothing harmless is larger
EMOJI = {"emoji": False, "emoji_unseen": True, "emoji_all": None}  # are they held out of training?
BUILT_IN = ("shapes", *EMOJI)
WAITING = 2 ** 28, 2 ** 18  # bytes in memory, and number of pictures, that wait for their captions in an archive


@dataclasses.dataclass
class Part:
    """An archive, or a piece of a folder or of `shapes`."""
    names: tuple  # the archive's name, or those of the pictures
    read: Callable  # () -> iterator of (name, picture, caption)
    most: int = None  # use at most so many pictures; None: use all of an archive
    archive: Path = None
    files: tuple = ()  # of a piece of a folder: (the picture's path, the names of the texts beside it) of each

    def entries(self):
        for name, picture, caption in itertools.islice(self.read(), self.most):
            ending = os.path.splitext(name)[1].lower()
            picture = Unusable(f"{ending} is not read, convert it to .jpg or .png") if ending in UNREAD else picture
            yield name, picture, caption


def find_parts(source, piece, font=""):
    """Return the parts of a source, at most `piece` pictures of a folder in each. font: of emoji alone."""
    if font and source not in EMOJI:
        raise ValueError(f"--font is for --source emoji, not for {source}")
    if source in EMOJI:
        file = Path(emoji.open_font(font).path)
        named = [(emoji.label(text), (file, ())) for text in emoji.texts(font, EMOJI[source])]
        if not named:
            raise ValueError(f"{file} has no emoji with skin tones, so none is in {source}")
        return pieces(named, piece, lambda label, _: (label, *emoji.entry(label, font)))
    names = [source] if Path(source).exists() else expanded(source)
    found = [[name] if Path(name).exists() else sorted(glob.glob(name, recursive=True)) for name in names]
    if [] in found and any(found):
        raise ValueError(f"{source} names {names[found.index([])]}, which does not exist")
    paths = [Path(name) for name in dict.fromkeys(itertools.chain.from_iterable(found))]
    if len(paths) == 1 and paths[0].is_dir():
        folder, files = paths[0], sorted(p for p in paths[0].iterdir() if p.is_file() and not is_hidden(p.name))
        paths = [p for p in files if is_archive(p)]
        if paths and any(is_picture(p.name) for p in files):
            raise ValueError(f"{source} holds pictures and archives: give each a folder of their own")
        if not paths and (pictures := sorted(pictures_below(folder))):
            return pieces([(str(file[0].relative_to(folder)), file) for file in pictures], piece, entry_of_file)
    if not paths or not all(map(is_archive, paths)):
        raise ValueError(f"no source {source}: give 'shapes', 'emoji', a folder of pictures ({', '.join(PICTURES)}), "
                         f"or archives ({', '.join(ARCHIVES)})")
    above = os.path.commonpath([p.absolute().parent for p in paths])
    labels = [str(p.absolute().relative_to(above)) for p in paths]
    return [Part((label,), functools.partial(entries_of_archive, path, label), archive=path)
            for path, label in zip(paths, labels)]


def shapes_parts(count, size, piece):
    """Return the parts of the built-in set: the scene of each seed below `count`, which its name describes."""
    share = shapes.TRAINING_TWO_OBJECTS
    named = [(f"shapes/{share}/{seed}", ()) for seed in range(count)]
    return pieces(named, piece, lambda name, _: (
        name, *shapes.scene(int(name.rsplit("/")[-1]), size=size, two_objects=share)[:2]))


def pieces(named, piece, read):
    """Return parts of `piece` of these (name, item), with the entries read(name, item)."""
    groups = [named[i:i + piece] for i in range(0, len(named), piece)]
    return [Part(tuple(name for name, _ in group), functools.partial(itertools.starmap, read, group), len(group), None,
                 [file for name, file in group if file and not name.lower().endswith(UNREAD)]) for group in groups]


def expanded(pattern):
    """Return the patterns that one with braces means, as '{00000..00009}.tar' or '{a,b}.zip'."""
    if not (match := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)):
        return [pattern]
    first, last, words = match.groups()
    words = words.split(",") if words else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [one for word in words for one in expanded(pattern[:match.start()] + word + pattern[match.end():])]


def fingerprint(parts, captions=""):
    """Return what tells a source that has changed: the number of pictures or archives, and hashes of their names, sizes
    and times, and of the captions that lie beside them or in the file `captions`."""
    hashes = {what: hashlib.sha256() for what in ("names", "sizes", "times", "captions")}
    tables = sorted(Path(captions).rglob("*")) if captions and os.path.isdir(captions) else [captions]
    for part in parts:
        hashes["names"].update("\0".join((*part.names, "")).encode(errors="surrogateescape"))
        for path, texts in part.files or [(part.archive, ())] * bool(part.archive):
            status = path.stat() if path.exists() else path.lstat()  # of a link to nowhere
            hashes["sizes"].update(f"{status.st_size} ".encode())
            hashes["times"].update(f"{status.st_mtime_ns} ".encode())
            tables += [path.parent / text for text in texts]
    for table in filter(os.path.isfile, tables):
        with open(table, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        hashes["captions"].update(f"{os.path.basename(table)} {content} ".encode(errors="surrogateescape"))
    return {"number in the source": sum(len(part.names) for part in parts)} | {
        f"{what} in the source": digest.hexdigest()[:16] for what, digest in hashes.items()}


def limited(parts, limit):
    """Return the first of the parts, in which `limit` pictures are used in all."""
    used = []
    for part in parts:
        if limit > 0:
            pictures = count_pictures(part.archive) if part.archive else len(part.names)
            used.append(dataclasses.replace(part, most=min(limit, pictures)))
            limit -= used[-1].most
    return used


def pictures_below(folder):
    """Yield (path, names of the texts beside it) of the pictures in a folder and those below it, linked ones too."""
    seen = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if (real := os.path.realpath(directory)) in seen:  # links may go in circles
            folders.clear()
        else:
            files, texts = [name for name in files if not is_hidden(name)], {}
            for name in (name for name in files if name.lower().endswith(TEXTS)):
                if os.path.isfile(os.path.join(directory, name)):
                    texts.setdefault(stem(plain(name)), []).append(name)
            yield from ((Path(directory, name), beside(name, texts)) for name in files if is_picture(name))
        seen.add(real)


def is_hidden(name):
    """Return whether a path is that of a file which programs leave, not people, as hidden files and thumbnails."""
    return bool(re.search(r"(^|[/\\])(\.+[^./\\]|(@eaDir|__MACOSX)([/\\]|$))", name))


def is_picture(name):
    return name.lower().endswith((*PICTURES, *UNREAD))


def is_archive(path):
    return path.is_file() and path.name.lower().endswith(ARCHIVES)


def entry_of_file(name, file):
    path, texts = file
    picture = path if path.is_file() else Unusable(f"no such file: {path}")  # a pipe, a link to nowhere
    return name, picture, caption_among({text: path.with_name(text).read_bytes() for text in texts})


def entries_of_archive(path, label):
    """Yield an archive's entries, in the order of its pictures. Each waits for its texts until too many do."""
    pictures, texts, names, held = {}, {}, {}, 0  # {name: (bytes in memory, function that gives its content)}

    def entry(name):
        return (f"{label}/{name}", pictures.pop(name)[1](),
                caption_among({text: texts[text][1]() for text in beside(name, names) if text in texts}))
    try:
        for name, size, read, later in members(path):
            if not is_hidden(name) and name.lower().endswith((*PICTURES, *UNREAD, *TEXTS)):
                group, get = pictures if is_picture(name) else texts, functools.partial(content, size, read)
                if not read or name in group:
                    get = functools.partial(Unusable, "a link, or there twice")
                elif not later:
                    get, held = functools.partial(lambda data: data, get()), held + size
                (names if group is texts else {}).setdefault(stem(plain(name)), []).append(name)
                group[name] = size * (not later), get
            while len(pictures) > WAITING[1] or pictures and held > WAITING[0]:
                held -= pictures[name := next(iter(pictures))][0]
                yield entry(name)
            while len(texts) > WAITING[1] or held > WAITING[0]:
                held -= texts.pop(next(iter(texts)))[0]
        yield from map(entry, [*pictures])
    except Exception as error:  # tarfile, zipfile, gzip, bz2, lzma and zlib raise errors of their own
        yield from map(entry, [*pictures])
        yield label, Unusable(f"the archive breaks off here: {type(error).__name__}: {error}"), None


def count_pictures(archive):
    n = 0
    with contextlib.suppress(Exception):  # what is damaged is listed when it is read
        for name, *_ in members(archive):
            n += is_picture(name) and not is_hidden(name)
    return n


def content(size, read):
    """Return read() of a file of `size` bytes, or Unusable if it is too large or damaged."""
    if size > MOST_BYTES:
        return Unusable(f"{size:,} bytes, more than is harmless")
    try:
        return read()
    except Exception as error:  # for want of memory, or one of the archive's own
        return Unusable(f"cannot be read: {type(error).__name__}: {error}")


def no_captions(parts, names, known=()):
    """Say where captions were looked for, if most pictures have none, as `names`. known: pictures named in a table."""
    there = sorted(os.listdir(parts[0].files[0][0].parent)) if parts[0].files else []
    with contextlib.suppress(Exception):  # it may be damaged; so many are enough
        there += [name for name, *_ in itertools.islice(members(parts[0].archive), 10_000)] if parts[0].archive else []
    endings = Counter(os.path.splitext(name)[1].lower() for name in there if not is_picture(name) | is_hidden(name))
    lie = ", ".join(filter(None, (ending for ending, _ in endings.most_common(5)))) or "no other files"
    seen = f"The table names {', '.join(known)}" if known else (
        f"Beside them lie {lie}; captions are read from {', '.join(TEXTS)} of the same name, or a --captions FILE")
    classes = "; where folders are classes, give --folder_captions \"a photo of a {}\""
    return (f"Most pictures have no caption, for example {', '.join(names[:3])}. {seen}"
            + classes * (names[0].count("/") > bool(parts[0].archive)))
