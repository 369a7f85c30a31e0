"""
The paper's small network for ablations, Tiny/2: 200.7 M parameters, 256 px, 75 % masked but for the last fifth.

    python train.py config/tiny2_256.py

For one GPU: 60,000 steps of 256 pictures are 1.1e18 FLOPs, 1.4 hours of an H100, counted and not measured. Number of
steps, batch and learning rate are this project's choice. Give it a smaller `data` to compare ideas on.
"""
from config.xl2_256 import *

dim = 512
depth = 16
head_dim = 32
mixer_depth = 4
mixer_dim = 512
batch_size = 256
micro_batch_size = 128
max_steps = 60_000
unmasked_steps = 12_000
eval_every = 2000
checkpoint_every = 2000
