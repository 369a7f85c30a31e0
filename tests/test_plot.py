"""common/plot.py: what is drawn where."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from common import plot


@pytest.mark.parametrize("log, height", [("", 0.5), ("x", 0.09), ("y", 0.725), ("xy", 0.5)])
def test_lines_go_where_their_points_are(tmp_path, log, height):
    """In the middle of the x axis a line from 1 to 100 over 10 is so high, as a share of its whole rise"""
    lines = {"up": [(1, 1.0), (10, 10.0), (100, 100.0)], "band": [(1, 80.0, 70.0, 90.0), (100, 80.0, 70.0, 90.0)]}
    plot.line_plot(lines, "x", "y", title="t", log=log).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image).astype(int)
    end = np.nonzero(pixels[plot.BOTTOM].sum(-1) == 0)[0].max()  # of the x axis, behind which the names stand
    other = np.abs(pixels - ImageColor.getrgb(plot.COLORS[0])).sum(-1)
    ys, xs = np.nonzero(other[:, :end + 6] < 12)
    left, middle, right = (ys[np.abs(xs - x) < 2].mean() for x in (xs.min(), (plot.LEFT + end) / 2, xs.max()))
    assert (other[:, end + 6:] < 12).any()  # its name
    assert left > right + 200 and (left - middle) / (left - right) == pytest.approx(height, abs=0.04)


def test_ticks_are_round_and_inside():
    for low, high, log in ((0.09, 0.55, True), (0, 10, False), (12.3, 28.9, False), (1, 5000, True), (0.1, 0.11, True)):
        numbers = plot.ticks(low, high, log)
        assert 3 <= len(numbers) <= 15 and all(low <= n <= high and len(f"{n:.4g}") <= 6 for n in numbers)


@pytest.mark.parametrize("point, log", [((0, float("nan")), ""), ((0, 0.0), "y"), ((0, 1.0), "x")])
def test_what_has_no_place_is_refused(point, log):
    with pytest.raises(ValueError, match="not finite, or not above 0 on a logarithmic axis"):
        plot.line_plot({"a": [point]}, "x", "y", log=log)
