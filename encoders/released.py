"""
Networks under the tensor names of the paper's released checkpoints (hub: VSehwag24/MicroDiT, Apache-2.0). Training
checkpoints of its code (Composer) load too, where safe unpickling accepts the rest of the file.
"""
import math
import pickle
import re
import sys
import zipfile
from dataclasses import asdict, replace

import torch

from common.files import reading
from common.tensors import check_tensors, not_finite, strip
from model import MicroDiT, MicroDiTConfig, position_table

CLIP = "apple/DFN5B-CLIP-ViT-H-14-378"
KEYS = "(?i)(^|_)ema(_|$)|^(state|model|state_dict|module)$"  # under which weights lie
VAES = {4: "stabilityai/stable-diffusion-xl-base-1.0/vae", 16: "ostris/vae-kl-f8-d16"}  # by latent channels


def load_released(path):
    """Return (network, run) of a .pt file."""
    with reading(path):
        state = read_pt(path)
        config = infer_config(state)
        net = from_official(state, config)
        if bad := not_finite(state):
            raise ValueError(f"tensor {bad} is not finite")
    vae = VAES.get(config.latent_channels, "")
    print(f"{path}: assumed, because no tensor tells it: head_dim {config.head_dim}, expert_capacity "
          f"{config.expert_capacity:g}, text encoder {CLIP}, autoencoder {vae or 'not known'}", file=sys.stderr)
    # they were trained without the shift that the autoencoder's config names
    data = {"vae": {"name": vae, "shift": False}, "text_encoder": {"name": CLIP}}
    return net, {"config": asdict(config), "settings": {}, "step": 0, "data": data, "released": True}


def read_pt(path):
    """Return a network's tensors, averaged ones if there are, bare, under state_dict, or in a Composer checkpoint."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError("it holds code, which is not run: docs/settings.md says how to take the tensors out") from None
    while keys := [key for key, value in content.items() if isinstance(value, dict) and re.search(KEYS, str(key))
                   and any(isinstance(v, (dict, torch.Tensor)) for v in value.values())]:
        key = min(keys, key=lambda key: "ema" not in key.lower())
        if "ema" in key.lower():
            print(f"{path}: its averaged weights are used, which are under '{key}'", file=sys.stderr)
        content = content[key]
    # what DistributedDataParallel, torch.compile and FSDP put in front of names, or into them
    tensors = {re.sub(r"\b(module|_orig_mod|_fsdp_wrapped_module)\.", "", str(name)): t
               for name, t in content.items() if torch.is_tensor(t)}
    tensors = strip(tensors, "dit.") or tensors
    for name, t in tensors.items():  # a file may repeat a number without end
        if t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"tensor {name} has more numbers than the file holds for it")
    return tensors


def infer_config(state):
    """Infer the MicroDiTConfig of a released state dict, with XL/2's head width and MLP ratios."""
    depth, mixer_depth = (len({n.split(".")[1] for n in state if n.startswith(part)})
                          for part in ("blocks.", "patch_mixer."))
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    sparse = [n for n in state if n.startswith("blocks.") and n.endswith(".mlp.gate.weight")]
    config = MicroDiTConfig(
        latent_size=math.isqrt(state["pos_embed"].shape[1]) * patch, latent_channels=channels, patch_size=patch,
        dim=dim, depth=depth, caption_dim=state["y_embedder.y_proj.fc1.weight"].shape[1], mixer_depth=mixer_depth,
        mixer_dim=state["patch_mixer.0.norm1.weight"].shape[0] if mixer_depth else 768,
        num_experts=state[sparse[0]].shape[0] if sparse else 0,
        moe_every=1 + min((int(n.split(".")[1]) for n in sparse), default=1))
    for config.pos_scale in (1.0, 2.0):
        start = position_table(replace(config, latent_size=2 * patch))[:2]  # of a table of any size
        if torch.allclose(start, state["pos_embed"][0, :2].float(), atol=1e-2):  # which may be bfloat16
            return config
    raise ValueError("its pos_embed is the sin-cos table of neither 256 nor 512 px")


# parts of our names, and what the released ones have instead, replaced in this order
RENAMED = {
    "patch_embed.": "x_embedder.proj.", "noise_embed.": "t_embedder.mlp.", "caption_embed.": "y_embedder.y_proj.",
    "caption_block.": "y_emb_preprocess.", "pooled_embed.": "pooled_y_emb_process.",
    "mixer_in.": "patch_mixer_map_xin.", "mixer_out.": "patch_mixer_map_xout.",
    "mixer_caption.": "patch_mixer_map_y.", "mixer.": "patch_mixer.", "final.": "final_layer.",
    "final_layer.norm.": "final_layer.norm_final.", ".modulation.": ".adaLN_modulation.1.",
    ".cross_attn.q.": ".cross_attn.q_linear.", ".cross_attn.kv.": ".cross_attn.kv_linear.",
    ".mlp.router.": ".mlp.gate."}


def released_name(name):
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def from_official(state_dict, config):
    """Return a MicroDiT with the weights of a released state dict, in float32."""
    with torch.device("meta"):
        net = MicroDiT(config)
    ours = {released_name(name): name for name in net.state_dict()}
    tensors = {ours.get(name, name): t for name, t in state_dict.items() if name not in ("pos_embed", "mask_token")}
    check_tensors(net, tensors, "the state dict does not fit the config")
    if state_dict["pos_embed"].shape[1:] != net.pos_embed.shape:
        raise ValueError(f"pos_embed is {tuple(state_dict['pos_embed'].shape)}, the config has {config.tokens} patches")
    net.load_state_dict({name: t.to(torch.float32, copy=True) for name, t in tensors.items()}, assign=True)
    net.pos_embed = position_table(config).to(net.final.linear.weight.device)
    return net


def to_official(net):
    """Return the weights of a MicroDiT under the released names, with two constants."""
    c, table = net.config, net.pos_embed
    return {released_name(name): t for name, t in net.state_dict().items()} | {
        "pos_embed": table.unsqueeze(0), "mask_token": table.new_zeros(1, 1, c.patch_size ** 2 * c.latent_channels)}
