"""
A folder of pictures that a network draws, which several processes fill together and which can be stopped at any moment.

    generated.json     what the pictures are a function of: prompts, sampler, seed, the hash of all weights
    NAME.png           each with its prompt and seed inside, as sample.py writes them

Pictures that are there are used again if generated.json is what it would be now; otherwise it is an error.
"""
import hashlib
import json
import os
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import write_json
from common.hashing import tensors_hash
from common.images import save_picture
from evaluation.processes import processes
from sampling.pipeline import GROUP, generate

DESCRIBED = "generated.json"


def describe(pipeline, jobs, **settings):
    """Return what the pictures of the jobs [(name, prompt, seed)] are a function of, with the weights' hash."""
    weights = [getattr(part, "model", part) for part in (pipeline.net, pipeline.vae, pipeline.text_encoder)]
    return {**settings, "pictures": len(jobs), "prompts_sha256": hash_of(jobs),
            "weights_sha256": tensors_hash(*(w for w in weights if isinstance(w, torch.nn.Module))),
            "device": pipeline.device.type, "dtype": str(pipeline.dtype).removeprefix("torch."),
            "vae": str(getattr(pipeline.vae, "name", "pixels")), "scaling_factor": pipeline.vae.scaling_factor,
            "text_encoder": str(getattr(pipeline.text_encoder, "name", "words"))}


def hash_of(value):
    """Return the sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def differences(earlier, now):
    """Return the keys in which two descriptions differ, with both values, as a text."""
    return "; ".join(f"{key}: {earlier.get(key)} there, {now.get(key)} now" for key in sorted({*earlier, *now})
                     if earlier.get(key) != now.get(key))


def open_folder(folder, description):
    """Make the folder for these pictures, or find it made. Refuse one that holds others, and say what differs."""
    folder = Path(folder)
    pictures = any(folder.rglob("*.png"))  # looked for first, as every process writes the description before them
    if pictures and not (folder / DESCRIBED).exists():
        raise ValueError(f"{folder} holds pictures and no {DESCRIBED} that says what they are: give another --out")
    if not pictures:
        folder.mkdir(parents=True, exist_ok=True)
        # all processes may write it at the same time, each through a file of its own
        own = folder / f"{DESCRIBED}.{os.getpid()}"
        write_json(own, description)
        os.replace(own, folder / DESCRIBED)
    if differ := differences(read_description(folder), description):
        raise ValueError(f"{folder} holds pictures made otherwise ({differ}): delete it, or give another --out")


def read_description(folder):
    """Return what generated.json says, {} if there is none."""
    path = Path(folder) / DESCRIBED
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {folder}, or move that file away") from None


def fill(pipeline, folder, jobs, batch_size, **drawing):
    """Draw this process's share of the missing pictures. jobs: [(name in the folder, prompt, seed)].

    Batches are the same whatever is missing and however many processes there are, as rounding depends on a picture's
    neighbours in its batch: a batch of which any picture is missing is drawn as a whole.
    """
    rank, world = processes()
    size = max(batch_size, GROUP // batch_size * batch_size) if pipeline.offload else batch_size
    batches = [jobs[i:i + size] for i in range(0, len(jobs), size)]
    todo = [b for b in batches[rank::world] if not all((Path(folder) / name).exists() for name, _, _ in b)]
    for batch in tqdm(todo, unit=f" batches of {size}", desc=f"drawing {folder}", disable=rank > 0 or not todo):
        names, prompts, seeds = zip(*batch)
        images = generate(pipeline, prompts, seed=seeds, batch_size=batch_size, **drawing)
        for name, prompt, seed, image in zip(names, prompts, seeds, images):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            save_picture(Path(folder) / name, image, prompt=prompt, seed=str(seed))
