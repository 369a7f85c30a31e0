"""
Train a network in several ways, called arms, and compare them after equal training FLOPs and after equal steps.

    python -m studies.ablate --arm base --arm wide mixer_dim=96 --arm flat attn_ratio=1,1 mlp_ratio=1.2,1.2 --seeds 0 1
    python -m studies.ablate                # the default arms: does it pay to mask 75 % of the patches behind a mixer?
    python -m studies.ablate --arms router_unmodulated mixer_1 mixer_4 mixer_wide no_scaling dense --seeds 0
    python -m studies.ablate --data data/cifar --val_data data/cifar-val --out runs/masking-photos

--arm NAME key=value ... may be repeated. The keys are settings of train.py, which take the place of those in --config;
tail=0.25 makes the last quarter of the arm's FLOPs unmasked. Each arm and seed is one run of train.py, which has a
constant learning rate, so that every moment of it stands for a shorter run, and is validated without masking. Equal
steps are as many as the config makes without masking. Finished runs are not made again, and a stopped one goes on.
"""
import sys

from configurator import ROOT, check, configure, parse_command_line, read_defaults, script_settings

config = "config/masking.py"  # what all arms share
arms = ("unmasked", "naive", "deferred", "deferred+unmasked", "small_dense")  # default arms, where no --arm is given
seeds = (0, 1, 2)             # of each arm (>= 0)
data = ("data/shapes",)       # prepared folders
val_data = ()                 # prepared folders to validate on; empty: the last 1 % of each of `data`
out = "runs/masking"          # folder of the runs, of the table of all of them, and of the plot
budget = 10.0                 # training TFLOP of a run (> 0)
count = 128                   # prompts of the attribute scores, if `data` is the drawn set; 0: no scores (>= 0)
parallel = 0                  # runs side by side; 0: one for each GPU, or for each core (>= 0)


def take_arms(words):
    """Remove each --arm NAME key=value ... from a command line, and return them as [[NAME, key=value, ...]]."""
    given = []
    while "--arm" in words:
        start = words.index("--arm")
        end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
        given.append(words[start + 1:end])
        del words[start:end]
    return given


if __name__ == "__main__":
    given_arms = take_arms(sys.argv)
    settings = configure(globals())

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import torch

from common.files import read_jsonl, write_json
from common.flops import forward_flops, network_of, parameters
from common.plot import plot
from studies.compare import band, markdown, mean_and_spread
from training.checkpoint import code_hash
from training.dataset import min_side, read_info

ARMS = {"unmasked": "mask_ratio=0", "naive": "mixer_depth=0 depth=9", "deferred": "", "deferred+unmasked": "tail=0.25",
        "small_dense": "mask_ratio=0 mixer_depth=0 num_experts=0 dim=64 depth=7",
        # parts of the network
        "router_unmodulated": "router_unmodulated=true", "mixer_1": "mixer_depth=1", "mixer_4": "mixer_depth=4",
        "mixer_wide": "mixer_dim=96", "no_scaling": "attn_ratio=1,1 mlp_ratio=1.25,1.25", "dense": "num_experts=0"}
# what the study sets itself, and no arm
OWN = {"schedule": "constant", "unmasked_steps": 0, "checkpoint_every": 0, "keep_checkpoints": 100, "sample_every": 0}


def choose_arms(given):
    """Return the arms that --arm gave as [[name, key=value, ...]], or else the default ones that `arms` names."""
    if unknown := ", ".join(name for name in arms if name not in ARMS):
        raise ValueError(f"no arm {unknown}: there are {', '.join(ARMS)}, and --arm NAME key=value ...")
    given = given or [[name, *ARMS[name].split()] for name in arms]
    names = {words[0] for words in given if words and words[0] == Path(words[0]).name and "=" not in words[0]}
    if not given or len(names) < len(given):
        raise ValueError(f"the arms are {given}: there must be some, each with a name of its own before its settings")
    return [read_arm(*words) for words in given]


def read_arm(name, *words):
    """Return an arm of words like depth=9: its changes of the config, its costs and its plan.

    The plan is {point of comparison: (steps, unmasked steps after them, which are `tail` of the FLOPs)}.
    """
    defaults, info = script_settings("train.py", config), read_info(min_side(data[0])[0])
    known = {k: v for k, v in (defaults | {"tail": 0.0}).items()
             if k not in {*OWN, "data", "val_data", "seed", "out", "overwrite", "max_steps"}}
    arguments = []
    for key, equals, value in (word.partition("=") for word in words):
        several = isinstance(known.get(key), tuple)
        arguments += [f"--{key}", *value.split(",")] if several else [f"--{key}{equals}{value}"]
    try:
        _, changes = parse_command_line(arguments, known)
        settings, tail = defaults | changes, changes.get("tail", 0.0)
        for key, value in changes.items():
            if len(words_of(value)) != len(words_of(defaults.get(key))):
                raise ValueError(f"{key} is {value}: it needs as many values as in {config}, {key}=A,B")
        check(settings, read_defaults(ROOT / "train.py") | {"tail": (0.0, "(>= 0, < 1)")})
        if not settings["eval_every"]:
            raise ValueError("eval_every is 0: it must be at least 1")
        step, unmasked = (training_flops(settings, info, ratio) for ratio in (settings["mask_ratio"], 0.0))
        steps, last = budget * 1e12 * (1 - tail) / step, budget * 1e12 * tail / unmasked
        total = int(budget * 1e12 / training_flops(defaults, info, 0.0))
        equal_last = round(total * last / (steps + last))
        plan = {"flops": (int(steps), round(last)), "steps": (total - equal_last, equal_last)}
        if min(n for point in plan.values() for n in (point if tail else point[:1])) < 1:
            raise ValueError(f"a budget of {budget} TFLOP is less than a step for a part of it")
    except ValueError as error:
        raise ValueError(f"arm {name}: {error}") from None
    return SimpleNamespace(name=name, changes=changes, settings=settings, plan=plan, step_flops=step,
                           unmasked_flops=unmasked, parameters=parameters(network_of(settings, info))[0])


def training_flops(settings, info, mask_ratio):
    """Return the FLOPs of a training step; ValueError where they are not known."""
    forward = forward_flops(network_of(settings, info), mask_ratio, info["text_encoder"]["length"])
    if forward is None:
        raise ValueError("its FLOPs are not known, so it cannot be compared at equal FLOPs")
    return 3 * settings["batch_size"] * forward


def open_study(chosen):
    """Write down in `out` what its runs depend on, and return it; ValueError if runs that are there differ."""
    infos = [read_info(min_side(folder)[0]) for folder in (*data, *val_data)]
    study = {"model.py": code_hash(), "config": script_settings("train.py", config), "budget": budget, "count": count,
             "data": [data, val_data, [[info["rows"], info.get("source_hash"), info["settings"]] for info in infos]]}
    study = json.loads(json.dumps(study | {f"arm {arm.name}": arm.changes for arm in chosen}))
    path = Path(out, "study.json")
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    differ = {name for name, value in study.items() if before.get(name, value) != value}
    differ |= {"model.py" for r in read_results(before | study) if r.get("model_sha256") != study["model.py"]}
    if differ:
        raise ValueError(f"{out} was made with another {', '.join(sorted(differ))}: give another --out, or restore it")
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(path, before | study)
    return before | study


def read_results(study):
    """Return the results of all arms of a study, arm by arm."""
    paths = [path for key in study if key.startswith("arm ") for path in sorted(Path(out, key[4:]).glob("seed*.json"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def words_of(value):
    return [str(v) for v in value] if isinstance(value, (tuple, list)) else [str(value)]


def slots():
    return parallel or torch.cuda.device_count() or os.cpu_count()


def call(script, given):
    """Run a script on this thread's share of the machine; ValueError holds the last line of one that fails."""
    if code_hash() != json.loads(Path(out, "study.json").read_text())["model.py"]:
        raise ValueError("model.py was changed while the study ran: restore it, or begin again with another --out")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    thread = int(threading.current_thread().name.rpartition("_")[2])  # the pool numbers its threads
    share = {"CUDA_VISIBLE_DEVICES": gpus.split(",")[thread % len(gpus.split(","))],
             "OMP_NUM_THREADS": str(max(1, os.cpu_count() // slots())), "EXIT_WITH_PARENT": "1"}
    words = [word for name, value in given.items() for word in (f"--{name}", *words_of(value))]
    done = subprocess.run([sys.executable, *script, *words], text=True, capture_output=True, env=os.environ | share)
    if done.returncode:
        raise ValueError(f"{' '.join(script)} for {given['out']}: {(done.stderr.strip() or '?').splitlines()[-1]}")


def train(arm, folder, step, **changes):
    """Train a run up to a step, or on from where it is, and return its checkpoint there."""
    path = folder / f"step_{step:08d}.safetensors"
    if not path.exists():
        given = {name: value for name, value in arm.changes.items() if name != "tail"} | changes
        call(["train.py", config], given | OWN | {"data": data, "val_data": val_data, "max_steps": step, "out": folder})
    return path


def attribute_scores(path):
    """Return {attribute: [right, of]} of pictures that a checkpoint of the drawn set draws; {} of other sets."""
    if read_info(min_side(data[0])[0])["settings"]["source"] != "shapes" or not count:
        return {}
    results = path.with_suffix(".scores") / "results.json"
    if not results.exists():
        call(["eval_fid.py"], {"checkpoint": path, "captions": "shapes", "count": count, "sampler": "dpmpp_2m",
                               "steps": 20, "out": results.parent})
    return json.loads(results.read_text(encoding="utf-8"))["results"][0]["attributes"]


def run(arm, seed):
    """Train and measure an arm with a seed, and keep the result."""
    folder, points = Path(out, arm.name, f"seed{seed}"), {}
    for point, (steps, tail_steps) in sorted(arm.plan.items(), key=lambda item: item[1]):  # the shorter one first
        path, parts = train(arm, folder, steps, seed=seed), [(folder, steps, arm.step_flops)]
        if tail_steps:
            # another seed, or it would meet the pictures of the first steps again in their order; its average starts
            # anew and is shorter, as the part is short
            tail = folder.with_name(f"seed{seed}-equal-{point}")
            path = train(arm, tail, tail_steps, mask_ratio=0.0, warmup_steps=0, init_from=path, init_optimizer=True,
                         seed=seed + 1000, ema_start=1, ema_decay=min(0.98, arm.settings["ema_decay"]))
            parts.append((tail, tail_steps, arm.unmasked_flops))
        points[point] = measured(parts) | {"parameters": arm.parameters, "scores": attribute_scores(path)}
    write_json(folder.with_suffix(".json"),
               {"arm": arm.name, "seed": seed, "model_sha256": code_hash(), "points": points})
    losses = [f"{p['val_loss']:.4f} at equal {point} ({p['step']:,} steps)" for point, p in points.items()]
    print(f"{arm.name}, seed {seed}: {', '.join(losses)}", flush=True)


def measured(parts):
    """Return steps, costs, the last validation loss and the curve of parts [(folder, steps, FLOPs of a step)]."""
    flops, curve = 0.0, []
    for folder, steps, each in parts:
        curve += [((flops + e["step"] * each) / 1e12, e["val_loss"]) for e in read_jsonl(folder / "log.jsonl")
                  if "val_loss" in e and e["step"] <= steps]
        flops += steps * each
    return {"step": sum(steps for _, steps, _ in parts), "tflop": flops / 1e12, "val_loss": curve[-1][1],
            "curve": curve}


def run_all(chosen):
    """Make the runs that are missing, slots() of them side by side."""
    missing = [(arm, seed) for seed in seeds for arm in chosen if not Path(out, arm.name, f"seed{seed}.json").exists()]
    print(f"{len(seeds) * len(chosen)} runs, {len(missing)} to make, {slots()} side by side, into {out}/", flush=True)
    with ThreadPoolExecutor(slots()) as pool:
        try:
            for job in as_completed([pool.submit(run, *job) for job in missing]):
                job.result()
        finally:  # after a failure the runs under way are finished, and no other is begun
            pool.shutdown(cancel_futures=True)


def table(study, results, point):
    """Format a row for each arm, with mean ± standard deviation over its seeds."""
    scored = [name for name in ("background", "color", "size", "shape") if results[0]["points"][point]["scores"]]
    rows = [["arm", "seeds", "parameters", "steps", "training TFLOP", "validation loss", *(f"{n}, %" for n in scored)]]
    for arm in dict.fromkeys(result["arm"] for result in results):
        words = [f"{name}={','.join(words_of(value))}" for name, value in study[f"arm {arm}"].items()]
        at = [result["points"][point] for result in results if result["arm"] == arm]
        percents = ([100 * right / of for right, of in (p["scores"][name] for p in at)] for name in scored)
        rows.append([" ".join([arm, *words]), str(len(at)), f"{at[0]['parameters'] / 1e6:.2f} M", f"{at[0]['step']:,}",
                     f"{at[0]['tflop']:.2f}", mean_and_spread([p["val_loss"] for p in at]),
                     *(mean_and_spread(values, "{:.0f}") for values in percents)])
    return markdown(rows)


def describe_set():
    """Return in words which pictures the study is about."""
    about = []
    for folder in data:
        info = read_info(min_side(folder)[0])
        sizes = ", ".join(map(str, info["resolutions"]))
        about.append(f"{folder}: {info['rows']:,} pictures of {sizes} px, autoencoder {info['vae']['name']}")
    return "; ".join(about)


def main(given=()):
    if not seeds or parallel < 0:
        raise ValueError(f"seeds {seeds}, parallel {parallel}: at least one seed, and parallel at least 0")
    chosen = choose_arms(given)
    study = open_study(chosen)
    run_all(chosen)
    results = read_results(study)
    tables = (f"At equal {title}:\n\n{table(study, results, point)}"
              for point, title in (("flops", "training FLOPs"), ("steps", "steps")))
    text = "\n\n".join((describe_set(), *tables))
    Path(out, "table.md").write_text(text + "\n", encoding="utf-8")
    lines = {arm.name: band([r["points"]["flops"]["curve"] for r in results if r["arm"] == arm.name]) for arm in chosen}
    lines = {name: [p for p in points if p[0] > 0.15 * budget] for name, points in lines.items()}
    plot(Path(out, "curves.png"), lines, "training TFLOP", "unmasked validation loss", log=True)
    print(f"\n{text}\n\n{out}/table.md, {out}/curves.png")


if __name__ == "__main__":
    try:
        main(given_arms)
    except (ValueError, OSError) as error:
        raise SystemExit(f"ablate.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("ablate.py: stopped. The same command goes on") from None
