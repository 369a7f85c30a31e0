"""eval_fid.py: its numbers against transformers' and numpy's, stopping and sharing the work, what it refuses."""

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
from configurator import setting_names
from evaluation import clip, drawn, features, frechet, inception

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
    source = (ROOT / "eval_fid.py").read_text()
    own = {name: getattr(eval_fid, name) for name in setting_names(source)}

    def run(**settings):
        defaults = own | {
            "clip": str(models / "clip"),
            "clip_fid": str(models / "clip-fid"),
            "inception": str(models / "inception.pth"),
            "out": str(tmp_path / "out"),
            "device": "cpu",
            "captions": "",
            "steps": 2,
            "batch_size": 4,
        }
        for name, value in (defaults | settings).items():
            assert name in own
            monkeypatch.setattr(eval_fid, name, value)
        eval_fid.main()
        return json.loads((tmp_path / "out/results.json").read_text())

    return run


def pictures_at(folder, side):
    """What eval_fid.py compares: shorter side resized, then the centre"""
    return [features.picture_at(path.read_bytes(), side, None)[0] for path in sorted(folder.iterdir())]


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
    found = clip.similarity(ours.image(images), ours.text(long))
    assert scores.std() > 0.005
    assert (found - scores).abs().max() < 1e-5


def test_numbers_equal_their_definitions(models, evaluate):
    """FID and CLIP-FID from np.cov, CLIP score from transformers' features, on pictures of 40 px against 60 x 44"""
    found = evaluate(
        images=(str(models / "made"),), captions=str(models / "captions.txt"), reference=str(models / "real")
    )
    result, protocol = found["results"][0], found["protocol"]
    ours, real = pictures_at(models / "made", 40), pictures_at(models / "real", 40)
    net = inception.load(models / "inception.pth")

    def distance(a, b):
        both = [f.astype(np.float64) for f in (a, b)]
        return frechet.distance(*(v for f in both for v in (f.mean(0), np.cov(f, rowvar=False))))

    fid = distance(*(inception.features(net, pictures, "clean", "cpu") for pictures in (ours, real)))
    assert result["fid"] == pytest.approx(fid, rel=1e-4) and fid > 1
    model = CLIPModel.from_pretrained(models / "clip-fid")
    processor = CLIPImageProcessorPil.from_pretrained(models / "clip-fid")
    with torch.no_grad():
        rows = [
            model.get_image_features(**processor(p, return_tensors="pt")).pooler_output.numpy() for p in (ours, real)
        ]
    assert result["clip_fid"] == pytest.approx(distance(*rows), abs=2e-4) and result["clip_fid"] > 0.01
    score = clip.Clip(models / "clip")
    each = (100 * clip.similarity(score.image(ours), score.text(CAPTIONS))).clamp_min(0)
    assert result["clip_score"] == pytest.approx(each.mean().item(), abs=2e-4)
    assert protocol["resolution"] == 40 and protocol["inception"]["resize"] == "clean"
    assert protocol["inception"]["published"] is False and protocol["reference"]["pictures"] == 9
    assert result["pictures"] == 7 and protocol["clip_score_model"]["name"] == str(models / "clip")


def test_each_resize_shows_inception_something_else(models):
    items = [(path, None) for path in sorted((models / "made").iterdir())[:2]]
    net = inception.load(models / "inception.pth")
    means = [
        features.measure(features.Networks(net, r), items, 40, True, 2, r).statistics["fid"].mu
        for r in inception.RESIZES
    ]
    assert all(np.abs(a - b).max() > 1e-3 for a, b in [means[:2], means[1:], means[::2]])


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
    with pytest.raises(ValueError, match="resize: clean there, pytorch now"):
        evaluate(**settings, reference=str(tmp_path / "real.npz"), resize="pytorch")
    with pytest.raises(ValueError, match="resolution: 40 there, 32 now"):
        evaluate(**settings, reference=str(tmp_path / "real.npz"), resolution=32)
    with pytest.raises(ValueError, match="theirs.clip.npz"):
        evaluate(**settings, reference=str(tmp_path / "theirs.npz"))


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
    with pytest.raises(ValueError, match="smaller than resolution 256"):
        evaluate(**settings | {"images": (str(models / "made"),)}, resolution=256)
    with pytest.raises(ValueError, match="7 of 7 pictures have no caption.*000.png"):
        evaluate(**settings | {"images": (str(models / "made"),), "metrics": ("clip_score",)})


def coco(folder, names):
    """Annotations as COCO's, two captions for each picture"""
    annotations = [{"image_id": i, "caption": f"{which} caption of {i}"} for which in ("first", "second")
                   for i in range(len(names))]  # fmt: skip
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    path = folder / "captions_val.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def test_captions_are_chosen_by_seed_and_the_reference_can_be_theirs(models, evaluate, tmp_path):
    names = [p.name for p in sorted((models / "real").iterdir())]
    settings = {
        "checkpoint": str(models / "run"),
        "captions": str(coco(tmp_path, names)),
        "reference": str(models / "real"),
        "metrics": ("clip_fid", "clip_score"),
        "count": 5,
    }
    found = evaluate(**settings, matched=True)
    assert found["protocol"]["reference"]["pictures"] == 5 and found["protocol"]["resolution"] == 16
    lines = [json.loads(s) for s in (tmp_path / "out/guidance_2/captions.jsonl").read_text().splitlines()]
    chosen = [int(line["caption"].removeprefix("first caption of ")) for line in lines]
    assert chosen == sorted(set(chosen)) and len(chosen) == 5
    with pytest.raises(ValueError, match="prompts_sha256"):
        evaluate(**settings, caption_seed=1)
    shutil.rmtree(tmp_path / "out")
    other = evaluate(**settings, caption_seed=1)
    assert other["protocol"]["reference"]["pictures"] == 9
    assert other["protocol"]["captions"]["sha256"] != found["protocol"]["captions"]["sha256"]
    with pytest.raises(ValueError, match="has 9 captions, and count is 10"):
        evaluate(**settings | {"count": 10})


def test_the_coco_recipe_of_the_readme(models, evaluate, tmp_path):
    """Its command on a miniature in COCO's layout"""
    text = (ROOT / "README.md").read_text()
    command = re.search(r"eval_fid\.py (--checkpoint \S+ --captions coco.*?)\n```", text, re.S)[1]
    given, name = {}, ""
    for word in shlex.split(command.replace("\\\n", " ")):
        name = word.removeprefix("--") if word.startswith("--") else name
        given.setdefault(name, []).extend([] if word.startswith("--") else [word])
    assert given["count"] == ["30000"] and given["resolution"] == ["256"] and len(given["guidance_scales"]) == 5
    val = tmp_path / given.pop("reference")[0]
    shutil.copytree(models / "real", val)
    captions = tmp_path / given.pop("captions")[0]
    captions.parent.mkdir()
    coco(captions.parent, sorted(p.name for p in val.iterdir())).rename(captions)
    given |= {"checkpoint": models / "run", "count": 6, "resolution": 12, "captions": captions, "reference": val}
    found = evaluate(
        **{
            k: v if isinstance(v, int) else str(v)
            for k, v in given.items()
            if k not in ("guidance_scales", "save_reference")
        },
        guidance_scales=tuple(map(float, given["guidance_scales"][:2])),
        save_reference=str(tmp_path / given["save_reference"][0]),
        metrics=("clip_fid", "clip_score"),
    )
    assert [r["guidance_scale"] for r in found["results"]] == [1.5, 2.0] and found["protocol"]["resolution"] == 12
    assert found["protocol"]["reference"]["pictures"] == 9 and found["results"][0]["pictures"] == 6
    assert (tmp_path / "coco/val2014_256.clip.npz").exists()


def test_a_pictures_folder_made_here_is_judged_with_its_own_captions(models, evaluate, tmp_path):
    settings = {"reference": str(models / "real"), "metrics": ("clip_fid", "clip_score")}
    drawn = evaluate(checkpoint=str(models / "run"), captions=str(models / "captions.txt"), **settings,
                     guidance_scales=(1.0, 3.0))  # fmt: skip
    shutil.move(tmp_path / "out", tmp_path / "first")
    folders = [str(tmp_path / f"first/guidance_{scale}") for scale in (1, 3)]
    found = evaluate(images=tuple(folders), **settings)
    assert len(found["results"]) == 2
    for ours, theirs in zip(found["results"], drawn["results"]):
        assert {k: ours[k] for k in ("clip_fid", "clip_score", "generated")} == {
            k: theirs[k] for k in ("clip_fid", "clip_score", "generated")
        }
    (tmp_path / "first/guidance_3/00002.png").unlink()
    with pytest.raises(ValueError, match="1 pictures of .*captions.jsonl are not there: 00002.png"):
        evaluate(images=tuple(folders), **settings)


def test_drawn_set_needs_no_download_and_plots_a_curve(models, evaluate, tmp_path):
    found = evaluate(checkpoint=str(models / "run"), count=6)
    scores = found["results"][0]["attributes"]
    assert scores["background"][1] == 6 and found["protocol"]["resolution"] == 16
    found = evaluate(checkpoint=str(models / "run"), count=6, reference="shapes", guidance_scales=(1.0, 2.0),
                     metrics=("fid", "clip_score", "attributes"))  # fmt: skip
    assert [r["guidance_scale"] for r in found["results"]] == [1.0, 2.0]
    assert found["results"][1]["attributes"] == scores  # the same pictures
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
    two = tmp_path / "two/sub"
    two.mkdir(parents=True)
    for folder in (two, two.parent):
        shutil.copy(models / "real/000.jpg", folder / "x.jpg")
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"image": "sub/x.jpg", "caption": "a"}, {"image": "else/x.jpg", "caption": "b"}]))
    unnamed = tmp_path / "unnamed.jsonl"
    unnamed.write_text('{"caption": "a"}\n{"caption": "b"}\n')
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(drawn, "generate", None)  # not even called
    for changed, message in [
        ({"guidance_scales": (1.0, 3.0), "steps": 3}, "guidance_3 holds pictures .*made otherwise .*steps: 2 there"),
        ({"reference": str(tmp_path / "wide.npz")}, "wide.clip.npz is of 20 features, clip_fid has 16"),
        ({"reference": str(tmp_path / "bad.npz")}, "bad.clip.npz: .*is no covariance"),
        ({"count": 1}, "at least two pictures"),
        ({"out": str(tmp_path / "file")}, "file is a file, a folder is wanted"),
        ({"save_reference": str(tmp_path / "x.2014")}, "must end with .npz"),
        ({"matched": True, "captions": str(records), "reference": str(two.parent)}, "1 pictures .*several .*else/x"),
        ({"matched": True, "captions": str(unnamed)}, "do not all name a picture"),
        ({"resolution": 32}, "smaller than resolution 32"),
        *(({"guidance_scales": scales}, "all different, from 0 on")
          for scales in ((), (float("nan"),), (-3.0,), (1.0, 1.0000001), (float("inf"),))),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            evaluate(**settings | changed)


def test_an_earlier_result_is_kept(models, evaluate, tmp_path):
    settings = {"images": (str(models / "made"),), "captions": str(models / "captions.txt"), "metrics": ("clip_score",)}
    first = evaluate(**settings)
    assert evaluate(**settings) == first and not (tmp_path / "out/results.1.json").exists()
    second = evaluate(**settings, resolution=20)
    assert second["results"][0]["clip_score"] != first["results"][0]["clip_score"]
    assert json.loads((tmp_path / "out/results.1.json").read_text()) == first


def test_the_judged_pictures_and_the_reference_are_hashed(models, evaluate, tmp_path):
    shutil.copytree(models / "made", tmp_path / "made")
    settings = {"images": (str(tmp_path / "made"),), "reference": str(models / "real"), "metrics": ("clip_fid",)}
    first = evaluate(**settings)
    shutil.copy(tmp_path / "made/001.png", tmp_path / "made/002.png")
    second = evaluate(**settings)
    assert first["protocol"] == second["protocol"]
    assert first["results"][0]["pictures_sha256"] != second["results"][0]["pictures_sha256"]


def test_settings_that_do_not_fit_are_refused(models, evaluate):
    made = (str(models / "made"),)
    for settings, message in [
        ({"images": made}, "need a --reference"),
        ({"images": made, "metrics": ("fud",)}, "'fud' is none of"),
        ({"images": made, "metrics": ("attributes",)}, "of the drawn set"),
        ({"images": made, "resize": "bilinear", "reference": "x"}, "'bilinear' is none of clean"),
        ({"images": made, "reference": "nowhere"}, "no reference nowhere"),
        ({"images": ("nowhere",), "metrics": ("clip_score",)}, "no folder of pictures nowhere"),
        (
            {
                "images": made,
                "reference": str(models / "real"),
                "metrics": ("clip_fid",),
                "clip_fid": str(models / "made"),
            },
            "CLIP model .*made",
        ),
        ({"images": made, "reference": str(models / "real"), "matched": True}, "matched needs --captions"),
        ({"images": made, "metrics": ("clip_score",), "count": 3}, "images are there already"),
        ({"images": made, "metrics": ("clip_score",), "checkpoint": "x"}, "images are there already"),
        (
            {"checkpoint": str(models / "run"), "captions": "no.txt", "metrics": ("clip_score",)},
            "no captions file no.txt",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(**settings)
