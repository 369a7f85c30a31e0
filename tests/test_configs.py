"""Every file in config/ is a run that starts, and the paper's phases have the paper's settings."""
import re
from dataclasses import astuple, fields

import pytest
import torch
from conftest import ROOT, launch

from configurator import script_settings
from model import MicroDiT, MicroDiTConfig
from training.meter import count_flops

CONFIGS = sorted(p.stem for p in (ROOT / "config").glob("[!_]*.py"))
SMALL = ("--latent_size=8", "--patch_size=2", "--dim=32", "--depth=2", "--head_dim=8", "--mlp_multiple=8",
         "--mixer_depth=1", "--mixer_dim=16", "--batch_size=8")


def read(name):
    """(its settings, its network's)"""
    s = script_settings("train.py", f"config/{name}.py")
    width = {"caption_dim": 128} if name in ("tiny", "small", "emoji", "masking") else {}  # the stand-in's
    return s, MicroDiTConfig(**{f.name: s[f.name] for f in fields(MicroDiTConfig) if f.name in s}, **width)


@pytest.mark.parametrize("config", CONFIGS)
def test_check_says_what_the_whole_run_takes_and_writes_nothing(tmp_path, config):
    processes = {"xl2_256": 2, "small": 8}.get(config, 1)  # torchrun --nproc_per_node=8 train.py config/small.py
    for name in ("step_00000008.safetensors", "run.json"):
        (tmp_path / name).write_text("damaged")
    printed = launch("train.py", f"config/{config}.py", *SMALL, "--check", "--data=random", "--compile=false",
                     "--mask_ratio=0.75", "--max_steps=250_000", "--unmasked_steps=50_000", "--price=300", "--out",
                     tmp_path if processes == 1 else tmp_path / "new", processes=processes)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "step_00000008.safetensors": "damaged", "run.json": "damaged"}
    for words in ("memory: ", "disk: checkpoints of ", "Nothing was written"):
        assert printed.count(words) == 1 and "It writes" not in printed, printed
    assert printed.count(f"links: {processes} processes, an all-reduce of") == (processes > 1)
    (masked, steps), (unmasked, last_steps) = (
        re.search(rf"\n{kind}: ([\d.]+) s a step, [\d.,]+ images/s, MFU \d+ %; .*; ([\d,]+) steps\n", printed).groups()
        for kind in ("masked", "unmasked"))
    assert (steps, last_steps) == ("200,000", "50,000")
    hours, dollars = (float(text.replace(",", "")) for text in re.search(
        r"in all: 250,000 steps, ([\d.,]+) hours, \$([\d,]+)", printed).groups())
    assert hours == pytest.approx((200 * float(masked) + 50 * float(unmasked)) / 3.6, rel=0.1)
    assert dollars == pytest.approx(300 * processes * hours, rel=0.1)


# the paper's table: steps, mask ratio, learning rate, warmup, gradient clip, P_mean, P_std, EMA decay and start
PHASES = {"xl2_256": (250_000, 0.75, 2.4e-4, 2500, 0.25, -0.6, 1.2, 0.0, 0),
          "xl2_256_unmasked": (30_000, 0.0, 8e-5, 0, 0.25, -0.6, 1.2, 0.0, 0),
          "xl2_512": (50_000, 0.75, 8e-5, 500, 0.5, 0.0, 0.6, 0.99975, 25_000),
          "xl2_512_unmasked": (5000, 0.0, 8e-5, 0, 0.5, 0.0, 0.6, 0.9975, 1000)}
NAMES = ("max_steps", "mask_ratio", "learning_rate", "warmup_steps", "grad_clip", "p_mean", "p_std", "ema_decay",
         "ema_start")


@pytest.mark.paper
@pytest.mark.parametrize("config", PHASES)
def test_phases_of_the_paper(config):
    s, net = read(config)
    assert tuple(s[name] for name in NAMES) == PHASES[config]
    common = {"batch_size": 2048, "weight_decay": 0.1, "beta2": 0.999, "unmasked_steps": 0, "optimizer": "adamw"}
    assert {n: s[n] for n in common} == common
    assert s["schedule"] == ("cosine" if config == "xl2_256" else "constant") and s["min_learning_rate"] == 0.33
    assert (net.latent_size, net.pos_scale) == ((32, 1.0) if "256" in config else (64, 2.0))
    assert s["init_from"] == dict(zip(PHASES, ["", *(f"runs/{phase}" for phase in PHASES)]))[config]
    assert s["init_optimizer"] == ("unmasked" in config)
    assert ("data/diffusiondb" in s["data"]) == ("256" in config)
    assert ("data/cc12m@512" in s["data"]) == ("512" in config)


@pytest.mark.paper
def test_the_phases_have_orders_of_their_own_and_the_papers_cost():
    assert len({read(config)[0]["seed"] for config in PHASES}) == len(PHASES)
    assert count_flops(astuple(read("xl2_256")[1]), 0.75, "random", 77)[0] / 3e9 == pytest.approx(94, abs=0.1)


@pytest.mark.paper
@pytest.mark.parametrize("config", CONFIGS)
def test_every_header_names_its_size_and_command(config):
    text = (ROOT / "config" / f"{config}.py").read_text()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MicroDiT(read(config)[1]).parameters())
    assert f"{parameters / 1e6:,.1f} M parameters" in text and f"train.py config/{config}.py" in text
