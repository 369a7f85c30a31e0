"""captions.py: captions files, scores, and the cleaner for captions from the web."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import write

from pictures.captions import caption_chooser, clean_web_caption, harmless, read_captions
from pictures.decode import Lost

ANNOTATIONS = [{"image_id": n, "caption": c} for n, c in ((9, ""), (9, "first of 9 "), (7, "of 7"), (9, "second"))]
COCO = {"images": [{"id": n, "file_name": f"COCO_val2014_{n}.jpg"} for n in (7, 9)], "annotations": ANNOTATIONS}
# (file, its text, {picture: caption})
CAPTIONS_FILES = [
    ("coco.json", json.dumps(COCO), {"COCO_val2014_9.jpg": "first of 9", "COCO_val2014_7.jpg": "of 7"}),
    ("textcaps.json", '{"data": [{"image_id": "0ab", "caption_str": "a sign"}]}', {"train/0ab.jpg": "a sign"}),
    ("list.json", '[{"file_name": "x/1.png", "caption": "c"}]', {"deep/x/1.png": "c", "1.png": None}),
    ("by_name.json", '{"1.png": "plain", "2.png": {"p": "deep"}}', {"1.png": "plain", "part.zip/2.png": "deep"}),
    ("a.jsonl", '{"img_path": "./000/x.jpg", "prompt": "a \\"quoted\\" fox"}\n\n{"image": 1}\nbroken\n',
     {"000.tgz/000/x.jpg": 'a "quoted" fox', "001/x.jpg": None}),
    ("a.tsv", 'image\tcaption\n1.png\t"Sunset over\n2.png\ttab, comma\n3.png\t6" nails\n4.png\t"all"\n',
     {"1.png": '"Sunset over', "deep/2.png": "tab, comma", "3.png": '6" nails', "4.png": "all"}),
    ("a.csv", 'image,caption\nx.jpg,"one, two"\n', {"x.jpg": "one, two"}),
    # a picture's number is not the name of another picture
    ("a.json", '[{"file_name": "9.png", "image_id": 3, "name": "3", "caption": "9!"}]', {"9.png": "9!", "3.png": None}),
    ("x/1.txt", " one\n", {"in.tar/x/1.png": "one", "2.png": None})]


@pytest.mark.parametrize("name, text, captions", CAPTIONS_FILES)
def test_captions_files(tmp_path, name, text, captions):
    write(tmp_path, {name: text.encode()})
    find = read_captions(tmp_path if name.endswith(".txt") else tmp_path / name)
    assert {picture: find(picture) for picture in captions} == captions


@pytest.mark.parametrize("name, text", [
    ("a.json", "{"), ("a.tgz", "x"), ("a.zip", "x"), ("a.txt", ""), ("a.md", "x"), ("a.json", "[]"), ("a.json", "3"),
    ("a.json", '{"images": [{}], "annotations": []}'), ("a.jsonl", '{"image": "x"}\n'), ("a.jsonl", "no\n"),
    ("a.tsv", "x\ty\n1\t2\n"), ("a.json", ""), ("nothing.json", None)])
def test_captions_files_that_hold_none_are_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="captions file"):
        read_captions(tmp_path / name)


def test_the_choice_of_a_caption(tmp_path):
    (tmp_path / "a.json").write_text('{"a.png": "Stock Photo of a\\ud800 cat!!!!"}')
    plain, other = caption_chooser(), caption_chooser(captions=tmp_path / "a.json", clean=True)
    assert plain("a.png", b"", " own ") == ("a.png", b"", "own")
    assert plain("a.png", b"", None)[1] == "no caption" and other("b.png", b"", "own")[1] == "no caption"
    assert other("x/a.png", b"", "own") == ("x/a.png", b"", "of a? cat!")
    assert isinstance(plain("a.png", Lost("cut off"), None)[1], Lost)


def test_nsfw_scores_are_compared_in_their_own_precision(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    scores = {"a": (0.2, 0.2), "b": (0.2001, 0), "c": (0.1, float("nan")), "d": (0.1, None), "e": (2, 0)}
    columns = {f"{k}_nsfw": pa.array([s[i] for s in scores.values()], pa.float32())
               for i, k in enumerate(("image", "prompt"))}
    parquet.write_table(pa.table({"image_name": list(scores)} | columns), tmp_path / "m.parquet")
    assert harmless(tmp_path / "m.parquet", 0.2) == {"a"}
    choose = caption_chooser(nsfw_scores=tmp_path / "m.parquet")
    assert choose("x/a", b"", "c")[1] == b"" and "NSFW" in choose("x/b", b"", "c")[1]
    (tmp_path / "no.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="nsfw_scores .* cannot be read"):
        harmless(tmp_path / "no.parquet", 0.2)


CASES = {
    "A cat on a <b>mat</b> &amp;amp; a dog": "A cat on a mat & a dog",
    "<PERSON> and <PERSON> at the beach": "person and person at the beach",
    "sunset http://www.example.com/a?b=1 over the sea": "sunset over the sea",
    "buy it at www.shop.de/x now": "buy it at now", "Garden chair - example.com": "Garden chair",
    "mail me@my-site.org for a print": "mail for a print", "a bridge, photo by @someone_1": "a bridge",
    "Cat P2000 drill": "Cat P2000 drill", "if a <b and c> d": "if a <b and c> d",
    "<a href='x'>Blue</a> vase<br/>": "Blue vase", "#sunset over #Paris #12345": "sunset over Paris",
    "IMG_20190312.jpg": "", "DSC_0042 a red barn": "a red barn",
    "kitchen_final.jpeg modern kitchen": "modern kitchen", "A tree, 1920x1080 px": "A tree",
    "Happy family, royalty free stock photo": "Happy family, royalty free", "Red apple - Stock Photo": "Red apple",
    "Stock photography of a lighthouse": "of a lighthouse", "wow!!!!! a fox....": "wow! a fox.",
    "an  owl ( ) in\ta tree ,  at night": "an owl in a tree, at night", "order 123456789 shoes": "order shoes",
    "12 monkeys in 1995": "12 monkeys in 1995", "a stock market chart, free download": "a stock market chart",
    "it's 5 < 6 and 7 > 3": "it's 5 < 6 and 7 > 3", "\u2022 The Alps \u2013": "The Alps",
    "price $25.00, 4.5 stars": "price $25.00, 4.5 stars", "日本の庭": "日本の庭"}


@pytest.mark.parametrize("text", CASES)
def test_cleaner(text):
    assert clean_web_caption(text) == CASES[text]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=100) | st.text(alphabet="<>@#&;./-_!,ab1 ()wxhtp:", max_size=100))
def test_any_text_gives_one_tidy_line(text):
    cleaned = clean_web_caption(text)
    assert cleaned == " ".join(cleaned.split()) and not cleaned.endswith((",", ";", ":"))


@pytest.mark.parametrize("piece", ["a", "a-", "<", "<a", "@", "#1", "a@", "www.", "1x", "(", "&", "&amp;", "!", ".a"])
def test_no_caption_takes_more_than_linear_time(piece):
    assert len(clean_web_caption(piece * (50_000 // len(piece)))) <= 50_000  # quadratic time would be hours
