"""
Train networks in several ways, called arms, and compare them at equal training FLOPs.

    python -m studies.ablate --seeds 0 1    # what does masking gain? the arms of ARMS, with config/masking.py
    python -m studies.ablate --widths 32 64 --arm deferred --arm flat mlp_ratio=1.2,1.2
    python -m studies.ablate --config config/tiny.py --budgets 10 20 --arm gelu --arm relu2 model=my_model.py

Each --arm NAME key=value ... changes settings of train.py, and model=FILE takes another model.py, or code to put
behind the repository's, as studies/merged.py is. A name alone stands for the arm of that name in ARMS, or else for the
config itself. Arms come last on the command line, and the first one of a study is what the others are compared with.

Each arm, width and seed is one run at a constant rate, from a copy of the Python files. At each budget a second phase
branches off, without masking and with a falling rate, and that is what is compared. The same command goes on where it
was, and may name more arms, widths and seeds, and larger budgets. What study.json has is not made again, even where the
run's folder was deleted.
"""
import itertools
import sys

from configurator import ROOT, configure, parse_command_line, script_settings

config = "config/masking.py"  # config file of train.py that all arms share
data = ()                     # prepared folders; empty: those of the config
val_data = ()                 # prepared folders to validate on; empty: those of the config
out = "runs/study"            # folder of the runs, study.json, table.md, losses.png and pictures.png
widths = (0,)                 # widths, with which the mixer's and the learning rate change; 0: the config's (>= 0)
budgets = (10.0, 30.0, 100.0)  # training TFLOP at which the arms are compared (> 0)
scores = True                 # with the built-in set: draw 2 x 256 pictures at each budget, and count what is right
tail = 0.2                    # share of a budget that its unmasked end takes (> 0, < 1)
seeds = (0,)                  # seeds of every arm (>= 0)
parallel = 0                  # runs side by side; 0: one for each GPU, or for each core (>= 0)

if __name__ == "__main__":
    parts = [list(words) for is_arm, words in itertools.groupby(sys.argv, "--arm".__eq__) if not is_arm]
    sys.argv, *chosen_arms = parts
    configure(globals())

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
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.files import read_bytes, read_json, write_bytes, write_json
from common.folders import FREE, described, lock, same_command
from common.images import picture_grid, save_picture
from common.plot import line_plot
from common.processes import run_script
from evaluation.prompts import prompt_inside
from pictures.decode import load_picture
from pictures.prepared import min_side, read_info
from studies.compare import markdown, mean_and_spread, validations
from training.checkpoint import step_of, step_path, steps_of, training_hash
from training.meter import FORMULAS

ARMS = {"deferred": "",  # the paper's; each arm has its best rate (docs/masking.md)
        "deferred_adamw": "optimizer=adamw learning_rate=1e-3",
        "naive": "mixer_depth=0 depth=6",
        "improved": "mask=grouped mixer_conv=true",
        "unmasked": "mask_ratio=0 batch_size=32 learning_rate=2.5e-3",
        "coarse": "mask_ratio=0 patch_size=2",
        "merged": "mask_ratio=0 mixer_depth=2 model=studies/merged.py"}
NOT_OF_ARMS = {"data", "val_data", "out", "seed", "max_steps", "unmasked_steps", "schedule", "check"}
TRUNK = {"schedule": "constant", "unmasked_steps": 0}  # of the run that all budgets branch off
TAIL = {"schedule": "cosine", "mask_ratio": 0, "warmup_steps": 0, "ema_decay": 0, "init_optimizer": True}
DRAWING = {"steps": 12, "sampler": "dpmpp_2m"}  # how pictures are drawn that are scored
KINDS = "seen", "unseen"  # of pairs of colour and shape
SCORES = "all", "shape", "relation"  # in the table
COLUMNS = 8  # pictures of each arm in pictures.png
FAILED = threading.Event()  # one has, and the others stop where their next script would begin
REPORTING = threading.Lock()
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
    model, settings = read_bytes(ROOT / changes.pop("model", "model.py")), settings | changes
    if b"class MicroDiTConfig" not in model:
        model = read_bytes(ROOT / "model.py") + b"\n\n" + model
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
    (folder / "plan.py").write_text("from studies import ablate\nablate.print_costs()\n")


def open_study(arms):
    """Return study.json: what the runs in `out` depend on, and their results; ValueError if that is something else."""
    lock(out)
    settings = script_settings("train.py", config)
    study = {"config": {name: value for name, value in settings.items() if name not in FREE}, "tail": tail,
             "train.py and training/": training_hash(), "pictures": []}
    for folder, side in map(min_side, (*(data or settings["data"]), *(val_data or settings["val_data"]))):
        study["pictures"].append([side, *map(read_info(folder).get, ("rows", "source_hash", "settings"))])
    for arm in arms:
        model = hashlib.sha256((arm.code / "model.py").read_bytes()).hexdigest()
        study |= {f"arm {arm.label}": arm.changes, f"model.py of {arm.label}": model}
    before = described(out, "study.json", r".+-\d+|table\.md|(losses|pictures)\.png") or {}
    same_command(out, before, study)
    return {"first": [arms[0].name, arms[0].width], "results": []} | before | study


def print_costs():
    """Print the TFLOP of a masked and of a whole step. An arm's plan.py calls this, beside its train.py and model.py.

    Real steps are made, and their products counted: forward, backward, Muon's, and of passes without gradients.
    """
    train = importlib.import_module("train")
    train.settings = configure(vars(train))

    def count_instead(make_step, *_):
        costs = []
        for masked in (train.mask_ratio > 0, False):
            # other kinds of attention are not counted on every machine
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                make_step(masked)
            costs.append(counter.get_total_flops() / 1e12)
        print(json.dumps(costs))
    train.try_run = count_instead  # which --check calls when all is set up
    run_script("train.py", train.main)


def plan(budget, masked_cost, whole_cost):
    """Return (steps, steps of the end on whole pictures, TFLOP) that spend a budget, where steps cost so many TFLOP."""
    steps, end = int(budget * (1 - tail) / masked_cost), round(budget * tail / whole_cost)
    if min(steps, end) < 1:
        raise ValueError(f"a budget of {budget:g} TFLOP is too small: a step costs {masked_cost:.3g}, a whole one "
                         f"{whole_cost:.3g}")
    return steps, end, steps * masked_cost + end * whole_cost


def slots():
    return parallel or torch.cuda.device_count() or os.cpu_count()


def call(arm, script, *words, **more):
    """Run a script beside an arm's model.py, and return what it printed; ValueError if it fails."""
    gpu, command = GPUS.get(), [sys.executable, arm.code / script, *words]
    for name, value in (more | gpu).items():
        command += [f"--{name}", *(value if isinstance(value, (tuple, list)) else [value])]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // slots())), "EXIT_WITH_PARENT": "1"}
    try:
        if FAILED.is_set():
            raise ValueError(f"arm {arm.label}: stopped, as another arm failed")
        done = subprocess.run(list(map(str, command)), text=True, capture_output=True, env=env)
        if done.returncode:
            FAILED.set()
            raise ValueError(f"arm {arm.label}: {(done.stderr.strip() or '?').splitlines()[-1]}")
    finally:
        GPUS.put(gpu)
    return done.stdout


def call_train(arm, script, **more):
    """Run train.py or plan.py with the settings of an arm."""
    folders = {name: value for name, value in (("data", data), ("val_data", val_data)) if value}
    return call(arm, script, config, **arm.changes | {"sample_every": 0, "eval_every": 10 ** 9} | folders | more)


def plan_arm(arm):
    printed = call_train(arm, "plan.py", out=Path(out, arm.label), seed=seeds[0], compile=False, check=True)
    try:
        arm.plans = {budget: plan(budget, *json.loads(printed.splitlines()[-1])) for budget in sorted(budgets)}
    except ValueError as error:
        raise ValueError(f"arm {arm.label}: {error}") from None


def run(study, arm, seed):
    """Train an arm with a seed to every budget, as far as that is not done yet, and take the results into the study."""
    trunk = Path(out, arm.label, f"seed{seed}")
    for budget, (steps, end, tflop) in arm.plans.items():
        about = {"arm": arm.name, "width": arm.width, "seed": seed, "budget": budget}
        if not (result := next((r for r in study["results"] if about.items() <= r.items()), None)):
            train(arm, seed, trunk, branch(arm, budget, seed), steps, end)
            before, loss = (validations(path).get(n) for path, n in ((trunk, steps), (branch(arm, budget, seed), end)))
            if loss is None:
                raise ValueError(f"{branch(arm, budget, seed)}/log.jsonl lacks the validation loss of step {end}, the "
                                 "last: delete that folder and give the same command again")
            result = about | {"tflop": tflop, "steps": [steps, end], "val_loss_before": before, "val_loss": loss}
            print(f"{arm.label}, {budget:g} TFLOP, seed {seed}: {loss:.4f}", flush=True)
            report(study, result)
        built_in = all(settings["source"] == "shapes" for *_, settings in study["pictures"])
        if scores and built_in and "scores" not in result and branch(arm, budget, seed).exists():
            report(study, result | {"scores": score(arm, branch(arm, budget, seed))})


def train(arm, seed, trunk, folder, steps, end):
    """Train the trunk to so many steps, and from there the end on whole pictures, as far as that is not done yet."""
    start, there = step_path(trunk, steps), [step_of(path) for path in steps_of(trunk)]
    if step_path(folder, end).exists():
        return
    if not start.exists():
        if there and max(there) > steps:
            raise ValueError(f"{trunk} is past step {steps:,}, where a budget would branch off: only larger ones can "
                             "be added, so leave it out or give another --out")
        call_train(arm, "train.py", out=trunk, seed=seed, max_steps=steps, **TRUNK)
    call_train(arm, "train.py", out=folder, seed=seed, max_steps=end, init_from=start, **TAIL)


def branch(arm, budget, seed):
    return Path(out, arm.label, f"{budget:g}-seed{seed}")


def score(arm, folder):
    """Return {"seen" and "unseen": {attribute: [right, of]}} of pictures that a run's network draws."""
    path = scores_of(folder) / "results.json"
    if not path.exists():
        call(arm, "eval_fid.py", checkpoint=folder, out=path.parent, **DRAWING)
    return {name: entry["attributes"] for name, entry in zip(KINDS, read_json(path)["results"])}


def scores_of(folder):
    return folder.with_name(f"{folder.name}-scores")


def curves_of(results):
    """Return {(arm, width): {seed: [(TFLOP, loss)]}}."""
    curves = defaultdict(lambda: defaultdict(list))
    for r in sorted(results, key=lambda r: r["budget"]):
        curves[r["arm"], r["width"]][r["seed"]].append((r["tflop"], r["val_loss"]))
    return curves


def mean_curve(by_seed):
    """Return [(TFLOP, mean loss, least, most)] of {seed: [(TFLOP, loss)]}."""
    losses = defaultdict(list)
    for tflop, loss in sum(by_seed.values(), []):
        losses[tflop].append(loss)
    return [(tflop, statistics.mean(at), min(at), max(at)) for tflop, at in sorted(losses.items())]


def summarize(results, first):
    """Return the results as a Markdown table, with mean ± standard deviation over the seeds. first: arm, width."""
    curves, groups = curves_of(results), defaultdict(list)
    for r in results:
        groups[r["budget"], r["arm"], r["width"]].append(r)
    rows = []
    for (budget, arm, width), group in groups.items():
        losses, tflop, steps = [r["val_loss"] for r in group], group[0]["tflop"], group[0]["steps"]
        judged = [r["scores"] for r in group if "scores" in r]
        shares = [", ".join(mean_and_spread([100 * s[kind][name][0] / max(1, s[kind][name][1]) for s in judged], 1)
                            for kind in KINDS if judged) for name in SCORES]
        gains = [gain(r, curves[arm, width][r["seed"]], curves[tuple(first)][r["seed"]]) for r in group]
        worth = "" if None in gains else mean_and_spread(gains, 2)
        rows.append((budget, -statistics.mean(losses), [
            f"{tflop:.3g}", arm, f"{width}", f"{len(group)}", "{:,} + {:,}".format(*steps),
            mean_and_spread([r["val_loss_before"] for r in group]), mean_and_spread(losses), *shares, worth]))
    titles = ["TFLOP", "arm", "width", "seeds", "steps", "loss before the end", "loss",
              *(f"{name} right, seen and unseen, %" for name in SCORES),
              f"FLOPs of {first[0]} for the same loss (or its last one) / its own"]
    return markdown([titles, *(row for *_, row in sorted(rows, key=lambda row: row[:2]))])


def gain(result, own, base):
    """Return how many times a result's FLOPs the curve of the first arm needs for its loss, or None if not known.

    Where that curve does not come so far, it is about the loss at its end, and where the arm's own has it.
    """
    if base and result["val_loss"] < base[-1][1]:
        at = flops_at(base[-1][1], own)
        return at and base[-1][0] / at
    at = flops_at(result["val_loss"], base)
    return at and at / result["tflop"]


def flops_at(loss, points):
    """Return the FLOPs at which a curve [(FLOPs, loss)] has a loss, straight on logarithmic axes, or None."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 <= loss <= y0 and y1 < y0:
            return x0 * math.exp(math.log(x1 / x0) * math.log(loss / y0) / math.log(y1 / y0))
    return None


def draw_losses(results):
    """Return a plot of the mean loss of the seeds at each budget, with a band from the least to the most."""
    widths = {r["width"] for r in results}
    lines = {f"{arm}, {width} wide" if len(widths) > 1 else arm: mean_curve(by_seed)
             for (arm, width), by_seed in curves_of(results).items()}
    return line_plot(lines, "training TFLOP", "validation loss", log="xy")


def draw_pictures(arms):
    """Return a grid with a row for each arm: its pictures of the same prompts, with one seed and the largest budget."""
    found = [(arm.label if len(widths) > 1 else arm.name, path) for arm in arms
             for path in sorted(scores_of(branch(arm, max(budgets), seeds[0])).glob("shapes/*/*.png"))[:COLUMNS]]
    texts = [f"{name}: {prompt_inside(path)}" for name, path in found]
    return found and picture_grid([load_picture(path, 1) for _, path in found], COLUMNS, texts)


def report(study, *new):
    """Take in new results, and write study.json, the table and the plot."""
    with REPORTING:
        known = {tuple(r[key] for key in ("arm", "width", "seed", "budget")): r for r in (*study["results"], *new)}
        study["results"] = list(known.values())
        write_json(Path(out, "study.json"), study)
        write_bytes(Path(out, "table.md"), f"{summarize(study['results'], study['first'])}\n".encode())
        save_picture(Path(out, "losses.png"), draw_losses(study["results"]))


def main(chosen=()):
    if not (seeds and widths and budgets):
        raise ValueError(f"seeds {seeds}, widths {widths}, budgets {budgets}: at least one of each")
    FAILED.clear()
    with tempfile.TemporaryDirectory() as code, ThreadPoolExecutor(slots()) as pool:
        arms = [read_arm(code, width, *words) for words in chosen or [[name] for name in ARMS] for width in widths]
        if len({arm.label for arm in arms}) < len(arms):
            raise ValueError(f"two arms have one name: {', '.join(arm.label for arm in arms)}")
        study, gpus = open_study(arms), torch.cuda.device_count()
        for i in range(slots()):
            GPUS.put({"device": f"cuda:{i % gpus}"} if gpus else {})
        list(pool.map(plan_arm, arms))  # which writes nothing
        write_json(Path(out, "study.json"), study)
        print(f"{len(arms) * len(seeds)} arms and seeds, {slots()} side by side, into {out}/", flush=True)
        for ended in as_completed([pool.submit(run, study, arm, seed) for seed in seeds for arm in arms]):
            ended.result()  # raises what the first that failed has raised
        report(study)
    if pictures := draw_pictures(arms):
        save_picture(Path(out, "pictures.png"), pictures)
    print(f"\n{read_bytes(Path(out, 'table.md')).decode()}\n{out}: study.json, table.md, losses.png"
          + ", pictures.png" * bool(pictures))


if __name__ == "__main__":
    run_script("ablate.py", lambda: main(chosen_arms))
