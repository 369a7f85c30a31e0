"""eval_fid.py: its numbers against transformers' and numpy's, the drawn set, kills and shared work, what it refuses."""
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch
from PIL import Image
from test_text import write_clip_model
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import eval_fid
from evaluation import drawn, frechet, inception
from pictures import decode, shapes

CAPTIONS = ["a small red circle on a white background", "a large blue ring", "a small cyan cross", "a large pink bar",
            "a green square", "two red rings", "a dog " * 60]  # more than CLIP's 77 tokens


class SmallInception:
    """A stand-in: twelve pixels of a picture, resized as for Inception"""
    width, name = 12, "a few pixels"

    def __init__(self, path, device, resize):
        self.prepare = inception.RESIZES[resize]
        self.about = {"network_sha256": "0" * 64, "published": False, "resize": resize}

    def image(self, prepared):
        return torch.stack(prepared)[:, :, 70::150, 70::150].flatten(1)


def draw(folder, n, size=(40, 40), seed=0, suffix=".png"):
    """n random coarse pictures"""
    folder.mkdir(parents=True)
    rng = np.random.RandomState(seed)
    for i in range(n):
        cells = rng.randint(0, 256, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}{suffix}")


@pytest.fixture(scope="module")
def models(tmp_path_factory, shapes16):
    """Small random CLIPs, a small checkpoint, and real-looking pictures with captions"""
    folder = tmp_path_factory.mktemp("eval")
    write_clip_model(folder / "clip")
    write_clip_model(folder / "clip-fid", seed=1, num_hidden_layers=1)
    launch("train.py", *SMALL, f"--data={shapes16}", f"--out={folder / 'run'}", "--max_steps=4", "--sample_guidance=2")
    draw(folder / "made", 7)
    draw(folder / "real", 9, size=(60, 44), seed=1, suffix=".jpg")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return folder


@pytest.fixture
def evaluate(models, tmp_path, monkeypatch):
    """evaluate(**settings) -> results.json, in this process and with the small models"""
    monkeypatch.setattr(inception, "load", SmallInception)
    small = {"clip": models / "clip", "clip_fid": models / "clip-fid", "out": tmp_path / "out", "device": "cpu",
             "steps": 2, "batch_size": 4}

    def run(**settings):
        with monkeypatch.context() as patch:
            for name, value in (small | settings).items():
                patch.setattr(eval_fid, name, str(value) if isinstance(value, type(tmp_path)) else value)
            eval_fid.main()
            return json.loads((ROOT / eval_fid.out / "results.json").read_text())
    return run


def test_numbers_equal_their_definitions(models, evaluate):
    """FID and CLIP-FID from np.cov, CLIP's features and scores from transformers, on 40 px against 60 x 44"""
    found = evaluate(images=models / "made", captions=models / "captions.txt", reference=models / "real")
    (result,), protocol = found["results"], found["protocol"]
    ours, real = ([Image.fromarray(decode.square(decode.load(path, 1), 40)) for path in sorted(folder.iterdir())]
                  for folder in (models / "made", models / "real"))  # shorter side resized, then the centre
    net = SmallInception("", "cpu", "clean")

    def distance(a, b):
        both = [f.double().numpy() for f in (a, b)]
        return frechet.distance(*(v for f in both for v in (f.mean(0), np.cov(f, rowvar=False))))

    fid = distance(*(net.image([inception.clean(p) for p in pictures]) for pictures in (ours, real)))
    assert result["fid"] == pytest.approx(fid, abs=1e-4) and fid > 1
    model = CLIPModel.from_pretrained(models / "clip-fid")
    processor = CLIPImageProcessorPil.from_pretrained(models / "clip-fid")
    with torch.no_grad():
        rows = [model.get_image_features(**processor(p, return_tensors="pt")).pooler_output for p in (ours, real)]
    assert result["clip_fid"] == pytest.approx(distance(*rows), abs=2e-4) and result["clip_fid"] > 0.01
    model = CLIPModel.from_pretrained(models / "clip")
    processor = CLIPProcessor(processor, CLIPTokenizer.from_pretrained(models / "clip"))
    batch = processor(text=CAPTIONS, images=ours, return_tensors="pt", padding=True, truncation=True, max_length=77)
    with torch.no_grad():
        scores = (model(**batch).logits_per_image / model.logit_scale.exp()).diagonal()
    assert scores.std() > 0.005 and scores.min() < 0
    assert result["clip_score"] == pytest.approx(100 * scores.clamp_min(0).mean().item(), abs=2e-4)
    networks = protocol["networks"]
    assert protocol["resolution"] == 40 and networks["fid"]["resize"] == "clean" and not networks["fid"]["published"]
    assert result["pictures"] == 7 and networks["clip_score"]["name"] == str(models / "clip")
    assert protocol["reference"]["pictures"] == 9 and "bicubic" in protocol["pictures"]


def test_statistics_of_the_reference_are_kept_and_used(models, evaluate, tmp_path):
    settings = {"images": models / "made", "metrics": ("fid", "clip_fid")}
    first = evaluate(**settings, reference=models / "real", save_reference=tmp_path / "real.npz")
    again = evaluate(**settings, reference=tmp_path / "real.npz")
    assert again["results"] == first["results"]
    assert again["protocol"]["reference"]["clip_fid"]["about"]["pictures"] == 9
    with np.load(tmp_path / "real.npz") as file:  # as pytorch-fid reads it
        np.savez(tmp_path / "theirs.npz", mu=file["mu"], sigma=file["sigma"])  # as it writes it
    found = evaluate(**settings | {"metrics": ("fid",)}, reference=tmp_path / "theirs.npz")
    assert found["results"][0]["fid"] == first["results"][0]["fid"]
    for name, changed, message in (
            ("real", {"resize": "pytorch"}, "resize: clean there, pytorch now"),
            ("real", {"resolution": 32}, "resolution: 40 there, 32 now"), ("theirs", {}, "theirs.clip.npz")):
        with pytest.raises(ValueError, match=message):
            evaluate(**settings, reference=tmp_path / f"{name}.npz", **changed)


def test_pictures_are_hashed_and_those_that_cannot_be_used_named(models, evaluate, tmp_path):
    made, real = tmp_path / "made", tmp_path / "real"
    shutil.copytree(models / "made", made)
    shutil.copytree(models / "real", real)
    settings = {"images": made, "metrics": ("clip_fid",), "reference": real}
    first = evaluate(**settings)
    shutil.copy(made / "001.png", made / "002.png")
    second = evaluate(**settings)
    assert first["protocol"] == second["protocol"]
    assert first["results"][0]["pictures_sha256"] != second["results"][0]["pictures_sha256"]
    Image.new("RGB", (40, 48)).save(made / "003.png")
    (made / "005.png").write_bytes((made / "004.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"2 of 7.*003.png: is 40 x 48.*005.png: .*truncated"):
        evaluate(**settings)
    (real / "002.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 9 .*real/002.jpg: "):
        evaluate(**settings)
    Image.new("RGB", (40, 48)).save(made / "000.png")
    with pytest.raises(ValueError, match="000.png is 40 x 48: pictures must be square"):
        evaluate(**settings)
    assert json.loads((tmp_path / "out/results.json").read_text()) == second


def coco(path, folder):
    """Annotations as COCO's of a folder's pictures, two captions for each"""
    names = sorted(p.name for p in folder.iterdir())
    annotations = [{"image_id": i, "caption": f"{which} caption of {i}"} for which in ("first", "second")
                   for i in range(len(names))]
    path.parent.mkdir(exist_ok=True)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def test_captions_are_chosen_by_seed_and_the_reference_can_be_theirs(models, evaluate, tmp_path):
    coco(tmp_path / "captions.json", models / "real")
    settings = {"checkpoint": models / "run", "captions": tmp_path / "captions.json", "reference": models / "real",
                "metrics": ("clip_fid", "clip_score"), "count": 5}
    found = evaluate(**settings, matched=True)
    assert found["protocol"]["reference"]["pictures"] == 5 and found["protocol"]["resolution"] == 16
    drawn_from = [Image.open(path).text["prompt"] for path in sorted((tmp_path / "out/guidance_2").glob("*.png"))]
    chosen = [int(caption.removeprefix("first caption of ")) for caption in drawn_from]
    assert chosen == sorted(set(chosen)) and len(chosen) == 5
    with pytest.raises(ValueError, match="prompts_sha256"):
        evaluate(**settings, caption_seed=1)
    other = evaluate(**settings, caption_seed=1, out=tmp_path / "other")
    assert other["protocol"]["reference"]["pictures"] == 9
    assert other["results"][0]["captions_sha256"] != found["results"][0]["captions_sha256"]
    with pytest.raises(ValueError, match="has 9 captions, and count is 10"):
        evaluate(**settings | {"count": 10})


def test_the_coco_recipe_of_the_docs(models, evaluate, tmp_path):
    """Its command on a miniature in COCO's layout, with a curve over guidance scales"""
    text = (ROOT / "docs/evaluation.md").read_text()
    command = re.search(r"eval_fid\.py (--checkpoint \S+[\s\\]+--captions coco.*?)\n```", text, re.S)[1]
    given, name = {}, ""
    for word in shlex.split(command.replace("\\\n", " ")):
        name = word.removeprefix("--") if word.startswith("--") else name
        given.setdefault(name, []).extend([] if word.startswith("--") else [word])
    assert given.pop("count") == ["30000"] and given.pop("resolution") == ["256"] and given.pop("checkpoint")
    scales = tuple(map(float, given.pop("guidance_scales")))
    assert len(scales) == 5 and given.keys() == {"reference", "captions", "save_reference"}
    given = {name: tmp_path / value for name, (value,) in given.items()}
    shutil.copytree(models / "real", given["reference"])
    coco(given["captions"], given["reference"])
    found = evaluate(checkpoint=models / "run", count=6, resolution=12, guidance_scales=scales[:2], **given)
    assert [r["guidance_scale"] for r in found["results"]] == [1.5, 2.0] and found["protocol"]["resolution"] == 12
    assert found["protocol"]["reference"]["pictures"] == 9 and found["results"][0]["pictures"] == 6
    assert given["save_reference"].exists() and given["save_reference"].with_suffix(".clip.npz").exists()
    with Image.open(tmp_path / "out/fid_clip.png") as plotted:
        assert len(plotted.convert("RGB").getcolors(9999)) > 10


def test_the_drawn_set_is_scored_beside_drawn_pictures_and_chance(script, models, evaluate, tmp_path):
    script("eval_fid.py", "--checkpoint", models / "run", "--captions=shapes", "--count=6", "--sampler=dpmpp_2m",
           "--steps=2", "--out", tmp_path / "alone")
    (alone,) = json.loads((tmp_path / "alone/results.json").read_text())["results"]
    both = evaluate(checkpoint=models / "run", count=6, sampler="dpmpp_2m", batch_size=32)["results"]
    assert both[0] == alone and [r["captions"] for r in both] == ["shapes", "shapes_unseen"]
    assert both[1]["folder"] == "shapes_unseen/guidance_2"
    for held_out, entry in enumerate(both):
        scenes = [shapes.scene(10_000_000 + i, bool(held_out), 16) for i in range(6)]
        pictures, wanted = [image for image, _, _ in scenes], [attributes for _, _, attributes in scenes]
        for column, images in (("drawn", pictures), ("chance", pictures[1:] + pictures[:1])):
            scores = {name: list(n) for name, n in shapes.score(images, wanted).items()}
            assert entry[f"attributes_{column}"] == scores
        assert entry["attributes"]["background"][1] == 6 and entry["attributes"].keys() == scores.keys()
        with Image.open(tmp_path / "out" / f"{entry['captions']}_guidance_2.png") as grid:
            assert grid.width > 8 * 64  # as wide as eight pictures
    # pictures that are there already, of the prompts in their order
    (tmp_path / "scenes").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"scenes/{i}.png")
    (entry,) = evaluate(images=tmp_path / "scenes", captions="shapes_unseen")["results"]
    assert entry["attributes"]["background"] == [6, 6] and entry["attributes"] == entry["attributes_drawn"]


def test_stopped_and_shared_evaluations_end_with_the_same_file(models, evaluate, tmp_path):
    settings = {"checkpoint": models / "run", "captions": models / "captions.txt", "reference": models / "real",
                "clip": models / "clip", "clip_fid": models / "clip-fid", "metrics": ("clip_fid", "clip_score"),
                "guidance_scales": (1.0, 2.0), "steps": 3, "batch_size": 2, "device": "cpu"}
    expected, words = evaluate(**settings), ["--out", tmp_path / "two"]
    for name, value in settings.items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    launch("eval_fid.py", *words, processes=2)
    results = tmp_path / "two/results.json"
    assert json.loads(results.read_text()) == expected
    # as if it had been killed before the third picture of guidance_2, of which a batch of two is drawn again
    for path in (results, tmp_path / "two/guidance_2/00002.png"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("*.png")}
    assert evaluate(**settings, out=tmp_path / "two") == expected
    assert [path.name for path, time in before.items() if path.stat().st_mtime_ns != time] == ["00003.png"]
    # a folder that was made here, with the captions inside its pictures
    settings |= {"checkpoint": "", "captions": "", "guidance_scales": (-1.0,), "images": tmp_path / "two/guidance_2"}
    again = evaluate(**settings, out=tmp_path / "again")
    for key in ("guidance_scale", "clip_fid", "clip_score", "captions_sha256", "pictures_sha256", "generated"):
        assert again["results"][0][key] == expected["results"][1][key]
    (tmp_path / "two/guidance_2/00002.png").unlink()
    with pytest.raises(ValueError, match="guidance_2 holds 6 pictures, 7 were to be drawn"):
        evaluate(**settings)


def test_nothing_is_drawn_before_all_that_can_be_refused_is(models, evaluate, tmp_path, monkeypatch):
    settings = {"checkpoint": models / "run", "captions": models / "captions.txt", "metrics": ("clip_fid",),
                "reference": models / "real"}
    evaluate(**settings | {"metrics": ("clip_score",), "reference": ""}, guidance_scales=(3.0,))
    frechet.save(tmp_path / "wide.clip.npz", np.zeros(20), np.eye(20))
    frechet.save(tmp_path / "bad.clip.npz", np.zeros(16), -np.eye(16))
    for name in ("wide", "bad"):
        (tmp_path / f"{name}.npz").write_bytes(b"")
    monkeypatch.setattr(drawn, "generate", None)  # not even called
    for changed, message in [
            ({"guidance_scales": (1.0, 3.0), "steps": 3}, "guidance_3 holds pictures made otherwise .*steps: 2 there"),
            ({"reference": tmp_path / "wide.npz"}, "wide.clip.npz .*features: 20 there, 16 now"),
            ({"reference": tmp_path / "bad.npz"}, "bad.clip.npz.*is no covariance"),
            ({"resolution": 32}, "resolution is 32, and the pictures have 16"),
            ({"clip_fid": models / "made"}, "CLIP model .*made")]:
        with pytest.raises(ValueError, match=message):
            evaluate(**settings | changed)


def test_settings_are_refused_before_anything_is_loaded(models, evaluate, tmp_path, monkeypatch):
    made, run = {"images": models / "made"}, {"checkpoint": models / "run"}
    score, fid = {"metrics": ("clip_score",)}, {"metrics": ("fid",), "reference": models / "real"}
    two, named, unnamed = tmp_path / "two", tmp_path / "named.json", tmp_path / "unnamed.jsonl"
    for folder in (two, two / "sub"):
        folder.mkdir()
        shutil.copy(models / "real/000.jpg", folder / "x.jpg")
    named.write_text(json.dumps([{"image": "sub/x.jpg", "caption": "a"}, {"image": "else/x.jpg", "caption": "b"}]))
    unnamed.write_text('{"caption": "a"}\n{"caption": "b"}\n')
    for name in ("load_networks", "load_pipeline"):
        monkeypatch.setattr(eval_fid, name, None)
    for settings, message in [
            (made, "need a --reference"), (made | {"metrics": ("fud",)}, "'fud' is none of"),
            (made | {"metrics": ("attributes",)}, "of the drawn set"),
            (made | {"reference": "nowhere"}, "'nowhere' is not"), (made | fid | {"matched": True}, "matched needs"),
            (made | fid | {"matched": True, "captions": unnamed}, "'' \\(0 times"),
            (made | fid | {"matched": True, "captions": named, "reference": two}, "1 of .*else/x.jpg"),
            (made | fid | {"save_reference": "x.2014"}, "must end with .npz"),
            (made | score | {"save_reference": "x.npz"}, "about a --reference folder"),
            (made | score, "7 of 7 pictures have no caption.*000.png"),
            (made | score | {"count": 3}, "leave them out with --images"),
            (made | score | run, "leave them out with --images"),
            (score | {"images": "nowhere"}, "no folder of pictures nowhere"),
            (run | score | {"captions": "no.txt"}, "no captions file no.txt"),
            (made | fid | {"captions": "no.json"}, "no captions file no.json"),
            (run | {"out": unnamed}, "unnamed"), (run | fid | {"count": 1}, "needs two pictures"),
            ({"checkpoint": "nowhere"}, "no checkpoint nowhere"),
            *((run | {"guidance_scales": scales}, "all different, from 0 on")
              for scales in ((), (float("nan"),), (-3.0,), (1.0, 1.0000001)))]:
        with pytest.raises((ValueError, FileExistsError), match=message):
            evaluate(**settings)
