"""
Latents to pictures, and pictures side by side with their captions as one to look at.
"""
import math
import textwrap

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from common.files import whole

GAP = 4                 # pixels between the pictures of a grid
BACKGROUND = "#d0d0d0"  # a grey that no white picture vanishes in
MOST = 64               # pictures of a grid
# Pillow would open anything that it knows, whatever the file is called, and start Ghostscript for PostScript
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 26  # bytes of texts and profiles in a PNG


def open_image(file):
    """Open a picture of one of FORMATS, by its content. Pixels are read later, as with Image.open."""
    Image.init()
    return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])


def decode_images(vae, latents):
    """Decode latents (B,C,h,w) to a list of PIL images."""
    return to_images(vae.decode(latents))


def to_images(pixels):
    """Turn pictures (B,3,H,W) in [-1, 1] into a list of PIL images."""
    pixels = (pixels.float() / 2 + 0.5).clamp(0, 1) * 255
    return [Image.fromarray(p) for p in pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def enlarged(image, cell):
    """Enlarge a small picture without smoothing, by a whole factor, to about `cell` pixels."""
    scale = max(1, round(cell / image.width))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def picture_grid(images, columns, captions=(), cell=128):
    """Lay out the pictures row by row, each with its caption below it where there are captions."""
    shown = [enlarged(image, cell) for image in images]
    font = ImageFont.load_default(11)
    w, h = shown[0].size
    lines = [textwrap.wrap(text, w * 3 // 20)[:6] for text in captions]  # letters are 6 to 7 pixels wide
    text_height = 13 * max(map(len, lines), default=0)
    rows = math.ceil(len(shown) / columns)
    size = columns * (w + GAP) + GAP, rows * (h + text_height + GAP) + GAP
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(shown):
        row, column = divmod(i, columns)
        x, y = GAP + column * (w + GAP), GAP + row * (h + text_height + GAP)
        grid.paste(image, (x, y))
        for n, line in enumerate(lines[i] if i < len(lines) else ()):
            draw.text((x, y + h + 1 + 13 * n), line, "black", font)
    return grid


def one_below_the_other(images):
    """Return one picture of several, centred."""
    page, top = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white"), 0
    for image in images:
        page.paste(image, ((page.width - image.width) // 2, top))
        top += image.height
    return page


def save_picture(path, image, **texts):
    """Write a PNG, whole or not at all, with these texts inside."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    with whole(path) as temporary:
        image.save(temporary, "PNG", pnginfo=info)
