"""
Everything that a run needs to go on: network, optimizer, average and step; how it is saved, found again and resumed.
"""
import contextlib
import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import model
from common.files import lock, remove_leftovers, write_json
from common.schema import check_tensors
from training import checkpoint
from training.dataset import check_same_encoders
from training.optimizer import Average, Optimizer

# what may differ when a run goes on (data are compared by content); a larger max_steps also stretches the schedule
NOT_COMPARED = {"data", "val_data", "out", "overwrite", "max_steps", "device", "compile", "activation_checkpointing",
                "loader_threads", "log_every", "eval_every", "sample_every", "sample_steps", "sample_guidance",
                "checkpoint_every", "keep_checkpoints", "price", "wandb", "check"}
# what a run leaves in its folder
OURS = re.compile(r"step_\d{8,}\.(safetensors|damaged|aside)|log\.jsonl|progress\.png|run\.json"
                  r"|model(\.[0-9a-f]{8})?\.py|samples/(step_\d{8,}\.png|strip\.png|captions\.txt)")


@dataclass
class State:
    net: model.MicroDiT
    optimizer: Optimizer
    average: Average
    run: dict = field(default_factory=dict)  # what a checkpoint says of itself: config, settings, data, model_sha256
    step: int = 0
    vae: object = None  # the autoencoder of the data, where it is wanted
    replaces: object = False  # True: an earlier run in the folder has to go (--overwrite); or checkpoints to set aside
    earlier: dict = None  # settings of the checkpoint that it goes on from

    @property
    def averaged_net(self):
        """Return the network with the averaged weights, or the network itself where there is no average."""
        return self.average.net or self.net

    def begin(self, folder):
        """Take possession of the run's folder: only now that a step has been made does what it replaces go."""
        lock(folder)
        if self.replaces is True:
            delete_run(folder)
        elif self.replaces:
            for path in self.replaces:
                path.rename(path.with_suffix(".aside"))
        elif self.step == 1 and checkpoint.steps_of(folder):
            raise ValueError(f"another run has begun in {folder} meanwhile: give another --out")
        describe_run(folder, self.run, self.step > 1)

    def save(self, folder, keep):
        """Write a checkpoint, keep the last `keep` of them, and return its path; ValueError if it is not finite."""
        tensors = {f"model.{n}": t for n, t in self.net.state_dict().items()}
        if self.average.net:
            tensors |= {f"ema.{n}": t for n, t in self.average.net.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in self.optimizer.tensors().items()}
        if getattr(self.vae, "carried", False):
            tensors |= {f"vae.{n}": t for n, t in self.vae.state_dict().items()}
        if bad := checkpoint.not_finite(tensors):
            saved = (checkpoint.steps_of(folder) or ["none yet"])[-1]
            raise ValueError(f"{bad} is not finite at step {self.step:,}, so no checkpoint was written. The last "
                             f"one is {saved}. Try a lower learning_rate or grad_clip")
        path = checkpoint.step_path(folder, self.step)
        checkpoint.save(path, tensors, self.run | {"step": self.step})
        older = [p for p in checkpoint.steps_of(folder) if p.name <= path.name]
        for old in older[:-keep]:
            old.unlink()
        return path

    def load(self, path):
        """Go on from a checkpoint of this run."""
        run, tensors = checkpoint.read(path, ("model.", "ema.", "optimizer."))
        checkpoint.warn_of_other_code(run, path)
        self.earlier = run["settings"]
        self.step = run["step"]
        for part in ("model.", "ema.") if any(name.startswith("ema.") for name in tensors) else ("model.",):
            check_tensors(self.net, checkpoint.strip(tensors, part), path)
        self.net.load_state_dict(checkpoint.strip(tensors, "model."))
        if ema := checkpoint.strip(tensors, "ema."):
            self.average.copy(self.net)
            self.average.net.load_state_dict(ema)
        self.optimizer.load(checkpoint.strip(tensors, "optimizer."), path)

    def start_from(self, name, with_optimizer):
        """Take over the weights, and maybe the optimizer's state, of another run or checkpoint (--init_from)."""
        path = find_start(name)
        source, run = checkpoint.load_network(path, use_ema=False, whole=True)
        if Path(name).is_dir() and run["step"] < run["settings"]["max_steps"]:
            raise ValueError(f"init_from: {name} has only reached step {run['step']:,} of "
                             f"{run['settings']['max_steps']:,}: finish that run first, or give {path} itself")
        if "released" not in run:  # those name no data set; that their tensors fit is enough
            check_same_encoders(run["data"], path, self.run["data"], "the data")
        try:
            self.net.load_state_dict(source.state_dict())
        except RuntimeError:
            differ = differences(run["config"], as_json(self.run["config"]))
            raise ValueError(f"the weights of {path} do not fit this network ({'; '.join(differ)})") from None
        if with_optimizer:
            kind = self.run["settings"]["optimizer"]
            if "released" in run or run["settings"]["optimizer"] != kind:
                raise ValueError(f"init_optimizer: {path} has no state of the optimizer {kind}: --init_optimizer false "
                                 "takes its weights alone")
            self.optimizer.load(checkpoint.strip(checkpoint.read(path, ("optimizer.",))[1], "optimizer."), path)


def find_start(name):
    """Return the checkpoint that --init_from means; ValueError says which phase has to run first."""
    try:
        return checkpoint.find(name)
    except ValueError as error:
        phase = f"config/{Path(name).name}.py"
        first = f": run `train.py {phase}` first" if Path(phase).is_file() else ""
        raise ValueError(f"init_from: {error}{first} (or --init_from= to start from scratch)") from None


def as_json(value):
    """Return the value as it comes back from JSON, with lists for tuples."""
    return json.loads(json.dumps(value))


def differences(old, new):
    """Describe each entry of `new` that differs in `old`."""
    return [f"{name}: {old.get(name)!r} there, {value!r} now" for name, value in new.items() if old.get(name) != value]


def find_resume(folder, run, overwrite=False):
    """Lock a run's folder and return (last whole checkpoint of this very run or None, what of the folder has to go).

    The second is False, True for a whole run, or the checkpoints after the one that --go_back names. ValueError says
    what differs in another run's, unless `overwrite`, which replaces every run but this very one where it is not
    finished: so a job that is started again with its command goes on. A damaged checkpoint is set aside, and the one
    before it used.
    """
    if (Path(folder) / "model.py").exists() and not (Path(folder) / "run.json").exists():
        raise ValueError(f"{folder} has a model.py and no run.json, so it is no run's folder: give another --out, as "
                         "that model.py would be overwritten")
    lock(folder, create=False)
    try:
        path = last_whole(folder, run)
    except ValueError:
        if run["settings"].get("go_back"):
            return went_back(folder, run)
        if not overwrite:
            raise
        return None, True
    if run["settings"].get("go_back") and not path:
        return went_back(folder, run)
    if overwrite and path and checkpoint.read(path)[0]["step"] >= run["settings"]["max_steps"]:
        return None, True
    return path, False


def went_back(folder, run):
    """Return (the checkpoint that --go_back names, those after it); ValueError if there is none."""
    path = checkpoint.step_path(folder, run["settings"]["go_back"])
    there = checkpoint.steps_of(folder)
    if path not in there:
        names = ", ".join(p.name for p in there) or "no checkpoint"
        raise ValueError(f"go_back: there is no {path}. {folder} has {names}: name the step of one that is there")
    old, _ = checkpoint.read(path, whole=True)
    check_same_encoders(old["data"], path, run["data"], "the data")
    return path, [p for p in there if p.name > path.name]


def last_whole(folder, run):
    """Return the last whole checkpoint of this very run, or None, as find_resume does."""
    damaged = []
    for path in reversed(checkpoint.steps_of(folder)):
        try:
            old, _ = checkpoint.read(path, whole=True)
        except checkpoint.Damaged:
            damaged.append(path)
            continue
        check_same_run(folder, old, as_json(run))
        for bad in damaged:
            aside = bad.with_suffix(".damaged")
            print(f"warning: {bad} is cut short or damaged, so {path} is used. It is now {aside}", file=sys.stderr)
            bad.rename(aside)
        return path
    if damaged:
        raise ValueError(f"none of the checkpoints in {folder} is whole ({', '.join(map(str, damaged))}): --overwrite "
                         "starts again from step 0")
    return None


def check_same_run(folder, old, run):
    """Raise a ValueError if the checkpoint's description `old` is not of the run that was asked for."""
    there = {"go_back": 0} | old["settings"]  # which versions before it do not name
    compared = {name: v for name, v in run["settings"].items() if name not in NOT_COMPARED and name in there}
    data = {name: v for name, v in run["data"].items() if name in old["data"] or name != "source_hash"}
    differ = differences(there, compared) + differences(old["data"], data)
    before, now = old["settings"]["max_steps"], run["settings"]["max_steps"]
    if before > now:
        differ.append(f"max_steps: {before} there, {now} now (it may only grow)")
    if differ:
        raise ValueError(f"{folder} holds another run: {'; '.join(differ)}. Give another --out, or --overwrite to "
                         "delete that run")


def delete_run(folder):
    """Delete what an earlier run left in a folder (--overwrite), and nothing else that lies there."""
    for path in [*Path(folder).glob("*"), *Path(folder, "samples").glob("*")]:
        name = path.relative_to(folder).as_posix()
        if OURS.fullmatch(name) and not (path.suffix == ".safetensors" and checkpoint.is_foreign(path)):
            path.unlink()
    with contextlib.suppress(OSError):  # it is not there, or something else lies in it
        Path(folder, "samples").rmdir()


def describe_run(folder, run, goes_on):
    """Write run.json and a copy of model.py into the run's folder, and delete temporary files of a killed run.

    The copy that a run began with is kept when it goes on under another model.py, whose copy has its hash in its name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, ".tmp*")  # which the safetensors package left in runs of earlier versions
    write_json(folder / "run.json", run)
    copy = folder / "model.py"
    if goes_on and copy.exists() and copy.read_bytes() != Path(model.__file__).read_bytes():
        copy = checkpoint.code_copy(folder, run["model_sha256"])
    shutil.copyfile(model.__file__, copy)
