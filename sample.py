"""
Checkpoint + text -> pictures.

    python sample.py --prompt "a small red circle on a white background" "a large blue ring on a black background"
    python sample.py --prompts_file prompts.txt --checkpoint runs/tiny --steps 20 --sampler dpmpp_2m
    python sample.py --prompt "..." --checkpoint runs/a runs/b          # one row of the grid for each
    torchrun --nproc_per_node=8 sample.py --prompts_file evaluation_metadata.jsonl --out geneval    # GenEval's folders

From Python: model = sample.load("runs/tiny"); pictures = sample.generate(model, ["a small red circle ..."]).
"""
from configurator import configure
from machine import exit_with_launcher

prompt = ()                   # one or more texts
prompts_file = ""             # more of them, one a line; or GenEval's .jsonl, whose folder layout is then written
negative_prompt = ()          # what the pictures should not show: one text for all prompts, or one for each
checkpoint = ()               # checkpoint files or run folders; empty: the newest run
images_per_prompt = 0         # pictures of each prompt; 0: 1, or GenEval's 4
out = "samples"               # folder of the pictures; nothing there is overwritten
steps = 30                    # sampler steps
guidance_scale = -1.0         # how strongly the prompt is followed; 1: half the work, no guidance; -1: as the run does
sampler = "heun"              # heun (2 steps - 1 evaluations of the network) or dpmpp_2m (steps evaluations)
sigma_max = 80.0              # noise level at which sampling starts
seed = 2024                   # picture i starts from noise that depends on seed + i alone
batch_size = 16               # pictures drawn at once
ema = True                    # use the averaged weights, where the run has them
vae = ""                      # autoencoder; empty: the one that the checkpoint was trained with
scaling_factor = 0.0          # of a --vae whose files do not name it (a single .safetensors file); 0: they do
text_encoder = ""             # text encoder; empty: likewise
device = "auto"               # cuda, mps or cpu; auto: the best there is
dtype = "auto"                # of the network and the frozen ends: bfloat16 or float32; auto: bfloat16 on cuda
offload = "auto"              # keep on the GPU only what is at work: yes, no; auto: yes on GPUs below 16 GB
compile = False               # torch.compile: a minute at the start, faster pictures on a GPU

if __name__ == "__main__":
    settings = configure(globals())
    exit_with_launcher()

import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import checkpoint as checkpoints
from encoders import load_text_encoder, load_vae, words_of
from machine import pick_device
from model import sample as draw_latents

GROUP = 256  # pictures for which all captions are encoded, then all latents drawn, then all decoded


def load(path, device=None, ema=True, vae="", text_encoder="", dtype="auto", offload="auto", compile=False,
         scaling_factor=0.0):
    """The network of a checkpoint (file or run folder), with its frozen ends as .vae and .text_encoder.

    With offload, the three are on `device` only while generate() has them at work.
    """
    if dtype not in ("auto", "bfloat16", "float32") or offload not in ("auto", "yes", "no"):
        raise ValueError(f"dtype is '{dtype}', offload '{offload}': they must be auto, bfloat16 or float32, and auto, "
                         "yes or no")
    path = checkpoints.find(path)
    model, run = checkpoints.load_network(path, ema)
    data, device = run["data"], pick_device(device)
    dtype = getattr(torch, dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 16e9
    model.offload = offload == "yes" or offload == "auto" and small
    home = torch.device("cpu") if model.offload else device
    if vae in ("", data["vae"]["name"]):
        scaling_factor = scaling_factor or data["vae"]["scaling_factor"]
    # in __dict__, as a module's attribute that is a module would become a part of it
    model.__dict__["vae"] = load_vae(vae or data["vae"]["name"], home, dtype, scaling_factor or None)
    if "released" in run and getattr(model.vae, "shift", 0):
        print(f"note: the released networks were trained without the shift of {model.vae.shift} in the config of "
              f"{model.vae.name}: none is applied", file=sys.stderr)
        model.vae.shift = 0.0
    model.text_encoder = load_text_encoder(text_encoder or data["text_encoder"]["name"], home, dtype)
    for end, have, want in (("vae", model.vae.latent_channels, model.config.latent_channels),
                            ("text_encoder", model.text_encoder.dim, model.config.caption_dim)):
        if have != want:
            raise ValueError(f"the {end} gives {have} channels, the network of {path} was trained with {want}: leave "
                             f"--{end} out")
    model.name, model.words = f"{path.parent.name}/{path.stem}", data.get("words", [])
    model.guidance_scale = run["settings"].get("sample_guidance", 5.0)  # of the run's own sample pictures
    model.device = device
    model.to(home, dtype).eval().requires_grad_(False)
    if compile:
        model.compile()
    return model


@contextlib.contextmanager
def at_work(model, part):
    """`part` (the model, its .vae or its .text_encoder) on the model's device, from where it goes home afterwards"""
    module = getattr(part, "model", part)  # a text encoder holds the module; the stand-ins have none
    if model.offload and isinstance(module, torch.nn.Module):
        try:
            yield module.to(model.device)
        finally:
            module.to("cpu")
    else:
        yield


def generate(model, prompts, steps=30, guidance_scale=None, seed=2024, sampler="heun", negative_prompts=None,
             sigma_max=80.0, batch_size=16, progress=False):
    """One PIL image per prompt. Picture i starts from noise that depends on seed + i alone, whatever the batch size.

    guidance_scale None: that of the run's own sample pictures. seed may be a list, one for each picture.
    negative_prompts: one for each prompt, or one for all.
    """
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    prompts = list(prompts)
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed + i for i in range(len(prompts))]
    negative = [negative_prompts] if isinstance(negative_prompts, str) else list(negative_prompts or [])
    negative = negative * len(prompts) if len(negative) == 1 else negative
    for i, text in enumerate(prompts + negative):
        if not text.strip():
            kind = "prompt" if i < len(prompts) else "negative prompt"
            raise ValueError(f"{kind} {i % len(prompts) + 1} is empty: describe a picture")
    if len(negative) not in (0, len(prompts)) or len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(negative)} negative prompts, {len(seeds)} seeds: give one for "
                         "each prompt")
    c = model.config
    shape = (c.latent_channels, c.latent_size, c.latent_size)
    images = []
    with tqdm(total=len(prompts) * steps, unit=" picture steps", disable=not progress) as bar:
        for start in range(0, len(prompts), GROUP):  # each part at work once for so many pictures
            group = range(len(prompts))[start:start + GROUP]
            batches = [group[i:i + batch_size] for i in range(0, len(group), batch_size)]
            with at_work(model, model.text_encoder):
                captions = [model.text_encoder([prompts[i] for i in b]) for b in batches]
                against = [model.text_encoder([negative[i] for i in b]) if negative else None for b in batches]
            latents = []
            with at_work(model, model):
                for b, caption, negative_caption in zip(batches, captions, against):
                    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seeds[i]))
                                         for i in b])
                    latents.append(draw_latents(model, noise.to(model.device), caption, steps, guidance_scale, sampler,
                                                sigma_max, negative_caption=negative_caption,
                                                on_step=lambda: bar.update(len(noise))))
            with at_work(model, model.vae):
                images += [image for z in latents for image in decode_images(model.vae, z)]
    return images


def decode_images(vae, latents):
    """Latents (B,C,H,W) -> list of PIL images"""
    pixels = (vae.decode(latents).float() / 2 + 0.5).clamp(0, 1) * 255
    return [Image.fromarray(p) for p in pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def picture_grid(images, columns, cell=128):
    """The pictures row by row on white, small ones enlarged to at least `cell` pixels without smoothing"""
    scale = max(1, round(cell / images[0].width))
    w, h, gap = images[0].width * scale, images[0].height * scale, 4
    grid = Image.new("RGB", (columns * (w + gap) + gap, math.ceil(len(images) / columns) * (h + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image.resize((w, h), Image.Resampling.NEAREST), (gap + column * (w + gap), gap + row * (h + gap)))
    return grid


def all_prompts():
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
    repeat = [t for t in texts for _ in range(images_per_prompt or 1)]
    negative = negative_prompt * len(texts) if len(negative_prompt) == 1 else negative_prompt
    return repeat, [t for t in negative for _ in range(images_per_prompt or 1)]


def warn_unknown_words(model, texts):
    """The stand-in encoder has a vector for any word, but the network only knows those of its training captions."""
    if not hasattr(model.text_encoder, "vectors"):
        return
    new = sorted({w for text in texts for w in words_of(text)} - set(model.words))
    if new:
        print(f"warning: {model.name} was never shown the word{'s' * (len(new) > 1)} {', '.join(new)}. It knows: "
              f"{', '.join(model.words[:100])}{', ...' * (len(model.words) > 100)}", file=sys.stderr)


def draw_geneval():
    """GenEval's folder layout, by all processes of torchrun; stopped and started again, it goes on"""
    import generated  # which imports this file
    import geneval
    if prompt or len(negative_prompt) > 1 or len(checkpoint) > 1:
        raise ValueError("GenEval's prompts file goes with no --prompt, and with one --checkpoint and one "
                         "--negative_prompt at most")
    prompts, (rank, world) = geneval.read_prompts(prompts_file), generated.processes()
    model = load(next(iter(checkpoint), ""), device, ema, vae, text_encoder, dtype, offload, compile, scaling_factor)
    jobs = [(name, prompts[i]["prompt"], seed + n)
            for n, (name, i, _) in enumerate(geneval.folders(prompts, images_per_prompt or 4))]
    how = {"guidance_scale": guidance_scale if guidance_scale >= 0 else model.guidance_scale, "steps": steps,
           "sampler": sampler, "sigma_max": sigma_max, "negative_prompts": next(iter(negative_prompt), None)}
    generated.open_folder(out, generated.describe(model, jobs, batch_size=batch_size, seed=seed, **how), jobs)
    if rank == 0:
        geneval.write_layout(out, prompts)
    generated.fill(model, out, jobs, rank, world, batch_size, **how)
    print(f"process {rank} of {world}: its share of {len(jobs):,} pictures is in {out}/. Score all with: python "
          f"eval_geneval.py --images {out}")


def main():
    for name, least in (("images_per_prompt", 0), ("steps", 1), ("batch_size", 1)):
        if globals()[name] < least:
            raise ValueError(f"{name} is {globals()[name]}: it must be at least {least}")
    if prompts_file.endswith(".jsonl"):
        return draw_geneval()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("torchrun shares the pictures of GenEval's prompts file alone: start sample.py with python")
    texts, negative = all_prompts()
    models = [load(path, device, ema, vae, text_encoder, dtype, offload, compile, scaling_factor)
              for path in checkpoint or ("",)]
    folder = Path(out)
    pictures = []
    for model in models:
        warn_unknown_words(model, texts + negative)
        pictures.append(generate(model, texts, steps, None if guidance_scale < 0 else guidance_scale, seed, sampler,
                                 negative, sigma_max, batch_size, progress=True))
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(m.group()) for p in folder.glob("*.png") if (m := re.match(r"\d+", p.name))]
    number = max(taken, default=-1) + 1
    for model, images in zip(models, pictures):
        for i, image in enumerate(images):
            info = PngInfo()
            used = {"prompt": texts[i], "negative_prompt": negative[i] if negative else "", "seed": seed + i,
                    "steps": steps, "guidance_scale": guidance_scale if guidance_scale >= 0 else model.guidance_scale,
                    "sampler": sampler, "sigma_max": sigma_max, "checkpoint": model.name}
            info.add_itxt("prompt", texts[i])
            info.add_itxt("seed", str(seed + i))
            info.add_itxt("settings", json.dumps(used))
            slug = re.sub(r"\W+", "-", texts[i].lower())[:60].strip("-")
            image.save(folder / f"{number:05d}_{slug}_seed{seed + i}.png", pnginfo=info)
            number += 1
    columns = len(texts) if len(models) > 1 else math.ceil(len(texts) ** 0.5)
    grid = folder / f"{number:05d}_grid.png"
    picture_grid([image for images in pictures for image in images], columns).save(grid)
    print(f"{len(texts) * len(models)} pictures in {folder}/, all together in {grid}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"sample.py: {error}") from None
