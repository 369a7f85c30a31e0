"""
How fast prepare_latents.py is on this machine with models of the published sizes, which stage limits it, and what that
makes for the paper's 37 million pictures on 8 such GPUs.

    python docs/prepare_speed.py                                    # one process; on a GPU, with --pictures 4000
    python docs/prepare_speed.py --processes 8 --pictures 20000     # 8 GPUs (it starts the processes itself)

The weights are random (they take as long as real ones), the pictures JPEGs of 1500 x 2000 as in SA-1B.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure

pictures = 24               # pictures to prepare
width = 2000                # of the pictures
height = 1500               # of the pictures
processes = 1               # GPUs, or processes without one
workers = -1                # processes that decode pictures, for each GPU; -1: all cores

if __name__ == "__main__":
    settings = configure(globals())

import io
import json
import re
import subprocess
import tarfile
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from encoders.vae import KLAutoencoder

SDXL = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "scaling_factor": 0.13025}


def write_models(folder):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(json.dumps(SDXL))
    save_file(KLAutoencoder(SDXL).state_dict(), folder / "vae/diffusion_pytorch_model.safetensors")
    tower = CLIPTextConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, intermediate_size=4096,
                           hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, vocab_size=49408)
    CLIPTextModel(tower).save_pretrained(folder / "clip")
    words = json.loads((ROOT / "tests/data/clip_tokens.json").read_text())
    (folder / "clip/vocab.json").write_text(json.dumps(words["vocab"]))
    (folder / "clip/merges.txt").write_text("#version: 0.2\n" + "\n".join(words["merges"]) + "\n")
    CLIPTokenizer(str(folder / "clip/vocab.json"), str(folder / "clip/merges.txt")).save_pretrained(folder / "clip")


def write_pictures(path):
    coarse = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    with tarfile.open(path, "w") as tar:
        for i in range(pictures):
            for name, data in ((f"{i:06d}.jpg", out.getvalue()), (f"{i:06d}.txt", b"a photo of a cat and a dog " * 3)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return len(out.getvalue())


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        each = write_pictures(folder / "pictures.tar")
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        given = {"source": folder / "pictures.tar", "vae": folder / "vae", "text_encoder": folder / "clip",
                 "out": folder / "out", "shard_size": max(64, pictures // (4 * processes)), "batch_size": 16,
                 "workers": workers}
        done = subprocess.run([*launcher, ROOT / "prepare_latents.py", "--resolutions", "256", "512",
                               *(f"--{name}={value}" for name, value in given.items())],
                              stdout=subprocess.PIPE, text=True, check=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{processes} x {device}, {pictures} JPEGs of {width} x {height}, {each / 1000:.0f} kB each, 256 and 512 px")
    (line,) = [line for line in done.stdout.splitlines() if "pictures/s" in line]
    print(line)
    rate = float(re.match(r"[\d,.]+", line)[0].replace(",", "")) / processes
    print(f"37 M pictures on 8 of these: {37e6 / (8 * rate) / 3600:,.0f} hours")


if __name__ == "__main__":
    main()
