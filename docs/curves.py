"""
Validation curves of runs as a PNG, with Pillow alone:

    python docs/curves.py docs/ablation.png runs/gelu runs/relu2
"""
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ["#1f4ed8", "#d8401f", "#1f9d55", "#7a1fd8"]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 70, 20, 20, 40


def curve(run):
    """[(step, validation loss)] of a run folder"""
    entries = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [(e["step"], e["val_loss"]) for e in entries if "val_loss" in e]


def main(out, runs):
    curves = {run: curve(run) for run in runs}
    steps = max(s for points in curves.values() for s, _ in points)
    losses = [math.log(v) for points in curves.values() for _, v in points]
    low, high = min(losses) - 0.05, max(losses) + 0.05

    def xy(step, loss):
        return (LEFT + step / steps * (WIDTH - LEFT - RIGHT),
                TOP + (high - math.log(loss)) / (high - low) * (HEIGHT - TOP - BOTTOM))
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for i in range(5):
        value = math.exp(low + (high - low) * i / 4)
        y = xy(0, value)[1]
        draw.line((LEFT, y, WIDTH - RIGHT, y), "#dddddd")
        draw.text((LEFT - 8, y), f"{value:.3f}", "black", anchor="rm")
        x = LEFT + i / 4 * (WIDTH - LEFT - RIGHT)
        draw.text((x, HEIGHT - BOTTOM + 8), f"{steps * i / 4:.0f}", "black", anchor="mt")
    draw.text((WIDTH / 2, HEIGHT - 12), "step; validation loss (logarithmic) upwards", "black", anchor="mm")
    for color, (run, points) in zip(COLORS, curves.items()):
        draw.line([xy(*p) for p in points], color, 3)
        n = list(curves).index(run)
        draw.text((WIDTH - RIGHT - 10, TOP + 10 + 16 * n), run, color, anchor="ra")
    image.save(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2:])
