"""What a study's results say: tables of all its arms, what each arm's FLOPs are worth in another's, plots."""
import json
import math
import statistics
from pathlib import Path

from common.files import write_json
from common.images import open_image, picture_grid, save_picture
from common.plot import plot
from studies.compare import markdown, mean_and_spread

SCORED = ("background", "color", "size", "shape", "relation")


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
    budgets = sorted({budget for result in results for budget in result["points"]}, key=float)
    found = {budget: at_budget(results, budget).get(arm) for budget in budgets}
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
    """Return {budget: [of each seed: how many times the arm's FLOPs `base` needs for its loss]}."""
    points = [(float(budget), statistics.mean(losses(best, budget)))
              for budget, (_, best) in frontier(results, base).items()]
    found = {budget: [worth(loss, points) for loss in losses(best, budget)]
             for budget, (_, best) in frontier(results, arm).items()}
    return {budget: [x / float(budget) for x in needed] for budget, needed in found.items() if None not in needed}


def table(results, budget, base):
    """Format a row for each arm and width, with mean ± standard deviation over its seeds."""
    arms = at_budget(results, budget)
    scored = [name for name in SCORED if any(name in r["points"][budget]["scores"] for r in results
                                             if budget in r["points"])]
    rows = [["arm", "width", "parameters", "seeds", "steps", "loss before the tail", "loss",
             f"FLOPs of {base} / its own", *(f"{n}, %" for n in scored)]]
    for arm, by_width in arms.items():
        gains = multipliers(results, arm, base).get(budget) if base in arms else None
        for width, group in sorted(by_width.items()):
            best = len(by_width) > 1 and width == best_width(by_width, budget)
            percents = [[100 * right / of for right, of in (p["scores"][name] for p in at)] for name in scored
                        for at in [[r["points"][budget] for r in group if r["points"][budget]["scores"]]]]
            shown = gains and (best or len(by_width) == 1)
            rows.append([arm, f"**{width}**" if best else str(width), f"{group[0]['parameters'] / 1e6:.2f} M",
                         str(len(group)), "{:,} + {:,}".format(*group[0]["points"][budget]["steps"]),
                         mean_and_spread(losses(group, budget, "before")), mean_and_spread(losses(group, budget)),
                         mean_and_spread(gains, "{:.2f}") if shown else "",
                         *(mean_and_spread(values, "{:.0f}") if values else "" for values in percents)])
    return markdown(rows)


def levels(results):
    """Format the losses by noise level of every arm at its best width and largest budget."""
    rows, arms = [], dict.fromkeys(result["arm"] for result in results)
    for arm in arms:
        budget, (width, group) = list(frontier(results, arm).items())[-1]
        by_sigma = [result["points"][budget]["by_sigma"] for result in group]
        rows = rows or [["arm", "width", "TFLOP", *(f"sigma {sigma}" for sigma in by_sigma[0])]]
        rows.append([arm, str(width), budget, *(mean_and_spread([at[s] for at in by_sigma]) for s in by_sigma[0])])
    return markdown(rows)


def draw(folder, results, base):
    """Draw the loss against parameters at each budget, the best loss against budget, and the FLOPs' worth."""
    arms = list(dict.fromkeys(result["arm"] for result in results))
    budgets = sorted({budget for result in results for budget in result["points"]}, key=float)
    sizes = {}
    for budget in budgets:
        for arm, by_width in at_budget(results, budget).items():
            groups = sorted(by_width.values(), key=lambda group: group[0]["parameters"])
            if len(groups) > 1:
                sizes[f"{arm}, {budget} TFLOP"] = [(g[0]["parameters"] / 1e6, statistics.mean(losses(g, budget)))
                                                   for g in groups]
    best = {arm: [(float(budget), statistics.mean(values), min(values), max(values))
                  for budget, (_, group) in frontier(results, arm).items() for values in [losses(group, budget)]]
            for arm in arms}
    gains = {arm: [(float(budget), statistics.mean(values), min(values), max(values))
                   for budget, values in multipliers(results, arm, base).items()] for arm in arms}
    for name, lines, x, y, log in (("sizes", sizes, "million parameters", "validation loss", "y"),
                                   ("losses", best, "training TFLOP", "validation loss at the best width", "xy"),
                                   ("worth", {k: v for k, v in gains.items() if v}, "training TFLOP",
                                    f"FLOPs that {base} needs for the same loss / its own", "x")):
        if lines:
            plot(folder / f"{name}.png", lines, x, y, log=log)


def pictures(folder, results, columns=8):
    """Lay out the first pictures of every arm's best run with scores, an arm a row: the same prompts and noise."""
    shown, names = [], []
    for arm in dict.fromkeys(result["arm"] for result in results):
        budget, (width, group) = list(frontier(results, arm).items())[-1]
        scores = sorted(Path(folder, f"{arm}-{width}").glob(f"seed*-tail-{budget}/step_*.scores/*/guidance_*"))
        files = sorted(scores[0].glob("*.png"))[:columns] if scores else []
        if len(files) == columns:
            shown += [open_image(file).convert("RGB") for file in files]
            names += [arm, *[""] * (columns - 1)]
    if shown:
        save_picture(Path(folder, "pictures.png"), picture_grid(shown, columns, names, cell=96))


def write_report(folder, about, results, base):
    """Write results.json, table.md, plots and pictures into a study's folder, and return the tables."""
    budgets = sorted({budget for result in results for budget in result["points"]}, key=float)
    tables = [f"With {budget} training TFLOP:\n\n{table(results, budget, base)}" for budget in budgets]
    text = "\n\n".join((about, *tables, f"By noise level, at the largest budget:\n\n{levels(results)}"))
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    write_json(folder / "results.json", json.loads(json.dumps(results), parse_float=lambda x: float(f"{float(x):.5g}")))
    draw(folder, results, base)
    pictures(folder, results)
    return f"{text}\n\n{folder}/table.md, results.json, sizes.png, losses.png, worth.png, pictures.png"
