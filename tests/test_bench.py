"""bench.py and common/flops.py: the arithmetic, and that what measures a GPU runs."""

from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import launch

import bench
from common import flops
from common.flops import forward_flops
from model import MicroDiT, MicroDiTConfig

SMALL = MicroDiTConfig(latent_size=8, dim=32, depth=4, head_dim=16, mlp_multiple=16, mixer_depth=2, mixer_dim=32,
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
    names = ("xl2_256", "xl2_256_unmasked", "xl2_512", "xl2_512_unmasked")
    runs = [bench.read_run(f"config/{name}.py") for name in names]
    assert sum(flops.run_flops(s, network) for _, s, network in runs) == pytest.approx(3.285e20, rel=1e-3)
    assert flops.matmul_rate(torch.device("cpu"), torch.float32, 256, 2) > 1e8
    # every token meets both experts of SMALL; of XL/2 test_configs.py has the numbers
    assert flops.parameters(SMALL) == (sum(p.numel() for p in MicroDiT(SMALL).parameters()),) * 2
    one, masked, wide = (flops.activation_bytes(replace(SMALL, dim=d, mixer_dim=d), mask)
                         for d, mask in ((32, 0.0), (32, 0.75), (64, 0.0)))  # fmt: skip
    assert masked < one and 1.7 * one < wide < 2.3 * one


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


def test_what_measures_a_gpu_runs(monkeypatch, capsys):
    for name, value in {"rounds": 1, "gpus": 1, "price": 2.0, "profile": True}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(torch, "compile", lambda net: net)
    assert bench.measure_run("small", RUN, SMALL, torch.device("cpu"), 1e12) > 0
    assert bench.print_run("small", RUN, SMALL, rate=1.0) == 1.0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("compiled", "eager", "MFU", "a step of 4", "aten::bmm", "1.0 hours, $2"))

    monkeypatch.setattr(bench, "make_step", Mock(side_effect=torch.cuda.OutOfMemoryError))
    assert bench.measure_run("small", RUN, SMALL, torch.device("cpu"), 1e12) is None
    assert "small: out of memory with 2 pictures" in capsys.readouterr().out


def test_scripts(shapes16):
    printed = launch("bench.py", "--loader", shapes16, "--rounds=1")
    assert all(word in printed for word in ("120 rows", "page cache", "disk", "4 threads", "GB/s"))
    printed = launch("bench.py", "config/tiny2_256.py", "--rounds=1", "--batch_size=1", "--device=cpu")
    assert "200.7 M parameters" in printed and "GFLOP/s" in printed and "together" in printed
    for wrong, word in (("config/none.py", "no config file"), ("--loader=nowhere", "nowhere")):
        assert word in launch("bench.py", wrong, fails=True)
