"""
GenEval (Ghosh et al., 2023): its prompts, its folder layout, and its rules over detected objects.

A detected object is {"class", "score", "box": [x1, y1, x2, y2]} with x2 and y2 exclusive, in pixels, and may have a
"color". The rules and means are those of evaluation/ in github.com/djghosh13/geneval.
"""
import itertools
import json
from pathlib import Path

import numpy as np

from common.files import read_bytes, read_json, reading, write_lines

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = tuple("""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli,
carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", "))  # in COCO's order
# The official evaluator's defaults. Scores are compared in float32, as detectors give them.
THRESHOLD, COUNTING_THRESHOLD = np.float32(0.3), np.float32(0.9)  # objects with higher scores count
MOST_OBJECTS = 16  # of one class, the best
MARGIN = 0.1  # part of the boxes' extents by which their centres must be apart


def checked(prompt):
    """Return the description of a prompt. What is not as GenEval's raises ValueError, TypeError or KeyError."""
    names = {prompt["tag"]}
    for want in [*prompt["include"], *prompt.get("exclude", [])]:
        names |= {want["class"], want.get("color", "red"), want.get("position", RELATIONS)[0]}
    unknown = names - {*TASKS, *CLASSES, *COLORS, *RELATIONS}
    if unknown or not prompt["prompt"].strip():
        raise ValueError(f"GenEval does not know {', '.join(sorted(unknown)) or 'a prompt without text'}")
    judge({}, prompt)  # which stumbles over all else
    return prompt


def read_prompts(path):
    """Return the prompts of a file in the format of the official evaluation_metadata.jsonl, as dicts."""
    prompts = []
    with reading(path):
        for number, line in enumerate(read_bytes(path).decode("utf-8-sig").split("\n"), 1):
            if line.strip():
                with reading(f"{path}, line {number}"):
                    prompts.append(checked(json.loads(line)))
    if not prompts:
        raise ValueError(f"{path} is empty: one prompt a line is wanted")
    return prompts


def folders(prompts, images_per_prompt=4):
    """Return [(path within the layout, number of the prompt, number of the image)] of every image."""
    return [(f"{i:05d}/samples/{j:04d}.png", i, j) for i in range(len(prompts)) for j in range(images_per_prompt)]


def write_layout(out, prompts):
    """Write out/00000/metadata.jsonl and make out/00000/samples for every prompt."""
    for i, prompt in enumerate(prompts):
        folder = Path(out) / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_lines(folder / "metadata.jsonl", [prompt])


def read_layout(folder):
    """Return [(prompt, [paths of its images])] as the official evaluator finds them: DIGITS/samples/DIGITS.png."""
    layout = []
    for file in sorted(path / "metadata.jsonl" for path in Path(folder).glob("*/") if path.name.isdigit()):
        with reading(file):
            prompt = checked(read_json(file))
        layout.append((prompt, sorted(p for p in file.parent.glob("samples/*.png") if p.stem.isdigit())))
    counts = [len(images) for _, images in layout]
    if uneven := [f"prompt {i} has {n}" for i, n in enumerate(counts or [0]) if n < max([1, *counts])]:
        raise ValueError(f"{folder}: its folders 00000/samples and so on need equally many images, but {uneven[0]}")
    return layout


def groups_of(objects, tag):
    """Return {class: its objects that count, best first} of all detected objects, for a prompt of the task `tag`."""
    groups = {}
    for thing in sorted(objects, key=lambda thing: -np.float32(thing["score"])):
        if np.float32(thing["score"]) > (COUNTING_THRESHOLD if tag == "counting" else THRESHOLD):
            groups.setdefault(thing["class"], []).append(thing)
    return {name: group[:MOST_OBJECTS] for name, group in groups.items()}


def relative_position(a, b):
    """Return where box a is, seen from box b: a set of RELATIONS, empty if the boxes are too near to each other."""
    corners = np.array([a, b], np.float32).reshape(2, 2, 2)
    extents = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    centres = corners.mean(1)
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - MARGIN * extents, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    return {name for name, true in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if true}


def color_wanted(groups, prompt):
    """Return the objects whose "color" judge() looks at."""
    wanted = [(groups.get(want["class"], []), want["count"]) for want in prompt["include"] if "color" in want]
    return [thing for group, count in wanted if len(group) >= count for thing in group[:count]]


def judge(groups, prompt):
    """Return (whether the image is correct, why not) from groups_of(). One that failed is no target for another."""
    reasons, targets = [], []
    for want in prompt["include"]:
        objects = groups.get(want["class"], [])[:want["count"]]
        reason = missed(want, objects) or misplaced(want, objects, targets)
        reasons += [reason] if reason else []
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


def misplaced(want, objects, targets):
    """Return why one of these objects is not where it should be, seen from each of its targets, or None."""
    relation, target = want.get("position", ("", 0))
    if relation and targets[target] is None:
        return f"no target for {want['class']} to be {relation}"
    for a, b in itertools.product(objects, targets[target]) if relation else ():
        seen = relative_position(a["box"], b["box"])
        if relation not in seen:
            return f"expected {want['class']} {relation} target, found {' and '.join(sorted(seen)) or 'no relation'}"
    return None


def summary(results):
    """Return the scores, 0 to 1. mean_of_tasks, GenEval's own overall score, is None if a task is absent."""
    right = {tag: [r["correct"] for r in results if r["tag"] == tag] for tag in TASKS}
    tasks = {tag: {"images": len(c), "correct": sum(c), "score": sum(c) / len(c)} for tag, c in right.items() if c}
    mean = sum(task["score"] for task in tasks.values()) / len(TASKS)
    return {"prompts": len({r["metadata"] for r in results}), "images": len(results), "tasks": tasks,
            "mean_of_tasks": mean if len(tasks) == len(TASKS) else None,
            "mean_of_images": sum(r["correct"] for r in results) / len(results)}
