"""
How well a network trained on the built-in drawn set draws what its prompts say, by shapes.read: no download.

    python eval_shapes.py                                   # the newest run, sample.py's default settings
    python eval_shapes.py --checkpoint runs/small --count 256 --guidance_scale 3

One picture per prompt, the first draw, scored as it is: `count` prompts of the kind that the network was trained on, of
seeds that no training set uses, then `count` prompts whose colour-shape pairs were all kept out of training.
Beside each score stand those of drawn pictures (what the reader can see) and of pictures of other prompts (chance).
"""
from configurator import configure

checkpoint = ""               # checkpoint file or run folder; empty: the newest run
count = 256                   # prompts of each kind
first_seed = 10_000_000       # prompt i is that of shapes.scene(first_seed + i)
steps = 30                    # as in sample.py, like all that follow
guidance_scale = -1.0         # how strongly the prompt is followed; -1: as the run does
sampler = "heun"              # heun or dpmpp_2m
sigma_max = 80.0              # noise level at which sampling starts
seed = 2024                   # of the start noise
batch_size = 64               # pictures drawn at once
out = ""                      # write the scores to this JSON file and the first 64 pictures of each kind beside it
device = "auto"               # cuda, mps or cpu; auto: the best there is

if __name__ == "__main__":
    settings = configure(globals())

import json
from pathlib import Path

from common.files import write_atomic
from common.images import picture_grid
from pictures import shapes
from sampling.pipeline import generate, load


def main():
    if count < 1:
        raise ValueError(f"count is {count}: it must be at least 1")
    model = load(checkpoint, device)
    size = model.size
    guidance = guidance_scale if guidance_scale >= 0 else model.guidance_scale
    report = {"checkpoint": model.name, "settings": settings | {"guidance_scale": guidance}, "scores": {}}
    for kind, held_out in (("pairs seen in training", False), ("unseen pairs", True)):
        scenes = [shapes.scene(first_seed + i, held_out, size) for i in range(count)]
        wanted = [attributes for _, _, attributes in scenes]
        images = generate(model, [caption for _, caption, _ in scenes], steps, guidance, seed, sampler,
                                 sigma_max=sigma_max, batch_size=batch_size, progress=True)
        drawn = [image for image, _, _ in scenes]
        rows = shapes.score(images, wanted), shapes.score(drawn, wanted), shapes.score(drawn[1:] + drawn[:1], wanted)
        report["scores"][kind] = dict(zip(("network", "drawn pictures", "chance"), rows))
        print(f"\n{model.name}, {count} prompts, guidance {guidance:g}, {kind}:")
        for name in rows[0]:
            percents = [f"{100 * right / of:5.1f} %" if of else "   none" for right, of in (row[name] for row in rows)]
            right, of = rows[0][name]
            print(f"  {name:12} {percents[0]}  ({right} of {of};  drawn {percents[1]}, chance {percents[2]})")
        if out:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            picture_grid(images[:64], 8, cell=64).save(Path(out).with_suffix(".unseen.png" if held_out else ".png"))
    if out:
        write_atomic(out, lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval_shapes.py: {error}") from None
