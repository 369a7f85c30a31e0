"""
The paper's released checkpoints (hub: VSehwag24/MicroDiT, Apache-2.0): .pt files of the network's tensors.

    net, run = load("dit_4_channel_37M_real_and_synthetic_data.pt")          # or VSehwag24/MicroDiT/ckpts/NAME.pt

What the network looks like is read off its tensors. Training checkpoints of the paper's code (Composer) hold the same
tensors under state/model/dit.*; they load where safe unpickling accepts the rest of the file.
"""
import math
import pickle
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from model import MicroDiT, MicroDiTConfig, position_table

SUFFIXES = (".pt", ".pth")
TEXT_ENCODER = "apple/DFN5B-CLIP-ViT-H-14-378"
VAES = {4: "stabilityai/stable-diffusion-xl-base-1.0/vae", 16: "ostris/vae-kl-f8-d16"}  # by latent channels


def load(path):
    """Return (network, run) as checkpoint.load_network does; ValueError says what is wrong with the file."""
    state = network_tensors(read(path), path)
    try:
        config = infer_config(state)
        net = MicroDiT.from_official(state, config)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not hold a network of the paper's kind: {error}") from None
    vae = {"name": VAES.get(config.latent_channels, ""), "scaling_factor": None, "shift": False,
           "latent_channels": config.latent_channels}
    data = {"vae": vae, "text_encoder": {"name": TEXT_ENCODER, "dim": config.caption_dim}, "words": []}
    return net, {"config": asdict(config), "settings": {}, "data": data, "step": 0, "released": True}


def read(path):
    """Return what the file holds, unpickled safely."""
    try:
        zipped = zipfile.is_zipfile(path)  # what torch has written since 1.6
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = found[1] if found else str(error).splitlines()[0]
        raise ValueError(
            f"{path} holds more than tensors ({what}), and unpickling that may run code. If you trust it, take the "
            "weights out where it was made: state = torch.load(path, weights_only=False)['state']['model']; "
            "torch.save({n[4:]: t for n, t in state.items() if n.startswith('dit.')}, 'dit.pt')") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({str(error).splitlines()[0]}): fetch it again") from None


def network_tensors(found, path):
    """Return the network's tensors, whether they lie bare, under state_dict, or in a Composer checkpoint."""
    for key in ("state", "model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a network's tensors")
    tensors = {str(n).removeprefix("module."): t for n, t in found.items() if torch.is_tensor(t)}
    if any(n.startswith("dit.") for n in tensors):
        tensors = {n.removeprefix("dit."): t for n, t in tensors.items() if n.startswith("dit.")}
    if "x_embedder.proj.weight" not in tensors:
        raise ValueError(f"{path} does not hold a network of the paper's kind: it has no x_embedder.proj.weight")
    return tensors


def infer_config(state):
    """Infer the MicroDiTConfig of a released state dict. Head width and MLP ratios are XL/2's, as no tensor tells."""
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    tokens = state["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    mixer_depth = count(state, "patch_mixer")
    sparse = [n for n in state if re.fullmatch(r"blocks\.\d+\.mlp\.gate\.weight", n)]
    config = MicroDiTConfig(
        latent_size=side * patch, latent_channels=channels, patch_size=patch, dim=dim, depth=count(state, "blocks"),
        caption_dim=state["y_embedder.y_proj.fc1.weight"].shape[1], mixer_depth=mixer_depth,
        mixer_dim=state["patch_mixer.0.norm1.weight"].shape[0] if mixer_depth else 768,
        num_experts=state[sparse[0]].shape[0] if sparse else 0,
        moe_every=1 + min((int(n.split(".")[1]) for n in sparse), default=1))
    for scale in (1.0, 2.0):
        config.pos_scale = scale
        if torch.allclose(position_table(config), state["pos_embed"][0].float(), atol=1e-2):  # which may be bfloat16
            return config
    raise ValueError("its pos_embed is the sin-cos table of neither 256 nor 512 px")


def count(state, name):
    return len({n.split(".")[1] for n in state if n.startswith(name + ".")})


def download(name):
    """Return the local file of ORG/REPO/PATH.pt on the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    org, repo, file = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{org}/{repo}", file))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"no checkpoint {name}: it is neither a file here nor could it be fetched from the hub "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tensor names


OFFICIAL_NAMES = [  # (start of our name, start of the released name), then the parts that differ inside a block
    ("patch_embed.", "x_embedder.proj."), ("noise_embed.", "t_embedder.mlp."), ("caption_embed.", "y_embedder.y_proj."),
    ("caption_block.", "y_emb_preprocess."), ("pooled_embed.", "pooled_y_emb_process."),
    ("mixer_in.", "patch_mixer_map_xin."), ("mixer_out.", "patch_mixer_map_xout."),
    ("mixer_caption.", "patch_mixer_map_y."), ("mixer.", "patch_mixer."),
    ("final.norm.", "final_layer.norm_final."), ("final.", "final_layer.")]
OFFICIAL_PARTS = [(".modulation.", ".adaLN_modulation.1."), (".cross_attn.q.", ".cross_attn.q_linear."),
                  (".cross_attn.kv.", ".cross_attn.kv_linear."), (".mlp.router.", ".mlp.gate.")]


def official_name(name):
    """Return the released checkpoints' name of one of our parameters."""
    for ours, theirs in OFFICIAL_NAMES:
        if name.startswith(ours):
            name = theirs + name[len(ours):]
            break
    for ours, theirs in OFFICIAL_PARTS:
        name = name.replace(ours, theirs)
    return name


def from_official(cls, state_dict, config):
    """See MicroDiT.from_official."""
    with torch.device("meta"):
        net = cls(config)
    wanted = {official_name(n): (n, p) for n, p in net.named_parameters()}
    given = {n: t for n, t in state_dict.items() if n not in ("pos_embed", "mask_token")}
    problems = [f"missing {n}" for n in wanted if n not in given]
    problems += [f"left over {n}" for n in given if n not in wanted]
    problems += [f"{n} is {tuple(given[n].shape)}, the config wants {tuple(p.shape)}"
                 for n, (_, p) in wanted.items() if n in given and given[n].shape != p.shape]
    if problems:
        raise ValueError(f"the state dict does not fit the config in {len(problems)} tensors: "
                         + "; ".join(problems[:5]))
    net.load_state_dict({n: given[o].to(torch.float32, copy=True) for o, (n, _) in wanted.items()}, assign=True)
    with torch.device("cpu"):
        net.pos_embed = position_table(config).to(net.final.linear.weight.device)
    return net


def to_official(net):
    """See MicroDiT.to_official."""
    c = net.config
    state = {official_name(n): p.detach() for n, p in net.named_parameters()}
    state["pos_embed"] = net.pos_embed.unsqueeze(0)
    state["mask_token"] = net.pos_embed.new_zeros(1, 1, c.patch_size ** 2 * c.latent_channels)
    return state
