"""prepare_latents.py and dataset.py: from pictures and captions to memmaps and back."""
import errno
import json
import os
import shutil
from itertools import cycle

import hypothesis
import numpy as np
import pytest
import torch
from conftest import launch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from test_sources import PNG, encoded, noise, pair, prepare, tar_bytes, write

import encoders
from common import files
from encoders.vae import KLAutoencoder
from pictures import shapes
from training.dataset import Dataset, dequantize, quantize

DRAWN = ("--limit=50", "--shard_size=20", "--resolutions", 16, 32)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """50 pictures of the drawn set in three shards"""
    folder = tmp_path_factory.mktemp("drawn") / "d"
    assert "50 rows in 3 shards" in launch("prepare_latents.py", "--out", folder, *DRAWN)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def pixels(row, scaling_factor):
    """The picture (H,W,3) in a row of latents"""
    images = torch.nn.functional.pixel_shuffle(torch.from_numpy(np.array(row)).float()[None] / scaling_factor, 2)[0]
    return ((images + 1) * 127.5).permute(1, 2, 0).numpy()


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_round_trip_of_the_drawn_set(drawn):
    text_encoder, ids = encoders.load_text_encoder("words"), [49, 0, 20, 19]
    for resolution in (16, 32):
        data = Dataset(drawn, resolution // 2)
        captions, (latents, embeddings) = data.texts(range(50)), data.rows(ids)
        assert len(data) == 50 and latents.dtype == embeddings.dtype == np.float16
        assert 0.75 < data.rows(range(50))[0].astype(np.float32).std() < 1.05  # near sigma_data
    for i, latent, embedding in zip(ids, latents, embeddings):
        image, caption, _ = shapes.scene(i)
        assert captions[i] == caption
        np.testing.assert_allclose(embedding, text_encoder([caption])[0], atol=2e-3)
        np.testing.assert_allclose(pixels(latent, data.info["vae"]["scaling_factor"]), np.asarray(image), atol=0.2)
    assert set(data.info["words"]) == {w for c in captions for w in encoders.words_of(c)}


def interrupted(prepared, folder, finished):
    """A copy of the folder as if killed after so many shards (tests/test_kills.py really kills it)"""
    shutil.copytree(prepared, folder)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"complete": False, "shards": [], "rows": 0}))
    for i in range(finished):
        texts = [row["caption"] for row in lines_of(folder / f"0000{i}.rows.jsonl")]
        words = sorted({w for text in texts for w in encoders.words_of(text)})
        record = {"part": i, "shard": 0, "last": True, "rows": len(texts), "samples": len(texts), "skipped": {}}
        (folder / f"0000{i}.done.json").write_text(json.dumps(record | {"captions_cut": 0, "words": words}))
        (folder / f"0000{i}.skipped.jsonl").touch()


def test_started_again_it_goes_on_and_gives_the_same_bytes(drawn, tmp_path, capsys):
    whole, out = contents(drawn), tmp_path / "part"
    interrupted(drawn, out, 2)
    (out / "00002.captions.npy").write_bytes(b"cut")
    with pytest.raises(ValueError, match="only partly prepared"):
        Dataset(out, 8)
    before = (out / "00001.captions.npy").stat().st_mtime_ns
    prepare(*DRAWN, "--out", out)
    assert (out / "00001.captions.npy").stat().st_mtime_ns == before and contents(out) == whole
    (out / "00001.done.json").write_text("{}")  # as a kill at the very end leaves it
    prepare(*DRAWN, "--out", out)
    assert "already prepared: 50 rows" in capsys.readouterr().out and contents(out) == whole
    with pytest.raises(SystemExit, match="first_seed: 0 there, 9 now.*--overwrite"):
        prepare(*DRAWN, "--out", out, "--first_seed=9")
    (out / "00000.tar").write_bytes(b"not ours")
    prepare(*DRAWN, "--out", out, "--first_seed=9", "--overwrite")
    assert Dataset(out, 8).texts([0]) == [shapes.scene(9)[1]] and (out / "00000.tar").is_file()


def test_two_processes_with_all_shards_written_and_only_the_end_missing(drawn, tmp_path):
    interrupted(drawn, tmp_path / "part", 3)  # the second process must not begin again what the first tidies up
    launch("prepare_latents.py", *DRAWN, "--out", tmp_path / "part", processes=2)
    assert contents(tmp_path / "part") == contents(drawn)


def test_a_folder_with_good_and_bad_pictures(script, tmp_path):
    source, tall = tmp_path / "photos", noise(7, (32, 90))
    good = {"deep/plain.webp": encoded(noise(6), "WEBP"), "tall.bmp": encoded(tall, "BMP"), "a.png": PNG}
    bad = {"cut.png": PNG[:1000], "small.png": encoded(noise(2, (31, 60)))}
    write(source, good | bad | {"silent.png": PNG, "notes.md": b"x"})
    for name in good | bad:
        (source / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    printed = script("prepare_latents.py", "--source", source, "--out", tmp_path / "d", "--workers=2")
    assert "skipped 1: too small" in printed and "skipped 1: no caption" in printed
    data = Dataset(tmp_path / "d", 16)
    captions = data.texts(range(len(data)))
    assert sorted(captions) == sorted(f"caption of {name}" for name in good)
    reasons = {line["source"]: line["reason"] for line in lines_of(tmp_path / "d/skipped.jsonl")}
    assert reasons.keys() == {*bad, "silent.png"} and "31 x 60" in reasons["small.png"]
    row = data.rows([captions.index("caption of tall.bmp")])[0][0]
    expected = np.asarray(tall.crop((0, 29, 32, 61)))
    np.testing.assert_allclose(pixels(row, data.info["vae"]["scaling_factor"]), expected, atol=0.3)
    sizes = {row["source"]: (row["width"], row["height"]) for row in lines_of(tmp_path / "d/00000.rows.jsonl")}
    assert sizes == {"deep/plain.webp": (40, 36), "tall.bmp": (32, 90), "a.png": (40, 36)}


def test_shards_do_not_depend_on_the_processes_even_where_an_archive_breaks_off(script, tmp_path):
    whole = tar_bytes([member for i in range(10) for member in pair(f"{i}")])
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"7.png") + 700])
    args = ("--source", tmp_path / "cut.tar", "--shard_size=4", "--out")
    prepare(*args, tmp_path / "one")
    script("prepare_latents.py", *args, tmp_path / "two", processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [line["reason"][:7] for line in lines_of(tmp_path / "one/skipped.jsonl")] == ["cut off", "the arc"]


def test_a_pictures_draw_from_its_posterior_depends_on_its_name_alone(tmp_path):
    config = {"block_out_channels": [32], "latent_channels": 4, "scaling_factor": 1.0}
    write(tmp_path, {"vae/config.json": json.dumps(config).encode()})
    torch.manual_seed(0)
    save_file(KLAutoencoder(config).state_dict(), tmp_path / "vae/diffusion_pytorch_model.safetensors")
    for name in "abc":
        write(tmp_path, {f"in/{name}.png": PNG, f"in/{name}.txt": b"the same picture"})
    for n in (1, 2):
        prepare("--source", tmp_path / "in", "--vae", tmp_path / "vae", "--out", tmp_path / f"{n}", f"--batch_size={n}")
    one, two = (Dataset(tmp_path / n, 32).rows(range(3))[0].astype(np.float32) for n in "12")
    np.testing.assert_allclose(one, two, atol=0.01)
    assert abs(one[0] - one[1]).mean() > 0.5 and abs(one[1] - one[2]).mean() > 0.5


@pytest.mark.parametrize("args, words", [
    (["--source=nowhere"], "no source nowhere"), (["--source={tmp}/empty"], "no pictures"),
    (["--source={tmp}/bad"], "skipped.jsonl"), (["--captions={tmp}/none.json"], "no captions file"),
    (["--vae=none"], "unknown autoencoder 'none'"), (["--text_encoder=none"], "unknown text encoder 'none'"),
    (["--resolutions=31"], "not a multiple of 2"), (["--shard_size=0"], "shard_size is 0"),
    (["--limit=-1"], "limit is -1"), (["--caption_dtype=float8"], "caption_dtype is 'float8'"),
    (["--device=abacus"], "this machine has"), (["--source={tmp}/d"], "out is the source"),
])
def test_bad_arguments(tmp_path, args, words):
    (tmp_path / "empty").mkdir()
    write(tmp_path, {"bad/a.png": b"x"})
    with pytest.raises(SystemExit, match=words):
        prepare("--out", tmp_path / "d", *[a.format(tmp=tmp_path) for a in args])
    assert "skipped.jsonl" in words or not (tmp_path / "d").exists()


def test_a_source_that_changes_on_the_way_is_refused(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    write(source, {"0.png": PNG})
    with pytest.raises(SystemExit, match="1 x no caption"):
        prepare("--source", source, "--out", out)
    (source / "0.txt").write_text("now it has one")  # which is seen, as nothing was finished
    prepare("--source", source, "--out", out)
    assert Dataset(out, 16).texts([0]) == ["now it has one"]
    info = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps(info | {"complete": False}))
    write(source, {"00.png": PNG})
    with pytest.raises(SystemExit, match="has changed since"):
        prepare("--source", source, "--out", out)


def test_disk_full_while_writing_a_shard_keeps_what_was_there(small_disk):
    disk = small_disk(2)
    args = ("--out", disk / "d", "--limit=400", "--shard_size=50", "--resolutions=32")
    with pytest.raises(SystemExit, match="would need about 0.004 GB.*--caption_dtype int8"):
        prepare(*args)
    assert not (disk / "d").exists()
    with pytest.raises(SystemExit, match="disk full.*goes on from there"):
        prepare(*args, "--ignore_disk")
    assert list((disk / "d").glob("*.done.json")) and not list((disk / "d").glob("*.tmp"))
    with pytest.raises(ValueError, match="partly prepared"):
        Dataset(disk / "d", 16)
    os.system(f"mount -o remount,size=20m {disk}")
    prepare(*args)
    assert Dataset(disk / "d", 16).texts(range(400)) == [shapes.scene(i)[1] for i in range(400)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_write_atomic_leaves_the_old_file(tmp_path, code):
    files.write_atomic(tmp_path / "f", lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(code, "full")

    with pytest.raises(files.DiskFull, match="disk full while writing .*f"):
        files.write_atomic(tmp_path / "f", fail)
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_damaged_or_missing_parts_are_named(drawn, tmp_path):
    out, captions = tmp_path / "d", tmp_path / "d/00000.captions.npy"
    shutil.copytree(drawn, out)
    good, data = captions.read_bytes(), Dataset(out, 8)
    np.save(tmp_path / "other.npy", np.zeros((19, 16, 128), np.float16))
    os.truncate(captions, 5000)  # after it was opened
    with pytest.raises(ValueError, match="captions.npy is cut short: row 8"):
        data.rows([8])
    cut = "00000.captions.npy is missing or cut short"
    for damage, size, message in (
            (good[:-1], 8, cut), (good[:50], 8, cut), (b"", 8, cut),
            ((tmp_path / "other.npy").read_bytes(), 8, "dataset.json says float16 \\(20, 16, 128\\)"),
            (good, 4, "latents of size 8 \\(16 px\\), 16 \\(32 px\\), not 4.*--resolutions 8")):
        captions.write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            Dataset(out, size)
    (out / "00000.latents16.npy").unlink()
    with pytest.raises(ValueError, match="00000.latents16.npy is missing"):
        Dataset(out, 8)
    (out / "dataset.json").write_text('{"format": ')
    for folder, message in ((out, "not readable JSON"), (tmp_path / "no", "no prepared data in .*prepare_latents.py")):
        with pytest.raises(ValueError, match=message):
            Dataset(folder, 8)


def test_pixels_is_lossless():
    vae, images = encoders.load_vae("pixels"), torch.rand(2, 3, 8, 12) * 2 - 1
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


def test_captions_in_8_bits(drawn, tmp_path):
    prepare(*DRAWN, "--out", tmp_path / "int8", "--caption_dtype=int8")
    (a, x), (b, y) = (Dataset(folder, 8).rows([39, 0, 15, 16, 17]) for folder in (drawn, tmp_path / "int8"))
    np.testing.assert_array_equal(a, b)
    assert 0 < np.abs(y - x.astype(np.float32)).max() <= np.abs(x).max() / 127 * 0.51
    small, large = (sum(path.stat().st_size for path in folder.glob("*.npy") if "latents" not in path.name)
                    for folder in (tmp_path / "int8", drawn))
    assert small < 0.55 * large
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


def test_several_folders_are_one_set(tmp_path):
    for name, args in (("a", ("--limit=23",)), ("b", ("--limit=17", "--first_seed=500")),
                       ("c", ("--limit=9", "--caption_dtype=int8"))):
        prepare("--out", tmp_path / name, *args, "--resolutions=16", "--shard_size=10")
    a, b = Dataset(tmp_path / "a", 8), Dataset(tmp_path / "b", 8)
    for path in (tmp_path / "b").glob("*.rows.jsonl"):
        sizes = cycle([{"width": 600, "height": 512}, {"width": 2000, "height": 511}, {"width": 511, "height": 2000}])
        path.write_text("".join(json.dumps(row | size) + "\n" for row, size in zip(lines_of(path), sizes)))
    both = Dataset([tmp_path / "a", f"{tmp_path / 'b'}@512"], 8)
    kept = [i for i in range(17) if (i % 10) % 3 == 0]
    assert len(both) == 23 + len(kept) and both.texts([22, 0]) == a.texts([22, 0])
    order = np.random.default_rng(0).permutation(len(both))
    for row, latent, caption, text in zip(order, *both.rows(order), both.texts(order)):
        source, local = (a, row) if row < 23 else (b, kept[row - 23])
        expected = source.rows([local])
        np.testing.assert_array_equal(latent, expected[0][0])
        np.testing.assert_array_equal(caption, expected[1][0])
        assert text == source.texts([local])[0]
    rows, held = ([*part[np.arange(len(part))]] for part in both.split(4))
    assert sorted(rows + held) == list(range(len(both))) and min(held) < 23 <= max(held)
    for folders, message in (([tmp_path / "a", f"{tmp_path / 'b'}@3000"], "b@3000 has no rows with a short side"),
                             ([tmp_path / "a", tmp_path / "c"], "differ in caption_dtype")):
        with pytest.raises(ValueError, match=message):
            Dataset(folders, 8)


def test_mirrored_and_moved_copies(tmp_path):
    rows = [np.asarray(shapes.scene(i, size=24)[0], float) for i in range(3)]
    for i, row in enumerate(rows):
        write(tmp_path / "photos", {f"{i}.png": encoded(Image.fromarray(row.astype(np.uint8)), "PNG"),
                                    f"{i}.txt": f"picture {i}".encode()})
    prepare("--source", tmp_path / "photos", "--out", tmp_path / "d", "--resolutions=24", "--flips", "--shifts=2",
            "--batch_size=5", "--shard_size=2")
    data = Dataset(tmp_path / "d", 12)
    assert len(data) == 12 and data.texts(range(12)) == [f"picture {i}" for i in range(3) for _ in range(4)]
    names = [row["source"] for row in lines_of(tmp_path / "d/00000.rows.jsonl")][:4]
    assert names == ["0.png", "0.png mirrored", "0.png moved 1", "0.png moved 2"]
    for i, row in enumerate(rows):
        plain, mirrored, *shifted = [pixels(x, 1.36) for x in data.rows(range(4 * i, 4 * i + 4))[0]]
        assert np.abs(plain - row).max() < 1 and np.abs(mirrored - row[:, ::-1]).max() < 1
        for picture, original in zip(shifted, (row, row[:, ::-1])):
            aside = [np.pad(original, ((2, 2), (2, 2), (0, 0)), "edge")[y:y + 24, x:x + 24]
                     for y in range(5) for x in range(5)]
            assert min(np.abs(picture - a).max() for a in aside) < 1
