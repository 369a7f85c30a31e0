"""
The paper's XL/2, 1,165.4 M parameters, phase 1 of 4: 256 px, 75 % masked, 250,000 steps of 2,048 pictures. Its hours
and dollars are in docs/budget.md; add `--check --data random` to measure them on your GPUs. The data sets are in
docs/datasets.md.

    torchrun --nproc_per_node=8 train.py config/xl2_256.py
"""
data = ("data/sa1b", "data/cc12m", "data/textcaps", "data/journeydb", "data/diffusiondb")
val_data = ("data/coco",)
latent_size = 32            # 256 px with an autoencoder that shrinks pictures by 8
# the network is train.py's default: XL/2
batch_size = 2048
micro_batch_size = 256      # 72 GB, as measured on one GPU; 128 takes 50 GB and 9 % longer
max_steps = 250_000
mask_ratio = 0.75
learning_rate = 2.4e-4
warmup_steps = 2500
schedule = "cosine"
min_learning_rate = 0.33
weight_decay = 0.1
grad_clip = 0.25
p_mean = -0.6
p_std = 1.2
compile = True
price = 3.75                # dollars for an hour of one GPU: the paper's $30 for a node of 8
eval_every = 5000
sample_every = 10_000
checkpoint_every = 5000     # some 20 minutes apart, of 14 GB each
