"""The paper's four phases, each from the one before: the real configs scaled down, two processes."""

import json

import pytest
import torch
from conftest import ROOT, launch
from conftest import weights as last

from training import checkpoint

WIDTHS = ("--dim=32", "--depth=2", "--head_dim=8", "--mlp_multiple=8", "--mixer_depth=1", "--mixer_dim=16",
          "--num_experts=2")
SMALL = ("--batch_size=8", "--micro_batch_size=2", "--compile=false", "--log_every=1", "--eval_every=4",
         "--sample_every=0")
PHASES = ("xl2_256", "xl2_256_unmasked", "xl2_512", "xl2_512_unmasked")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, seed, n in (("a", 0, 60), ("b", 1000, 40), ("val", 5000, 10)):
        launch("prepare_latents.py", f"--out={folder / name}", f"--limit={n}", f"--first_seed={seed}", "--resolutions",
               16, 32, "--shard_size=25")  # fmt: skip
    # the drawn set has pictures of one size: let some of b be larger, as CC12M's are of any size
    for path in (folder / "b").glob("*.rows.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | {"width": 700, "height": 512 if i % 3 else 511} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def phase(script, data, tmp_path):
    def run(name, *args, fails=False, processes=2):
        large = "512" in name
        sets = ("--data", data / "a", f"{data / 'b'}@512" if large else data / "b", "--val_data", data / "val")
        start = [f"--init_from={tmp_path / PHASES[PHASES.index(name) - 1]}"] if name != PHASES[0] else []
        return script("train.py", f"config/{name}.py", *sets, *WIDTHS, *SMALL, f"--latent_size={16 if large else 8}",
                      f"--out={tmp_path / name}", *start, "--max_steps=4", "--checkpoint_every=2", "--ema_start=3",
                      *args, fails=fails, processes=processes)  # fmt: skip

    return run


def test_the_four_phases(phase, tmp_path):
    printed = {name: phase(name) for name in PHASES}
    for name, rows in zip(PHASES, (100, 100, 86, 86)):  # 60 and 40; 60 and the 26 of 40 that were large enough
        assert f"{rows} pictures, 4 steps of 8 on 2 x cpu" in printed[name]
    assert "unmasked" not in printed["xl2_256"] and "$" in printed["xl2_256"] and "MFU" in printed["xl2_512"]
    runs = {name: checkpoint.read(checkpoint.steps_of(tmp_path / name)[-1])[0] for name in PHASES}
    assert [runs[n]["config"]["pos_scale"] for n in PHASES] == [1, 1, 2, 2]
    # Adam has counted the steps of a masked phase and of the unmasked one after it; the 512 px phases begin anew
    counts = [float(last(tmp_path / n)["optimizer.step.final.linear.bias"]) for n in PHASES]
    assert counts == [4, 8, 4, 8]
    averaged = [any(k.startswith("ema.") for k in last(tmp_path / n)) for n in PHASES]
    assert averaged == [False, False, True, True]
    for name in PHASES[2:]:  # the average really is one
        tensors = last(tmp_path / name)
        assert any(not torch.equal(tensors["model." + k[4:]], t) for k, t in tensors.items() if k.startswith("ema."))
    # started again, a finished phase has nothing to do
    before = checkpoint.steps_of(tmp_path / "xl2_256_unmasked")[-1].stat().st_mtime_ns
    again = phase("xl2_256_unmasked")
    assert "going on from step 4" in again and "step      " not in again
    assert checkpoint.steps_of(tmp_path / "xl2_256_unmasked")[-1].stat().st_mtime_ns == before


def test_a_phase_without_the_one_before_it(phase, script, data, tmp_path):
    message = phase("xl2_512", processes=1, fails=True)
    assert "run `train.py config/xl2_256_unmasked.py` first (or --init_from= to start from scratch)" in message
    printed = phase("xl2_512", "--init_from=", processes=1)
    assert "warning: from scratch, as --init_from is empty: runs/xl2_256_unmasked was meant" in printed
    phase("xl2_256", "--max_steps=3", "--checkpoint_every=2", processes=1)
    run, tensors = checkpoint.read(checkpoint.steps_of(tmp_path / "xl2_256")[-1], ("",))
    checkpoint.save(checkpoint.steps_of(tmp_path / "xl2_256")[-1], tensors,
                    run | {"settings": run["settings"] | {"max_steps": 250_000}})  # fmt: skip
    message = phase("xl2_256_unmasked", processes=1, fails=True)
    assert "has only reached step 3 of 250,000: finish that run first" in message
    printed = phase("xl2_256_unmasked", f"--init_from={checkpoint.steps_of(tmp_path / 'xl2_256')[-1]}", processes=1)
    assert "done" in printed
    message = phase("xl2_512", f"--init_from={tmp_path / 'xl2_256_unmasked'}", "--init_optimizer", "--optimizer=muon",
                    "--overwrite", processes=1, fails=True)  # fmt: skip
    assert "no state of the optimizer muon" in message
    message = script("train.py", "config/xl2_256.py", "--data", data / "a", f"{data / 'b'}@9000", "--latent_size=8",
                     fails=True)
    assert "has no rows with a short side of 9000" in message


def test_the_readme_runs_the_phases_in_order():
    text = (ROOT / "README.md").read_text().split("## The budget run")[1]
    places = [text.index(f" {name}") for name in PHASES]
    assert places == sorted(places)
