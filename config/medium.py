"""
The drawn set at 128 px: 49.1 M parameters, 75 % of the patches masked for three quarters of the steps. For a GPU, or a
night of a strong CPU. Neither its time nor its scores are measured.

    python train_vae.py --resolution 128 --max_steps 6000 --out runs/vae128
    python prepare_latents.py --vae runs/vae128/vae.safetensors --resolutions 128 --limit 100000 --out data/shapes128
    python train.py config/medium.py
"""
data = "data/shapes128"
latent_size = 16            # 128 px, of which the autoencoder makes 16 x 16 x 4
patch_size = 2              # 64 patches of 16 x 16 px, of which masking keeps 16
# network
dim = 384
depth = 10
head_dim = 32
mlp_multiple = 64
mlp_ratio = (0.5, 3.0)
mixer_depth = 3
mixer_dim = 256
mixer_mlp_ratio = 3.0
num_experts = 8
expert_capacity = 1.0
# training
batch_size = 256
micro_batch_size = 128
max_steps = 16_000
unmasked_steps = 4000
optimizer = "muon"
learning_rate = 3e-3
warmup_steps = 200
min_learning_rate = 0.02
weight_decay = 0.5
beta2 = 0.99
grad_clip = 1.0
p_mean = 0.3
p_std = 1.1
ema_decay = 0.999
ema_start = 1000
sample_guidance = 2.5
eval_every = 1000
sample_every = 2000
checkpoint_every = 1000
