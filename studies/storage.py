"""
What storing caption embeddings in fewer bits costs: bytes a picture and relative error, for a text encoder.

    python docs/storage.py                                              # a random CLIP text tower of the paper's width
    python docs/storage.py apple/DFN5B-CLIP-ViT-H-14-378 captions.txt
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from encoders import load_text_encoder
from pictures import shapes
from training.dataset import dequantize, quantize


def random_clip(captions):
    """Outputs of a random CLIP text tower, with a few channels made 30 times larger, as trained ones have them"""
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(hidden_size=1024, num_attention_heads=16, num_hidden_layers=4,
                                         intermediate_size=4096, hidden_act="quick_gelu"))
    model.eval().final_layer_norm.weight.data[[133, 725]] = 30.0
    with torch.no_grad():
        return model(torch.randint(1000, 40000, (len(captions), 77))).last_hidden_state


def float8(x):
    """e4m3 with a scale per token"""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale, 1 + 4 / x.shape[-1]


def int8_by_token(x):
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
    return (x / scale).round() * scale, 1 + 4 / x.shape[-1]


def int8_by_block(x):
    """What --caption_dtype int8 stores"""
    values, scales = quantize(x.numpy())
    return dequantize(torch.from_numpy(values), torch.from_numpy(scales)), 1 + 2 * scales.size / values.size


def main():
    captions = Path(sys.argv[2]).read_text().splitlines() if sys.argv[2:] else [shapes.scene(i)[1] for i in range(256)]
    x = load_text_encoder(sys.argv[1])(captions) if sys.argv[1:] else random_clip(captions)
    x = x.half().float()
    print(f"{len(x)} captions of {x.shape[1]} x {x.shape[2]}, largest {x.abs().max():.1f}, standard deviation "
          f"{x.std():.2f}")
    ways = {"float16": lambda x: (x, 2), "float8 e4m3, scale per token": float8, "int8, scale per token": int8_by_token,
            "int8, scale per 32 (--caption_dtype int8)": int8_by_block}
    # the error of all channels, and of those of ordinary size, which a few large ones would hide
    ordinary = x.flatten(0, 1).abs().amax(0) < 10 * x.std()
    for name, way in ways.items():
        y, each = way(x)
        error = [(a - b).square().mean().sqrt() / b.square().mean().sqrt() for a, b in
                 ((y, x), (y[..., ordinary], x[..., ordinary]))]
        print(f"{name:44} {each * x.shape[1] * x.shape[2] / 1000:6.1f} kB   relative error {100 * error[0]:.2f} %, "
              f"of the channels of ordinary size {100 * error[1]:.2f} %")


if __name__ == "__main__":
    main()
