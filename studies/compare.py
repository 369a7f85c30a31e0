"""
Draw the validation losses of several runs in one plot, and print the last ones as a Markdown table.

    python -m studies.compare runs/gelu-0 runs/gelu-1 runs/relu2 --out relu2.png

Runs that differ in nothing but their seed are one line: the mean, with a band from the least to the most.
"""
import sys

from configurator import configure

runs = ()  # run folders; they may also come first, without --runs
out = ""   # file of the plot; empty: compare.png in the first run's folder

if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--runs")
    configure(globals())

import json
import statistics
from pathlib import Path

from common.files import read_json, read_jsonl, reading
from common.images import save_picture
from common.plot import line_plot
from common.processes import run_script


def mean_and_spread(values, digits=4):
    return " ± ".join(f"{f(values):.{digits}f}" for f in (statistics.mean, statistics.stdev)[:len(values)])


def markdown(rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def identity(folder):
    """Return, as a text, what makes a run what it is, but for its seed."""
    with reading(path := Path(folder, "run.json")):
        run = read_json(path)
        settings = {name: value for name, value in run["settings"].items() if name not in ("seed", "out")}
        return json.dumps([settings, run.get("model_sha256"), run.get("training_sha256")])


def validations(folder):
    """Return {step: validation loss} of a run's log."""
    with reading(path := Path(folder, "log.jsonl")):
        return {int(entry["step"]): float(entry["val_loss"]) for entry in read_jsonl(path) if "val_loss" in entry}


def main():
    if not runs:
        raise ValueError("which runs? python -m studies.compare runs/a runs/b")
    groups, lines, rows = {}, {}, [["run", "seeds", "steps", "validation loss"]]
    for run in dict.fromkeys(runs):
        groups.setdefault(identity(run), []).append(run)
    for group in groups.values():
        (first, *more), logs = group, [validations(run) for run in group]
        name, steps = f"{first} and {len(more)} more" if more else first, sorted(set(logs[0]).intersection(*logs))
        if not steps:
            raise ValueError(f"{name}: no validation loss at a step that all of them reached")
        losses = [[log[step] for log in logs] for step in steps]
        lines[name] = [(step, statistics.mean(at), min(at), max(at)) for step, at in zip(steps, losses)]
        rows.append([name, f"{len(group)}", f"{steps[-1]:,}", mean_and_spread(losses[-1])])
    path = Path(out or f"{runs[0]}/compare.png")
    save_picture(path, line_plot(lines, "step", "validation loss", log="y"))
    print(f"{markdown(rows)}\n\n{path}")


if __name__ == "__main__":
    run_script("compare.py", main)
