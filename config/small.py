"""
An hour on two CPU cores: 2.3 M parameters, pictures of 128 px, and an autoencoder that has seen only small ones.
docs/measured.md says how good they get, and what masking would have cost.

    python train_vae.py --max_steps 2500 --out runs/small_vae
    python prepare_latents.py --vae runs/small_vae/vae.safetensors --resolutions 128 --limit 40000 --out data/small128
    python train.py config/small.py
"""
from config.tiny import *

data = "data/small128"
latent_size = 16            # 64 patches of 16 x 16 px
depth = 5
mixer_depth = 1             # as good as two here, and masking is cheaper with it (docs/log.md)
mixer_conv = True
p_mean = 0.7                # twice the noise of small pictures: four times as many latents say where an object is
max_steps = 3200
sample_every = 1600
