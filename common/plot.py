"""Lines as a picture, with Pillow alone."""
import math

from PIL import Image, ImageDraw, ImageFont

COLORS = ("#1f4ed8", "#d8401f", "#1f9d55", "#7a1fd8", "#c98a00", "#108fa3", "#d81f8c", "#555555",
          "#111111", "#b5a300")
WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 40, 52  # margins of the axes


def ticks(low, high, log):
    """Return some five round numbers from low to high."""
    if log and high / low > 2:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        numbers = [m * 10.0 ** e for e in exponents for m in ((1, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5))]
    else:
        step = 10.0 ** math.floor(math.log10((high - low) / 4))
        step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - 5))
        numbers = [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [number for number in numbers if low <= number <= high]


def axis(values, log):
    """Return (low, high, function from a value to [0, 1]), with a margin on both sides."""
    scale, unscale = (math.log, math.exp) if log else (float, float)
    low, high = scale(min(values)), scale(max(values))
    margin = 0.04 * (high - low) or abs(high) or 1.0
    low, high = low - margin, high + margin
    return unscale(low), unscale(high), lambda v: (scale(v) - low) / (high - low)


def plot(path, lines, x_label, y_label, **options):
    """Save the picture of line_plot as a PNG."""
    line_plot(lines, x_label, y_label, **options).save(path)


def line_plot(lines, x_label, y_label, *, title="", log="", labels=None):
    """Draw {name: [(x, y), or (x, y, lowest, highest) for a band]}; labels {name: a text a point}.

    log: "x", "y" or "xy", the axes that are logarithmic. Return a PIL image. ValueError if a line has no point, or one
    that is not finite (or on a logarithmic axis not above 0).
    """
    xs = [p[0] for points in lines.values() for p in points]
    ys = [v for points in lines.values() for p in points for v in p[1:]]
    logarithmic = ys * ("y" in log) + xs * ("x" in log)
    if not ys or not all(lines.values()) or not all(map(math.isfinite, xs + ys)) or min(logarithmic, default=1) <= 0:
        raise ValueError(f"no plot of {', '.join(lines)}: a line is empty, or a number has no place on the axis")
    (x_low, x_high, fx), (y_low, y_high, fy) = axis(xs, "x" in log), axis(ys, "y" in log)
    beside = len(lines) > 6  # so many names would hide the lines
    right, bottom = WIDTH - (120 if beside else RIGHT), HEIGHT - BOTTOM

    def xy(x, y):
        return LEFT + fx(x) * (right - LEFT), bottom - fy(y) * (bottom - TOP)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(13)
    for value in ticks(y_low, y_high, "y" in log):
        y = xy(x_low, value)[1]
        draw.line((LEFT, y, right, y), "#e2e2e2")
        draw.text((LEFT - 8, y), f"{value:g}"[:7], "black", font, anchor="rm")
    for value in ticks(x_low, x_high, "x" in log):
        x = xy(value, y_low)[0]
        draw.line((x, bottom, x, bottom + 4), "black")
        draw.text((x, bottom + 8), f"{value:g}"[:7], "black", font, anchor="mt")
    draw.line((LEFT, TOP, LEFT, bottom, right, bottom), "black")
    draw.text(((LEFT + right) / 2, HEIGHT - 8), x_label, "black", font, anchor="ms")
    draw.text((8, 8), y_label + (" (logarithmic)" if "y" in log else ""), "black", font)
    draw.text((right, 8), title, "black", font, anchor="ra")
    for n, (name, points) in enumerate(lines.items()):
        color = COLORS[n % len(COLORS)]
        if len(points[0]) == 4:
            draw.polygon([xy(p[0], p[2]) for p in points] + [xy(p[0], p[3]) for p in points[::-1]], color + "30")
        spots = [xy(*p[:2]) for p in points]
        draw.line(spots, color, 3)
        for i, (x, y) in enumerate(spots if labels or len(spots) <= 6 else ()):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), color)
            if labels:
                draw.text((x + 7, y - 7), labels[name][i], color, font, anchor="ls")
        draw.text((right + (8 if beside else -8), TOP + 4 + 17 * n), name, color, font, anchor="la" if beside else "ra")
    return image
