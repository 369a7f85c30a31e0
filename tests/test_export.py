"""training/export.py: a run's weights under the released names, read back."""

import json

import pytest
import torch
from conftest import SMALL, launch, weights
from safetensors import safe_open
from safetensors.torch import load_file

from model import MicroDiT, MicroDiTConfig
from training import export


@pytest.mark.parametrize("dtype, name", [("float32", "x.safetensors"), ("bfloat16", "x.pt")])
def test_exported_weights_are_the_runs(shapes16, tmp_path, monkeypatch, capsys, dtype, name):
    run, file = tmp_path / "mine", tmp_path / name
    launch("train.py", *SMALL, f"--data={shapes16}", f"--out={run}", "--max_steps=4")
    (tmp_path / "results.json").write_text(json.dumps({"results": [{
        "folder": "guidance_2", "fid": 12.5, "attributes": {"color": [3, 4]}}]}))
    for setting, value in {"run": str(run), "out": str(file), "dtype": dtype,
                           "scores": str(tmp_path / "results.json")}.items():
        monkeypatch.setattr(export, setting, value)
    export.main()
    if file.suffix == ".pt":
        tensors, config = torch.load(file, weights_only=True), json.loads((run / "run.json").read_text())["config"]
    else:
        with safe_open(file, "pt") as opened:
            tensors, config = load_file(file), json.loads(opened.metadata()["config"])
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    net, kept = MicroDiT.from_official(tensors, MicroDiTConfig(**config)), weights(run)
    for n, p in net.named_parameters():  # the averaged ones
        torch.testing.assert_close(p, kept[f"ema.{n}"], rtol=0 if dtype == "float32" else 0.01, atol=1e-4)
    card = file.with_suffix(".md").read_text()
    for words in ("step 4 of mine", "validation loss at step 4", "fid 12.5, color 3 of 4", "- dim: 32", "- seed: 2024"):
        assert words in card
    monkeypatch.setattr(export, "out", "x.bin")
    with pytest.raises(ValueError, match="FILE.safetensors or FILE.pt"):
        export.main()
