"""
An hour on two CPU cores: 3.6 M parameters, and an autoencoder of its own that is trained longer (docs/measured.md).

    python train_vae.py --max_steps 3200 --out runs/small_vae
    python prepare_latents.py --vae runs/small_vae/vae.safetensors --resolutions 64 --limit 40000 --out data/small64
    python train.py config/small.py
"""
from config.tiny import *

data = "data/small64"
mask_ratio = 0.5            # not 0.75: of 16 patches the 4 that were left would say little
unmasked_steps = 2600
max_steps = 4200
dim = 160
mixer_dim = 160
schedule = "cosine"
momentum = 0.95
learning_rate = 4e-3
warmup_steps = 60
p_mean = 0.2
sample_guidance = 2.5
ema_decay = 0.995
ema_start = 500
eval_every = 700
sample_every = 2100
checkpoint_every = 700
