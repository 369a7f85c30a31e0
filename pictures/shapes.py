"""
The built-in captioned picture set: coloured shapes on coloured backgrounds, drawn, so nothing is downloaded; and a
reader that names what a picture shows, so that a network trained on the set can be scored without another network.

    image, caption, attributes = shapes.scene(seed)        # "a small red circle left of a large blue square on a ..."
    shapes.read(image) == attributes                        # True

Attributes are {"background": colour, "objects": [{"size", "color", "shape"}, ...], "relation": "left of", "above" or
None}. A picture shows two objects but not which one its caption named first. So the attributes always name the left or
upper object first, and "right of" and "below" exist in captions alone.
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
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Pairs never drawn unless asked for (12.5 %): can the network compose what it only saw apart?
HELD_OUT = (("red", "triangle"), ("orange", "bar"), ("yellow", "circle"), ("green", "cross"), ("blue", "ring"),
            ("purple", "square"))
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)
TWO_OBJECTS = 0.3  # share of the scenes
MARGIN, GAP = 0.03, 0.1  # objects keep this far from the border, and from each other
SUPERSAMPLE = 8     # antialiasing: points per pixel and axis


def scene(seed, held_out=False, size=32):
    """Return (PIL image of size x size, caption, attributes) of a seed; held_out: every object is a HELD_OUT pair."""
    # Random.random() is the one method whose sequence Python promises to keep across versions
    rng = random.Random(seed)
    objects = [draw_object(rng, held_out)]
    relation = None
    if rng.random() < TWO_OBJECTS:
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
    if relation in ("right of", "below"):  # the same picture, told from the other object
        objects, relation = objects[::-1], {"right of": "left of", "below": "above"}[relation]
    return image, caption, {"background": background, "objects": objects, "relation": relation}


def pick(rng, options):
    return options[int(rng.random() * len(options))]


def draw_object(rng, held_out):
    color, shape = pick(rng, HELD_OUT if held_out else PAIRS)
    return {"size": pick(rng, tuple(SIZES)), "color": color, "shape": shape}


def place(rng, radii, relation):
    """Return centres in [0, 1]^2, uniform over the places where the objects fit and a relation is plain."""
    while True:
        centers = [tuple(r + MARGIN + rng.random() * (1 - 2 * (r + MARGIN)) for _ in "xy") for r in radii]
        if relation is None:
            return centers
        dx, dy = (a - b for a, b in zip(*centers))
        along, across = (dx, dy) if RELATIONS[relation][0] else (dy, dx)
        along *= sum(RELATIONS[relation])
        if along >= sum(radii) + GAP and along >= abs(across) + GAP:
            return centers


def coverage(shape, radius, center, size):
    """Return how much of each pixel the shape covers, (size, size) in [0, 1]; radius and center are in pixels."""
    first, last = ([int(np.clip(c + side * radius + shift, 0, size)) for c in center]
                   for side, shift in ((-1, 0), (1, 1)))  # the pixels that the shape can touch
    axis = (np.arange(size * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    u, v = ((axis[a * SUPERSAMPLE:b * SUPERSAMPLE] - c) / radius for a, b, c in zip(first, last, center))
    hit = INSIDE[shape](u[None, :], v[:, None])
    alpha = np.zeros((size, size))
    alpha[first[1]:last[1], first[0]:last[0]] = hit.reshape(len(v) // SUPERSAMPLE, SUPERSAMPLE, -1,
                                                            SUPERSAMPLE).mean((1, 3))
    return alpha


def render(background, objects, centers, size):
    picture = np.broadcast_to(np.array(BACKGROUNDS[background], float), (size, size, 3))
    for o, (x, y) in zip(objects, centers):
        alpha = coverage(o["shape"], SIZES[o["size"]] * size, (x * size, y * size), size)[..., None]
        picture = picture * (1 - alpha) + alpha * np.array(COLORS[o["color"]], float)
    return Image.fromarray(picture.round().astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Reading a picture


def read(image):
    """Return the attributes of a picture, or None where it shows no object of the set on a background of the set.

    All objects that it shows are listed, however many. Where one has a colour but no clear outline, its size or shape
    is None; the relation is None unless there are two.
    """
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
        dx, dy = objects[1][1] - objects[0][1]
        relation = "left of" if abs(dx) > abs(dy) else "above"
        if (dx if relation == "left of" else dy) < 0:
            objects.reverse()
    return {"background": background, "objects": [o for o, _ in objects], "relation": relation}


def nearest(color, palette, limit=70):
    """Return the palette's nearest colour, or None if that is further than `limit` in RGB."""
    distance = {name: np.linalg.norm(color - np.array(rgb, float)) for name, rgb in palette.items()}
    name = min(distance, key=distance.get)
    return name if distance[name] <= limit else None


def large_regions(mask):
    """Return the connected regions that are no specks: the smallest object covers 0.04 of the picture."""
    return [region for region in connected(mask) if region.sum() >= 0.02 * mask.size]


def split_by_color(pixels, region):
    """Return [region], or its parts of one colour each: objects that touch are still two objects."""
    colors = np.array(list(COLORS.values()), float)
    distance = np.linalg.norm(pixels[:, :, None] - colors, axis=-1)                       # (H, W, colours)
    # near enough to a colour that no antialiased edge is taken for an object
    clear = [i for i in range(len(colors)) if large_regions(region & (distance[..., i] < 35))]
    if len(clear) < 2:
        return [region]
    owner = distance[..., clear].argmin(-1)
    return [part for i in range(len(clear)) for part in large_regions(region & (owner == i))]


def connected(mask):
    """Return the 4-connected regions of a boolean picture."""
    left, regions = set(zip(*np.nonzero(mask))), []
    while left:
        stack, region = [left.pop()], np.zeros_like(mask)
        while stack:
            y, x = stack.pop()
            region[y, x] = True
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        regions.append(region)
    return regions


def read_object(pixels, back, region):
    """Return ({"size", "color", "shape"}, centre) of a region: its inside's colour, the best fitting template."""
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
    # an error of 1 is that of an empty picture; of a network's rough outlines the size is the first to be legible
    return {"size": size if error <= 0.8 else None, "color": nearest(mean, COLORS),
            "shape": shape if clear else None}, center


@cache
def templates(shape, radius):
    """Return what a shape covers of a small window, (49, n, n), its centre moved in half pixels; the sums of squares
    (49,); and how far the centre was moved (49, 2)."""
    window = 2 * int(radius + 3)
    shifts = [np.array([x, y]) for x in np.arange(-1, 2.1, 0.5) for y in np.arange(-1, 2.1, 0.5)]
    covers = np.stack([coverage(shape, radius, window / 2 + shift, window) for shift in shifts])
    return covers, (covers * covers).sum((1, 2)), shifts


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


def score(images, wanted):
    """Count how often the pictures show the wanted attributes: {name: (right, of)}.

    background and relation per picture, size, color, shape and color+shape per object, all: the whole picture. A
    picture that cannot be read is all wrong; one that shows another number of objects has all its objects wrong. With
    two objects the better of both pairings counts, so that a wrong relation alone does not spoil the rest.
    """
    right, of = Counter(), Counter()
    for image, want in zip(images, wanted, strict=True):
        seen = read(image) or {"background": None, "objects": [], "relation": None}
        of.update(background=1, relation=int(want["relation"] is not None), all=1)
        of.update(dict.fromkeys(("color", "size", "shape", "color+shape"), len(want["objects"])))
        right.update(background=int(seen["background"] == want["background"]), all=int(seen == want),
                     relation=int(want["relation"] is not None and same_relation(seen, want)))
        right.update(best_matches(seen["objects"], want["objects"]))
    names = ("background", "color", "size", "shape", "color+shape", "relation", "all")
    return {name: (right[name], of[name]) for name in names}


def best_matches(seen, want):
    """Count the right attributes, in the pairing of objects that has most of them."""
    counts = [Counter()]
    for order in (seen, seen[::-1]) if len(seen) == len(want) else ():
        right = [[name for name in ("color", "size", "shape") if a[name] == b[name]] for a, b in zip(order, want)]
        counts.append(Counter(name for names in right for name in names))
        counts[-1]["color+shape"] = sum({"color", "shape"} <= {*names} for names in right)
    return max(counts, key=Counter.total)


def same_relation(seen, want):
    """Return whether the axis is right, and the order of the colours along it."""
    return (seen["relation"] == want["relation"]
            and [o["color"] for o in seen["objects"]] == [o["color"] for o in want["objects"]])
