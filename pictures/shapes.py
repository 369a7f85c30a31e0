"""
The built-in set: coloured shapes with captions, and a reader of such pictures, by which networks are scored.

    image, caption, attributes = shapes.scene(seed)
    shapes.read(image) == attributes

Attributes are {"background": colour, "objects": [{"size", "color", "shape"}, ...], "relation": "left of", "above" or
None}. They name the left or upper object first, so "right of" and "below" exist in captions alone.
"""
import random
from collections import Counter
from functools import cache

import numpy as np
from PIL import Image

COLORS = {"red": (225, 30, 35), "orange": (255, 140, 0), "yellow": (250, 225, 40), "green": (30, 150, 60),
          "cyan": (60, 205, 225), "blue": (35, 75, 215), "purple": (130, 40, 165), "pink": (255, 130, 190)}
BACKGROUNDS = {"white": (255, 255, 255), "black": (10, 10, 10), "gray": (128, 128, 128), "brown": (105, 65, 35),
               "blue": COLORS["blue"], "green": COLORS["green"]}
SIZES = {"small": 0.15, "large": 0.25}  # half the extent, as a fraction of the picture's side
# whether a point is inside the shape, for coordinates in which it spans [-1, 1] (v points down)
INSIDE = {"circle": lambda u, v: u * u + v * v <= 1,
          "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.9,
          "triangle": lambda u, v: (v <= 0.9) & (abs(u) <= (v + 1) / 1.9),
          "bar": lambda u, v: (abs(u) <= 1) & (abs(v) <= 0.45),
          "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1),
          "ring": lambda u, v: (u * u + v * v <= 1) & (u * u + v * v >= 0.3)}
SHAPES = tuple(INSIDE)
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign of the distance
# Pairs that no scene has unless asked for: can the network compose what it only saw apart?
HELD_OUT = (("red", "triangle"), ("orange", "bar"), ("yellow", "circle"), ("green", "cross"), ("blue", "ring"),
            ("purple", "square"))
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)
TWO_OBJECTS, TRAINING_TWO_OBJECTS = 0.3, 0.6  # share of the scenes; training has more, to learn relations in time
MARGIN, GAP = 0.03, 0.1  # objects keep this far from the border, and from each other
SUPERSAMPLE = 8  # antialiasing: points per pixel and axis


def scene(seed, held_out=False, size=32, two_objects=TWO_OBJECTS):
    """Return (PIL image, caption, attributes) of a seed; held_out: every object is a HELD_OUT pair."""
    rng = random.Random(seed)  # random() is the one method whose sequence Python promises to keep across versions
    objects, relation = [draw_object(rng, held_out)], None
    if rng.random() < two_objects:
        relation = pick(rng, tuple(RELATIONS))
        first, second = objects[0], objects[0]
        while first["color"] == second["color"] or first["size"] == second["size"] == "large":  # no room for those
            second = draw_object(rng, held_out)
        objects.append(second)
    background = pick(rng, [b for b in BACKGROUNDS if b not in {o["color"] for o in objects}])
    centers = place(rng, [SIZES[o["size"]] for o in objects], relation)

    names = [f"a {o['size']} {o['color']} {o['shape']}" for o in objects]
    caption = f" {relation} ".join(names) + f" on a {background} background"
    image = render(background, objects, centers, size)
    if relation in ("right of", "below"):  # of the same picture the attributes name the other object first
        objects, relation = objects[::-1], {"right of": "left of", "below": "above"}[relation]
    return image, caption, {"background": background, "objects": objects, "relation": relation}


def pick(rng, options):
    return options[int(rng.random() * len(options))]


def draw_object(rng, held_out):
    color, shape = pick(rng, HELD_OUT if held_out else PAIRS)
    return {"size": pick(rng, tuple(SIZES)), "color": color, "shape": shape}


def place(rng, radii, relation):
    """Return centres in [0, 1]^2, uniform where the objects fit and their relation is plain."""
    while True:
        centers = [tuple(r + MARGIN + rng.random() * (1 - 2 * (r + MARGIN)) for _ in "xy") for r in radii]
        if relation is None:
            return centers
        axis, sign = RELATIONS[relation]
        distance = np.subtract(*centers)
        if sign * distance[axis] >= max(sum(radii), abs(distance[1 - axis])) + GAP:
            return centers


def coverage(shape, radius, center, size):
    """Return how much of each pixel (size, size) the shape covers; radius and center are in pixels."""
    # the pixels that the shape can touch
    columns, rows = (range(max(0, int(c - radius)), min(size, int(c + radius + 1))) for c in center)
    u, v = ((np.arange(touched.start, touched.stop, 1 / SUPERSAMPLE) + 0.5 / SUPERSAMPLE - c) / radius
            for touched, c in zip((columns, rows), center))
    hit = INSIDE[shape](u[None, :], v[:, None]).reshape(len(rows), SUPERSAMPLE, len(columns), SUPERSAMPLE)
    alpha = np.zeros((size, size))
    alpha[rows.start:rows.stop, columns.start:columns.stop] = hit.mean((1, 3))
    return alpha


def render(background, objects, centers, size):
    picture = np.broadcast_to(np.array(BACKGROUNDS[background], float), (size, size, 3))
    for o, (x, y) in zip(objects, centers):
        alpha = coverage(o["shape"], SIZES[o["size"]] * size, (x * size, y * size), size)[..., None]
        picture = picture * (1 - alpha) + alpha * np.array(COLORS[o["color"]], float)
    return Image.fromarray(picture.round().astype(np.uint8))


def read(image):
    """Return the attributes of a picture, of which size and shape may be None; None if it shows nothing of the set."""
    pixels = np.asarray(image.convert("RGB"), float)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = nearest(np.median(border, 0), BACKGROUNDS)
    if background is None:
        return None
    back = np.array(BACKGROUNDS[background], float)
    if np.mean(np.linalg.norm(border - back, axis=-1) < 70) < 0.5:  # noise has a median too
        return None
    foreground = np.linalg.norm(pixels - back, axis=-1) > 60
    regions = [part for region in large_regions(foreground) for part in split_by_color(pixels, region)]
    objects, relation = [read_object(pixels, back, region) for region in regions], None
    if not objects or not all(o["color"] for o, _ in objects):
        return None
    if len(objects) == 2:
        distance = objects[1][1] - objects[0][1]
        axis = int(abs(distance[0]) <= abs(distance[1]))
        relation = ("left of", "above")[axis]
        if distance[axis] < 0:
            objects.reverse()
    return {"background": background, "objects": [o for o, _ in objects], "relation": relation}


def nearest(color, palette):
    """Return the palette's nearest colour, or None if that is further than 70 in RGB."""
    distance = {name: np.linalg.norm(color - np.array(rgb, float)) for name, rgb in palette.items()}
    name = min(distance, key=distance.get)
    return name if distance[name] <= 70 else None


def large_regions(mask):
    """Return the connected regions that are no specks: the smallest object covers 0.04 of the picture."""
    # each point has a number, and the largest spreads
    labels, before = np.where(mask, 1 + np.arange(mask.size).reshape(mask.shape), 0), None
    while before is None or (labels != before).any():
        before, near = labels, np.pad(labels, 1)
        spread = [near[1:-1, 1:-1], near[:-2, 1:-1], near[2:, 1:-1], near[1:-1, :-2], near[1:-1, 2:]]
        labels = np.where(mask, np.max(spread, 0), 0)
    numbers, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == n for n in numbers[sizes >= 0.02 * mask.size]]


def split_by_color(pixels, region):
    """Return [region], or its parts of one colour each: objects that touch are still two objects."""
    colors = np.array(list(COLORS.values()), float)
    distance = np.linalg.norm(pixels[:, :, None] - colors, axis=-1)  # (H, W, colours)
    # near enough to a colour that no antialiased edge is taken for an object
    clear = [i for i in range(len(colors)) if large_regions(region & (distance[..., i] < 35))]
    if len(clear) < 2:
        return [region]
    owner = distance[..., clear].argmin(-1)
    return [part for i in range(len(clear)) for part in large_regions(region & (owner == i))]


def read_object(pixels, back, region):
    """Return ({"size", "color", "shape"}, centre) of a region: its inside's colour, the template that fits best."""
    side = len(pixels)
    distance = np.where(region, np.linalg.norm(pixels - back, axis=-1), 0)
    core = distance >= 0.8 * np.percentile(distance[region], 90)  # antialiased edges lie nearer to the background
    mean = np.median(pixels[core], 0)
    # the region and the pixels that touch it, which may be covered a little
    near = np.lib.stride_tricks.sliding_window_view(np.pad(region, 1), (3, 3)).any((2, 3))
    axis = mean - back
    alpha = np.where(near, np.clip((pixels - back) @ axis / (axis @ axis), 0, 1), 0)  # how much of a pixel is covered
    covered = alpha > 0.5
    if not covered.any():
        covered = region
    ys, xs = np.nonzero(covered)
    middle = np.array([xs.min() + xs.max() + 1, ys.min() + ys.max() + 1]) / 2
    errors = {}
    for name, radius in SIZES.items():
        for shape in SHAPES:
            covers, norms, offsets = templates(shape, radius * side)
            n = covers.shape[1]
            left, top = np.floor(middle).astype(int) + n - n // 2
            part = np.pad(alpha, n)[top:top + n, left:left + n]
            # the squared difference, |a - t|^2 = |a|^2 + |t|^2 - 2 a.t, relative to the template's own square
            error = ((alpha * alpha).sum() + norms - 2 * covers.reshape(len(norms), -1) @ part.ravel()) / norms
            errors[name, shape] = error.min(), np.floor(middle) + offsets[error.argmin()]
    (size, shape), (error, center) = min(errors.items(), key=lambda item: item[1][0])
    rival = min(other for (_, another), (other, _) in errors.items() if another != shape)
    clear = error <= 0.3 and error <= 0.8 * rival  # of a smeared outline many shapes are about equally right
    # an empty picture has an error of 1; in a network's rough pictures the size is the first attribute to be legible
    size, shape = size if error <= 0.8 else None, shape if clear else None
    return {"size": size, "color": nearest(mean, COLORS), "shape": shape}, center


@cache
def templates(shape, radius):
    """Return what a shape covers of a window (49,n,n), the sums of squares (49,), the centre's shifts (49,2)."""
    window = 2 * int(radius + 3)
    shifts = [np.array([x, y]) for x in np.arange(-1, 2.1, 0.5) for y in np.arange(-1, 2.1, 0.5)]
    covers = np.stack([coverage(shape, radius, window / 2 + shift, window) for shift in shifts])
    return covers, (covers * covers).sum((1, 2)), shifts


def score(images, wanted):
    """Count how often the pictures show the wanted attributes: {name: (right, of)}.

    background and relation count once per picture; size, color, shape and color+shape once per object; "all" counts
    pictures without an error. Where the number of objects is wrong, every object counts as wrong.
    """
    right, of = Counter(), Counter()
    for image, want in zip(images, wanted, strict=True):
        seen = read(image) or {"background": None, "objects": [], "relation": None}
        related = want["relation"] is not None
        of.update(["background", "all"] + ["relation"] * related)
        of.update(["color", "size", "shape", "color+shape"] * len(want["objects"]))
        right.update(["background"] * (seen["background"] == want["background"]) + ["all"] * (seen == want))
        # the axis, and the order of the colours along it
        along = [(a["relation"], [o["color"] for o in a["objects"]]) for a in (seen, want)]
        right.update(["relation"] * (related and along[0] == along[1]))
        right.update(best_matches(seen["objects"], want["objects"]))
    names = ("background", "color", "size", "shape", "color+shape", "relation", "all")
    return {name: (right[name], of[name]) for name in names}


def best_matches(seen, want):
    """Return the names of the right attributes, in the pairing of objects that has most of them."""
    if len(seen) != len(want):
        return []
    pairings = []
    for order in (seen, seen[::-1]):
        right = [[name for name in ("color", "size", "shape") if a[name] == b[name]] for a, b in zip(order, want)]
        pairings.append(sum(right, []) + ["color+shape"] * sum({"color", "shape"} <= {*names} for names in right))
    return max(pairings, key=len)
