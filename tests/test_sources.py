"""Where pictures come from, with a hostile input set: everything good is kept, everything bad has its reason."""
import io
import json
import os
import runpy
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pictures.captions import caption_chooser
from pictures.decode import Unusable, squares
from pictures.shards import all_written, name_of, pictures_of_process
from pictures.sources import Part, estimated_count, find_parts, share_out


def noise(seed=0, size=(40, 36), mode="RGB"):
    low = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(low).convert(mode)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tar_bytes(files, mode="w", **options):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_bytes(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return out.getvalue()


def damaged(data, at=None):
    """The same bytes but for some, in the middle if nothing else is said"""
    at = at or len(data) // 2
    return data[:at] + bytes(64) + data[at + 64 :]


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def prepare(*args):
    """Run prepare_latents.py in this process, as one of its own takes seconds to start"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_latents.py", "--workers=0", *map(str, args)])
        runpy.run_path(str(ROOT / "prepare_latents.py"), run_name="__main__")


def read(source, root="", **choices):
    """({name: caption} of the pictures that can be used, {name: reasons} of the others)"""
    good, bad, choose = {}, {}, caption_chooser(**choices)
    for part in find_parts(str(source), 7, str(root)):
        samples = list(part.samples(lambda position: True))
        assert part.count() == len(samples)
        # that some are not asked for leaves the others as they are
        assert list(part.samples(lambda position: position % 2))[1::2] == samples[1::2]
        for name, picture, caption in (choose(*entry) for sample in samples for entry in sample):
            result = squares(picture, (32,), 32)
            if isinstance(result, Unusable):
                bad.setdefault(name, []).append(str(result))
            else:
                assert min(result[:2]) >= 32 and result[2][0].shape == (32, 32, 3) and name not in good
                good[name] = caption
    return good, bad


def bomb():
    chunk = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    head = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return head + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


PNG, JPEG, WEBP = encoded(noise(1)), encoded(noise(2), "JPEG"), encoded(noise(3), "WEBP")
exif = Image.Exif()
exif[0x0112] = 77  # an orientation that does not exist
frames = {"save_all": True, "append_images": [noise(5), noise(6)]}
NAMES = ('it\'s "quoted"; $(name) & 100%.png', "two\nlines.png", "\u2028 separator.png", "日本 👩‍🚀.png",
         os.fsdecode(b"not \xff utf-8.png"), "-leading-dash.png", "deep/er/and/deeper.png", "many.dots.in.name.png")
GOOD = dict.fromkeys(NAMES, PNG) | {
    "CAPITALS.JPG": JPEG, "wrong name.png": JPEG,  # what counts is what is in it
    "bilevel.png": encoded(noise(mode="1")), "grey-alpha.png": encoded(noise(mode="LA")),
    "palette.gif": encoded(noise(mode="P"), "GIF"), "moving.gif": encoded(noise(), "GIF", **frames),
    "moving.webp": encoded(noise(), "WEBP", **frames), "pages.tiff": encoded(noise(), "TIFF", **frames),
    "long.jpg": encoded(noise(size=(3000, 32)), "JPEG"), "odd exif.jpg": encoded(noise(), "JPEG", exif=exif),
    "broken exif.jpg": encoded(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff"),
    "progressive.jpg": encoded(noise(), "JPEG", progressive=True), "trailing.jpg": JPEG + b"garbage" * 50}
BAD = {
    "cut.png": (PNG[: len(PNG) // 2], "OSError"), "cut.jpg": (JPEG[:-300], "OSError"),
    "cut.webp": (WEBP[: len(WEBP) // 2], "OSError"), "cut.gif": (encoded(noise(mode="P"), "GIF")[:700], ""),
    "crc.png": (damaged(PNG), ""), "empty.jpg": (b"", "UnidentifiedImageError"),
    "zeros.jpg": (bytes(5000), "UnidentifiedImageError"), "page.jpg": (b"<html>404</html>", "UnidentifiedImageError"),
    "bomb.png": (bomb(), "DecompressionBomb"),
    "float.tiff": (encoded(Image.fromarray(np.full((40, 40), 0.9, np.float32)), "TIFF"), "32 bits"),
    "small.png": (encoded(noise(size=(31, 60))), "too small: 31 x 60")}


def test_a_folder_of_strange_files(tmp_path):
    write(tmp_path, GOOD | {name: data for name, (data, _) in BAD.items()})
    for name in GOOD | BAD:
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {ascii(name)}")
    kept = {"huge": b"word " * 20_000, "bom": b"\xef\xbb\xbfmark", "nul": b"a\0b\x1b[31m"}
    silent = {"blank": b" \n\t ", "void": b"", "json": b"", "none": b""}
    for name, text in (kept | silent).items():
        write(tmp_path, {f"{name}.png": PNG, f"{name}.txt": text})
    write(tmp_path, {"latin1.png": PNG, "latin1.txt": b"K\xe4se"})
    (tmp_path / "none.txt").unlink()
    (tmp_path / "json.txt").rename(tmp_path / "json.json")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    write(tmp_path, {"cut.json": b'{"caption": "not', "notes.md": b"x", "Thumbs.db": b"x", ".DS_Store": b"x"})
    good, bad = read(tmp_path)
    assert good.keys() == GOOD.keys() | {f"{name}.png" for name in kept}
    assert len(good["huge.png"]) == 99_999 and good["nul.png"] == "a\0b\x1b[31m" and good["bom.png"] == "mark"
    assert all(good[name].startswith("caption of ") for name in GOOD)
    wanted = {name: reason for name, (_, reason) in BAD.items()} | {f"{name}.png": "no caption" for name in silent}
    wanted |= {"nowhere.png": "not a file", "pipe.png": "not a file", "latin1.png": "neither UTF-8"}
    assert bad.keys() == wanted.keys()
    assert not [(name, reasons) for name, reasons in bad.items() if len(reasons) > 1 or wanted[name] not in reasons[0]]


def test_pixels_of_every_mode():
    def square(image, kind="PNG", **options):
        width, height, (array,) = squares(encoded(image, kind, **options), (32,), 32)
        return width, height, array.astype(float)

    assert (square(Image.new("RGBA", (40, 40), (255, 0, 0, 0)))[2] == 255).all()  # transparency becomes white
    grey16 = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40
    grey = square(Image.fromarray(grey16))[2]
    assert abs(grey.mean() - grey16.mean() / 257) < 2 and grey.std() > 40
    tall = noise(7, (32, 90))
    assert (square(tall, "BMP")[2] == np.asarray(tall.crop((0, 29, 32, 61)))).all()
    smooth = noise(7, (4, 4)).resize((40, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(smooth.crop((4, 0, 36, 32)), float)
    for mode, kind, options in (("CMYK", "JPEG", {"quality": 95}), ("RGBA", "PNG", {}), ("RGB", "WEBP", {})):
        assert abs(square(smooth.convert(mode), kind, **options)[2] - expected).mean() < 8
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    assert square(noise(8, (64, 32)), "JPEG", exif=turned)[:2] == (32, 64)


def test_pictures_beside_archives_are_not_overlooked(tmp_path):
    write(tmp_path, {"a.png": PNG, "backup.zip": zip_bytes(pair("first"))})
    with pytest.raises(ValueError, match="holds pictures and archives"):
        find_parts(str(tmp_path), 7)
    write(tmp_path, dict([(f"{folder}/{n}", data) for folder in ("in/deep", "elsewhere") for n, data in pair("p")]))
    (tmp_path / "in/deep/up").symlink_to(tmp_path / "in")  # a circle
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    assert read(tmp_path / "in") == ({"deep/p.png": "p", "linked/p.png": "p"}, {})


def pair(name):
    return [(f"{name}.png", PNG), (f"{name}.txt", name.encode())]


FIRST, BOTH = {"first.png": "first"}, {"first.png": "first", "second.png": "second"}
BROKEN = {"": "breaks off here: "}
TWO = pair("first") + pair("second")
WHOLE = tar_bytes(TWO)
HEADER = WHOLE.index(b"second.png")  # of the second picture
# file: (its bytes, the captions that are kept, {entry, or "" for the archive: the reason that is listed})
ARCHIVED = {
    "cut in a file.tar": (WHOLE[: HEADER + 600], FIRST, BROKEN | {"second.png": "cut off"}),
    "cut in a header.tar": (WHOLE[: HEADER + 100], FIRST, BROKEN),
    "no end.tar": (WHOLE[: HEADER + 512 + 512 * -(-len(PNG) // 512) + 1024], BOTH, {"": "no zeros at its end"}),
    "bad header.tar": (WHOLE[:HEADER] + b"\xff" * 20 + WHOLE[HEADER + 20 :], FIRST, {"": "bad checksum"}),
    "nothing.tar": (b"", {}, BROKEN), "empty.tar": (tar_bytes([]), {}, {}), "text.tar": (b"text" * 500, {}, BROKEN),
    "gzip inside.tar": (tar_bytes(TWO, "w:gz"), BOTH, {}),  # the name does not say so
    "links.tar": (tar_bytes([("link.png", None)] + pair("first")), FIRST, {"link.png": "a link"}),
    "outside.tar": (tar_bytes(pair("../../up") + pair("/abs")), {"../../up.png": "../../up", "/abs.png": "/abs"}, {}),
    "masks.tar": (
        tar_bytes([("a.mask.png", PNG), ("a.png", PNG), ("a.txt", b"a"), ("b.json", b"[1]"), ("b.png", PNG)]),
        {"a.png": "a"}, {"b.png": "no caption", "a.mask.png": "no caption"}),
    "zeroed header.tar": (WHOLE[:HEADER] + bytes(1024) + WHOLE[HEADER + 1024 :], FIRST, BROKEN),
    "two in one.tar": (tar_bytes(pair("first")) + tar_bytes(pair("second")), BOTH, {}),
    "preallocated.tar": (WHOLE[:HEADER] + bytes(6000 * 512), FIRST, {"": "an incomplete download"}),
    "twice.tar": (tar_bytes([("a.png", PNG), ("a.png", JPEG), *pair("b")]), {"b.png": "b"}, {"a.png": "there twice"}),
    "deep.tar": (tar_bytes([("a.png", PNG), ("a.json", b"[" * 100_000)] + pair("b")), {"b.png": "b"},
                 {"a.png": "no caption"}),
    "several.tar": (tar_bytes([("0.left.png", PNG), ("0.right.png", PNG), ("0.txt", b"both")]),
                    {"0.left.png": "both", "0.right.png": "both"}, {}),
    "json.tgz": (tar_bytes([("1.png", PNG), ("1.json", b'{"caption": "one", "width": 8}'), ("2.png", PNG),
                            ("2.json", b'{"url": "x"}')], "w:gz"), {"1.png": "one"}, {"2.png": "no caption"}),
    "cut.tgz": (tar_bytes([*TWO, ("third.png", noise(9, (300, 300)).tobytes())], "w:gz")[:12_000], BOTH,
                BROKEN | {"third.png": "cut off"}),
    "damaged.tar.gz": (damaged(tar_bytes(TWO, "w:gz")), {}, BROKEN | {"first.png": "no caption"}),
    "cut.zip": (zip_bytes(TWO)[:3000], {}, {"": "cannot be read: File is not a zip"}),
    "damaged.zip": (damaged(zip_bytes(TWO), 1000), {"second.png": "second"}, {"first.png": "cannot be read"}),
    "bad table.zip": (zip_bytes([("part-1.json", b"{"), *pair("first")]), FIRST, {"": "part-1.json cannot be read"}),
    "twice.zip": (zip_bytes([("a.png", PNG), ("a.PNG", JPEG), *pair("b")]).replace(b"a.PNG", b"a.png"),
                  {"b.png": "b"}, {"a.png": "there twice"}),
    "dots.zip": (zip_bytes(pair("photo") + pair("photo.2") + pair("x 7.5")),
                 {"photo.png": "photo", "photo.2.png": "photo.2", "x 7.5.png": "x 7.5"}, {}),
    "prompts.zip": (zip_bytes([("b.png", PNG), ("c.png", PNG), ("part.json", b'{"b.png": {"p": "b"}}')]),
                    {"b.png": "b"}, {"c.png": "no caption"}),
    "no pictures.zip": (zip_bytes([("readme.txt", b"x"), ("inner.zip", zip_bytes(TWO))]), {}, {}),
}


@pytest.mark.parametrize("name", ARCHIVED)
def test_archives_of_every_kind(tmp_path, name):
    content, captions, reasons = ARCHIVED[name]
    write(tmp_path, {name: content})
    good, bad = read(tmp_path)
    assert good == {f"{name}/{entry}": caption for entry, caption in captions.items()}
    assert bad.keys() == {f"{name}/{entry}".rstrip("/") for entry in reasons}
    for entry, words in reasons.items():
        assert any(words in reason for reason in bad[f"{name}/{entry}".rstrip("/")]), bad


def test_several_archives_and_a_limit(tmp_path):
    write(tmp_path, {"b.tar": tar_bytes(pair("x/1") + pair("x/2")), "deep/a.zip": zip_bytes(pair("käse"))})
    parts = find_parts(f"{tmp_path}/**/*.[tz]*", 7)
    assert [part.names for part in parts] == [("b.tar",), ("deep/a.zip",)] and estimated_count(parts) == 3
    assert share_out(parts, 1) == [1, 0] and share_out(parts, 9) == [2, 1]
    good, bad = read(f"{tmp_path}/**/*.[tz]*")
    assert good == {"b.tar/x/1.png": "x/1", "b.tar/x/2.png": "x/2", "deep/a.zip/käse.png": "käse"} and not bad


def test_a_list_of_pictures_with_missing_files(tmp_path):
    write(tmp_path, {f"pictures/{name}": PNG for name in ("a.png", "b c.png", "7.jpg")})
    named = {"pictures/a.png": "one", "./pictures/b c.png": "two", "pictures/7": "without its extension"}
    missing = ("pictures/missing.png", "pictures", "pictures/nul\0.png", "x" * 5000 + ".png", "pictures/a.png/b.png")
    records = [{"image": name, "caption": text} for name, text in (named | dict.fromkeys(missing, "x")).items()]
    records += [{"image": "pictures/a.png", "caption": "again"}, {"image": 42, "caption": "a number"},
                {"caption": "no name"}, {"image": "pictures/7.jpg", "caption": None}]
    text = "\ufeff" + "".join(json.dumps(r) + "\n" for r in records) + "[1, 2]\n\n{cut off"
    (tmp_path / "list.jsonl").write_text(text, encoding="utf-8")
    good, bad = read(tmp_path / "list.jsonl")
    assert list(good.values()) == ["one", "two", "without its extension"]
    assert bad.pop("pictures/7.jpg") == ["no caption"] and bad.keys() == {*missing, "42", "record 11"}
    assert all("no such file" in reason for (reason,) in bad.values())


@pytest.mark.parametrize("text", ["", "{", "[]", "42", '"image"', '{"data": 3}', '[{"caption": "x"}]'])
def test_a_list_that_names_no_pictures_is_refused(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match="list.json"):
        find_parts(str(tmp_path / "list.json"), 7)


@pytest.mark.parametrize("counts", [(5,), (0, 3, 4), (9, 1, 0), (2, 0, 5, 3, 1, 7, 4, 6, 8, 2, 3, 4)])
@pytest.mark.parametrize("limits", [{}, {0: 2, 1: 0}])
def test_processes_share_the_same_shards(counts, limits):
    """Shards of 3 samples, over few parts and over many, by one process or several, some of them finished before"""

    def part(p, n):
        return Part((str(p),), n, lambda wanted: ([(f"{p}/{i}", b"", "")] if wanted(i) else None for i in range(n)))

    def written(rank, world, finished=()):
        shards, names = {}, []
        for shard, picture in pictures_of_process(parts, used, 3, finished, rank, world):
            if picture:
                names.append(picture[0])
            else:
                shards[shard], names = names, []
        assert not names  # every picture is followed by the end of its shard
        return shards

    parts, used = [part(p, n) for p, n in enumerate(counts)], [limits.get(p) for p in range(len(counts))]
    whole = written(0, 1)
    totals = [n if limit is None else min(n, limit) for n, limit in zip(counts, used)]
    assert sorted(sum(whole.values(), [])) == sorted(f"{p}/{i}" for p, n in enumerate(totals) for i in range(n))
    for world in (2, 3):
        shares = [written(rank, world) for rank in range(world)]
        assert sum(map(len, shares)) == len(whole) and {k: v for share in shares for k, v in share.items()} == whole
        assert len(counts) > 1 or max(map(len, shares)) - min(map(len, shares)) <= 1
    records = {name_of(p, k): {"part": p, "shard": k, "last": last} for p, k, last in whole}
    assert all_written(records, used)
    for missing in whole:
        assert written(0, 1, [shard for shard in whole if shard != missing]) == {missing: whole[missing]}
        assert not all_written({n: r for n, r in records.items() if n != name_of(*missing[:2])}, used)
