"""
GenEval (Ghosh et al., 2023): its prompts, its folder layout, and its rules over detected objects. Imports no torch.

    prompts = read_prompts("evaluation_metadata.jsonl")  # the official file, of github.com/djghosh13/geneval
    write_layout("pictures", prompts)                    # pictures/00000/metadata.jsonl, pictures/00000/samples/
    correct, reason = judge(kept(objects, prompts[0]["tag"]), prompts[0])

A detected object is {"class", "score", "box": [x1, y1, x2, y2]} with x2 and y2 exclusive, in pixels, and may have a
"color". The rules are those of evaluation/evaluate_images.py there, the means those of evaluation/summary_scores.py.
"""
import json
import math
import re
from pathlib import Path

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop
sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
vase, scissors, teddy bear, hair drier, toothbrush"""
CLASSES = tuple(CLASSES.replace("\n", " ").split(", "))  # in COCO's order
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's name: GenEval's


def first(things, n=10):
    """The first n of them as a text"""
    return ", ".join(map(str, things[:n])) + f", and {len(things) - n} more" * (len(things) > n)


def parse(text, where):
    """The JSON object that a text holds"""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: it is no single JSON object ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a JSON object is wanted, it is {text.strip()[:60]}")
    return value


def whole(value, least, below=math.inf):
    return type(value) is int and least <= value < below


def check_class(name, where):
    if name not in CLASSES:
        known = f"'{RENAMED[name]}'" if name in list(RENAMED) else f"one of {first(CLASSES, 80)}"
        raise ValueError(f"{where}: unknown class {name!r}: GenEval's name is {known}")


def check_prompt(prompt, where):
    """ValueError, beginning with `where`, if this is not the description of a GenEval prompt"""
    for key in ("tag", "include", "prompt"):
        if key not in prompt:
            raise ValueError(f"{where}: there is no \"{key}\": {first(list(prompt)) or 'it is empty'}")
    if prompt["tag"] not in TASKS:
        raise ValueError(f"{where}: unknown tag {prompt['tag']!r}: the tasks are {first(TASKS)}")
    if not isinstance(prompt["prompt"], str) or not prompt["prompt"].strip():
        raise ValueError(f"{where}: the prompt is {prompt['prompt']!r}: it must be a text")
    for key in ("include", "exclude"):
        wanted = prompt.get(key, [])
        if not isinstance(wanted, list) or not all(isinstance(want, dict) for want in wanted):
            raise ValueError(f"{where}: \"{key}\" is {wanted!r}: it must be a list of objects")
        for i, want in enumerate(wanted):
            check_want(want, i, f"{where}: \"{key}\" {i}")
    if not prompt["include"]:
        raise ValueError(f"{where}: \"include\" is empty: nothing could be looked for")


def check_want(want, i, where):
    """Of one of the objects that a prompt wants, the i-th"""
    check_class(want.get("class"), where)
    if not whole(want.get("count"), 1):
        raise ValueError(f"{where}: the count is {want.get('count')!r}: it must be a whole number, 1 or more")
    if want.get("color", "red") not in COLORS:
        raise ValueError(f"{where}: unknown color {want['color']!r}: there are {first(COLORS)}")
    if "position" in want:
        place = want["position"]
        if not isinstance(place, list) or len(place) != 2 or place[0] not in RELATIONS:
            raise ValueError(f"{where}: unknown position {place!r}: it is one of {first(RELATIONS)}, and the number of "
                             "the object that it refers to")
        if not whole(place[1], 0, i):
            raise ValueError(f"{where}: the position refers to object {place[1]!r} of \"include\": it must be a number "
                             f"from 0, below its own, {i}")


def read_prompts(path):
    """The prompts of a file in the format of evaluation_metadata.jsonl, as dicts; ValueError names file and line"""
    if not Path(path).is_file():
        raise ValueError(f"no prompts file {path} (GenEval's is prompts/evaluation_metadata.jsonl of its repository)")
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    prompts = [(parse(line, f"{path}, line {n}"), n) for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty: one prompt a line is wanted")
    for prompt, n in prompts:
        check_prompt(prompt, f"{path}, line {n}")
    return [prompt for prompt, _ in prompts]


def folders(prompts, images_per_prompt=4):
    """[(path within the layout, number of the prompt, number of the image)] of every image, prompt by prompt"""
    return [(f"{i:05d}/samples/{j:04d}.png", i, j) for i in range(len(prompts)) for j in range(images_per_prompt)]


def write_layout(out, prompts):
    """Write out/00000/metadata.jsonl and make out/00000/samples for every prompt.

    What is there already and the same is kept; ValueError, before anything is written, if it is of other prompts.
    """
    out = Path(out)
    names = [f"{i:05d}" for i in range(len(prompts))]
    there = [p.name for p in numbered(out)] if out.is_dir() else []
    if others := sorted(set(there) - set(names)):
        raise ValueError(f"{out} has folders of other prompts, which would be scored too: {first(others)}. Remove "
                         "them, or give another folder")
    for name, prompt in zip(names, prompts):
        file = out / name / "metadata.jsonl"
        if file.exists() and parse(file.read_text(encoding="utf-8"), file) != prompt:
            raise ValueError(f"{file} is of another prompt than {prompt['prompt']!r}: give another folder")
    for name, prompt in zip(names, prompts):
        (out / name / "samples").mkdir(parents=True, exist_ok=True)
        if not (out / name / "metadata.jsonl").exists():
            temporary = out / name / "metadata.jsonl.tmp"
            temporary.write_text(json.dumps(prompt) + "\n", encoding="utf-8")
            temporary.replace(out / name / "metadata.jsonl")  # whole or not at all


def numbered(folder):
    """The folders in it whose names are digits, in the order of their numbers"""
    return sorted((p for p in folder.iterdir() if p.is_dir() and re.fullmatch("[0-9]+", p.name)),
                  key=lambda p: (int(p.name), p.name))


def read_layout(folder):
    """[(prompt, [paths of its images])], as the official evaluator finds them: DIGITS/samples/DIGITS.png, nothing else.

    ValueError if a prompt has no description or no images, or if not all prompts have equally many.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    layout = []
    for place in numbered(folder):
        file, samples = place / "metadata.jsonl", place / "samples"
        if not file.is_file():
            raise ValueError(f"{file} is missing: it holds the prompt's line of evaluation_metadata.jsonl")
        prompt = parse(file.read_text(encoding="utf-8"), file)
        check_prompt(prompt, file)
        images = [p for p in samples.iterdir() if re.fullmatch(r"[0-9]+\.png", p.name)] if samples.is_dir() else []
        layout.append((prompt, sorted(images, key=lambda p: (int(p.stem), p.name))))
    if not layout:
        raise ValueError(f"{folder} has no folders 00000, 00001, ...: each holds metadata.jsonl and samples/")
    counts = [len(images) for _, images in layout]
    usual = max(set(counts), key=lambda n: (counts.count(n), n))
    odd = [f"{place.name} has {n}" for place, n in zip(numbered(folder), counts) if n != usual or not n]
    if odd:
        raise ValueError(f"{folder}: all prompts must have equally many images in samples/, and at least one. "
                         f"{f'Most have {usual}: ' * (usual > 0)}{first(odd)}")
    return layout


def kept(objects, tag, threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0):
    """{class: its objects that count, best first}: scores above the threshold, `max_objects` of a class at most.

    max_overlap below 1: of objects of a class that overlap so much (intersection over union), the best alone.
    """
    least = np.float32(counting_threshold if tag == "counting" else threshold)  # float32, as detectors' scores are
    groups = {}
    for thing in sorted(objects, key=lambda thing: -np.float32(thing["score"])):
        if np.float32(thing["score"]) > least:
            groups.setdefault(thing["class"], []).append(thing)
    return {name: apart(group[:max_objects], max_overlap) for name, group in groups.items()}


def apart(group, max_overlap):
    """Those of the objects, best first, that do not overlap with a better one"""
    chosen = []
    for thing in group:
        if max_overlap == 1 or all(overlap(thing["box"], other["box"]) < max_overlap for other in chosen):
            chosen.append(thing)
    return chosen


def overlap(a, b):
    """Intersection over union of two boxes, counted as if x2 and y2 were inside (as the official evaluator does)"""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both)


def relative_position(a, b, threshold=0.1):
    """Where box a is as seen from box b: a set of RELATIONS, empty if the boxes are too near to each other.

    The offset of the centres, less `threshold` of both extents, must be more than half the whole offset's length.
    """
    corners = np.array([a, b], np.float32).reshape(2, 2, 2)
    extents = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    centres = corners.mean(1)
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - threshold * extents, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, true in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if true}


def color_wanted(groups, prompt):
    """The objects whose "color" judge() looks at: of a class wanted in a color the best `count`, if so many"""
    found = [(groups.get(want["class"], []), want["count"]) for want in prompt["include"] if "color" in want]
    return [thing for group, count in found if len(group) >= count for thing in group[:count]]


def judge(groups, prompt, position_threshold=0.1):
    """(whether the image is correct, why not) of what kept() gives.

    Every wanted object is checked, also after one has failed. One that failed is no target for the position of another.
    """
    reasons, targets = [], []
    for want in prompt["include"]:
        found = groups.get(want["class"], [])[:want["count"]]
        why = missed(want, found) or misplaced(want, found, targets, position_threshold)
        reasons += [why] if why else []
        targets.append(None if why else found)
    for want in prompt.get("exclude", []):
        n = len(groups.get(want["class"], []))
        if n >= want["count"]:
            reasons.append(f"expected {want['class']}<{want['count']}, found {n}")
    return not reasons, "\n".join(reasons)


def missed(want, found):
    """Why these objects are too few or of other colors, or None"""
    name, count = want["class"], want["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in want:
        colors = [thing["color"] for thing in found]
        if colors.count(want["color"]) < count:
            there = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {want['color']} {name}>={count}, found {colors.count(want['color'])}; there are {there}"


def misplaced(want, found, targets, threshold):
    """Why one of these objects is not where it should be as seen from each of its targets, or None"""
    if "position" not in want:
        return None
    relation, target = want["position"]
    if targets[target] is None:
        return f"no target for {want['class']} to be {relation}"
    for thing in found:
        for other in targets[target]:
            there = relative_position(thing["box"], other["box"], threshold)
            if relation not in there:
                there = " and ".join(sorted(there)) or "no relation"
                return f"expected {want['class']} {relation} target, found {there}"


def read_detections(path):
    """(first line if it describes the file, else {}, {filename: line}) of a file of detections; ValueError names it.

    A line: {"filename": "00000/samples/0000.png", "width", "height", "objects": [...]}.
    """
    if not Path(path).is_file():
        raise ValueError(f"no detections file {path}")
    header, records = {}, {}
    for n, text in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if text.strip():
            record = parse(text, f"{path}, line {n}")
            if n == 1 and "filename" not in record:
                header = record
                continue
            check_detections(record, f"{path}, line {n}")
            if record["filename"] in records:
                raise ValueError(f"{path}, line {n}: {record['filename']} has a line already")
            records[record["filename"]] = record
    return header, records


def check_detections(record, where):
    for key, good in (("filename", lambda v: isinstance(v, str)), ("width", lambda v: whole(v, 1)),
                      ("height", lambda v: whole(v, 1)), ("objects", lambda v: isinstance(v, list))):
        if not good(record.get(key)):
            raise ValueError(f"{where}: \"{key}\" is {record.get(key)!r}: filename (a text), width, height (in pixels) "
                             "and objects (a list) are wanted")
    for i, thing in enumerate(record["objects"]):
        if not isinstance(thing, dict):
            raise ValueError(f"{where}, object {i} is {thing!r}: class, score and box are wanted")
        check_class(thing.get("class"), f"{where}, object {i}")
        score, box = thing.get("score"), thing.get("box")
        if not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise ValueError(f"{where}, object {i}: the score is {score!r}: it must be a number from 0 to 1")
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
                and 0 <= box[0] <= box[2] <= record["width"] and 0 <= box[1] <= box[3] <= record["height"]):
            raise ValueError(f"{where}, object {i}: the box is {box!r}: it must be [x1, y1, x2, y2] within the picture")
        if thing.get("color", "red") not in COLORS:
            raise ValueError(f"{where}, object {i}: unknown color {thing['color']!r}: there are {first(COLORS)}")


def summary(results):
    """Scores, 0 to 1, of results with "tag", "correct" and "metadata" (the prompt as a text).

    mean_of_tasks, GenEval's own overall score, is None if a task is absent. mean_of_images weighs all images equally.
    """
    right = {tag: [bool(r["correct"]) for r in results if r["tag"] == tag] for tag in TASKS}
    tasks = {tag: {"images": len(c), "correct": sum(c), "score": sum(c) / len(c)} for tag, c in right.items() if c}
    absent = [tag for tag in TASKS if tag not in tasks]
    prompts = {}
    for r in results:
        prompts.setdefault(r["metadata"], []).append(bool(r["correct"]))
    return {"prompts": len(prompts), "images": len(results), "tasks": tasks, "absent_tasks": absent,
            "mean_of_tasks": None if absent else sum(task["score"] for task in tasks.values()) / len(TASKS),
            "mean_of_images": sum(task["correct"] for task in tasks.values()) / len(results),
            "prompts_any_correct": sum(map(any, prompts.values())) / len(prompts),
            "prompts_all_correct": sum(map(all, prompts.values())) / len(prompts)}
