"""
Captions that do not lie beside their pictures, and a cleaner for captions from the web.

A captions file is one of these, as it is or inside an archive; the first caption of a picture counts:

    COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    records    [{"image": ..., "caption": ...}], {"data": [...]}, one such object a line (.jsonl), or .tsv, .csv with a
               header; for the fields' names see FILE_FIELDS, ID_FIELDS and CAPTION_FIELDS
    by name    {"picture.png": "caption"} or {"picture.png": {"p": "caption"}}
    texts      an archive or folder of NAME.txt, the caption of picture NAME
"""
import codecs
import csv
import html
import io
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from pictures.decode import Lost

# the names of the fields in the published data sets
FILE_FIELDS = ("file_name", "img_path", "image_path", "image", "img", "filename")
ID_FIELDS = ("image_name", "image_id", "name")  # where there is no file's name, or if they are that without its ending
CAPTION_FIELDS = ("caption", "prompt", "caption_str", "text", "p")
TABLES = (".json", ".jsonl", ".tsv", ".csv")
MOST_BYTES_OF_TABLE = 2 ** 30  # of captions
MOST_HEADER = 2 ** 20  # bytes of names and comments of a file in a tar
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}
UNREADABLE = "\ufffd"  # stands for what could not be decoded


def caption_chooser(captions="", clean=False, nsfw_scores="", max_nsfw=0.2):
    """Return a function that gives a (name, picture, caption) the caption to use, or Lost in the picture's place."""
    find = read_captions(captions) if captions else None
    allowed = harmless(nsfw_scores, max_nsfw) if nsfw_scores else None

    def choose(name, picture, caption):
        if isinstance(picture, Lost):
            return name, picture, caption
        if allowed is not None and name.rpartition("/")[2] not in allowed:
            return name, Lost(f"NSFW score above {max_nsfw}, or none"), caption
        caption = find(name) if find else caption
        caption = caption if isinstance(caption, str) else ""
        if UNREADABLE in caption:
            return name, Lost("its caption is neither UTF-8 nor marked as UTF-16 or UTF-32"), caption
        caption = caption.encode("utf-8", "replace").decode()  # halves of surrogate pairs, which no tokenizer takes
        caption = clean_web_caption(caption) if clean else caption.strip()
        return name, picture if caption else Lost("no caption"), caption
    return choose


def read_captions(path):
    """Return a function from a picture's name to its caption or None; ValueError if the file holds no captions."""
    path = Path(path)
    if path.is_dir():
        return lambda name: text_of(path, name)
    if not path.is_file():
        raise ValueError(f"no captions file {path}")
    by_name = {}
    try:
        for member, data in members(path):
            for name, caption in captions_by_name(member, data).items():
                by_name.setdefault(name, caption)
    except Exception as error:  # json, csv, tarfile, zipfile, zlib and lzma raise errors of their own
        raise ValueError(f"captions file {path} cannot be read ({type(error).__name__}: {error})") from None
    if not by_name:
        raise ValueError(f"captions file {path} holds no captions in a layout of pictures/captions.py")
    return lambda name: look_up(by_name.get, name)


# members that describe the next one, and which tarfile reads whole
EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
              tarfile.GNUTYPE_LONGLINK)


class Bounded(tarfile.TarInfo):
    """Raises ReadError for a header, which tarfile reads whole, that would fill the memory."""
    def _proc_member(self, tar):  # which tarfile offers to subclasses
        if self.type in EXTENSIONS and self.size > MOST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)


def members(path):
    """Yield (name, bytes) of the files of an archive, or of a file that is none."""
    if path.name.lower().endswith((".tar", ".tgz", ".tar.gz")):
        with tarfile.open(path, tarinfo=Bounded) as tar:
            for member in tar:
                if member.isfile():
                    check_size(member.name, member.size)
                    yield member.name, tar.extractfile(member).read()
                tar.members = []  # tarfile would keep millions of them
    elif path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name, table_of(archive, name)
    else:
        yield path.name, path.read_bytes()


def table_of(archive, name):
    """Return what a zip holds under a name; ValueError if it is larger than any table of captions."""
    check_size(name, archive.getinfo(name).file_size)
    return archive.read(name)


def check_size(name, size):
    if size > MOST_BYTES_OF_TABLE:
        raise ValueError(f"{name} has {size:,} bytes, more than is harmless")


def decoded(data):
    """Return the text of a file: UTF-16 or UTF-32 if a byte order mark says so, else UTF-8, with or without one."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8-sig")
    return data.decode(encoding, "replace")


def captions_by_name(file, data):
    """Return {picture name: its first caption} of a file of captions."""
    if file.lower().endswith(".txt"):
        text = decoded(data).strip()
        return {str(PurePosixPath(file).with_suffix("")): text} if text else {}
    table = records(file, data) if file.lower().endswith(TABLES) else []
    return {name: caption for names, caption in reversed(table) if caption for name in names}


def records(name, data):
    """Return [(names of the picture, caption or None)] of a table of captions."""
    text, ending = decoded(data), PurePosixPath(name).suffix.lower()
    if ending == ".csv":
        csv.field_size_limit(2 ** 31 - 1)
        rows = csv.DictReader(io.StringIO(text))
    elif ending == ".tsv":  # in which a quotation mark is one, and no caption goes over several lines
        rows = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    elif ending == ".jsonl":
        rows = json_lines(name, text)
    else:
        rows = rows_of_json(json.loads(text))
    return [names_and_caption(row) for row in rows if isinstance(row, dict)]


def rows_of_json(table):
    if not isinstance(table, dict):
        return table if isinstance(table, list) else []
    if "images" in table and "annotations" in table:
        captions = {a["image_id"]: a["caption"] for a in reversed(table["annotations"]) if a.get("caption")}
        return [{"file_name": image["file_name"], "caption": captions.get(image["id"])} for image in table["images"]]
    if isinstance(table.get("data"), list):
        return table["data"]
    return [{"caption": value} | (value if isinstance(value, dict) else {}) | {"name": name}
            for name, value in table.items() if isinstance(value, (str, dict))]


def json_lines(name, text):
    bad = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError:
            bad.append(number)
    if bad:
        print(f"warning: {name}: {len(bad):,} lines are not JSON, the first is line {bad[0]:,}", file=sys.stderr)


def names_and_caption(record):
    """Return (all names that a record gives its picture, caption or None); TextCaps' first name is not the file's."""
    files, ids = ([str(PurePosixPath(str(record[field]))) for field in fields if record.get(field) not in (None, "")]
                  for fields in (FILE_FIELDS, ID_FIELDS))
    stems = {PurePosixPath(name).stem for name in files}
    texts = [record[field].strip() for field in CAPTION_FIELDS if isinstance(record.get(field), str)]
    caption = re.sub(r'^"([^"]*)"$', r"\1", next(filter(None, texts), "")).strip()
    return files + [name for name in ids if not files or name in stems], caption or None


def look_up(get, name):
    """Return get(key) of the first key that has a caption: a picture's name or the end of its path, without ending."""
    parts = PurePosixPath(name).parts
    for i in range(len(parts)):
        end = PurePosixPath(*parts[i:])
        for key in (str(end), str(end.with_suffix(""))):
            if (caption := get(key)) is not None:
                return caption
    return None


def text_of(folder, name):
    """Return the caption of a picture from folder/NAME.txt."""
    def read(key):
        path = Path(folder, f"{key}.txt")
        return decoded(path.read_bytes()).strip() if path.is_file() else None
    return look_up(read, name)


def harmless(path, max_nsfw):
    """Read the names of the pictures whose image_nsfw and prompt_nsfw are at most max_nsfw, in DiffusionDB's scores."""
    try:
        from pyarrow import ArrowException, array, parquet
    except ImportError:
        raise ValueError("reading --nsfw_scores needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(path, columns=["image_name", "image_nsfw", "prompt_nsfw"])
    except (ArrowException, KeyError, OSError) as error:
        raise ValueError(f"--nsfw_scores {path} cannot be read as DiffusionDB's metadata.parquet: {error}") from None
    # in float32, as DiffusionDB stores them; a picture without a score is NaN, and not known to be harmless
    scores = [table[name].to_numpy().astype(np.float32) for name in ("image_nsfw", "prompt_nsfw")]
    return set(table["image_name"].filter(array(np.maximum(*scores) <= np.float32(max_nsfw))).to_pylist())


# ---------------------------------------------------------------------------------------------------------------------
# Captions from the web


# lengths are bounded, so that no caption, however long and strange, takes more than linear time
STEPS = [(re.compile(pattern, re.I), new) for pattern, new in (
    (r"<person>", "person"),                                        # CC12M's stand-in for names
    (r"</?(?:a|b|i|u|p|br|hr|em|strong|span|div|img|font|h[1-6]|li|[uo]l|t[dhr]|table|center|small|big|su[bp])"
     r"(?:\s+[\w-]{1,40}\s*=[^<>]{0,300})?\s*/?>", " "),             # HTML tags
    (r"(?:https?://|www\.)\S+", " "),                               # addresses
    (r"\S{1,64}@\S{1,64}\.\w+", " "),                               # mail
    (r"\b[\w-]{1,63}\.(?:com|net|org|co\.uk|io)\b(?:/\S*)?", " "),
    (r"(?<!\S)(?:(?:photo|image|picture|credit)s?:?\s)?(?:(?:by|via|from|credit):?\s)?@\w+", " "),  # user names
    (r"#(\w*[a-z]\w*)", r"\1"),                                     # hashtags keep their word
    (r"#\d+", " "),                                                 # picture numbers
    (r"\b[\w-]{1,63}\.(?:jpe?g|png|gif|webp|bmp|tiff?)\b", " "),    # file names
    (r"\b(?:img|dsc|dscn|dscf|pict)_?\d{3,}\b", " "),               # of cameras
    (r"\b\d{2,5}\s?[x\u00d7]\s?\d{2,5}(?:\s?(?:px|pixels?))?\b", " "),  # sizes of pictures
    (r"\b(?:royalty[- ]free|stock)\s+(?:photo(?:graphy|s)?|images?|vectors?|illustrations?|pictures?|footage)\b", " "),
    (r"\b(?:free shipping|free download|click (?:here|to enlarge|for more)|all rights reserved)\b", " "),
    (r"\b\d{6,}\b", " "),                                           # other long numbers
    (r"([!?.,;:*=_~|/-])\1{2,}", r"\1"),                            # !!!!!
    (r"\(\s*\)|\[\s*\]|\{\s*\}", " "),                              # brackets with nothing left in them
)]


def clean_web_caption(text):
    """Take out of a caption from the web what is not about the picture (STEPS). It is not for synthetic captions.

    Entities are unescaped first, and spaces and separators at the ends go last.
    """
    text = html.unescape(html.unescape(text))
    for pattern, new in STEPS:
        text = pattern.sub(new, text)
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split())).strip(" -|/,;:*~_=\u2022\u00b7\u2013\u2014")
