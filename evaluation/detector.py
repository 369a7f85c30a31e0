"""The objects in a picture and their colours, for GenEval: Mask2Former and CLIP, without mmdetection."""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.files import reading
from encoders.hub import load_pretrained
from evaluation.geneval import CLASSES, COLORS

TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


def load_detector(name, device):
    """Return Mask2Former with COCO's 80 classes, by hub id or folder."""
    from transformers import Mask2FormerForUniversalSegmentation
    with reading(name, ": give the hub id or folder of a Mask2Former"):
        model = load_pretrained(Mask2FormerForUniversalSegmentation, name, r"criterion\..*", dtype=torch.float32)
    labels = model.config.id2label
    if len(labels) != 80 or labels[0] != "person" or labels[79] != "toothbrush":
        raise ValueError(f"detector {name}: it must have COCO's 80 classes, from person to toothbrush")
    return model.to(device)


def to_input(image, device):
    """Return an RGB picture as mmdetection's test pipeline makes it, (1,3,H,W), and (height, width) without padding."""
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
    the mask, which is enlarged before the threshold.
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


@functools.cache
def color_classifier(tower, name):
    """Return (10,D), the direction of each color in CLIP's space for objects of class `name`."""
    texts = [template.format(color, name) for color in COLORS for template in TEMPLATES]
    directions = F.normalize(tower.text(texts), dim=-1).view(len(COLORS), len(TEMPLATES), -1)
    return F.normalize(directions.mean(1), dim=-1)


def name_colors(tower, image, things, masks):
    """Set "color" of the objects, each cut out with what is around its mask in grey."""
    grey = Image.new("RGB", image.size, "#999")
    for thing, mask in zip(things, masks):
        cut = centre(Image.composite(image, grey, Image.fromarray(mask)).crop(thing["box"]), tower.side)
        direction = F.normalize(tower.image([tower.prepare(cut)]), dim=-1)[0]
        thing["color"] = COLORS[int((color_classifier(tower, thing["class"]) @ direction).argmax())]


def centre(image, side):
    """Cut out the centre as torchvision does, which rounds its place to an even number; transformers rounds down."""
    short = min(image.size)
    image = image.resize([int(side * n / short) for n in image.size], Image.Resampling.BICUBIC)
    left, top = (round((n - side) / 2) for n in image.size)
    return image.crop((left, top, left + side, top + side))
