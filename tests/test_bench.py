"""bench.py and flops.py: the arithmetic, and that what measures a GPU runs."""

import pytest
import torch
from conftest import launch

import bench
from common.flops import forward_flops, matmul_rate, parameters
from model import MicroDiT, MicroDiTConfig

SMALL = MicroDiTConfig(
    latent_size=8, dim=32, depth=4, head_dim=16, mlp_multiple=16, mixer_depth=2, mixer_dim=32, num_experts=2
)


def test_arithmetic_of_the_four_phases(monkeypatch):
    runs = [
        bench.run_of(f"config/{name}.py") for name in ("xl2_256", "xl2_256_unmasked", "xl2_512", "xl2_512_unmasked")
    ]
    assert sum(bench.run_flops(s, network) for _, s, network in runs) == pytest.approx(3.285e20, rel=1e-3)
    for (_, s, network), mixer in zip(runs, (0.38, 0.15, 0.43, 0.15)):
        shares = bench.where_it_goes(network, s["mask_ratio"])
        assert shares["patch mixer"] == pytest.approx(mixer, abs=0.01) and sum(shares.values()) == pytest.approx(1)
        assert all(0 < share < 0.5 for share in shares.values())


def test_flops_by_hand():
    config = MicroDiTConfig(latent_size=4, latent_channels=2, dim=8, depth=1, head_dim=4, mlp_multiple=8, caption_dim=8,
                            mixer_depth=0, num_experts=0, attn_ratio=(1, 1), mlp_ratio=(4, 4))  # fmt: skip
    t, length, d, hidden = 4, 5, 8, 24  # 2/3 of 4 x 8, rounded up
    attention = 2 * t * d * 3 * d + 4 * t * t * d + 2 * t * d * d
    cross = 2 * t * d * d + 2 * length * d * 2 * d + 4 * t * length * d + 2 * t * d * d
    block = attention + cross + 3 * 2 * t * d * hidden + 2 * d * 6 * d
    caption = 2 * length * (8 * d + d * d) + 2 * (d * d + d * d) + (
        2 * length * d * 4 * d + 4 * length * length * d + 3 * 2 * length * d * hidden)  # fmt: skip
    rest = 2 * t * d * 8 + 2 * (512 * d + d * d) + 2 * d * 2 * d + 2 * t * d * 8
    assert forward_flops(config, caption_length=length) == block + caption + rest
    assert parameters(config)[0] == sum(p.numel() for p in MicroDiT(config).parameters())


def test_masking_and_experts_count():
    assert forward_flops(MicroDiTConfig(), 0.75) < 0.4 * forward_flops(MicroDiTConfig())
    total, active = parameters(SMALL)
    assert total == active  # two experts of capacity two: every token meets both
    assert parameters(MicroDiTConfig())[1] == 712_457_488
    assert matmul_rate(torch.device("cpu"), torch.float32, 256, 2) > 1e8


def test_what_measures_a_gpu_runs(monkeypatch, capsys):
    for name, value in {"rounds": 1, "gpus": 1, "backend": "eager"}.items():
        monkeypatch.setattr(bench, name, value)
    s = {
        "batch_size": 4,
        "micro_batch_size": 2,
        "mask_ratio": 0.5,
        "weight_decay": 0.1,
        "ema_decay": 0.9,
        "grad_clip": 1.0,
    }
    rate = bench.measure_config("small", s, SMALL, torch.device("cpu"), 1e12)
    printed = capsys.readouterr().out
    assert rate > 0 and all(
        word in printed for word in ("compiled", "eager, one-hot", "MFU", "optimizer", "patch mixer")
    )
    monkeypatch.setattr(bench, "price", 2.0)
    run = {"max_steps": 1000, "batch_size": 36, "unmasked_steps": 0, "mask_ratio": 0.5}
    bench.print_recipe([("small", run, SMALL)], {"small": 10.0})
    assert "1.0 hours, $2" in capsys.readouterr().out


def test_activations_are_those_that_are_kept():
    one, masked = (bench.activation_bytes(SMALL, mask) for mask in (0.0, 0.75))
    assert masked < one
    wide = MicroDiTConfig(**{**SMALL.__dict__, "dim": 64, "mixer_dim": 64})
    assert 1.7 * one < bench.activation_bytes(wide, 0.0) < 2.3 * one


def test_loader(script, tmp_path):
    launch("prepare_latents.py", "--out", tmp_path / "d", "--limit=50", "--resolutions=16")
    printed = script("bench.py", "--loader", tmp_path / "d", "--rounds=1")
    assert all(word in printed for word in ("50 rows", "page cache", "disk", "random rows, 4 threads", "GB/s"))


def test_without_a_gpu_the_arithmetic(script):
    printed = script("bench.py", "config/tiny2_256.py", "--rounds=1", "--batch_size=1", "--device=cpu")
    assert "200.7 M parameters" in printed and "GFLOP/s" in printed and "together" in printed
    assert "no config file" in script("bench.py", "config/none.py", fails=True)
