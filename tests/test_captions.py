"""pictures/captions.py: captions files."""
import json

import pytest
from test_sources import write

from pictures.captions import read_captions

ANNOTATIONS = [{"image_id": n, "caption": c} for n, c in ((9, ""), (9, "first of 9 "), (7, "of 7"), (9, "second"))]
COCO = {"images": [{"id": n, "file_name": f"COCO_val2014_{n}.jpg"} for n in (7, 9)], "annotations": ANNOTATIONS}
# (file, its text, {picture: caption})
CAPTIONS_FILES = [
    ("coco.json", json.dumps(COCO), {"COCO_val2014_9.jpg": "first of 9", "COCO_val2014_7.jpg": "of 7"}),
    ("textcaps.json", '{"data": [{"image_id": "0ab", "caption_str": "a sign"}]}', {"train/0ab.jpg": "a sign"}),
    ("list.json", '[{"file_name": "x/1.png", "caption": "c"}]', {"deep/x/1.png": "c", "1.png": None}),
    ("by_name.json", '{"1.png": "plain", "2": "deep"}', {"1.png": "plain", "part.zip/2.png": "deep"}),
    ("mac.csv", 'image,caption\rx.jpg,"one, two\nthree"\r', {"x.jpg": "one, two\nthree"}),
    ("a.jsonl", '{"img_path": "./000/x.jpg", "prompt": "a \\"quoted\\" fox"}\n\n{"image": 1}\nbroken\n',
     {"000.tgz/000/x.jpg": 'a "quoted" fox', "001/x.jpg": None}),
    ("a.tsv", 'image\tcaption\n1.png\t"Sunset over\n2.png\ttab, comma\n3.png\t6" nails\n4.png\t"all"\n',
     {"1.png": '"Sunset over', "deep/2.png": "tab, comma", "3.png": '6" nails', "4.png": "all"}),
    ("x/1.txt", " one\n", {"in.tar/x/1.png": "one", "2.png": None}), ("1.caption", "one", {"a/1.png": "one"}),
    ("open_clip.csv", "filepath\ttitle\nphotos/a/1.png\tone, two\n", {"/home/me/photos/a/1.png": "one, two"}),
    ("excel.csv", "Image;Caption\r\n1.png;one, two\r\n", {"deep/1.png": "one, two"}),
    ("laion.csv", 'URL,TEXT\nhttp://x.y/a/1.jpg?w=3,one\nhttp://x.y/b/2.jpg,two\nhttps://z.y/2.jpg,other\n',
     {"1.jpg": "one", "2.jpg": ""}),  # two pictures are called 2.jpg
    ("absolute.csv", "path,caption\n/home/me/a/1.png,one\nC:\\x\\2.png,two\n",
     {"/home/me/a/1.png": "one", "x/2.png": "two"}),
    ("windows.csv", 'file_name,text\ncat\\1.png,"a ""cat"""\n', {"photos/cat/1.png": 'a "cat"'}),
    ("accents.csv", "image,caption\nka\u0308se.png,cheese\n", {"k\u00e4se.png": "cheese"}),
    ("lists.jsonl", '{"image": "1.png", "caption": ["one", "two"]}\n{"file_name": "2.png", "caption": []}\n',
     {"1.png": "one", "2.png": None})]


@pytest.mark.parametrize("name, text, captions", CAPTIONS_FILES)
def test_captions_files(tmp_path, name, text, captions):
    write(tmp_path, {name: text.encode()})
    find = read_captions(tmp_path if name.endswith((".txt", ".caption")) else tmp_path / name)
    assert {picture: find(picture) for picture in captions} == captions


@pytest.mark.parametrize("name, text", [("a.csv", "image,caption\n000.png,a cat\n"), ("000.txt", "a cat"),
                                        ("a.json", '{"000": "a cat"}')])
def test_a_caption_that_fits_two_pictures_is_refused(tmp_path, name, text):
    write(tmp_path, {name: text.encode()})
    find = read_captions(tmp_path if name.endswith(".txt") else tmp_path / name)
    assert find("cat/000.png") == find("cat/000.png") == "a cat" and find("cat/001.png") is None
    assert name == "a.csv" or find("cat/000.jpg") == "a cat"  # the same name in the same folder
    with pytest.raises(ValueError, match="the caption of '000(.png)?' fits both cat/000.png and dog/000.png"):
        find("dog/000.png")


def test_a_caption_that_is_cut_by_a_comma_is_refused(tmp_path):
    write(tmp_path, {"a.csv": b"image,caption\n1.png,a red, big car\n"})
    with pytest.raises(ValueError, match="more columns than the header, .* big car.*put quotes around captions"):
        read_captions(tmp_path / "a.csv")


def test_a_table_without_known_columns_lists_its_columns(tmp_path):
    write(tmp_path, {"a.csv": b"id,label,split\n1,x,train\n"})
    with pytest.raises(ValueError, match="are id, label, split. Captions are read from caption, prompt,.* filepath"):
        read_captions(tmp_path / "a.csv")


@pytest.mark.parametrize("name, text", [
    ("a.json", "{"), ("a.tgz", "x"), ("a.zip", "x"), ("a.txt", ""), ("a.json", "[]"), ("a.jsonl", '{"image": "x"}\n'),
    ("a.json", '{"images": [{}], "annotations": []}'), ("a.tsv", "x\ty\n1\t2\n"), ("nothing.json", None)])
def test_captions_files_that_hold_none_are_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} cannot be used"):
        read_captions(tmp_path / name)
