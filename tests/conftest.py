import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WORK = tempfile.TemporaryDirectory(prefix="tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}  # no test asks the network
hypothesis.settings.register_profile("here", database=None, deadline=None)
hypothesis.settings.load_profile("here")

torch.set_num_threads(1)  # small tensors, and the suite runs as two processes

SMALL = ("--latent_size=8", "--dim=32", "--depth=2", "--head_dim=8", "--mlp_multiple=8", "--mixer_depth=1",
         "--mixer_dim=16", "--num_experts=2", "--batch_size=16", "--micro_batch_size=4", "--warmup_steps=3",
         "--learning_rate=3e-3", "--log_every=1", "--eval_every=4", "--sample_every=0", "--checkpoint_every=4",
         "--ema_decay=0.9", "--ema_start=3")  # of train.py, for a network of the built-in set at 16 px


@pytest.fixture(autouse=True, scope="session")
def no_test_runs_in_the_clone():
    """None sees what the scripts have left there, nor writes into it"""
    os.chdir(WORK.name)  # once the tests are collected, whose paths may be relative


def launch(name, *args, fails=False, processes=1, cwd=None, env=(), traceback=False):
    """Run a script -> what it printed, or the last line of an expected failure, which must have no traceback.

    name: a script at the top, or a module as "studies.compare". It runs in `cwd`, or else in a folder of the tests;
    files of the repository are named as from its top. traceback: of torchrun's own after an expected failure, then
    everything that was printed is returned.
    """
    script = [str(ROOT / name)] if str(name).endswith(".py") else ["-m", str(name)]
    argv = script + [str(ROOT / arg) if str(arg).startswith(("config/", "docs/")) else str(arg) for arg in args]
    cwd = cwd or WORK.name
    if hasattr(os, "fork"):
        code, out, err = forked(argv, processes, cwd, env)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        p = subprocess.run([sys.executable, *(torchrun if processes > 1 else []), *argv], cwd=cwd, capture_output=True,
                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env))
        code, out, err = p.returncode, p.stdout, p.stderr
    assert (code != 0) == fails, out + err
    if fails and not traceback:
        assert "Traceback" not in err, err
        return err.strip().splitlines()[-1]
    return out + err


@functools.cache
def zygote():
    """The process that scripts are forked from"""
    return subprocess.Popen([sys.executable, ROOT / "tests/zygote.py"], cwd=WORK.name, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


def forked(argv, processes, cwd, env):
    """(exit code, standard output, standard error) of a script"""
    with tempfile.TemporaryDirectory() as folder:
        job = {"argv": argv, "processes": processes, "cwd": str(cwd), "env": os.environ | dict(env),
               "out": f"{folder}/out", "err": f"{folder}/err"}
        zygote().stdin.write(json.dumps(job) + "\n")
        zygote().stdin.flush()
        code = int(zygote().stdout.readline())
        return code, *(Path(job[name]).read_text(encoding="utf-8", errors="replace") for name in ("out", "err"))


@pytest.fixture
def script():
    return launch


@pytest.fixture(scope="session")
def shapes16(tmp_path_factory):
    """A prepared folder of 120 drawn pictures of 16 px"""
    folder = tmp_path_factory.mktemp("data") / "shapes16"
    launch("prepare_latents.py", "--out", folder, "--limit=120", "--resolutions", "16")
    return folder


@pytest.fixture(scope="session")
def shapes32(tmp_path_factory):
    """A prepared folder of 24 drawn pictures of 32 px"""
    folder = tmp_path_factory.mktemp("data") / "shapes32"
    launch("prepare_latents.py", "--out", folder, "--limit=24")
    return folder


def log_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def losses(run):
    return {entry["step"]: entry["loss"] for entry in log_of(run) if "loss" in entry}


def weights(run):
    """The tensors of a run's last checkpoint"""
    return load_file(sorted(Path(run).glob(f"step_{8 * '[0-9]'}.safetensors"))[-1])


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(megabytes) -> a folder on a file system of that size"""
    mounted = []

    def make(megabytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def hunks(page):
    """Return the edits [(old text, new text)] of a page's diff"""
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    parts = [part.splitlines()[1:] for part in diff.split("@@ ")[1:]]
    return [tuple("".join(line[1:] + "\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
            for lines in parts]


def edit(file, edits):
    source = file.read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    file.write_text(source)
    return source
