"""evaluation/geneval.py: the rules on hand-made detections, the layout as an independent reader sees it; detector.py:
post-processing and colors against plain restatements; eval_geneval.py: runs that were killed or shared out."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_text import write_clip_model
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import eval_geneval
from evaluation import clip, detector, geneval


def thing(name, score=0.95, box=(0, 0, 10, 10), color=None):
    return {"class": name, "score": score, "box": list(box)} | ({"color": color} if color else {})


def prompt(tag, *include, exclude=None):
    wanted = [dict(zip(("class", "count"), want[:2])) | (want[2] if len(want) > 2 else {}) for want in include]
    return {"tag": tag, "include": wanted, "prompt": "a photo"} | ({"exclude": exclude} if exclude else {})


def verdict(wanted, *objects, **rules):
    return geneval.judge(geneval.kept(objects, wanted["tag"], **rules), wanted)


DOG = prompt("single_object", ("dog", 1))
CAT_AND_DOG = prompt("two_object", ("cat", 1), ("dog", 1))
TWO_DOGS = prompt("counting", ("dog", 2), exclude=[{"class": "dog", "count": 3}])
RED_CAR = prompt("colors", ("car", 1, {"color": "red"}))
DOG_LEFT_OF_CAT = prompt("position", ("cat", 1), ("dog", 1, {"position": ["left of", 0]}))
RED_CAR_BLUE_BUS = prompt("color_attr", ("car", 1, {"color": "red"}), ("bus", 1, {"color": "blue"}))


def test_single_and_two_objects_and_counting():
    assert verdict(DOG, thing("dog"), thing("cat")) == (True, "")
    assert verdict(DOG, thing("dog", 0.3))[0] is False and verdict(DOG, thing("dog", 0.3001))[0] is True
    assert verdict(DOG, thing("dog", 0.5), threshold=0.5)[0] is False
    assert verdict(CAT_AND_DOG, thing("dog"), thing("cat"))[0]
    assert verdict(CAT_AND_DOG, thing("bus")) == (False, "expected cat>=1, found 0\nexpected dog>=1, found 0")
    dogs = [thing("dog", 0.91), thing("dog", 0.92), thing("dog", 0.93)]
    assert not verdict(TWO_DOGS, *dogs[:1])[0] and verdict(TWO_DOGS, *dogs[:2])[0]
    assert verdict(TWO_DOGS, *dogs) == (False, "expected dog<3, found 3")
    assert verdict(TWO_DOGS, *dogs[:2], thing("dog", 0.9))[0]
    assert not verdict(TWO_DOGS, *dogs[:2], thing("dog", 0.9), counting_threshold=0.89)[0]
    no_cat = prompt("single_object", ("dog", 1), exclude=[{"class": "cat", "count": 1}])
    assert verdict(no_cat, thing("dog"))[0] and not verdict(no_cat, thing("dog"), thing("cat"))[0]


def test_the_best_16_of_a_class_count():
    herd = [thing("cow", 0.91 + i / 1000, (i, 0, i + 1, 1)) for i in range(20)]
    groups = geneval.kept([*herd, thing("dog")], "counting")
    assert [c["box"][0] for c in groups["cow"]] == list(range(19, 3, -1)) and len(groups["dog"]) == 1
    wanted = prompt("counting", ("cow", 16), exclude=[{"class": "cow", "count": 17}])
    assert verdict(wanted, *herd)[0] and not verdict(wanted, *herd, max_objects=17)[0]


def test_overlaps_are_dropped_only_on_request():
    a, b, c = thing("dog", 0.92), thing("dog", 0.99, (0, 0, 10, 8)), thing("dog", 0.95, (30, 0, 40, 10))
    assert geneval.overlap((0, 0, 9, 9), (5, 0, 14, 9)) == 50 / 150  # x2 and y2 counted as inside
    assert geneval.kept([a, b, c], "counting") == {"dog": [b, c, a]}
    for most in (0.8, 99 / 121):  # the two overlap exactly so much
        assert geneval.kept([a, b, c], "counting", max_overlap=most) == {"dog": [b, c]}
    assert geneval.kept([a, b, c], "counting", max_overlap=0.9) == {"dog": [b, c, a]}


def test_colors_are_those_of_the_best_objects():
    assert verdict(RED_CAR, thing("car", color="red"))[0]
    assert not verdict(RED_CAR, thing("car", 0.9, color="red"), thing("car", 0.91, color="blue"))[0]
    two = prompt("colors", ("car", 2, {"color": "red"}))
    right, reason = verdict(two, thing("car", color="red"), thing("car", color="blue"), thing("car", 0.5, color="red"))
    assert not right and reason == "expected red car>=2, found 1; there are 1 red, 1 blue"
    red, blue = thing("car", color="red"), thing("bus", color="blue")
    assert verdict(RED_CAR_BLUE_BUS, red, blue)[0]
    swapped = verdict(RED_CAR_BLUE_BUS, red | {"color": "blue"}, blue | {"color": "red"})
    assert not swapped[0] and len(swapped[1].splitlines()) == 2
    # asked of no more than `count`, and of none where there are too few
    cars = [thing("car", 0.4), thing("car", 0.8), thing("dog"), thing("car", 0.3)]
    assert geneval.color_wanted(geneval.kept(cars, "colors"), RED_CAR) == [cars[1]]
    assert geneval.color_wanted(geneval.kept(cars, "colors"), two) == [cars[1], cars[0]]
    assert geneval.color_wanted(geneval.kept(cars[:1], "colors"), two) == []
    assert geneval.color_wanted(geneval.kept(cars, "colors"), prompt("colors", ("car", 1))) == []


def test_position():
    left, right = (0, 0, 10, 10), (20, 0, 30, 10)
    assert verdict(DOG_LEFT_OF_CAT, thing("dog", box=left), thing("cat", box=right))[0]
    wrong = verdict(DOG_LEFT_OF_CAT, thing("dog", box=right), thing("cat", box=left))
    assert wrong == (False, "expected dog left of target, found right of")
    assert verdict(DOG_LEFT_OF_CAT, thing("dog", box=left))[1].endswith("no target for dog to be left of")
    # the best dog and the best cat alone
    assert verdict(DOG_LEFT_OF_CAT, thing("dog", 0.9, left), thing("dog", 0.5, right), thing("cat", 0.9, right),
                   thing("cat", 0.5, left))[0]  # fmt: skip
    cat = thing("cat", box=(15, 0, 16, 9))
    assert not verdict(DOG_LEFT_OF_CAT, thing("dog", 0.4, left), thing("dog", 0.5, right), cat)[0]
    # every pair, where there are several; a target of the wrong color is none
    pairs = prompt("position", ("cat", 2), ("dog", 2, {"position": ["left of", 0]}))
    cats = [thing("cat", box=(40, 0, 50, 10)), thing("cat", box=(60, 0, 70, 10))]
    dogs = [thing("dog", box=left), thing("dog", box=right), thing("dog", box=(80, 0, 90, 10))]
    assert verdict(pairs, *cats, *dogs[:2])[0] and not verdict(pairs, *cats, *dogs[1:])[0]
    red = prompt("position", ("cat", 1, {"color": "red"}), ("dog", 1, {"position": ["left of", 0]}))
    black = verdict(red, thing("cat", box=right, color="black"), thing("dog", box=left))
    assert black[1].splitlines()[1] == "no target for dog to be left of"


def centred(x, y, side):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


@pytest.mark.parametrize("offset, sides, names", [
    ((-10, 0), (50, 50), set()),  # exactly the margin, 0.1 of both extents
    ((-11, 0), (50, 50), set()),  # beyond it, but by less than half of the offset
    ((-20, 0), (50, 50), set()),  # by exactly half
    ((-21, 0), (50, 50), {"left of"}), ((21, 0), (50, 50), {"right of"}), ((0, -21), (50, 50), {"above"}),
    ((0, 21), (50, 50), {"below"}),
    ((6, 8), (5, 5), {"below"}),  # (6 - 1) / 10 is exactly a half
    ((6.1, 8), (5, 5), {"below", "right of"}), ((8, 6), (5, 5), {"right of"}), ((8, -6), (5, 5), {"right of"}),
    ((-30, -30), (2, 2), {"above", "left of"}), ((0, 0), (4, 4), set())])  # fmt: skip
def test_relative_position(offset, sides, names):
    box = centred(100 + offset[0], 100 + offset[1], sides[0])
    assert geneval.relative_position(box, centred(100, 100, sides[1])) == names
    assert geneval.relative_position(centred(89, 100, 50), centred(100, 100, 50), 0.05) == {"left of"}


def test_both_means():
    def result(tag, correct, metadata):
        return {"tag": tag, "correct": correct, "metadata": metadata}

    results = [result(tag, i % 2 == 0, tag) for tag in geneval.TASKS[:5] for i in range(2)]
    results += [result("color_attr", True, f"p{i // 4}") for i in range(8)] + [result("color_attr", False, "p2")] * 2
    scores = geneval.summary(results)
    assert scores["tasks"]["color_attr"] == {"images": 10, "correct": 8, "score": 0.8}
    assert math.isclose(scores["mean_of_tasks"], (5 * 0.5 + 0.8) / 6)
    assert math.isclose(scores["mean_of_images"], 13 / 20) and (scores["prompts"], scores["images"]) == (8, 20)
    assert scores["prompts_any_correct"] == 7 / 8 and scores["prompts_all_correct"] == 2 / 8
    scores = geneval.summary(results[2:])
    assert scores["mean_of_tasks"] is None and scores["absent_tasks"] == ["single_object"]


PROMPTS = [DOG, CAT_AND_DOG, TWO_DOGS, RED_CAR, DOG_LEFT_OF_CAT, RED_CAR_BLUE_BUS]


def write_prompts(path, prompts):
    path.write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return path


def picture(seed, size=(40, 32)):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def official_reader(folder):
    """{folder name: (its one JSON object, names of its images)}, from the description of the official evaluator"""
    found = {}
    for place in folder.iterdir():
        if place.is_dir() and place.name.isdigit():
            with open(place / "metadata.jsonl") as file:
                metadata = json.load(file)  # fails on a second object
            images = [p.name for p in (place / "samples").iterdir() if re.match(r"\d+\.png", p.name)]
            found[place.name] = metadata, images
    return found


def make_layout(folder, prompts, per_prompt=1):
    geneval.write_layout(folder, prompts)
    for path, i, j in geneval.folders(prompts, per_prompt):
        picture(10 * i + j).save(folder / path)
    return folder


def test_the_layout_is_the_official_one(tmp_path):
    prompts = geneval.read_prompts(write_prompts(tmp_path / "p.jsonl", PROMPTS))
    assert prompts == PROMPTS and len(geneval.folders(prompts)) == 24
    out = make_layout(tmp_path / "out", prompts, 2)
    geneval.write_layout(out, prompts)  # again over itself
    (out / "00000/grid.png").touch()
    (out / "00001/samples/grid.png").touch()
    (out / "notes").mkdir()
    read = official_reader(out)
    assert sorted(read) == [f"{i:05d}" for i in range(6)]
    for i, p in enumerate(PROMPTS):
        assert read[f"{i:05d}"][0] == p and sorted(read[f"{i:05d}"][1]) == ["0000.png", "0001.png"]
    layout = geneval.read_layout(out)
    assert [p for p, _ in layout] == PROMPTS
    names = [path.relative_to(out).as_posix() for _, paths in layout for path in paths]
    assert names == [path for path, _, _ in geneval.folders(prompts, 2)]
    assert names[1:3] == ["00000/samples/0001.png", "00001/samples/0000.png"]
    (out / "00005").rename(out / "9")  # numbers, not names, are in order
    (out / "00004").rename(out / "10")
    assert [p for p, _ in geneval.read_layout(out)] == [*PROMPTS[:4], PROMPTS[5], PROMPTS[4]]


@pytest.mark.parametrize("bad, message", [
    ("{broken", "no single JSON object"),
    ("[1]", "a JSON object with"),
    ({k: v for k, v in DOG.items() if k != "include"}, "include"),
    (DOG | {"tag": "colour"}, "colour"),
    (DOG | {"include": []}, "is empty"),
    (prompt("single_object", ("mouse", 1)), "include 0.*'mouse'.*computer mouse"),
    (prompt("single_object", ([], 1)), r"\[\]"),
    (prompt("single_object", ("dog", True)), "count"),
    (prompt("single_object", ("dog", 1), exclude=[{"class": "cat"}]), "exclude 0.*count"),
    (prompt("colors", ("dog", 1, {"color": "gray"})), "gray"),
    (prompt("position", ("dog", 1), ("cat", 1, {"position": ["under", 0]})), "include 1.*under"),
    (prompt("position", ("dog", 1), ("cat", 1, {"position": ["below", 1]})), "refers to object 1")])  # fmt: skip
def test_bad_prompts_are_named(tmp_path, bad, message):
    path = write_prompts(tmp_path / "p.jsonl", [DOG])
    path.write_text(path.read_text() + "\n" + (bad if isinstance(bad, str) else json.dumps(bad)) + "\n")
    with pytest.raises(ValueError, match=f"p.jsonl, line 3.*{message}"):
        geneval.read_prompts(path)


def test_bad_layouts_are_named(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n\n")
    for name, message in (("p.jsonl", "is empty"), ("none.jsonl", "no file")):
        with pytest.raises(ValueError, match=f"{name}.*{message}|{message}.*{name}"):
            geneval.read_prompts(tmp_path / name)
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="must have folders 00000"):
            geneval.read_layout(folder)
    folder = make_layout(tmp_path / "out", PROMPTS[:3], 2)
    (folder / "00001/samples/0001.png").unlink()
    shutil.rmtree(folder / "00002/samples")
    with pytest.raises(ValueError, match="equally many.*prompt 1 has 1, prompt 2 has 0"):
        geneval.read_layout(folder)
    (folder / "00000/metadata.jsonl").write_text(json.dumps(DOG) + "\n" + json.dumps(DOG))
    with pytest.raises(ValueError, match="00000/metadata.jsonl: it is no single JSON object"):
        geneval.read_layout(folder)
    (folder / "00000/metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="00000/metadata.jsonl is missing"):
        geneval.read_layout(folder)


def line(filename="00000/samples/0000.png", *objects, **changes):
    return {"filename": filename, "width": 40, "height": 32, "objects": list(objects)} | changes


@pytest.mark.parametrize("bad, message", [
    ({"width": 40, "objects": 1}, "filename"), (line(width=0), "width"), (line(height="32"), "height"),
    (line(objects=None), "objects"),
    (line("f", "dog"), "object 0.*dog"),
    (line("f", thing("remote")), "object 0.*tv remote"),
    (line("f", thing("dog", math.nan)), "nan"),
    (line("f", thing("dog"), thing("dog", box=(20, 20, 10, 10))), r"object 1.*\[20, 20, 10, 10\]"),
    (line("f", thing("dog", box=(0, 0, 41, 10))), "within the picture"),
    (line("f", thing("dog", color="gray")), "gray"),
    (line("first"), "first has a line already")])  # fmt: skip
def test_bad_detections_are_named(tmp_path, bad, message):
    path = write_prompts(tmp_path / "d.jsonl", [{"detector": "mine"}, line("first"), bad])
    with pytest.raises(ValueError, match=f"d.jsonl, line 3.*{message}"):
        geneval.read_detections(path)


def run(monkeypatch, folder, **changes):
    """eval_geneval.py with these settings, in this process -> its report"""
    for name, value in ({"images": str(folder), "detections": "", "out": "", "device": "cpu"} | changes).items():
        monkeypatch.setattr(eval_geneval, name, value)
    eval_geneval.main()
    return json.loads(Path(changes.get("out") or folder / "geneval.json").read_text())


def test_given_detections_are_scored(tmp_path, monkeypatch, capsys):
    folder = make_layout(tmp_path / "out", PROMPTS)
    box = (20, 0, 30, 10)
    found = [[thing("dog")], [thing("dog")], [thing("dog"), thing("dog")], [thing("car", color="red")],
             [thing("dog"), thing("cat", box=box)],
             [thing("car", color="red"), thing("bus", color="green")]]  # fmt: skip
    lines = [line(f"{i:05d}/samples/0000.png", *objects) for i, objects in enumerate(found)]
    given = str(write_prompts(tmp_path / "d.jsonl", lines))
    report = run(monkeypatch, folder, detections=given)
    assert report["mean_of_tasks"] == report["mean_of_images"] == 4 / 6
    assert report["rules"]["threshold"] == 0.3 and report["prompts"] == report["images"] == 6
    assert report["detector"] == f"not said in {given}" and not report["note"] and given == report["detections"]
    printed = capsys.readouterr().out
    assert "counting                       100.00 %  (1 of 1)" in printed and "66.67 %" in printed
    results = [json.loads(text) for text in (folder / "geneval.results.jsonl").read_text().splitlines()]
    assert [r["correct"] for r in results] == [True, False, True, True, True, False]
    assert results[1]["reason"] == "expected cat>=1, found 0" and json.loads(results[1]["metadata"]) == CAT_AND_DOG
    write_prompts(tmp_path / "d.jsonl", [{"detector": "YOLO"}, *lines])
    assert run(monkeypatch, folder, detections=given)["detector"] == "YOLO"
    for changed, message in (
            (lines[:5], "00005/samples/0000.png"),
            ([*lines, line("00007/samples/0000.png")], "00007/samples/0000.png"),
            ([*lines[:5], line("00005/samples/0000.png", thing("bus"))], 'have no "color" in 00005/samples/0000.png')):
        write_prompts(tmp_path / "d.jsonl", changed)
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, folder, detections=given)
    with pytest.raises(ValueError, match="no file"):
        run(monkeypatch, folder, detections="none.jsonl")
    two = make_layout(tmp_path / "two", PROMPTS[:2])
    write_prompts(tmp_path / "d.jsonl", [line(), line("00001/samples/0000.png")])
    assert run(monkeypatch, two, detections=given)["mean_of_tasks"] is None
    assert "none, as not all six tasks are here" in capsys.readouterr().out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(detector, clip): folders of small random ones; the detector sees cars and a few dogs everywhere"""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=8,
        id2label=dict(enumerate(geneval.CLASSES))))  # fmt: skip
    with torch.no_grad():
        network.class_predictor.weight.mul_(8)
        network.class_predictor.bias[[2, 16]] = torch.tensor([6.0, 5.5])
        for name, p in network.named_parameters():
            if "mask_embedder" in name and p.ndim == 2:
                p.mul_(4)
    network.save_pretrained(folder / "detector")
    write_clip_model(folder / "clip", spread=0.3, num_hidden_layers=1, image_size=28, patch_size=14)
    return str(folder / "detector"), str(folder / "clip")


def enlarged(x, size):
    """Bilinear resize of (H,W), half-pixel centres, a row and a column at a time"""
    for axis, new in enumerate(size):
        old = x.shape[axis]
        rows = []
        for i in range(new):
            at = max(0.0, (i + 0.5) * old / new - 0.5)
            low = min(int(at), old - 1)
            part = at - low
            rows.append((1 - part) * x.take(low, axis) + part * x.take(min(low + 1, old - 1), axis))
        x = np.stack(rows, axis)
    return x


def plain_objects(class_logits, mask_logits, padded, resized, size, most=100):
    """[(class, score, box, mask)], slowly, one pair of query and class after the other"""
    chances = np.exp(class_logits) / np.exp(class_logits).sum(1, keepdims=True)
    pairs = [(chances[q, c], q, c) for q in range(len(chances)) for c in range(80)]
    found = []
    for chance, q, c in sorted(pairs, reverse=True)[:most]:
        logits = enlarged(enlarged(mask_logits[q], padded)[: resized[0], : resized[1]], size)
        mask = logits > 0
        if mask.any():
            rows, columns = np.where(mask)
            score = chance * (1 / (1 + np.exp(-logits[mask]))).mean()
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            found.append((geneval.CLASSES[c], score, box, mask))
    return sorted(found, key=lambda f: -f[1])


@pytest.mark.parametrize("size", [(17, 23), (50, 20)])
def test_objects_equal_a_plain_restatement(size):
    rng = np.random.default_rng(0)
    class_logits, mask_logits = 4 * rng.standard_normal((6, 81)), rng.standard_normal((6, 8, 10))
    class_logits[:, 80] += 4  # "no object" is likely, and is none
    mask_logits[1] -= 9  # empty
    mask_logits[2] += 9  # full
    sizes = (32, 40), (26, 37), size
    objects, masks = detector.to_objects(torch.tensor(class_logits), torch.tensor(mask_logits), *sizes)
    plain = plain_objects(class_logits, mask_logits, *sizes)
    assert len(objects) == len(plain) == len(masks) < 100
    for found, mask, (name, score, box, plain_mask) in zip(objects, masks, plain):
        assert found["class"] == name and found["box"] == box and math.isclose(found["score"], score, rel_tol=1e-5)
        assert (mask == plain_mask).all()


def test_the_detectors_input(models):
    square = picture(3, (32, 32))  # transformers' own stretches others to multiples of 32 instead of padding them
    pixels, resized = detector.to_input(square, "cpu")
    theirs = Mask2FormerImageProcessorPil()(square, return_tensors="pt")["pixel_values"]
    assert resized == (800, 800)
    torch.testing.assert_close(pixels, theirs, atol=0.04, rtol=0)  # two grey levels: PIL rounds twice
    pixels, resized = detector.to_input(picture(3), "cpu")
    assert pixels.shape == (1, 3, 800, 1024) and resized == (800, 1000)
    assert pixels[0, 0, :, 1000:].unique().tolist() == [pytest.approx((128 - 123.675) / 58.395)]
    assert detector.to_input(picture(0, (30, 60)), "cpu")[1] == (1333, 667)  # the longer side is at most 1333


def test_the_detector_is_used_as_it_should_be(models):
    network = detector.load_detector(models[0], "cpu")
    image = picture(3)
    with torch.no_grad():
        out = network(pixel_values=detector.to_input(image, "cpu")[0])
    logits = out.class_queries_logits[0].double().numpy(), out.masks_queries_logits[0].double().numpy()
    plain = plain_objects(*logits, (800, 1024), (800, 1000), (32, 40), most=3)
    objects, masks = detector.detect(network, image)
    assert masks.shape == (len(objects), 32, 40)
    for found, mask in zip(objects, masks):
        rows, columns = np.where(mask)
        assert found["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    for name, score, box, mask in plain:
        i = min(range(len(objects)), key=lambda i: abs(objects[i]["score"] - score))
        assert math.isclose(objects[i]["score"], score, rel_tol=1e-4) and objects[i]["class"] == name
        assert objects[i]["box"] == box and (masks[i] != mask).mean() < 0.01


def test_colors_equal_transformers_own(models):
    tower = clip.Clip(models[1], "cpu")
    reference, tokenizer = CLIPModel.from_pretrained(models[1]).eval(), CLIPTokenizer.from_pretrained(models[1])
    processor = CLIPImageProcessorPil.from_pretrained(models[1])
    image, seen = picture(5, (60, 48)), set()
    rng = np.random.default_rng(0)
    for i in range(12):
        mask = rng.random((48, 60)) < 0.7
        box = [int(rng.integers(0, 20)), int(rng.integers(0, 16)), int(rng.integers(40, 60)), int(rng.integers(30, 48))]
        found = thing("teddy bear" if i % 2 else "car", box=box)
        detector.name_colors(tower, {}, image, [found], mask[None])
        pixels = np.where(mask[..., None], np.array(image), 0x99).astype(np.uint8)
        cut = Image.fromarray(pixels[box[1] : box[3], box[0] : box[2]])
        scores = []
        with torch.no_grad():
            for color in geneval.COLORS:
                name = found["class"]
                texts = [f"{color} {name}", f"{color}-colored {name}", f"{color} object"]
                ids = tokenizer([f"a photo of a {text}" for text in texts], padding=True, return_tensors="pt")
                out = reference(**ids, **processor(cut, return_tensors="pt"))
                text = out.text_embeds.mean(0)  # transformers normalises both
                scores.append(float(out.image_embeds[0] @ (text / text.norm())))
        assert found["color"] == geneval.COLORS[int(np.argmax(scores))]
        seen.add(found["color"])
    assert len(seen) > 1  # the classifier is no constant


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, models):
    """(folder of three prompts with two pictures each, what a whole run writes)"""
    cars = [prompt("single_object", ("dog", 1)), prompt("colors", ("car", 2, {"color": "brown"})),
            prompt("position", ("car", 1), ("dog", 1, {"position": ["above", 0]}))]  # fmt: skip
    folder = make_layout(tmp_path_factory.mktemp("layout") / "out", cars, 2)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, folder, detector=models[0], clip=models[1])
    return folder, written(folder, "geneval")


def written(folder, name):
    assert not list(folder.rglob("*.tmp"))
    return [(folder / f"{name}{end}").read_text() for end in (".json", ".detections.jsonl", ".results.jsonl")]


def test_a_run_says_what_it_was(pipeline, models, monkeypatch):
    folder, (scores, lines, results) = pipeline
    report = json.loads(scores)
    assert report["detector"] == models[0] and report["clip"] == models[1] and "not mmdetection's" in report["note"]
    assert len(report["detector_sha256"]) == len(report["clip_sha256"]) == 64
    header, *lines = map(json.loads, lines.splitlines())
    assert header["detector_sha256"] == report["detector_sha256"] and header["threshold"] == 0.3
    assert [r["filename"] for r in lines] == [path for path, _, _ in geneval.folders(range(3), 2)]
    for r in lines:
        assert sum("color" in found for found in r["objects"]) == (2 if r["filename"].startswith("00001") else 0)
    # given back as --detections, they give the same verdicts
    lines = str(folder / "geneval.detections.jsonl")
    again = run(monkeypatch, folder, detections=lines, out=str(folder / "again.json"))
    assert again["tasks"] == report["tasks"] and again["note"] == report["note"]
    assert (folder / "again.results.jsonl").read_text() == results


@pytest.fixture
def looked(monkeypatch):
    """The names of the pictures that the detector looks at, as they come"""
    names, look_at = [], eval_geneval.look_at
    monkeypatch.setattr(eval_geneval, "look_at", lambda name, *args: names.append(name) or look_at(name, *args))
    return names


def test_a_killed_run_goes_on(pipeline, models, monkeypatch, looked):
    folder, whole = pipeline
    settings = {"detector": models[0], "clip": models[1], "out": str(folder / "killed.json")}
    names = [path for path, _, _ in geneval.folders(range(3), 2)]
    (folder / "killed.detections").mkdir()
    for name in names[::2]:  # as if it had been killed, with other processes at work
        name = f"{name.replace('/', '_')}.json"
        shutil.copy(folder / "geneval.detections" / name, folder / "killed.detections" / name)
    run(monkeypatch, folder, **settings)
    assert written(folder, "killed") == whole and looked == names[1::2]
    # a picture that is another one now is looked at again, and one whose prompt now asks for a color
    path, metadata = folder / names[0], folder / "00002/metadata.jsonl"
    before = path.read_bytes(), metadata.read_text()
    picture(77).save(path)
    metadata.write_text(json.dumps(RED_CAR))
    run(monkeypatch, folder, **settings)
    assert looked[3:] == [names[0], *names[4:]]
    path.write_bytes(before[0])
    metadata.write_text(before[1])
    # other settings are refused
    for name, value in (("threshold", 0.2), ("max_overlap", 0.5)):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"made otherwise .{name}.*{value} now"):
            run(patch, folder, **settings, **{name: value})


def test_damaged_pictures_are_named_and_no_work_is_lost(pipeline, models, monkeypatch, looked):
    folder, _ = pipeline
    settings = {"detector": models[0], "clip": models[1], "out": str(folder / "damaged.json")}
    paths = [folder / path for path, _, _ in geneval.folders(range(3), 2)]
    before = [path.read_bytes() for path in paths[:2]]
    paths[0].write_bytes(before[0][:90])
    paths[1].write_text("no picture")
    with pytest.raises(ValueError, match="2 of 6 .*00000/samples/0000.png .*00000/samples/0001.png .*Unidentified"):
        run(monkeypatch, folder, **settings)
    assert not (folder / "damaged.json").exists()
    for path, data in zip(paths, before):
        path.write_bytes(data)
    run(monkeypatch, folder, **settings)
    assert len(looked) == 6 + 2 and written(folder, "damaged") == pipeline[1]


def test_two_processes_write_the_same(script, pipeline, models):
    folder, whole = pipeline
    printed = script("eval_geneval.py", f"--images={folder}", f"--detector={models[0]}", f"--clip={models[1]}",
                     "--device=cpu", f"--out={folder / 'two.json'}", processes=2)  # fmt: skip
    assert written(folder, "two") == whole
    assert "none, as not all six tasks are here" in printed and f"detector: {models[0]} (its own weights" in printed


def test_models_that_will_not_do(tmp_path, models, monkeypatch):
    for make in (detector.load_detector, clip.Clip):
        with pytest.raises(ValueError, match="no/such-model: it is neither a folder"):
            make("no/such-model", "cpu")
    with pytest.raises(ValueError, match="it is of the kind clip, mask2former is wanted"):
        detector.load_detector(models[1], "cpu")
    model = Mask2FormerForUniversalSegmentation.from_pretrained(models[0])
    model.config.id2label = model.config.id2label | {79: "wall"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="It has 80, from person to wall"):
        detector.load_detector(str(tmp_path), "cpu")
    weights = {k: v for k, v in model.state_dict().items() if k != "class_predictor.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="lacks 1 weights: class_predictor.weight"):
        detector.load_detector(str(tmp_path), "cpu")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match="pip install scipy"):
        detector.load_detector(models[0], "cpu")


def test_settings_are_checked(monkeypatch, tmp_path):
    bad = {"threshold": 1.5, "counting_threshold": -1.0, "max_overlap": 2.0, "max_objects": 0}
    for name, value in bad.items():
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{name} is {value}"):
            run(patch, tmp_path, **{name: value})
    with pytest.raises(ValueError, match="no images: give --images FOLDER"):
        run(monkeypatch, tmp_path, images="")
