"""Lines as a picture, with Pillow alone."""
import math

from PIL import Image, ImageDraw, ImageFont

COLORS = ("#1f4ed8", "#d8401f", "#1f9d55", "#7a1fd8", "#c98a00", "#108fa3", "#d81f8c", "#555555", "#111111", "#b5a300")
WIDTH, HEIGHT = 760, 440
LEFT, TOP, BOTTOM = 74, 40, 388  # of the axes


def ticks(low, high, log):
    """Return some five round numbers from low to high."""
    if log and high / low > 4:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        numbers = [m * 10.0 ** e for e in exponents for m in ((1, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5))]
    else:
        step = 10.0 ** math.floor(math.log10((high - low) / 4))
        step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - 5))
        numbers = [step * n for n in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return [number for number in numbers if low <= number <= high]


def axis(values, log, start, end):
    """Return round numbers within the values, and a function from a value to its pixel, from start to end."""
    if not all(map(math.isfinite, values)) or log and min(values) <= 0:
        raise ValueError("no plot: a number is not finite, or not above 0 on a logarithmic axis")
    scale, unscale = (math.log, math.exp) if log else (float, float)
    low, high = scale(min(values)), scale(max(values))
    margin = 0.04 * (high - low) or abs(high) or 1.0
    low, high = low - margin, high + margin
    return (ticks(unscale(low), unscale(high), log),
            lambda value: start + (scale(value) - low) / (high - low) * (end - start))


def line_plot(lines, x_label, y_label, *, title="", log=""):
    """Draw {name: [(x, y), or (x, y, least, most) for a band]} as a PIL image; log: "x", "y" or "xy" is logarithmic."""
    font = ImageFont.load_default(13)
    right = max(WIDTH // 2, WIDTH - 24 - int(max(map(font.getlength, lines))))  # the names stand beside the axes
    x_ticks, x_of = axis([p[0] for points in lines.values() for p in points], "x" in log, LEFT, right)
    y_ticks, y_of = axis([y for points in lines.values() for p in points for y in p[1:]], "y" in log, BOTTOM, TOP)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    for value in y_ticks:
        draw.line((LEFT, y_of(value), right, y_of(value)), "#e2e2e2")
        draw.text((LEFT - 8, y_of(value)), f"{value:g}"[:7], "black", font, anchor="rm")
    for value in x_ticks:
        draw.line((x_of(value), BOTTOM, x_of(value), BOTTOM + 4), "black")
        draw.text((x_of(value), BOTTOM + 8), f"{value:g}"[:7], "black", font, anchor="mt")
    draw.line((LEFT, TOP, LEFT, BOTTOM, right, BOTTOM), "black")
    draw.text(((LEFT + right) / 2, HEIGHT - 8), x_label, "black", font, anchor="ms")
    draw.text((8, 8), y_label + (" (logarithmic)" if "y" in log else ""), "black", font)
    draw.text((WIDTH - 8, 8), title, "black", font, anchor="ra")
    for n, (name, points) in enumerate(lines.items()):
        color, spots = COLORS[n % len(COLORS)], [(x_of(p[0]), y_of(p[1])) for p in points]
        if len(points[0]) == 4:
            band = [(p[0], p[2]) for p in points] + [(p[0], p[3]) for p in points[::-1]]
            draw.polygon([(x_of(x), y_of(y)) for x, y in band], color + "30")
        draw.line(spots, color, 3)
        for x, y in spots if len(spots) <= 6 else ():
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), color)
        draw.text((right + 12, TOP + 4 + 17 * n), name, color, font)
    return image
