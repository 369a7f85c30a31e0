"""The drawn picture set and its reader."""
import numpy as np
import pytest
from PIL import Image, ImageFilter

from pictures import shapes


def scenes(n, first=500_000, **kw):
    return [shapes.scene(first + i, **kw) for i in range(n)]


def attributes_of(*objects, relation=None):
    """The attributes of a white picture of "size color shape" objects"""
    objects = [dict(zip(("size", "color", "shape"), o.split())) for o in objects]
    return {"background": "white", "objects": objects, "relation": relation}


def right_and_wrong(image, wanted):
    """The names of the scores that a picture gets in full, and of those that it does not get at all"""
    scores = shapes.score([image], [wanted])
    return {n for n, (right, of) in scores.items() if right}, {n for n, (right, of) in scores.items() if right < of}


@pytest.mark.parametrize("size, count", [(32, 120), (64, 40)])
def test_the_reader_is_right_on_drawn_pictures(size, count):
    drawn = scenes(count, size=size) + scenes(count // 3, size=size, held_out=True)
    right = sum(shapes.read(image) == attributes for image, _, attributes in drawn)
    assert right >= 0.99 * len(drawn)


@pytest.mark.parametrize("size", [32, 64])
def test_smeared_outlines_are_no_shapes(size):
    """A blur of a sixth of the small objects' extent leaves places and colours, and blurs what tells shapes apart"""
    blur = ImageFilter.GaussianBlur(0.05 * size)
    right = shapes.score([image.filter(blur) for image, _, _ in scenes(60, size=size)],
                         [attributes for _, _, attributes in scenes(60, size=size)])
    assert right["size"][0] > 0.7 * right["size"][1] and right["shape"][0] < 0.6 * right["shape"][1]


def test_scenes_are_deterministic_and_seeds_differ():
    a, b, c = shapes.scene(7), shapes.scene(7), shapes.scene(8)
    assert a[0].tobytes() == b[0].tobytes() and a[1:] == b[1:] and a[0].tobytes() != c[0].tobytes()
    # the set must not change under the feet of published numbers
    assert a[1] == "a small yellow cross on a white background"


def test_what_the_set_contains():
    drawn = scenes(1500, size=4)
    objects = [o for _, _, attributes in drawn for o in attributes["objects"]]
    opposite = {"left of": "right of", "above": "below", None: None}
    for _, caption, attributes in drawn:
        background, relation = attributes["background"], attributes["relation"]
        names = [f"a {' '.join(o.values())}" for o in attributes["objects"]]
        texts = f" {relation} ".join(names), f" {opposite[relation]} ".join(names[::-1])
        assert caption in [f"{text} on a {background} background" for text in texts]
        assert all(o["color"] != background for o in attributes["objects"])
    assert {o["color"] for o in objects} == set(shapes.COLORS) and {o["size"] for o in objects} == set(shapes.SIZES)
    assert {attributes["background"] for _, _, attributes in drawn} == set(shapes.BACKGROUNDS)
    assert all(any(f" {relation} " in caption for _, caption, _ in drawn) for relation in shapes.RELATIONS)
    assert {(o["color"], o["shape"]) for o in objects} == set(shapes.PAIRS) and not {*shapes.PAIRS} & {*shapes.HELD_OUT}
    assert len(shapes.PAIRS) + len(shapes.HELD_OUT) == len(shapes.COLORS) * len(shapes.SHAPES) == 8 * 6
    held = {(o["color"], o["shape"]) for _, _, a in scenes(200, size=4, held_out=True) for o in a["objects"]}
    assert held == set(shapes.HELD_OUT)


def test_noise_and_the_mean_picture_score_nothing():
    images, _, wanted = zip(*scenes(40))
    noise = [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)]
    mean = Image.fromarray(np.mean([np.asarray(i, float) for i in images], 0).round().astype(np.uint8))
    chance = shapes.score(images[1:] + images[:1], wanted)
    for unlike in (noise, [mean] * 40):
        for name, (right, of) in shapes.score(unlike, wanted).items():
            assert right <= chance[name][0] and of == chance[name][1]


def test_unreadable_pictures_are_none_and_count_as_wrong():
    image, _, attributes = shapes.scene(1)
    checkers = np.kron((np.indices((8, 8)).sum(0) % 2)[..., None], np.ones((4, 4, 1))) * 255 + np.zeros(3)
    for unreadable in (Image.new("RGB", (32, 32), "white"), Image.fromarray(checkers.astype(np.uint8))):
        assert shapes.read(unreadable) is None and not right_and_wrong(unreadable, attributes)[0]
    assert not right_and_wrong(image, attributes)[1]


def test_too_many_objects_are_all_wrong_and_a_color_is_read_without_an_outline():
    pixels = np.full((2, 32, 32, 3), 255, np.uint8)
    pixels[0, 2:10, 2:10] = pixels[0, 2:10, 20:28] = pixels[0, 20:28, 2:10] = shapes.COLORS["red"]
    pixels[1, 8:24] = shapes.COLORS["red"]
    three, band = map(Image.fromarray, pixels)
    assert len(shapes.read(three)["objects"]) == 3
    assert right_and_wrong(three, attributes_of("small red square"))[0] == {"background"}
    assert shapes.read(band)["objects"] == [{"size": None, "color": "red", "shape": None}]
    assert right_and_wrong(band, attributes_of("large red square"))[0] == {"background", "color"}


def test_objects_that_touch_are_two_objects():
    pair = attributes_of("small red square", "large blue circle")["objects"]
    image = shapes.render("white", pair, [(0.2, 0.5), (0.2 + 0.9 * 0.15 + 0.25, 0.5)], 32)
    seen = shapes.read(image)
    assert [o["color"] for o in seen["objects"]] == ["red", "blue"] and seen["relation"] == "left of"


def test_score_counts_each_attribute_alone():
    image = shapes.render("white", attributes_of("small red circle")["objects"], [(0.5, 0.5)], 32)
    for name, wanted in (("size", "large red circle"), ("color", "small blue circle"), ("shape", "small red square")):
        wrong = right_and_wrong(image, attributes_of(wanted))[1]
        assert wrong == {name, "all"} | ({"color+shape"} if name != "size" else set())
    wanted = attributes_of("small red circle", "large blue square", relation="left of")
    image = shapes.render("white", wanted["objects"], [(0.25, 0.5), (0.7, 0.5)], 32)
    assert shapes.read(image) == wanted
    assert right_and_wrong(image, wanted | {"objects": wanted["objects"][::-1]})[1] == {"relation", "all"}
