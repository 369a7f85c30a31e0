"""evaluation/prompts.py: captions files, which captions are chosen, and captions of pictures that are there already."""
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_sources import PNG, pair, tar_bytes, write

from evaluation import prompts


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


COCO = {"images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((1, "b1"), (0, "a1"), (0, "a2"))]}


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "\ufeffone\n\n two \r\nthree\u2028and a half\x0cend\n",
     [("", "one"), ("", "two"), ("", "three"), ("", "and a half"), ("", "end")]),
    ("utf-16.txt", "a caf\u00e9\ntwo".encode("utf-16"), [("", "a caf\u00e9"), ("", "two")]),
    ("joined.txt", "one\n\ufefftwo\n", [("", "one"), ("", "two")]),
    ("PartiPrompts.tsv", "Prompt\tCategory\tNote\na dog\tx\ty\na dog\tx\ty\n", [("", "a dog"), ("", "a dog")]),
    ("dpg_bench.csv", 'item_id,text,tuple\n1,"a, b",x\n1,"a, b",y\n2,c,z\n', [("1", "a, b"), ("2", "c")]),
    ("semicolons.csv", "\ufeffid;Caption\n1;a, b\n", [("", "a, b")]),
    ("list.json", '["a cat", "a dog"]', [("", "a cat"), ("", "a dog")]),
    ("prompts.json", '{"prompts": ["a cat", "a dog"]}', [("", "a cat"), ("", "a dog")]),
    ("lists.jsonl", '{"prompt": ["x", "y"]}', [("", "x")]),
    ("coco.json", json.dumps(COCO), [("a.jpg", "a1"), ("b.jpg", "b1")]),  # the first caption of each picture
    ("list.csv", "image,caption\na.jpg,\na.jpg,a2\na.jpg,a3\n", [("a.jpg", "a2")]),
    ("texts.jsonl", '{"caption": "x"}\n' * 2, [("", "x"), ("", "x")])])
def test_captions_files(tmp_path, name, content, expected):
    assert [(p.picture, p.caption) for p in prompts.read_prompts(written(tmp_path / name, content))] == expected


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "caf\u00e9".encode("latin-1"), "entry 1 is neither UTF-8 nor"),
    ("unmarked.txt", "a cat".encode("utf-16-le"), "entry 1 is neither UTF-8 nor"),
    ("a.txt", "\n \n", "it is empty"),
    ("a.csv", "id,label\n1,x\n", "its columns are id, label. Captions are read from caption, prompt"),
    ("a.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": ["x"]}', "cannot be used")])
def test_files_that_will_not_do(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        prompts.read_prompts(written(tmp_path / name, content))


def test_prompts_are_the_captions_beside_pictures_too(tmp_path):
    files = {file: data for name in ("b", "x/a") for file, data in pair(name)} | {"none.png": PNG}
    write(tmp_path, {f"in/{file}": data for file, data in files.items()} | {"no/a.png": PNG})
    write(tmp_path, {"a.tar": tar_bytes(files.items())})
    for source, start in (("in", ""), ("a.tar", "a.tar/")):
        found = [(p.picture, p.caption) for p in prompts.read_prompts(str(tmp_path / source))]
        assert found == [(f"{start}b.png", "b"), (f"{start}x/a.png", "x/a")]
    write(tmp_path, {"dpg/0.txt": b"one\n", "dpg/1.txt": b"two"})
    assert [p.caption for p in prompts.read_prompts(str(tmp_path / "dpg"))] == ["one", "two"]
    with pytest.raises(ValueError, match="no is no file of prompts"):
        prompts.read_prompts(str(tmp_path / "no"))


def test_the_choice_is_always_the_same_and_keeps_the_order():
    every = [prompts.Prompt(str(i)) for i in range(100)]
    some = [int(p.caption) for p in prompts.choose(every, 10)]
    assert some == [25, 35, 40, 46, 52, 56, 70, 71, 75, 97]  # for good: published numbers may rest on it
    assert prompts.choose(every, 0) == prompts.choose(every, 100) == every


def test_captions_of_pictures(tmp_path):
    for name, chunks in (("1", {"prompt": "of sample.py", "seed": "1"}), ("2", {"prompt": '{"3": {}}'}), ("10", {})):
        info = PngInfo()
        for key, value in chunks.items():
            info.add_itxt(key, value)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=info)
        written(tmp_path / f"{name}.txt", f"beside {name}")
    paths = prompts.pictures_of(tmp_path)
    assert [path.name for path in paths] == ["1.png", "2.png", "10.png"]

    def found(source, paths=paths[:2]):
        return [prompt.caption for prompt in prompts.prompts_of(tmp_path, paths, str(source))]

    assert found("", paths[:1]) == ["of sample.py"] and found(tmp_path) == ["beside 1", "beside 2"]
    assert found(written(tmp_path / "t.json", json.dumps({"1.png": "one", "2.png": "two"}))) == ["one", "two"]
    assert found(written(tmp_path / "a.TXT", "x\ny")) == ["x", "y"]
    for source, message in (("", "1 of 2 .* no caption.*2.png"), (tmp_path / "1.txt", "1 prompts, and .* 2 pic")):
        with pytest.raises(ValueError, match=message):
            found(source)
