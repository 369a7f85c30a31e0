"""The emoji of a font as a set, and the score that tells whether a network draws the one that was meant."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, launch
from PIL import ImageFont, features

from evaluation import nearest
from pictures import emoji
from pictures.sources import BUILT_IN, find_parts

# A part of Noto Color Emoji 2.042 (OFL 1.1), by pyftsubset NotoColorEmoji.ttf --layout-features='*' --text=... of what
# ALONE names, the tones, joiner and variation selector, and OK, A and 1234 in boxes
FONT = str(ROOT / "tests/data/emoji.ttf")
ALONE = {"grinning face", "waving hand sign", "thumbs up sign", "red apple", "snowman without snow",
         "high voltage sign", "latin cross", "zombie", "adult", "man", "woman", "female sign", "male sign",
         "red hair"}
composed = pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no raqm, which composes sequences")


def names(font=FONT, held_out=None):
    return {emoji.name(text): text for text in emoji.texts(font, held_out)}


def mean_color(text):
    return emoji.draw(text, FONT).resize((1, 1)).getpixel((0, 0))


def test_the_font_of_this_computer():
    try:
        emoji.open_font()
    except ValueError as error:
        pytest.skip(str(error))
    found = names("")
    assert len(found) > 1200 and ALONE <= found.keys()
    assert not any(re.search("squared ok|regional|input symbol|ideograph|fitzpatrick|joiner", name) for name in found)
    looks = {np.asarray(emoji.draw(text)).tobytes() for text in found.values()}
    assert len(looks) == len(found)  # none twice


@composed
def test_every_emoji_has_a_name_and_sequences_those_of_their_parts():
    tones = {f"{name}, {tone} skin tone" for name in ("waving hand", "thumbs up", "adult", "man", "woman")
             for tone in ("light", "medium-light", "medium", "medium-dark", "dark")}
    people = {f"{person}, red hair" for person in ("adult", "man", "woman")} | {"zombie, female", "zombie, male"}
    assert names().keys() == ALONE | tones | people


def test_pictures_are_in_color():
    found = names()
    red, _, blue = mean_color(found["red apple"])
    assert red > blue + 50
    assert len({*emoji.draw(found["snowman without snow"], FONT).size}) == 1
    if "thumbs up, dark skin tone" in found:
        dark, light = (mean_color(found[f"thumbs up, {tone} skin tone"]) for tone in ("dark", "light"))
        assert sum(dark) < sum(light) - 60


@composed
def test_a_tenth_of_the_tones_is_held_out_and_parts_draw_what_they_name():
    found = {}
    for source in BUILT_IN[1:]:
        parts = find_parts(source, 10, FONT)
        assert all(len(part.names) <= 10 for part in parts)
        found[source] = [name for part in parts for name in part.names]
    train, unseen, every = found["emoji"], found["emoji_unseen"], found["emoji_all"]
    assert sorted(train + unseen) == sorted(every) and not {*train} & {*unseen}
    assert 0 < len(unseen) < 6 and all("-1f3f" in label and label.split("-")[0] in train for label in unseen)
    label, picture, caption = next(find_parts("emoji_unseen", 10, FONT)[0].entries())
    text = emoji.texts(FONT, held_out=True)[0]
    assert (label, caption) == (emoji.label(text), emoji.name(text)) and picture == emoji.draw(text, FONT)


@composed
def test_a_run_of_emoji_is_judged_by_the_nearest(tmp_path):
    small = "--latent_size 2 --patch_size 1 --batch_size 2"
    for line in (f"train_vae.py --source emoji --font {FONT} --max_steps 2 --width 48 --resolution 16 --out runs/vae",
                 f"prepare_latents.py --source emoji --font {FONT} --resolutions 16 --vae runs/vae/vae.safetensors "
                 "--flips --shifts 4 --out data",
                 f"train.py config/emoji.py --data data --max_steps 1 --out runs/emoji {small}",
                 "eval_fid.py --checkpoint runs/emoji --steps 1"):
        launch(*line.split(), cwd=tmp_path)
    other = tmp_path / "other.ttf"
    other.write_bytes(Path(FONT).read_bytes() + b"more")
    again = ("eval_fid.py", "--checkpoint", "runs/emoji", "--steps", "1", "--out", "again", "--font", other)
    assert "not the one that runs/emoji" in launch(*again, cwd=tmp_path, fails=True)
    results = json.loads((tmp_path / "scores/emoji/results.json").read_text())["results"]
    every, unseen = len(names()), len(names(held_out=True))
    assert [(r["captions"], r["pictures"]) for r in results] == [("emoji", every - unseen), ("emoji_unseen", unseen)]
    for entry in results:
        assert entry["nearest"]["top 1"][1:] == [entry["pictures"], pytest.approx(1 / every)]
        assert (tmp_path / f"scores/emoji/{entry['captions']}_guidance_4.png").exists()


@pytest.mark.parametrize("given, message", [
    ({"source": "shapes", "font": "none.ttf"}, "--font is for --source emoji, not for shapes"),
    ({"font": "none.ttf"}, "'none.ttf' cannot be opened"), ({"font": "plain.ttf"}, "plain.ttf has no coloured emoji"),
    ({}, r"no font of coloured emoji \(there\.is\.none\): .* apt install fonts-noto-color-emoji, .*--font")])
def test_without_a_font_of_emoji_it_says_what_to_do(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emoji, "FONTS", ("there.is.none",))
    monkeypatch.setattr(emoji, "CODES", range(0x1F600, 0x1F640))
    monkeypatch.setattr(emoji, "open_font", emoji.open_font.__wrapped__)
    (tmp_path / "plain.ttf").write_bytes(ImageFont.load_default(20).font_bytes)
    with pytest.raises(ValueError, match=message):
        find_parts(given.pop("source", "emoji"), 100, **given)


@pytest.mark.parametrize("drawn, wanted, right", [
    ((0.1, 2.9), ("a", "d"), (2, 2)),   # nearest to their own
    ((0.1, 1.9), ("d", "a"), (0, 2)),   # to others, which are among the nearest five
    ((0.1, 9.0), ("g", "a"), (0, 0)),
    ((8.8, 0.2), ("b", "b"), (1, 2))])  # two pictures have this caption
def test_the_nearest_are_counted(drawn, wanted, right):
    captions, places = [*"abcdefgb"], torch.tensor([[0.0], [1], [2], [3], [4], [5], [6], [9]])
    scores = nearest.score(torch.tensor(drawn)[:, None], wanted, captions, places)
    assert tuple(scores[f"top {k}"][:2] for k in (1, 5)) == tuple((n, 2) for n in right)
    # five of eight pictures: 5/8 have the one, 1 - 3/8 * 2/7 one of two
    chances = [(1 / 8, 5 / 8), (2 / 8, 1 - 3 / 28)]
    for k, of_both in zip((1, 5), zip(*chances)):
        expected = sum(of_both[captions.count(caption) - 1] for caption in wanted) / 2
        assert scores[f"top {k}"][2] == pytest.approx(expected)


def test_fewer_pictures_than_the_nearest_five_are_all_near():
    scores = nearest.score(torch.zeros(1, 2), ["b"], ["a", "b"], torch.eye(2))
    assert scores["top 5"] == (1, 1, 1) and scores["top 1"][2] == 0.5
