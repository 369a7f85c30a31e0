"""prompts.py: captions files, which captions are drawn, and captions of pictures that are there already."""

import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation import prompts


def written(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def lines(*objects):
    return "".join(json.dumps(o) + "\n" for o in objects)


def read(path):
    found, without = prompts.read(path)
    return [(p.picture, p.caption) for p in found], without


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = written(tmp_path / "a.txt", "\ufeffone\n\n two \r\nthree\u2028and a half\x0cend\n")
    assert read(path) == ([("", "one"), ("", "two"), ("", "three\u2028and a half\x0cend")], [])


def test_the_first_caption_of_each_picture_counts(tmp_path):
    coco = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "c.jpg"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((2, "b1"), (1, "a1"), (1, "a2"))],
    }
    assert read(written(tmp_path / "coco.json", json.dumps(coco))) == ([("a.jpg", "a1"), ("b.jpg", "b1")], ["c.jpg"])
    records = [
        {"image": "a.jpg", "caption": ""},
        {"image": "a.jpg", "caption": "a2"},
        {"image": "a.jpg", "caption": "a3"},
    ]
    assert read(written(tmp_path / "list.jsonl", lines(*records))) == ([("a.jpg", "a2")], [])
    unnamed = written(tmp_path / "texts.jsonl", lines({"caption": "x"}, {"caption": "x"}))
    assert read(unnamed) == ([("", "x"), ("", "x")], [])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8"),
        ("a.txt", "\n \n", "holds no captions"),
        ("a.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image": "b.', "cannot be read"),
        ("a.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("a.json", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": ["x"]}', "cannot be read"),
        ("a.json", "[]", "holds no captions"),
        ("a.parquet", "x", "must be .txt or"),
    ],
)
def test_files_that_will_not_do(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        prompts.read(written(tmp_path / name, content))


def test_choice_depends_on_the_seed_and_keeps_the_order():
    found = [prompts.Prompt(str(i)) for i in range(100)]
    some = [int(p.caption) for p in prompts.choose(found, 10, 0, "x")]
    assert some == sorted(set(some)) and len(some) == 10
    assert some == [25, 35, 40, 46, 52, 56, 70, 71, 75, 97]  # for good: published numbers may rest on it
    assert some != [int(p.caption) for p in prompts.choose(found, 10, 1, "x")]
    assert prompts.choose(found, 0, 0, "x") == prompts.choose(found, 100, 5, "x") == found


@pytest.fixture
def folder(tmp_path):
    """0.png to 10.png and sub/3.png"""
    (tmp_path / "pictures/sub").mkdir(parents=True)
    for name in [*map(str, range(11)), "sub/3"]:
        Image.new("RGB", (8, 8)).save(tmp_path / f"pictures/{name}.png")
    return tmp_path / "pictures"


def test_other_files_are_said(folder, capsys):
    prompts.note_others(folder)
    assert not capsys.readouterr().out
    (folder / "7.ppm").write_bytes(b"")
    (folder / "7.txt").write_bytes(b"")
    prompts.note_others(folder)
    assert "1 files in" in (said := capsys.readouterr().out) and "7.ppm" in said


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


def test_pictures_come_in_the_order_of_their_numbers(folder):
    assert names(prompts.pictures_of(folder), folder) == [f"{i}.png" for i in range(11)] + ["sub/3.png"]


def test_lists_of_captions_must_be_of_the_pictures(folder):
    entries = [{"image": f"{i}.png", "caption": f"c{i}", "seed": i} for i in (3, 1, 2)]
    listed = folder / "captions.jsonl"
    written(listed, lines(*entries))
    with pytest.raises(ValueError, match="9 pictures of .*captions.jsonl are there and not in it: 0.png"):
        prompts.pictures_of(folder)
    for path in set(folder.rglob("*.png")) - {folder / e["image"] for e in entries}:
        path.unlink()
    paths = prompts.pictures_of(folder)
    assert names(paths, folder) == ["3.png", "1.png", "2.png"]
    assert prompts.captions_for(folder, paths, "coco.json", []) == ["c3", "c1", "c2"]  # what they were drawn from
    others = [prompts.Prompt(t) for t in ("x", "y", "z")]
    with pytest.raises(ValueError, match="other prompts than those of a.txt"):
        prompts.captions_for(folder, paths, "a.txt", others)
    for content in ('{"file_name": "1.png", "text": "x"}\n', '{"image": "1.png", "capt', "", "null\n"):
        written(listed, content)
        with pytest.raises(ValueError, match="captions.jsonl is damaged, or not of eval_fid.py"):
            prompts.pictures_of(folder)


def test_captions_beside_and_inside_pictures(folder):
    paths = [folder / "1.png", folder / "2.png"]
    for path, chunks in ((paths[0], {"prompt": "of sample.py", "seed": "1"}), (paths[1], {"prompt": '{"3": {}}'})):
        info = PngInfo()
        for key, value in chunks.items():
            info.add_itxt(key, value)
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    with pytest.raises(ValueError, match="1 of 2 pictures have no caption.*2.png"):
        prompts.captions_for(folder, paths, "", [])
    written(folder / "2.txt", "beside")
    assert prompts.captions_for(folder, paths, "", []) == ["of sample.py", "beside"]
    written(folder / "1.txt", "beside too")
    assert prompts.captions_for(folder, paths, "", []) == ["beside too", "beside"]
    table = written(folder.parent / "t.json", json.dumps({"1.png": "one", "2.png": "two"}))
    assert prompts.captions_for(folder, paths, table, []) == ["one", "two"]
    with pytest.raises(ValueError, match="a.TXT has 1 prompts, .* 2 pictures"):
        prompts.captions_for(folder, paths, "a.TXT", [prompts.Prompt("x")])
