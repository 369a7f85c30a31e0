"""Everything that a run needs to go on: network, optimizer, average and step; how it is saved and found again."""
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

import model
from common.files import reading, write_bytes, write_json
from common.folders import described, differences, lock, remove_leftovers, same_command
from common.tensors import check_tensors, strip
from configurator import ROOT
from pictures.prepared import check_same_encoders
from training import checkpoint
from training.optimizer import Average, Optimizer

OURS = r"step_\d{8,}\.safetensors|log\.jsonl|progress\.png|run\.json|model\.py|samples"  # what a run writes


@dataclass
class State:
    net: model.MicroDiT
    optimizer: Optimizer
    average: Average
    run: dict = field(default_factory=dict)  # what a checkpoint says of itself, but for its step
    step: int = 0
    vae: object = None  # the autoencoder of the data, where it is wanted

    @property
    def averaged_net(self):
        """Return the network with the averaged weights, or the network itself where there is no average."""
        return self.average.net or self.net

    def begin(self, folder):
        """Write run.json and a copy of model.py into the run's folder, once a step has been made."""
        write_json(Path(folder) / "run.json", self.run)
        copy = Path(folder) / "model.py"
        if not copy.exists():
            write_bytes(copy, Path(model.__file__).read_bytes())

    def save(self, folder, keep):
        """Write a checkpoint, and delete what is older than the last `keep` of this run; ValueError if not finite."""
        parts = {"model": self.net.state_dict(), "optimizer": self.optimizer.tensors(),
                 "ema": self.average.net.state_dict() if self.average.net else {},
                 "vae": self.vae.state_dict() if getattr(self.vae, "carried", False) else {}}
        tensors = {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}
        checkpoint.save(checkpoint.step_path(folder, self.step), tensors, self.run | {"step": self.step})
        older = [path for path in checkpoint.steps_of(folder) if checkpoint.step_of(path) <= self.step]
        for path in older[:-keep]:
            if checkpoint.run_of(path).get("id") == self.run["id"]:
                path.unlink()

    def load(self, path):
        """Go on from a checkpoint of this run."""
        run, tensors = checkpoint.read_checkpoint(path, ("model.", "ema.", "optimizer."))
        self.step = run["step"]
        self.run["id"] = run.get("id", self.run.get("id"))
        if any(name.startswith("ema.") for name in tensors):
            self.average.copy(self.net)
        for part, net in (("model.", self.net), ("ema.", self.average.net)):
            if net:
                check_tensors(net, strip(tensors, part), path)
                net.load_state_dict(strip(tensors, part))
        self.optimizer.load(strip(tensors, "optimizer."), path)

    def start_from(self, name, with_optimizer):
        """Take over the weights, and maybe the optimizer's state, of another run or checkpoint (--init_from)."""
        path = find_start(name)
        source, run = checkpoint.load_network(path, use_ema=False)
        if Path(name).is_dir() and run["step"] < run["settings"]["max_steps"]:
            raise ValueError(f"init_from: {name} has only reached step {run['step']:,} of "
                             f"{run['settings']['max_steps']:,}: finish that run first")
        if "released" not in run:  # those name no data set; that their tensors fit is enough
            check_same_encoders(run["data"], path, self.run["data"], "the data")
        try:
            self.net.load_state_dict(source.state_dict())
        except RuntimeError:
            differ = differences(run["config"], self.run["config"], free=())
            raise ValueError(f"the weights of {path} do not fit this network ({'; '.join(differ)})") from None
        if with_optimizer:
            kind = self.run["settings"]["optimizer"]
            if run["settings"].get("optimizer") != kind:
                raise ValueError(f"{path} has no state of the optimizer {kind}: leave --init_optimizer out")
            self.optimizer.load(strip(checkpoint.read_checkpoint(path, ("optimizer.",))[1], "optimizer."), path)


def find_start(name):
    """Return the checkpoint that --init_from means; ValueError says which phase has to run first."""
    try:
        return checkpoint.find(name)
    except ValueError as error:
        phase = f"config/{Path(name).name}.py"
        raise ValueError(f"init_from: {error}" + f": run `train.py {phase}` first" * (ROOT / phase).is_file()) from None


def take_folder(folder, run):
    """Lock a run's folder and return the checkpoint to go on from, or None; ValueError if it is not this run's."""
    folder = Path(folder)
    lock(folder)
    run["id"] = os.urandom(8).hex()
    remove_leftovers(folder, OURS)
    path, old = checkpoint.newest_readable(folder)
    if not path:  # else the checkpoint says what the folder is, also where run.json was lost
        old = described(folder, "run.json", OURS)
    if old is not None:
        with reading(folder, ". To begin again, delete that folder or give another --out"):
            check_same_run(folder, path, old, run)
    return path


def check_same_run(folder, path, old, run):
    """Raise ValueError if the folder's run, which `old` describes, is not the one that was asked for."""
    settings, before = run["settings"], old["settings"]
    more = differences(old["data"], {k: v for k, v in run["data"].items() if k not in ("vae", "text_encoder")})
    copy, now = folder / "model.py", settings["max_steps"]
    if copy.exists() and copy.read_bytes() != Path(model.__file__).read_bytes():
        more.append(f"model.py differs from {copy}, which made this run: delete that copy to go on with today's")
    taken_back = settings["schedule"] != "constant" or settings["mask_ratio"] and settings["unmasked_steps"]
    if before["max_steps"] > now:
        more.append(f"max_steps: {before['max_steps']} there, {now} now (it may only grow)")
    elif before["max_steps"] < now and taken_back:
        more.append(f"max_steps: {before['max_steps']} there, {now} now, alters the schedule of past steps; to "
                    f"train on: --init_from {quote(str(path))} --init_optimizer --schedule constant --out ANOTHER")
    same_command(folder, before, settings, more)
    check_same_encoders(old["data"], folder, run["data"], "the data")
    if old.get("training_sha256", run["training_sha256"]) != run["training_sha256"]:
        print(f"warning: train.py or training/ has changed since {folder} was begun", file=sys.stderr)
