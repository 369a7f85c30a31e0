"""Every file in config/ is a run that starts, and the paper's phases have the paper's settings."""

import re
from dataclasses import fields, replace

import pytest
from conftest import ROOT, launch

from common.flops import forward_flops, parameters
from configurator import script_settings
from encoders.tiny import TinyAutoencoder, config_for
from model import MicroDiTConfig
from training.checkpoint import save

CONFIGS = sorted(p.stem for p in (ROOT / "config").glob("[!_]*.py"))
LAPTOP = ("tiny", "small", "medium")  # of the drawn set, in learned latents


def read(name):
    """(its settings, its network's)"""
    s = script_settings("train.py", f"config/{name}.py")
    return s, MicroDiTConfig(**{f.name: s[f.name] for f in fields(MicroDiTConfig) if f.name in s})


@pytest.mark.parametrize("config", LAPTOP[:2])
def test_config(tmp_path, config):
    autoencoder = config_for(8, script_settings("train_vae.py")["latent_channels"], 48)
    save(tmp_path / "vae.safetensors", TinyAutoencoder(autoencoder).state_dict(), {"config": autoencoder})
    launch("prepare_latents.py", f"--vae={tmp_path / 'vae.safetensors'}", "--resolutions=64", "--limit=24",
           f"--out={tmp_path / 'data'}")
    printed = launch("train.py", f"config/{config}.py", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'run'}",
                     "--batch_size=4", "--micro_batch_size=4", "--max_steps=1", "--unmasked_steps=0",
                     "--sample_every=0", "--eval_every=0")
    assert "step      1/1" in printed


# the paper's table: steps, mask ratio, learning rate, warmup, gradient clip, P_mean, P_std, EMA decay and start; GFLOPs
PHASES = {"xl2_256": (250_000, 0.75, 2.4e-4, 2500, 0.25, -0.6, 1.2, 0.0, 0, 94),
          "xl2_256_unmasked": (30_000, 0.0, 8e-5, 0, 0.25, -0.6, 1.2, 0.0, 0, 238),
          "xl2_512": (50_000, 0.75, 8e-5, 500, 0.5, 0.0, 0.6, 0.99975, 25_000, 356),
          "xl2_512_unmasked": (5000, 0.0, 8e-5, 0, 0.5, 0.0, 0.6, 0.9975, 1000, 1001)}
NAMES = ("max_steps", "mask_ratio", "learning_rate", "warmup_steps", "grad_clip", "p_mean", "p_std", "ema_decay",
         "ema_start")


@pytest.mark.paper
@pytest.mark.parametrize("config", PHASES)
def test_phases_of_the_paper(config):
    (s, net), expected = read(config), [*PHASES[config]]
    assert [s[name] for name in NAMES] == expected[:-1]
    common = {"batch_size": 2048, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "unmasked_steps": 0}
    assert {n: s[n] for n in common} == common
    assert s["schedule"] == ("cosine" if config == "xl2_256" else "constant") and s["min_learning_rate"] == 0.33
    assert (net.latent_size, net.pos_scale) == ((32, 1.0) if "256" in config else (64, 2.0))
    assert parameters(net) == (1_165_442_320, 712_457_488)
    forward = forward_flops(net, s["mask_ratio"])
    assert forward / 1e9 == pytest.approx(expected[-1], abs=1)
    whole = f"{3 * forward * s['batch_size'] * s['max_steps']:.2e} FLOPs".replace("+", "")
    assert whole in (ROOT / f"config/{config}.py").read_text()
    for gpus in (1, 2, 4, 8):  # the same global batch
        assert s["batch_size"] % (s["micro_batch_size"] * gpus) == 0
    before = dict(zip(PHASES, ["", *(f"runs/{phase}" for phase in PHASES)]))
    assert s["init_from"] == before[config]
    assert s["init_optimizer"] == ("unmasked" in config)
    assert ("data/diffusiondb" in s["data"]) == ("256" in config)
    assert ("data/cc12m@512" in s["data"]) == ("512" in config)


@pytest.mark.paper
def test_the_phase_that_is_not_the_papers():
    (s, net), (papers, papers_net) = read("xl2_256_conv"), read("xl2_256")
    assert {name for name in s if s[name] != papers[name]} == {"mask", "mixer_conv"}
    assert forward_flops(net, 0.75) == pytest.approx(forward_flops(papers_net, 0.75), rel=1e-3)


@pytest.mark.paper
@pytest.mark.parametrize("config", CONFIGS)
def test_every_header_names_its_size_and_command(config):
    text, net = (ROOT / "config" / f"{config}.py").read_text(), read(config)[1]
    if config in LAPTOP:
        net = replace(net, caption_dim=128)  # the stand-in's
    assert f"{parameters(net)[0] / 1e6:,.1f} M parameters" in text
    assert f"train.py config/{config}.py" in text


def test_the_quick_start_prepares_what_its_config_trains_on():
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if "prepare_latents.py --vae" in line
               and "tiny.py" in line]
    s, net = read("tiny")
    assert f"--out {' '.join(s['data'])} " in line and "--vae runs/vae/vae.safetensors " in line
    vae = script_settings("train_vae.py")
    assert vae["out"] == "runs/vae" and f"--resolutions {vae['resolution']} " in line
    assert vae["resolution"] // vae["downsample"] == net.latent_size


def test_every_phase_has_a_data_order_of_its_own():
    assert len({read(config)[0]["seed"] for config in PHASES}) == len(PHASES)


def test_the_quick_start_and_ci():
    first, second = re.findall(r"^```bash\n(.*)\n```$", (ROOT / "README.md").read_text(), re.M)
    for words in ("venv", "pip install -r requirements.txt", "train_vae.py", "prepare_latents.py", "config/tiny.py",
                  "sample.py"):
        assert words in first
    assert second in (ROOT / ".ci/run").read_text() and "requirements-dev.txt" in second and "pytest" in second
