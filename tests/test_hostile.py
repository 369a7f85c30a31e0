"""A hostile input set: everything good in it is kept, everything bad is listed with its reason."""

import io
import json
import os
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from training.dataset import Dataset


def noise(seed=0, size=(40, 36), mode="RGB"):
    low = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(low).convert(mode)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def bomb():
    chunk = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    head = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return head + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


def damaged(data):
    """The same bytes but for some in the middle"""
    at = len(data) // 2
    return data[:at] + bytes(64) + data[at + 64 :]


def text_bomb():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 10_000_000, zip=True)
    return encoded(noise(), pnginfo=info)


PNG, JPEG, WEBP = encoded(noise(1)), encoded(noise(2), "JPEG"), encoded(noise(3), "WEBP")
exif = Image.Exif()
exif[0x0112] = 77  # an orientation that does not exist
GOOD = {
    "plain.png": PNG,
    "CAPITALS.JPG": JPEG,
    "wrong name.png": JPEG,  # what counts is what is in it
    "cmyk.jpg": encoded(noise(mode="CMYK"), "JPEG"),
    "bilevel.png": encoded(noise(mode="1")),
    "grey-alpha.png": encoded(noise(mode="LA")),
    "palette.gif": encoded(noise(mode="P"), "GIF"),
    "moving.gif": encoded(noise(), "GIF", save_all=True, append_images=[noise(5), noise(6)]),
    "moving.webp": encoded(noise(), "WEBP", save_all=True, append_images=[noise(5)]),
    "pages.tiff": encoded(noise(), "TIFF", save_all=True, append_images=[noise(5)]),
    "float.tiff": encoded(Image.fromarray(np.random.default_rng(0).random((40, 40), np.float32) * 255), "TIFF"),
    "long.jpg": encoded(noise(size=(3000, 32)), "JPEG"),
    "odd exif.jpg": encoded(noise(), "JPEG", exif=exif),
    "broken exif.jpg": encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff"),
    "progressive.jpg": encoded(noise(), "JPEG", progressive=True),
    "trailing.jpg": JPEG + b"garbage" * 50,
    'it\'s "quoted"; $(name) & 100%.png': PNG,
    "two\nlines.png": PNG,
    "\u2028 separator.png": PNG,
    "日本 👩‍🚀.png": PNG,
    os.fsdecode(b"not \xff utf-8.png"): PNG,
    "-leading-dash.png": PNG,
    "deep/er/and/deeper.png": PNG,
    "many.dots.in.name.png": PNG,
}
BAD = {
    "cut.png": (PNG[: len(PNG) // 2], "OSError"),
    "cut.jpg": (JPEG[:-300], "OSError"),
    "cut.webp": (WEBP[: len(WEBP) // 2], "OSError"),
    "cut.gif": (encoded(noise(mode="P"), "GIF")[:700], ""),
    "crc.png": (damaged(PNG), ""),
    "empty.jpg": (b"", "UnidentifiedImageError"),
    "zeros.jpg": (bytes(5000), "UnidentifiedImageError"),
    "page.jpg": (b"<html>404 Not Found</html>", "UnidentifiedImageError"),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "UnidentifiedImageError"),
    "video.gif": (b"\0\0\0 ftypisom" + bytes(100), "UnidentifiedImageError"),
    "bomb.png": (bomb(), "DecompressionBomb"),
    "dark.tiff": (encoded(Image.fromarray(np.full((40, 40), 0.9, np.float32)), "TIFF"), "would be black"),
    "text bomb.png": (text_bomb(), "ValueError"),
    "small.png": (encoded(noise(size=(31, 60))), "too small: 31 x 60"),
    "one pixel.png": (encoded(noise(size=(1, 1))), "too small"),
}


def prepare(script, source, out, *args):
    script("prepare_latents.py", "--source", source, "--out", out, "--shard_size=7", "--batch_size=4", *args)
    data = Dataset(out, 16)
    skipped = {}
    for line in (out / "skipped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        entry = json.loads(line)
        skipped.setdefault(entry["source"], []).append(entry["reason"])
    return data, data.texts(range(len(data))), skipped


def test_a_folder_of_strange_files(script, tmp_path):
    source = tmp_path / "in"
    for name, data in GOOD.items() | {(n, d) for n, (d, _) in BAD.items()}:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_bytes(b"caption of " + os.fsencode(name))
    captions = {"silent.png": None, "blank.png": b" \n\t ", "void.png": b"", "huge.png": b"word " * 20_000,
                "unbroken.png": b"x" * 100_000, "latin1.png": "K\u00e4se".encode("latin-1"),
                "bom.png": b"\xef\xbb\xbfmarked",
                "nul.png": b"a\0b\x1b[31m"}  # fmt: skip
    for name, text in captions.items():
        (source / name).write_bytes(PNG)
        if text is not None:
            (source / name).with_suffix(".txt").write_bytes(text)
    (source / "folder.png").mkdir()
    (source / "nowhere.png").symlink_to(source / "gone.png")
    os.mkfifo(source / "pipe.png")
    (source / "cut.json").write_text('{"caption": "not')
    for name in ("notes.md", "Thumbs.db", ".DS_Store"):
        (source / name).write_bytes(b"x")
    data, texts, skipped = prepare(script, source, tmp_path / "out")
    kept = {n for n, text in captions.items() if text and text.strip()}
    assert len(data) == len(GOOD) + len(kept)
    assert {len(t) for t in texts} >= {99_999, 100_000} and "a\0b\x1b[31m" in texts
    assert sum(t.startswith("caption of ") for t in texts) == len(GOOD)
    bad = {n: reason for n, (_, reason) in BAD.items()}
    bad |= dict.fromkeys(captions.keys() - kept, "no caption") | dict.fromkeys(
        ("nowhere.png", "pipe.png"), "not a file"
    )
    assert skipped.keys() == bad.keys()
    for name, (reason,) in skipped.items():
        assert reason.startswith(bad[name]) or bad[name] in reason, (name, reason)
    assert all(np.isfinite(data.rows([i])[0].astype(np.float32)).all() for i in range(len(data)))


def tar_bytes(files, mode="w", **options):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
                continue
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_bytes(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return out.getvalue()


def pair(name):
    return [(f"{name}.png", PNG), (f"{name}.txt", name.encode())]


def damaged_first(data):
    """A zip whose first file, alone under its name, is damaged"""
    return data[:200] + bytes(64) + data[264:]


def encrypted(data):
    """A zip whose first file claims to be encrypted"""
    return data.replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\x01\0", 1).replace(
        b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x01\0", 1
    )


def test_archives_of_every_kind(script, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    two = pair("first") + pair("second")
    whole = tar_bytes(two)
    header = whole.index(b"second.png")
    files = {
        "whole.tar": whole,
        "cut in a file.tar": whole[: header + 600],
        "cut in a header.tar": whole[: header + 100],
        "no end.tar": whole[: header + 512 + 512 * -(-len(PNG) // 512) + 1024],
        "bad header.tar": whole[:header] + b"\xff" * 20 + whole[header + 20 :],
        "nothing.tar": b"",
        "empty.tar": tar_bytes([]),
        "text.tar": b"this is not an archive" * 100,
        "gzip inside.tar": tar_bytes(two, "w:gz"),  # the name does not say so
        "links.tar": tar_bytes([("link.png", None)] + pair("first")),
        "outside.tar": tar_bytes(
            [("../../up.png", PNG), ("../../up.txt", b"up"), ("/abs.png", PNG), ("/abs.txt", b"abs")]
        ),
        "masks.tar": tar_bytes(
            [("a.mask.png", PNG), ("a.png", PNG), ("a.txt", b"a"), ("b.json", b"[1]"), ("b.png", PNG)]
        ),
        "long name.tar": tar_bytes(pair("n" * 180), format=tarfile.PAX_FORMAT),
        "cut.tgz": tar_bytes(two + [("third.png", noise(9, (300, 300)).tobytes())], "w:gz")[:12_000],
        "damaged.tar.gz": damaged(tar_bytes(two, "w:gz")),
        "whole.zip": zip_bytes(two),
        "cut.zip": zip_bytes(two)[:3000],
        "damaged.zip": damaged(zip_bytes(pair("first"))),
        "encrypted.zip": encrypted(zip_bytes(pair("first") + pair("second"))),
        "empty.zip": zip_bytes([]),
        "bad table.zip": zip_bytes([("part-1.json", b"{"), *pair("first")]),
        "zeroed header.tar": whole[:header] + bytes(1024) + whole[header + 1024 :],
        "two in one.tar": tar_bytes(pair("first")) + tar_bytes(pair("second")),
        "incomplete.tar": whole[:header] + bytes(6000 * 512),  # as a download into preallocated space leaves it
        "twice.tar": tar_bytes([("a.png", PNG), ("a.png", JPEG), ("a.txt", b"a")]),
        "twice.zip": zip_bytes([("a.png", PNG), ("a.PNG", JPEG), ("a.txt", b"a")]).replace(b"a.PNG", b"a.png"),
        "size.tar": whole[: header + 124] + b"\x80\0\0\0\x10" + bytes(7) + whole[header + 136 :],
        "dots.zip": zip_bytes(pair("photo") + pair("photo.2") + pair("x 7.5")),
        "deep.tar": tar_bytes([("a.png", PNG), ("a.json", b"[" * 100_000)] + pair("b")),
        "deep.zip": zip_bytes([("part-9.json", b"[" * 100_000)] + pair("b")),
        "lone.zip": damaged_first(zip_bytes([("a.png", PNG), ("b.png", PNG), ("part.json", b'{"b.png": {"p": "b"}}')])),
        "no pictures.zip": zip_bytes([("readme.txt", b"x"), ("inner.zip", zip_bytes(two))]),
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    data, texts, skipped = prepare(script, source, tmp_path / "out")
    rows = [json.loads(line) for path in sorted((tmp_path / "out").glob("*.rows.jsonl")) for line in open(path)]
    kept = {}
    for row in rows:
        archive, _, name = row["source"].partition("/")
        kept.setdefault(archive, {})[name] = row["caption"]
    both = {"first.png": "first", "second.png": "second"}
    first = {"first.png": "first"}
    assert kept == {
        "whole.tar": both, "gzip inside.tar": both, "whole.zip": both, "no end.tar": both,
        "cut in a file.tar": first, "cut in a header.tar": first, "bad header.tar": first, "links.tar": first,
        "outside.tar": {"../../up.png": "up", "/abs.png": "abs"}, "masks.tar": {"a.png": "a"},
        "long name.tar": {"n" * 180 + ".png": "n" * 180}, "cut.tgz": both, "bad table.zip": first,
        "encrypted.zip": {"second.png": "second"}, "zeroed header.tar": first, "two in one.tar": both,
        "incomplete.tar": first, "twice.tar": {"a.png": "a"}, "twice.zip": {"a.png": "a"}, "size.tar": first,
        "dots.zip": {"photo.png": "photo", "photo.2.png": "photo.2", "x 7.5.png": "x 7.5"},
        "lone.zip": {"b.png": "b"}, "deep.tar": {"b.png": "b"}, "deep.zip": {"b.png": "b"},
    }  # fmt: skip
    reasons = {
        "cut in a file.tar": "breaks off here: unexpected end of data",
        "cut in a header.tar": "breaks off here: truncated",
        "no end.tar": "breaks off here: no end marker", "bad header.tar": "breaks off here: bad checksum",
        "nothing.tar": "breaks off here: ", "text.tar": "breaks off here: ", "cut.tgz": "breaks off here: Compressed",
        "damaged.tar.gz": "breaks off here: ", "cut.zip": "cannot be read: File is not a zip",
        "damaged.zip": "first.png cannot",
        "encrypted.zip": "first.png cannot be read", "bad table.zip": "part-1.json cannot be read",
        "masks.tar/b.png": "no caption", "masks.tar/a.mask.png": "no caption", "damaged.tar.gz/first.png": "no caption",
        "cut in a file.tar/second.png": "cut off", "cut.tgz/third.png": "cut off", "links.tar/link.png": "a link",
        "zeroed header.tar": "breaks off here: ", "twice.tar": "a.png is there twice",
        "twice.zip": "a.png is there 2 times", "size.tar": "breaks off here", "incomplete.tar": "bytes are zeros",
        "lone.zip": "a.png cannot be read", "deep.tar/a.png": "no caption", "deep.zip": "part-9.json cannot be read",
    }  # fmt: skip
    assert skipped.keys() == reasons.keys()
    for name, words in reasons.items():
        assert any(words in reason for reason in skipped[name]), (name, skipped[name])


def test_a_list_of_pictures_with_missing_files(script, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b c.png", "7.jpg"):
        (tmp_path / "pictures" / name).write_bytes(PNG)
    records = [
        {"image": "pictures/a.png", "caption": "one"},
        {"image": "./pictures/b c.png", "caption": "two"},
        {"image": "pictures/7", "caption": "without its extension"},
        {"image": "pictures/a.png", "caption": "again"},
        {"image": "pictures/missing.png", "caption": "x"},
        {"image": "pictures", "caption": "a folder"},
        {"image": "pictures/nul\0.png", "caption": "x"},
        {"image": "x" * 5000 + ".png", "caption": "x"},
        {"image": 42, "caption": "a number"},
        {"caption": "no name"},
        {"image": "pictures/a.png/under.png", "caption": "x"},
        {"image": "pictures/7.jpg", "caption": None},
    ]
    text = "\ufeff" + "".join(json.dumps(r) + "\n" for r in records) + "[1, 2]\n\n{cut off"
    (tmp_path / "list.jsonl").write_text(text, encoding="utf-8")
    _, texts, skipped = prepare(script, tmp_path / "list.jsonl", tmp_path / "out")
    assert texts == ["one", "two", "without its extension"]
    missing = [
        "pictures/missing.png",
        "pictures",
        "pictures/nul\0.png",
        "x" * 5000 + ".png",
        "42",
        "pictures/a.png/under.png",
    ]
    for name in missing:
        assert "no such file" in skipped.pop(name)[0]
    assert skipped == {"record 10": ["the record names no picture"], "pictures/7.jpg": ["no caption"]}


@pytest.mark.parametrize("text", ["", "{", "[]", "42", '{"data": 3}', '[{"caption": "x"}]'])
def test_a_list_that_names_no_pictures_is_refused(script, tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    message = script("prepare_latents.py", "--source", tmp_path / "list.json", "--out", tmp_path / "out", fails=True)
    assert "list.json" in message and not (tmp_path / "out").exists()


def test_the_source_and_other_files_survive_overwrite(script, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in pair("0") + pair("1"):
        (folder / name).write_bytes(content)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    message = script("prepare_latents.py", "--source", folder, "--out", folder, "--overwrite", fails=True)
    assert "out is the source" in message
    (folder / "00000.tar").write_bytes(tar_bytes(pair("x")))
    for args in ((), ("--overwrite",)):
        script("prepare_latents.py", "--source", folder / "00000.tar", "--out", folder, *args)
    assert before == {name: (folder / name).read_bytes() for name in before} and (folder / "00000.tar").is_file()


def test_a_source_that_changes_on_the_way_is_refused(script, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "0.png").write_bytes(PNG)
    args = ("prepare_latents.py", "--source", source, "--out", out)
    assert "1 x no caption" in script(*args, fails=True)
    (source / "0.txt").write_text("now it has one")  # which is seen, as nothing was finished
    script(*args)
    assert Dataset(out, 16).texts([0]) == ["now it has one"]
    info = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(info | {"complete": False}))
    (source / "00.png").write_bytes(PNG)
    assert "has changed since" in script(*args, fails=True)


def test_pictures_beside_archives_are_not_overlooked(script, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "backup.zip").write_bytes(zip_bytes(pair("first")))
    message = script("prepare_latents.py", "--source", tmp_path, "--out", tmp_path / "out", fails=True)
    assert "holds pictures and archives" in message
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in/deep/up").symlink_to(tmp_path / "in")  # a circle
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    for folder in ("in/deep", "elsewhere"):
        for name, content in pair("p"):
            (tmp_path / folder / name).write_bytes(content)
    _, texts, skipped = prepare(script, tmp_path / "in", tmp_path / "out")
    assert texts == ["p", "p"] and not skipped


def test_shards_do_not_depend_on_the_processes_even_where_an_archive_breaks_off(script, tmp_path):
    whole = tar_bytes([member for i in range(10) for member in pair(f"{i}")])
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"7.png") + 700])
    args = ("prepare_latents.py", "--source", tmp_path / "cut.tar", "--shard_size=4", "--out")
    script(*args, tmp_path / "one")
    script(*args, tmp_path / "two", processes=2)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names)
    assert [json.loads(line)["reason"][:7] for line in open(tmp_path / "one/skipped.jsonl")] == ["cut off", "the arc"]
