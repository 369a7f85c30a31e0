"""
GenEval scores of pictures in its official folder layout, without mmdetection: Mask2Former and CLIP of transformers.

    python eval_geneval.py --images samples/geneval                          # needs scipy besides: pip install scipy
    torchrun --nproc_per_node=8 eval_geneval.py --images samples/geneval     # the pictures shared out
    python eval_geneval.py --images samples/geneval --detections mine.jsonl  # objects that another detector found

The layout is what sample.py writes: 00000/metadata.jsonl, 00000/samples/0000.png and so on. Beside `out`, NAME.json,
are written NAME.results.jsonl (every picture's verdict, as the official evaluator's) and NAME.detections.jsonl (all
objects that were found). NAME.detections/ has a file for each picture, with which a run that was stopped goes on. The
detector has the official architecture and weights of its own: scores are close to published ones, not equal.
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
threshold = 0.3              # objects with higher scores count (>= 0, <= 1)
counting_threshold = 0.9     # the same for the task "counting" (>= 0, <= 1)
max_objects = 16             # of one class, the best (>= 1)
max_overlap = 1.0            # of objects of a class that overlap so much, the best alone counts; 1: all do (>= 0, <= 1)
position_threshold = 0.1     # part of the boxes' extents by which their centres must be apart (>= 0, <= 1)
device = "auto"              # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
import json
from pathlib import Path

from tqdm import tqdm

from common.files import write_json, write_lines
from common.hashing import tensors_hash
from common.machine import pick_device
from evaluation import geneval
from evaluation.clip import Clip
from evaluation.detector import detect, load_detector, name_colors
from evaluation.drawn import hash_of
from evaluation.processes import gathered, join, processes, run_script
from pictures import decode

NOTE = "(its own weights, not mmdetection's: scores are close to published ones, not equal)"


def rules():
    """Return the settings of geneval.kept()."""
    return {"threshold": threshold, "counting_threshold": counting_threshold, "max_objects": max_objects,
            "max_overlap": max_overlap}


def look_at(filename, data, prompt, models):
    """Return the detections of one picture, given as its file's bytes; of a damaged one the reason."""
    model, tower, classifiers = models
    record = {"filename": filename, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        image = decode.load(data, 1)
    except decode.Unusable as reason:
        return record | {"unusable": str(reason)}
    objects, masks = detect(model, image)
    wanted = geneval.color_wanted(geneval.kept(objects, prompt["tag"], **rules()), prompt)
    chosen = [i for i, thing in enumerate(objects) if any(thing is other for other in wanted)]
    name_colors(tower, classifiers, image, [objects[i] for i in chosen], masks[chosen])
    return record | {"width": image.width, "height": image.height, "objects": objects}


def detections_of(filename, path, prompt, folder, models, header):
    """Return the detections of one picture: those in `folder`, if all that they depend on is the same, or new ones."""
    data = path.read_bytes()
    key = hash_of([header, prompt, hashlib.sha256(data).hexdigest()])
    stored = folder / f"{filename.replace('/', '_')}.json"
    if stored.exists():
        kept = geneval.parse(stored.read_text(encoding="utf-8"), stored)
        if kept["key"] == key:
            return kept["record"]
    record = look_at(filename, data, prompt, models)
    write_json(stored, {"key": key, "record": record})
    return record


def run_detector(todo, stem):
    """Return (header, [the detections of each picture])."""
    rank, world = join()
    torch_device = pick_device(device)
    model, tower = load_detector(detector, torch_device), Clip(clip, torch_device)
    header = {"made_by": "eval_geneval.py", "detector": detector, "detector_sha256": tensors_hash(model), "clip": clip,
              "clip_sha256": tower.about["network_sha256"], **rules()}
    folder, models = Path(f"{stem}.detections"), (model, tower, {})
    folder.mkdir(parents=True, exist_ok=True)
    for item in tqdm(todo[rank::world], unit=" pictures", disable=rank > 0):
        detections_of(*item, folder, models, header)
    gathered("done")  # the files of all processes are there from here on
    records = [detections_of(*item, folder, models, header) for item in todo]
    if damaged := [f"{r['filename']} ({r['unusable']})" for r in records if "unusable" in r]:
        raise ValueError(f"{len(damaged)} of {len(todo)} pictures cannot be used: {'; '.join(damaged[:10])}. Make them "
                         "anew, and the same command goes on")
    if rank == 0:
        write_lines(f"{stem}.detections.jsonl", [header, *records])
    return header, records


def read_given(todo):
    """Return (header, [the detections of each picture]) from --detections. Refuse a file that is of other pictures."""
    header, records = geneval.read_detections(detections)
    names = [filename for filename, _, _ in todo]
    if differ := sorted(records.keys() ^ set(names)):
        raise ValueError(f"{detections} and {images} are not of the same pictures: {len(differ)} are in one alone, as "
                         f"{', '.join(differ[:10])}")
    return header, [records[name] for name in names]


def verdict(filename, prompt, record):
    """Return one line of the results, with what the official evaluator writes."""
    groups = geneval.kept(record["objects"], prompt["tag"], **rules())
    if any("color" not in thing for thing in geneval.color_wanted(groups, prompt)):
        raise ValueError(f"{detections}: objects of {filename} have no \"color\", which its prompt asks for")
    correct, reason = geneval.judge(groups, prompt, position_threshold)
    details = {name: [[*thing["box"], thing["score"]] for thing in group] for name, group in groups.items()}
    return {"filename": filename, "tag": prompt["tag"], "prompt": prompt["prompt"], "correct": correct,
            "reason": reason, "metadata": json.dumps(prompt), "details": json.dumps(details)}


def print_scores(report):
    """Print the scores of the tasks and overall."""
    print(f"\n{images}: {report['prompts']:,} prompts, {report['images']:,} images")
    for tag, task in report["tasks"].items():
        print(f"  {tag:30} {100 * task['score']:6.2f} %  ({task['correct']} of {task['images']})")
    print(f"  images weigh equally           {100 * report['mean_of_images']:6.2f} %")
    print("  overall, tasks weigh equally   " + (
        "none, as not all six tasks are here" if report["mean_of_tasks"] is None else
        f"{100 * report['mean_of_tasks']:6.2f} %"))
    print(f"detector: {report['detector']} {report['note']}")


def main():
    if not images:
        raise ValueError("no images: give --images FOLDER, in GenEval's layout (sample.py writes it)")
    folder = Path(images)
    todo = [(path.relative_to(folder).as_posix(), path, prompt)
            for prompt, paths in geneval.read_layout(folder) for path in paths]
    target = Path(out or folder / "geneval.json")
    stem = str(target).removesuffix(".json")
    header, records = read_given(todo) if detections else run_detector(todo, stem)
    if processes()[0]:
        return
    results = [verdict(filename, prompt, record) for (filename, _, prompt), record in zip(todo, records)]
    report = {"images_folder": images, "detections": detections, "detections_header": header,
              "detector": header.get("detector", f"not said in {detections}"),
              "note": NOTE if "made_by" in header else "",
              "rules": rules() | {"position_threshold": position_threshold}, **geneval.summary(results)}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_lines(f"{stem}.results.jsonl", results)
    write_json(target, report)
    print_scores(report)


if __name__ == "__main__":
    run_script("eval_geneval.py", main)
