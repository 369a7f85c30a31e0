"""
The emoji of your own computer, in an hour on a slow CPU and less on others: 5.1 M parameters (docs/datasets.md).

    python train_vae.py --source emoji --downsample 4 --max_steps 3000 --out runs/emoji_vae
    python prepare_latents.py --source emoji --vae runs/emoji_vae/vae.safetensors --resolutions 64 --out data/emoji
    python train.py config/emoji.py
"""
from config.tiny import *

data = "data/emoji"
latent_size = 16            # 64 px, of which the autoencoder makes 16 x 16 x 4
patch_size = 4              # 16 patches of 16 x 16 px
dim = 192
mixer_dim = 192
p_mean = 0.0                # a name means one picture, so high noise is soon learnt, and details are what is left
ema_decay = 0.995
max_steps = 2400
sample_every = 1200
