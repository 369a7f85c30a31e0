"""The paper's four phases, each from the one before: the real configs scaled down, one of them in two processes."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, launch
from conftest import weights as last

from training import checkpoint

SMALL = ("--dim=32", "--depth=2", "--head_dim=8", "--mlp_multiple=8", "--mixer_depth=1", "--mixer_dim=16",
         "--num_experts=2", "--batch_size=8", "--micro_batch_size=2", "--compile=false", "--log_every=1",
         "--eval_every=4", "--sample_every=0", "--max_steps=4", "--checkpoint_every=2", "--ema_start=3")
PHASES = ("xl2_256", "xl2_256_unmasked", "xl2_512", "xl2_512_unmasked")


@pytest.fixture(scope="module")
def phase(tmp_path_factory):
    """phase(name, runs) trains that phase into runs/NAME, from the phase before it there"""
    data = tmp_path_factory.mktemp("data")
    for name, seed, n in (("a", 0, 60), ("b", 1000, 40), ("val", 5000, 10)):
        launch("prepare_latents.py", f"--out={data / name}", f"--limit={n}", f"--first_seed={seed}", "--resolutions",
               16, 32, "--shard_size=25")
    # the drawn set has pictures of one size: let some of b be larger, as CC12M's are of any size
    for path in (data / "b").glob("*.rows.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"width": 700, "height": 512 if i % 3 else 511} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, runs, *args, short_side=512, **kw):
        large = "512" in name
        sets = ("--data", data / "a", f"{data / 'b'}@{short_side}" if large else data / "b", "--val_data", data / "val")
        start = [f"--init_from={runs / PHASES[PHASES.index(name) - 1]}"] if name in PHASES[1:] else []
        return launch("train.py", f"config/{name}.py", *sets, *SMALL, f"--latent_size={16 if large else 8}",
                      f"--out={runs / name}", *start, *args, **kw)

    return run


@pytest.fixture(scope="module")
def chain(phase, tmp_path_factory):
    """A folder with the four phases' runs, and what each printed"""
    runs = tmp_path_factory.mktemp("runs")
    return runs, {name: phase(name, runs, processes=2 if name == "xl2_256_unmasked" else 1) for name in PHASES}


def test_the_four_phases(phase, chain):
    runs, printed = chain
    for name, rows in zip(PHASES, (100, 100, 86, 86)):  # 60 and 40; 60 and the 26 of 40 that were large enough
        assert f"{rows} pictures, 4 steps of 8 on {2 if name == 'xl2_256_unmasked' else 1} x cpu" in printed[name]
    assert "unmasked" not in printed["xl2_256"] and "$" in printed["xl2_256"] and "MFU" in printed["xl2_512"]
    described = [checkpoint.read(checkpoint.find(runs / name))[0] for name in PHASES]
    assert [run["config"]["pos_scale"] for run in described] == [1, 1, 2, 2]
    tensors = [last(runs / name) for name in PHASES]
    # Adam has counted the steps of a masked phase and of the unmasked one after it; the 512 px phases begin anew
    assert [float(t["optimizer.step.final.linear.bias"]) for t in tensors] == [4, 8, 4, 8]
    # from its start the average really is one
    averaged = [any(not torch.equal(t["model." + name[4:]], value) for name, value in t.items() if name[:4] == "ema.")
                for t in tensors]
    assert averaged == [False, False, True, True]
    # started again, a finished phase has nothing to do
    path = checkpoint.find(runs / "xl2_512")
    before, again = path.stat().st_mtime_ns, phase("xl2_512", runs)
    assert "going on from step 4" in again and "step      " not in again and path.stat().st_mtime_ns == before


def test_a_phase_without_the_one_before_it(phase, chain, tmp_path):
    message = phase("xl2_512", tmp_path, fails=True)
    assert "run `train.py config/xl2_256_unmasked.py` first (or --init_from= to start from scratch)" in message
    printed = phase("xl2_512", tmp_path, "--init_from=", "--max_steps=1")
    assert "warning: from scratch, as --init_from is empty: runs/xl2_256_unmasked was meant" in printed
    path = checkpoint.find(shutil.copytree(chain[0] / "xl2_256", tmp_path / "xl2_256"))
    run, tensors = checkpoint.read(path, ("",))
    checkpoint.save(path, tensors, run | {"settings": run["settings"] | {"max_steps": 250_000}})
    message = phase("xl2_256_unmasked", tmp_path, fails=True)
    assert "has only reached step 4 of 250,000: finish that run first" in message
    assert "done" in phase("xl2_256_unmasked", tmp_path, f"--init_from={path}", "--max_steps=1")
    message = phase("xl2_512", tmp_path, "--init_optimizer", "--optimizer=muon", "--overwrite", fails=True)
    assert "no state of the optimizer muon" in message
    assert "has no rows with a short side of 9000" in phase("xl2_512", tmp_path, short_side=9000, fails=True)


def test_the_readme_runs_the_phases_in_order():
    text = (ROOT / "README.md").read_text().split("## The budget run")[1]
    places = [text.index(f" {name}") for name in PHASES]
    assert places == sorted(places)


def test_a_first_phase_with_a_convolution_in_the_mixer(phase, tmp_path):
    phase("xl2_256_conv", tmp_path)
    start, conv = f"--init_from={tmp_path / 'xl2_256_conv'}", "--mixer_conv=true"
    phase("xl2_256_unmasked", tmp_path, start, conv)
    assert any("neighbours" in name for name in last(tmp_path / "xl2_256_unmasked"))
    message = phase("xl2_256_unmasked", tmp_path, start, "--overwrite", fails=True)
    assert "do not fit this network (mixer_conv: True there, False now)" in message
