"""
The paper's XL/2, 1,165.4 M parameters, phase 3 of 4: 512 px, 75 % masked, 50,000 steps of 2,048 pictures. It starts
from the weights alone. Positions are at half the distance, so that the four times as many patches cover the same range.
Of CC12M it takes only pictures of 512 px and more.

    torchrun --nproc_per_node=8 train.py config/xl2_512.py                   # after config/xl2_256_unmasked.py
"""
from config.xl2_256 import *

data = ("data/sa1b", "data/cc12m@512", "data/textcaps", "data/journeydb")
seed = 2026                 # data in an order of its own
init_from = "runs/xl2_256_unmasked"
latent_size = 64
pos_scale = 2.0
micro_batch_size = 64       # 77 GB with the average, as measured; 32 takes 53 GB
max_steps = 50_000
learning_rate = 8e-5
warmup_steps = 500
schedule = "constant"
grad_clip = 0.5
p_mean = 0.0
p_std = 0.6
ema_decay = 0.99975
ema_start = 25_000
checkpoint_every = 2000     # 19 GB each, with the average
