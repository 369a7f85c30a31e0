"""
GenEval scores of pictures in its official folder layout, without mmdetection: Mask2Former and CLIP of transformers.

    python eval_geneval.py --images samples/geneval                          # needs scipy besides: pip install scipy
    torchrun --nproc_per_node=8 eval_geneval.py --images samples/geneval     # the pictures shared out
    python eval_geneval.py --images samples/geneval --detections mine.jsonl  # objects that another detector found

The layout is what sample.py writes: 00000/metadata.jsonl, 00000/samples/0000.png and so on. Beside `out`, NAME.json,
are written NAME.results.jsonl (every picture's verdict, as the official evaluator's) and NAME.detections.jsonl (all
objects that were found). A run that was stopped goes on with the same command. The detector has the official one's
architecture but weights of its own: scores are close to published ones, not equal.
"""
from common.machine import exit_with_launcher
from configurator import configure

images = ""                  # folder in the official layout
detections = ""              # score these instead of running the detector: for each picture a line
                             # {"filename": "00000/samples/0000.png", "width", "height", "objects": [{"class", "score",
                             # "box", "color"}]}; a first line may say {"detector": what made them}
detector = "facebook/mask2former-swin-small-coco-instance"  # hub id or folder
clip = "openai/clip-vit-large-patch14"                      # names the colors; hub id or folder
out = ""                     # the scores go to this JSON file; empty: geneval.json in the folder of the images
threshold = 0.3              # objects with higher scores count
counting_threshold = 0.9     # the same for the task "counting"
max_objects = 16             # of one class, the best
max_overlap = 1.0            # of objects of a class that overlap so much, the best alone counts; 1: all do
position_threshold = 0.1     # part of the boxes' extents by which their centres must be apart
device = "auto"              # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
import importlib.util
import json
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common.files import write_atomic, write_json
from common.machine import pick_device, shared_store
from evaluation import geneval
from evaluation.clip import Clip, load_model, tensors_hash
from pictures import decode as pictures

TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
NOTE = "its own weights, not mmdetection's: scores are close to published ones, not equal"


def load_detector(name, device):
    """Mask2Former with COCO's 80 classes"""
    if importlib.util.find_spec("scipy") is None:
        raise ValueError("Mask2Former of transformers needs scipy, which is not installed: pip install scipy")
    from transformers import Mask2FormerForUniversalSegmentation
    model = load_model("detector", name, "mask2former", Mask2FormerForUniversalSegmentation)
    labels = model.config.id2label
    if len(labels) != 80 or labels[0] != "person" or labels[79] != "toothbrush":
        raise ValueError(f"detector {name}: it must have COCO's 80 classes, from person to toothbrush. It has "
                         f"{len(labels)}, from {labels.get(0)} to {labels.get(len(labels) - 1)}")
    return model.to(device)


def to_input(image, device):
    """RGB picture -> (1,3,H,W), and (height, width) of the picture in it, as mmdetection's test pipeline makes them.

    Within 1333 x 800, bilinear without antialiasing, grey below and on the right up to multiples of 32.
    """
    scale = min(1333 / max(image.size), 800 / min(image.size))
    width, height = (max(1, int(n * scale + 0.5)) for n in image.size)
    pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (height, width), mode="bilinear").round()
    pixels = F.pad(pixels, (0, -width % 32, 0, -height % 32), value=128.0)
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in ((123.675, 116.28, 103.53),
                                                                       (58.395, 57.12, 57.375)))
    return (pixels - mean) / std, (height, width)


def to_objects(class_logits, mask_logits, padded, resized, size):
    """Class logits (Q,81), mask logits (Q,h,w) -> (objects, best first, their masks (N,*size)), as in mmdetection.

    The 100 likeliest pairs of query and class; score: class probability x mean probability within the mask. Masks are
    enlarged before the threshold (transformers' own post-processing does it afterwards, at 384 x 384).
    """
    logits = F.interpolate(mask_logits[None], padded, mode="bilinear")[:, :, :resized[0], :resized[1]]
    logits = F.interpolate(logits, size, mode="bilinear")[0]
    masks = logits > 0
    areas = masks.flatten(1).sum(1)
    certainty = (logits.sigmoid() * masks).flatten(1).sum(1) / (areas + 1e-6)
    chances = class_logits.softmax(-1)[:, :-1]
    scores, pairs = chances.flatten().topk(min(100, chances.numel()))
    queries, labels = pairs // chances.shape[1], pairs % chances.shape[1]
    scores = scores * certainty[queries]
    order = scores.argsort(descending=True, stable=True)
    order = order[areas[queries[order]] > 0]
    boxes = [box_of(mask) if area else None for mask, area in zip(masks.cpu().numpy(), areas.tolist())]
    objects = [{"class": geneval.CLASSES[label], "score": score, "box": boxes[query]} for label, score, query in
               zip(labels[order].tolist(), scores[order].tolist(), queries[order].tolist())]
    return objects, masks[queries[order]].cpu().numpy()


def box_of(mask):
    """Extents of a mask that is not empty: [x1, y1, x2, y2], x2 and y2 exclusive"""
    (y,), (x,) = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1]


@torch.no_grad()
def detect(model, image):
    """(objects, best first, their masks (N,H,W)) of an RGB picture; one at a time, as batches change the last bits"""
    pixels, resized = to_input(image, model.device)
    found = model(pixel_values=pixels)
    return to_objects(found.class_queries_logits[0].float(), found.masks_queries_logits[0].float(), pixels.shape[2:],
                      resized, image.size[::-1])


def color_classifier(tower, name):
    """(10,D): the direction of each color for objects of class `name`"""
    texts = [template.format(color, name) for color in geneval.COLORS for template in TEMPLATES]
    directions = F.normalize(tower.text(texts), dim=-1).view(len(geneval.COLORS), len(TEMPLATES), -1)
    return F.normalize(directions.mean(1), dim=-1)


def name_colors(tower, classifiers, image, things, masks):
    """Set "color" of the objects, each cut out with what is around its mask in grey. `classifiers` keeps those made."""
    grey = Image.new("RGB", image.size, "#999")
    for thing, mask in zip(things, masks):
        if thing["class"] not in classifiers:
            classifiers[thing["class"]] = color_classifier(tower, thing["class"])
        cut = Image.composite(image, grey, Image.fromarray(mask.astype(np.uint8) * 255)).crop(thing["box"])
        closeness = classifiers[thing["class"]] @ F.normalize(tower.image([cut]), dim=-1)[0]
        thing["color"] = geneval.COLORS[int(closeness.argmax())]


def rules():
    return {"threshold": threshold, "counting_threshold": counting_threshold, "max_objects": max_objects,
            "max_overlap": max_overlap}


def colors_lack(record, prompt):
    """Whether objects whose color the prompt asks for have none in a line of detections"""
    groups = geneval.kept(record["objects"], prompt["tag"], **rules())
    return any("color" not in thing for thing in geneval.color_wanted(groups, prompt))


def look_at(filename, data, prompt, model, tower, classifiers):
    """The line of detections of one picture, given as a file's bytes; pictures.Unusable if it is damaged"""
    image = pictures.load(data, 1)
    objects, masks = detect(model, image)
    groups = geneval.kept(objects, prompt["tag"], **rules())
    wanted = set(map(id, geneval.color_wanted(groups, prompt)))
    wanted = [i for i, thing in enumerate(objects) if id(thing) in wanted]
    name_colors(tower, classifiers, image, [objects[i] for i in wanted], masks[wanted])
    return {"filename": filename, "sha256": hashlib.sha256(data).hexdigest(), "width": image.width,
            "height": image.height, "objects": objects}


def whole_lines(path):
    """The JSON of a file's lines. What follows the last line's end was cut off by a kill and does not count."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [geneval.parse(line.decode(errors="replace"), f"{path}, line {n} (remove that file to begin again)")
            for n, line in enumerate(lines, 1)]


def detection_files(stem):
    """NAME.detections.jsonl and the part of each process, as far as they are there"""
    name = re.compile(re.escape(stem.name) + r"\.detections(\.part[0-9]+)?\.jsonl")
    return sorted(path for path in stem.parent.iterdir() if name.fullmatch(path.name))


def read_earlier(stem, header):
    """Lines of detections that earlier runs and other processes left; ValueError if they were made differently"""
    earlier = []
    for path in detection_files(stem):
        lines = whole_lines(path)
        if lines and lines[0] != header:
            there = [f"{key} {lines[0].get(key)}" for key in header if lines[0].get(key) != header[key]]
            now = [f"{key} {header[key]}" for key in header if lines[0].get(key) != header[key]]
            raise ValueError(f"{path} was made with {geneval.first(there)}, now asked for are {geneval.first(now)}: "
                             "remove that file to begin again, or give another --out")
        earlier += lines[1:]
    return earlier


def reusable(earlier, todo):
    """{filename: line} of those of the pictures whose file is still the one that the line was made from"""
    by_name, found = {}, {}
    for line in earlier:
        by_name.setdefault(line["filename"], []).append(line)
    for filename, path, prompt in todo:
        if lines := by_name.get(filename):
            now = hashlib.sha256(path.read_bytes()).hexdigest()
            found |= {line["filename"]: line for line in lines
                      if line["sha256"] == now and not colors_lack(line, prompt)}
    return found


def open_part(path, header):
    """This process's own file of detections, to append to; a line that a kill cut off is removed first"""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    file = open(path, "a", encoding="utf-8")
    if not whole:
        file.write(json.dumps(header) + "\n")
    return file


def run_detector(todo, stem, rank, world):
    """(header, {filename: line of detections} of all pictures) in the first process of torchrun, ({}, {}) in others"""
    store = shared_store() if world > 1 else None
    if rank:  # the first process fetches models and may refuse what is there already
        store.wait(["ready"], timedelta(days=1))
    where = pick_device(device)
    model, tower = load_detector(detector, where), Clip(clip, where)
    header = {"made_by": "eval_geneval.py", "detector": detector, "detector_sha256": tensors_hash(model), "clip": clip,
              "clip_sha256": tensors_hash(tower.model), **rules()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    earlier = read_earlier(stem, header)
    if store and not rank:
        store.set("ready", "go")
    mine = todo[rank::world]
    done, classifiers = reusable(earlier, mine), {}
    with open_part(stem.with_name(f"{stem.name}.detections.part{rank}.jsonl"), header) as file:
        for filename, path, prompt in tqdm(mine, unit=" pictures", disable=rank > 0):
            if filename not in done:
                try:
                    line = look_at(filename, path.read_bytes(), prompt, model, tower, classifiers)
                except pictures.Unusable:
                    continue  # the first process says so, when all others are done
                file.write(json.dumps(line) + "\n")
                file.flush()
    if store:
        store.add("finished", 1)
        while not rank and store.add("finished", 0) < world:
            time.sleep(0.2)
    return ({}, {}) if rank else merge(todo, stem, header)


def merge(todo, stem, header):
    """(header, {filename: line}): all processes' lines become NAME.detections.jsonl, in the order of the pictures"""
    found = reusable(read_earlier(stem, header), todo)
    if damaged := [(filename, path) for filename, path, _ in todo if filename not in found]:
        raise ValueError(f"{len(damaged)} of {len(todo)} pictures cannot be used: "
                         f"{'; '.join(f'{filename} ({damage(path)})' for filename, path in damaged[:10])}"
                         f"{'; ...' * (len(damaged) > 10)}. Make them anew, and the same command goes on")
    text = "".join(json.dumps(line) + "\n" for line in [header, *(found[filename] for filename, _, _ in todo)])
    whole = stem.with_name(f"{stem.name}.detections.jsonl")
    write_atomic(whole, lambda file: file.write(text.encode()))
    for path in detection_files(stem):
        if path != whole:
            path.unlink()
    return header, found


def damage(path):
    try:
        pictures.load(path.read_bytes(), 1)
    except pictures.Unusable as reason:
        return str(reason)
    return "it changed in the meantime"


def read_given(todo):
    """(header, {filename: line}) of the --detections, which must be of exactly these pictures"""
    header, found = geneval.read_detections(detections)
    names = {filename for filename, _, _ in todo}
    if lacking := sorted(names - set(found)):
        raise ValueError(f"{detections} has no line for {len(lacking)} of {len(todo)} pictures of {images}: "
                         f"{geneval.first(lacking)}")
    if unknown := sorted(set(found) - names):
        raise ValueError(f"{detections} has lines for pictures that are not in {images}: {geneval.first(unknown)}")
    for filename, path, _ in todo:
        check_size(filename, path, found[filename])
    if colorless := [filename for filename, _, prompt in todo if colors_lack(found[filename], prompt)]:
        raise ValueError(f"{detections}: objects whose color the prompt asks for have no \"color\" in "
                         f"{geneval.first(colorless)}")
    return header, found


def check_size(filename, path, line):
    try:
        with Image.open(path) as image:
            size = image.size
    except OSError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if sorted(size) != sorted((line["width"], line["height"])):  # sides change places if the file says it is turned
        raise ValueError(f"{detections}: {filename} is {line['width']} x {line['height']} there, the picture is "
                         f"{size[0]} x {size[1]}")


def verdict(filename, prompt, line):
    """One line of the results, with what the official evaluator writes"""
    groups = geneval.kept(line["objects"], prompt["tag"], **rules())
    correct, reason = geneval.judge(groups, prompt, position_threshold)
    details = {name: [[*thing["box"], thing["score"]] for thing in group] for name, group in groups.items()}
    return {"filename": filename, "tag": prompt["tag"], "prompt": prompt["prompt"], "correct": correct,
            "reason": reason, "metadata": json.dumps(prompt), "details": json.dumps(details)}


def print_scores(report):
    print(f"\n{report['images_folder']}: {report['prompts']:,} prompts, {report['images']:,} images")
    for tag in geneval.TASKS:
        task = report["tasks"].get(tag)
        print(f"  {tag:30} " + (f"{100 * task['score']:6.2f} %  ({task['correct']} of {task['images']})" if task else
                                "  none here"))
    overall = report["mean_of_tasks"]
    print(f"  {'overall, tasks weigh equally':30} "
          + (f"{100 * overall:6.2f} %" if overall is not None else "  none, as not all six tasks are here"))
    for name, key in (("overall, images weigh equally", "mean_of_images"), ("prompts with a right image",
                      "prompts_any_correct"), ("prompts with right ones only", "prompts_all_correct")):
        print(f"  {name:30} {100 * report[key]:6.2f} %")
    print(f"detector: {report['detector']}" + f" ({report['note']})" * bool(report["note"]))


def check_settings():
    if not images:
        raise ValueError("no images: give --images FOLDER, in GenEval's layout (sample.py writes it)")
    for name in ("threshold", "counting_threshold", "position_threshold", "max_overlap"):
        if not 0 <= globals()[name] <= 1:
            raise ValueError(f"{name} is {globals()[name]}: it must be from 0 to 1")
    if max_objects < 1:
        raise ValueError(f"max_objects is {max_objects}: it must be at least 1")


def main():
    check_settings()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder = Path(images)
    todo = [(path.relative_to(folder).as_posix(), path, prompt)
            for prompt, paths in geneval.read_layout(folder) for path in paths]
    target = Path(out or folder / "geneval.json")
    stem = target.with_name(target.name.removesuffix(".json"))
    if detections and rank:
        return
    header, found = read_given(todo) if detections else run_detector(todo, stem, rank, world)
    if rank:
        return
    results = [verdict(filename, prompt, found[filename]) for filename, _, prompt in todo]
    report = {"images_folder": images, "detections": detections or None,
              "detector": header.get("detector", f"not said in {detections}"),
              "note": NOTE if "made_by" in header else "", **{key: header.get(key) for key in (
                  "detector_sha256", "clip", "clip_sha256")},
              "rules": rules() | {"position_threshold": position_threshold}, **geneval.summary(results)}
    text = "".join(json.dumps(result) + "\n" for result in results)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(stem.with_name(f"{stem.name}.results.jsonl"), lambda file: file.write(text.encode()))
    write_json(target, report)
    print_scores(report)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval_geneval.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("eval_geneval.py: stopped. The same command goes on where it was") from None
