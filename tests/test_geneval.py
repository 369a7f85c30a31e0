"""evaluation/geneval.py: the rules on hand-made detections, and the layout; detector.py: post-processing and colors
against plain restatements; eval_geneval.py: runs that were stopped or shared out."""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_text import write_clip_model
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import eval_geneval
from evaluation import clip, detector, geneval

LEFT, RIGHT, FAR = (0, 0, 10, 10), (20, 0, 30, 10), (80, 0, 90, 10)


def thing(name, score=0.95, box=LEFT, color=None):
    return {"class": name, "score": score, "box": list(box)} | ({"color": color} if color else {})


def prompt(tag, *include, exclude=()):
    wanted = [dict(zip(("class", "count"), want)) | (want[2] if len(want) > 2 else {}) for want in include]
    unwanted = [dict(zip(("class", "count"), want)) for want in exclude]
    return {"tag": tag, "include": wanted, "prompt": "a photo"} | ({"exclude": unwanted} if exclude else {})


DOG = prompt("single_object", ("dog", 1))
CAT_AND_DOG = prompt("two_object", ("cat", 1), ("dog", 1))
TWO_DOGS = prompt("counting", ("dog", 2), exclude=[("dog", 3)])
RED_CAR = prompt("colors", ("car", 1, {"color": "red"}))
DOG_LEFT_OF_CAT = prompt("position", ("cat", 1), ("dog", 1, {"position": ["left of", 0]}))
RED_CAR_BLUE_BUS = prompt("color_attr", ("car", 1, {"color": "red"}), ("bus", 1, {"color": "blue"}))
PROMPTS = [DOG, CAT_AND_DOG, TWO_DOGS, RED_CAR, DOG_LEFT_OF_CAT, RED_CAR_BLUE_BUS]
RED_CARS = prompt("colors", ("car", 2, {"color": "red"}))
DOGS_LEFT_OF_CATS = prompt("position", ("cat", 2), ("dog", 2, {"position": ["left of", 0]}))
DOG_LEFT_OF_RED_CAT = prompt("position", ("cat", 1, {"color": "red"}), ("dog", 1, {"position": ["left of", 0]}))
HERD = [thing("cow", 0.91 + i / 1000, (i, 0, i + 1, 1)) for i in range(20)]
DOGS = [thing("dog", 0.91 + i / 100) for i in range(3)]
CATS = [thing("cat", box=(40, 0, 50, 10)), thing("cat", box=(60, 0, 70, 10))]
WHERE = "expected dog left of target, found "


@pytest.mark.parametrize("wanted, objects, reason", [
    (DOG, [thing("dog"), thing("cat")], ""), (DOG, [thing("dog", 0.3001)], ""),
    (DOG, [thing("dog", 0.3)], "expected dog>=1, found 0"), (CAT_AND_DOG, [thing("dog"), thing("cat")], ""),
    (CAT_AND_DOG, [thing("bus")], "expected cat>=1, found 0\nexpected dog>=1, found 0"),
    (DOG | {"exclude": CAT_AND_DOG["include"][:1]}, [thing("dog"), thing("cat")], "expected cat<1, found 1"),
    (TWO_DOGS, DOGS[:1], "expected dog>=2, found 1"), (TWO_DOGS, DOGS[:2], ""),
    (TWO_DOGS, DOGS, "expected dog<3, found 3"), (TWO_DOGS, [*DOGS[:2], thing("dog", 0.9)], ""),
    (prompt("counting", ("cow", 16), exclude=[("cow", 17)]), HERD, ""),  # the best 16 of a class count
    (RED_CAR, [thing("car", color="red")], ""),
    (RED_CAR, [thing("car", 0.9, color="red"), thing("car", color="blue")],
     "expected red car>=1, found 0; there are 1 blue"),
    (RED_CARS, [thing("car", color="red"), thing("car", color="blue"), thing("car", 0.5, color="red")],
     "expected red car>=2, found 1; there are 1 red, 1 blue"),
    (RED_CAR_BLUE_BUS, [thing("car", color="red"), thing("bus", color="blue")], ""),
    (RED_CAR_BLUE_BUS, [thing("car", color="blue"), thing("bus", color="red")], "expected red car>=1, found 0; there "
     "are 1 blue\nexpected blue bus>=1, found 0; there are 1 red"),
    (DOG_LEFT_OF_CAT, [thing("dog"), thing("cat", box=RIGHT)], ""),
    (DOG_LEFT_OF_CAT, [thing("dog", box=RIGHT), thing("cat")], f"{WHERE}right of"),
    (DOG_LEFT_OF_CAT, [thing("dog")], "expected cat>=1, found 0\nno target for dog to be left of"),
    # the best dog and the best cat alone; every pair, where there are several
    (DOG_LEFT_OF_CAT, [thing("dog"), thing("dog", 0.5, RIGHT), thing("cat", 0.9, RIGHT), thing("cat", 0.5)], ""),
    (DOG_LEFT_OF_CAT, [thing("dog", 0.4), thing("dog", 0.5, RIGHT), thing("cat", box=(15, 0, 16, 9))],
     f"{WHERE}right of"),
    (DOGS_LEFT_OF_CATS, [*CATS, thing("dog"), thing("dog", box=RIGHT)], ""),
    (DOGS_LEFT_OF_CATS, [*CATS, thing("dog", box=RIGHT), thing("dog", box=FAR)], f"{WHERE}right of"),
    (DOG_LEFT_OF_RED_CAT, [thing("cat", box=RIGHT, color="black"), thing("dog")],
     "expected red cat>=1, found 0; there are 1 black\nno target for dog to be left of")])
def test_verdicts(wanted, objects, reason):
    assert geneval.judge(geneval.kept(objects, wanted["tag"]), wanted) == (not reason, reason)


def test_which_objects_count():
    assert not geneval.kept([thing("dog", 0.5)], "colors", threshold=0.5)
    assert len(geneval.kept([*DOGS, thing("dog", 0.9)], "counting", counting_threshold=0.89)["dog"]) == 4
    groups = geneval.kept([*HERD, thing("dog")], "counting")
    assert [c["box"][0] for c in groups["cow"]] == list(range(19, 3, -1)) and len(groups["dog"]) == 1
    assert len(geneval.kept(HERD, "counting", max_objects=17)["cow"]) == 17
    a, b, c = thing("dog", 0.92), thing("dog", 0.99, (0, 0, 10, 8)), thing("dog", 0.95, (30, 0, 40, 10))
    assert geneval.overlap((0, 0, 9, 9), (5, 0, 14, 9)) == 50 / 150  # x2 and y2 counted as inside
    for most, groups in ((1, [b, c, a]), (0.9, [b, c, a]), (99 / 121, [b, c])):  # the two overlap exactly so much
        assert geneval.kept([a, b, c], "counting", max_overlap=most) == {"dog": groups}
    # colors are asked of no more than `count`, and of none where there are too few
    cars = [thing("car", 0.4), thing("car", 0.8), thing("dog"), thing("car", 0.3)]
    for wanted, objects, asked in ((RED_CAR, cars, [cars[1]]), (RED_CARS, cars, [cars[1], cars[0]]),
                                   (RED_CARS, cars[:1], []), (prompt("colors", ("car", 1)), cars, [])):
        assert geneval.color_wanted(geneval.kept(objects, "colors"), wanted) == asked


def centred(x, y, side):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


@pytest.mark.parametrize("offset, sides, names", [
    ((-10, 0), (50, 50), set()),  # exactly the margin, 0.1 of both extents
    ((-11, 0), (50, 50), set()),  # beyond it, but by less than half of the offset
    ((-20, 0), (50, 50), set()),  # by exactly half
    ((-21, 0), (50, 50), {"left of"}), ((21, 0), (50, 50), {"right of"}), ((0, -21), (50, 50), {"above"}),
    ((0, 21), (50, 50), {"below"}), ((6, 8), (5, 5), {"below"}),  # (6 - 1) / 10 is exactly a half
    ((6.1, 8), (5, 5), {"below", "right of"}), ((8, -6), (5, 5), {"right of"}),
    ((-30, -30), (2, 2), {"above", "left of"}), ((0, 0), (4, 4), set())])
def test_relative_position(offset, sides, names):
    box = centred(100 + offset[0], 100 + offset[1], sides[0])
    assert geneval.relative_position(box, centred(100, 100, sides[1])) == names
    assert geneval.relative_position(centred(89, 100, 50), centred(100, 100, 50), 0.05) == {"left of"}


def test_both_means():
    results = [(tag, i % 2 == 0, tag) for tag in geneval.TASKS[:5] for i in range(2)]
    results += [("color_attr", i < 8, f"p{i // 4}") for i in range(10)]
    results = [dict(zip(("tag", "correct", "metadata"), result)) for result in results]
    scores = geneval.summary(results)
    assert scores["tasks"]["color_attr"] == {"images": 10, "correct": 8, "score": 0.8}
    assert math.isclose(scores["mean_of_tasks"], (5 * 0.5 + 0.8) / 6)
    assert math.isclose(scores["mean_of_images"], 13 / 20) and (scores["prompts"], scores["images"]) == (8, 20)
    assert geneval.summary(results[2:])["mean_of_tasks"] is None


def write_lines(path, values):
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return str(path)


def picture(seed, size=(40, 32)):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def make_layout(folder, prompts, per_prompt=1):
    geneval.write_layout(folder, prompts)
    for path, i, j in geneval.folders(prompts, per_prompt):
        picture(10 * i + j).save(folder / path)
    return folder


def test_the_layout_is_the_official_one(tmp_path):
    prompts = geneval.read_prompts(write_lines(tmp_path / "p.jsonl", PROMPTS))
    assert prompts == PROMPTS and len(geneval.folders(prompts)) == 24
    out = make_layout(tmp_path / "out", prompts, 2)
    geneval.write_layout(out, prompts)  # again over itself
    for i, p in enumerate(PROMPTS):  # the official evaluator reads one JSON object, and files of digits
        assert json.loads((out / f"{i:05d}/metadata.jsonl").read_text()) == p
        assert sorted(path.name for path in (out / f"{i:05d}/samples").iterdir()) == ["0000.png", "0001.png"]
    for other in (out / "00000/grid.png", out / "00001/samples/grid.png", out / "notes"):
        other.touch()
    layout = geneval.read_layout(out)
    assert [p for p, _ in layout] == PROMPTS
    names = [path.relative_to(out).as_posix() for _, paths in layout for path in paths]
    assert names == [path for path, _, _ in geneval.folders(prompts, 2)]


def line(filename="00000/samples/0000.png", *objects, **changes):
    return {"filename": filename, "width": 40, "height": 32, "objects": list(objects)} | changes


BAD_PROMPTS = [
    ("{broken", "no single JSON object"), ("[1]", "1.* is wrong"), (DOG | {"tag": "colour"}, "colour"),
    ({k: v for k, v in DOG.items() if k != "include"}, "include"), (DOG | {"include": []}, "is wrong"),
    (prompt("single_object", ("mouse", 1)), "include 0.*mouse.*computer mouse"),
    (prompt("single_object", ([], 1)), "include 0"), (prompt("single_object", ("dog", True)), "count"),
    (prompt("single_object", ("dog", 1), exclude=[("cat",)]), "exclude 0.*count"),
    (prompt("colors", ("dog", 1, {"color": "gray"})), "gray"),
    (prompt("position", ("dog", 1), ("cat", 1, {"position": ["under", 0]})), "include 1.*under"),
    (prompt("position", ("dog", 1), ("cat", 1, {"position": ["below", 1]})), "include 1.*earlier object")]
BAD_DETECTIONS = [
    ({"width": 40, "objects": 1}, "filename"), (line(width=0), "width"), (line(height="32"), "height"),
    (line(objects=None), "objects"), (line("f", "dog"), "object 0.*dog"),
    (line("f", thing("remote")), "object 0.*tv remote"), (line("f", thing("dog", math.nan)), "NaN"),
    (line("f", thing("dog"), thing("dog", box=(20, 20, 10, 10))), r"object 1.*\[20, 20, 10, 10\]"),
    (line("f", thing("dog", box=(0, 0, 41, 10))), "within the picture"),
    (line("f", thing("dog", color="gray")), "gray"), (line("first"), "first has a line already")]


@pytest.mark.parametrize("read, good, bad, message", [
    *((geneval.read_prompts, [DOG, ""], *row) for row in BAD_PROMPTS),
    *((geneval.read_detections, [{"detector": "mine"}, line("first")], *row) for row in BAD_DETECTIONS)])
def test_bad_lines_are_named(tmp_path, read, good, bad, message):
    with pytest.raises(ValueError, match=f"x.jsonl, line 3.*{message}"):
        read(write_lines(tmp_path / "x.jsonl", [*good, bad]))


def test_bad_layouts_are_named(tmp_path):
    with pytest.raises(ValueError, match="p.jsonl is empty"):
        geneval.read_prompts(write_lines(tmp_path / "p.jsonl", ["", ""]))
    with pytest.raises(ValueError, match="must have folders 00000"):
        geneval.read_layout(tmp_path / "none")
    folder = make_layout(tmp_path / "out", PROMPTS[:3], 2)
    (folder / "00001/samples/0001.png").unlink()
    shutil.rmtree(folder / "00002/samples")
    with pytest.raises(ValueError, match="equally many.*prompt 1 has 1, prompt 2 has 0"):
        geneval.read_layout(folder)
    write_lines(folder / "00000/metadata.jsonl", [DOG, DOG])
    with pytest.raises(ValueError, match="00000/metadata.jsonl: it is no single JSON object"):
        geneval.read_layout(folder)
    (folder / "00000/metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="00000/metadata.jsonl"):
        geneval.read_layout(folder)


def run(monkeypatch, folder, **changes):
    """eval_geneval.py with these settings, in this process -> its report"""
    with monkeypatch.context() as patch:
        for name, value in ({"images": str(folder), "device": "cpu"} | changes).items():
            patch.setattr(eval_geneval, name, value)
        eval_geneval.main()
    return json.loads(Path(changes.get("out") or folder / "geneval.json").read_text())


def test_given_detections_are_scored(tmp_path, monkeypatch, capsys):
    folder = make_layout(tmp_path / "out", PROMPTS)
    found = [[thing("dog")], [thing("dog")], [thing("dog"), thing("dog")], [thing("car", color="red")],
             [thing("dog"), thing("cat", box=RIGHT)], [thing("car", color="red"), thing("bus", color="green")]]
    lines = [line(f"{i:05d}/samples/0000.png", *objects) for i, objects in enumerate(found)]
    given = write_lines(tmp_path / "d.jsonl", lines)
    report = run(monkeypatch, folder, detections=given)
    assert report["mean_of_tasks"] == report["mean_of_images"] == 4 / 6
    assert report["rules"]["threshold"] == 0.3 and report["prompts"] == report["images"] == 6
    assert report["detector"] == f"not said in {given}" and not report["note"] and given == report["detections"]
    printed = capsys.readouterr().out
    assert "counting                       100.00 %  (1 of 1)" in printed and "66.67 %" in printed
    results = [json.loads(text) for text in (folder / "geneval.results.jsonl").read_text().splitlines()]
    assert [r["correct"] for r in results] == [True, False, True, True, True, False]
    assert results[1]["reason"] == "expected cat>=1, found 0" and json.loads(results[1]["metadata"]) == CAT_AND_DOG
    write_lines(tmp_path / "d.jsonl", [{"detector": "YOLO"}, *lines])
    assert run(monkeypatch, folder, detections=given)["detector"] == "YOLO"
    for changed, message in (
            (lines[:5], "00005/samples/0000.png"),
            ([*lines, line("00007/samples/0000.png")], "00007/samples/0000.png"),
            ([*lines[:5], line("00005/samples/0000.png", thing("bus"))], '00005/samples/0000.png have no "color"')):
        write_lines(tmp_path / "d.jsonl", changed)
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, folder, detections=given)
    with pytest.raises(ValueError, match="no images: give --images FOLDER"):
        run(monkeypatch, folder, images="")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(detector, clip): folders of small random ones; the detector sees cars and a few dogs everywhere"""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    swin = SwinConfig(image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    network = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=8,
        id2label=dict(enumerate(geneval.CLASSES))))
    with torch.no_grad():
        network.class_predictor.weight.mul_(8)
        network.class_predictor.bias[[2, 16]] = torch.tensor([6.0, 5.5])
        for name, p in network.named_parameters():
            if "mask_embedder" in name and p.ndim == 2:
                p.mul_(4)
    network.save_pretrained(folder / "detector")
    write_clip_model(folder / "clip", spread=0.3, num_hidden_layers=1, image_size=28, patch_size=14)
    return str(folder / "detector"), str(folder / "clip")


def plain_objects(class_logits, mask_logits, padded, resized, size):
    """[(class, score, box, mask)], slowly, one pair of query and class after the other"""
    def enlarged(x, shape):
        return F.interpolate(torch.tensor(x)[None, None], shape, mode="bilinear")[0, 0].numpy()

    chances = np.exp(class_logits) / np.exp(class_logits).sum(1, keepdims=True)
    pairs = [(chances[q, c], q, c) for q in range(len(chances)) for c in range(80)]
    found = []
    for chance, q, c in sorted(pairs, reverse=True)[:100]:
        logits = enlarged(enlarged(mask_logits[q], padded)[:resized[0], :resized[1]], size)
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


def test_the_detectors_input_and_output(models):
    square = picture(3, (32, 32))  # transformers' own stretches others to multiples of 32 instead of padding them
    pixels, resized = detector.to_input(square, "cpu")
    theirs = Mask2FormerImageProcessorPil()(square, return_tensors="pt")["pixel_values"]
    assert resized == (800, 800)
    torch.testing.assert_close(pixels, theirs, atol=0.04, rtol=0)  # two grey levels: PIL rounds twice
    assert detector.to_input(picture(0, (30, 60)), "cpu")[1] == (1333, 667)  # the longer side is at most 1333
    pixels, resized = detector.to_input(picture(3), "cpu")
    assert pixels.shape == (1, 3, 800, 1024) and resized == (800, 1000)
    assert pixels[0, 0, :, 1000:].unique().tolist() == [pytest.approx((128 - 123.675) / 58.395)]
    network = detector.load_detector(models[0], "cpu")
    with torch.no_grad():
        out = network(pixel_values=pixels)
    objects, masks = detector.detect(network, picture(3))
    wanted, wanted_masks = detector.to_objects(out.class_queries_logits[0], out.masks_queries_logits[0], (800, 1024),
                                               (800, 1000), (32, 40))
    assert objects == wanted and np.array_equal(masks, wanted_masks) and masks.shape == (len(objects), 32, 40)


def test_colors_equal_transformers_own(models):
    tower = clip.Clip(models[1], "cpu")
    reference, tokenizer = CLIPModel.from_pretrained(models[1]).eval(), CLIPTokenizer.from_pretrained(models[1])
    processor = CLIPImageProcessorPil.from_pretrained(models[1])
    image, seen, rng = picture(5, (60, 48)), set(), np.random.default_rng(0)
    for i in range(12):
        mask = rng.random((48, 60)) < 0.7
        left, top, right, bottom = map(int, rng.integers((0, 0, 40, 30), (20, 16, 60, 48)))
        found = thing("teddy bear" if i % 2 else "car", box=(left, top, right, bottom))
        detector.name_colors(tower, {}, image, [found], mask[None])
        pixels = np.where(mask[..., None], np.array(image), 0x99).astype(np.uint8)
        cut, scores = Image.fromarray(pixels[top:bottom, left:right]), []
        for color in geneval.COLORS:
            texts = [f"{color} {found['class']}", f"{color}-colored {found['class']}", f"{color} object"]
            ids = tokenizer([f"a photo of a {text}" for text in texts], padding=True, return_tensors="pt")
            with torch.no_grad():
                out = reference(**ids, **processor(cut, return_tensors="pt"))
            text = out.text_embeds.mean(0)  # transformers normalises both
            scores.append(float(out.image_embeds[0] @ (text / text.norm())))
        assert found["color"] == geneval.COLORS[int(np.argmax(scores))]
        seen.add(found["color"])
    assert len(seen) > 1  # the classifier is no constant


def test_the_centre_is_torchvisions():
    """It rounds half a pixel to an even number: 3 left over are 2 on the left, 1 and 5 are 0 and 2"""
    columns = np.broadcast_to(np.arange(13, dtype=np.uint8)[None, :, None], (8, 13, 3))
    for width, left in ((8, 0), (9, 0), (10, 1), (11, 2), (12, 2), (13, 2)):
        cut = np.asarray(detector.centre(Image.fromarray(columns[:, :width].copy()), 8))
        assert cut.shape == (8, 8, 3) and cut[0, :, 0].tolist() == list(range(left, left + 8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models):
    """(folder of three prompts with two pictures each, what a whole run writes, settings)"""
    cars = [DOG, prompt("colors", ("car", 2, {"color": "brown"})),
            prompt("position", ("car", 1), ("dog", 1, {"position": ["above", 0]}))]
    folder = make_layout(tmp_path_factory.mktemp("layout") / "out", cars, 2)
    settings = {"detector": models[0], "clip": models[1]}
    with pytest.MonkeyPatch.context() as patch:
        run(patch, folder, **settings)
    return folder, written(folder, "geneval"), settings


def written(folder, name):
    assert not list(folder.rglob("*.tmp"))
    return [(folder / f"{name}{end}").read_text() for end in (".json", ".detections.jsonl", ".results.jsonl")]


def test_a_run_says_what_it_was(whole, monkeypatch):
    folder, (scores, lines, results), settings = whole
    report = json.loads(scores)
    assert report["detector"] == settings["detector"] and "not mmdetection's" in report["note"]
    header, *lines = map(json.loads, lines.splitlines())
    assert header == report["detections_header"] and header["detector_sha256"] != header["clip_sha256"]
    assert [r["filename"] for r in lines] == [path for path, _, _ in geneval.folders(range(3), 2)]
    for r in lines:
        assert sum("color" in found for found in r["objects"]) == (2 if r["filename"].startswith("00001") else 0)
    # given back as --detections, they give the same verdicts
    given, out = folder / "geneval.detections.jsonl", folder / "again.json"
    again = run(monkeypatch, folder, detections=str(given), out=str(out))
    assert again["tasks"] == report["tasks"] and again["note"] == report["note"]
    assert (folder / "again.results.jsonl").read_text() == results


def test_a_stopped_run_goes_on(whole, monkeypatch):
    folder, expected, settings = whole
    settings = settings | {"out": str(folder / "stopped.json")}
    names = [path for path, _, _ in geneval.folders(range(3), 2)]
    looked, look_at = [], eval_geneval.look_at
    monkeypatch.setattr(eval_geneval, "look_at", lambda name, *args: looked.append(name) or look_at(name, *args))
    (folder / "stopped.detections").mkdir()
    for name in names[::2]:  # as if it had been killed, with other processes at work
        name = f"{name.replace('/', '_')}.json"
        shutil.copy(folder / "geneval.detections" / name, folder / "stopped.detections" / name)
    run(monkeypatch, folder, **settings)
    assert written(folder, "stopped") == expected and looked == names[1::2]
    # looked at again: pictures that are others now (damaged ones are named), or whose prompt asks for a color now
    paths = [folder / names[0], folder / names[1], folder / "00002/metadata.jsonl"]
    before = [path.read_bytes() for path in paths]
    paths[0].write_bytes(before[0][:90])
    paths[1].write_text("no picture")
    paths[2].write_text(json.dumps(RED_CAR))
    looked.clear()
    with pytest.raises(ValueError, match="2 of 6 .*00000/samples/0000.png .*00000/samples/0001.png .*Unidentified"):
        run(monkeypatch, folder, **settings)
    assert looked == [*names[:2], *names[4:]]
    for path, data in zip(paths, before):
        path.write_bytes(data)
    run(monkeypatch, folder, **settings)
    assert written(folder, "stopped") == expected
    looked.clear()
    run(monkeypatch, folder, **settings, threshold=0.2)
    assert looked == names


def test_two_processes_write_the_same(script, whole):
    folder, expected, settings = whole
    words = [f"--{name}={value}" for name, value in settings.items()]
    printed = script("eval_geneval.py", f"--images={folder}", *words, "--device=cpu", f"--out={folder / 'two.json'}",
                     processes=2)
    assert written(folder, "two") == expected
    assert "none, as not all six tasks are here" in printed and "(its own weights" in printed


def test_models_that_will_not_do(tmp_path, models, monkeypatch):
    with pytest.raises(ValueError, match="no/such-model cannot be loaded"):
        clip.Clip("no/such-model", "cpu")
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
