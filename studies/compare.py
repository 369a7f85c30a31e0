"""
Draw the validation curves of several runs in one plot, and print their last losses as a Markdown table.

    python -m studies.compare runs/gelu runs/relu2
    python -m studies.compare runs/gelu-0 runs/gelu-1 runs/relu2-0 runs/relu2-1 --out relu2.png

Runs that differ in nothing but their seed are one line: the mean, with a band from the least to the most.
"""
import sys

from configurator import configure

runs = ()                 # run folders; they may also come first, without --runs
out = "compare.png"       # file of the plot

if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--runs")
    settings = configure(globals())

import json
import statistics
from pathlib import Path

from common.files import read_jsonl
from common.plot import plot
from training import checkpoint


def mean_and_spread(values, form="{:.4f}"):
    """Format the mean of the values, and their standard deviation where there are several."""
    return " ± ".join(form.format(f(values)) for f in (statistics.mean, statistics.stdev)[:len(values)])


def band(curves):
    """Return [(x, mean, least, most)] of curves [(x, y)], at every x that all of them have."""
    curves = [dict(curve) for curve in curves]
    shared = {x: [curve[x] for curve in curves] for x in curves[0] if all(x in curve for curve in curves)}
    return [(x, statistics.mean(ys), min(ys), max(ys)) for x, ys in shared.items()]


def markdown(rows):
    """Format rows of texts as a Markdown table, the first as its head."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def described(run):
    """Return (seed, all else that makes a run what it is) of a run folder."""
    path = Path(run) / "run.json"
    about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else checkpoint.read(checkpoint.find(run))[0]
    rest = {name: value for name, value in about["settings"].items() if name not in ("seed", "out", "overwrite")}
    return about["settings"]["seed"], json.dumps([rest, about.get("model_sha256")], sort_keys=True)


def main():
    if not runs:
        raise ValueError("which runs? python -m studies.compare runs/a runs/b")
    groups, lines, rows = {}, {}, [["run", "seeds", "steps", "validation loss"]]
    for run in dict.fromkeys(runs):
        seed, rest = described(run)
        groups.setdefault(run if seed in groups.get(rest, ()) else rest, {})[seed] = run
    for group in groups.values():  # {seed: run}
        first, *more = group.values()
        logs = [{e["step"]: e["val_loss"] for e in read_jsonl(f"{run}/log.jsonl") if "val_loss" in e}
                for run in (first, *more)]
        name = f"{first} and {len(more)} more" if more else first
        lines[name] = band(logs)
        if not lines[name]:
            raise ValueError(f"{name}: no validation loss at a step that all of them reached")
        last = lines[name][-1][0]
        rows.append([name, ", ".join(map(str, group)), f"{last:,}", mean_and_spread([log[last] for log in logs])])
    plot(out, lines, "step", "validation loss", log="y")
    print(f"{markdown(rows)}\n\n{out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"compare.py: {error}") from None
