"""
The paper's XL/2, 1,165.4 M parameters, phase 4 of 4: 512 px, whole pictures, 5,000 steps of 2,048.

    torchrun --nproc_per_node=8 train.py config/xl2_512_unmasked.py          # after config/xl2_512.py
"""
from config.xl2_512 import *

seed = 2027                 # data in an order of its own
init_from = "runs/xl2_512"
init_optimizer = True
micro_batch_size = 16
max_steps = 5000
mask_ratio = 0.0
warmup_steps = 0
ema_decay = 0.9975
ema_start = 1000
checkpoint_every = 500
