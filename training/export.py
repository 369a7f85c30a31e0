"""
A run's weights for others, under the tensor names of the paper's released checkpoints. sample.py --checkpoint,
eval_fid.py --checkpoint and train.py --init_from read the file back.

    python -m training.export --run runs/xl2_512_unmasked --out microdit.safetensors
"""
from configurator import configure

run = ""            # run folder or checkpoint; empty: the newest run
out = ""            # FILE.safetensors; FILE.md beside it is the model card
dtype = "bfloat16"  # precision of the network's tensors (bfloat16 | float32)

if __name__ == "__main__":
    settings = configure(globals())

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.files import whole, write_bytes
from common.processes import run_script
from common.tensors import read_tensors
from encoders.released import to_official
from training import checkpoint

CARD = """# {name}

A text-to-image network of {size:.1f} M parameters, trained with nanoMicroDiT for {step:,} steps. Its tensors have the
names of the paper's released checkpoints, and the file's metadata its whole configuration.

    python sample.py --checkpoint {file} --prompt "..."

- backbone: {config[depth]} blocks, {config[dim]} wide
- latents: {config[latent_channels]} channels of {config[latent_size]} x {config[latent_size]}
- autoencoder: {data[vae][name]}
- text encoder: {data[text_encoder][name]}
- guidance: {settings[sample_guidance]:g}
"""


def main():
    file = Path(out)
    if file.suffix != ".safetensors":
        raise ValueError(f"out is '{out}': it must be FILE.safetensors")
    for path in (file, card := file.with_suffix(".md")):
        if os.path.lexists(path):
            raise ValueError(f"{path} is there already: give another --out")
    path = checkpoint.find(run)
    net, source = checkpoint.load_network(path)
    data = {key: source["data"][key] for key in ("vae", "text_encoder", "words") if key in source["data"]}
    said = {"config": source["config"], "step": source["step"], "data": data, "released": True,
            "settings": {"sample_guidance": source["settings"].get("sample_guidance", 5.0)}}
    tensors = {name: t.to(getattr(torch, dtype)).contiguous() for name, t in to_official(net).items()}
    if "config" in data["vae"]:
        tensors |= read_tensors(path, ("vae.",))[1]
    with whole(file) as temporary:
        save_file(tensors, temporary, {"run": json.dumps(said)})
    size = sum(p.numel() for p in net.parameters()) / 1e6
    write_bytes(card, CARD.format(**said, name=file.stem, file=file.name, size=size).encode())
    print(f"{path} -> {file} ({file.stat().st_size / 1e6:,.1f} MB) and {card}")


if __name__ == "__main__":
    run_script("training.export", main)
