"""common/plot.py: what is drawn where."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from common import plot


@pytest.mark.parametrize("log", ["", "y"])
def test_lines_go_where_their_points_are(tmp_path, log):
    up, down = [(0, 1.0), (5, 2.0), (10, 4.0)], [(0, 4.0, 3.5, 4.5), (10, 1.0, 0.9, 1.2)]
    plot.plot(tmp_path / "a.png", {"up": up, "down": down}, "x", "y", title="t", log=log)
    image = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    ys, xs = np.nonzero(np.abs(image - ImageColor.getrgb(plot.COLORS[0])).sum(-1) < 12)
    inside = (xs > plot.LEFT) & (ys > plot.TOP + 60)  # not the legend
    xs, ys = xs[inside], ys[inside]
    assert len(xs) > 200
    left, right = ys[xs < np.percentile(xs, 5)].mean(), ys[xs > np.percentile(xs, 95)].mean()
    assert left > right + 100  # y grows upwards
    middle = ys[np.abs(xs - (xs.min() + xs.max()) / 2) < 10].mean()
    assert (middle - right) / (left - right) == pytest.approx(0.5 if log else 2 / 3, abs=0.05)


def test_a_logarithmic_x_axis():
    image = np.asarray(plot.line_plot({"a": [(1, 0.0), (10, 1.0), (100, 0.0)]}, "x", "y", log="x")).astype(int)
    ys, xs = np.nonzero(np.abs(image - ImageColor.getrgb(plot.COLORS[0])).sum(-1) < 12)
    inside = (xs > plot.LEFT) & (ys > plot.TOP + 17) & (xs < plot.WIDTH - plot.RIGHT - 20)
    xs, ys = xs[inside], ys[inside]
    assert xs[ys == ys.min()].mean() == pytest.approx((xs.min() + xs.max()) / 2, abs=12)  # 10 is halfway


def test_many_names_stand_beside_the_lines():
    def of_the_last(n):
        """Columns that have the color of the last of n falling lines"""
        lines = {f"line {i}": [(0, 1.0 + i), (1, 0.5 * i)] for i in range(n)}
        image = np.asarray(plot.line_plot(lines, "x", "y")).astype(int)
        return np.nonzero((np.abs(image - ImageColor.getrgb(plot.COLORS[n - 1])).sum(-1) < 12).any(0))[0]
    few, many = of_the_last(6), of_the_last(7)
    assert max(few) < plot.WIDTH - plot.RIGHT and max(many) > plot.WIDTH - 100
    gaps = np.nonzero(np.diff(many) > 1)[0]  # the name is apart from the line, and the line ends before it
    assert many[gaps[0]] < plot.WIDTH - 116 < many[gaps[0] + 1]


def test_ticks_are_round_and_inside():
    for low, high, log in ((0.09, 0.55, True), (0, 10, False), (12.3, 28.9, False), (1, 5000, True), (0.1, 0.11, True)):
        numbers = plot.ticks(low, high, log)
        assert 3 <= len(numbers) <= 15 and all(low <= n <= high and len(f"{n:.4g}") <= 6 for n in numbers)


@pytest.mark.parametrize("lines, log", [({}, ""), ({"a": [(0, float("nan"))]}, ""), ({"a": [(0, 0.0)]}, "y"),
                                        ({"a": [(0, 1.0)]}, "x"), ({"a": [(0, 1.0)], "b": []}, "")])  # fmt: skip
def test_what_has_no_place_is_refused(lines, log):
    with pytest.raises(ValueError, match="a line is empty, or a number has no place"):
        plot.line_plot(lines, "x", "y", log=log)
