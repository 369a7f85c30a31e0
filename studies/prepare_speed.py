"""
Measure how fast prepare_latents.py is on this machine with models of the published sizes, which stage limits it, and
what that makes for the paper's 37 million pictures on 8 such GPUs.

    python -m studies.prepare_speed                                    # one process; on a GPU, with --pictures 4000
    python -m studies.prepare_speed --processes 8 --pictures 20000     # 8 GPUs (it starts the processes itself)

The weights are random, as that takes as long as real ones, and the pictures JPEGs of 1500 x 2000 as in SA-1B.
"""
from configurator import configure

pictures = 24               # pictures to prepare (>= 1)
processes = 1               # GPUs, or processes without one (>= 1)
workers = -1                # processes that decode pictures, for each GPU; -1: all cores (>= -1)

if __name__ == "__main__":
    settings = configure(globals())

import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from encoders.vae import KLAutoencoder

SDXL = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "scaling_factor": 0.13025}
TOWER = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096,
         "hidden_act": "quick_gelu", "bos_token_id": 49406, "eos_token_id": 49407, "vocab_size": 49408}


def write_models(vae, clip):
    """Write an autoencoder and a text encoder with random weights into two new folders."""
    torch.manual_seed(0)
    vae.mkdir()
    (vae / "config.json").write_text(json.dumps(SDXL))
    save_file(KLAutoencoder(SDXL).state_dict(), vae / "diffusion_pytorch_model.safetensors")
    CLIPTextModel(CLIPTextConfig(**TOWER)).save_pretrained(clip)
    words = json.loads(Path("tests/data/clip_tokens.json").read_text())
    (clip / "vocab.json").write_text(json.dumps(words["vocab"]))
    (clip / "merges.txt").write_text("#version: 0.2\n" + "\n".join(words["merges"]) + "\n")
    CLIPTokenizer(str(clip / "vocab.json"), str(clip / "merges.txt")).save_pretrained(clip)


def main():
    jpeg, coarse = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (94, 125, 3), np.uint8)
    Image.fromarray(coarse).resize((2000, 1500), Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=90)
    with tempfile.TemporaryDirectory() as temporary:
        vae, clip, source, out = (Path(temporary, name) for name in ("vae", "clip", "pictures", "out"))
        write_models(vae, clip)
        source.mkdir()
        for i in range(pictures):
            (source / f"{i:06d}.jpg").write_bytes(jpeg.getvalue())
            (source / f"{i:06d}.txt").write_text("a photo of a cat and a dog " * 3)
        command = [sys.executable, "prepare_latents.py", "--resolutions", "256", "512"]
        if processes > 1:
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [f"--source={source}", f"--vae={vae}", f"--text_encoder={clip}", f"--out={out}", "--batch_size=16",
                    f"--workers={workers}", f"--shard_size={max(64, pictures // (4 * processes))}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("prepare_speed.py: prepare_latents.py failed, for the reason above")
    line = next(line for line in done.stdout.splitlines() if "pictures/s" in line)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{processes} x {device}, {pictures} JPEGs of {len(jpeg.getvalue()) / 1000:.0f} kB, 256 and 512 px\n{line}")
    rate = float(re.match(r"[\d,.]+", line)[0].replace(",", "")) / processes
    if rate:  # printed as 0.00 where one picture takes longer than 200 seconds
        print(f"37 M pictures on 8 of these: {37e6 / (8 * rate) / 3600:,.0f} hours")


if __name__ == "__main__":
    main()
