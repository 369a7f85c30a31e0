"""
The objects in a picture and their colours, for GenEval: Mask2Former and CLIP of transformers, without mmdetection.
"""
import importlib.util

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation.clip import load_model
from evaluation.geneval import CLASSES, COLORS

TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


def load_detector(name, device):
    """Return Mask2Former with COCO's 80 classes, by hub id or folder."""
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
    """Return an RGB picture as mmdetection's test pipeline makes it, (1,3,H,W), and the (height, width) of its content.

    It lies within 1333 x 800, bilinear without antialiasing, grey below and on the right up to multiples of 32.
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
    """Return (objects, best first, their masks (N,*size)) of class logits (Q,81) and mask logits (Q,h,w).

    As in mmdetection: the 100 likeliest pairs of query and class, scored by class probability x mean probability within
    the mask, which is enlarged before the threshold (transformers' own post-processing does it afterwards).
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
    boxes = [Image.fromarray(mask).getbbox() for mask in masks.cpu().numpy()]  # x1, y1, x2, y2, the last two exclusive
    objects = [{"class": CLASSES[label], "score": score, "box": list(boxes[query])} for label, score, query in
               zip(labels[order].tolist(), scores[order].tolist(), queries[order].tolist())]
    return objects, masks[queries[order]].cpu().numpy()


@torch.no_grad()
def detect(model, image):
    """Return to_objects() of an RGB picture. One at a time, as batches change the last bits."""
    pixels, resized = to_input(image, model.device)
    out = model(pixel_values=pixels)
    return to_objects(out.class_queries_logits[0].float(), out.masks_queries_logits[0].float(), pixels.shape[2:],
                      resized, image.size[::-1])


def color_classifier(tower, name):
    """Return (10,D), the direction of each color in CLIP's space for objects of class `name`."""
    texts = [template.format(color, name) for color in COLORS for template in TEMPLATES]
    directions = F.normalize(tower.text(texts), dim=-1).view(len(COLORS), len(TEMPLATES), -1)
    return F.normalize(directions.mean(1), dim=-1)


def name_colors(tower, classifiers, image, things, masks):
    """Set "color" of the objects, each cut out with what is around its mask in grey. `classifiers` keeps those made."""
    grey = Image.new("RGB", image.size, "#999")
    for thing, mask in zip(things, masks):
        if thing["class"] not in classifiers:
            classifiers[thing["class"]] = color_classifier(tower, thing["class"])
        cut = Image.composite(image, grey, Image.fromarray(mask)).crop(thing["box"])
        closeness = classifiers[thing["class"]] @ F.normalize(tower.image([centre(cut, tower.side)]), dim=-1)[0]
        thing["color"] = COLORS[int(closeness.argmax())]


def centre(image, side):
    """Resize the shorter side and cut out the centre as torchvision does for the official script: transformers rounds
    the cut's place down, torchvision to an even number."""
    short = min(image.size)
    image = image.resize([int(side * n / short) for n in image.size], Image.Resampling.BICUBIC)
    left, top = (round((n - side) / 2) for n in image.size)
    return image.crop((left, top, left + side, top + side))
