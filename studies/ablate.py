"""
Does it pay to mask 75 % of the patches behind a mixer? The same small network (config/masking.py) trained in several
ways, compared after equal training FLOPs and after equal steps:

    python prepare_latents.py && python masking.py                        # the drawn set, three seeds
    python masking.py --data data/cifar --val_data data/cifar-val --out runs/masking-photos
    python masking.py --arms router_unmodulated mixer_1 mixer_4 mixer_wide no_scaling dense --seeds 0    # parts

Each arm and seed is one run of train.py with a constant learning rate, validated along the way and without masking.
Finished runs are not made again; a stopped one goes on. The table and the plot hold every run that is in `out`.
"""
from configurator import configure, read_config

arms = ("unmasked", "naive", "deferred", "deferred+unmasked", "small_dense")  # see ARMS
seeds = (0, 1, 2)             # of each arm
data = ("data/shapes",)       # prepared folders
val_data = ()                 # prepared folders to validate on; empty: the last 1 % of each of `data`
out = "runs/masking"          # folder of the runs, the table and the plot
budget = 10.0                 # training TFLOP of a run; the unmasked arm's steps with it are the "equal steps" of all
tail = 0.25                   # share of the FLOPs that "deferred+unmasked" spends on its last, unmasked part
count = 128                   # prompts of each kind for the attribute scores of the drawn set; 0: no scores
parallel = 0                  # runs side by side; 0: one for each GPU, or for each core

if __name__ == "__main__":
    settings = configure(globals())

import functools
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from bench import run_of
from common.files import write_atomic
from common.flops import forward_flops, parameters
from common.plot import plot
from training.dataset import read_info

CONFIG = "config/masking.py"
ARMS = {  # name: (what is special about it, its settings beside those of CONFIG)
    "unmasked": ("no masking", {"mask_ratio": 0.0}),
    "naive": ("75 % masked at the input; a block more in place of the mixer", {"mixer_depth": 0, "depth": 9}),
    "deferred": ("75 % masked behind the mixer", {}),
    "deferred+unmasked": ("likewise, its last quarter of the FLOPs unmasked", {}),
    "small_dense": ("no masking, narrower, dense, no mixer",
                    {"mask_ratio": 0.0, "mixer_depth": 0, "num_experts": 0, "dim": 64, "depth": 7}),
    "router_unmodulated": ("deferred; the router reads LN(x)", {"router_unmodulated": True}),
    "mixer_1": ("deferred; a mixer of 1 block instead of 2", {"mixer_depth": 1}),
    "mixer_4": ("deferred; a mixer of 4 blocks instead of 2", {"mixer_depth": 4}),
    "mixer_wide": ("deferred; a mixer as wide as the backbone, 96 instead of 64", {"mixer_dim": 96}),
    "no_scaling": ("deferred; all blocks alike", {"attn_ratio": (1.0, 1.0), "mlp_ratio": (1.25, 1.25)}),
    "dense": ("deferred; dense MLPs instead of experts", {"num_experts": 0})}
MAIN = tuple(ARMS)[:5]  # the question itself; the other arms are about parts of the network
BRANCHED = ("deferred", "deferred+unmasked")  # the second goes on from the first


stopped = threading.Event()  # no run is to be begun any more


# ---------------------------------------------------------------------------------------------------------------------
# What each run does


def options(arm, seed):
    """Settings of train.py, of an arm without its tail"""
    return {"data": data, "val_data": val_data, "seed": seed, **ARMS[arm][1]}


@functools.cache
def step_flops(arm):
    """FLOPs of a training step, {masked: .., unmasked: .., step: of the two the one that the arm takes}"""
    _, found, network = run_of(CONFIG, options(arm, 0))
    caption = read_info(found["data"][0])["text_encoder"]["length"]
    masked, unmasked = (3 * found["batch_size"] * forward_flops(network, ratio, caption)
                        for ratio in (found["mask_ratio"], 0.0))
    return {"masked": masked, "unmasked": unmasked, "step": masked, "parameters": parameters(network)[0]}


def equal_points(arm):
    """{"steps": step, "flops": step} at which an arm is compared"""
    total = budget * 1e12
    return {"steps": int(total / step_flops("unmasked")["step"]), "flops": int(total / step_flops(arm)["step"])}


def tail_of(point):
    """(masked, unmasked steps) of "deferred+unmasked" up to a point: `tail` of its FLOPs are unmasked"""
    f = step_flops("deferred")
    if point == "flops":
        return int((1 - tail) * budget * 1e12 / f["masked"]), round(tail * budget * 1e12 / f["unmasked"])
    steps = equal_points("unmasked")["steps"]
    unmasked = round(steps / (1 + f["unmasked"] * (1 - tail) / (f["masked"] * tail)))
    return steps - unmasked, unmasked


def call(script, given, slot):
    """Run a script of ours with these settings, on its share of the machine; its last line if it fails"""
    values = [[f"--{name}", *(map(str, value) if isinstance(value, (tuple, list)) else [str(value)])]
              for name, value in given.items() if value != ()]
    if stopped.is_set():
        raise ValueError("stopped")
    if torch.cuda.is_available():
        given_to_us = [n for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n]
        gpus = given_to_us or range(torch.cuda.device_count())
        share = {"CUDA_VISIBLE_DEVICES": str(gpus[slot % len(gpus)])}
    else:
        share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // slots()))}
    done = subprocess.run([sys.executable, *script, *(v for value in values for v in value)], text=True, check=False,
                          capture_output=True, env=os.environ | {"EXIT_WITH_PARENT": "1"} | share)
    if done.returncode:
        raise ValueError(f"{' '.join(script)} for {given['out']}: {(done.stderr.strip() or '?').splitlines()[-1]}")


def slots():
    return parallel or torch.cuda.device_count() or os.cpu_count() or 1


def train_to(step, folder, given, slot):
    """Train a run up to a step, or on from where it is, and give its checkpoint there"""
    path = Path(folder) / f"step_{step:08d}.safetensors"
    if not path.exists():
        call(["train.py", CONFIG], {**given, "max_steps": step, "out": folder}, slot)
    return path


def scores_of(path, slot):
    """Attribute scores of a checkpoint, with pairs seen in training: {name: (right, of)}; {} on other sets"""
    if read_info(data[0])["settings"]["source"] != "shapes" or not count:
        return {}
    scores = path.with_suffix(".scores.json")
    if not scores.exists():
        given = {"checkpoint": path, "count": count, "sampler": "dpmpp_2m", "steps": 20, "out": scores}
        call(["eval_shapes.py"], given, slot)
    return json.loads(scores.read_text())["scores"]["pairs seen in training"]["network"]


def logged(folder):
    """(seconds of training alone up to each step, [(step, validation loss, losses by noise level)]) of a run"""
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    batch, last, seconds, total = run_of(CONFIG)[1]["batch_size"], 0, {0: 0.0}, 0.0
    for e in entries:
        if "images_per_s" in e:
            total += (e["step"] - last) * batch / e["images_per_s"]
            last = e["step"]
            seconds[last] = total
    return seconds, [(e["step"], e["val_loss"], e["val_loss_by_sigma"]) for e in entries if "val_loss" in e]


def run(arm, seed, slot):
    """Train and measure one arm and seed -> what goes into its JSON file"""
    f = step_flops(arm)
    found = {"arm": arm, "seed": seed, "protocol": protocol(arm), "parameters": f["parameters"], "points": {}}
    if arm == "deferred+unmasked":
        for point in ("steps", "flops"):
            found["points"][point] = run_tail(point, seed, slot)
        found["curve"] = found["points"]["flops"].pop("curve")
        del found["points"]["steps"]["curve"]
        return found
    folder, points = f"{out}/{arm}/seed{seed}", equal_points(arm)
    paths = train_along(arm, seed, slot)
    seconds, losses = logged(folder)
    for point, step in points.items():
        loss, by_sigma = next((loss, by_sigma) for s, loss, by_sigma in losses if s == step)
        found["points"][point] = {"step": step, "tflop": step * f["step"] / 1e12, "seconds": seconds[step],
                                  "val_loss": loss, "by_sigma": by_sigma, "scores": scores_of(paths[step], slot)}
    found["curve"] = [(step * f["step"] / 1e12, loss) for step, loss, _ in losses]
    return found


def train_along(arm, seed, slot):
    """{step: checkpoint} wherever the arm is compared, and "deferred" also where the unmasked part branches off"""
    wanted = set(equal_points(arm).values())
    if arm == "deferred":
        wanted |= {tail_of(point)[0] for point in ("steps", "flops")}
    folder = f"{out}/{arm}/seed{seed}"
    return {step: train_to(step, folder, options(arm, seed), slot) for step in sorted(wanted)}


def run_tail(point, seed, slot):
    """The unmasked part that branches off the run "deferred" with its weights and moments"""
    masked, unmasked = tail_of(point)
    trunk, f = f"{out}/deferred/seed{seed}", step_flops("deferred")
    start = train_along("deferred", seed, slot)[masked]
    folder = f"{out}/deferred+unmasked/seed{seed}-equal-{point}"
    # another seed, so that it does not meet the pictures of the first steps again in their order; the average starts
    # with it and is shorter, as the part is short
    given = options("deferred", seed) | {"mask_ratio": 0.0, "warmup_steps": 0, "init_from": start,
                                         "init_optimizer": True, "seed": seed + 1000, "ema_start": 1, "ema_decay": 0.98}
    path = train_to(unmasked, folder, given, slot)
    (before, _), (after, losses) = logged(trunk), logged(folder)
    spent = masked * f["masked"]
    return {"step": masked + unmasked, "tflop": (spent + unmasked * f["unmasked"]) / 1e12, "val_loss": losses[-1][1],
            "seconds": before[masked] + after[unmasked], "by_sigma": losses[-1][2], "scores": scores_of(path, slot),
            "curve": [((spent + step * f["unmasked"]) / 1e12, loss) for step, loss, _ in losses]}


def protocol(arm):
    """What a run of an arm is a function of, besides its seed; all runs in a table must agree on it"""
    sets = {}
    for folder in (*data, *val_data):
        info = read_info(folder)
        sets[folder] = [info["rows"], info.get("source_hash", ""), info["settings"]]
    return json.loads(json.dumps({"data": data, "val_data": val_data, "budget": budget, "tail": tail, "count": count,
                                  "config": read_config(CONFIG, run_of(CONFIG)[1]), "arm": ARMS[arm][1], "sets": sets}))


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def result_path(arm, seed):
    return Path(out) / arm / f"seed{seed}.json"


def run_all():
    """Make what is missing, `slots()` runs side by side"""
    wanted = [(arm, seed) for seed in seeds for arm in arms]
    missing = [job for job in wanted if not result_path(*job).exists()]
    print(f"{len(wanted)} runs, {len(missing)} of them to make, {slots()} side by side, into {out}/", flush=True)
    # a job is a seed and arms to make one after the other: "deferred+unmasked" goes on where "deferred" was
    together = [(seed, [arm for arm in BRANCHED if (arm, seed) in missing]) for seed in seeds]
    alone = [(seed, [arm]) for arm, seed in missing if arm not in BRANCHED]
    free = queue.SimpleQueue()
    for slot in range(slots()):
        free.put(slot)

    def make(seed, names):
        slot = free.get()
        for arm in names:
            keep_result(run(arm, seed, slot))
        free.put(slot)
    stopped.clear()
    with ThreadPoolExecutor(slots()) as pool:
        jobs = [pool.submit(make, *job) for job in sorted(together + alone, key=lambda job: (job[0], -len(job[1])))]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def keep_result(found):
    path = result_path(found["arm"], found["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
    print(f"{found['arm']}, seed {found['seed']}: " + ", ".join(
        f"{p['val_loss']:.4f} at equal {name} ({p['step']:,} steps, {p['seconds'] / 60:.1f} min)"
        for name, p in found["points"].items()), flush=True)


def read_all():
    """{arm: [result of each seed]} of all runs in `out`, in the order of ARMS; ValueError if they do not go together"""
    found = {}
    for arm in ARMS:
        for path in sorted((Path(out) / arm).glob("seed*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            differ = [k for k, v in protocol(arm).items() if result["protocol"].get(k) != v]
            if differ:
                raise ValueError(f"{path} was made with another {', '.join(differ)}: give another --out, or delete it")
            found.setdefault(arm, []).append(result)
    return found


def mean_and_spread(values, form):
    text = form.format(statistics.mean(values))
    return text + (f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else "")


def table(found, point):
    """Markdown: a row for each arm, mean ± standard deviation over its seeds.

    Of the minutes the least, as other work on the machine only adds to them.
    """
    names = ("background", "color", "size", "shape")
    scored = any(r["points"][point]["scores"] for results in found.values() for r in results)
    head = ["arm", "seeds", "parameters", "steps", "training TFLOP", "validation loss", "minutes of training"]
    rows = [head + [f"{name}, %" for name in names] * scored]
    for arm, results in found.items():
        at = [r["points"][point] for r in results]
        rows.append([f"{arm}: {ARMS[arm][0]}", str(len(at)), f"{results[0]['parameters'] / 1e6:.2f} M",
                     f"{at[0]['step']:,}", f"{at[0]['tflop']:.2f}",
                     mean_and_spread([p["val_loss"] for p in at], "{:.4f}"),
                     f"{min(p['seconds'] for p in at) / 60:.1f}"])
        for name in names if scored else ():
            rows[-1].append(mean_and_spread([100 * p["scores"][name][0] / p["scores"][name][1] for p in at], "{:.0f}"))
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def curves(found):
    """{arm: [(TFLOP, mean loss, lowest, highest of the seeds)]}"""
    lines = {}
    for arm, results in found.items():
        together = zip(*([tuple(p) for p in r["curve"]] for r in results))
        at = [(same[0][0], [loss for _, loss in same]) for same in together]
        lines[arm] = [(x, statistics.mean(ys), min(ys), max(ys)) for x, ys in at if x > 0.15 * budget]
    return {arm: points for arm, points in lines.items() if points}


def main():
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not arms:
        raise ValueError(f"no arm {', '.join(unknown)}: there are {', '.join(ARMS)}")
    if not seeds or budget <= 0 or not 0 < tail < 1 or parallel < 0:
        raise ValueError(f"seeds {seeds}, budget {budget}, tail {tail}, parallel {parallel}: at least one seed, a "
                         "budget above 0, a tail between 0 and 1, and parallel at least 0")
    small = [arm for arm in arms if min(equal_points(arm).values()) < 1] + [
        arm for arm in arms if arm in BRANCHED and min(n for p in ("steps", "flops") for n in tail_of(p)) < 1]
    if small:
        raise ValueError(f"a budget of {budget} TFLOP is less than a step for a part of {', '.join(small)}")
    read_all()
    run_all()
    found = read_all()
    text = "\n\n".join(f"At equal {'training FLOPs' if point == 'flops' else 'steps'}:\n\n{table(found, point)}"
                       for point in ("flops", "steps"))
    (Path(out) / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{out}/table.md")
    lines = curves(found)
    for name, chosen in (("curves", MAIN), ("parts", ["deferred", *(arm for arm in lines if arm not in MAIN)])):
        shown = {arm: lines[arm] for arm in chosen if arm in lines}
        if set(shown) - {"deferred"} or name == "curves" and shown:
            plot(Path(out) / f"{name}.png", shown, "training TFLOP", "unmasked validation loss", log=True)
            print(f"{out}/{name}.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"masking.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("masking.py: stopped. The same command goes on") from None
