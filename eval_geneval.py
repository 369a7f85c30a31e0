"""
GenEval scores of pictures in its official folder layout, without mmdetection: Mask2Former and CLIP of transformers.
OUT/geneval.json has the scores; docs/evaluation.md says what else is there.

    pip install scipy && python eval_geneval.py --images samples/geneval
    torchrun --nproc_per_node=8 eval_geneval.py --images samples/geneval
"""
from common.machine import exit_with_launcher
from configurator import configure

images = ""      # folder in the official layout, as sample.py writes it
detector = "facebook/mask2former-swin-small-coco-instance"  # hub id or folder of the network that finds objects
clip = "openai/clip-vit-large-patch14"                      # hub id or folder of the network that names their colors
out = ""         # folder of the scores; empty: scores/NAME_geneval, by the name of the images' folder
device = "auto"  # cuda, mps or cpu; auto: the best of these that the machine has

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import hashlib
import json

from tqdm import tqdm

from common.files import hash_of, is_there, read_json, reading, write_json, write_lines
from common.folders import claim, lock
from common.machine import pick_device
from common.processes import join, run_script
from common.tensors import tensors_hash
from evaluation import geneval
from evaluation.clip import Clip
from evaluation.detector import detect, load_detector, name_colors
from evaluation.prompts import scores_folder
from pictures.decode import Unusable, load_picture

OURS = r"geneval\.json|(results|detections)\.jsonl|detections"  # names in the folder of the scores
NOTE = "(not mmdetection's weights: scores are close to published ones, not equal)"


def look_at(path, stored, filename, prompt, model, tower):
    """Return (detections, line of the results) of a picture, from an earlier start if it has not changed since."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if is_there(stored):
        with reading(stored, ". Delete it, and the picture is looked at again"):
            record = read_json(stored)
            if record["sha256"] == sha256:
                return record, verdict(filename, prompt, record["objects"])
    try:
        image = load_picture(path, 1)
    except Unusable as reason:
        raise ValueError(f"{path}: {reason}. Make it anew, and the same command goes on") from None
    objects, masks = detect(model, image)
    wanted = geneval.color_wanted(geneval.groups_of(objects, prompt["tag"]), prompt)
    chosen = [i for i, thing in enumerate(objects) if any(thing is other for other in wanted)]
    name_colors(tower, image, [objects[i] for i in chosen], masks[chosen])
    record = {"filename": filename, "sha256": sha256, "width": image.width, "height": image.height, "objects": objects}
    write_json(stored, record)
    return record, verdict(filename, prompt, objects)


def verdict(filename, prompt, objects):
    """Return one line of the results, as the official evaluator writes it."""
    groups = geneval.groups_of(objects, prompt["tag"])
    correct, reason = geneval.judge(groups, prompt)
    details = {name: [[*thing["box"], thing["score"]] for thing in group] for name, group in groups.items()}
    return {"filename": filename, "tag": prompt["tag"], "prompt": prompt["prompt"], "correct": correct,
            "reason": reason, "metadata": json.dumps(prompt), "details": json.dumps(details)}


def report(records, results, folder, description):
    """Write the scores and what they follow from, and print them."""
    scores = geneval.summary(results)
    write_lines(folder / "detections.jsonl", [description, *records])
    write_lines(folder / "results.jsonl", results)
    write_json(folder / "geneval.json", description | {"note": NOTE} | scores)
    print(f"\n{images}: {scores['prompts']:,} prompts, {scores['images']:,} images")
    for tag, task in scores["tasks"].items():
        print(f"  {tag:30} {100 * task['score']:6.2f} %  ({task['correct']} of {task['images']})")
    overall = scores["mean_of_tasks"]
    print(f"  images weigh equally           {100 * scores['mean_of_images']:6.2f} %\n  overall, tasks weigh equally   "
          + ("none, as not all six tasks are here" if overall is None else f"{100 * overall:6.2f} %"))
    print(f"detector: {detector} {NOTE}\nall files are in {folder}")


def main():
    if not images:
        raise ValueError("no images: give --images FOLDER, as sample.py writes it")
    folder, todo = scores_folder(out, images, "_geneval"), []
    for prompt, paths in geneval.read_layout(images):
        for path in paths:
            filename = path.relative_to(images).as_posix()
            todo.append((path, folder / "detections" / f"{filename.replace('/', '_')}.json", filename, prompt))
    processes = join()
    processes.from_first(lambda: lock(folder))
    torch_device = pick_device(device)
    model, tower = load_detector(detector, torch_device), Clip(clip, torch_device)
    description = {"images_folder": images, "prompts_sha256": hash_of([job[2:] for job in todo]), "detector": detector,
                   "detector_sha256": tensors_hash(model), "clip": clip, "clip_sha256": tower.about["network_sha256"]}
    processes.from_first(lambda: claim(folder, "detections.json", OURS, description))
    (folder / "detections").mkdir(exist_ok=True)
    share = tqdm(processes.share(todo), unit=" pictures", disable=processes.rank > 0)
    done = sum(processes.gather([look_at(*job, model, tower) for job in share]), [])
    if processes.rank == 0:
        records, results = zip(*sorted(done, key=lambda pair: pair[0]["filename"]))
        report(records, results, folder, description)
    processes.leave()


if __name__ == "__main__":
    run_script("eval_geneval.py", main)
