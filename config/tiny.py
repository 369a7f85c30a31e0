"""
The laptop run: 2.3 M parameters, the built-in set at 64 px in the latents of train_vae.py, which are 16 tokens, too few
to drop any. docs/log.md says what was tried on the way here.

    python train_vae.py
    python prepare_latents.py --vae runs/vae/vae.safetensors --resolutions 64 --out data/shapes64
    python train.py config/tiny.py
"""
data = "data/shapes64"
latent_size = 8             # 64 px, of which the autoencoder makes 8 x 8 x 4
patch_size = 2              # 16 patches of 16 x 16 px
mask_ratio = 0.0
# network: cheap steps are worth more here than width or depth
dim = 128
depth = 4
head_dim = 16
mlp_multiple = 32
mlp_ratio = (0.5, 2.0)
mixer_depth = 2
mixer_dim = 128
mixer_mlp_ratio = 2.0
num_experts = 4
expert_capacity = 1.0
# training
batch_size = 128
micro_batch_size = 128
max_steps = 2000
optimizer = "muon"
momentum = 0.9              # Muon's 0.95 remembers too long for so few steps
learning_rate = 5e-3
warmup_steps = 40
schedule = "trapezoid"
min_learning_rate = 0.02
weight_decay = 0.5          # keeps the matrices small, so that steps of Muon's fixed length keep turning them
beta2 = 0.99
grad_clip = 1.0
p_mean = 0.3                # enough high noise to learn early where two objects go (docs/log.md)
p_std = 1.1
ema_decay = 0.99
ema_start = 100
sample_guidance = 4.0
eval_every = 400
sample_every = 1000
checkpoint_every = 400
