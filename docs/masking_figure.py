"""
Draw docs/deferred_masking.png: what deferred masking does to one picture, with the operations of training.

    python docs/masking_figure.py                   # a scene of the drawn set; or: PICTURE words of its caption
"""
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from encoders import load_vae
from model import kept_patches, patchify, unpatchify
from pictures import shapes

SIDE, GRID, SIGMA, MASK_RATIO = 144, 8, 0.7, 0.75     # pixels; 8 x 8 patches, as in config/small.py
PANEL, TOP, LARGE, SMALL = 2 * SIDE, 140, ImageFont.load_default(30), ImageFont.load_default(26)


def panels(picture):
    """Yield the picture, its noisy latent in patches, the kept ones of these, and what they should be denoised to."""
    vae, generator, patch = load_vae("pixels"), torch.Generator().manual_seed(17), SIDE // GRID
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, SIDE, SIDE, 3)
    latent = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    noisy = latent + SIGMA * torch.randn(latent.shape, generator=generator)            # EDM: x = y + sigma n
    uniforms, every = torch.rand(1, GRID * GRID, generator=generator), torch.arange(GRID * GRID)
    ids_keep = kept_patches(uniforms, MASK_RATIO)[0]                                   # 16 of the 64
    for shown, ids in ((latent, every), (noisy, every), (noisy, ids_keep), (latent, ids_keep)):
        tokens = patchify(vae.decode(shown), patch)                                    # (1, 64, patch * patch * 3)
        kept = torch.full_like(tokens, 0.85).index_copy(1, ids, tokens[:, ids])        # dropped patches are light gray
        pixels = (unpatchify(kept, patch)[0].clamp(-1, 1) + 1).mul(127.5).byte().permute(1, 2, 0)
        if shown is noisy or ids is ids_keep:                                          # lines between the patches
            pixels[patch - 1:-1:patch] = pixels[:, patch - 1:-1:patch] = 255
        yield ImageOps.expand(Image.fromarray(pixels.numpy()).resize((PANEL, PANEL), Image.NEAREST), 2, "gray")


given = sys.argv[1:] and (Image.open(sys.argv[1]).convert("RGB"), " ".join(sys.argv[2:]))
picture, caption = given or shapes.scene(40, size=SIDE)[:2]
figure = Image.new("RGB", (1800, 510), "white")
draw, middle, bottom = ImageDraw.Draw(figure), TOP + PANEL // 2, TOP + PANEL + 14
texts = (("picture", ""), ("noisy latent", "all 64 patches"), ("three quarters dropped", "16 of 64 are kept"),
         ("prediction", "loss on the 16 alone"))
for image, x, (title, note) in zip(panels(ImageOps.fit(picture, (SIDE, SIDE))), (20, 410, 936, 1482), texts):
    figure.paste(image, (x, TOP))
    draw.text((x + PANEL // 2, TOP - 12), title, "black", LARGE, anchor="ms")
    draw.text((x + PANEL // 2, bottom), note, "#505050", SMALL, anchor="ma")
draw.text((361, middle - 24), "+ noise", "black", SMALL, anchor="ms")
draw.text((1086, 40), f"caption: {caption}", "black", SMALL, anchor="ms")
draw.line((818, middle, 818, 56, 1354, 56, 1354, middle), "black", 4)                  # ends behind the two boxes
for x, top, color, name, note in ((818, middle - 70, "#d9e6ff", "patch\nmixer", "a few blocks,\nall patches"),
                                  (1354, TOP, "#ffe3c2", "backbone", "most of the\nnetwork")):
    draw.rounded_rectangle((x - 78, top, x + 78, 2 * middle - top), 14, color, "black", 3)
    draw.polygon([(x, top - 2), (x - 9, top - 18), (x + 9, top - 18)], "black")
    draw.text((x, middle), name, "black", LARGE, anchor="mm", align="center")
    draw.text((x, 2 * middle - top + 14), note, "#505050", SMALL, anchor="ma", align="center")
for tip in (382, 736, 928, 1272, 1474):
    draw.line((tip - 32, middle, tip - 8, middle), "black", 4)
    draw.polygon([(tip, middle), (tip - 16, middle - 9), (tip - 16, middle + 9)], "black")
figure.save(Path(__file__).with_name("deferred_masking.png"), optimize=True)
