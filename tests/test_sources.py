"""Where pictures come from, with a hostile input set: everything good is kept, everything bad has its reason."""
import base64
import io
import os
import runpy
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from contextlib import closing

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageCms, PngImagePlugin

from common import files
from pictures import captions, decode, sources
from pictures.captions import caption_chooser
from pictures.decode import Unusable, Workers, decode_ahead, squares
from pictures.sources import find_parts, limited, shapes_parts


def noise(seed=0, size=(40, 36), mode="RGB"):
    low = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(low).convert(mode)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tar_bytes(files, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
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
        try:
            runpy.run_path(str(ROOT / "prepare_latents.py"), run_name="__main__")
        finally:  # as the end of a process does
            for holder, _ in files.HELD.values():
                os.close(holder)
            files.HELD.clear()


def read(source):
    """({name: caption} of the pictures that can be used, {name: reasons} of the others)"""
    good, bad, choose = {}, {}, caption_chooser()
    for part in find_parts(str(source), 7):
        for name, picture, caption in (choose(*entry) for entry in part.entries()):
            result = squares(picture, (32,))
            if isinstance(result, Unusable):
                bad.setdefault(name, []).append(str(result))
            else:
                assert min(result[:2]) >= 32 and result[2][0].shape == (32, 32, 3) and name not in good
                good[name] = caption
    return good, bad


def png_that_says(width, height):
    """A PNG of no pixels at all"""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


# a profile with Display P3's primaries and a gamma of 2.2
P3 = zlib.decompress(base64.b85decode(
    "c-muNV0@96pO?xcz`&53S5g$@?xYYA8KuC01QL^r3mEW%Z`T+YLG)!^2GRj%N@{U3kp2L~8Oa4jB@7IV5kR&;"
    "c}W3?odINv6agItWY>V$=@9k=5IYINUIJDV666eI?*Qpdhp<n8*hvuf4G<e@7YJ~>WEL0XBvvW}7&A~El%!Ua"
    "fM`(If@nmTBEkwG)_k9V!FK=u|NnO*#Ju)1Fl;nuVBp$`5Yw<=U=ZYHU^uZexwNPZY84|B(EWt?0GD?^`v"))
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
    "bomb.png": (png_that_says(60_000, 60_000), "DecompressionBomb"),
    "long.png": (png_that_says(2_700_000, 32), "2700000 x 32, more than is harmless"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\nshowpage\n", "UnidentifiedImageError"),
    "float.tiff": (encoded(Image.fromarray(np.full((40, 40), 0.9, np.float32)), "TIFF"), "32 bits"),
    "small.png": (encoded(noise(size=(31, 60))), "too small: 31 x 60")}


def test_a_folder_of_strange_files(tmp_path):
    write(tmp_path, GOOD | {name: data for name, (data, _) in BAD.items()})
    for name in GOOD | BAD:
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {ascii(name)}")
    kept = {"huge": b"word " * 20_000, "bom": b"\xef\xbb\xbfmark", "nul": b"a\0b\x1b[31m"}
    kept |= {"utf-16": "naïve".encode("utf-16")}
    silent = {"blank": b" \n\t ", "void": b"", "none": b""}
    for name, text in (kept | silent).items():
        write(tmp_path, {f"{name}.png": PNG, f"{name}.txt": text})
    write(tmp_path, {"latin1.png": PNG, "latin1.txt": b"K\xe4se"})
    (tmp_path / "none.txt").unlink()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    write(tmp_path, {"cut.json": b'{"caption": "not', "notes.md": b"x", "Thumbs.db": b"x", ".DS_Store": b"x"})
    good, bad = read(tmp_path)
    assert good.keys() == GOOD.keys() | {f"{name}.png" for name in kept}
    assert len(good["huge.png"]) == 99_999 and good["nul.png"] == "a\0b\x1b[31m" and good["bom.png"] == "mark"
    assert good["utf-16.png"] == "naïve"
    assert all(good[name].startswith("caption of ") for name in GOOD)
    wanted = {name: reason for name, (_, reason) in BAD.items()} | {f"{name}.png": "no caption" for name in silent}
    wanted |= {"nowhere.png": "no such file", "pipe.png": "no such file", "latin1.png": "neither UTF-8"}
    assert bad.keys() == wanted.keys()
    assert not [(name, reasons) for name, reasons in bad.items() if len(reasons) > 1 or wanted[name] not in reasons[0]]


def test_pixels_of_every_mode():
    def square(image, kind="PNG", **options):
        return squares(encoded(image, kind, **options), (32,))[2][0].astype(float)

    assert (square(Image.new("RGBA", (40, 40), (255, 0, 0, 0))) == 255).all()  # transparency becomes white
    grey16 = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40
    assert abs(square(Image.fromarray(grey16)).mean() - grey16.mean() / 257) < 2
    smooth = noise(7, (4, 4)).resize((40, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(smooth.crop((4, 0, 36, 32)), float)
    for mode, kind, options in (("CMYK", "JPEG", {"quality": 95}), ("RGBA", "PNG", {}), ("RGB", "WEBP", {})):
        assert abs(square(smooth.convert(mode), kind, **options) - expected).mean() < 8
    for profile, mode in ((P3, "RGB"), (P3, "RGBA"), (P3, "P")):  # of a phone: its red is more than sRGB's
        image = Image.new("RGB", (40, 40), (200, 60, 60)).convert(mode)
        shown, plain = square(image, icc_profile=profile).mean((0, 1)), square(image).mean((0, 1))
        assert abs(plain - (200, 60, 60)).max() < 2 and shown[0] > 212 and shown[1] < 52, (mode, shown)
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"damaged", b""):
        assert (square(Image.new("RGB", (40, 40), (200, 60, 60)), icc_profile=profile) == (200, 60, 60)).all()
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    large = P3 + bytes(2_000_000)
    assert (square(noise(1), pnginfo=text) == square(noise(1))).all()  # as generators of pictures write
    assert (square(noise(1), icc_profile=large) != 0).any()
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    assert squares(encoded(noise(8, (64, 32)), "JPEG", exif=turned), (32,))[:2] == (32, 64)


def test_pictures_beside_archives_and_links_to_folders(tmp_path):
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
    "cut in a file.tar": (WHOLE[: HEADER + 600], FIRST, BROKEN | {"second.png": "cannot be read"}),
    "cut in a header.tar": (WHOLE[: HEADER + 100], FIRST, BROKEN),
    "no end.tar": (WHOLE[: HEADER + 512 + 512 * -(-len(PNG) // 512) + 1024], BOTH, {"": "no zeros at its end"}),
    "bad header.tar": (WHOLE[:HEADER] + b"\xff" * 20 + WHOLE[HEADER + 20 :], FIRST, {"": "bad checksum"}),
    "nothing.tar": (b"", {}, BROKEN),
    "links.tar": (tar_bytes([("link.png", None)] + pair("first")), FIRST, {"link.png": "a link"}),
    "zeroed header.tar": (WHOLE[:HEADER] + bytes(1024) + WHOLE[HEADER + 1024 :], FIRST, BROKEN),
    "two in one.tar": (tar_bytes(pair("first")) + tar_bytes(pair("second")), BOTH, {}),
    "preallocated.tar": (WHOLE[:HEADER] + bytes(6000 * 512), FIRST, {"": "an incomplete download"}),
    "twice.tar": (tar_bytes([("a.png", PNG), ("a.png", JPEG), *pair("b")]), {"b.png": "b"}, {"a.png": "there twice"}),
    "deep.tar": (tar_bytes([("a.png", PNG), ("a.json", b"[" * 100_000)] + pair("b")), {"b.png": "b"},
                 {"a.png": "no caption"}),
    "json.tgz": (tar_bytes([("1.png", PNG), ("1.json", b'{"caption": "one", "width": 8}'), ("2.png", PNG),
                            ("2.json", b'{"url": "x"}')], "w:gz"), {"1.png": "one"}, {"2.png": "no caption"}),
    "damaged.tar.gz": (damaged(tar_bytes(TWO, "w:gz")), {}, BROKEN | {"first.png": "no caption"}),
    "cut.zip": (zip_bytes(TWO)[:3000], {}, {"": "breaks off here: BadZipFile"}),
    "damaged.zip": (damaged(zip_bytes(TWO), 1000), {"second.png": "second"}, {"first.png": "cannot be read"}),
    "twice.zip": (zip_bytes([("a.png", PNG), ("a.PNG", JPEG), *pair("b")]).replace(b"a.PNG", b"a.png"),
                  {"b.png": "b"}, {"a.png": "there twice"}),
    "dots.zip": (zip_bytes(pair("photo") + pair("photo.2") + pair("x 7.5")),
                 {"photo.png": "photo", "photo.2.png": "photo.2", "x 7.5.png": "x 7.5"}, {}),
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


JSON = b'{"prompt": ["a %s", "other"], "width": 8}'
# what lies in a folder or archive: {file: content}, and the captions of the pictures that are found
LAYOUTS = {
    "plain": ({"a.png": PNG, "a.txt": b"one", "b.png": PNG, "b.caption": b"two", "c.png": PNG, "c.json": JSON % b"fox"},
              {"a.png": "one", "b.png": "two", "c.png": "a fox"}),
    "of a Mac": ({"._a.png": b"x", "a.png": PNG, "._a.txt": b"x", "a.txt": b"one", "__MACOSX/._a.png": b"x",
                  "__MACOSX/b.png": PNG, ".DS_Store": b"x"}, {"a.png": "one"}),
    "thumbnails": ({"x/a.png": PNG, "x/a.txt": b"one", "x/.ipynb_checkpoints/a.png": PNG, "@eaDir/a.png/T.jpg": JPEG,
                    ".thumbnails/a.png": PNG, ".thumbnails/a.txt": b"x"}, {"x/a.png": "one"}),
    "compound": ({"1.img.png": PNG, "1.txt": b"one", "2.png": PNG, "2.caption.txt": b"two", "3.png": PNG,
                  "3.txt": b"three", "3.text.txt": b"longer", "3.5.png": PNG, "3.5.txt": b"x",
                  "5.img.png": PNG, "5.prompt.txt": b"a five",
                  "4.png": PNG, "4.png.txt": b"four", "4.jpg": JPEG, "4.jpg.txt": b"five"},
                 {"1.img.png": "one", "2.png": "two", "3.png": "three", "3.5.png": "x", "4.png": "four",
                  "4.jpg": "five", "5.img.png": "a five"}),
    "not theirs": ({"4.png": PNG, "4.a.txt": b"which", "4.b.txt": b"of both", "5.5.png": PNG, "5.6.txt": b"x",
                    "6.png": PNG, "y/6.txt": b"x"}, {}),
    "another's": ({"1.png": PNG, "1.5.png": PNG, "1.5.txt": b"one and a half"}, {"1.5.png": "one and a half"}),
    "accents": ({"ka\u0308se.png": PNG, "k\u00e4se.txt": b"cheese"}, {"ka\u0308se.png": "cheese"}),
    "formats": ({"a.heic": b"x", "b.JXL": b"x", "c.png": PNG, "c.txt": b"c", "c.heic": b"x"}, {"c.png": "c"})}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "a.tar", "a.tgz", "gz.tar", "a.zip"])
def test_captions_find_their_pictures_in_any_order(tmp_path, name, kind, monkeypatch):
    content, captions = LAYOUTS[name]
    for seed in range(1 if kind == "folder" else 5):
        files = [*content.items()]
        np.random.default_rng(seed).shuffle(files)
        if kind == "folder":
            write(tmp_path / kind, content)
        else:
            mode = "w:gz" if "gz" in kind else "w"
            write(tmp_path, {kind: zip_bytes(files) if kind == "a.zip" else tar_bytes(files, mode)})
        good, bad = read(tmp_path / kind)
        start = "" if kind == "folder" else f"{kind}/"
        assert good == {f"{start}{file}": caption for file, caption in captions.items()}
        unread = {f"{start}{file}" for file in content if file.lower().endswith((".heic", ".jxl"))}
        assert {name for name, reasons in bad.items() if "is not read, convert it" in reasons[0]} == unread
        assert {name for name, reasons in bad.items() if "no caption" == reasons[0]} == {
            f"{start}{file}" for file in content if name == "not theirs" and file.endswith("png")
            or (name, file) == ("another's", "1.png")}


@pytest.mark.parametrize("mode, bound, kept", [("w", (10, 99), 20), ("w:gz", (10, 99), 0), ("w", (2 ** 28, 5), 5),
                                               ("w:gz", (2 ** 28, 5), 5)])
def test_pictures_wait_for_their_captions_within_bounds(tmp_path, monkeypatch, mode, bound, kept):
    """In memory where an archive is compressed; and so many"""
    monkeypatch.setattr(sources, "WAITING", bound)
    files = [(f"{i}.{ending}", content) for ending, content in (("png", PNG), ("txt", b"caption")) for i in range(20)]
    write(tmp_path, {"a.tar": tar_bytes(files, mode)})
    good, bad = read(tmp_path / "a.tar")
    assert len(good) == kept and len(good) + len(bad) == 20 and {*good.values()} <= {"caption"}


@pytest.mark.parametrize("kind", ["folder", "a.tar"])
def test_many_names_with_the_same_beginning(tmp_path, kind):
    """No picture's caption is looked for among all the others'"""
    files = [(f"img.{i:05d}.{ending}", data) for i in range(3000) for ending, data in (("png", b"x"), ("txt", b"c"))]
    write(tmp_path, {f"folder/{name}": data for name, data in files} if kind == "folder" else {kind: tar_bytes(files)})
    began = time.process_time()
    captions = [caption for part in find_parts(str(tmp_path / kind), 99) for _, _, caption in part.entries()]
    assert captions == 3000 * ["c"]
    assert time.process_time() - began < 20  # 60 s and more, when it was


def test_braces_are_patterns(tmp_path):
    write(tmp_path, {f"x/{i:05d}.tar": tar_bytes(pair(f"{i}")) for i in range(8, 12)})
    assert {*read(f"{tmp_path}/x/{{00009..00011}}.tar")[0].values()} == {"9", "10", "11"}
    assert {*read(f"{tmp_path}/{{x,x}}/0000*.tar")[0].values()} == {"8", "9"}
    with pytest.raises(ValueError, match="x/00012.tar, which does not exist"):
        find_parts(f"{tmp_path}/x/{{00010..00012}}.tar", 7)


def test_several_archives_and_a_limit(tmp_path):
    write(tmp_path, {"b.tar": tar_bytes(pair("x/1") + pair("x/2")), "deep/a.zip": zip_bytes(pair("käse"))})
    parts = find_parts(f"{tmp_path}/**/*.[tz]*", 7)
    for some in (parts, shapes_parts(3, 8, 2)):
        for limit, counts in ((1, [1]), (2, [2]), (3, [2, 1]), (9, [2, 1])):
            assert [len(list(part.entries())) for part in limited(some, limit)] == counts
    good, bad = read(f"{tmp_path}/**/*.[tz]*")
    assert good == {"b.tar/x/1.png": "x/1", "b.tar/x/2.png": "x/2", "deep/a.zip/käse.png": "käse"} and not bad


def die(picture, resolutions):
    if picture == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return picture.upper()


def test_a_picture_that_ends_its_process_costs_only_itself(monkeypatch):
    monkeypatch.setattr(decode, "squares", die)
    monkeypatch.setattr(decode.new_pool, "__defaults__", ("fork",))  # which is faster, and threads there are none
    with closing(Workers(2)) as pool:
        results = list(decode_ahead(((name, name, 1) for name in ("a", "b", "deadly", "c", "d")), pool, 2, (8,)))
    expected = [("a", "A"), ("b", "B"), ("deadly", "decoding it ends the process"), ("c", "C"), ("d", "D")]
    assert [(name, str(result).partition(":")[0]) for name, result, _ in results] == expected


def test_what_is_too_large_in_an_archive_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_BYTES", 10_000)
    files = [("0.png", bytes(20_000)), ("1.bin", bytes(20_000)), ("1.png", PNG), ("1.txt", b"one")]
    write(tmp_path, {"a.zip": zip_bytes(files), "b.tgz": tar_bytes(files, "w:gz"), "2.png": b""})
    os.truncate(tmp_path / "2.png", 3 * 2 ** 30)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "c.tar", "-C", tmp_path, "2.png"], check=True)
    (tmp_path / "2.png").unlink()
    good, bad = read(tmp_path)
    assert good == {"a.zip/1.png": "one", "b.tgz/1.png": "one"}
    assert bad.keys() == {"a.zip/0.png", "b.tgz/0.png", "c.tar/2.png"}  # a sparse file is as large as it says
    assert all("more than is harmless" in reason for (reason,) in bad.values())


def test_headers_and_tables_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2 ** 33
    write(tmp_path, {"a.tar": header.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)})
    monkeypatch.setattr(captions, "MOST_BYTES_OF_TABLE", 1000)
    write(tmp_path, {"b.zip": zip_bytes([("a.json", b'{"a.png": "' + b"a" * 1000 + b'"}')])})
    assert "a header of 8,589,934,592 bytes" in read(tmp_path / "a.tar")[1]["a.tar"][0]
    for name, words in (("a.tar", "a header of"), ("b.zip", "more than is harmless")):
        with pytest.raises(ValueError, match=words):
            captions.read_captions(tmp_path / name)
