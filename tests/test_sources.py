"""sources.py: archives and captions files, in miniatures of the layouts that the published data sets have."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from pictures.captions import read_captions
from pictures.decode import Unusable, squares
from pictures.sources import estimated_count, find_source


def picture(seed=0, kind="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path, files):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def found(source, captions=None, root=""):
    """{name: caption} of the pictures that open, {name: reason} of the others"""
    good, bad = {}, {}
    find = read_captions(captions) if captions else None
    for part in find_source(str(source), 2, str(root)):
        for sample in part.samples(lambda position: True):
            for name, picture, caption in sample:
                try:
                    assert squares(picture, (8,), 8)[:2] == (8, 8)
                    good[name] = find(name) if find else caption
                except Unusable as error:
                    bad[name] = str(error)
    return good, bad


def test_diffusiondb_part(tmp_path):
    names = ["aa.png", "bb.png"]
    files = {n: picture(i) for i, n in enumerate(names)}
    files["part-000001.json"] = json.dumps({n: {"p": f"prompt of {n}", "se": 1, "c": 7.0} for n in names}).encode()
    write_zip(tmp_path / "part-000001.zip", files)
    good, bad = found(tmp_path)
    assert good == {f"part-000001.zip/{n}": f"prompt of {n}" for n in names} and not bad
    assert estimated_count(find_source(str(tmp_path), 100)) == 2


def test_tgz_of_img2dataset_and_a_json_without_a_caption(tmp_path):
    files = {}
    for i, meta in enumerate([{"caption": "one", "width": 8}, {"url": "x"}, {"caption": "three"}]):
        files |= {f"0000{i}.jpg": picture(i, "JPEG"), f"0000{i}.json": json.dumps(meta).encode()}
    write_tar(tmp_path / "00000.tgz", files)
    good, bad = found(tmp_path / "00000.tgz")
    assert list(good.values()) == ["one", None, "three"] and not bad


def test_captions_from_another_file_for_pictures_inside_tars(tmp_path):
    """SA1B's tars hold masks beside the pictures; their captions come from elsewhere, by picture name"""
    write_tar(
        tmp_path / "sa_000000.tar",
        {"./sa_1.jpg": picture(), "./sa_1.json": b'{"annotations": []}', "./sa_2.jpg": picture(2)},
    )
    (tmp_path / "llava.jsonl").write_text(
        '{"image": "sa_1.jpg", "caption": "a street"}\n{"image": "sa_9.jpg", "caption": "x"}\n'
    )
    good, _ = found(tmp_path / "sa_000000.tar", tmp_path / "llava.jsonl")
    assert list(good.values()) == ["a street", None]


COCO = {
    "images": [{"id": 7, "file_name": "COCO_val2014_7.jpg"}, {"id": 9, "file_name": "COCO_val2014_9.jpg"}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "first of 9 "},
        {"image_id": 7, "id": 2, "caption": "of 7"},
        {"image_id": 9, "id": 3, "caption": "second of 9"},
    ],
}
CAPTIONS_FILES = {
    "coco.json": (COCO, "COCO_val2014_9.jpg", "first of 9"),
    "textcaps.json": ({"data": [{"image_id": "0ab", "caption_str": "a sign"}]}, "train/0ab.jpg", "a sign"),
    "list.json": ([{"file_name": "x/1.png", "caption": "c"}], "deep/x/1.png", "c"),
    "by_name.json": ({"1.png": "plain", "2.png": {"p": "deep"}}, "part.zip/2.png", "deep"),
}


@pytest.mark.parametrize("name", CAPTIONS_FILES)
def test_captions_files(tmp_path, name):
    data, picture_name, caption = CAPTIONS_FILES[name]
    (tmp_path / name).write_text(json.dumps(data))
    (tmp_path / "pictures" / picture_name).parent.mkdir(parents=True)
    (tmp_path / "pictures" / picture_name).write_bytes(picture())
    assert found(tmp_path / "pictures", tmp_path / name) == ({picture_name: caption}, {})


def test_lines_and_tables(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"img_path": "./000/x.jpg", "prompt": "a \\"quoted\\" fox", "width": 3}\n\n')
    (tmp_path / "a.tsv").write_text("image\tcaption\nx.jpg\ttab, comma\n")
    (tmp_path / "a.csv").write_text('image,caption\nx.jpg,"one, two"\n')
    assert read_captions(tmp_path / "a.jsonl")("000.tgz/000/x.jpg") == 'a "quoted" fox'
    assert read_captions(tmp_path / "a.jsonl")("001/x.jpg") is None
    assert read_captions(tmp_path / "a.tsv")("deep/x.jpg") == "tab, comma"
    assert read_captions(tmp_path / "a.csv")("x.jpg") == "one, two"


@pytest.mark.parametrize(
    "name, text",
    [("a.json", "{"), ("a.tgz", "x"), ("a.zip", "x"), ("a.txt", ""), ("a.md", "x"), ("a.json", "[]"),
     ("a.json", "3"), ("a.json", '{"images": [{}], "annotations": []}'),
     ("a.jsonl", '{"image": "x"}\n'), ("a.jsonl", "no\n"), ("a.tsv", "x\ty\n1\t2\n"), ("a.json", "")],
)  # fmt: skip
def test_captions_files_that_hold_none_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="captions file"):
        read_captions(tmp_path / name)


def test_a_damaged_zip_gives_what_it_has_and_lists_the_rest(tmp_path):
    files = {f"{i}.png": picture(i) for i in range(3)} | {f"{i}.txt": b"caption" for i in range(3)} | {"odd.json": b"{"}
    write_zip(tmp_path / "a.zip", files)
    whole = (tmp_path / "a.zip").read_bytes()
    good, bad = found(tmp_path / "a.zip")
    assert len(good) == 3 and "odd.json cannot be read" in bad["a.zip"]
    at = whole.index(files["1.png"][30:60])
    (tmp_path / "a.zip").write_bytes(whole[:at] + b"\0" * 20 + whole[at + 20 :])
    good, bad = found(tmp_path / "a.zip")
    assert list(good) == ["a.zip/0.png", "a.zip/2.png"] and "cannot be read" in bad["a.zip"]
    (tmp_path / "a.zip").write_bytes(whole[: len(whole) // 2])
    good, bad = found(tmp_path / "a.zip")
    assert not good and "cannot be read" in bad["a.zip"]


def test_a_tgz_that_breaks_off_keeps_what_came_before(tmp_path):
    write_tar(
        tmp_path / "a.tgz",
        {f"{i}.png": np.random.default_rng(i).bytes(50_000) if i == 2 else picture(i) for i in range(3)},
    )
    whole = (tmp_path / "a.tgz").read_bytes()
    (tmp_path / "a.tgz").write_bytes(whole[: len(whole) // 2])
    good, bad = found(tmp_path / "a.tgz")
    assert list(good) == ["a.tgz/0.png", "a.tgz/1.png"] and "breaks off" in bad["a.tgz"]


def test_quotation_marks_in_a_tsv_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text(
        'image\tcaption\n1.png\t"Sunset over the bay\n2.png\ttwo\n3.png\t6" nails\n4.png\t"all"\n'
    )
    find = read_captions(tmp_path / "a.tsv")
    assert [find(f"{i}.png") for i in range(1, 5)] == ['"Sunset over the bay', "two", '6" nails', "all"]


def test_a_number_of_a_picture_is_not_the_name_of_another(tmp_path):
    (tmp_path / "a.json").write_text('[{"file_name": "9.png", "image_id": 3, "name": "3", "caption": "the nine"}]')
    find = read_captions(tmp_path / "a.json")
    assert find("9.png") == "the nine" and find("3.png") is None
    (tmp_path / "b.json").write_text(
        '{"images": [{"id": 1, "file_name": "1.png"}], "annotations": '
        '[{"image_id": 1, "caption": ""}, {"image_id": 1, "caption": "second"}]}'
    )
    assert read_captions(tmp_path / "b.json")("1.png") == "second"


def test_nsfw_scores_are_compared_in_their_own_precision(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from pictures.captions import harmless

    scores = {"a": (0.2, 0.2), "b": (0.2001, 0), "c": (0.1, float("nan")), "d": (0.1, None), "e": (2, 0)}
    columns = {
        f"{k}_nsfw": pa.array([s[i] for s in scores.values()], pa.float32()) for i, k in enumerate(("image", "prompt"))
    }
    parquet.write_table(pa.table({"image_name": list(scores)} | columns), tmp_path / "m.parquet")
    assert harmless(tmp_path / "m.parquet", 0.2) == {"a"}
    (tmp_path / "no.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="nsfw_scores .* cannot be read"):
        harmless(tmp_path / "no.parquet", 0.2)
