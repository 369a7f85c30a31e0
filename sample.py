"""
Checkpoint + text -> pictures.

    python sample.py --prompt "a small red circle on a white background" "a large blue ring on a black background"
    python sample.py --prompts_file prompts.txt --checkpoint runs/tiny --steps 20 --sampler dpmpp_2m
    torchrun --nproc_per_node=8 sample.py --prompts_file evaluation_metadata.jsonl --out samples/geneval  # GenEval's
    pictures = sample.generate(sample.load("runs/tiny"), ["a small red circle ..."])                # from Python
"""
from common.machine import exit_with_launcher, keep_compiled
from configurator import configure

# What stands in parentheses is checked.
prompt = ()            # one or more texts
prompts_file = ""      # more prompts: .txt, one a line; a table (.tsv, .csv, .json, .jsonl) with a column of prompts
                       # or captions; or GenEval's .jsonl, whose folders are then written
negative_prompt = ()   # what the pictures should not show: one text for all prompts, or one for each
checkpoint = ""        # checkpoint file or run folder; empty: the newest run
images_per_prompt = 0  # number of pictures of each prompt; 0: 1, or GenEval's 4 (>= 0)
out = "samples"        # folder of the pictures; nothing there is replaced
steps = 30             # number of sampler steps (>= 1)
guidance_scale = -1.0  # how strongly the prompt is followed; 1: no guidance, which halves the work; -1: that of the run
sampler = "heun"       # evaluations of the network: 2 * steps - 1 with heun, steps with dpmpp_2m (heun | dpmpp_2m)
sigma_max = 80.0       # noise level at which sampling starts (> 0.002)
seed = 2024            # picture i starts from noise that depends on seed + i alone (>= 0, < 9e18)
batch_size = 16        # number of pictures that are drawn together (>= 1)
vae = ""               # autoencoder; empty: the one that the checkpoint was trained with
text_encoder = ""      # text encoder; empty: the one that the checkpoint was trained with
device = "auto"        # cuda, mps or cpu; auto: the best there is
dtype = "auto"         # type of matrix products; auto: bfloat16 on cuda, but float16 on older cards
                       # (auto | bfloat16 | float16 | float32)
offload = "auto"       # keep on the GPU only the part that is at work; auto: if it has less than 16 GB
                       # (auto | yes | no)
compile = False        # compile the network: it takes minutes at the start, and pictures on a GPU are faster

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()
    if compile:
        keep_compiled()

import json
import math
import re
from pathlib import Path
from shlex import quote

from common.files import read_bytes
from common.folders import claim, lock
from common.images import MOST, picture_grid, save_picture
from common.processes import join, run_script, world_size
from encoders import warn_of_cut
from evaluation import geneval
from evaluation.prompts import read_prompts
from sampling import generated
from sampling.pipeline import check_prompts, draw, generate, load  # noqa: F401 (generate is for others)


def load_pipeline():
    """Return the pipeline of the settings, and how it draws."""
    pipeline = load(checkpoint, device, vae=vae, text_encoder=text_encoder, dtype=dtype, offload=offload,
                    compile=compile)
    guidance = guidance_scale if guidance_scale >= 0 else pipeline.guidance_scale
    return pipeline, {"steps": steps, "guidance_scale": guidance, "sampler": sampler, "sigma_max": sigma_max}


def draw_geneval():
    """Write GenEval's folders with all processes of torchrun. Started again, it goes on."""
    if prompt or negative_prompt:
        raise ValueError("GenEval's prompts file goes with no --prompt and no --negative_prompt")
    processes, prompts = join(), geneval.read_prompts(prompts_file)
    pipeline, how = load_pipeline()
    jobs = [(name, prompts[i]["prompt"], seed + n)
            for n, (name, i, _) in enumerate(geneval.folders(prompts, images_per_prompt or 4))]
    description = generated.describe(pipeline, jobs, batch_size=batch_size, seed=seed, **how)
    processes.from_first(lambda: claim(out, "generated.json", r"\d{5,}", description))
    processes.from_first(lambda: geneval.write_layout(out, prompts))
    generated.fill(pipeline, out, jobs, batch_size, processes, **how)
    processes.leave()
    if processes.rank == 0:
        print(f"{len(jobs):,} pictures are in {out}/. Score: python eval_geneval.py --images {quote(out)}")


def draw_all(texts, negative):
    """Draw a picture of every text, write each batch as soon as it is done, and then grids."""
    lock(out)
    pipeline, how = load_pipeline()
    taken = [int(m.group()) for p in Path(out).iterdir() if (m := re.match(r"[0-9]+", p.name))]
    number, images = max(taken, default=-1) + 1, []
    warn_of_cut(pipeline.text_encoder.longer([*texts, *negative]), pipeline.text_encoder)
    print(f"drawing with {pipeline.name}, guidance {how['guidance_scale']:g}, on {pipeline.device}", flush=True)
    batches = draw(pipeline, texts, seed=seed, negative_prompts=negative, batch_size=batch_size, progress=True, **how)
    for batch in batches:
        for i, image in enumerate(batch, len(images)):
            used = how | {"negative_prompt": negative[i] if negative else "", "checkpoint": pipeline.name}
            save_picture(Path(out) / f"{number + i:05d}_{slug(texts[i])}_seed{seed + i}.png", image, prompt=texts[i],
                         seed=str(seed + i), settings=json.dumps(used))
        images += batch
    columns = math.ceil(min(len(images), MOST) ** 0.5)
    for n, start in enumerate(range(0, len(images), MOST), number + len(images)):
        grid = picture_grid(images[start:start + MOST], columns, texts[start:start + MOST])
        save_picture(Path(out) / f"{n:05d}_grid.png", grid)
    print(f"{len(images)} picture{'s are' if len(images) > 1 else ' is'} in {out}/, together in *_grid.png")


def slug(text):
    """Return a text as a part of a file's name, which may have 255 bytes."""
    return re.sub(r"\W+", "-", text.lower())[:60].strip("-").encode()[:120].decode(errors="ignore")


def main():
    for name, words in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if len(words) > 1 and not any(" " in word for word in words):
            raise ValueError(f'did you mean --{name} "{" ".join(words)}"? Texts of one word are for a --prompts_file')
    if prompts_file.endswith(".jsonl") and b'"include"' in read_bytes(prompts_file).lstrip().partition(b"\n")[0]:
        return draw_geneval()
    if world_size() > 1:
        raise ValueError("torchrun is for GenEval's prompts file alone: start sample.py with python")
    texts = [*prompt, *(line.caption for line in (read_prompts(prompts_file) if prompts_file else ()))]
    if not texts:
        raise ValueError("no prompt: give --prompt \"...\" or --prompts_file")
    texts, negative, _ = check_prompts(texts, negative_prompt, seed)
    draw_all(*([t for t in group for _ in range(images_per_prompt or 1)] for group in (texts, negative)))


if __name__ == "__main__":
    run_script("sample.py", main, f"The pictures that were done are in {out}/")
