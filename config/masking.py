"""
The network of studies.ablate: 1.2 M parameters, the paper's shape in small, with 256 patches.

    python train_vae.py --downsample 4 --out runs/masking_vae
    python prepare_latents.py --vae runs/masking_vae/vae.safetensors --resolutions 64 --limit 40000 --out data/masking
    python -m studies.ablate              # trains all arms; one alone: python train.py config/masking.py
"""
from config.tiny import *

data = "data/masking"
latent_size = 16            # 64 px, of which the autoencoder makes 16 x 16 x 4
patch_size = 1              # 256 patches of 4 x 4 px, of which masking keeps 64
mask_ratio = 0.75
dim = 96
depth = 5
mixer_depth = 1
mixer_dim = 64              # a masked step costs 30 % of a whole one; the paper's 40 %
batch_size = 64
micro_batch_size = 64
max_steps = 2500
p_mean = 0.7                # as in config/small.py, whose latents are as large
eval_every = 500
sample_every = 0
checkpoint_every = 500
