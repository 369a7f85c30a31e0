"""evaluation/prompts.py: captions files, which captions are chosen, and captions of pictures that are there already."""
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation import prompts


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


COCO = {"images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("abc")],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((1, "b1"), (0, "a1"), (0, "a2"))]}


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "\ufeffone\n\n two \r\nthree\u2028and a half\x0cend\n",
     [("", "one"), ("", "two"), ("", "three\u2028and a half\x0cend")]),
    ("coco.json", json.dumps(COCO), [("a.jpg", "a1"), ("b.jpg", "b1")]),  # the first caption of each picture
    ("list.csv", "image,caption\na.jpg,\na.jpg,a2\na.jpg,a3\n", [("a.jpg", "a2")]),
    ("texts.jsonl", '{"caption": "x"}\n' * 2, [("", "x"), ("", "x")])])
def test_captions_files(tmp_path, name, content, expected):
    assert [(p.picture, p.caption) for p in prompts.read_prompts(written(tmp_path / name, content))] == expected


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "caf\u00e9".encode("latin-1"), "UnicodeDecodeError"), ("a.txt", "\n \n", "holds no captions"),
    ("a.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": ["x"]}', "cannot be used")])
def test_files_that_will_not_do(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        prompts.read_prompts(written(tmp_path / name, content))


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
