"""
The paper's XL/2, 1,165.4 M parameters, phase 2 of 4: 256 px, whole pictures, 30,000 steps of 2,048.

    torchrun --nproc_per_node=8 train.py config/xl2_256_unmasked.py          # after config/xl2_256.py
"""
from config.xl2_256 import *

seed = 2025                 # data in an order of its own
init_from = "runs/xl2_256"
init_optimizer = True
micro_batch_size = 64
max_steps = 30_000
mask_ratio = 0.0
learning_rate = 8e-5
warmup_steps = 0
schedule = "constant"
checkpoint_every = 2000
