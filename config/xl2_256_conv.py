"""
config/xl2_256.py with a convolution in the mixer, and of each 2 x 2 patches one is kept. In small networks that takes a
third of the FLOPs to the same loss, and draws no better pictures (docs/masking.md). Not the paper's, and never trained:
1,165.5 M parameters.

    torchrun --nproc_per_node=8 train.py config/xl2_256_conv.py
    torchrun --nproc_per_node=8 train.py config/xl2_256_unmasked.py --init_from runs/xl2_256_conv --mixer_conv true

Phases 3 and 4 take `--mixer_conv true`, too, and phase 3 `--mask grouped`.
"""
from config.xl2_256 import *

mask = "grouped"
mixer_conv = True
