"""docs/datasets.md: its commands, run on miniatures that have the published data sets' layout."""
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from test_sources import encoded, noise, prepare, tar_bytes, write, zip_bytes

from pictures.prepared import Dataset


def picture(seed, kind="JPEG", **options):
    return encoded(noise(seed, **options), kind)


def encode(table):
    return json.dumps(table).encode()


def sa1b(root):
    """Tars with masks beside the pictures; the captions come from elsewhere, by picture name"""
    masks = encode({"image": {"image_id": 1, "width": 40}, "annotations": [{"area": 3, "bbox": [0, 0, 1, 1]}]})
    for k, numbers in enumerate(((1, 2, 3), (11188, 11189))):
        files = [file for i in numbers for file in ((f"./sa_{i}.jpg", picture(i)), (f"./sa_{i}.json", masks))]
        write(root, {f"sa1b/sa_{k:06d}.tar": tar_bytes(files)})
    texts = [(f"sa_{i}.txt", f"The image shows {i} houses.\n".encode()) for i in (1, 2, 11188, 11189, 99)]
    write(root, {"sa1b/SA1B_caption.tar.gz": tar_bytes(texts, "w:gz")})
    return {f"The image shows {i} houses." for i in (1, 2, 11188, 11189)}, {"no caption": 1}


def cc12m(root):
    files = []
    for key, caption in (("000", "A red boat in Paris"), ("001", "A dog")):
        meta = encode({"url": "http://x/y.jpg", "caption": caption, "key": key, "status": "success", "exif": "{}"})
        files += [(f"{key}.jpg", picture(1)), (f"{key}.txt", caption.encode()), (f"{key}.json", meta)]
    small = [("002.jpg", picture(2, size=(40, 30))), ("002.txt", b"too small")]
    write(root, {"cc12m/00000.tar": tar_bytes(files), "cc12m/00001.tar": tar_bytes(small),
                 "cc12m/00000.parquet": b"PAR1", "cc12m/00000_stats.json": b"{}"})
    return {"A red boat in Paris", "A dog"}, {"too small": 1}


def cc12m_long(root):
    """As img2dataset makes them of a table whose captions are in another column"""
    long = "The image shows a red boat in Paris, moored at a quay. " * 12
    meta = encode({"url": "http://x/y.jpg", "caption": long, "caption_llava": long, "key": "000", "status": "success"})
    files = [("000.jpg", picture(1)), ("000.txt", long.encode()), ("000.json", meta)]
    write(root, {"cc12m_long/00000.tar": tar_bytes(files), "cc12m_long/00000.parquet": b"PAR1"})
    return {long.strip()}, {}


def blip3o_60k(root):
    files = {f"{name}.tar": tar_bytes([(f"{name}{i}.jpg", picture(i)), (f"{name}{i}.txt", f"{name} {i}".encode())])
             for i, name in enumerate(("geneval_train", "object_1"))}
    write(root, {f"blip3o_60k/{name}": data for name, data in files.items()})
    return {"geneval_train 0", "object_1 1"}, {}


def dalle3(root):
    """The files that the page's lines write"""
    for i, caption in enumerate((b"a castle", b"")):
        name = f"dalle3/pictures/train-00000-of-00067/{i:05d}"
        write(root, {f"{name}.jpg": picture(i, "PNG"), f"{name}.txt": caption})
    return {"a castle"}, {"no caption": 1}


def sharegpt4o(root):
    names = [f"text_to_image/{i}.jpg" for i in range(3)]
    table = [{"input_prompt": f"an owl, {i}", "output_image": name, "output_image_resolution": [1024, 1024]}
             for i, name in enumerate(names)]
    write(root, {"sharegpt4o/text_to_image.json": encode(table)})
    for part, inside in enumerate((names[:2], names[2:])):
        tar = tar_bytes([(name, picture(part)) for name in inside])
        write(root, {f"sharegpt4o/text_to_image_part_{part}.tar": tar})
    return {"an owl, 0", "an owl, 1", "an owl, 2"}, {}


def textcaps(root):
    ids = [f"00{i}a6ef3c0bf4ed" for i in range(2)]
    files = [("train_images/", b""), *((f"train_images/{name}.jpg", picture(1)) for name in (*ids, "ffff6ef3c0bf4ed0"))]
    data = [{"caption_id": k, "caption_str": f"A sign says {i}{k}.", "image_id": name, "image_name": name,
             "image_path": f"train/{name}.jpg", "set_name": "train", "reference_strs": ["."]}
            for i, name in enumerate(ids) for k in range(5)]
    table = {"dataset_name": "textcaps", "dataset_version": "0.1", "data": data}
    write(root, {"textcaps/train_val_images.zip": zip_bytes(files), "textcaps/TextCaps_0.1_train.json": encode(table)})
    return {"A sign says 00.", "A sign says 10."}, {"no caption": 1}


def journeydb(root):
    names, lines = [f"{k:03d}/{k}{i}b1c-bf7d.jpg" for k in range(2) for i in range(2)], []
    for name in names:
        lines.append(encode({"img_path": f"./{name}", "prompt": f"castle {name}", "Task2": {"Caption": "no"}}))
    for k in range(2):
        tar = tar_bytes([(f"{k:03d}/", b""), *((name, picture(k)) for name in names[2 * k:2 * k + 2])], "w:gz")
        write(root, {f"journeydb/data/train/imgs/{k:03d}.tgz": tar})
    name = "train_anno_realease_repath.jsonl"
    write(root, {f"journeydb/data/train/{name}.tgz": tar_bytes([(name, b"\n".join(lines))], "w:gz")})
    return {f"castle {name}" for name in names}, {}


def diffusiondb(root):
    """Zips with their prompts, and the table of what is harmless that the page's lines write"""
    table = []
    for folder, part in (("diffusiondb-large-part-1", 1), ("diffusiondb-large-part-2", 10001)):
        prompts = {f"{part}{i}-6e-4a.webp": {"p": f"a fox by {part}{i}, ", "se": 1, "sa": "k_lms"} for i in range(4)}
        files = [(f"part-{part:06d}.json", encode(prompts)), *((name, picture(1, "WEBP")) for name in prompts)]
        write(root, {f"diffusiondb/{folder}/part-{part:06d}.zip": zip_bytes(files)})
        table += [{"image_name": name, "prompt": prompts[name]["p"]} for name in [*prompts][:2]]
    write(root, {"diffusiondb/harmless.jsonl": b"\n".join(map(encode, table)) + b"\n"})
    return {row["prompt"].strip() for row in table}, {"no caption": 4}


def coco(root):
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "license": 3} for i in (42, 73)]
    annotations = [{"image_id": i, "id": 10 * k + i, "caption": f"Caption {k} of {i}."}
                   for k in range(5) for i in (73, 42)]
    write(root, {f"coco/val2014/{image['file_name']}": picture(image["id"]) for image in images})
    write(root, {"coco/annotations/captions_val2014.json": encode({"images": images, "annotations": annotations})})
    return {"Caption 0 of 42.", "Caption 0 of 73."}, {}


def documented(section):
    """The prepare_latents.py command of a section, as words"""
    page = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
    text = re.split("\n###? ", re.split(f"\n###? {section}\n", page)[1])[0]
    block = re.search(r"```sh\n(.*?)```", text, re.S)[1].replace("\\\n", " ")
    (line,) = [line for line in block.splitlines() if "prepare_latents.py" in line]
    return shlex.split(line)


SETS = {"SA-1B": sa1b, "CC12M": cc12m, "CC12M with long captions": cc12m_long, "TextCaps": textcaps,
        "JourneyDB": journeydb, "DiffusionDB": diffusiondb, "BLIP3o-60k": blip3o_60k, "DALL-E 3": dalle3,
        "ShareGPT-4o-Image": sharegpt4o, "COCO val2014": coco}


@pytest.mark.parametrize("section", SETS)
def test_documented_command(section, monkeypatch, tmp_path):
    expected, skipped = SETS[section](tmp_path)
    words = documented(section)
    words = words[words.index("prepare_latents.py") + 1:]
    assert words[words.index("--resolutions") + 1 : words.index("--resolutions") + 3] == ["256", "512"]
    # as documented, but for the number of processes, the models and the size of the pictures
    monkeypatch.chdir(tmp_path)
    prepare(*words, "--resolutions=32", "--vae=pixels", "--text_encoder=words", "--device=cpu")
    folder = tmp_path / words[words.index("--out") + 1]
    data = Dataset(folder, 16)
    rows = [json.loads(line) for path in sorted(folder.glob("*.rows.jsonl")) for line in open(path, encoding="utf-8")]
    assert {row["caption"] for row in rows} == expected and len(rows) == len(data) == len(expected)
    assert {(row["width"], row["height"]) for row in rows} == {(40, 36)}
    assert data.info["skipped"] == skipped
    assert len((folder / "skipped.jsonl").read_text().splitlines()) == sum(skipped.values())
    assert all(Path(row["source"]).suffix in (".jpg", ".webp") for row in rows)
