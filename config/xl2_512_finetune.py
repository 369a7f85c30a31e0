"""
Not the paper's, and never run at this size: the paper's XL/2, 1,165.4 M parameters, goes on for 20,000 steps of 256
with some 120,000 good pairs, at a tenth of the rate. docs/datasets.md says which ones, and what that does to GenEval.

    torchrun --nproc_per_node=8 train.py config/xl2_512_finetune.py          # after config/xl2_512_unmasked.py
"""
from config.xl2_512_unmasked import *

data = ("data/blip3o_60k", "data/dalle3", "data/sharegpt4o")
seed = 2028                 # data in an order of its own
init_from = "runs/xl2_512_unmasked"
batch_size = 256            # 2,048 would show each picture 340 times
max_steps = 20_000
learning_rate = 8e-6
warmup_steps = 200
ema_decay = 0.9995
checkpoint_every = 2000
