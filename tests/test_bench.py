"""bench.py and common/flops.py: the arithmetic, and that what measures a GPU runs."""

from unittest.mock import Mock

import pytest
import torch
from conftest import launch

import bench
from common import flops, roofline
from common.flops import forward_flops
from model import MicroDiT, MicroDiTConfig

SMALL = MicroDiTConfig(latent_size=8, dim=32, depth=2, head_dim=16, mlp_multiple=16, mixer_depth=2, mixer_dim=32,
                       num_experts=2)  # fmt: skip
RUN = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 900, "unmasked_steps": 0, "mask_ratio": 0.5,
       "optimizer": "adamw", "weight_decay": 0.1, "ema_decay": 0.9, "grad_clip": 1.0}  # fmt: skip


def test_flops_parameters_and_activations():
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
    run = {"batch_size": 4, "max_steps": 10, "unmasked_steps": 0, "mask_ratio": 0.0}
    assert flops.run_flops(run, config) == 3 * 4 * 10 * forward_flops(config)
    assert flops.matmul_rate(torch.device("cpu"), torch.float32, 256, 2) > 1e8
    # every token meets both experts of SMALL; of XL/2 test_configs.py has the numbers
    assert flops.parameters(SMALL) == (sum(p.numel() for p in MicroDiT(SMALL).parameters()),) * 2


@pytest.mark.parametrize("edit", [torch.nonzero, torch.Tensor.item, lambda x: x[x > 0], lambda x: 1 if x > 0 else 0])
def test_operations_that_depend_on_data_leave_the_flops_unknown(edit, monkeypatch, capsys):
    def forward(self, x, *inputs, real=MicroDiT.forward, **options):
        edit(x.sum())
        return real(self, x, *inputs, **options)

    monkeypatch.setattr(MicroDiT, "forward", forward)
    flops.counted_flops.cache_clear()
    flops.warn_once.cache_clear()
    assert forward_flops(SMALL) is None and forward_flops(SMALL, 0.75) is None and flops.run_flops(RUN, SMALL) is None
    assert capsys.readouterr().err.count("FLOPs and MFU are not known") == 1
    assert bench.efficiency(SMALL, 0.5, 1.0, 1e12) == "not known"
    with pytest.raises(ValueError, match="neither its FLOPs nor its speed are known"):
        bench.print_run("edited", RUN, SMALL)
    flops.counted_flops.cache_clear()


def test_a_step_is_counted_from_the_code():
    # a square product that fills every processor twice, and one that only moves bytes
    assert roofline.product_seconds(1, 12 * 11 * 128, 8192, 2 * 256) == pytest.approx(
        2 * 12 * 11 * 128 * 8192 * 512 / (0.74 * roofline.PEAK) + roofline.LAUNCH)
    assert roofline.product_seconds(1, 64, 64, 64) == pytest.approx(roofline.LAUNCH, rel=0.5)

    two, four = (roofline.count(SMALL, pictures, 0.0) for pictures in (2, 4))
    counted = 2 * 3 * forward_flops(SMALL)
    assert 0.8 * counted < two.flops + attention_flops(SMALL, 2) < 1.05 * counted
    assert four.flops > 1.8 * two.flops and four.launches == two.launches
    assert four.copies == pytest.approx(two.copies, rel=0.05)
    assert four.saved == pytest.approx(two.saved, rel=0.02) and two.peak > 2 * two.saved + two.copies
    assert 1.5 * two.moved < four.moved < 2 * two.moved


def attention_flops(config, pictures):
    """What forward and backward pass of the attentions take, which the products do not hold: 3.5 times the forward"""
    def of(tokens, keys, width):
        return 4 * pictures * tokens * keys * width
    blocks = [of(16, 16, 32), of(16, 77, 32)] * config.mixer_depth + [of(77, 77, 32)]
    widths = [block.attn.width for block in MicroDiT(config).blocks]
    return 3.5 * sum(blocks + [of(16, 16, w) + of(16, 77, 32) for w in widths])


def test_what_measures_a_gpu_runs(monkeypatch, capsys):
    for name, value in {"rounds": 1, "gpus": 1, "price": 2.0, "profile": True}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch, "compile", lambda net: net)
    assert bench.measure_run("small", RUN, SMALL, torch.device("cpu"), 1e12) > 0
    assert bench.print_run("small", RUN, SMALL, rate=1.0) == 1.0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("compiled", "eager", "MFU", "a step of 4", "aten::bmm", "1.0 hours, $2"))

    steps = []
    monkeypatch.setattr(bench, "make_step", lambda *_: (None, steps.append))
    monkeypatch.setattr(bench, "timed", lambda function, device: (function(), [2.0 * len(steps)] * 3)[1])
    assert bench.measure_run("small", RUN | {"batch_size": 8}, SMALL, torch.device("cpu"), 1e12) == 4.0  # 2 s a step

    monkeypatch.setattr(bench, "make_step", Mock(side_effect=torch.cuda.OutOfMemoryError))
    assert bench.measure_run("small", RUN, SMALL, torch.device("cpu"), 1e12) is None
    assert "small: out of memory with 2 pictures" in capsys.readouterr().out


def test_scripts(shapes16, tmp_path):
    printed = launch("bench.py", "--loader", shapes16, "--rounds=1")
    assert all(word in printed for word in ("120 rows", "page cache", "disk", "4 threads", "GB/s"))
    assert "GFLOP/s" in launch("bench.py", "--rounds=1", "--batch_size=1", "--device=cpu")
    (tmp_path / "small.py").write_text("from config.tiny import *\ndepth = mixer_depth = 1\n")
    printed = launch("bench.py", tmp_path / "small.py", "--device=cpu", "--gpus=1")
    assert "small: 1." in printed and "counted, not measured" in printed and "together" in printed
    for wrong, word in (("config/none.py", "no config file"), ("--loader=nowhere", "nowhere")):
        assert word in launch("bench.py", wrong, fails=True)
