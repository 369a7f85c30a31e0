"""
Train networks in several ways, called arms, and compare them at equal training FLOPs.

    python -m studies.ablate                # what does masking gain? the arms of ARMS, with config/masking.py
    python -m studies.ablate --widths 32 64 --arm deferred --arm flat mlp_ratio=1.2,1.2
    python -m studies.ablate --config config/tiny.py --budgets 10 20 --arm gelu --arm relu2 model=my_model.py

Each --arm NAME key=value ... changes settings of train.py, and model=FILE takes another model.py. A name alone stands
for the arm of that name in ARMS, or else for the config itself. Arms come last on the command line.

Each arm, width, budget and seed is one run of train.py, which ends unmasked, from a copy of the Python files. The same
command goes on where it was, and may name more arms, widths, budgets and seeds.
"""
import itertools
import sys

from configurator import ROOT, configure, parse_command_line, script_settings

config = "config/masking.py"  # config file of train.py that all arms share
data = ()                     # prepared folders; empty: those of the config
val_data = ()                 # prepared folders to validate on; empty: those of the config
out = "runs/study"            # folder of the runs, results.json, table.md and losses.png
widths = (0,)                 # widths, with which the mixer's and the learning rate change; 0: the config's (>= 0)
budgets = (1.0, 3.0, 10.0)    # training TFLOP at which the arms are compared (> 0)
tail = 0.1                    # share of a budget that its unmasked end takes (>= 0, < 1)
seeds = (0, 1, 2)             # seeds of every arm (>= 0)
parallel = 0                  # runs side by side; 0: one for each GPU, or for each core (>= 0)

if __name__ == "__main__":
    parts = [list(words) for is_arm, words in itertools.groupby(sys.argv, "--arm".__eq__) if not is_arm]
    sys.argv, *chosen_arms = parts
    configure(globals())

import functools
import hashlib
import importlib
import json
import math
import os
import queue
import re
import statistics
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.files import read_bytes, write_bytes, write_json
from common.folders import FREE, described, lock, same_command
from common.images import save_picture
from common.plot import line_plot
from common.processes import run_script
from pictures.prepared import min_side, read_info
from studies.compare import markdown, mean_and_spread, validations
from training.checkpoint import step_path, training_hash

ARMS = {"deferred": "", "naive": "mixer_depth=0 depth=6 learning_rate=1.5e-3",  # each with its best rate and batch at
        "unmasked": "mask_ratio=0 batch_size=4 learning_rate=8e-4",             # width 64 (docs/log.md)
        "improved": "mask=grouped mixer_conv=true learning_rate=8e-4"}
NOT_OF_ARMS = {"data", "val_data", "out", "seed", "max_steps", "unmasked_steps", "check"}
PLACES = 8  # where FLOPs of a run are counted
GPUS = queue.SimpleQueue()  # {"device": GPU} for each run that may begin now


def read_arm(folder, width, name, *words):
    """Return an arm of words like depth=9 at a width, with its copy of the Python files in the folder."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"arm {name!r}: --arm needs a name for its folders, and then settings like depth=9")
    settings = script_settings("train.py", config)
    allowed = {key: value for key, value in settings.items() if key not in NOT_OF_ARMS} | {"model": "model.py"}
    arguments = []
    for key, _, value in (word.partition("=") for word in words or ARMS.get(name, "").split()):
        arguments += [f"--{key}", *value.split(",")]
    _, changes = parse_command_line(arguments, allowed)
    model, settings = read_bytes(changes.pop("model", ROOT / "model.py")), settings | changes
    if width:
        factor, head = width / settings["dim"], settings["head_dim"]
        changes |= {"dim": width, "mixer_dim": max(1, int(settings["mixer_dim"] * factor / head)) * head,
                    "learning_rate": float(f"{settings['learning_rate'] / factor:.3g}")}
    width = width or settings["dim"]
    code = Path(folder, f"{name}-{width}")
    copy_code(code, model)
    return SimpleNamespace(name=name, width=width, label=code.name, changes=changes, code=code)


def copy_code(folder, model):
    """Copy the Python files of the repository, with another text for model.py, and write plan.py beside them."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(model if path == ROOT / "model.py" else path.read_bytes())
    (folder / "plan.py").write_text(f"from studies import ablate\nablate.print_plans({budgets}, {tail})\n")


def open_study(arms):
    """Return what the runs in `out` depend on, for study.json; ValueError if runs there depend on something else."""
    lock(out)
    settings = script_settings("train.py", config)
    study = {"config": {name: value for name, value in settings.items() if name not in FREE}, "tail": tail,
             "train.py and training/": training_hash(), "pictures": []}
    for folder, side in map(min_side, (*(data or settings["data"]), *(val_data or settings["val_data"]))):
        study["pictures"].append([side, *map(read_info(folder).get, ("rows", "source_hash", "settings"))])
    for arm in arms:
        model = hashlib.sha256((arm.code / "model.py").read_bytes()).hexdigest()
        study |= {f"arm {arm.label}": arm.changes, f"model.py of {arm.label}": model}
    before = described(out, "study.json", r".+-\d+|results\.json|table\.md|losses\.png") or {}
    same_command(out, before, study)
    return before | study


def print_plans(budgets, tail):
    """Print the plan for each budget. An arm's plan.py calls this, beside the arm's train.py and model.py.

    It makes real steps and counts their products: forward, backward, the optimizer's, and a pass without gradients.
    """
    train = importlib.import_module("train")
    train.settings = configure(vars(train))

    def plan_instead(make_step, state, *_):
        @functools.cache
        def cost(step, masked, unmasked):
            state.step, train.max_steps, train.unmasked_steps = step, masked + unmasked, unmasked
            # other kinds of attention are not counted on every machine
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                make_step(train.is_masked(step))
            return counter.get_total_flops() / 1e12
        print(json.dumps([plan(cost, budget, tail) for budget in budgets]))
    train.try_run = plan_instead  # which --check calls when all is set up
    run_script("train.py", train.main)


def plan(cost, budget, tail):
    """Return (masked steps, unmasked ones after them, TFLOP) of the run that spends a budget.

    cost(step, masked, unmasked) is the cost of a step in a run of so many masked and unmasked steps. It may depend on
    their numbers, so the plan is made repeatedly.
    """
    masked, unmasked = 1, 1
    for _ in range(4):
        each = statistics.mean(cost((2 * i + 1) * masked // (2 * PLACES), masked, unmasked) for i in range(PLACES))
        last = cost(masked + unmasked - 1, masked, unmasked)
        masked, unmasked = int(budget * (1 - tail) / each), round(budget * tail / last)
        if masked < 1 or tail and unmasked < 1:
            raise ValueError(f"a budget of {budget:g} TFLOP is too small: a step costs {each:.3g}, unmasked {last:.3g}")
    return masked, unmasked, masked * each + unmasked * last


def slots():
    return parallel or torch.cuda.device_count() or os.cpu_count()


def call(arm, script, **more):
    """Run train.py or plan.py with the settings of an arm, and return what it printed; ValueError if it fails."""
    gpu, command = GPUS.get(), [sys.executable, arm.code / script, config]
    folders = {name: value for name, value in (("data", data), ("val_data", val_data)) if value}
    for name, value in (gpu | arm.changes | {"sample_every": 0, "eval_every": 500} | folders | more).items():
        command += [f"--{name}", *(value if isinstance(value, (tuple, list)) else [value])]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // slots())), "EXIT_WITH_PARENT": "1"}
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True, env=env)
    GPUS.put(gpu)
    if done.returncode:
        raise ValueError(f"arm {arm.label}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return done.stdout


def plan_arm(arm):
    printed = call(arm, "plan.py", out=Path(out, arm.label), seed=seeds[0], compile=False, check=True)
    arm.plans = dict(zip(budgets, json.loads(printed.splitlines()[-1])))


def run(arm, seed, budget):
    """Train an arm with a seed and a budget, where that is not done yet, and return the result."""
    masked, unmasked, tflop = arm.plans[budget]
    folder, steps = Path(out, arm.label, f"{budget:g}-seed{seed}"), masked + unmasked
    if not step_path(folder, steps).exists():
        call(arm, "train.py", out=folder, seed=seed, max_steps=steps, unmasked_steps=unmasked)
    loss = validations(folder).get(steps)
    if loss is None:
        raise ValueError(f"{folder}/log.jsonl lacks the validation loss of step {steps}, the last: delete {folder} and "
                         "give the same command again")
    print(f"{arm.label}, {budget:g} TFLOP, seed {seed}: {loss:.4f}", flush=True)
    return {"arm": arm.name, "width": arm.width, "seed": seed, "budget": budget, "tflop": tflop,
            "steps": [masked, unmasked], "val_loss": loss}


def summarize(results):
    """Return the results as a Markdown table, and {arm: [(TFLOP, mean loss, least, most) at its best width]}."""
    groups, curves = defaultdict(list), defaultdict(dict)
    for r in sorted(results, key=lambda r: r["budget"]):
        groups[r["budget"], r["arm"], r["width"]].append(r)
    for (budget, arm, _), group in groups.items():
        losses = [r["val_loss"] for r in group]
        point = group[0]["tflop"], statistics.mean(losses), min(losses), max(losses)
        curves[arm][budget] = min(point, curves[arm].get(budget, point), key=lambda p: p[1])
    curves = {arm: list(points.values()) for arm, points in curves.items()}
    rows = [["TFLOP", "arm", "width", "seeds", "steps", "loss", "FLOPs of the first arm / its own"]]
    for (_, arm, width), group in groups.items():
        losses, tflop, steps = [r["val_loss"] for r in group], group[0]["tflop"], group[0]["steps"]
        needed = flops_at(statistics.mean(losses), curves[results[0]["arm"]])
        rows.append([f"{tflop:.3g}", arm, f"{width}", f"{len(group)}", "{:,} + {:,}".format(*steps),
                     mean_and_spread(losses), f"{needed / tflop:.2f}" if needed else ""])
    return markdown(rows), curves


def flops_at(loss, points):
    """Return the FLOPs at which a curve has a loss, straight on logarithmic axes; None where it never has."""
    for (x0, y0, *_), (x1, y1, *_) in zip(points, points[1:]):
        if y1 <= loss <= y0 and y1 < y0:
            return x0 * math.exp(math.log(x1 / x0) * math.log(loss / y0) / math.log(y1 / y0))
    return None


def main(chosen=()):
    if not (seeds and widths and budgets):
        raise ValueError(f"seeds {seeds}, widths {widths}, budgets {budgets}: at least one of each")
    with tempfile.TemporaryDirectory() as code, ThreadPoolExecutor(slots()) as pool:
        arms = [read_arm(code, width, *words) for words in chosen or [[name] for name in ARMS] for width in widths]
        if len({arm.label for arm in arms}) < len(arms):
            raise ValueError(f"two arms have one name: {', '.join(arm.label for arm in arms)}")
        study, gpus = open_study(arms), torch.cuda.device_count()
        for i in range(slots()):
            GPUS.put({"device": f"cuda:{i % gpus}"} if gpus else {})
        list(pool.map(plan_arm, arms))  # which writes nothing
        write_json(Path(out, "study.json"), study)
        jobs = [(arm, seed, budget) for seed in seeds for budget in sorted(budgets) for arm in arms]
        print(f"{len(jobs)} runs, {slots()} side by side, into {out}/", flush=True)
        results = list(pool.map(run, *zip(*jobs)))  # after a failure no other run is begun
    table, curves = summarize(results)
    write_json(Path(out, "results.json"), results)
    write_bytes(Path(out, "table.md"), f"{table}\n".encode())
    save_picture(Path(out, "losses.png"), line_plot(curves, "training TFLOP", "loss at the best width", log="xy"))
    print(f"\n{table}\n\n{out}: table.md, results.json, losses.png")


if __name__ == "__main__":
    run_script("ablate.py", lambda: main(chosen_arms))
