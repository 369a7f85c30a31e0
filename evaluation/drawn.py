"""
A folder of pictures that a network draws, which several processes fill together and which can be stopped at any moment.

    generated.json     what the pictures are a function of: prompts, sampler, seed, the hash of all weights
    captions.jsonl     {"image", "caption", "seed"} of each picture

Pictures that are there are used again if generated.json is what it would be now; otherwise it is an error.
"""
import hashlib
import json
import os
from pathlib import Path

import torch
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from common.files import write_atomic
from evaluation.clip import tensors_hash
from evaluation.prompts import LISTED
from sampling.pipeline import GROUP, generate

DESCRIBED = "generated.json"


def processes():
    """(rank, number of processes) under torchrun, (0, 1) without"""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def describe(model, jobs, **settings):
    """What the pictures of the jobs [(name, prompt, seed)] are a function of, the weights' hash among it"""
    weights = [getattr(part, "model", part) for part in (model.net, model.vae, model.text_encoder)]
    return {**settings, "pictures": len(jobs), "prompts_sha256": hash_of(jobs),
            "weights_sha256": tensors_hash(*(w for w in weights if isinstance(w, torch.nn.Module))),
            "device": model.device.type, "dtype": str(model.dtype).removeprefix("torch."),
            "vae": str(getattr(model.vae, "name", "pixels")), "scaling_factor": model.vae.scaling_factor,
            "text_encoder": str(getattr(model.text_encoder, "name", "words"))}


def hash_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def open_folder(folder, described, jobs):
    """Make the folder for these pictures, or find it made; ValueError says what differs if it holds others."""
    folder = Path(folder)
    path = folder / DESCRIBED
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, a folder is wanted: give another --out")
    pictures = any(folder.rglob("*.png"))  # before the other file is looked for, as every process writes that first
    if not pictures or not path.exists():
        if pictures:
            raise ValueError(f"{folder} holds pictures and no {DESCRIBED} that says what they are: give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"image": name, "caption": prompt, "seed": seed}) + "\n" for name, prompt, seed in jobs]
        # processes of one run may all do this at once, each with a temporary file of its own
        write_once(folder / LISTED, "".join(lines))
        write_once(path, json.dumps(described, indent=1) + "\n")
    there = read_described(folder)
    differ = [f"{k}: {there.get(k)} there, {described.get(k)} now" for k in sorted({*there, *described})
              if there.get(k) != described.get(k)]
    if differ:
        raise ValueError(f"{folder} holds pictures that were made otherwise ({'; '.join(differ)}): delete it or give "
                         "another --out")


def read_described(folder):
    """What generated.json says, None if there is none; ValueError if it is damaged"""
    path = Path(folder) / DESCRIBED
    if not path.exists():
        return None
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {folder}, or move that file away") from None
    return there


def write_once(path, text):
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def fill(model, folder, jobs, batch_size, **drawing):
    """Draw this process's share of the missing pictures. jobs: [(name in the folder, prompt, seed)].

    Batches are the same whatever is missing and however many processes there are, as rounding depends on a picture's
    neighbours in its batch: a batch of which any picture is missing is drawn as a whole.
    """
    rank, world = processes()
    size = max(batch_size, GROUP // batch_size * batch_size) if model.offload else batch_size
    batches = [jobs[i:i + size] for i in range(0, len(jobs), size)]
    todo = [b for b in batches[rank::world] if not all((Path(folder) / name).exists() for name, _, _ in b)]
    quiet = rank > 0 or not todo
    with tqdm(total=sum(map(len, todo)), unit=" pictures", desc=f"drawing {folder}", disable=quiet) as bar:
        for batch in todo:
            names, prompts, seeds = zip(*batch)
            images = generate(model, prompts, seed=seeds, batch_size=batch_size, **drawing)
            for name, prompt, seed, image in zip(names, prompts, seeds, images):
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                info = PngInfo()
                info.add_itxt("prompt", prompt)
                info.add_itxt("seed", str(seed))
                write_atomic(path, lambda file: image.save(file, "PNG", pnginfo=info))
            bar.update(len(batch))
