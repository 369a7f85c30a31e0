"""
The paper's small network for ablations, Tiny/2: 200.7 M parameters, 256 px, 75 % masked but for the last fifth. It is
for one GPU. The number of steps, batch and learning rate are this project's choice.

    python train.py config/tiny2_256.py
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
