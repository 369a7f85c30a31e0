"""eval_fid.py: its numbers against transformers' and numpy's, the built-in set, stops, shared work, what it refuses."""
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, launch
from PIL import Image
from test_text import write_clip_model
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import eval_fid
from evaluation import frechet, inception
from pictures import decode, shapes
from sampling import generated

RUN = ROOT / "tests/data/before/run"  # of shapes at 16 px, guidance 5
CAPTIONS = ["a small red circle on a white background", "a large blue ring", "a small cyan cross", "a large pink bar",
            "a green square", "two red rings", "a dog " * 60]  # more than CLIP's 77 tokens


class SmallInception:
    """A stand-in: twelve pixels of a picture, resized as for Inception"""
    width, name = 12, "a few pixels"

    def __init__(self, path, device, resize):
        self.prepare, self.about = inception.RESIZES[resize], {"network_sha256": "0" * 64, "resize": resize}

    def image(self, prepared):
        assert not torch.backends.cudnn.allow_tf32
        return torch.stack(prepared)[:, :, 70::150, 70::150].flatten(1)


def draw(folder, n, size=(40, 40), seed=0, suffix=".png"):
    """n random coarse pictures"""
    folder.mkdir(parents=True)
    rng = np.random.RandomState(seed)
    for i in range(n):
        cells = rng.randint(0, 256, (5, 5, 3)).astype(np.uint8)
        Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i:03d}{suffix}")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small random CLIPs in a hub cache, and real-looking pictures with captions"""
    folder = tmp_path_factory.mktemp("eval")
    for seed, name in enumerate(reversed(eval_fid.CLIPS.values())):
        cached = folder / "hub" / f"models--{name.replace('/', '--')}"
        write_clip_model(cached / "snapshots/0", seed, num_hidden_layers=2 - seed)
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text("0")
        (folder / name.rpartition("-")[2]).symlink_to(cached / "snapshots/0")
    draw(folder / "made", 7)
    Image.new("RGB", (90, 90)).save(folder / "made/00007_grid.png")  # as sample.py makes one, which is not judged
    draw(folder / "real", 9, size=(60, 44), seed=1, suffix=".jpg")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return folder


@pytest.fixture
def evaluate(models, tmp_path, monkeypatch):
    """evaluate(**settings) -> results.json, in this process and with the small models"""
    monkeypatch.setattr(eval_fid, "load_inception", SmallInception)
    monkeypatch.setattr(eval_fid, "CLIPS", {"clip_fid": str(models / "patch32"), "clip_score": str(models / "patch16")})
    small = {"out": tmp_path / "out", "device": "cpu", "steps": 2, "batch_size": 4}

    def run(**settings):
        with monkeypatch.context() as patch:
            for name, value in (small | settings).items():
                patch.setattr(eval_fid, name, str(value) if isinstance(value, type(tmp_path)) else value)
            eval_fid.main()
            return json.loads((tmp_path / eval_fid.out / "results.json").read_text())
    return run


def test_numbers_equal_their_definitions(models, evaluate, capsys):
    """FID and CLIP-FID from np.cov, CLIP's features and scores from transformers, on 40 px against 60 x 44"""
    results = evaluate(images=models / "made", captions=models / "captions.txt", reference=models / "real")
    assert "1 of the captions are longer than the 77 tokens" in capsys.readouterr().err
    (result,), protocol = results["results"], results["protocol"]
    ours, real = ([Image.fromarray(decode.square(Image.open(path).convert("RGB"), 40))
                   for path in sorted(folder.glob("???.*"))] for folder in (models / "made", models / "real"))
    net = SmallInception("", "cpu", "clean")

    def distance(a, b):
        both = [f.double().numpy() for f in (a, b)]
        return frechet.distance(*(v for f in both for v in (f.mean(0), np.cov(f, rowvar=False))))

    fid = distance(*(net.image([inception.clean(p) for p in pictures]) for pictures in (ours, real)))
    assert result["fid"] == pytest.approx(fid, abs=1e-4) and fid > 1
    model = CLIPModel.from_pretrained(models / "patch32")
    processor = CLIPImageProcessorPil.from_pretrained(models / "patch32")
    with torch.no_grad():
        rows = [model.get_image_features(**processor(p, return_tensors="pt")).pooler_output for p in (ours, real)]
    assert result["clip_fid"] == pytest.approx(distance(*rows), abs=2e-4) and result["clip_fid"] > 0.01
    model = CLIPModel.from_pretrained(models / "patch16")
    processor = CLIPProcessor(processor, CLIPTokenizer.from_pretrained(models / "patch16"))
    batch = processor(text=CAPTIONS, images=ours, return_tensors="pt", padding=True, truncation=True, max_length=77)
    with torch.no_grad():
        scores = (model(**batch).logits_per_image / model.logit_scale.exp()).diagonal()
    assert scores.std() > 0.005 and scores.min() < 0
    assert result["clip_score"] == pytest.approx(100 * scores.clamp_min(0).mean().item(), abs=2e-4)
    assert protocol["resolution"] == 40 and protocol["networks"]["fid"]["resize"] == "clean"
    assert result["pictures"] == 7 and protocol["reference"]["clip_fid"]["pictures"] == 9


def test_statistics_of_the_reference_are_used_again(models, evaluate, tmp_path, capsys):
    settings, stored = {"images": models / "made", "metrics": ("fid", "clip_fid")}, tmp_path / "out/reference.npz"
    theirs = tmp_path / "theirs.npz"
    first = evaluate(**settings, reference=models / "real")
    again = evaluate(**settings, reference=stored, out=tmp_path / "again")
    assert again["results"] == first["results"] and again["protocol"]["reference"]["clip_fid"]["pictures"] == 9
    with np.load(stored) as file:  # as pytorch-fid reads it
        np.savez(theirs, mu=file["mu"], sigma=file["sigma"])  # as it writes it
    alone = evaluate(images=models / "made", metrics=("fid",), reference=theirs, out=tmp_path / "theirs")
    assert alone["results"][0]["fid"] == first["results"][0]["fid"]
    assert "by another program" in alone["protocol"]["reference"]["fid"]["made"]
    assert "made" not in again["protocol"]["reference"]["fid"]
    assert "(resize clean; the reference was made by another program, which does not say how: --resize must" in (
        capsys.readouterr().out)
    for path, changed, message in (
            (stored, {"resize": "tensorflow"}, "resize: 'clean' there, 'tensorflow' now"),
            (stored, {"resolution": 32}, "resolution: 40 there, 32 now"),
            (theirs, {}, "theirs.clip.npz: there is no such file")):
        with pytest.raises(ValueError, match=message):
            evaluate(**settings, reference=path, out=tmp_path / "no", **changed)
    assert not any((tmp_path / "no").iterdir())  # what was wrong with it binds the folder to nothing


def test_pictures_that_cannot_be_used_are_named(models, evaluate, tmp_path):
    made, real = (shutil.copytree(models / name, tmp_path / name) for name in ("made", "real"))
    draw(tmp_path / "tall", 1, (40, 48))
    for path, content, message in (
            (made / "005.png", (made / "004.png").read_bytes()[:150], "truncated.* Mend or remove it"),
            (made / "003.png", (tmp_path / "tall/000.png").read_bytes(), " is 40 x 48, where 40 x 40 is wanted"),
            (real / "002.jpg", b"", "Mend or remove it")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            evaluate(images=made, metrics=("clip_fid",), reference=real)


def test_the_recipe_for_coco(models, evaluate, tmp_path):
    """On a miniature in COCO's layout: a curve over guidance scales, and --matched"""
    paths = {"captions": tmp_path / "captions_val2014.json", "reference": models / "real"}
    names = sorted(p.name for p in paths["reference"].iterdir())
    annotations = [{"image_id": i, "caption": f"{which} caption of {i}"} for which in ("first", "second")
                   for i in range(len(names))]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    paths["captions"].write_text(json.dumps({"images": images, "annotations": annotations}))
    results = evaluate(checkpoint=RUN, count=6, resolution=12, guidance_scales=(1.5, 2.0), **paths)
    assert [r["guidance_scale"] for r in results["results"]] == [1.5, 2.0] and results["protocol"]["resolution"] == 12
    prompts = [Image.open(path).text["prompt"] for path in sorted((tmp_path / "out/guidance_2").glob("*.png"))]
    chosen = [int(caption.removeprefix("first caption of ")) for caption in prompts]
    assert chosen == sorted(set(chosen)) and len(chosen) == 6
    matched = evaluate(checkpoint=RUN, count=6, matched=True, metrics=("clip_fid",), out=tmp_path / "matched", **paths)
    assert [r["protocol"]["reference"]["clip_fid"]["pictures"] for r in (results, matched)] == [9, 6]


def test_the_built_in_set_is_scored_beside_its_own_pictures_and_chance(script, evaluate, tmp_path):
    (alone,) = evaluate(checkpoint=RUN, captions="shapes", count=6, sampler="dpmpp_2m", batch_size=32)["results"]
    script("eval_fid.py", "--checkpoint", RUN, "--count=6", "--sampler=dpmpp_2m", "--steps=2", cwd=tmp_path)
    both = json.loads((tmp_path / "scores/run/results.json").read_text())["results"]
    assert both[0] == alone and [r["captions"] for r in both] == ["shapes", "shapes_unseen"]
    for held_out, entry in enumerate(both):
        pictures, _, wanted = zip(*(shapes.scene(10_000_000 + i, bool(held_out), 16) for i in range(6)))
        for column, images in (("shapes", pictures), ("chance", pictures[1:] + pictures[:1])):
            scores = {name: list(n) for name, n in shapes.score(images, wanted).items()}
            assert entry[f"attributes_{column}"] == scores
        assert (tmp_path / "scores/run" / f"{entry['captions']}_guidance_5.png").exists()


def test_pictures_of_a_set_are_nearest_to_themselves(models, evaluate, tmp_path):
    """And those with the captions of others are not"""
    draw(tmp_path / "set", 7)
    shuffled = "\n".join(CAPTIONS[1:] + CAPTIONS[:1])
    for path, caption in zip(sorted((tmp_path / "set").iterdir()), CAPTIONS):
        path.with_suffix(".txt").write_text(caption)
    (tmp_path / "shuffled.txt").write_text(shuffled)
    near = {"metrics": ("nearest",), "reference": tmp_path / "set"}
    for captions, right in ((tmp_path / "set", 7), (tmp_path / "shuffled.txt", 0)):
        own = {"images": models / "made", "vae": "pixels", "captions": captions, "out": tmp_path / f"out{right}"}
        (entry,) = evaluate(**near, **own)["results"]
        assert entry["nearest"]["top 1"] == [right, 7, pytest.approx(1 / 7)] and "fid" not in entry
    (tmp_path / "set/none.jpg").write_bytes(b"")
    (tmp_path / "set/none.txt").write_text("a damaged one, which is left out")
    (drawn,) = evaluate(checkpoint=RUN, count=3, **near)["results"]  # by the captions of the reference
    assert drawn["nearest"]["top 5"][1] == 3


def test_two_processes_find_what_one_does(models, evaluate, tmp_path):
    settings = {"checkpoint": RUN, "captions": models / "captions.txt", "reference": models / "real",
                "metrics": ("clip_fid", "clip_score"), "guidance_scales": (1.0, 2.0), "steps": 3, "batch_size": 2}
    words = [word for name, value in settings.items()
             for word in (f"--{name}", *(value if isinstance(value, tuple) else [value]))]
    launch("eval_fid.py", *words, processes=2, env={"HF_HOME": str(models)}, cwd=tmp_path)
    both = json.loads((tmp_path / "scores/run/results.json").read_text())["results"]
    assert evaluate(**settings)["results"] == both and len(both) == 2


def test_what_is_refused_changes_nothing(models, evaluate, tmp_path, monkeypatch):
    """Nothing is generated, and nothing in the folder changes, before all that can be refused is."""
    run, made, real = {"checkpoint": RUN}, {"images": models / "made"}, {"reference": models / "real"}
    score, fid = {"metrics": ("clip_score",)}, {"metrics": ("fid",)}
    own, near = run | score | {"captions": models / "captions.txt"}, {"metrics": ("nearest",), "vae": "pixels"}
    evaluate(**own)
    frechet.save_statistics(tmp_path / "wide.clip.npz", np.zeros(20), np.eye(20), {})
    (tmp_path / "wide.npz").touch()
    shutil.copytree(models / "made", tmp_path / "others/guidance_5")
    named, pipe = tmp_path / "named.json", tmp_path / "pipe.txt"
    named.write_text(json.dumps([{"image": "000.jpg", "caption": "a"}, {"image": "other.jpg", "caption": "b"}]))
    os.mkfifo(pipe)
    monkeypatch.setattr(generated, "generate", None)  # not even called
    of_others = dataclasses.replace(eval_fid.load_pipeline(RUN, "cpu"), words=["dog"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for settings, message in [
            (own | {"steps": 3}, "belongs to another command .*steps: 2 there, 3 now"),
            (own | {"guidance_scales": (3.0,)}, "guidance_scales: "), (own | {"count": 3}, "prompts_sha256: "),
            (own | {"out": tmp_path / "others"}, "holds guidance_5 and no"),
            (own | {"metrics": ("clip_fid",), "reference": tmp_path / "wide.npz"}, "wide.clip.npz .*: 20 there"),
            (own | {"resolution": 32}, "resolution is 32: it must be at most 16"),
            (own | {"count": 10}, "there are 7 captions, and count is 10"),
            (own | {"captions": pipe}, "pipe.txt: there is no such file"),
            (run | {"load_pipeline": lambda *args, **how: of_others}, "was not trained on the built-in set"),
            ({"checkpoint": "nowhere"}, "no checkpoint nowhere"),
            (run | {"captions": models / "captions.txt", "metrics": ("nearest",)}, "nearest needs a --reference"),
            (made | {"metrics": ("nearest",), "reference": models / "real"}, "nearest with --images needs a --vae"),
            (run | real | near | {"captions": models / "captions.txt"}, "has no picture with a caption"),
            (run | {"metrics": ("nearest",), "reference": "nowhere"}, "no source nowhere"),
            (made | near | {"captions": "emoji"}, "leave --captions emoji out"),
            (made | near | real | {"resolution": 11, "captions": models / "captions.txt"}, "that is a multiple of 2"),
            (made, "need a --reference"), (made | {"metrics": ("attributes",)}, "for the built-in set"),
            (made | {"reference": pipe}, "pipe.txt' is nei"), (made | fid | real | {"matched": True}, "matched needs"),
            (made | fid | real | {"matched": True, "captions": named}, "1 of .*real/other.jpg"),
            (made | score, "7 of 7 pictures have no caption.*000.png"), (made | score | run, "out with --images"),
            (made | score | {"out": models / "made/x"}, "lies in .*made, where nothing is written"),
            (score | {"images": "nowhere"}, "nowhere is no folder")]:
        with pytest.raises(ValueError, match=message):
            evaluate(**settings)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
