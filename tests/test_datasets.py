"""docs/datasets.md: its commands, run on miniatures that have the published data sets' layout."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from training.dataset import Dataset


def picture(seed, kind="JPEG", size=(40, 36), **options):
    out = io.BytesIO()
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(low).resize(size).save(out, kind, **options)
    return out.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def sa1b(root):
    masks = json.dumps({"image": {"image_id": 1, "width": 40}, "annotations": [{"area": 3, "bbox": [0, 0, 1, 1]}]})
    for k, numbers in enumerate(((1, 2, 3), (11188, 11189))):
        files = {}
        for i in numbers:
            files |= {f"./sa_{i}.jpg": picture(i), f"./sa_{i}.json": masks.encode()}
        write_tar(root / f"sa1b/sa_{k:06d}.tar", files)
    texts = {f"sa_{i}.txt": f"The image shows {i} houses.\n".encode() for i in (1, 2, 11188, 11189, 99)}
    write_tar(root / "sa1b/SA1B_caption.tar.gz", texts)
    return {f"The image shows {i} houses." for i in (1, 2, 11188, 11189)}, {"no caption": 1}


def cc12m(root):
    captions = {"000000000": "<PERSON> in Paris - Stock Photo", "000000001": "A red <b>boat</b> &amp; a dog!!!!"}
    files = {}
    for key, caption in captions.items():
        meta = {"url": "http://x/y.jpg", "caption": caption, "key": key, "status": "success", "error_message": None,
                "width": 40, "height": 36, "original_width": 800, "original_height": 720, "exif": "{}"}  # fmt: skip
        files |= {
            f"{key}.jpg": picture(int(key)),
            f"{key}.json": json.dumps(meta).encode(),
            f"{key}.txt": caption.encode(),
        }
    small = {"000000002.jpg": picture(2, size=(40, 30)), "000000002.txt": b"too small"}
    write_tar(root / "cc12m/00000.tar", files)
    write_tar(root / "cc12m/00001.tar", small)
    (root / "cc12m/00000.parquet").write_bytes(b"PAR1")
    (root / "cc12m/00000_stats.json").write_text("{}")
    return {"person in Paris", "A red boat & a dog!"}, {"too small": 1}


def textcaps(root):
    data, files = [], {"train_images/": b""}
    for i in range(2):
        name = f"00{i}a6ef3c0bf4ed"
        files[f"train_images/{name}.jpg"] = picture(i)
        for k in range(5):
            data.append({"caption_id": 5 * i + k, "caption_str": f"A sign says {i}{k}.", "image_id": name,
                         "image_path": f"train/{name}.jpg", "image_name": name, "image_width": 40, "image_height": 36,
                         "set_name": "train", "flickr_original_url": "https://x", "reference_strs": ["."]})  # fmt: skip
    files["train_images/ffff6ef3c0bf4ed0.jpg"] = picture(9)
    write_zip(root / "textcaps/train_val_images.zip", files)
    text = json.dumps({"dataset_name": "textcaps", "dataset_version": "0.1", "data": data})
    (root / "textcaps/TextCaps_0.1_train.json").write_text(text)
    return {"A sign says 00.", "A sign says 10."}, {"no caption": 1}


def journeydb(root):
    lines = []
    for k in range(2):
        files = {f"{k:03d}/": b""}
        for i in range(2):
            name = f"{k:03d}/{k}{i}b1c-bf7d.jpg"
            files[name] = picture(2 * k + i)
            lines.append({"img_path": f"./{name}", "prompt": f"castle {k}{i}, octane render --v 4", "Style": ["x"],
                          "Task2": {"Caption": "A castle."}, "Task1": {"TaskPrompt": "y"}})  # fmt: skip
        write_tar(root / f"journeydb/data/train/imgs/{k:03d}.tgz", files)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    name = "train_anno_realease_repath.jsonl"
    write_tar(root / f"journeydb/data/train/{name}.tgz", {name: text.encode()})
    return {f"castle {k}{i}, octane render --v 4" for k in range(2) for i in range(2)}, {}


def diffusiondb(root):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = []
    for folder, part in (("diffusiondb-large-part-1", 1), ("diffusiondb-large-part-2", 10001)):
        names = [f"{part}{i}-6e-4a.webp" for i in range(4)]
        files = {n: picture(part + i, "WEBP", lossless=True) for i, n in enumerate(names)}
        prompts = {n: {"p": f"a fox by {n}, ", "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for n in names}
        write_zip(root / f"diffusiondb/{folder}/part-{part:06d}.zip",
                  {f"part-{part:06d}.json": json.dumps(prompts).encode()} | files)  # fmt: skip
        scores = [(0.1, 0.2), (0.2, 0.1), (2.0, 0.0), (0.0, 0.3)]
        rows += [{"image_name": n, "prompt": "a fox", "part_id": part, "image_nsfw": a, "prompt_nsfw": b}
                 for n, (a, b) in zip(names, scores)]  # fmt: skip
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, root / "diffusiondb/metadata-large.parquet")
    kept = [r["image_name"] for r in rows if max(r["image_nsfw"], r["prompt_nsfw"]) <= 0.2]
    assert len(kept) == 4
    return {f"a fox by {n}," for n in kept}, {"NSFW score above 0.2, or none": 4}


def coco(root):
    (root / "coco/val2014").mkdir(parents=True)
    (root / "coco/annotations").mkdir()
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "license": 3, "height": 36, "width": 40,
               "coco_url": "http://x"} for i in (42, 73, 74)]  # fmt: skip
    annotations = [
        {"image_id": i, "id": 10 * k + i, "caption": f"Caption {k} of {i}."} for k in range(5) for i in (73, 42, 74)
    ]
    for image in images[:2]:
        (root / "coco/val2014" / image["file_name"]).write_bytes(picture(image["id"]))
    (root / "coco/annotations/captions_val2014.json").write_text(
        json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations, "type": "captions"})
    )
    return {"Caption 0 of 42.", "Caption 0 of 73."}, {"no such file": 1}


def documented(section):
    """The prepare_latents.py command of a section, as words"""
    text = (ROOT / "docs/datasets.md").read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", text, re.S)[1].replace("\\\n", " ")
    (line,) = [line for line in block.splitlines() if "prepare_latents.py" in line]
    return shlex.split(line)


SETS = {"SA-1B": sa1b, "CC12M": cc12m, "TextCaps": textcaps, "JourneyDB": journeydb, "DiffusionDB": diffusiondb,
        "COCO val2014": coco}  # fmt: skip


@pytest.mark.parametrize("section", SETS)
def test_documented_command(section, tmp_path):
    expected, skipped = SETS[section](tmp_path)
    words = documented(section)
    assert words[:3] == ["torchrun", "--nproc_per_node=8", "prepare_latents.py"]
    assert words[words.index("--resolutions") + 1 : words.index("--resolutions") + 3] == ["256", "512"]
    # as documented, but for the number of processes, the models and the size of the pictures
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "prepare_latents.py"), *words[3:]]
    command += ["--resolutions", "32", "64", "--vae=pixels", "--text_encoder=words", "--device=cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / words[words.index("--out") + 1]
    data = Dataset(folder, 32)
    rows = [json.loads(line) for path in sorted(folder.glob("*.rows.jsonl")) for line in open(path, encoding="utf-8")]
    assert {row["caption"] for row in rows} == expected and len(rows) == len(data) == len(expected)
    assert {(row["width"], row["height"]) for row in rows} == {(40, 36)}
    assert data.info["skipped"] == skipped
    assert len((folder / "skipped.jsonl").read_text().splitlines()) == sum(skipped.values())
    # a row's latents are those of the picture that its source names
    assert all(Path(row["source"]).suffix in (".jpg", ".webp") for row in rows)
