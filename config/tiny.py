"""
The laptop run: 2.4 M parameters, the built-in drawn set at 32 px, 9 to 13 minutes on two CPU cores.

    python prepare_latents.py && python train.py config/tiny.py

docs/log.md says what was tried on the way here.
"""
data = "data/shapes"
latent_size = 16            # 32 px, of which the pixels autoencoder makes 16 x 16 x 12
patch_size = 2              # 64 patches of 4 x 4 px
# network: cheap steps are worth more here than width or depth
dim = 128
depth = 4
head_dim = 32
mlp_multiple = 32
mlp_ratio = (0.5, 2.0)
mixer_depth = 2
mixer_dim = 128
mixer_mlp_ratio = 2.0
num_experts = 4
expert_capacity = 1.0
# training
batch_size = 32
micro_batch_size = 32
max_steps = 3000
unmasked_steps = 1700
optimizer = "muon"
learning_rate = 4e-3
warmup_steps = 40
min_learning_rate = 0.02
weight_decay = 0.5          # keeps the matrices small, so that steps of Muon's fixed length keep turning them
beta2 = 0.99
grad_clip = 1.0
p_mean = 0.9                # objects take their place at sigma 2 to 8, because the pixels of a patch average noise away
p_std = 1.0
ema_decay = 0.99
ema_start = 100
sample_guidance = 2.0
eval_every = 600
sample_every = 1500
checkpoint_every = 750
