"""
The network of studies.ablate: 2.0 M parameters, the paper's shape in small. With 75 % of the patches masked, a step
costs 38 % of an unmasked one (the paper's XL/2 at 256 px: 40 %). Its learning rate is constant, so that every moment of
a run stands for a shorter run.

    python -m studies.ablate              # trains all arms; one alone: python train.py config/masking.py
"""
data = "data/shapes"
latent_size = 16            # 32 px, of which the pixels autoencoder makes 16 x 16 x 12
patch_size = 2              # 64 patches of 4 x 4 px, of which masking keeps 16
dim = 96
depth = 8
head_dim = 32
mlp_multiple = 32
mlp_ratio = (0.5, 2.0)
mixer_depth = 2
mixer_dim = 64
mixer_mlp_ratio = 2.0
num_experts = 4
expert_capacity = 1.0
batch_size = 32
micro_batch_size = 32
max_steps = 2500
schedule = "constant"
learning_rate = 4e-3        # the best of 1, 2, 4 and 8e-3 after 300 steps, masked and (up to 4e-3) unmasked
warmup_steps = 100
weight_decay = 0.1
beta2 = 0.99
grad_clip = 1.0
p_mean = 0.3                # places are decided at high noise (docs/log.md)
p_std = 1.2
ema_decay = 0.99            # stands in for the end of a schedule
ema_start = 100
sample_guidance = 2.0
log_every = 100
eval_every = 100
sample_every = 0
checkpoint_every = 0        # studies.ablate keeps those that it compares
keep_checkpoints = 100
