"""
The same set with a larger network, 18.9 M parameters, and 75 % of the patches masked in the first half of its steps:
for two CPU cores or a GPU. Neither its time nor its scores are measured yet.

    python train.py config/small.py         # after the autoencoder and the preparation of config/tiny.py
"""
data = "data/shapes64"
latent_size = 8             # 64 px, of which the autoencoder makes 8 x 8 x 4
patch_size = 1              # 64 patches of 8 x 8 px
# network
dim = 256
depth = 8
head_dim = 32
mlp_multiple = 32
mlp_ratio = (0.5, 3.0)
mixer_depth = 3
mixer_dim = 192
mixer_mlp_ratio = 3.0
num_experts = 8
expert_capacity = 1.0
# training
batch_size = 64
micro_batch_size = 64
max_steps = 6000
unmasked_steps = 3000
optimizer = "muon"
learning_rate = 3e-3
warmup_steps = 100
min_learning_rate = 0.02
weight_decay = 0.5
beta2 = 0.99
grad_clip = 1.0
p_mean = 0.0
p_std = 1.1
ema_decay = 0.995
ema_start = 500
sample_guidance = 3.0
eval_every = 500
sample_every = 1000
checkpoint_every = 500
