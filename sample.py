"""
Checkpoint + text -> pictures.

    python sample.py --prompt "a small red circle on a white background" "a large blue ring on a black background"
    python sample.py --prompts_file prompts.txt --checkpoint runs/tiny --steps 20 --sampler dpmpp_2m
    python sample.py --prompt "..." --checkpoint runs/a runs/b          # one row of the grid for each
    torchrun --nproc_per_node=8 sample.py --prompts_file evaluation_metadata.jsonl --out geneval    # GenEval's folders

From Python: model = sample.load("runs/tiny"); pictures = sample.generate(model, ["a small red circle ..."]).
"""
from common.machine import exit_with_launcher
from configurator import configure

prompt = ()                   # one or more texts
prompts_file = ""             # more of them, one a line; or GenEval's .jsonl, whose folder layout is then written
negative_prompt = ()          # what the pictures should not show: one text for all prompts, or one for each
checkpoint = ()               # checkpoint files or run folders; empty: the newest run
images_per_prompt = 0         # pictures of each prompt; 0: 1, or GenEval's 4 (>= 0)
out = "samples"               # folder of the pictures; nothing there is overwritten
steps = 30                    # sampler steps (>= 1)
guidance_scale = -1.0         # how strongly the prompt is followed; 1: half the work, no guidance; -1: as the run does
sampler = "heun"              # heun evaluates the network 2 steps - 1 times, dpmpp_2m steps times (heun | dpmpp_2m)
sigma_max = 80.0              # noise level at which sampling starts (> 0.002)
seed = 2024                   # picture i starts from noise that depends on seed + i alone (>= 0)
batch_size = 16               # pictures drawn at once (>= 1)
progress_strip = False        # also write how the first picture comes out of the noise, as a strip
ema = True                    # use the averaged weights, where the run has them
vae = ""                      # autoencoder; empty: the one that the checkpoint was trained with
scaling_factor = 0.0          # of a --vae whose files do not name it (a single .safetensors file); 0: they do (>= 0)
text_encoder = ""             # text encoder; empty: likewise
device = "auto"               # cuda, mps or cpu; auto: the best there is
dtype = "auto"                # of all networks; auto: bfloat16 on cuda (auto | bfloat16 | float32)
offload = "auto"              # keep on the GPU only what is at work; auto: on GPUs below 16 GB (auto | yes | no)
compile = False               # torch.compile: minutes at the start, faster pictures on a GPU

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import json
import math
import os
import re
import sys
from pathlib import Path

from common.images import MOST, decode_images, picture_grid, save_picture
from encoders import words_of
from evaluation import drawn, geneval
from sampling.pipeline import check_prompts, draw, generate, load  # noqa: F401 (generate is for others)

STRIP = 8  # moments of the denoising that a strip shows


def all_prompts():
    """Return (prompts, negative prompts), one for each picture."""
    texts = list(prompt)
    if prompts_file:
        if not Path(prompts_file).is_file():
            raise ValueError(f"no prompts file {prompts_file}")
        texts += [line.strip() for line in Path(prompts_file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError("no prompt: give --prompt \"...\" or --prompts_file")
    if len(negative_prompt) not in (0, 1, len(texts)):
        raise ValueError(f"{len(negative_prompt)} negative prompts for {len(texts)} prompts: give one for all, or one "
                         "for each")
    negative = negative_prompt * len(texts) if len(negative_prompt) == 1 else negative_prompt
    return [[t for t in group for _ in range(images_per_prompt or 1)] for group in (texts, negative)]


def warn_unknown_words(pipeline, texts):
    """Name words that training never showed: the stand-in encoder has a vector for any word."""
    new = sorted({word for text in texts for word in words_of(text)} - set(pipeline.words))
    if pipeline.words and new:
        print(f"warning: {pipeline.name} was never shown the word{'s' * (len(new) > 1)} {', '.join(new)}. It knows: "
              f"{', '.join(pipeline.words[:100])}{', ...' * (len(pipeline.words) > 100)}", file=sys.stderr)


def load_pipeline(path):
    return load(path, device, ema=ema, vae=vae, text_encoder=text_encoder, dtype=dtype, offload=offload,
                compile=compile, scaling_factor=scaling_factor)


def guidance_of(pipeline):
    return guidance_scale if guidance_scale >= 0 else pipeline.guidance_scale


def draw_geneval():
    """Write GenEval's folder layout with all processes of torchrun. Started again, it goes on."""
    if prompt or len(negative_prompt) > 1 or len(checkpoint) > 1:
        raise ValueError("GenEval's prompts file goes with no --prompt, and with one --checkpoint and one "
                         "--negative_prompt at most")
    prompts, (rank, world) = geneval.read_prompts(prompts_file), drawn.processes()
    pipeline = load_pipeline(next(iter(checkpoint), ""))
    jobs = [(name, prompts[i]["prompt"], seed + n)
            for n, (name, i, _) in enumerate(geneval.folders(prompts, images_per_prompt or 4))]
    how = {"guidance_scale": guidance_of(pipeline), "steps": steps, "sampler": sampler, "sigma_max": sigma_max,
           "negative_prompts": next(iter(negative_prompt), None)}
    drawn.open_folder(out, drawn.describe(pipeline, jobs, batch_size=batch_size, seed=seed, **how))
    if rank == 0:
        geneval.write_layout(out, prompts)
    drawn.fill(pipeline, out, jobs, batch_size, **how)
    print(f"process {rank} of {world}: its share of {len(jobs):,} pictures is in {out}/. Score all with: python "
          f"eval_geneval.py --images {out}")


def draw_all(pipeline, texts, negative, number):
    """Draw and write a picture of every text, each batch as soon as it is done -> the pictures"""
    images, denoised = [], []
    guidance = guidance_of(pipeline)
    print(f"drawing {len(texts)} pictures of {pipeline.size} px with {pipeline.name}, guidance {guidance:g}, {steps} "
          f"steps of {sampler} on {pipeline.device}", flush=True)

    def keep(latents):
        if len(denoised) < steps:
            denoised.append(latents[:1].float().clone())
    batches = draw(pipeline, texts, steps, guidance, seed, sampler, negative_prompts=negative, sigma_max=sigma_max,
                   batch_size=batch_size, progress=True, on_step=keep if progress_strip else None)
    for batch in batches:
        for image in batch:
            i = len(images)
            used = {"prompt": texts[i], "negative_prompt": negative[i] if negative else "", "seed": seed + i,
                    "steps": steps, "guidance_scale": guidance, "sampler": sampler, "sigma_max": sigma_max,
                    "checkpoint": pipeline.name}
            write_picture(image, number + i, used)
            images.append(image)
    if progress_strip:
        moments = [round(k * (steps - 1) / (STRIP - 1)) for k in range(min(STRIP, steps))]
        strip = [decode_images(pipeline.vae, denoised[k])[0] for k in moments]
        path = Path(out) / f"{number:05d}_strip.png"
        picture_grid(strip, len(strip), [f"step {k + 1}" for k in moments]).save(path)
        print(f"how the first picture came out of the noise: {path}")
    return images


def write_picture(image, number, used):
    """Save a picture under a name that tells its prompt, with its settings inside."""
    slug = re.sub(r"\W+", "-", used["prompt"].lower())[:60].strip("-")
    slug = slug.encode()[:120].decode(errors="ignore")  # a file's name may have 255 bytes
    save_picture(Path(out) / f"{number:05d}_{slug}_seed{used['seed']}.png", image, prompt=used["prompt"],
                 seed=str(used["seed"]), settings=json.dumps(used))


def write_grids(images, texts, rows, number):
    """Save grids of at most 64 pictures, with their captions; with several checkpoints a row for each."""
    columns = len(texts) if rows > 1 else math.ceil(min(len(texts), MOST) ** 0.5)
    per_grid = max(1, MOST // columns) * columns
    for n, start in enumerate(range(0, len(images), per_grid)):
        captions = [texts[i % len(texts)] for i in range(start, min(start + per_grid, len(images)))]
        path = Path(out) / f"{number + n:05d}_grid.png"
        picture_grid(images[start:start + per_grid], columns, captions).save(path)
        print(f"{len(captions)} of them together: {path}")


def main():
    if prompts_file.endswith(".jsonl"):
        return draw_geneval()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun shares the pictures of GenEval's prompts file alone: start sample.py with python")
    texts, negative = all_prompts()
    check_prompts(texts, negative, seed)
    pipelines = [load_pipeline(path) for path in checkpoint or ("",)]
    for pipeline in pipelines:
        warn_unknown_words(pipeline, texts + negative)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(m.group()) for p in folder.glob("*.png") if (m := re.match(r"\d+", p.name))]
    number, images = max(taken, default=-1) + 1, []
    for pipeline in pipelines:
        images += draw_all(pipeline, texts, negative, number + len(images))
    print(f"{len(images)} pictures in {folder}/")
    write_grids(images, texts, len(pipelines), number + len(images))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"sample.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"sample.py: stopped. The pictures that were done are in {out}/") from None
