"""GenEval's rules on hand-made detections, and its layout; the detector's post-processing and colors against plain
restatements; eval_geneval.py: runs that were stopped or shared out."""
import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launch
from PIL import Image
from test_text import write_clip_model
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import eval_geneval
from evaluation import clip, detector, geneval

NAMES = [f"{i:05d}/samples/{j:04d}.png" for i in range(3) for j in range(2)]
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
    (DOG, [thing("dog", 0.3001), thing("cat")], ""), (DOG, [thing("dog", 0.3)], "expected dog>=1, found 0"),
    (CAT_AND_DOG, [thing("dog"), thing("cat")], ""),
    (TWO_DOGS, [*DOGS[:2], thing("dog", 0.9)], ""), (TWO_DOGS, DOGS, "expected dog<3, found 3"),
    (prompt("counting", ("cow", 16), exclude=[("cow", 17)]), HERD, ""),  # the best 16 of a class count
    (RED_CARS, [thing("car", color="red"), thing("car", color="blue"), thing("car", 0.5, color="red")],
     "expected red car>=2, found 1; there are 1 red, 1 blue"),
    (RED_CAR_BLUE_BUS, [thing("car", color="red"), thing("bus", color="blue")], ""),
    (DOG_LEFT_OF_CAT, [thing("dog", box=RIGHT), thing("cat")], f"{WHERE}right of"),
    # the best dog and the best cat alone; every pair, where there are several
    (DOG_LEFT_OF_CAT, [thing("dog"), thing("dog", 0.5, RIGHT), thing("cat", 0.9, RIGHT), thing("cat", 0.5)], ""),
    (DOGS_LEFT_OF_CATS, [*CATS, thing("dog", box=RIGHT), thing("dog", box=FAR)], f"{WHERE}right of"),
    (DOG_LEFT_OF_RED_CAT, [thing("cat", box=RIGHT, color="black"), thing("dog")],
     "expected red cat>=1, found 0; there are 1 black\nno target for dog to be left of")])
def test_verdicts(wanted, objects, reason):
    assert geneval.judge(geneval.groups_of(objects, wanted["tag"]), wanted) == (not reason, reason)


@pytest.mark.parametrize("offset, sides, names", [
    ((-10, 0), (50, 50), set()),  # exactly the margin, 0.1 of both extents
    ((-20, 0), (50, 50), set()),  # beyond it, by exactly half of the offset
    ((-21, 0), (50, 50), {"left of"}), ((21, 0), (50, 50), {"right of"}), ((0, -21), (50, 50), {"above"}),
    ((0, 21), (50, 50), {"below"}), ((6, 8), (5, 5), {"below"}),  # (6 - 1) / 10 is exactly a half
    ((6.1, 8), (5, 5), {"below", "right of"}), ((0, 0), (4, 4), set())])
def test_relative_position(offset, sides, names):
    (x, y), (a, b) = offset, sides
    box = (x - a / 2, y - a / 2, x + a / 2, y + a / 2)
    assert geneval.relative_position(box, (-b / 2, -b / 2, b / 2, b / 2)) == names


def test_both_means():
    results = [{"tag": tag, "correct": i % 2 == 0, "metadata": tag} for tag in geneval.TASKS[:5] for i in range(2)]
    results += [{"tag": "color_attr", "correct": i < 8, "metadata": f"p{i // 4}"} for i in range(10)]
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
    assert geneval.read_prompts(write_lines(tmp_path / "p.jsonl", PROMPTS)) == PROMPTS
    out = make_layout(tmp_path / "out", PROMPTS, 2)
    for i, p in enumerate(PROMPTS):  # the official evaluator reads one JSON object, and files of digits
        assert json.loads((out / f"{i:05d}/metadata.jsonl").read_text()) == p
    for other in (out / "00000/grid.png", out / "00001/samples/grid.png", out / "notes"):
        other.touch()
    names = [path.relative_to(out).as_posix() for _, paths in geneval.read_layout(out) for path in paths]
    assert names[:6] == NAMES and len(names) == 12
    (out / "00001/samples/0001.png").unlink()
    with pytest.raises(ValueError, match="equally many.*prompt 1 has 1"):
        geneval.read_layout(out)
    write_lines(out / "00000/metadata.jsonl", ["{}"])
    for folder, message in ((out, "00000/metadata.jsonl cannot .*'tag' is missing"), (tmp_path / "no", "equally many")):
        with pytest.raises(ValueError, match=message):
            geneval.read_layout(folder)


def test_bad_prompts_are_named(tmp_path):
    for bad, message in (("{broken", "JSONDecodeError"), ("[1]", "TypeError"), (DOG | {"prompt": " "}, "without text"),
                         (prompt("single_object", ("mouse", 1)), "not know mouse"),
                         (prompt("single_object", ("dog", 1), exclude=[("cat",)]), "'count' is missing")):
        with pytest.raises(ValueError, match=f"x.jsonl, line 3 cannot be used .*{message}"):
            geneval.read_prompts(write_lines(tmp_path / "x.jsonl", [DOG, "", bad]))


def run(monkeypatch, folder, out, **changes):
    """eval_geneval.py with these settings, in this process -> its report"""
    with monkeypatch.context() as patch:
        for name, value in ({"images": str(folder), "device": "cpu", "out": str(out)} | changes).items():
            patch.setattr(eval_geneval, name, value)
        eval_geneval.main()
    return json.loads((out / "geneval.json").read_text())


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


def test_objects_of_logits():
    """Probabilities of pairs times the mean probability within the mask; those without a mask are left out"""
    class_logits, mask_logits = torch.full((3, 81), -20.0), torch.full((3, 4, 8), -1.0)
    class_logits[[0, 0, 1, 2], [2, 16, 3, 80]] = torch.tensor([0.0, math.log(3), 5.0, 5.0])  # 80 is "no object"
    mask_logits[0, :2, :2], mask_logits[2] = 3.0, 3.0
    objects, masks = detector.to_objects(class_logits, mask_logits, (4, 8), (4, 4), (4, 4))
    assert [(thing["class"], thing["box"]) for thing in objects[:2]] == [("dog", [0, 0, 2, 2]), ("car", [0, 0, 2, 2])]
    inside = 1 / (1 + math.exp(-3))
    assert [thing["score"] for thing in objects[:2]] == pytest.approx([0.75 * inside, 0.25 * inside])
    assert max(thing["score"] for thing in objects[2:]) < 1e-6 and masks[0].sum() == 4
    # masks are enlarged before the threshold, from the content's part of what was padded
    objects, _ = detector.to_objects(class_logits, mask_logits, (8, 16), (8, 8), (32, 32))
    x = (torch.arange(32) + 0.5) / 8 - 0.5  # places on the grid of logits, which fall from 3 at 1 to -1 at 2
    assert objects[0]["box"] == [0, 0, *[int((x < 1.75).sum())] * 2] == [0, 0, 18, 18]


def test_the_detectors_input():
    square = picture(3, (32, 32))  # transformers' own stretches others to multiples of 32 instead of padding them
    pixels, resized = detector.to_input(square, "cpu")
    theirs = Mask2FormerImageProcessorPil()(square, return_tensors="pt")["pixel_values"]
    assert resized == (800, 800)
    torch.testing.assert_close(pixels, theirs, atol=0.04, rtol=0)  # two grey levels: PIL rounds twice
    assert detector.to_input(picture(0, (30, 60)), "cpu")[1] == (1333, 667)  # the longer side is at most 1333
    pixels, resized = detector.to_input(picture(3), "cpu")
    assert pixels.shape == (1, 3, 800, 1024) and resized == (800, 1000)
    assert pixels[0, 0, :, 1000:].unique().tolist() == [pytest.approx((128 - 123.675) / 58.395)]


def test_colors_equal_transformers_own(models):
    tower = clip.Clip(models[1], "cpu")
    reference, tokenizer = CLIPModel.from_pretrained(models[1]).eval(), CLIPTokenizer.from_pretrained(models[1])
    processor = CLIPImageProcessorPil.from_pretrained(models[1])
    image, seen, rng = picture(5, (60, 48)), set(), np.random.default_rng(0)
    for i in range(12):
        mask = rng.random((48, 60)) < 0.7
        left, top, right, bottom = map(int, rng.integers((0, 0, 40, 30), (20, 16, 60, 48)))
        found = thing("teddy bear" if i % 2 else "car", box=(left, top, right, bottom))
        detector.name_colors(tower, image, [found], mask[None])
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models):
    """(folder of three prompts with two pictures each, what two processes write, settings)"""
    cars = [DOG, prompt("colors", ("car", 2, {"color": "brown"})),
            prompt("position", ("car", 1), ("dog", 1, {"position": ["above", 0]}))]
    settings, folder = {"detector": models[0], "clip": models[1]}, tmp_path_factory.mktemp("layout")
    make_layout(folder / "out", cars, 2)
    words = [f"--{name}={value}" for name, value in settings.items()]
    printed = launch("eval_geneval.py", f"--images={folder}/out", *words, processes=2, cwd=folder)
    assert "none, as not all six tasks are here" in printed and "(not mmdetection" in printed
    return folder / "out", written(folder / "scores/out_geneval"), settings


def written(scores):
    """What a run has written, by name"""
    return {path.relative_to(scores).as_posix(): path.read_text() for path in scores.rglob("*") if path.is_file()}


def test_a_run_says_what_it_was(whole):
    folder, files, settings = whole
    assert files.keys() == {"detections.json", "geneval.json", "results.jsonl", "detections.jsonl",
                            *(f"detections/{name.replace('/', '_')}.json" for name in NAMES)}
    results, (header, *records) = (list(map(json.loads, files[name].splitlines()))
                                   for name in ("results.jsonl", "detections.jsonl"))
    assert header == json.loads(files["detections.json"]) and header["detector"] == settings["detector"]
    prompts = [prompt for prompt, _ in geneval.read_layout(folder) for _ in range(2)]
    for name, wanted, result, record in zip(NAMES, prompts, results, records, strict=True):
        groups = geneval.groups_of(record["objects"], wanted["tag"])
        assert (result["correct"], result["reason"]) == geneval.judge(groups, wanted)
        assert json.loads(result["metadata"]) == wanted and result["filename"] == record["filename"] == name
        assert sum("color" in thing for thing in record["objects"]) == (2 if wanted["tag"] == "colors" else 0)


def test_a_stopped_run_goes_on(whole, tmp_path, monkeypatch):
    folder, files, settings = whole
    scores, looked, load = tmp_path / "scores", [], eval_geneval.load_picture
    monkeypatch.setattr(eval_geneval, "load_picture", lambda path, *rest: (
        looked.append(path.relative_to(folder).as_posix()) or load(path, *rest)))
    (scores / "detections").mkdir(parents=True)
    stored = [f"detections/{name.replace('/', '_')}.json" for name in NAMES]
    for name in ("detections.json", *stored[::2]):  # as if it had been killed, with other processes at work
        (scores / name).write_text(files[name])
    run(monkeypatch, folder, scores, **settings)
    assert written(scores) == files and looked == NAMES[1::2]
    # a picture that is another now is looked at again; a damaged one, or a damaged file of its objects, is named
    first, second = ((folder / name).read_bytes() for name in NAMES[:2])
    no_scores = files[stored[0]].replace('"score"', '"skore"').encode()
    for path, content, message in (
            (folder / NAMES[1], first, ""), (folder / NAMES[1], second[:90], "0000/samples/0001.png: .*Make it anew"),
            *((scores / stored[0], c, f"{Path(stored[0]).name} cannot be used") for c in (b"[]", no_scores))):
        path.write_bytes(content)
        looked.clear()
        with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
            run(monkeypatch, folder, scores, **settings)
        assert looked == NAMES[1:2] * (path == folder / NAMES[1])
    (folder / NAMES[1]).write_bytes(second)
    shutil.copytree(folder, tmp_path / "other")
    for images, out, message in ((tmp_path / "other", scores, "belongs to another command .*images_folder"),
                                 (folder, folder / "scores", "where nothing is written"), ("", scores, "no images")):
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, images, out, **settings)


def test_models_that_will_not_do(tmp_path, models):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(models[0])
    weights = {k: v for k, v in model.state_dict().items() if k != "class_predictor.weight"}
    model.save_pretrained(tmp_path / "cut", state_dict=weights)
    model.config.id2label = model.config.id2label | {79: "wall"}
    model.save_pretrained(tmp_path / "wall")
    for name, message in (("no", "no cannot be used"), ("wall", "COCO's 80 classes"), ("cut", "1 missing weights")):
        with pytest.raises(ValueError, match=message):
            detector.load_detector(str(tmp_path / name), "cpu")
