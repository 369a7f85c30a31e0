"""masking.py: what its arms cost, and a small study from the first run to the table."""

import json

import pytest
from conftest import launch
from PIL import Image

from studies import ablate as masking


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    launch("prepare_latents.py", "--out", folder / "shapes", "--limit=200")
    return (str(folder / "shapes"),)


@pytest.fixture
def study(data, tmp_path, monkeypatch):
    """masking.py with a small budget, in this process"""
    for name, value in {
        "data": data,
        "out": str(tmp_path / "study"),
        "budget": 0.07,
        "count": 0,
        "seeds": (3,),
    }.items():
        monkeypatch.setattr(masking, name, value)
    masking.step_flops.cache_clear()
    return masking


def test_arms_cost_what_they_should(study, monkeypatch):
    monkeypatch.setattr(masking, "budget", 10.0)
    cost = {arm: masking.step_flops(arm) for arm in masking.ARMS}
    deferred, naive = cost["deferred"], cost["naive"]
    assert deferred["step"] == deferred["masked"] < 0.4 * deferred["unmasked"]
    assert cost["unmasked"]["step"] == deferred["unmasked"]
    assert cost["small_dense"]["step"] == pytest.approx(deferred["step"], rel=0.05)
    assert naive["unmasked"] == pytest.approx(deferred["unmasked"], rel=0.02)
    assert naive["parameters"] == pytest.approx(deferred["parameters"], rel=0.05)
    for arm in masking.ARMS:
        points = masking.equal_points(arm)
        assert points["steps"] == masking.equal_points("unmasked")["flops"]
        assert points["flops"] * cost[arm]["step"] == pytest.approx(1e13, rel=2e-3)
    for point, total in (("flops", 1e13), ("steps", None)):
        masked, unmasked = masking.tail_of(point)
        parts = masked * deferred["masked"], unmasked * deferred["unmasked"]
        assert parts[1] / sum(parts) == pytest.approx(0.25, abs=0.005)
        assert (
            sum(parts) == pytest.approx(total, rel=2e-3)
            if total
            else (masked + unmasked == masking.equal_points("unmasked")["steps"])
        )


def test_a_small_study_and_its_restart(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(masking, "arms", ("deferred+unmasked",))
    calls, real = [], masking.call
    monkeypatch.setattr(masking, "call", lambda script, *rest: (calls.append(script[0]), real(script, *rest)))
    study.main()
    out = tmp_path / "study"
    tail = json.loads((out / "deferred+unmasked/seed3.json").read_text())
    steps = masking.equal_points("unmasked")["steps"]
    assert tail["points"]["steps"]["step"] == steps and tail["points"]["flops"]["step"] > steps
    p = tail["points"]["flops"]
    assert p["tflop"] == pytest.approx(0.07, abs=0.013) and 0.5 < p["val_loss"] < 2 and p["seconds"] > 0
    # the tail began where the masked run was, with its weights: other numbers than a start from scratch would give
    first = next(e for e in map(json.loads, (out / "deferred+unmasked/seed3-equal-flops/log.jsonl").open()))
    trunk = [e["loss"] for e in map(json.loads, (out / "deferred/seed3/log.jsonl").open()) if "loss" in e]
    assert first["loss"] < trunk[0]
    text = (out / "table.md").read_text()
    assert "At equal training FLOPs" in text and "| deferred+unmasked: likewise, " in text and "| 1 | 1.96 M |" in text
    with Image.open(out / "curves.png") as plotted:
        assert plotted.size[0] > 500
    assert calls == ["train.py"] * 6  # the masked run to four steps, and two unmasked parts
    before = len(calls)
    study.main()
    (out / "deferred+unmasked/seed3.json").unlink()  # as if it had been stopped before the last file
    study.main()
    assert len(calls) == before and (out / "table.md").read_text() == text
    monkeypatch.setattr(masking, "arms", ("deferred",))  # which the unmasked parts branched off: nothing to train
    study.main()
    assert len(calls) == before and (out / "deferred/seed3.json").exists()
    monkeypatch.setattr(masking, "count", 2)
    scores = masking.scores_of(masking.train_along("deferred", 3, 0)[steps], 0)
    assert scores["background"][1] == 2 and calls[before:] == ["eval_shapes.py"]
    monkeypatch.setattr(masking, "count", 0)
    with monkeypatch.context() as patch:
        patch.setitem(masking.ARMS, "deferred", ("", {"moe_every": 3}))
        with pytest.raises(ValueError, match="was made with another arm"):
            study.main()
    monkeypatch.setattr(masking, "budget", 0.1)
    with pytest.raises(ValueError, match="was made with another budget"):
        study.main()


def test_what_does_not_exist_is_refused(study, monkeypatch):
    monkeypatch.setattr(masking, "arms", ("deffered",))
    with pytest.raises(ValueError, match="no arm deffered: there are unmasked"):
        study.main()
    monkeypatch.setattr(masking, "arms", ("unmasked",))
    monkeypatch.setattr(masking, "data", ("nowhere",))
    with pytest.raises(ValueError, match="nowhere"):
        study.main()


def test_a_failed_run_is_said_with_its_reason(study, monkeypatch):
    monkeypatch.setitem(masking.ARMS, "unmasked", ("", {"mask_ratio": 0.0, "depth": 3, "dim": 100}))
    monkeypatch.setattr(masking, "arms", ("unmasked",))
    with pytest.raises(ValueError, match="dim 100 is not a multiple"):
        study.main()


def test_table_has_means_and_spreads(study):
    def result(seed, loss):
        point = {"step": 10, "tflop": 1.0, "val_loss": loss, "seconds": 60.0, "scores": {}}
        return {"arm": "naive", "seed": seed, "parameters": 2e6, "points": {"steps": point, "flops": point}}

    row = masking.table({"naive": [result(0, 0.1), result(1, 0.2), result(2, 0.3)]}, "flops").splitlines()[2]
    assert "| 3 | 2.00 M | 10 | 1.00 | 0.2000 ± 0.1000 | 1.0 |" in row
    row = masking.table({"naive": [result(0, 0.1)]}, "steps").splitlines()[2]
    assert "| 1 | 2.00 M | 10 | 1.00 | 0.1000 | 1.0 |" in row


def test_a_budget_of_less_than_a_step_is_refused(study, monkeypatch):
    monkeypatch.setattr(masking, "arms", ("deferred+unmasked",))
    monkeypatch.setattr(masking, "budget", 0.02)
    with pytest.raises(ValueError, match="less than a step for a part of deferred.unmasked"):
        study.main()


def test_every_run_has_a_gpu_of_those_that_are_given(study, monkeypatch):
    seen = []

    class Done:
        returncode = 0

    monkeypatch.setattr(
        masking.subprocess, "run", lambda *_, env, **__: (seen.append(env["CUDA_VISIBLE_DEVICES"]), Done)[1]
    )
    monkeypatch.setattr(masking.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(masking.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    for slot in range(4):
        masking.call(["x.py"], {"out": "y"}, slot)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    masking.call(["x.py"], {"out": "y"}, 1)
    assert seen == ["5", "7", "5", "7", "1"]
