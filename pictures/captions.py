"""
Captions. They lie beside their pictures, or in one of these, as it is or in an archive. A picture's first one counts.

    COCO       {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    records    [{"image": ..., "caption": ...}], {"data": [...]}, one such object a line (.jsonl), or .tsv, .csv with a
               header; for the fields' names, in capitals or not, see FILE_FIELDS, ID_FIELDS and CAPTION_FIELDS
    by name    {"picture.png": "caption"}
    texts      an archive or folder of NAME.txt, the caption of picture NAME
"""
import codecs
import contextlib
import csv
import io
import json
import re
import unicodedata
from itertools import islice
from pathlib import Path, PurePosixPath

from common.files import json_lines, reading
from pictures.archives import ARCHIVES, members
from pictures.decode import Unusable

# fields in published sets
FILE_FIELDS = ("file_name", "img_path", "image_path", "filepath", "image", "img", "filename", "file", "path",
               "output_image", "url")
ID_FIELDS = ("image_name", "image_id", "name", "item_id")  # they count if no file is named, or if they are its name
CAPTION_FIELDS = ("caption", "prompt", "caption_str", "text", "title", "input_prompt")
TABLES = (".json", ".jsonl", ".tsv", ".csv")
TEXTS = (".txt", ".caption", ".json")  # what is read of what lies beside pictures
MOST_BYTES_OF_TABLE = 2 ** 30  # of captions


def caption_chooser(captions="", folder_captions=""):
    """Return a function that gives an entry its caption, or makes its picture Unusable; {} is the picture's folder."""
    find = read_captions(captions) if captions else None

    def choose(name, picture, caption):
        if isinstance(picture, Unusable):
            return name, picture, caption
        caption = find(picture.absolute().as_posix() if isinstance(picture, Path) else name) if find else caption
        caption = caption.strip() if isinstance(caption, str) else ""
        folder = PurePosixPath(plain(name)).parent.name
        if not caption and folder_captions and folder and not folder.lower().endswith(ARCHIVES):
            caption = folder_captions.replace("{}", folder.replace("_", " "))
        if "\ufffd" in caption:  # which stands for what could not be decoded
            picture = Unusable("its caption is neither UTF-8 nor marked as UTF-16")
        # no tokenizer takes halves of surrogate pairs
        return name, picture if caption else Unusable("no caption"), caption.encode("utf-8", "replace").decode()
    choose.find = find
    return choose


def read_captions(path):
    """Return a function from a picture's path to its caption or None; ValueError if a caption fits two pictures."""
    path, by_name, pictures, addresses, columns = Path(path), {}, {}, {}, {}

    def find(name):
        parts = plain(name).split("/")
        for end in ("/".join(parts[i:]) for i in range(len(parts))):
            for key in (end, stem(end)):
                if (caption := by_name.get(key)) is not None:
                    if stem(other := pictures.setdefault(key, name)) != stem(name):
                        raise ValueError(f"{path}: the caption of '{key}' fits both {other} and {name}: name their "
                                         "folders in it, too")
                    return caption

    with reading(path):
        files = members(path) if path.name.lower().endswith(ARCHIVES) else [
            (str(file.relative_to(path if path.is_dir() else path.parent)), 0, file.read_bytes, False)
            for file in ([f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path])]
        for file, size, read, _ in files:
            for names, caption, address in captions_of_file(file, size, read, columns) if read else ():
                for name in names if caption else ():
                    alike = address and addresses.setdefault(name, address) != address  # two that end alike
                    by_name[name] = "" if alike else by_name.get(name, caption)
        if not by_name:
            raise no_captions(columns)
    find.names = [*islice(by_name, 3)]
    return find


def plain(name):
    """Return a path as paths are compared: / between folders and not in front, and accents composed."""
    name = re.sub("^([A-Za-z]:)?/+", "", name.replace("\\", "/"))
    return unicodedata.normalize("NFC", str(PurePosixPath(name)))


def stem(name):
    return str(PurePosixPath(name).with_suffix(""))


def beside(picture, texts):
    """Return the texts beside a picture that may hold its caption, from a folder's or archive's {name without ending:
    texts}. They are named like the picture, or like its WebDataset key alone or with a field, as in 1.caption.txt."""
    name, key = plain(picture), key_of(picture)
    names = name, stem(name), key, *(f"{key}.{word}" for word in CAPTION_FIELDS)
    return next((texts[n] for n in names if n in texts), [])


def key_of(name):
    """Return what WebDataset takes for the name of a sample: the path up to the first dot of the file's name."""
    folder, slash, file = plain(name).rpartition("/")
    return folder + slash + file.partition(".")[0]


def caption_among(files):
    """Return the caption that one of TEXTS among {name: bytes or Unusable} holds, or None."""
    texts = {PurePosixPath(name).suffix.lower(): data for name, data in files.items() if isinstance(data, bytes)}
    for ending in (ending for ending in TEXTS if ending in texts):
        if ending != ".json":
            return decoded(texts[ending])
        with contextlib.suppress(ValueError, RecursionError):  # none of captions
            table = json.loads(decoded(texts[ending]))
            return caption_of(table) if isinstance(table, dict) else None


def decoded(data):
    return data.decode(encoding_of(data), "replace")


def encoding_of(data):
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def captions_of_file(file, size, read, columns):
    """Yield (picture names, caption or None, the picture's address or None) of a file of captions that read() gives."""
    ending = PurePosixPath(file).suffix.lower()
    if ending in (*TABLES, *TEXTS) and size > MOST_BYTES_OF_TABLE:
        raise ValueError(f"{file} has {size:,} bytes, more than is harmless")
    if ending in TEXTS[:2]:
        yield [stem(plain(file))], decoded(read()).strip(), None
    elif ending in TABLES:
        yield from records(file, read(), columns)


def no_captions(columns):
    return ValueError(f"it has no captions: its columns are {', '.join([*columns][:20]) or 'none'}. Captions are read "
                      f"from {', '.join(CAPTION_FIELDS)}, names of pictures from {', '.join(FILE_FIELDS + ID_FIELDS)}")


def records(name, data, columns):
    """Yield (names of the picture, caption or None, address or None) of each entry of a table; note its columns."""
    lines = io.TextIOWrapper(io.BytesIO(data), encoding_of(data), "replace", newline="")
    csv.field_size_limit(2 ** 31 - 1)
    ending = PurePosixPath(name).suffix.lower()
    if ending == ".csv":
        header = lines.readline()
        lines.seek(0)
        rows = csv.DictReader(lines, delimiter=max(",;\t|", key=header.count))
    elif ending == ".tsv":  # where quotation marks belong to captions
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    elif ending == ".jsonl":
        rows = json_lines(name, lines)
    else:
        rows = rows_of_json(json.load(lines))
    for row in rows:
        if isinstance(row, dict) and any(row.get(None, ())):
            raise ValueError(f"a row has more columns than the header, {row[None]}: put quotes around captions")
        row = {str(k).strip().lower(): v for k, v in (row if isinstance(row, dict) else {"caption": row}).items()}
        columns.update(dict.fromkeys(row) if not columns else ())
        names, address = names_of(row)
        yield names, caption_of(row), address


def rows_of_json(table):
    if not isinstance(table, dict):
        return table
    if "images" in table and "annotations" in table:
        captions = {a["image_id"]: a["caption"] for a in reversed(table["annotations"]) if a.get("caption")}
        return [{"file_name": image["file_name"], "caption": captions.get(image["id"])} for image in table["images"]]
    if lists := [table[key] for key in ("data", "prompts", "captions") if isinstance(table.get(key), list)]:
        return lists[0]
    return [{"name": name, "caption": caption} for name, caption in table.items()]


def names_of(row):
    """Return (all names of a row's picture, its address on the web if it has no other)."""
    files, ids = ([plain(str(row[field])) for field in fields if row.get(field) not in (None, "")]
                  for fields in (FILE_FIELDS, ID_FIELDS))
    names = [name for name in files if not re.match(r"\w\w+:/", name)]
    address = files[0] if files and not names and not ids else None
    names = [re.sub("[?#].*", "", address).rpartition("/")[2]] if address else names
    stems = {PurePosixPath(name).stem for name in names}
    return names + [name for name in ids if not names or name in stems], address


def caption_of(row):
    """Return the first caption of a row, of a list the first, or None."""
    texts = [value[0] if isinstance(value, list) and value else value for value in map(row.get, CAPTION_FIELDS)]
    caption = next((text.strip() for text in texts if isinstance(text, str) and text.strip()), "")
    return re.sub(r'^"([^"]*)"$', r"\1", caption).strip() or None
