"""
GenEval (Ghosh et al., 2023): its prompts, its folder layout, and its rules over detected objects. Imports no torch.

    prompts = read_prompts("evaluation_metadata.jsonl")  # the official file, of github.com/djghosh13/geneval
    write_layout("pictures", prompts)                    # pictures/00000/metadata.jsonl, pictures/00000/samples/
    correct, reason = judge(kept(objects, prompts[0]["tag"]), prompts[0])

A detected object is {"class", "score", "box": [x1, y1, x2, y2]} with x2 and y2 exclusive, in pixels, and may have a
"color". The rules are those of evaluation/evaluate_images.py there, the means those of evaluation/summary_scores.py.
"""
import json
from pathlib import Path

import numpy as np

from common.files import write_lines

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
# how errors say what the objects of prompts and of detections must be
KNOWN = f"class: one of COCO's (GenEval says computer mouse, tv remote, computer keyboard), color: {', '.join(COLORS)}"
WANTED = f"{KNOWN}, count: 1 or more, position: [one of {', '.join(RELATIONS)}, number of an earlier object]"
DETECTED = f"{KNOWN}, score: 0 to 1, box: [x1, y1, x2, y2] within the picture"


def parse(text, place):
    """Return the JSON that a text holds. `place` says where it stands, for the error."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: it is no single JSON object ({error})") from None


def check(value, right, place, description):
    """Refuse a value for which right() is not true, or fails as the value is something else altogether."""
    try:
        good = right()
    except (AttributeError, KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{place}: {json.dumps(value)[:300]} is wrong. Give it {description}")


def check_prompt(prompt, place):
    """Refuse what is not the description of a GenEval prompt."""
    check(prompt, lambda: prompt["tag"] in TASKS and isinstance(prompt["prompt"], str) and prompt["include"], place,
          f"tag: one of {', '.join(TASKS)}, prompt: a text, include: a list of objects")
    for key in ("include", "exclude"):
        for i, want in enumerate(prompt.get(key, [])):
            check(want, lambda: known(want) and type(want["count"]) is int and want["count"] > 0 and (
                "position" not in want or want["position"][0] in RELATIONS and want["position"][1] in range(i)),
                f"{place}, {key} {i}", WANTED)


def check_detections(record, place):
    """Refuse what is not the detections of a picture."""
    check(record, lambda: record["filename"] and min(record["width"], record["height"]) > 0 and
          isinstance(record["objects"], list), place,
          "filename: 00000/samples/0000.png, width and height: 1 or more, objects: a list")
    for i, thing in enumerate(record["objects"]):
        def right():
            x1, y1, x2, y2 = thing["box"]
            return known(thing) and 0 <= thing["score"] <= 1 and 0 <= x1 <= x2 <= record["width"] and (
                0 <= y1 <= y2 <= record["height"])
        check(thing, right, f"{place}, object {i}", DETECTED)


def known(thing):
    """Return whether the class of an object, and its color if it has one, are GenEval's."""
    return thing["class"] in CLASSES and thing.get("color", COLORS[0]) in COLORS


def numbered_lines(path):
    """Return [(JSON, place)] of the lines of a .jsonl file that are not empty."""
    lines = [(line, f"{path}, line {n}") for n, line in enumerate(Path(path).read_text("utf-8").split("\n"), 1)]
    return [(parse(line, place), place) for line, place in lines if line.strip()]


def read_prompts(path):
    """Return the prompts of a file in the format of evaluation_metadata.jsonl, as dicts."""
    lines = numbered_lines(path)
    if not lines:
        raise ValueError(f"{path} is empty: one prompt a line is wanted")
    for prompt, place in lines:
        check_prompt(prompt, place)
    return [prompt for prompt, _ in lines]


def read_detections(path):
    """Return (header, {filename: record}) of a file of detections, whose first line may be a header.

    A record is {"filename": "00000/samples/0000.png", "width", "height", "objects": [...]}.
    """
    lines, records = numbered_lines(path), {}
    header = lines.pop(0)[0] if lines and isinstance(lines[0][0], dict) and "filename" not in lines[0][0] else {}
    for record, place in lines:
        check_detections(record, place)
        if record["filename"] in records:
            raise ValueError(f"{place}: {record['filename']} has a line already")
        records[record["filename"]] = record
    return header, records


def folders(prompts, images_per_prompt=4):
    """Return [(path within the layout, number of the prompt, number of the image)] of every image, prompt by prompt."""
    return [(f"{i:05d}/samples/{j:04d}.png", i, j) for i in range(len(prompts)) for j in range(images_per_prompt)]


def write_layout(out, prompts):
    """Write out/00000/metadata.jsonl and make out/00000/samples for every prompt."""
    for i, prompt in enumerate(prompts):
        folder = Path(out) / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_lines(folder / "metadata.jsonl", [prompt])


def read_layout(folder):
    """Return [(prompt, [paths of its images])] as the official evaluator finds them: DIGITS/samples/DIGITS.png.

    Refuse a prompt without description or images, and prompts with unequal numbers of images.
    """
    layout = []
    for prompt_folder in sorted(path for path in Path(folder).glob("*/") if path.name.isdigit()):
        file = prompt_folder / "metadata.jsonl"
        prompt = parse(file.read_text(encoding="utf-8"), file)
        check_prompt(prompt, file)
        images = [path for path in sorted((prompt_folder / "samples").glob("*.png")) if path.stem.isdigit()]
        layout.append((prompt, images))
    counts = [len(images) for _, images in layout]
    if not layout or min(counts) < max(counts) or not max(counts):
        uneven = [f"prompt {i} has {n}" for i, n in enumerate(counts) if n < max(counts) or not n]
        raise ValueError(f"{folder}: it must have folders 00000, 00001, ..., each with metadata.jsonl and equally many "
                         f"images in samples/, at least one. {', '.join(uneven[:10])}")
    return layout


def kept(objects, tag, threshold=0.3, counting_threshold=0.9, max_objects=16, max_overlap=1.0):
    """Return {class: its objects that count, best first}: scores above the threshold, at most `max_objects` of a class.

    With max_overlap below 1, the best alone counts of objects of a class that overlap so much.
    """
    least = np.float32(counting_threshold if tag == "counting" else threshold)  # float32, as detectors' scores are
    groups = {}
    for thing in sorted(objects, key=lambda thing: -np.float32(thing["score"])):
        if np.float32(thing["score"]) > least:
            groups.setdefault(thing["class"], []).append(thing)
    return {name: apart(group[:max_objects], max_overlap) for name, group in groups.items()}


def apart(group, max_overlap):
    """Return those of the objects, best first, that do not overlap with a better one."""
    chosen = []
    for thing in group:
        if max_overlap == 1 or all(overlap(thing["box"], other["box"]) < max_overlap for other in chosen):
            chosen.append(thing)
    return chosen


def overlap(a, b):
    """Return the intersection over union of two boxes. x2 and y2 count as inside, as in the official evaluator."""
    def area(x1, y1, x2, y2):
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both)


def relative_position(a, b, threshold=0.1):
    """Return where box a is, seen from box b: a set of RELATIONS, empty if the boxes are too near to each other.

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
    """Return the objects whose "color" judge() looks at: of a class wanted in a color the best `count`, if so many."""
    wanted = [(groups.get(want["class"], []), want["count"]) for want in prompt["include"] if "color" in want]
    return [thing for group, count in wanted if len(group) >= count for thing in group[:count]]


def judge(groups, prompt, position_threshold=0.1):
    """Return (whether the image is correct, why not) from what kept() gives.

    Every wanted object is checked, also after one has failed. One that failed is no target for the position of another.
    """
    reasons, targets = [], []
    for want in prompt["include"]:
        objects = groups.get(want["class"], [])[:want["count"]]
        reason = missed(want, objects) or misplaced(want, objects, targets, position_threshold)
        if reason:
            reasons.append(reason)
        targets.append(None if reason else objects)
    for want in prompt.get("exclude", []):
        if (n := len(groups.get(want["class"], []))) >= want["count"]:
            reasons.append(f"expected {want['class']}<{want['count']}, found {n}")
    return not reasons, "\n".join(reasons)


def missed(want, objects):
    """Return why these objects are too few or of other colors, or None."""
    name, count = want["class"], want["count"]
    if len(objects) < count:
        return f"expected {name}>={count}, found {len(objects)}"
    colors = [thing["color"] for thing in objects] if "color" in want else []
    if colors and colors.count(want["color"]) < count:
        seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
        return f"expected {want['color']} {name}>={count}, found {colors.count(want['color'])}; there are {seen}"
    return None


def misplaced(want, objects, targets, threshold):
    """Return why one of these objects is not where it should be, seen from each of its targets, or None."""
    if "position" not in want:
        return None
    relation, target = want["position"]
    if targets[target] is None:
        return f"no target for {want['class']} to be {relation}"
    for thing in objects:
        for other in targets[target]:
            seen = relative_position(thing["box"], other["box"], threshold)
            if relation not in seen:
                seen = " and ".join(sorted(seen)) or "no relation"
                return f"expected {want['class']} {relation} target, found {seen}"
    return None


def summary(results):
    """Return the scores, 0 to 1, of results with "tag", "correct" and "metadata" (the prompt as a text).

    mean_of_tasks, GenEval's own overall score, is None if a task is absent. mean_of_images weighs all images equally.
    """
    right = {tag: [bool(r["correct"]) for r in results if r["tag"] == tag] for tag in TASKS}
    tasks = {tag: {"images": len(c), "correct": sum(c), "score": sum(c) / len(c)} for tag, c in right.items() if c}
    scores = [task["score"] for task in tasks.values()]
    return {"prompts": len({r["metadata"] for r in results}), "images": len(results), "tasks": tasks,
            "mean_of_tasks": sum(scores) / len(TASKS) if len(scores) == len(TASKS) else None,
            "mean_of_images": sum(bool(r["correct"]) for r in results) / len(results)}
