"""The paper's four phases, each from the one before: the real configs scaled down, one of them in two processes."""
import json
import shlex

import torch
from conftest import ROOT, launch, weights

from training import checkpoint

SMALLER = ("--dim=32", "--depth=2", "--head_dim=8", "--mlp_multiple=8", "--mixer_depth=1", "--mixer_dim=16",
           "--num_experts=2", "--batch_size=8", "--micro_batch_size=2", "--log_every=1", "--eval_every=4",
           "--sample_every=0", "--max_steps=4", "--checkpoint_every=2", "--ema_start=3")


def rehearsal():
    """What docs/budget.md adds to each phase's config"""
    line = (ROOT / "docs/budget.md").read_text().replace("\\\n", " ").split("../train.py config/$phase.py")[1]
    return shlex.split(line.split("||")[0])


def test_the_four_phases(tmp_path):
    for name, n in (("a", 60), ("b", 40), ("val", 10)):
        launch("prepare_latents.py", f"--out={tmp_path / name}", f"--limit={n}", "--resolutions", 16, 32)
    # the built-in set has pictures of one size: let some of b be larger, as CC12M's are of any size
    (path,) = (tmp_path / "b").glob("*.rows.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row | {"width": 700, "height": 512 if i % 3 else 511} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found, start, small = [], [], (*rehearsal(), *SMALLER)
    for name, size, rows, processes in (("xl2_256", 8, 100, 1), ("xl2_256_unmasked", 8, 100, 2),
                                        ("xl2_512", 16, 86, 1), ("xl2_512_unmasked", 16, 86, 1)):
        run, second = tmp_path / "runs" / name, f"{tmp_path / 'b'}@512" if size == 16 else tmp_path / "b"
        printed = launch("train.py", f"config/{name}.py", *small, *start, "--data", tmp_path / "a", second,
                         f"--val_data={tmp_path / 'val'}", f"--latent_size={size}", f"--out={run}", processes=processes)
        # 60 and 40, or 60 and the 26 of 40 that are large enough
        assert f"{rows} pictures, 10 to validate on, 4 steps of 8 on {processes} x cpu" in printed
        start, tensors = [f"--init_from={run}"], weights(run)
        pos_scale = checkpoint.read_checkpoint(checkpoint.find(run))[0]["config"]["pos_scale"]
        averaged = any(not torch.equal(tensors["model." + n[4:]], t) for n, t in tensors.items() if n[:4] == "ema.")
        found.append((pos_scale, averaged, int(tensors["optimizer.step.final.linear.bias"])))
    # phase 3 takes no state of the optimizer from the phase before; once the average has begun it really is one
    assert found == [(1, False, 4), (1, False, 8), (2, True, 4), (2, True, 8)]
