"""prepare_latents.py and the prepared folder: from pictures and captions to memmaps and back."""
import json
import os
import shutil
from collections import Counter
from itertools import count, cycle

import numpy as np
import pytest
import torch
from conftest import ROOT, launch
from PIL import Image
from safetensors.torch import save_file
from test_sources import PNG, encoded, noise, pair, prepare, tar_bytes, write

import encoders
import prepare_latents
from encoders.text import vector_of
from encoders.vae import KLAutoencoder
from pictures import prepared, shapes
from pictures.prepared import Dataset, decoded_captions
from pictures.sources import shapes_parts

SHAPES = ("--limit=50", "--resolutions", 16, 32)


@pytest.fixture(autouse=True)
def shards_of_20(monkeypatch):
    monkeypatch.setattr(prepared, "SHARD_SIZE", 20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """50 pictures of the built-in set in three shards"""
    folder = tmp_path_factory.mktemp("shapes") / "d"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SHARD_SIZE", 20)
        prepare("--out", folder, *SHAPES)
    assert [shard["rows"] for shard in Dataset(folder, 8).info["shards"]] == [20, 20, 10]
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pixels(row):
    """The picture (H,W,3) in a row of latents"""
    images = encoders.load_vae("pixels").decode(torch.from_numpy(np.array(row)).float()[None])[0]
    return ((images + 1) * 127.5).permute(1, 2, 0).numpy()


def rows_of(data, ids):
    batch = data.read(ids)
    return batch["latents"].numpy(), decoded_captions(batch).numpy()


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- what is written, and read again ---


def test_round_trip_of_the_built_in_set(whole):
    ids, data = [49, 0, 20, 19], Dataset(whole, 16)
    captions, (latents, embeddings) = data.texts(range(50)), rows_of(data, ids)
    assert len(data) == 50 and latents.dtype == embeddings.dtype == np.float16
    assert 0.75 < rows_of(Dataset(whole, 8), range(50))[0].astype(np.float32).std() < 1.05  # near sigma_data
    for i, latent, embedding in zip(ids, latents, embeddings):
        image, caption, _ = shapes.scene(i, two_objects=shapes.TRAINING_TWO_OBJECTS)
        assert captions[i] == caption
        np.testing.assert_allclose(embedding, encoders.load_text_encoder("words")([caption])[0], atol=2e-3)
        np.testing.assert_allclose(pixels(latent), np.asarray(image), atol=0.2)
    assert set(data.info["words"]) == {w for c in captions for w in encoders.words_of(c)}


def test_a_folder_with_good_and_bad_pictures(tmp_path):
    source, tall = tmp_path / "photos", noise(7, (32, 90))
    good = {"deep/plain.webp": encoded(noise(6), "WEBP"), "tall.bmp": encoded(tall, "BMP"), "a.png": PNG}
    bad = {"cut.png": PNG[:1000], "small.png": encoded(noise(2, (31, 60)))}
    write(source, good | bad | {"silent.png": PNG, "notes.md": b"x"})
    for name in good | bad:
        (source / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    with pytest.raises(ValueError, match="--source .*photos --out data/NAME"):
        Dataset(source, 16)
    printed = launch("prepare_latents.py", "--source", source, "--out", tmp_path / "d", "--workers=2")
    assert "1 x too small" in printed and "1 x no caption" in printed
    data = Dataset(tmp_path / "d", 16)
    captions = data.texts(range(len(data)))
    assert sorted(captions) == sorted(f"caption of {name}" for name in good)
    reasons = {line["source"]: line["reason"] for line in lines_of(tmp_path / "d/skipped.jsonl")}
    assert reasons.keys() == {*bad, "silent.png"} and "31 x 60" in reasons["small.png"]
    row = rows_of(data, [captions.index("caption of tall.bmp")])[0][0]
    np.testing.assert_allclose(pixels(row), np.asarray(tall.crop((0, 29, 32, 61))), atol=0.3)


def test_a_pictures_draw_from_its_posterior_depends_on_its_name_alone(tmp_path):
    config = {"block_out_channels": [32], "layers_per_block": 1, "latent_channels": 4, "scaling_factor": 1.0}
    write(tmp_path, {"vae/config.json": json.dumps(config).encode()})
    torch.manual_seed(0)
    save_file(KLAutoencoder(config).state_dict(), tmp_path / "vae/diffusion_pytorch_model.safetensors")
    for name in "abc":
        write(tmp_path, {f"in/{name}.png": PNG, f"in/{name}.txt": b"the same picture"})
    for n in (3, 2):
        prepare("--source", tmp_path / "in", "--vae", tmp_path / "vae", "--out", tmp_path / f"{n}")
        (tmp_path / "in/a.png").unlink(missing_ok=True)
    three, two = (rows_of(Dataset(tmp_path / n, 32), range(int(n)))[0].astype(np.float32) for n in "32")
    np.testing.assert_allclose(three[1:], two, atol=0.01)
    assert abs(three[0] - three[1]).mean() > 0.5 and abs(two[0] - two[1]).mean() > 0.5


def test_captions_in_8_bits(whole, tmp_path):
    prepare(*SHAPES, "--out", tmp_path / "int8", "--caption_dtype=int8")
    (a, x), (b, y) = (rows_of(Dataset(folder, 8), [39, 0, 15, 16, 17]) for folder in (whole, tmp_path / "int8"))
    np.testing.assert_array_equal(a, b)
    assert 0 < np.abs(y - x.astype(np.float32)).max() <= np.abs(x).max() / 127 * 0.51
    with pytest.raises(ValueError, match="differ in caption_dtype"):
        Dataset([whole, tmp_path / "int8"], 8)


def test_captions_of_another_length(whole, tmp_path, capsys):
    prepare(*SHAPES, "--out", tmp_path / "short", "--caption_length=7")
    assert "50 of the captions are longer than the 7 tokens" in capsys.readouterr().err
    (_, x), (_, y) = (rows_of(Dataset(folder, 8), range(50)) for folder in (whole, tmp_path / "short"))
    np.testing.assert_array_equal(x[:, :7], y)
    with pytest.raises(ValueError, match="length: 16 there, 7 now"):
        Dataset([whole, tmp_path / "short"], 8)


def test_mirrored_and_moved_copies_go_with_their_picture(tmp_path):
    rows = [np.asarray(shapes.scene(i, size=24)[0], float) for i in range(25)]
    for i, row in enumerate(rows):
        write(tmp_path / "photos", {f"{i:02d}.png": encoded(Image.fromarray(row.astype(np.uint8)), "PNG"),
                                    f"{i:02d}.txt": f"picture {i}".encode()})
    prepare("--source", tmp_path / "photos", "--out", tmp_path / "d", "--resolutions=24", "--flips", "--shifts=2")
    data = Dataset(tmp_path / "d", 12)
    assert [shard["name"] for shard in data.info["shards"]] == ["00000", *(f"00000-000{i}" for i in (1, 2, 3)), "00001"]
    assert len(data) == 100 and data.texts(range(100)) == [f"picture {i}" for i in range(25) for _ in range(4)]
    assert data.texts(range(4), "source") == ["00.png", "00.png mirrored", "00.png moved 1", "00.png moved 2"]
    for i, row in enumerate(rows[:3]):
        plain, mirrored, *shifted = [pixels(x) for x in rows_of(data, range(4 * i, 4 * i + 4))[0]]
        assert np.abs(plain - row).max() < 1 and np.abs(mirrored - row[:, ::-1]).max() < 1
        for picture, original in zip(shifted, (row, row[:, ::-1])):
            aside = [np.pad(original, ((2, 2), (2, 2), (0, 0)), "edge")[y:y + 24, x:x + 24]
                     for y in range(5) for x in range(5)]
            assert min(np.abs(picture - a).max() for a in aside) < 1
    train, held = data.split(1000)
    assert data.texts(held[np.arange(2)], "source") == ["06.png", "18.png"] and len(held) == 2
    assert {*data.texts(train[np.arange(len(train))])} == {f"picture {i}" for i in range(25) if i not in (6, 18)}


def test_held_out_are_pictures_of_every_class_of_a_sorted_set():
    data = Dataset.__new__(Dataset)  # of any number of rows
    for n, expected in ((1, 1), (9, 1), (40, 4), (160, 16), (1000, 16), (5000, 50), (37_000_000, 2048)):
        data.starts, data.pictures = np.array([0, n]), [(0, n, False)]
        train, held = data.split(2048)
        held = held[np.arange(len(held))]
        assert len({*held.tolist()}) == len(held) == expected and len(train) == n - expected
        if n >= 10:
            assert held[0] < n / expected and n - 1.5 * n / expected - expected < held[-1] < n - 1
            i = np.random.default_rng(0).integers(0, len(train), 1000)
            assert not np.isin(train[i], held).any() and (np.diff(train[np.sort(i)]) >= np.diff(np.sort(i))).all()
            assert train[np.array([0, len(train) - 1])].tolist() == [0, n - 1]


def test_several_folders_are_one_set(tmp_path):
    for name, n in (("a", 23), ("b", 17)):
        prepare("--out", tmp_path / name, f"--limit={n}", "--resolutions=16")
    sizes = cycle([{"width": 600, "height": 512}, {"width": 2000, "height": 511}, {"width": 511, "height": 2000}])
    path = tmp_path / "b/00000.rows.jsonl"
    path.write_text("".join(json.dumps(row | size) + "\n" for row, size in zip(lines_of(path), sizes)))
    both = Dataset([tmp_path / "a", f"{tmp_path / 'b'}@512"], 8)
    rows = [*((tmp_path / "a", i) for i in range(23)), *((tmp_path / "b", i) for i in range(0, 17, 3))]
    order = np.random.default_rng(0).permutation(len(both))
    for i, latent, caption, text in zip(order, *rows_of(both, order), both.texts(order)):
        source, row = Dataset(rows[i][0], 8), rows[i][1]
        expected = rows_of(source, [row])
        assert (latent == expected[0]).all() and (caption == expected[1]).all() and [text] == source.texts([row])
    train, held = both.split(4)
    train, held = ([*part[np.arange(len(part))]] for part in (train, held))
    assert sorted(train + held) == list(range(len(rows))) and len(held) == 3 and min(held) < 23 <= max(held)


def test_words_are_fixed_vectors_with_positions():
    encode = encoders.load_text_encoder("words")
    a, b, c, empty = encode(["red circle", "Circle, RED!", "red  circle.", ""])
    assert a.shape == (16, 128) and torch.equal(a, c) and (empty == 0).all() and (a[2:] == 0).all()
    torch.testing.assert_close(a[0] + a[1], b[0] + b[1])  # a word's vector and a position's, in either order
    # the same on every machine: these numbers are part of the format of checkpoints
    assert [round(v, 4) for v in vector_of("red")[:4].tolist()] == [-0.751, -0.6834, -0.9675, -0.3992]


# --- a folder belongs to one command ---


def interrupt(shards, *args):
    """Prepare until so many shards are written"""
    numbers, write_shard = count(), prepared.write_shard

    def failing(*values):
        if next(numbers) == shards:
            raise OSError("the disk is gone")
        write_shard(*values)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(prepared, "write_shard", failing)
        prepare(*args)


def test_started_again_it_goes_on_with_the_parts_that_are_not_finished(tmp_path, capsys):
    whole, out, args = tmp_path / "whole", tmp_path / "d", (*SHAPES, "--flips", "--out")  # two shards in a part
    prepare(*args, whole)
    interrupt(3, *args, out)
    (out / "00002.captions.npy").write_bytes(b"cut")
    (out / ".00002.captions.npy.tmp").mkdir()
    with pytest.raises(ValueError, match="only partly prepared"):
        Dataset(out, 8)
    before = [(out / f"{name}.captions.npy").stat().st_mtime_ns for name in ("00000-0001", "00001")]
    prepare(*args, out)
    after = [(out / f"{name}.captions.npy").stat().st_mtime_ns for name in ("00000-0001", "00001")]
    assert before[0] == after[0] and before[1] < after[1] and contents(out) == contents(whole)
    (out / "00000.done.json").write_text("a kill at the very end leaves it")
    prepare(*args, out, "--workers=1", "--device=cpu")
    assert "already prepared: 100 rows" in capsys.readouterr().out and contents(out) == contents(whole)


@pytest.mark.parametrize("args, words", [
    ("--limit=49", "limit: 50 there, 49 now"), ("--caption_dtype=int8", "caption_dtype"),
    ("--source={tmp}/photos", "source: 'shapes' there"), ("--source={tmp}/d", "out is the source"),
    ("--source=nowhere", "no source nowhere"), ("--source={tmp}/empty", "no source"),
    ("--captions={tmp}/none.json", "none.json cannot be used"), ("--vae=none", "neither here nor"),
    ("--resolutions=31", "needs multiples of 2"), ("--device=abacus", "this machine has")])
def test_commands_that_are_refused_change_nothing(whole, tmp_path, args, words):
    out = shutil.copytree(whole, tmp_path / "d")
    write(tmp_path, {"photos/a.png": PNG, "photos/a.txt": b"a", "empty/x.md": b"", "d/mine.tar": b"mine"})
    before = contents(out)
    assert words in launch("prepare_latents.py", *SHAPES, "--out", out, args.format(tmp=tmp_path), fails=True)
    assert contents(out) == before


def test_a_folder_of_the_version_before(tmp_path):
    args, new = ("--limit=12", "--resolutions=16", "--out"), tmp_path / "new"
    done, part = (shutil.copytree(ROOT / "tests/data/before/data", tmp_path / name) for name in ("done", "part"))
    assert "already prepared: 12 rows" in launch("prepare_latents.py", *args, done)
    change(part / "dataset.json", complete=False, shards=[], rows=0)
    (part / "00000.done.json").write_text('{"part": 0, "shard": 0, "last": true, "rows": 12}')
    (part / "00000.skipped.jsonl").touch()
    for folder in (part, new):
        launch("prepare_latents.py", *args, folder)
    assert contents(part).keys() == contents(new).keys() and all(
        contents(part)[f"00000.{kind}"] == contents(new)[f"00000.{kind}"]
        for kind in ("latents16.npy", "captions.npy", "rows.jsonl"))
    settings = json.loads((done / "dataset.json").read_text())["settings"]
    change(done / "dataset.json", settings=settings | {"min_size": 512})
    assert "min_size: 512 there, 0 now" in launch("prepare_latents.py", *args, done, fails=True)


def test_the_built_in_set_of_another_version_is_refused(whole, tmp_path):
    """Its scenes had other shares of two objects, and their names say so."""
    out = shutil.copytree(whole, tmp_path / "d")
    change(out / "dataset.json", **{"names in the source": "0" * 16})
    assert "names in the source: another one now" in launch("prepare_latents.py", *SHAPES, "--out", out, fails=True)
    names = {name for part in shapes_parts(9, 8, 9) for name in part.names}
    assert names == {f"shapes/{shapes.TRAINING_TWO_OBJECTS}/{i}" for i in range(9)}


def test_the_number_of_processes_changes_nothing_even_where_an_archive_breaks_off(tmp_path):
    tar = tar_bytes([member for i in range(10) for member in pair(f"{i}")])
    write(tmp_path / "in", {f"{name}.tar": tar for name in "ac"} | {"b.tar": tar[: tar.index(b"7.png") + 700]})
    args = ("--source", tmp_path / "in", "--out")
    for name in ("part", "other"):
        interrupt(1, *args, tmp_path / name)
    for name, n in (("1", 1), ("2", 2), ("part", 2)):
        launch("prepare_latents.py", *args, tmp_path / name, processes=n)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "part")
    reasons = [line["reason"][:11] for line in lines_of(tmp_path / "1/skipped.jsonl")]
    assert reasons == ["cannot be r", "the archive"]
    (tmp_path / "in/c.tar").unlink()
    for name in ("1", "other"):  # a complete one and one that is not
        message = launch("prepare_latents.py", *args, tmp_path / name, fails=True)
        assert "another command (number in the source: 3 there, 2 now; names in the source: another" in message


CHANGES = {  # what may change in a source of pictures, how, and what is said of it
    "exchanged": (lambda f: write(f, {"in/0.png": encoded(noise(9, (50, 36)))}), "sizes in the source: another"),
    "touched": (lambda f: os.utime(f / "in/0.png", (1, 1)), "times in the source"),
    "added": (lambda f: write(f, {"in/x/9.png": PNG, "in/x/9.txt": b"9"}), "number in the source: 3 there, 4 now"),
    "renamed": (lambda f: (f / "in/0.png").rename(f / "in/5.png"), "names in the source"),
    "a caption": (lambda f: write(f, {"in/0.txt": b"another"}), "captions in the source"),
    "a caption's name": (lambda f: (f / "in/2.txt").rename(f / "in/1.caption"), "captions in the source"),
    "the table": (lambda f: write(f, {"a.csv": b"image,caption\n0.png,another\n"}), "captions in the source"),
    "an archive": (lambda f: write(f, {"a.tar": tar_bytes(pair("4"))}), "times in the source")}


@pytest.mark.parametrize("name", CHANGES)
def test_a_source_that_has_changed_is_noticed(name, tmp_path, capsys):
    change, words = CHANGES[name]
    write(tmp_path, {f"in/{file}": data for i in range(3) for file, data in pair(f"{i}")})
    write(tmp_path, {"a.csv": b"image,caption\n0.png,one\n", "a.tar": tar_bytes(pair("3"))})
    source = tmp_path / ("a.tar" if name == "an archive" else "in")
    args = ["--source", source, "--out", tmp_path / "d", *([f"--captions={tmp_path}/a.csv"] * (name == "the table"))]
    prepare(*args)
    prepare(*args)
    assert "is already prepared" in capsys.readouterr().out
    before = contents(tmp_path / "d")
    change(tmp_path)
    with pytest.raises(SystemExit):
        prepare(*args)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message and "delete it to begin again" in message and contents(tmp_path / "d") == before


# --- captions ---


def test_a_folder_for_each_class(tmp_path, capsys):
    write(tmp_path, {f"in/train/{name}/{i}.png": PNG for name in ("t-shirt", "hot_dog") for i in range(3)})
    write(tmp_path, {"in/train/t-shirt/0.txt": b"its own", "top/0.png": PNG, "a.tar": tar_bytes([("cat/0.png", PNG)])})
    args = ("--source", tmp_path / "in", "--out")
    prepare(*args, tmp_path / "some")
    message = capsys.readouterr().out.strip().splitlines()[-1]
    assert 'have no caption, for example train/hot_dog/0.png, train/hot_dog/1.png, ' in message
    assert message.endswith('give --folder_captions "a photo of a {}"')
    for source, expected in (("in", {"its own": 1, "a photo of a t-shirt": 2, "a photo of a hot dog": 3}),
                             ("a.tar", {"a photo of a cat": 1})):
        prepare("--source", tmp_path / source, "--folder_captions", "a photo of a {}", "--out", tmp_path / "d" / source)
        data = Dataset(tmp_path / "d" / source, 16)
        assert Counter(data.texts(range(len(data)))) == expected
    with pytest.raises(SystemExit):
        prepare("--source", tmp_path / "top", "--folder_captions", "a photo of a {}", "--out", tmp_path / "no")
    assert "none of the pictures" in capsys.readouterr().err


@pytest.mark.parametrize("files, args, words", [
    ({"in/a.png": PNG, "in/a.xml": b"x", "in/b.png": PNG, "in/metadata.csv": b"x"}, (),
     ("for example a.png, b.png. Beside them lie .xml, .csv; captions are read from .txt, .caption, .json of the",
      "--captions F")),
    ({"in/a.tar": tar_bytes([("a.png", PNG), ("a.cls", b"5"), ("b.png", PNG)])}, (),
     ("a.tar/a.png", "lie .cls; captions are read")),
    ({"in/a.png": PNG, "t.csv": b"image,caption\nx/1.png,one\nx/2.png,two\n"}, ("--captions={tmp}/t.csv",),
     ("for example a.png. The table names x/1.png, x/2.png",))])
def test_where_most_pictures_have_no_caption_it_says_what_was_seen(files, args, words, tmp_path, capsys):
    write(tmp_path, files)
    with pytest.raises(SystemExit):
        prepare("--source", tmp_path / "in", "--out", tmp_path / "d", *(arg.format(tmp=tmp_path) for arg in args))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in ("none of the pictures", *words)), message


def test_a_caption_that_fits_two_pictures_is_refused_before_anything_is_written(tmp_path):
    write(tmp_path, {"in/cat/000.png": PNG, "in/dog/000.png": PNG, "t.csv": b"image,caption\n000.png,a cat\n"})
    message = launch("prepare_latents.py", "--source", tmp_path / "in", "--captions", tmp_path / "t.csv", "--out",
                     tmp_path / "d", fails=True)
    assert "fits both" in message and "cat/000.png and" in message and not (tmp_path / "d").exists()


def test_a_caption_that_fits_pictures_of_two_archives_is_refused_always(tmp_path):
    """By one process as it meets them, by the same command again, and by two processes"""
    for name in "ab":
        write(tmp_path, {f"in/{name}.tar": tar_bytes([(f"{i}.png", PNG) for i in range(3)])})
    write(tmp_path, {"t.csv": b"image,caption\n0.png,a cat\n"})
    for processes in (1, 1, 2):
        message = launch("prepare_latents.py", "--source", tmp_path / "in", "--captions", tmp_path / "t.csv", "--out",
                         tmp_path / "d", processes=processes, fails=True)
        assert "fits both" in message and "a.tar/0.png" in message and "b.tar/0.png" in message
    assert not json.loads((tmp_path / "d/dataset.json").read_text())["complete"]


def test_formats_that_are_not_read_and_captions_that_are_cut_are_counted(tmp_path):
    write(tmp_path, dict(file for i in range(3) for file in pair(f"in/{i}")) | {"in/a.heic": b"", "in/b.HEIC": b""})
    write(tmp_path, {"in/0.txt": b"word " * 17, "in/1.txt": b"word " * 16})
    printed = launch("prepare_latents.py", "--source", tmp_path / "in", "--out", tmp_path / "d")
    assert "3 rows, skipped 2 x .heic is not read, convert it to .jpg or .png" in printed
    assert "1 of the captions are longer than the 16 tokens that the text encoder reads" in printed


# --- what goes wrong ---


@pytest.mark.parametrize("kind, content, words", [
    ("captions.npy", lambda good: good[:-1], "00000.captions.npy cannot be used"),
    ("captions.npy", None, "00000.captions.npy cannot be used"),
    ("captions.npy", lambda good: good.replace(b"(20,", b"(19,"), r"dataset.json says float16 \(20, 16, 128\)"),
    ("rows.jsonl", lambda good: good[:99], "rows.jsonl cannot be used"),
    ("rows.jsonl", lambda good: b"{}\n" * 20, "rows.jsonl cannot be used")])
def test_damaged_or_missing_parts_are_named(whole, tmp_path, kind, content, words):
    path = shutil.copytree(whole, tmp_path / "d") / f"00000.{kind}"
    good = path.read_bytes()
    path.unlink()
    if content:
        path.write_bytes(content(good))
    with pytest.raises(ValueError, match=words) as error:
        Dataset(tmp_path / "d", 8).texts([0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [
    {"format": "another"}, {"resolutions": 32}, {"shards": [{"name": "00000", "rows": 10 ** 18}]},
    {"shards": [{"name": "../other/00000", "rows": 20}]}, {"shards": [{"rows": 20}]}, {"rows": "x"}, {"complete": "no"},
    "[" * 10_000, {"vae": {"latent_channels": 12, "downsample": 0}}, {"text_encoder": {"length": 16, "dim": -8}}])
def test_whatever_dataset_json_says_ends_in_one_line_that_names_the_folder(whole, tmp_path, values):
    out, _ = (shutil.copytree(whole, tmp_path / name, copy_function=os.link) for name in ("d", "other"))
    info = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").unlink()
    (out / "dataset.json").write_text(values if isinstance(values, str) else json.dumps(info | values))
    with pytest.raises(ValueError, match=f"^{out}") as error:
        Dataset(out, 8)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_numbers_that_are_not_finite(tmp_path, monkeypatch):
    class Odd:
        def encode(self, images, generators):
            return torch.where(images[:, :1, :8, :8] > 0.9, torch.inf, images[:, :, :8, :8])
    monkeypatch.setattr(prepare_latents, "resolutions", (16,))
    monkeypatch.setattr(prepare_latents, "BATCH_SIZE", 4)
    monkeypatch.setattr(prepare_latents, "load_models", lambda: (Odd(), lambda texts: torch.ones(len(texts), 2), "cpu"))
    pictures = [([np.full((16, 16, 3), color, np.uint8)], {"caption": "a", "source": f"{i}.png"})
                for i, color in enumerate((0, 0, 255, 30, 90))]
    skipped = []
    batches = list(prepare_latents.encode_batches(iter(pictures), skipped))
    assert skipped == [{"source": "2.png", "reason": "its latents or embeddings are not finite"}]
    assert [row["source"] for rows, _ in batches for row in rows] == [f"{i}.png" for i in (0, 1, 3, 4)]
    prepare("--limit=3", "--out", tmp_path / "read")  # what the disk has damaged is noticed when it is read
    path = tmp_path / "read/00000.latents32.npy"
    array = np.load(path)
    array[1, 0, 0, 0] = np.nan
    np.save(path, array)
    data = Dataset(tmp_path / "read", 16)
    data.read([0, 1, 2])
    assert data.not_finite == [f"{path} row 1"]
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match="latents32.npy was cut short: row 2"):
        data.read([2])
