"""
Captions that do not lie beside their pictures, and a cleaner for captions from the web.

A captions file is one of these, as it is or inside an archive; the first caption of a picture counts:

    COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    records    [{"image": ..., "caption": ...}], {"data": [...]}, one such object a line (.jsonl), or .tsv, .csv with a
               header; for the fields' names see FILE_FIELDS, ID_FIELDS and CAPTION_FIELDS
    by name    {"picture.png": "caption"} or {"picture.png": {"p": "caption"}}
    texts      an archive or folder of NAME.txt, the caption of picture NAME
"""
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

# the names of the fields in the published data sets
FILE_FIELDS = ("file_name", "img_path", "image_path", "image", "img", "filename")
ID_FIELDS = ("image_name", "image_id", "name")  # where there is no file's name, or if they are that without its ending
CAPTION_FIELDS = ("caption", "prompt", "caption_str", "text", "p")
TABLES = (".json", ".jsonl", ".tsv", ".csv")


def read_captions(path):
    """A function from a picture's name to its caption or None; ValueError if the file holds no captions."""
    path = Path(path)
    if path.is_dir():
        return lambda name: text_of(path, name)
    if not path.is_file():
        raise ValueError(f"no captions file {path}")
    by_name = {}
    try:
        for member, data in members(path):
            if member.lower().endswith(".txt"):
                if text := data.decode("utf-8", "replace").strip():
                    by_name.setdefault(str(PurePosixPath(member).with_suffix("")), text)
            elif member.lower().endswith(TABLES):
                for names, caption in records(member, data):
                    for name in names if caption else ():
                        by_name.setdefault(name, caption)
    except Exception as error:  # json, csv, tarfile, zipfile, zlib and lzma raise errors of their own
        raise ValueError(f"captions file {path} cannot be read ({type(error).__name__}: {error})") from None
    if not by_name:
        raise ValueError(f"captions file {path} holds no captions: it wants COCO's layout, a list of objects with one "
                         f"of {', '.join((*FILE_FIELDS, *ID_FIELDS))} and one of {', '.join(CAPTION_FIELDS)}, "
                         "{name: caption}, or an archive of .txt files")
    return lambda name: look_up(by_name, name)


def members(path):
    """(name, bytes) of the files of an archive, or of a file that is none"""
    if path.name.lower().endswith((".tar", ".tgz", ".tar.gz")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member).read()
                tar.members = []  # tarfile would keep millions of them
    elif path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name, archive.read(name)
    else:
        yield path.name, path.read_bytes()


def records(name, data):
    """[(names of the picture, caption or None)] of a table of captions"""
    text = data.decode("utf-8-sig", "replace")
    if name.lower().endswith(".csv"):
        csv.field_size_limit(2 ** 31 - 1)
        found = csv.DictReader(io.StringIO(text))
    elif name.lower().endswith(".tsv"):  # in which a quotation mark is one, and no caption goes over several lines
        found = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    elif name.lower().endswith(".jsonl"):
        found = json_lines(name, text)
    else:
        found = json.loads(text)
        if isinstance(found, dict) and isinstance(found.get("images"), list) and "annotations" in found:
            captions = {}
            for a in found["annotations"]:
                if a.get("caption"):
                    captions.setdefault(a["image_id"], a["caption"])
            found = [{"file_name": i["file_name"], "caption": captions.get(i["id"])} for i in found["images"]]
        elif isinstance(found, dict) and isinstance(found.get("data"), list):
            found = found["data"]
        elif isinstance(found, dict):
            found = [{"name": key, "caption": field(value, CAPTION_FIELDS) if isinstance(value, dict) else value}
                     for key, value in found.items() if isinstance(value, (str, dict))]
    return [names_and_caption(r) for r in found if isinstance(r, dict)] if not isinstance(found, (str, int)) else []


def json_lines(name, text):
    bad = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError:
                bad.append(number)
    if bad:
        print(f"warning: {name}: {len(bad):,} lines are not JSON and were left out, the first is line {bad[0]:,}",
              file=sys.stderr)


def names_and_caption(record):
    """All names that a record gives its picture's file, as TextCaps' image_path is not where its pictures are"""
    files = [str(PurePosixPath(str(record[f]))) for f in FILE_FIELDS if record.get(f) not in (None, "")]
    ids = [str(PurePosixPath(str(record[f]))) for f in ID_FIELDS if record.get(f) not in (None, "")]
    caption = field(record, CAPTION_FIELDS)
    caption = caption.strip().strip('"').strip() if isinstance(caption, str) and quoted(caption.strip()) else caption
    stems = {PurePosixPath(f).stem for f in files}
    names = files + [i for i in ids if not files or i in stems]
    return names, (caption.strip() or None) if isinstance(caption, str) else None


def quoted(text):
    return len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


def field(record, names):
    return next((record[n] for n in names if record.get(n) not in (None, "")), None)


def look_up(by_name, name):
    """The caption of a picture by its whole name, the end of its path, or its name without its extension"""
    parts = PurePosixPath(name).parts
    for i in range(len(parts)):
        end = PurePosixPath(*parts[i:])
        for key in (str(end), str(end.with_suffix(""))):
            if key in by_name:
                return by_name[key]
    return None


def text_of(folder, name):
    """The caption of a picture from folder/NAME.txt"""
    parts = PurePosixPath(name).parts
    for i in range(len(parts)):
        path = folder.joinpath(*parts[i:]).with_suffix(".txt")
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace").strip()
    return None


def harmless(path, max_nsfw):
    """Names of the pictures whose image_nsfw and prompt_nsfw are at most max_nsfw, in DiffusionDB's metadata.parquet"""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError("reading --nsfw_scores needs pyarrow: pip install pyarrow") from None
    names, most = set(), np.float32(max_nsfw)
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["image_name", "image_nsfw", "prompt_nsfw"]):
                columns = batch.to_pydict()
                rows = zip(columns["image_name"], columns["image_nsfw"], columns["prompt_nsfw"])
                # in float32, as DiffusionDB stores them; a picture without a score is not known to be harmless
                names |= {n for n, *scores in rows if all(s is not None and np.float32(s) <= most for s in scores)}
    except (ArrowException, KeyError, OSError) as error:
        raise ValueError(f"--nsfw_scores {path} cannot be read ({error}): it must be DiffusionDB's metadata.parquet or "
                         "metadata-large.parquet") from None
    return names


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
    """A caption from the web without what is not about the picture: see STEPS. Not for synthetic captions.

    Entities are unescaped first, and spaces and separators at the ends go last.
    """
    text = html.unescape(html.unescape(text))
    for pattern, new in STEPS:
        text = pattern.sub(new, text)
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split())).strip(" -|/,;:*~_=\u2022\u00b7\u2013\u2014")
