"""
An hour on two CPU cores: 3.6 M parameters, and an autoencoder of its own that is trained longer. Half of the patches
are masked in the first 1,600 of 4,200 steps. docs/measured.md has its times and scores.

    python train_vae.py --max_steps 3200 --out runs/small_vae
    python prepare_latents.py --vae runs/small_vae/vae.safetensors --resolutions 64 --limit 40000 --out data/small64
    python train.py config/small.py
"""
data = "data/small64"
latent_size = 8             # 64 px, of which the autoencoder makes 8 x 8 x 4
patch_size = 2              # 16 patches of 16 x 16 px
mask_ratio = 0.5            # not 0.75: of 16 patches the 4 that were left would say little
# network
dim = 160
depth = 4
head_dim = 16
mlp_multiple = 32
mlp_ratio = (0.5, 2.0)
mixer_depth = 2
mixer_dim = 160
mixer_mlp_ratio = 2.0
num_experts = 4
expert_capacity = 1.0
# training
batch_size = 128
micro_batch_size = 128
max_steps = 4200
unmasked_steps = 2600
optimizer = "muon"
learning_rate = 4e-3
warmup_steps = 60
min_learning_rate = 0.02
weight_decay = 0.5          # keeps the matrices small, so that steps of Muon's fixed length keep turning them
beta2 = 0.99
grad_clip = 1.0
p_mean = 0.2
p_std = 1.1
ema_decay = 0.995
ema_start = 500
sample_guidance = 2.5
eval_every = 700
sample_every = 2100
checkpoint_every = 700
