"""The built-in set of pictures and its reader."""
import hashlib

import numpy as np
import pytest
from PIL import Image, ImageFilter

from evaluation.prompts import read_prompts
from pictures import shapes
from pictures.sources import shapes_parts


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


@pytest.mark.parametrize("size, count", [(32, 75), (64, 24)])
def test_the_reader_is_right_and_takes_no_smeared_outlines_for_shapes(size, count):
    """A blur of a sixth of the small objects' extent leaves places and colours, and blurs what tells shapes apart"""
    images, _, wanted = zip(*scenes(count, size=size), *scenes(count // 3, size=size, held_out=True))
    right, of = shapes.score(images, wanted)["all"]
    assert right >= 0.99 * of == 0.99 * len(images)
    blurred = shapes.score([image.filter(ImageFilter.GaussianBlur(0.05 * size)) for image in images], wanted)
    assert blurred["size"][0] > 0.7 * blurred["size"][1] and blurred["shape"][0] < 0.6 * blurred["shape"][1]


def test_scenes_are_deterministic():
    a, b = shapes.scene(7), shapes.scene(7)
    assert a[0].tobytes() == b[0].tobytes() and a[1:] == b[1:]
    # the set must not change under the feet of published numbers
    assert a[1] == "a small yellow cross on a white background"
    for source, start in (("shapes", "b56d24b0"), ("shapes_unseen", "dd56ca93")):
        captions = "\n".join(prompt.caption for prompt in read_prompts(source))
        assert hashlib.sha256(captions.encode()).hexdigest().startswith(start)


def test_what_the_set_contains():
    made, opposite = scenes(1500, size=4), {"left of": "right of", "above": "below", None: None}
    objects = [o for _, _, attributes in made for o in attributes["objects"]]
    for _, caption, attributes in made:
        background, relation = attributes["background"], attributes["relation"]
        names = [f"a {' '.join(o.values())}" for o in attributes["objects"]]
        texts = f" {relation} ".join(names), f" {opposite[relation]} ".join(names[::-1])
        assert caption in [f"{text} on a {background} background" for text in texts]
        assert all(o["color"] != background for o in attributes["objects"])
    assert {attributes["background"] for _, _, attributes in made} == set(shapes.BACKGROUNDS)
    assert all(any(f" {relation} " in caption for _, caption, _ in made) for relation in shapes.RELATIONS)
    held = [o for _, _, a in scenes(200, size=4, held_out=True) for o in a["objects"]]
    for some, pairs in ((objects, shapes.PAIRS), (held, shapes.HELD_OUT)):
        assert {(o["color"], o["shape"]) for o in some} == set(pairs) and {o["size"] for o in some} == {*shapes.SIZES}
    assert len({*shapes.PAIRS, *shapes.HELD_OUT}) == len(shapes.PAIRS) + len(shapes.HELD_OUT) == 48


def test_training_has_twice_as_many_relations_as_the_prompts():
    def share(captions):
        return np.mean([any(f" {relation} " in caption for relation in shapes.RELATIONS) for caption in captions])
    (part,) = shapes_parts(1500, 4, 1500)
    assert share([caption for _, _, caption in part.entries()]) == pytest.approx(0.6, abs=0.03)
    assert share([caption for _, caption, _ in scenes(1500, first=0, size=4)]) == pytest.approx(0.3, abs=0.03)


def test_noise_and_the_mean_picture_score_nothing():
    images, _, wanted = zip(*scenes(40))
    noise = [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)]
    mean = Image.fromarray(np.mean([np.asarray(i, float) for i in images], 0).round().astype(np.uint8))
    chance = shapes.score(images[1:] + images[:1], wanted)
    for unlike in (noise, [mean] * 40):
        for name, (right, of) in shapes.score(unlike, wanted).items():
            assert right <= chance[name][0] and of == chance[name][1]


def test_unreadable_pictures_are_none_and_count_as_wrong():
    checkers = np.kron((np.indices((8, 8)).sum(0) % 2)[..., None], np.ones((4, 4, 1))) * 255 + np.zeros(3)
    for unreadable in (Image.new("RGB", (32, 32), "white"), Image.fromarray(checkers.astype(np.uint8))):
        assert shapes.read(unreadable) is None and not right_and_wrong(unreadable, shapes.scene(1)[2])[0]


def test_score_counts_each_attribute_alone_of_objects_that_may_touch():
    image = shapes.render("white", attributes_of("small red circle")["objects"], [(0.5, 0.5)], 32)
    for name, wanted in (("size", "large red circle"), ("color", "small blue circle"), ("shape", "small red square")):
        wrong = right_and_wrong(image, attributes_of(wanted))[1]
        assert wrong == {name, "all"} | ({"color+shape"} if name != "size" else set())
    wanted = attributes_of("small red square", "large blue circle", relation="left of")
    for second in (0.585, 0.7):  # where they touch, and where they do not
        image = shapes.render("white", wanted["objects"], [(0.2, 0.5), (second, 0.5)], 32)
        seen = shapes.read(image)
        assert [o["color"] for o in seen["objects"]] == ["red", "blue"] and seen["relation"] == "left of"
    assert seen == wanted
    assert right_and_wrong(image, wanted | {"objects": wanted["objects"][::-1]})[1] == {"relation", "all"}
