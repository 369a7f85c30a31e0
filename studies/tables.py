"""What a study's results say: tables of all its arms, what each arm's FLOPs are worth in another's, plots."""
import itertools
import json
import math
import statistics
from pathlib import Path

from common.files import write_json
from common.images import open_image, picture_grid, save_picture
from common.plot import plot
from studies.compare import markdown, mean_and_spread

SCORED = ("background", "color", "size", "shape", "relation")


def budgets_of(results):
    return sorted({budget for result in results for budget in result["points"]}, key=float)


def arms_of(results):
    return list(dict.fromkeys(result["arm"] for result in results))


def at_budget(results, budget):
    """Return {arm: {width: its results}} of those that were made up to a budget."""
    found = {}
    for result in results:
        if budget in result["points"]:
            found.setdefault(result["arm"], {}).setdefault(result["width"], []).append(result)
    return found


def losses(results, budget, key="val_loss"):
    return [result["points"][budget][key] for result in results]


def best_width(by_width, budget):
    """Return the width with the least mean loss at a budget."""
    return min(by_width, key=lambda width: statistics.mean(losses(by_width[width], budget)))


def frontier(results, arm):
    """Return {budget: (width, its results)} of an arm at its best width for each budget, the smallest first."""
    found = {budget: at_budget(results, budget).get(arm) for budget in budgets_of(results)}
    return {budget: (width := best_width(by_width, budget), by_width[width])
            for budget, by_width in found.items() if by_width}


def worth(loss, points):
    """Return the FLOPs at which a curve [(FLOPs, loss)] reaches a loss, by straight lines in the logarithms of both.

    Outside of the curve its first or last line goes on. None where there is no falling line.
    """
    points = sorted(points)
    pairs = list(zip(points, points[1:]))
    inside = [(a, b) for a, b in pairs if b[1] <= loss <= a[1]]
    chosen = inside or ([pairs[0]] if pairs and loss > points[0][1] else pairs[-1:])
    if not chosen or chosen[0][0][1] <= chosen[0][1][1]:
        return None
    (x0, y0), (x1, y1) = chosen[0]
    return x0 * math.exp(math.log(x1 / x0) * math.log(loss / y0) / math.log(y1 / y0))


def multipliers(results, arm, base):
    """Return {budget: [how many times the arm's FLOPs `base` needs for its loss]}, of each seed of the arm against each
    curve of seeds of `base`, so that the spread is that of both."""
    points = [[(float(budget), loss) for loss in losses(best, budget)]
              for budget, (_, best) in frontier(results, base).items()]
    found = {budget: [worth(loss, curve) for curve in itertools.product(*points) for loss in losses(best, budget)]
             for budget, (_, best) in frontier(results, arm).items()}
    return {budget: [x / float(budget) for x in needed] for budget, needed in found.items() if None not in needed}


def table(results, budget, base):
    """Format a row for each arm and width, with mean ± standard deviation over its seeds."""
    rows = [["arm", "width", "parameters", "seeds", "steps", "loss before the tail", "loss",
             f"FLOPs of {base} / its own"]]
    for arm, by_width in at_budget(results, budget).items():
        gains = multipliers(results, arm, base).get(budget)
        for width, group in sorted(by_width.items()):
            best = width == best_width(by_width, budget)
            rows.append([arm, f"**{width}**" if best else str(width), f"{group[0]['parameters'] / 1e6:.2f} M",
                         str(len(group)), "{:,} + {:,}".format(*group[0]["points"][budget]["steps"]),
                         mean_and_spread(losses(group, budget, "before")), mean_and_spread(losses(group, budget)),
                         mean_and_spread(gains, "{:.2f}") if best and gains else ""])
    return markdown(rows)


def attributes(results):
    """Format what is right of the pictures, in percent, of every arm and width that has been scored."""
    rows = [["arm", "width", "TFLOP", *(f"{name}, %" for name in SCORED)]]
    for budget in budgets_of(results):
        for arm, by_width in at_budget(results, budget).items():
            for width, group in sorted(by_width.items()):
                scores = [r["points"][budget]["scores"] for r in group if r["points"][budget]["scores"]]
                percents = ([100 * at[name][0] / at[name][1] for at in scores if name in at] for name in SCORED)
                if scores:
                    rows.append([arm, str(width), budget, *(mean_and_spread(p, "{:.0f}") for p in percents)])
    return markdown(rows)


def levels(results):
    """Format the losses by noise level of every arm at its best width and largest budget."""
    rows = []
    for arm in arms_of(results):
        budget, (width, group) = list(frontier(results, arm).items())[-1]
        by_sigma = [result["points"][budget]["by_sigma"] for result in group]
        rows = rows or [["arm", "width", "TFLOP", *(f"sigma {sigma}" for sigma in by_sigma[0])]]
        rows.append([arm, str(width), budget, *(mean_and_spread([at[s] for at in by_sigma]) for s in by_sigma[0])])
    return markdown(rows)


def draw(folder, results, base):
    """Draw the loss against parameters at each budget, the best loss against budget, and the FLOPs' worth."""
    flops, plots = "training TFLOP", {}
    for budget in budgets_of(results):
        lines = {arm: sorted((group[0]["parameters"] / 1e6, losses(group, budget)) for group in by_width.values())
                 for arm, by_width in at_budget(results, budget).items()}
        plots[f"sizes_{budget}"] = lines, "million parameters", f"validation loss with {budget} TFLOP", "xy"
    best = {arm: [(float(budget), losses(group, budget)) for budget, (_, group) in frontier(results, arm).items()]
            for arm in arms_of(results)}
    plots["losses"] = best, flops, "validation loss at the best width", "xy"
    gains = {arm: [(float(budget), values) for budget, values in multipliers(results, arm, base).items()]
             for arm in arms_of(results)}
    plots["worth"] = gains, flops, f"FLOPs that {base} needs for the same loss / its own", "x"
    for name, (lines, x, y, log) in plots.items():
        bands = {arm: [(at, statistics.mean(values), min(values), max(values)) for at, values in points]
                 for arm, points in lines.items() if points}
        if bands:
            plot(folder / f"{name}.png", bands, x, y, log=log)


def pictures(folder, results, columns=8):
    """Lay out the first pictures of every arm's best run with scores, an arm a row: the same prompts and noise."""
    shown, names = [], []
    for arm in arms_of(results):
        budget, (width, _) = list(frontier(results, arm).items())[-1]
        drawn = sorted(Path(folder, f"{arm}-{width}").glob(f"seed*-tail-{budget}/step_*.scores/*/guidance_*"))
        files = sorted(drawn[0].glob("*.png"))[:columns] if drawn else []
        if len(files) == columns:
            shown += [open_image(file).convert("RGB") for file in files]
            names += [arm, *[""] * (columns - 1)]
    if shown:
        save_picture(Path(folder, "pictures.png"), picture_grid(shown, columns, names, cell=96))


def write_report(folder, about, results, base):
    """Write results.json, table.md, plots and pictures into a study's folder, and return the tables."""
    tables = [f"With {budget} training TFLOP:\n\n{table(results, budget, base)}" for budget in budgets_of(results)]
    tables.append(f"By noise level, at the largest budget:\n\n{levels(results)}")
    if any(point["scores"] for result in results for point in result["points"].values()):
        tables.append(f"What is right of the pictures:\n\n{attributes(results)}")
    text = "\n\n".join((about, *tables))
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    write_json(folder / "results.json", json.loads(json.dumps(results), parse_float=lambda x: float(f"{float(x):.5g}")))
    draw(folder, results, base)
    pictures(folder, results)
    return f"{text}\n\n{folder}: table.md, results.json, {', '.join(sorted(p.name for p in folder.glob('*.png')))}"
