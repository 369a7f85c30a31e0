"""
Code to put behind model.py (cat model.py studies/merged.py > merged_model.py) for a network that masks nothing. Behind
the first mixer block it joins 2 x 2 tokens into one, so that the backbone sees the whole picture in a quarter of the
tokens, as MPDiT does (2603.26357). Then each is parted again and added to what the mixer made of its four tokens, and
the other mixer blocks work on all tokens.
"""
from model import *  # for editors and linters; behind model.py these names are there


class MicroDiT(MicroDiT):
    def __init__(self, config):
        super().__init__(config)
        c, joined = config, 4 * config.mixer_dim
        self.mixer_out = nn.Sequential(layer_norm(joined), nn.Linear(joined, c.dim, bias=False))
        self.part = nn.Sequential(layer_norm(c.dim), nn.Linear(c.dim, joined, bias=False))
        self.final = FinalLayer(c.mixer_dim, c.patch_size ** 2 * c.latent_channels)
        self.final.modulation = nn.Linear(c.dim, 2 * c.mixer_dim)
        self.init_weights()

    def forward(self, x, c_noise, caption, ids_keep=None, kept_only=False, clean=None):
        if ids_keep is not None:
            raise ValueError("this network keeps all patches: mask_ratio must be 0")
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed                      # (B, T, D)
        caption = self.caption_block(self.caption_embed(caption))
        noise = self.noise_embed(noise_level_features(c_noise).to(self.noise_embed[0].weight.dtype))
        cond = gelu_tanh(noise + self.pooled_embed(caption.mean(1)))
        first, *others = self.mixer
        fine, fine_caption = self.mixer_in(x).to(x.dtype), self.mixer_caption(caption)           # (B, T, d)
        fine = self._run(first, fine, fine_caption, cond)
        side = math.isqrt(fine.shape[1])
        grid = fine.mT.unflatten(2, (side, side))                                                # (B, d, side, side)
        x = self.mixer_out(patchify(grid, 2)).to(x.dtype)                                        # (B, T/4, D)
        for block in self.blocks:
            x = self._run(block, x, caption, cond)
        fine = fine + unpatchify(self.part(x), 2).flatten(2).mT                                  # (B, T, d)
        for block in others:
            fine = self._run(block, fine, fine_caption, cond)
        return unpatchify(self.final(fine, cond), self.config.patch_size)
