"""eval_fid.py: its numbers against transformers' and numpy's, the drawn set, kills and shared work, what it refuses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch
from make_inception_values import random_state
from PIL import Image
from test_text import write_clip_model
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import eval_fid
from evaluation import clip, drawn, frechet, inception
from pictures import decode, shapes

CAPTIONS = ["a small red circle on a white background", "a large blue ring", "a small cyan cross", "a large pink bar",
            "a green square", "two red rings", "a dog"]  # fmt: skip


def draw(folder, n, size=(40, 40), seed=0, suffix=".png"):
    """n random coarse pictures"""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    for i in range(n):
        cells = rng.randint(0, 256, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}{suffix}")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small random CLIPs, a random Inception, a small checkpoint, and real-looking pictures with captions"""
    folder = tmp_path_factory.mktemp("eval")
    write_clip_model(folder / "clip")
    write_clip_model(folder / "clip-fid", seed=1, num_hidden_layers=1)
    with torch.device("meta"):
        net = inception.Inception()
    torch.save(random_state({n: t.shape for n, t in net.state_dict().items()}), folder / "inception.pth")
    launch("prepare_latents.py", "--out", folder / "data", "--limit=60", "--resolutions=16")
    launch("train.py", *SMALL, f"--data={folder / 'data'}", f"--out={folder / 'run'}", "--max_steps=4",
           "--ema_decay=0.99", "--sample_guidance=2")  # fmt: skip
    draw(folder / "made", 7)
    draw(folder / "real", 9, size=(60, 44), seed=1, suffix=".jpg")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return folder


@pytest.fixture
def evaluate(models, tmp_path, monkeypatch):
    """evaluate(**settings) -> results.json, in this process and with the small models"""
    small = {"clip": str(models / "clip"), "clip_fid": str(models / "clip-fid"), "out": str(tmp_path / "out"),
             "inception": str(models / "inception.pth"), "device": "cpu", "steps": 2, "batch_size": 4}  # fmt: skip

    def run(**settings):
        with monkeypatch.context() as patch:
            for name, value in (small | settings).items():
                patch.setattr(eval_fid, name, value)
            eval_fid.main()
        return json.loads((tmp_path / "out/results.json").read_text())

    return run


def pictures_at(folder, side):
    """What eval_fid.py compares: shorter side resized, then the centre"""
    return [Image.fromarray(decode.square(decode.load(path, 1), side)) for path in sorted(folder.iterdir())]


def test_clip_equals_transformers(models):
    ours = clip.Clip(models / "clip")
    model = CLIPModel.from_pretrained(models / "clip")
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(models / "clip"), ours.tokenizer)
    images = [Image.open(p).convert("RGB") for p in sorted((models / "real").iterdir())[:7]]
    long = CAPTIONS[:6] + ["a " * 100]
    batch = processor(text=long, images=images, return_tensors="pt", padding=True, truncation=True, max_length=77)
    with torch.no_grad():
        theirs = model(**batch)
    scores = (theirs.logits_per_image / model.logit_scale.exp()).diagonal()
    assert scores.std() > 0.005 and scores.min() < 0
    ours = clip.clip_scores(ours.image(images), ours.text(long))
    assert (ours - 100 * scores.clamp_min(0)).abs().max() < 1e-3


def test_numbers_equal_their_definitions(models, evaluate):
    """FID and CLIP-FID from np.cov, CLIP score from transformers' features, on pictures of 40 px against 60 x 44"""
    found = evaluate(images=(str(models / "made"),), captions=str(models / "captions.txt"),
                     reference=str(models / "real"))  # fmt: skip
    result, protocol = found["results"][0], found["protocol"]
    ours, real = pictures_at(models / "made", 40), pictures_at(models / "real", 40)
    net = inception.load(models / "inception.pth")

    def distance(a, b):
        both = [f.astype(np.float64) for f in (a, b)]
        return frechet.distance(*(v for f in both for v in (f.mean(0), np.cov(f, rowvar=False))))

    fid = distance(*(net.image([inception.clean(p) for p in pictures]).numpy() for pictures in (ours, real)))
    assert result["fid"] == pytest.approx(fid, rel=1e-4) and fid > 1
    model = CLIPModel.from_pretrained(models / "clip-fid")
    processor = CLIPImageProcessorPil.from_pretrained(models / "clip-fid")
    with torch.no_grad():
        rows = [model.get_image_features(**processor(p, return_tensors="pt")).pooler_output.numpy()
                for p in (ours, real)]  # fmt: skip
    assert result["clip_fid"] == pytest.approx(distance(*rows), abs=2e-4) and result["clip_fid"] > 0.01
    score = clip.Clip(models / "clip")
    each = clip.clip_scores(score.image(ours), score.text(CAPTIONS))
    assert result["clip_score"] == pytest.approx(each.mean().item(), abs=2e-4)
    networks = protocol["networks"]
    assert protocol["resolution"] == 40 and networks["fid"]["resize"] == "clean" and not networks["fid"]["published"]
    assert result["pictures"] == 7 and networks["clip_score"]["name"] == str(models / "clip")
    assert protocol["reference"]["pictures"] == 9


def test_statistics_of_the_reference_are_kept_and_used(models, evaluate, tmp_path):
    settings = {"images": (str(models / "made"),), "metrics": ("fid", "clip_fid")}
    first = evaluate(**settings, reference=str(models / "real"), save_reference=str(tmp_path / "real.npz"))
    again = evaluate(**settings | {"metrics": ("clip_fid",)}, reference=str(tmp_path / "real.npz"))
    assert again["results"][0]["clip_fid"] == first["results"][0]["clip_fid"]
    assert again["protocol"]["reference"]["clip_fid"]["about"]["pictures"] == 9
    with np.load(tmp_path / "real.npz") as file:  # as pytorch-fid reads it
        assert file["mu"].shape == (2048,) and file["sigma"].shape == (2048, 2048)
        np.savez(tmp_path / "theirs.npz", mu=file["mu"], sigma=file["sigma"])  # as it writes it
    found = evaluate(**settings | {"metrics": ("fid",)}, reference=str(tmp_path / "theirs.npz"))
    assert found["results"][0]["fid"] == first["results"][0]["fid"]
    for name, changed, message in (
            ("real", {"resize": "pytorch"}, "resize: clean there, pytorch now"),
            ("real", {"resolution": 32}, "resolution: 40 there, 32 now"), ("theirs", {}, "theirs.clip.npz")):
        with pytest.raises(ValueError, match=message):
            evaluate(**settings, reference=str(tmp_path / f"{name}.npz"), **changed)


def test_pictures_that_cannot_be_used_are_named(models, evaluate, tmp_path):
    folder = tmp_path / "made"
    shutil.copytree(models / "made", folder)
    settings = {"images": (str(folder),), "metrics": ("clip_fid",), "reference": str(models / "real")}
    Image.new("RGB", (40, 48)).save(folder / "003.png")
    (folder / "005.png").write_bytes((folder / "004.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"2 of 7.*003.png: is 40 x 48.*005.png: .*truncated"):
        evaluate(**settings)
    assert not (tmp_path / "out/results.json").exists()
    shutil.copytree(models / "real", tmp_path / "real")
    (tmp_path / "real/002.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 9 .*real/002.jpg: "):
        evaluate(**settings | {"images": (str(models / "made"),), "reference": str(tmp_path / "real")})
    Image.new("RGB", (40, 48)).save(folder / "000.png")
    with pytest.raises(ValueError, match="000.png is 40 x 48: pictures must be square"):
        evaluate(**settings)


def coco(folder, names):
    """Annotations as COCO's, two captions for each picture"""
    annotations = [{"image_id": i, "caption": f"{which} caption of {i}"} for which in ("first", "second")
                   for i in range(len(names))]  # fmt: skip
    path = folder / "captions_val.json"
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_captions_are_chosen_by_seed_and_the_reference_can_be_theirs(models, evaluate, tmp_path):
    captions = coco(tmp_path, [p.name for p in sorted((models / "real").iterdir())])
    settings = {"checkpoint": str(models / "run"), "captions": str(captions), "reference": str(models / "real"),
                "metrics": ("clip_fid", "clip_score"), "count": 5}  # fmt: skip
    found = evaluate(**settings, matched=True)
    assert found["protocol"]["reference"]["pictures"] == 5 and found["protocol"]["resolution"] == 16
    drawn_from = [Image.open(path).text["prompt"] for path in sorted((tmp_path / "out/guidance_2").glob("*.png"))]
    chosen = [int(caption.removeprefix("first caption of ")) for caption in drawn_from]
    assert chosen == sorted(set(chosen)) and len(chosen) == 5
    with pytest.raises(ValueError, match="prompts_sha256"):
        evaluate(**settings, caption_seed=1)
    shutil.rmtree(tmp_path / "out")
    other = evaluate(**settings, caption_seed=1)
    assert other["protocol"]["reference"]["pictures"] == 9
    assert other["results"][0]["captions_sha256"] != found["results"][0]["captions_sha256"]
    with pytest.raises(ValueError, match="has 9 captions, and count is 10"):
        evaluate(**settings | {"count": 10})


def test_the_coco_recipe_of_the_readme(models, evaluate, tmp_path):
    """Its command on a miniature in COCO's layout"""
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("evaluation.md")))
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
    given["captions"].parent.mkdir()
    names = sorted(p.name for p in given["reference"].iterdir())
    coco(given["captions"].parent, names).rename(given["captions"])
    found = evaluate(checkpoint=str(models / "run"), count=6, resolution=12, metrics=("clip_fid", "clip_score"),
                     guidance_scales=scales[:2], **{name: str(path) for name, path in given.items()})  # fmt: skip
    assert [r["guidance_scale"] for r in found["results"]] == [1.5, 2.0] and found["protocol"]["resolution"] == 12
    assert found["protocol"]["reference"]["pictures"] == 9 and found["results"][0]["pictures"] == 6
    assert given["save_reference"].with_suffix(".clip.npz").exists()


def test_a_pictures_folder_made_here_is_judged_with_its_own_captions(models, evaluate, tmp_path):
    settings = {"reference": str(models / "real"), "metrics": ("clip_fid", "clip_score")}
    first = evaluate(checkpoint=str(models / "run"), captions=str(models / "captions.txt"), **settings,
                     guidance_scales=(1.0, 3.0))  # fmt: skip
    shutil.move(tmp_path / "out", tmp_path / "first")
    folders = tuple(str(tmp_path / f"first/guidance_{scale}") for scale in (1, 3))
    again = evaluate(images=folders, **settings)
    keys = ("clip_fid", "clip_score", "captions_sha256", "pictures_sha256", "generated")
    assert [[r[key] for key in keys] for r in first["results"]] == [[r[key] for key in keys] for r in again["results"]]
    (tmp_path / "first/guidance_3/00002.png").unlink()
    with pytest.raises(ValueError, match="guidance_3 holds 6 pictures, 7 .*missing are 00002.png"):
        evaluate(images=folders, **settings)


def test_the_drawn_set_is_scored_beside_drawn_pictures_and_chance(script, models, evaluate, tmp_path):
    script("eval_fid.py", "--checkpoint", models / "run", "--captions=shapes", "--count=6", "--sampler=dpmpp_2m",
           "--steps=2", "--out", tmp_path / "alone")  # fmt: skip
    (alone,) = json.loads((tmp_path / "alone/results.json").read_text())["results"]
    both = evaluate(checkpoint=str(models / "run"), count=6, sampler="dpmpp_2m", batch_size=32)["results"]
    assert both[0] == alone and [r["captions"] for r in both] == ["shapes", "shapes_unseen"]
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
    drawn_here = tmp_path / "scenes"
    drawn_here.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(drawn_here / f"{i}.png")
    (entry,) = evaluate(images=(str(drawn_here),), captions="shapes_unseen")["results"]
    assert entry["attributes"]["background"] == [6, 6] and entry["attributes"] == entry["attributes_drawn"]


def test_a_curve_over_guidance_scales_is_plotted(models, evaluate, tmp_path):
    found = evaluate(checkpoint=str(models / "run"), count=6, captions="shapes", reference=str(models / "real"),
                     guidance_scales=(1.0, 2.0), metrics=("fid", "clip_score", "attributes"))  # fmt: skip
    assert [r["folder"] for r in found["results"]] == ["shapes/guidance_1", "shapes/guidance_2"]
    with Image.open(tmp_path / "out/fid_clip.png") as plotted:
        assert len(plotted.convert("RGB").getcolors(9999)) > 10


def test_killed_and_shared_evaluations_end_with_the_same_file(models, tmp_path):
    """One process undisturbed; two processes, killed when pictures are there, started again, also as one"""

    def command(out, processes):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *(torchrun if processes > 1 else []), "eval_fid.py", "--checkpoint", models / "run",
                "--captions", models / "captions.txt", "--reference", models / "real", "--clip", models / "clip",
                "--clip_fid", models / "clip-fid", "--metrics", "clip_fid", "clip_score", "--guidance_scales", "1", "2",
                "--steps=3", "--batch_size=2", "--device=cpu", "--out", tmp_path / out]  # fmt: skip

    def start(out, processes):
        return subprocess.Popen(list(map(str, command(out, processes))), cwd=ROOT, text=True, stderr=subprocess.PIPE,
                                stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip

    one, two = start("one", 1), start("two", 2)
    until = time.time() + 120
    while not list((tmp_path / "two").rglob("*.png")) and two.poll() is None and time.time() < until:
        time.sleep(0.01)
    two.send_signal(signal.SIGKILL)
    assert one.wait() == 0, one.stderr.read()
    two.wait()
    time.sleep(1.5)  # its processes notice within half a second that their launcher is gone, and may go on until then
    shutil.copytree(tmp_path / "two", tmp_path / "three")
    (tmp_path / "three/results.json").unlink(missing_ok=True)
    for path in list((tmp_path / "three/guidance_2").glob("*.png"))[:3]:
        path.unlink()  # whatever they came to: something is to be drawn again
    there = {p: p.stat().st_ino for p in (tmp_path / "three").rglob("*.png")}  # a picture drawn again is another file
    for process in [start("two", 2), start("three", 1)]:
        assert process.wait() == 0, process.stderr.read()
    expected = (tmp_path / "one/results.json").read_text()
    assert (tmp_path / "two/results.json").read_text() == expected
    assert (tmp_path / "three/results.json").read_text() == expected
    whole = [p for p in there if p.with_name(f"{int(p.stem) ^ 1:05d}.png") in there]  # its batch of two was finished
    assert whole and all(p.stat().st_ino == there[p] for p in whole)
    changed = launch(*map(str, command("one", 1)[1:]), "--seed=3", fails=True)
    assert "made otherwise" in changed and "prompts_sha256" in changed
    assert (tmp_path / "one/results.json").read_text() == expected


def test_nothing_is_drawn_before_all_that_can_be_refused_is(models, evaluate, tmp_path, monkeypatch):
    settings = {"checkpoint": str(models / "run"), "captions": str(models / "captions.txt"), "metrics": ("clip_fid",),
                "reference": str(models / "real")}  # fmt: skip
    evaluate(**settings | {"metrics": ("clip_score",), "reference": ""}, guidance_scales=(3.0,))
    frechet.save(tmp_path / "wide.clip.npz", np.zeros(20), np.eye(20))
    frechet.save(tmp_path / "bad.clip.npz", np.zeros(16), -np.eye(16))
    for name in ("wide", "bad"):
        (tmp_path / f"{name}.npz").write_bytes(b"")
    monkeypatch.setattr(drawn, "generate", None)  # not even called
    for changed, message in [
        ({"guidance_scales": (1.0, 3.0), "steps": 3}, "guidance_3 holds pictures .*made otherwise .*steps: 2 there"),
        ({"reference": str(tmp_path / "wide.npz")}, "wide.clip.npz is of 20 features, clip_fid has 16"),
        ({"reference": str(tmp_path / "bad.npz")}, "bad.clip.npz: .*is no covariance"),
        ({"resolution": 32}, "smaller than resolution 32"),
        ({"clip_fid": str(models / "made")}, "CLIP model .*made"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate(**settings | changed)


def test_settings_are_refused_before_anything_is_loaded(models, evaluate, tmp_path, monkeypatch):
    made, run = {"images": (str(models / "made"),)}, {"checkpoint": str(models / "run")}
    score, fid = {"metrics": ("clip_score",)}, {"metrics": ("fid",), "reference": str(models / "real")}
    two = tmp_path / "two"
    (two / "sub").mkdir(parents=True)
    for folder in (two, two / "sub"):
        shutil.copy(models / "real/000.jpg", folder / "x.jpg")
    named = tmp_path / "named.json"
    named.write_text(json.dumps([{"image": "sub/x.jpg", "caption": "a"}, {"image": "else/x.jpg", "caption": "b"}]))
    unnamed = tmp_path / "unnamed.jsonl"
    unnamed.write_text('{"caption": "a"}\n{"caption": "b"}\n')
    (tmp_path / "file").write_text("")
    for name in ("load_networks", "load_pipeline"):
        monkeypatch.setattr(eval_fid, name, None)
    for settings, message in [
        (made, "need a --reference"),
        (made | {"metrics": ("fud",)}, "'fud' is none of"),
        (made | {"metrics": ("attributes",)}, "of the drawn set"),
        (made | {"resize": "bilinear"}, "'bilinear' is none of clean"),
        (made | {"reference": "nowhere"}, "no reference nowhere"),
        (made | fid | {"matched": True}, "matched needs --captions"),
        (made | fid | {"matched": True, "captions": str(unnamed)}, "'' \\(0 times"),
        (made | fid | {"matched": True, "captions": str(named), "reference": str(two)}, "1 of .*else/x.jpg"),
        (made | fid | {"save_reference": "x.2014"}, "must end with .npz"),
        (made | score | {"save_reference": "x.npz"}, "about a --reference folder"),
        (made | score, "7 of 7 pictures have no caption.*000.png"),
        (made | score | {"count": 3}, "images are there already"),
        (made | score | run, "images are there already"),
        (score | {"images": ("nowhere",)}, "no folder of pictures nowhere"),
        (run | score | {"captions": "no.txt"}, "no captions file no.txt"),
        (run | {"sampler": "euler"}, "'euler' is none of heun"),
        (run | {"steps": 0}, "steps 0"),
        (run | {"out": str(tmp_path / "file")}, "file"),
        (run | fid | {"count": 1}, "at least two pictures|needs two pictures"),
        ({"checkpoint": "nowhere"}, "no checkpoint nowhere"),
        *((run | {"guidance_scales": scales}, "all different, from 0 on")
          for scales in ((), (float("nan"),), (-3.0,), (1.0, 1.0000001), (float("inf"),))),
    ]:  # fmt: skip
        with pytest.raises((ValueError, FileExistsError), match=message):
            evaluate(**settings)


def test_an_earlier_result_is_kept_and_pictures_are_hashed(models, evaluate, tmp_path):
    shutil.copytree(models / "made", tmp_path / "made")
    settings = {"images": (str(tmp_path / "made"),), "captions": str(models / "captions.txt"),
                "metrics": ("clip_score",)}  # fmt: skip
    first = evaluate(**settings)
    assert evaluate(**settings) == first and not (tmp_path / "out/results.1.json").exists()
    second = evaluate(**settings, resolution=20)
    assert second["results"][0]["clip_score"] != first["results"][0]["clip_score"]
    assert json.loads((tmp_path / "out/results.1.json").read_text()) == first
    shutil.copy(tmp_path / "made/001.png", tmp_path / "made/002.png")
    third = evaluate(**settings)
    assert first["protocol"] == third["protocol"]
    assert first["results"][0]["pictures_sha256"] != third["results"][0]["pictures_sha256"]
