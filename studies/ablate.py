"""
Train a network in several ways, called arms, at several widths, and compare them at equal training FLOPs.

    python -m studies.ablate --arm base --arm flat attn_ratio=1,1 mlp_ratio=1.2,1.2 --base base --seeds 0 1
    python -m studies.ablate --widths 32 64 96 --seeds 0      # the default arms: what do masking and its variants gain?
    python -m studies.ablate --budgets 2 --vary learning_rate=4e-4,8e-4 batch_size=8,16 --seeds 0 --out runs/sweep
    python -m studies.ablate --data data/clothing --val_data data/clothing-val --out runs/masking-photos

--arm NAME key=value ... may be repeated. The keys are settings of train.py, which take the place of those in --config.
Each arm, width and seed is one run of train.py with a constant learning rate, so that every moment of it stands for a
shorter run. Towards each budget a tail branches off: the last tenth of the FLOPs without masking and with a falling
rate, for every arm alike, as what a masked network says of whole pictures misleads. Finished runs are not made again,
and a stopped one goes on. results.json has all numbers.
"""
import sys

from configurator import ROOT, check, configure, parse_command_line, read_defaults, script_settings

config = "config/masking.py"  # what all arms share
arms = ("unmasked", "naive", "deferred", "improved", "fused")  # default arms, where no --arm is given
widths = (0,)                 # of the backbone, 0: the config's; mixer_dim goes with it, the learning rate against it
                              # (>= 0)
vary = ()                     # key=a,b,c ...: every arm with every combination of these settings
base = "deferred"             # arm in whose FLOPs the others are valued
seeds = (0, 1, 2)             # of each arm (>= 0)
data = ("data/masking",)      # prepared folders
val_data = ()                 # prepared folders to validate on; empty: the last 1 % of each of `data`
out = "runs/masking"          # folder of the runs, of the tables of all of them, and of the plots
budgets = (1.0, 3.0, 10.0)    # training TFLOP at which arms are compared (> 0)
tail = 0.1                    # of the FLOPs, at the end of each budget: unmasked, with a falling rate (> 0, < 1)
count = 64                    # prompts of the attribute scores, if `data` is the drawn set; 0: no scores (>= 0)
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

import itertools
import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.files import read_jsonl, write_json
from common.flops import forward_flops, network_of, on_meta, parameters
from studies.tables import write_report
from training.checkpoint import code_hash, steps_of
from training.dataset import min_side, read_info
from training.optimizer import Muon, is_block_matrix

ARMS = {"unmasked": "mask_ratio=0 batch_size=4 learning_rate=8e-4",  # each arm's best at width 64 (docs/log.md)
        "naive": "mixer_depth=0 depth=6 learning_rate=1.5e-3", "deferred": "",
        "improved": "mask=grouped mixer_conv=true learning_rate=8e-4",
        "fused": "mask=grouped mixer_conv=true fused_blocks=0 learning_rate=8e-4",
        # at another rate, and the parts one by one
        "naive_slow": "mixer_depth=0 depth=6 learning_rate=8e-4", "deferred_fast": "learning_rate=8e-4",
        "improved_slow": "mask=grouped mixer_conv=true",
        "unmasked_conv": "mask_ratio=0 batch_size=4 learning_rate=8e-4 mixer_conv=true",
        "grouped": "mask=grouped", "skip": "mixer_skip=true", "conv": "mixer_conv=true", "fused_only": "fused_blocks=0",
        "muon": "optimizer=muon weight_decay=0.5 batch_size=16 micro_batch_size=16 learning_rate=4e-3",
        "p_mean_0": "p_mean=0 p_std=1"}
# what the study sets itself, and no arm
OWN = {"schedule": "constant", "unmasked_steps": 0, "checkpoint_every": 0, "keep_checkpoints": 100, "sample_every": 0}


def choose_arms(given):
    """Return every arm that --arm gave as [[name, key=value, ...]], or that `arms` names, at every width."""
    if unknown := ", ".join(name for name in arms if name not in ARMS):
        raise ValueError(f"no arm {unknown}: there are {', '.join(ARMS)}, and --arm NAME key=value ...")
    given = given or [[name, *ARMS[name].split()] for name in arms]
    names = {words[0] for words in given if words and words[0] == Path(words[0]).name and "=" not in words[0]}
    if not given or len(names) < len(given):
        raise ValueError(f"the arms are {given}: there must be some, each with a name of its own before its settings")
    choices = [[f"{key}{equals}{value}" for value in values.split(",")]
               for key, equals, values in (word.partition("=") for word in vary)]
    varied = [[",".join((words[0], *more)), *words[1:], *more]
              for words in given for more in itertools.product(*choices)]
    own_width = script_settings("train.py", config)["dim"]
    return [read_arm(width or own_width, *words) for words in varied for width in widths]


def read_arm(width, name, *words):
    """Return an arm of words like depth=9 at a width: its changes of the config, its costs and its plan.

    The plan is {budget: (steps, unmasked steps after them)}.
    """
    defaults, info = script_settings("train.py", config), read_info(min_side(data[0])[0])
    known = {k: v for k, v in defaults.items()
             if k not in {*OWN, "data", "val_data", "seed", "out", "overwrite", "max_steps", "check", "go_back", "dim"}}
    arguments = []
    for key, equals, value in (word.partition("=") for word in words):
        several = isinstance(known.get(key), tuple)
        arguments += [f"--{key}", *value.split(",")] if several else [f"--{key}{equals}{value}"]
    try:
        if any(word.startswith("dim=") for word in words):
            raise ValueError("dim is no setting of an arm: --widths has the widths of all")
        _, changes = parse_command_line(arguments, known)
        settings = defaults | changes
        for key, value in changes.items():
            if len(words_of(value)) != len(words_of(defaults.get(key))):
                raise ValueError(f"{key} is {value}: it needs as many values as in {config}, {key}=A,B")
        changes |= scaled(settings, width)
        settings |= changes
        check(settings, read_defaults(ROOT / "train.py"))
        if not settings["eval_every"]:
            raise ValueError("eval_every is 0: it must be at least 1")
        step, unmasked = (training_flops(settings, info, ratio) for ratio in (settings["mask_ratio"], 0.0))
        plan = {b: (int(b * 1e12 * (1 - tail) / step), round(b * 1e12 * tail / unmasked)) for b in sorted(budgets)}
        if min(n for steps in plan.values() for n in steps) < 1:
            raise ValueError(f"a budget of {min(plan)} TFLOP is less than a step for a part of it")
    except ValueError as error:
        raise ValueError(f"arm {name}: {error}") from None
    return SimpleNamespace(name=name, width=width, changes=changes, settings=settings, plan=plan, step_flops=step,
                           unmasked_flops=unmasked, parameters=parameters(network_of(settings, info))[0])


def scaled(settings, width):
    """Return what changes with the backbone's width: the mixer's, in whole heads, and the learning rate, as 1 / width.

    And micro-batches are never larger than the batch.
    """
    factor, heads = width / settings["dim"], settings["head_dim"]
    return {"dim": width, "mixer_dim": max(1, int(settings["mixer_dim"] * factor / heads)) * heads,
            "learning_rate": float(f"{settings['learning_rate'] / factor:.3g}"),
            "micro_batch_size": min(settings["micro_batch_size"], settings["batch_size"])}


def training_flops(settings, info, mask_ratio):
    """Return the FLOPs of a training step; ValueError where they are not known."""
    network = network_of(settings, info)
    forward = forward_flops(network, mask_ratio, info["text_encoder"]["length"])
    if forward is None:
        raise ValueError("its FLOPs are not known, so it cannot be compared at equal FLOPs")
    return 3 * settings["batch_size"] * forward + update_flops(network, settings["optimizer"])


def update_flops(network, kind):
    """Return the FLOPs of an optimizer's products in a step: Muon's, as AdamW has none."""
    if kind != "muon":
        return 0
    matrices = [p for name, p in on_meta(network).named_parameters() if is_block_matrix(name, p)]
    for p in matrices:
        p.grad = torch.empty_like(p)
    with FlopCounterMode(display=False) as counter:
        Muon(matrices, 0.0).step()
    return counter.get_total_flops()


def open_study(chosen):
    """Write down in `out` what its runs depend on, and return it; ValueError if runs that are there differ."""
    infos = [read_info(min_side(folder)[0]) for folder in (*data, *val_data)]
    study = {"model.py": code_hash(), "config": script_settings("train.py", config), "tail": tail,
             "data": [data, val_data, [[info["rows"], info.get("source_hash"), info["settings"]] for info in infos]]}
    study = json.loads(json.dumps(study | {f"arm {label(arm)}": arm.changes for arm in chosen}))
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


def label(arm):
    return f"{arm.name}-{arm.width}"


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
        if any(there > path for there in steps_of(folder)):
            raise ValueError(f"{folder} has gone past step {step:,}: a smaller budget cannot be added to larger ones. "
                             "Give another --out")
        own = OWN | {"data": data, "val_data": val_data, "max_steps": step, "out": folder}
        call(["train.py", config], arm.changes | own | changes)
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
    """Train and measure an arm with a seed up to every budget, and keep the result."""
    folder = Path(out, label(arm), f"seed{seed}")
    points = points_made(folder)
    for budget, (steps, tail_steps) in arm.plan.items():
        if f"{budget:g}" in points:
            continue
        path, branch = train(arm, folder, steps, seed=seed), folder.with_name(f"seed{seed}-tail-{budget:g}")
        # another seed, or it would meet the pictures of the first steps again in their order; its average starts anew
        # and is shorter, as the tail is short
        last = train(arm, branch, tail_steps, mask_ratio=0.0, warmup_steps=0, init_from=path, init_optimizer=True,
                     seed=seed + 1000, schedule="cosine", min_learning_rate=0.0, ema_start=1,
                     ema_decay=min(0.95, arm.settings["ema_decay"]))
        before, after = validations(folder, steps)[-1], validations(branch, tail_steps)[-1]
        points[f"{budget:g}"] = {
            "steps": [steps, tail_steps], "tflop": (steps * arm.step_flops + tail_steps * arm.unmasked_flops) / 1e12,
            "before": before["val_loss"], "val_loss": after["val_loss"], "by_sigma": after["val_loss_by_sigma"],
            "scores": attribute_scores(last) if budget == max(budgets) else {}}
    steps = max(point["steps"][0] for point in points.values())
    curve = [[e["step"] * arm.step_flops / 1e12, e["val_loss"]] for e in validations(folder, steps)]
    write_json(folder.with_suffix(".json"),
               {"arm": arm.name, "width": arm.width, "seed": seed, "parameters": arm.parameters,
                "changes": arm.changes, "model_sha256": code_hash(), "points": points, "curve": curve})
    losses = [f"{p['val_loss']:.4f} with {budget} TFLOP" for budget, p in points.items()]
    print(f"{label(arm)}, seed {seed}: {', '.join(losses)}", flush=True)


def validations(folder, steps):
    """Return the validations that a run logged up to a step."""
    return [e for e in read_jsonl(folder / "log.jsonl") if "val_loss" in e and e["step"] <= steps]


def run_all(chosen):
    """Make the runs that are missing, slots() of them side by side."""
    wanted = {f"{budget:g}" for budget in budgets}
    missing = [(arm, seed) for seed in seeds for arm in chosen
               if not wanted <= points_made(Path(out, label(arm), f"seed{seed}")).keys()]
    print(f"{len(seeds) * len(chosen)} runs, {len(missing)} to make, {slots()} side by side, into {out}/", flush=True)
    with ThreadPoolExecutor(slots()) as pool:
        try:
            for job in as_completed([pool.submit(run, *job) for job in missing]):
                job.result()
        finally:  # after a failure the runs under way are finished, and no other is begun
            pool.shutdown(cancel_futures=True)


def points_made(folder):
    """Return what is known of a run at the budgets that it has been made for."""
    path = folder.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8"))["points"] if path.exists() else {}


def describe_set():
    """Return in words which pictures the study is about."""
    about = []
    for folder in data:
        info = read_info(min_side(folder)[0])
        sizes = ", ".join(map(str, info["resolutions"]))
        about.append(f"{folder}: {info['rows']:,} pictures of {sizes} px, autoencoder {info['vae']['name']}")
    return "; ".join(about)


def main(given=()):
    if not seeds or not widths or not budgets:
        raise ValueError(f"seeds {seeds}, widths {widths}, budgets {budgets}: at least one of each")
    chosen = choose_arms(given)
    study = open_study(chosen)
    run_all(chosen)
    print("\n" + write_report(Path(out), describe_set(), read_results(study), base))


if __name__ == "__main__":
    try:
        main(given_arms)
    except (ValueError, OSError) as error:
        raise SystemExit(f"ablate.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("ablate.py: stopped. The same command goes on") from None
