"""Folders of pictures that a network generates. Several processes fill one together, and may be stopped any time."""
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import hash_of, is_there
from common.images import save_picture
from common.tensors import tensors_hash
from sampling.pipeline import generate


def describe(pipeline, jobs, **settings):
    """Return what the pictures of the jobs [(name in the folder, prompt, seed)] are a function of."""
    weights = [getattr(part, "model", part) for part in (pipeline.net, pipeline.vae, pipeline.text_encoder)]
    return {**settings, "prompts_sha256": hash_of(jobs), "scaling_factor": pipeline.vae.scaling_factor,
            "weights_sha256": tensors_hash(*(w for w in weights if isinstance(w, torch.nn.Module))),
            "device": pipeline.device.type, "dtype": str(pipeline.dtype).removeprefix("torch.")}


def fill(pipeline, folder, jobs, batch_size, processes, **drawing):
    """Generate this process's share of the pictures that are missing. jobs: [(name in the folder, prompt, seed)].

    Batches stay the same, because a picture's last bits depend on its neighbours: if one is missing, all are generated.
    """
    jobs = [(Path(folder, name), *rest) for name, *rest in jobs]
    batches = [jobs[i:i + batch_size] for i in range(0, len(jobs), batch_size)]
    todo = [batch for batch in processes.share(batches) if not all([is_there(path) for path, _, _ in batch])]
    title = f"generating pictures for {folder}"
    for batch in tqdm(todo, unit=f" batches of {batch_size}", desc=title, disable=processes.rank > 0 or not todo):
        paths, prompts, seeds = zip(*batch)
        images = generate(pipeline, prompts, seed=seeds, batch_size=batch_size, **drawing)
        for path, prompt, seed, image in zip(paths, prompts, seeds, images):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(path, image, prompt=prompt, seed=str(seed))
