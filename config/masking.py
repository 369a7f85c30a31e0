"""
The network of studies.ablate: 0.6 M parameters, the paper's shape in small, with 256 patches.

    python train_vae.py --downsample 4 --out runs/masking_vae
    python prepare_latents.py --vae runs/masking_vae/vae.safetensors --resolutions 64 --limit 40000 --out data/masking
    python -m studies.ablate              # trains all arms; one alone: python train.py config/masking.py
"""
data = "data/masking"
latent_size = 16            # 64 px, of which the autoencoder makes 16 x 16 x 4
patch_size = 1              # 256 patches of 4 x 4 px, of which masking keeps 64
dim = 64
depth = 5
head_dim = 16
mlp_multiple = 16
mlp_ratio = (0.5, 2.0)
mixer_depth = 1
mixer_dim = 48
mixer_mlp_ratio = 2.0
num_experts = 4
expert_capacity = 1.0
batch_size = 8
micro_batch_size = 8
max_steps = 2500
schedule = "trapezoid"
min_learning_rate = 0.0
learning_rate = 4e-4
warmup_steps = 50
weight_decay = 0.1
beta2 = 0.99
grad_clip = 1.0
p_mean = 0.3                # places are decided at high noise (docs/log.md)
p_std = 1.2
ema_decay = 0.99            # stands in for the end of a schedule
ema_start = 50
sample_guidance = 2.5
log_every = 100
eval_every = 500
sample_every = 0
checkpoint_every = 500
