"""train.py: schedules, what a step depends on, going on after a stop, processes, and its errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import launch
from PIL import Image
from safetensors.torch import load_file

import train
from training import checkpoint
from training.batches import Batches, prefetched
from training.dataset import Rows

SMALL = (
    "--latent_size=8",
    "--dim=32",
    "--depth=2",
    "--head_dim=8",
    "--mlp_multiple=8",
    "--mixer_depth=1",
    "--mixer_dim=16",
    "--num_experts=2",
    "--batch_size=16",
    "--micro_batch_size=4",
    "--warmup_steps=3",
    "--learning_rate=3e-3",
    "--log_every=1",
    "--eval_every=4",
    "--sample_every=0",
    "--checkpoint_every=4",
    "--ema_decay=0.9",
    "--ema_start=3",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes16"
    launch("prepare_latents.py", "--out", folder, "--limit=120", "--resolutions", "16")
    return folder


@pytest.fixture
def fit(script, data):
    def run(out, *args, steps=8, **kw):
        return script("train.py", f"--data={data}", f"--out={out}", *SMALL, f"--max_steps={steps}", *args, **kw)

    return run


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return {entry["step"]: entry["loss"] for entry in log(out) if "loss" in entry}


def weights(out):
    return load_file(checkpoint.steps_of(out)[-1])


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- schedules and randomness ----------------------------------------------------------------------------------------


def test_learning_rate_schedules():
    def rates(**kw):
        return [train.learning_rate_at(s, 1.0, 4, 20, **kw) for s in range(21)]

    cosine, constant = rates(end=0.1), rates(schedule="constant")
    assert cosine[:4] == constant[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(constant[4:]) == {1.0}
    assert cosine[4] == 1 and cosine[12] == pytest.approx(0.55) and cosine[20] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(cosine[4:], cosine[5:]))


def test_prefetched_batches_come_in_order_and_errors_come_through():
    assert list(prefetched(lambda a, b: (a, b), ((i, 2 * i) for i in range(5)))) == [(i, 2 * i) for i in range(5)]
    assert list(prefetched(lambda a: a, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda a: 1 / a, [(1,), (0,), (2,)]))


def test_noise_bins_are_equally_probable():
    sigma = (0.3 + 0.8 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))).exp()
    counts = torch.bincount(train.noise_bins(sigma, 0.3, 0.8), minlength=train.BINS)
    assert len(counts) == train.BINS and (counts / 20_000 - 0.2).abs().max() < 0.02
    by_level = train.by_level(torch.arange(5.0), torch.tensor([1.0, 1, 0, 1, 2]), 0.3, 0.8)
    assert list(by_level.values()) == [0, 1, 3, 2]
    assert train.noise_bins(torch.tensor([float(s) for s in by_level]), 0.3, 0.8).tolist() == [0, 1, 3, 4]


def test_an_epoch_visits_every_row_once_whatever_the_micro_batch():
    for micro in (3, 5):
        made = Batches(None, Rows([range(5), range(10, 20)]), micro, 2, 4, 0, 0, 1, 0)
        ids = [int(i) for step in range(10) for m in (0, 1) for i in made.row_ids(step, m)][:30]
        assert sorted(ids[:15]) == sorted(ids[15:30]) == [*range(5), *range(10, 20)]
        assert ids[:15] != ids[15:30]
    assert ids == [int(i) for step in range(10) for m in (0, 1) for i in made.row_ids(step, m)][:30]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_bytes(fit, tmp_path):
    printed = fit(tmp_path / "whole", "--unmasked_steps=2")
    assert "images/s" in printed and "left" in printed and "validation loss" in printed and "unmasked" in printed
    fit(tmp_path / "part", "--unmasked_steps=2", "--checkpoint_every=3")
    # as if killed after step 6, while the checkpoint of step 8 was being written and with two more steps in the log
    (tmp_path / "part/step_00000008.safetensors").rename(tmp_path / "part/step_00000008.safetensors.tmp")
    shutil.copytree(tmp_path / "part", tmp_path / "again")
    assert "going on from step 6" in fit(tmp_path / "part", "--unmasked_steps=2", "--checkpoint_every=3")
    assert_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8
    names = weights(tmp_path / "whole")
    assert any(n.startswith("ema.") for n in names) and any(n.startswith("optimizer.exp_avg_sq.") for n in names)
    # finished: nothing to do; and max_steps may grow
    assert "going on from step 8" in fit(tmp_path / "part", "--unmasked_steps=2")
    fit(tmp_path / "part", "--unmasked_steps=2", steps=10)
    assert list(losses(tmp_path / "part"))[-2:] == [9, 10]
    # nothing else may change, and a refusal touches nothing
    before = weights(tmp_path / "again")
    message = fit(tmp_path / "again", "--unmasked_steps=2", "--learning_rate=1e-3", "--depth=3", fails=True)
    for words in ("learning_rate: 0.003 there, 0.001 now", "depth: 2 there, 3 now", "--out", "--overwrite"):
        assert words in message
    assert "max_steps: 8 there, 7 now" in fit(tmp_path / "again", "--unmasked_steps=2", steps=7, fails=True)
    assert_equal(weights(tmp_path / "again"), before)
    fit(tmp_path / "again", "--depth=3", "--overwrite", steps=2)
    assert len(losses(tmp_path / "again")) == 2 and [p.name for p in checkpoint.steps_of(tmp_path / "again")] == [
        "step_00000002.safetensors"
    ]


def test_muon_goes_on_too_and_leaves_the_other_parameters_to_adamw(fit, tmp_path):
    fit(tmp_path / "whole", "--optimizer=muon", steps=4)
    fit(tmp_path / "part", "--optimizer=muon", "--checkpoint_every=2", steps=4)
    checkpoint.steps_of(tmp_path / "part")[-1].unlink()
    assert "going on from step 2" in fit(tmp_path / "part", "--optimizer=muon", "--checkpoint_every=2", steps=4)
    assert_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    names = {n.split(".", 2)[1] + " " + n.split(".", 2)[2] for n in weights(tmp_path / "whole") if n.startswith("opt")}
    assert "momentum_buffer blocks.0.attn.qkv.weight" in names and "exp_avg blocks.0.attn.qkv.weight" not in names
    assert "exp_avg final.linear.weight" in names and "exp_avg mixer.0.modulation.weight" in names


def test_two_processes_train_as_one(fit, tmp_path):
    fit(tmp_path / "one", steps=5)
    printed = fit(tmp_path / "two", steps=5, processes=2)
    assert "2 x cpu" in printed
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 5
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4)
    val = [[e["val_loss"] for e in log(tmp_path / name) if "val_loss" in e] for name in ("one", "two")]
    assert val[0] == pytest.approx(val[1], rel=1e-4) and len(val[0]) == 2


def test_it_learns_and_reports(fit, data, tmp_path):
    printed = fit(
        tmp_path / "run",
        f"--val_data={data}",
        "--sample_every=30",
        "--learning_rate=1e-2",
        "--sample_steps=3",
        "--log_every=10",
        "--eval_every=30",
        "--unmasked_steps=10",
        steps=60,
    )
    entries = log(tmp_path / "run")
    val = [e for e in entries if "val_loss" in e]
    assert val[-1]["val_loss"] < 0.9 and len(val[-1]["val_loss_by_sigma"]) == train.BINS
    assert val[-1]["val_loss"] == pytest.approx(np.mean(list(val[-1]["val_loss_by_sigma"].values())), rel=0.5)
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == [1, 10, 20, 30, 40, 50, 60]
    assert {"lr", "grad_norm", "images_per_s", "eta_s", "loss_by_sigma"} <= steps[0].keys()
    grid = Image.open(tmp_path / "run/samples/step_00000060.png")
    assert grid.size[0] > 100
    assert (tmp_path / "run/samples/captions.txt").read_text().splitlines()[0].startswith("a ")
    assert "done: " in printed


def test_starting_from_other_weights(fit, tmp_path):
    fit(tmp_path / "first", steps=4)
    fit(tmp_path / "second", f"--init_from={tmp_path / 'first'}", "--learning_rate=1e-12", "--ema_decay=0", steps=1)
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in (n for n in second if n.startswith("model.")):
        torch.testing.assert_close(first[name], second[name])
    message = fit(tmp_path / "third", f"--init_from={tmp_path / 'first'}", "--dim=64", steps=1, fails=True)
    assert (
        "do not fit this network" in message
        and "dim: 32 there, 64 now" in message
        and not (tmp_path / "third").exists()
    )


@pytest.mark.parametrize(
    "variant",
    [
        ("--mixer_depth=0",),
        ("--num_experts=0",),
        ("--mask_ratio=0",),
        ("--router_unmodulated",),
        ("--dtype=bfloat16",),
        ("--optimizer=muon",),
        ("--schedule=constant", "--grad_clip=0"),
    ],
)
def test_variants_run_by_setting_alone(fit, tmp_path, variant):
    fit(tmp_path / "run", *variant, steps=2)
    assert all(np.isfinite(v) for v in losses(tmp_path / "run").values())


def test_validation_data_of_its_own(fit, script, data, tmp_path):
    script("prepare_latents.py", f"--out={tmp_path / 'val'}", "--limit=10", "--resolutions=16", "--first_seed=5000")
    assert " 120 pictures" in fit(tmp_path / "run", f"--val_data={tmp_path / 'val'}", steps=1)
    assert " 119 pictures" in fit(tmp_path / "own", steps=1)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, words",
    [
        (["--data=nowhere"], "no prepared data in nowhere"),
        (["--latent_size=16"], "not 16"),
        (["--batch_size=10"], "batch_size 10"),
        (["--val_data=nowhere"], "no prepared data in nowhere"),
        (["--mask_ratio=1"], "mask_ratio is 1.0"),
        (["--mask_ratio=0.99"], "mask_ratio"),
        (["--num_experts=64"], "experts 64"),
        (["--schedule=linear"], "schedule is 'linear'"),
        (["--unmasked_steps=9"], "unmasked_steps is 9"),
        (["--init_from=nowhere"], "no checkpoint nowhere"),
        (["--head_dim=7"], "head_dim"),
        (["--learning_rat=1"], "'learning_rate'"),
        (["--attn_ratio", "1"], "attn_ratio"),
        (["--device=tpu"], "this machine has"),
        (["--learning_rate=0"], "learning_rate is 0.0"),
    ],
)
def test_mistakes_stop_before_anything_is_written(fit, tmp_path, args, words):
    assert words in fit(tmp_path / "run", *args, fails=True)
    assert not (tmp_path / "run").exists()


def test_data_of_another_autoencoder_is_refused(fit, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    info = json.loads((other / "dataset.json").read_text())
    info["vae"]["scaling_factor"] = 0.5
    (other / "dataset.json").write_text(json.dumps(info))
    assert "was prepared with vae" in fit(tmp_path / "run", f"--val_data={other}", fails=True)
    fit(tmp_path / "run", steps=1)
    message = fit(tmp_path / "run", f"--data={other}", steps=2, fails=True)
    assert "holds another run" in message and "vae" in message
    assert "was prepared with vae" in fit(
        tmp_path / "next", f"--data={other}", f"--init_from={tmp_path / 'run'}", fails=True
    )


def test_a_truncated_checkpoint_is_set_aside_and_the_one_before_it_used(fit, tmp_path):
    fit(tmp_path / "whole", "--checkpoint_every=1", steps=4)
    fit(tmp_path / "run", "--checkpoint_every=1", steps=3)
    two, three = checkpoint.steps_of(tmp_path / "run")
    good = three.read_bytes()
    for damage in (good[:-1], good[:100], b""):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        (tmp_path / "copy" / three.name).write_bytes(damage)
        printed = fit(tmp_path / "copy", "--checkpoint_every=1", steps=4)
        assert f"{three.name} is cut short or damaged" in printed and "going on from step 2" in printed
        assert (tmp_path / "copy" / three.name).with_suffix(".damaged").read_bytes() == damage
        assert_equal(weights(tmp_path / "copy"), weights(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "copy")
    for path in (two, three):
        path.write_bytes(good[:100])
    message = fit(tmp_path / "run", steps=4, fails=True)
    assert "none of the checkpoints" in message and two.read_bytes() == three.read_bytes() == good[:100]


def test_disk_full_while_writing_a_checkpoint_keeps_the_old_one(fit, small_disk):
    disk = small_disk(8)
    fit(disk / "run", steps=1)
    size = checkpoint.steps_of(disk / "run")[0].stat().st_size
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - size // 2))
    message = fit(disk / "run", steps=2, fails=True)
    assert "disk full while writing" in message and "step_00000002" in message
    assert [p.name for p in checkpoint.steps_of(disk / "run")] == ["step_00000001.safetensors"]
    assert not list((disk / "run").glob("*.tmp"))
    (disk / "ballast").unlink()
    assert "going on from step 1" in fit(disk / "run", steps=2)


def test_a_diverged_run_stops_and_says_so(fit, tmp_path):
    message = fit(tmp_path / "run", "--learning_rate=1e30", "--grad_clip=0", steps=20, fails=True)
    assert "the last 1" in message and "last good checkpoint is" in message and "learning_rate" in message
