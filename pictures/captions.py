"""
Captions that do not lie beside their pictures: one of these, as it is or in an archive. A picture's first one counts.

    COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    records    [{"image": ..., "caption": ...}], {"data": [...]}, one such object a line (.jsonl), or .tsv, .csv with a
               header; for the fields' names see FILE_FIELDS, ID_FIELDS and CAPTION_FIELDS
    by name    {"picture.png": "caption"}
    texts      an archive or folder of NAME.txt, the caption of picture NAME
"""
import codecs
import csv
import io
import json
import re
from pathlib import Path, PurePosixPath

from common.files import json_lines, reading
from pictures.archives import ARCHIVES, members
from pictures.decode import Unusable

# fields in published sets
FILE_FIELDS = ("file_name", "img_path", "image_path", "image", "img", "filename")
ID_FIELDS = ("image_name", "image_id", "name")  # they count if no file is named, or if they are its name without ending
CAPTION_FIELDS = ("caption", "prompt", "caption_str", "text")
TABLES = (".json", ".jsonl", ".tsv", ".csv")
MOST_BYTES_OF_TABLE = 2 ** 30  # of captions


def caption_chooser(captions=""):
    """Return a function that gives an entry its caption, or makes its picture Unusable."""
    find = read_captions(captions) if captions else None

    def choose(name, picture, caption):
        if isinstance(picture, Unusable):
            return name, picture, caption
        caption = find(name) if find else caption
        caption = caption.strip() if isinstance(caption, str) else ""
        if "\ufffd" in caption:  # which stands for what could not be decoded
            picture = Unusable("its caption is neither UTF-8 nor marked as UTF-16")
        # no tokenizer takes halves of surrogate pairs
        return name, picture if caption else Unusable("no caption"), caption.encode("utf-8", "replace").decode()
    return choose


def read_captions(path):
    """Return a function from a picture's name to its caption or None."""
    path, by_name = Path(path), {}
    if path.is_dir():
        return lambda name: look_up(lambda key: text_of(path / f"{key}.txt"), name)
    with reading(path):
        if not path.is_file():
            raise OSError("no such file")
        files = members(path) if path.name.lower().endswith(ARCHIVES) else [(path.name, 0, path.read_bytes)]
        for file, size, read in files:
            for name, caption in captions_of_file(file, size, read) if read else ():
                if caption:
                    by_name.setdefault(name, caption)
        if not by_name:
            raise ValueError("it has no captions in a layout of pictures/captions.py")
    return lambda name: look_up(by_name.get, name)


def look_up(get, name):
    """Return what get(key) knows of a picture's name or the end of its path, with or without the ending."""
    parts = PurePosixPath(name).parts
    ends = [PurePosixPath(*parts[i:]) for i in range(len(parts))]
    found = (get(key) for end in ends for key in (str(end), str(end.with_suffix(""))))
    return next((caption for caption in found if caption is not None), None)


def text_of(path):
    return decoded(path.read_bytes()).strip() if path.is_file() else None


def decoded(data):
    return data.decode(encoding_of(data), "replace")


def encoding_of(data):
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def captions_of_file(file, size, read):
    """Yield (picture name, caption or None) of a file of captions that read() gives."""
    path, ending = PurePosixPath(file), PurePosixPath(file).suffix.lower()
    if ending in (*TABLES, ".txt") and size > MOST_BYTES_OF_TABLE:
        raise ValueError(f"{file} has {size:,} bytes, more than is harmless")
    if ending == ".txt":
        yield str(path.with_suffix("")), decoded(read()).strip()
    elif ending in TABLES:
        for names, caption in records(file, read()):
            yield from ((name, caption) for name in names)


def records(name, data):
    """Return (names of the picture, caption or None) of each entry of a table of captions."""
    lines = io.TextIOWrapper(io.BytesIO(data), encoding_of(data), "replace", newline="")
    csv.field_size_limit(2 ** 31 - 1)
    ending = PurePosixPath(name).suffix.lower()
    if ending == ".csv":
        rows = csv.DictReader(lines)
    elif ending == ".tsv":  # where quotation marks belong to captions
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    elif ending == ".jsonl":
        rows = json_lines(name, lines)
    else:
        rows = rows_of_json(json.load(lines))
    return (names_and_caption(row) for row in rows if isinstance(row, dict))


def rows_of_json(table):
    if not isinstance(table, dict):
        return table
    if "images" in table and "annotations" in table:
        captions = {a["image_id"]: a["caption"] for a in reversed(table["annotations"]) if a.get("caption")}
        return [{"file_name": image["file_name"], "caption": captions.get(image["id"])} for image in table["images"]]
    if isinstance(table.get("data"), list):
        return table["data"]
    return [{"name": name, "caption": caption} for name, caption in table.items()]


def names_and_caption(record):
    """Return (all names of a record's picture, caption or None)."""
    files, ids = ([str(PurePosixPath(str(record[field]))) for field in fields if record.get(field) not in (None, "")]
                  for fields in (FILE_FIELDS, ID_FIELDS))
    stems = {PurePosixPath(name).stem for name in files}
    texts = [record[field].strip() for field in CAPTION_FIELDS if isinstance(record.get(field), str)]
    caption = re.sub(r'^"([^"]*)"$', r"\1", next(filter(None, texts), "")).strip()
    return files + [name for name in ids if not files or name in stems], caption or None
