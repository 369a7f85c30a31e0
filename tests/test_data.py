"""prepare_latents.py and dataset.py: from pictures and captions to memmaps and back."""

import errno
import io
import json
import os
import tarfile
import zlib

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import encoders
from common import files
from pictures import shapes
from training.dataset import Dataset, dequantize, quantize


def photo(seed, size=(40, 32), mode="RGB"):
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(low).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(row, scaling_factor):
    """The picture (H,W,3) in a row of latents"""
    images = torch.nn.functional.pixel_shuffle(torch.from_numpy(np.array(row)).float()[None] / scaling_factor, 2)[0]
    return ((images + 1) * 127.5).permute(1, 2, 0).numpy()


def prepared(folder, latent_size=16):
    data = Dataset(folder, latent_size)
    return data, data.texts(range(len(data)))


# --- the drawn set ---------------------------------------------------------------------------------------------------


def test_round_trip_of_the_drawn_set(script, tmp_path):
    printed = script(
        "prepare_latents.py", "--out", tmp_path / "d", "--limit", 50, "--shard_size", 20, "--resolutions", 16, 32
    )
    assert "50 rows in 3 shards" in printed
    text_encoder = encoders.load_text_encoder("words")
    for resolution in (16, 32):
        data, captions = prepared(tmp_path / "d", resolution // 2)
        assert len(data) == 50
        ids = [49, 0, 20, 19]
        latents, embeddings = data.rows(ids)
        assert latents.dtype == embeddings.dtype == np.float16
        for i, latent, embedding in zip(ids, latents, embeddings):
            image, caption, _ = shapes.scene(i)
            assert captions[i] == caption
            np.testing.assert_allclose(embedding, text_encoder([caption])[0], atol=2e-3)
            if resolution == 32:
                np.testing.assert_allclose(
                    pixels(latent, data.info["vae"]["scaling_factor"]), np.asarray(image), atol=0.2
                )
    assert set(data.info["words"]) == {w for c in captions for w in encoders.words_of(c)}
    everything = data.rows(range(50))[0].astype(np.float32)
    assert 0.75 < everything.std() < 1.05  # near sigma_data


def test_started_again_it_goes_on_and_gives_the_same_bytes(script, tmp_path):
    args = ("prepare_latents.py", "--limit", 50, "--shard_size", 20, "--resolutions", 16)
    script(*args, "--out", tmp_path / "whole")
    script(*args, "--out", tmp_path / "part")
    # as if killed while it wrote the third shard (tests/test_kills.py really kills it)
    info = json.loads((tmp_path / "part/dataset.json").read_text())
    (tmp_path / "part/dataset.json").write_text(json.dumps(info | {"complete": False, "shards": [], "rows": 0}))
    for i in range(2):
        texts = [shapes.scene(j)[1] for j in range(20 * i, 20 * i + 20)]
        record = {"part": i, "shard": 0, "last": True, "rows": 20, "samples": 20, "skipped": {}, "captions_cut": 0}
        record["words"] = sorted({w for text in texts for w in encoders.words_of(text)})
        (tmp_path / f"part/0000{i}.done.json").write_text(json.dumps(record))
        (tmp_path / f"part/0000{i}.skipped.jsonl").touch()
    (tmp_path / "part/00002.captions.npy").write_bytes(b"cut")
    with pytest.raises(ValueError, match="only partly prepared"):
        Dataset(tmp_path / "part", 8)
    before = (tmp_path / "part/00001.captions.npy").stat().st_mtime_ns
    script(*args, "--out", tmp_path / "part")
    assert (tmp_path / "part/00001.captions.npy").stat().st_mtime_ns == before
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "part").iterdir())
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes(), name
    assert "already prepared: 50 rows" in script(*args, "--out", tmp_path / "whole")
    message = script(*args, "--out", tmp_path / "whole", "--first_seed=9", fails=True)
    assert "first_seed: 0 there, 9 now" in message and "--overwrite" in message
    script(*args, "--out", tmp_path / "whole", "--first_seed=9", "--overwrite")
    assert prepared(tmp_path / "whole", 8)[1][0] == shapes.scene(9)[1]


# --- folders and tars ------------------------------------------------------------------------------------------------


def bad_pictures():
    good = encoded(photo(0, (300, 300)))
    header = b"\x89PNG\r\n\x1a\n"
    chunk = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = (
        header
        + (13).to_bytes(4, "big")
        + chunk
        + zlib.crc32(chunk).to_bytes(4, "big")
        + b"\0\0\0\0IDAT"
        + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )
    return {
        "truncated.png": good[: len(good) // 2],
        "truncated.jpg": encoded(photo(1, (300, 300)), "JPEG")[:700],
        "empty.jpg": b"",
        "text.png": b"not a picture",
        "small.png": encoded(photo(2, (31, 60))),
        "bomb.png": bomb,
    }


def test_a_folder_with_every_kind_of_trouble(script, tmp_path):
    source = tmp_path / "photos"
    (source / "deep").mkdir(parents=True)
    grey16 = Image.fromarray((np.arange(40 * 40, dtype=np.uint32).reshape(40, 40) * 40).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    odd = {
        "cmyk.jpg": encoded(photo(3, mode="CMYK"), "JPEG", quality=95),
        "palette.png": encoded(photo(4).quantize(16)),
        "grey16.png": encoded(grey16),
        "grey.png": encoded(photo(5, mode="L")),
        "deep/plain.webp": encoded(photo(6), "WEBP"),
        "clear.png": encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0))),
        "tall.bmp": encoded(photo(7, (32, 90)), "BMP"),
        "turned.jpg": encoded(photo(8, (64, 32)), "JPEG", exif=turned),
    }
    for name, data in (odd | bad_pictures()).items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    (source / "silent.png").write_bytes(encoded(photo(9)))
    (source / "notes.md").write_text("no picture at all")
    printed = script("prepare_latents.py", "--source", source, "--out", tmp_path / "d")
    data, captions = prepared(tmp_path / "d")
    assert sorted(captions) == sorted(f"caption of {name}" for name in odd)
    skipped = {
        s["source"]: s["reason"] for s in map(json.loads, (tmp_path / "d/skipped.jsonl").read_text().splitlines())
    }
    assert skipped.keys() == {*bad_pictures(), "silent.png"}
    assert (
        "too small: 31 x 60" in skipped["small.png"]
        and "Bomb" in skipped["bomb.png"]
        and skipped["silent.png"] == "no caption"
    )
    assert "skipped 1: too small" in printed and "skipped 1: no caption" in printed

    def picture(name):
        return pixels(data.rows([captions.index(f"caption of {name}")])[0][0], data.info["vae"]["scaling_factor"])

    np.testing.assert_allclose(picture("clear.png"), 255, atol=0.3)  # transparency becomes white
    expected = np.asarray(grey16.crop((0, 0, 40, 40)), float) / 257
    assert abs(picture("grey16.png").mean() - expected.mean()) < 2 and picture("grey16.png").std() > 40
    np.testing.assert_allclose(picture("tall.bmp"), np.asarray(photo(7, (32, 90)).crop((0, 29, 32, 61))), atol=0.3)
    difference = abs(picture("cmyk.jpg") - np.asarray(photo(3).resize((40, 32)).crop((4, 0, 36, 32)), float))
    assert difference.mean() < 8
    rows = [json.loads(line) for line in (tmp_path / "d/00000.rows.jsonl").read_text().splitlines()]
    assert {(r["source"], r["width"], r["height"]) for r in rows} >= {
        ("deep/plain.webp", 40, 32),
        ("tall.bmp", 32, 90),
        ("turned.jpg", 32, 64),
    }


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_webdataset_tars(script, tmp_path):
    tar_of(
        tmp_path / "b.tar",
        {
            "x/1.jpg": encoded(photo(1), "JPEG"),
            "x/1.json": b'{"caption": "from json", "n": 1}',
            "x/2.png": encoded(photo(2)),
            "x/2.json": b'{"key": "no caption here"}',
            "x/2.txt": b"from text",
            "x/3.webp": encoded(photo(3), "WEBP"),
            "x/3.json": b'{"key": "none"}',
        },
    )
    tar_of(
        tmp_path / "a.tar",
        {
            "0.5.png": encoded(photo(4)),
            "0.txt": "käse, 日本".encode(),
            "1.png": encoded(photo(5)),
            "1.txt": b"whole",
        },
    )
    whole = (tmp_path / "a.tar").read_bytes()
    tar_of(
        tmp_path / "c.tar",
        {
            "9.txt": b"kept",
            "9.png": encoded(photo(6, (300, 300))),
            "10.png": encoded(photo(7, (300, 300))),
            "10.txt": b"lost",
        },
    )
    cut = (tmp_path / "c.tar").read_bytes()
    for source, end in (
        (tmp_path, 71_200),
        (f"{tmp_path}/*.tar", 512 * 91),
    ):  # inside the second picture; between two files
        (tmp_path / "c.tar").write_bytes(cut[:end])
        out = tmp_path / f"d{end}"
        script("prepare_latents.py", "--source", source, "--out", out)
        _, captions = prepared(out)
        assert captions[:2] == ["käse, 日本", "whole"]  # in the order of the tars' names, then of their files
        assert {"whole", "from json", "from text", "kept"} <= set(captions) and "lost" not in captions
        skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
        assert ["b.tar/x/3.webp", "no caption"] in [[s["source"], s["reason"]] for s in skipped]
        assert any(s["source"].startswith("c.tar") and "breaks off" in s["reason"] for s in skipped)
    assert (tmp_path / "a.tar").read_bytes() == whole


@pytest.mark.parametrize(
    "args, words",
    [
        (["--source=nowhere"], "no source nowhere"),
        (["--source={tmp}/empty"], "no pictures"),
        (["--source={tmp}/bad"], "skipped.jsonl"),
        (["--vae=none"], "unknown autoencoder 'none'"),
        (["--text_encoder=none"], "unknown text encoder 'none'"),
        (["--resolutions=31"], "not a multiple of 2"),
        (["--shard_size=0"], "shard_size is 0"),
        (["--device=abacus"], "this machine has"),
    ],
)
def test_bad_arguments(script, tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"x")
    message = script("prepare_latents.py", "--out", tmp_path / "d", *[a.format(tmp=tmp_path) for a in args], fails=True)
    assert words in message
    assert "skipped.jsonl" in words or not (tmp_path / "d").exists()


# --- damage ----------------------------------------------------------------------------------------------------------


def test_disk_full_while_writing_a_shard_keeps_what_was_there(script, small_disk):
    disk = small_disk(2)
    args = ("prepare_latents.py", "--out", disk / "d", "--limit", 400, "--shard_size", 50, "--resolutions", 32)
    message = script(*args, fails=True)
    assert "would need about 4.2" in message and "--caption_dtype int8" in message and not (disk / "d").exists()
    message = script(*args, "--ignore_disk", fails=True)
    assert "disk full" in message and "goes on from there" in message
    assert list((disk / "d").glob("*.done.json")) and not list((disk / "d").glob("*.tmp"))
    with pytest.raises(ValueError, match="partly prepared"):
        Dataset(disk / "d", 16)
    os.system(f"mount -o remount,size=20m {disk}")
    script(*args)
    assert prepared(disk / "d")[1] == [shapes.scene(i)[1] for i in range(400)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_write_atomic_leaves_the_old_file(tmp_path, code):
    files.write_atomic(tmp_path / "f", lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(code, "full")

    with pytest.raises(files.DiskFull, match="disk full while writing .*f"):
        files.write_atomic(tmp_path / "f", fail)
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_damaged_or_missing_parts_are_named(script, tmp_path):
    out = tmp_path / "d"
    script("prepare_latents.py", "--out", out, "--limit", 20, "--resolutions", 16)
    with pytest.raises(ValueError, match="no prepared data in .*nothing.*prepare_latents.py"):
        Dataset(tmp_path / "nothing", 8)
    with pytest.raises(ValueError, match="latents of size 8 \\(16 px\\), not 16.*--resolutions 32"):
        Dataset(out, 16)
    captions, latents = out / "00000.captions.npy", out / "00000.latents16.npy"
    good = captions.read_bytes()
    for damage in (good[:-1], good[:50], b""):
        captions.write_bytes(damage)
        with pytest.raises(ValueError, match="00000.captions.npy is missing or cut short"):
            Dataset(out, 8)
    np.save(captions, np.zeros((19, 16, 128), np.float16))
    with pytest.raises(ValueError, match="dataset.json says float16 \\(20, 16, 128\\)"):
        Dataset(out, 8)
    captions.write_bytes(good)
    latents.unlink()
    with pytest.raises(ValueError, match="00000.latents16.npy is missing"):
        Dataset(out, 8)
    (out / "dataset.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="not readable JSON"):
        Dataset(out, 8)


# --- the stand-in encoders -------------------------------------------------------------------------------------------


def test_pixels_is_lossless():
    vae = encoders.load_vae("pixels")
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    mean, logvar = vae.posterior(images)
    assert mean.shape == logvar.shape == (2, 12, 4, 6)
    torch.testing.assert_close(vae.encode(images), mean * vae.scaling_factor)
    torch.testing.assert_close(vae.decode(vae.encode(images, torch.Generator())), images)
    assert encoders.load_vae("pixels", scaling_factor=2.0).encode(images).allclose(2 * mean)


def test_words_are_fixed_vectors_with_positions():
    encode = encoders.load_text_encoder("words")
    a, b, c, empty = encode(["red circle", "Circle, RED!", "red  circle.", ""])
    assert a.shape == (16, 128) and torch.equal(a, c) and (empty == 0).all() and (a[2:] == 0).all()
    torch.testing.assert_close(a[0] + a[1], b[0] + b[1])  # a word's vector and a position's, in either order
    assert not torch.equal(a[0], b[1]) and abs(a[:2].std() - 1) < 0.2
    assert torch.equal(encoders.load_text_encoder("words")(["red circle"])[0], a)
    # the same on every machine: these numbers are part of the format of checkpoints
    assert [round(v, 4) for v in encode.vector("red")[:4].tolist()] == [-0.751, -0.6834, -0.9675, -0.3992]
    assert encode(["w " * 40])[0].abs().sum(-1).gt(0).all()


# --- 8-bit captions --------------------------------------------------------------------------------------------------


def test_captions_in_8_bits(script, tmp_path):
    args = ("prepare_latents.py", "--limit", 40, "--shard_size", 16, "--resolutions", 16)
    script(*args, "--out", tmp_path / "half")
    script(*args, "--out", tmp_path / "int8", "--caption_dtype=int8")
    half, int8 = Dataset(tmp_path / "half", 8), Dataset(tmp_path / "int8", 8)
    ids = [39, 0, 15, 16, 17]
    (a, x), (b, y) = half.rows(ids), int8.rows(ids)
    np.testing.assert_array_equal(a, b)
    error = np.abs(y - x.astype(np.float32))
    assert (
        0 < error.max() <= np.abs(x).max() / 127 * 0.51 and np.sqrt((error**2).mean()) < 0.006 * x.astype(float).std()
    )
    bytes_of = {n: sum(p.stat().st_size for p in (tmp_path / n).glob("*s.npy")) for n in ("half", "int8")}
    assert bytes_of["int8"] < 0.55 * bytes_of["half"]
    message = script(*args, "--out", tmp_path / "int8", fails=True)
    assert "caption_dtype: 'int8' there, 'float16' now" in message
    (tmp_path / "int8/00000.scales.npy").unlink()
    with pytest.raises(ValueError, match="scales.npy is missing"):
        Dataset(tmp_path / "int8", 8)


@given(st.integers(1, 3), st.sampled_from([1, 20, 32, 96]), st.floats(-1, 4), st.integers(0, 2**32 - 1))
@hypothesis.settings(deadline=None, max_examples=50)
def test_quantization_is_within_half_a_step(n, dim, exponent, seed):
    x = np.random.default_rng(seed).standard_normal((n, 2, dim)).astype(np.float32) * 10**exponent
    x[0, 0] = 0  # padding
    values, scales = quantize(x)
    y = dequantize(torch.from_numpy(values), torch.from_numpy(scales)).numpy()
    steps = np.repeat(scales.astype(np.float32), dim // scales.shape[-1], axis=-1)
    assert values.shape == x.shape and values.dtype == np.int8 and (y[0, 0] == 0).all()
    assert (np.abs(y - x) <= 0.58 * steps + 1e-7).all()  # half a step, and the rounding of the scale itself


# --- several folders as one set --------------------------------------------------------------------------------------


def test_several_folders_are_one_set(script, tmp_path):
    for name, seed, n in (("a", 0, 23), ("b", 500, 17)):
        script("prepare_latents.py", "--out", tmp_path / name, f"--limit={n}", f"--first_seed={seed}",
               "--resolutions=16", "--shard_size=10")  # fmt: skip
    a, b = Dataset(tmp_path / "a", 8), Dataset(tmp_path / "b", 8)
    for path in (tmp_path / "b").glob("*.rows.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["width"], row["height"] = ((600, 512), (2000, 511), (511, 2000))[i % 3]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = Dataset([tmp_path / "a", f"{tmp_path / 'b'}@512"], 8)
    kept = [i for i in range(17) if (i % 10) % 3 == 0]
    assert len(both) == 23 + len(kept) and both.texts([22, 0]) == a.texts([22, 0])
    order = np.random.default_rng(0).permutation(len(both))
    latents, captions = both.rows(order)
    texts = both.texts(order)
    for i, row in enumerate(order):
        source, local = (a, row) if row < 23 else (b, kept[row - 23])
        expected = source.rows([local])
        np.testing.assert_array_equal(latents[i], expected[0][0])
        np.testing.assert_array_equal(captions[i], expected[1][0])
        assert texts[i] == source.texts([local])[0]
    rows, held = both.split(4)
    everything = [*rows[np.arange(len(rows))], *held[np.arange(len(held))]]
    assert sorted(everything) == list(range(len(both)))
    assert any(i < 23 for i in held[np.arange(len(held))]) and any(i >= 23 for i in held[np.arange(len(held))])
    with pytest.raises(ValueError, match="b@3000 has no rows with a short side of 3000"):
        Dataset([tmp_path / "a", f"{tmp_path / 'b'}@3000"], 8)
    script("prepare_latents.py", "--out", tmp_path / "c", "--limit=9", "--resolutions=16", "--caption_dtype=int8")
    with pytest.raises(ValueError, match="differ in caption_dtype"):
        Dataset([tmp_path / "a", tmp_path / "c"], 8)


def test_a_file_cut_after_it_was_opened_is_noticed(script, tmp_path):
    script("prepare_latents.py", "--out", tmp_path / "d", "--limit=9", "--resolutions=16")
    data = Dataset(tmp_path / "d", 8)
    os.truncate(tmp_path / "d/00000.captions.npy", 5000)
    with pytest.raises(ValueError, match="captions.npy is cut short: row 8"):
        data.rows([8])
