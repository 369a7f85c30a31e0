"""Checkpoints that were edited by hand or damaged, and Ctrl-C while a script is starting.

Pictures, archives, captions and prepared folders are in test_data.py and test_sources.py. It runs long by
FUZZ=5000 pytest -n 0 tests/test_hostile.py -k fuzz"""
import copy
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, launch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common.files import HELD
from model import MicroDiT, MicroDiTConfig
from training import checkpoint
from training.optimizer import Average, Optimizer
from training.state import State, take_folder

EXAMPLES = int(os.environ.get("FUZZ", 50))


def test_ctrl_c_while_a_script_is_starting(tmp_path):
    (tmp_path / "torch.py").write_text(  # a shell's background jobs ignore SIGINT, and so does what they start
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)")
    for script in ("train.py", "sample.py", "prepare_latents.py", "eval_fid.py", "train_vae.py"):
        p = subprocess.run([sys.executable, ROOT / script], capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert p.returncode and p.stderr == f"{script}: stopped\n", p.stderr


ODD = st.one_of(st.none(), st.booleans(), st.integers(-10, 10), st.sampled_from([10 ** 9, 2 ** 70, -1.5, 1e308]),
                st.floats(), st.text(max_size=8), st.just([]), st.just({}), st.lists(st.integers(), max_size=3),
                st.just("../../etc/passwd"))


def places(value, path=()):
    """All places in a JSON value"""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, draw):
    """The value with one to three places replaced by something odd, or taken out"""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([p for p in places(value) if p]))
        inner = value
        for key in way:
            inner = inner[key]
        if draw(st.booleans()) and isinstance(inner, dict):
            del inner[last]
        else:
            inner[last] = draw(ODD)
    return value


@pytest.fixture(autouse=True)
def little_memory():
    """An error, not the end of the machine, where a test wants 2 GB more than it has"""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


fuzz = settings(max_examples=EXAMPLES, deadline=20_000, derandomize=EXAMPLES == 50, database=None,
                suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))


def named(action, name):
    """Do it; a ValueError must be of one line and name the file"""
    try:
        action()
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error), error


@pytest.fixture(scope="module")
def run(shapes16, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    launch("train.py", f"--data={shapes16}", f"--out={out}", *SMALL, "--max_steps=1")
    return checkpoint.find(out)


@fuzz
@given(data=st.data())
def test_fuzz_checkpoints(run, tmp_path_factory, data):
    described, tensors = checkpoint.read_checkpoint(run, ("",))
    net = MicroDiT(MicroDiTConfig(**described["config"]))
    state = State(net, Optimizer(net, "adamw", 1e-3, betas=(0.9, 0.99), weight_decay=0.0), Average(0.9, 0))
    folder, new = tmp_path_factory.mktemp("fuzz"), described
    if data.draw(st.booleans()):
        new = changed(described, data.draw)
    else:
        name, shape = data.draw(st.sampled_from(sorted(tensors))), data.draw(st.lists(st.integers(0, 40), max_size=4))
        if data.draw(st.booleans()):
            del tensors[name]
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
        name = data.draw(st.sampled_from([name, f"{name}x", name.replace(".0.", ".99.")]))
        tensors[name] = torch.zeros(shape, dtype=dtype)
    path = folder / "step_00000001.safetensors"
    checkpoint.save(path, tensors, new)
    for action in (lambda: checkpoint.load_network(path, data.draw(st.booleans())), lambda: state.load(path),
                   lambda: take_folder(folder, described)):
        named(action, str(folder))
    os.close(HELD.pop(folder)[0])
    shutil.rmtree(folder)
