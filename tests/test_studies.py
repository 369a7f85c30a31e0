"""studies: what arms cost, a small study from the first run to the table, and curves of several runs."""

import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import launch, log_of
from PIL import Image

from studies import ablate


@pytest.fixture
def study(shapes32, tmp_path, monkeypatch):
    """studies.ablate with a small budget, in this process"""
    given = {"data": (str(shapes32),), "val_data": (str(shapes32),), "out": str(tmp_path / "study"), "budget": 0.07,
             "count": 2, "seeds": (3,), "arms": ("naive",)}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setattr(ablate, name, value)
    return ablate


def test_arms_cost_what_they_should(study, monkeypatch):
    monkeypatch.setattr(study, "budget", 10.0)
    monkeypatch.setattr(study, "arms", ("unmasked", "naive", "deferred", "deferred+unmasked", "small_dense"))
    arms = study.choose_arms([])
    whole, naive, deferred, tail, small = arms
    assert deferred.step_flops < 0.4 * deferred.unmasked_flops == 0.4 * whole.step_flops
    assert small.step_flops == pytest.approx(deferred.step_flops, rel=0.05)
    assert naive.unmasked_flops == pytest.approx(deferred.unmasked_flops, rel=0.02)
    assert naive.parameters == pytest.approx(deferred.parameters, rel=0.05)
    assert whole.plan["flops"] == whole.plan["steps"] == (815, 0)
    for arm in arms:
        (steps, unmasked), equal = arm.plan["flops"], arm.plan["steps"]
        assert steps * arm.step_flops + unmasked * arm.unmasked_flops == pytest.approx(1e13, rel=2e-3)
        assert sum(equal) == 815 and (equal[1] > 0) == (unmasked > 0) == (arm is tail)
    for masked, unmasked in tail.plan.values():
        assert 3 * unmasked * tail.unmasked_flops == pytest.approx(masked * tail.step_flops, rel=0.03)


def test_a_small_study_and_its_restart(study, tmp_path, monkeypatch):
    calls = []

    def start(command, **options):
        calls.append(command[1])
        if command[1] == "train.py":
            launch(*command[1:])  # faster than a process of its own
        else:
            assert " --captions shapes --count 2 " in " ".join(map(str, command))
            scores = Path(command[-1]) / "results.json"
            scores.parent.mkdir()
            rights = {"background": [4, 4], "color": [1, 4], "size": [0, 4], "shape": [2, 4]}
            scores.write_text(json.dumps({"results": [{"attributes": rights}]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", start)
    given = [["base", "tail=0.25", "mlp_ratio=0.5,1"]]
    study.main(given)
    out = tmp_path / "study"
    result = json.loads((out / "base/seed3.json").read_text())
    (arm,), p = study.choose_arms(given), result["points"]["flops"]
    assert result["points"]["steps"]["step"] == sum(arm.plan["steps"]) < p["step"]
    assert p["tflop"] == pytest.approx(0.07, abs=0.013) and 0.5 < p["val_loss"] < 2
    assert p["val_loss"] == log_of(out / "base/seed3-equal-flops")[-1]["val_loss"] == p["curve"][-1][1]
    tail = json.loads((out / "base/seed3-equal-flops/run.json").read_text())["settings"]
    began = str(sorted((out / "base/seed3").glob("step_*"))[-1])  # where the masked run was
    assert (tail["init_from"], tail["init_optimizer"], tail["mask_ratio"], tail["seed"]) == (began, True, 0.0, 1003)
    text = (out / "table.md").read_text()
    assert re.match(r".*: \d+ pictures of \d+ px, autoencoder pixels\n", text)
    assert "At equal training FLOPs" in text and "| base tail=0.25 mlp_ratio=0.5,1.0 | 1 | " in text
    assert "| color, % | size, % |" in text and "| 100 | 25 | 0 | 50 |" in text
    assert Image.open(out / "curves.png").size[0] > 500
    assert calls == ["train.py", "train.py", "eval_fid.py"] * 2  # the masked run to two steps, each with a tail
    (out / "base/seed3.json").unlink()  # as if it had been stopped before the last file
    study.main(given)
    assert len(calls) == 6 and (out / "table.md").read_text() == text
    with pytest.raises(ValueError, match="made with another arm base: give another --out"):
        study.main([["base", "tail=0.5"]])
    monkeypatch.setattr(study, "code_hash", lambda: "edited")
    with pytest.raises(ValueError, match="model.py was changed while the study ran"):
        study.call(["train.py"], {})
    for _ in range(2):
        with pytest.raises(ValueError, match="made with another model.py: give another --out, or restore it"):
            study.main(given)
        (out / "study.json").unlink(missing_ok=True)  # results of another version have none


@pytest.mark.parametrize("given, changed, words", [
    ([["a", "dpeth=3"]], {}, "arm a: unknown setting 'dpeth': the nearest is 'depth'"),
    ([["a", "depth=three"]], {}, "arm a: --depth is 'three': it must be a whole number"),
    ([["a", "seed=3"]], {}, "unknown setting 'seed'"), ([["a", "dim=100"]], {}, "dim 100 is not a multiple"),
    ([["a", "attn_ratio=1"]], {}, "attn_ratio"), ([["a", "batch_size=0"]], {}, "batch_size is 0: it must be"),
    ([["a", "tail=1"]], {}, "below 1"), ([["a", "tail=0.0001"]], {}, "less than a step for a part"),
    ([["a"], ["a"]], {}, "a name of its own"), ([["depth=3"]], {}, "a name of its own"), ([[]], {}, "a name"),
    ([["a", "learning_rate=-1"]], {}, "arm a: learning_rate is -1.0: it must be above 0"),
    ([["a", "head_dim=7"]], {}, "head_dim"),
    ([], {"arms": ("deffered",)}, "no arm deffered: there are unmasked"), ([], {"data": ("nowhere",)}, "nowhere"),
    ([], {"seeds": ()}, "at least one seed"), ([], {"config": "config/none.py"}, "no config file"),
    ([], {"arms": ()}, "there must be some"), ([], {"forward_flops": lambda *_: None}, "FLOPs are not known")])
def test_what_cannot_be_is_refused(study, monkeypatch, given, changed, words):
    for name, value in changed.items():
        monkeypatch.setattr(study, name, value)
    with pytest.raises(ValueError, match=words):
        study.main(given)


def test_the_command_line():
    words = ["ablate.py", "--arm", "a", "--arm", "b", "dim=96", "p_mean=-1", "--seeds", "0", "1", "--arm", "c"]
    assert ablate.take_arms(words) == [["a"], ["b", "dim=96", "p_mean=-1"], ["c"]]
    assert words == ["ablate.py", "--seeds", "0", "1"]
    for name in ("ablate", "compare", "prepare_speed"):
        assert f"python -m studies.{name}" in launch(f"studies/{name}.py", "--help")
        assert "nearest is" in launch(f"studies/{name}.py", "--sedes=3", fails=True)
    assert "nowhere" in launch("studies/ablate.py", "--arm", "a", "dim=96", "--data=nowhere", fails=True)


@pytest.mark.parametrize("visible, gpu", [("5,7", "7"), ("", "1")])
def test_every_run_has_a_gpu_of_those_that_are_given(study, monkeypatch, visible, gpu):
    seen = Mock(return_value=SimpleNamespace(returncode=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(study.subprocess, "run", seen)
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(threading.current_thread(), "name", "ThreadPoolExecutor-0_3")
    study.open_study([])
    study.call(["x.py"], {})
    assert seen.call_args.kwargs["env"]["CUDA_VISIBLE_DEVICES"] == gpu and study.slots() == 2


def test_compare(tmp_path):
    about = {"a": ([0.5, 0.1], 0, 8, "x"), "b": ([0.4], 2, 9, "x"), "c": ([0.4], 3, 8, "y"),
             "d": ([0.5, 0.3, 0.2], 1, 8, "x"), "e": ([0.7], 1, 8, "x")}  # fmt: skip
    for name, (values, seed, dim, model) in about.items():
        (tmp_path / name).mkdir()
        run = {"settings": {"seed": seed, "dim": dim, "out": name}, "model_sha256": model}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
        entries = [{"step": 1, "loss": 3.0}, *({"step": 100 * i, "val_loss": x} for i, x in enumerate(values, 1))]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    a, b, c, d, e = (tmp_path / name for name in about)
    printed = launch("studies/compare.py", a, b, c, d, e, "--out", tmp_path / "c.png")
    assert f"| {a} and 1 more | 0, 1 | 200 | 0.2000 ± 0.1414 |" in printed and f"| {d}" not in printed
    for alone, loss in ((b, 0.4), (c, 0.4), (e, 0.7)):  # another setting, another model.py, the same seed again
        assert f"| {alone} | {about[alone.name][1]} | 100 | {loss:.4f} |" in printed
    assert Image.open(tmp_path / "c.png").size[0] > 500
    assert "runs/none" in launch("studies/compare.py", "runs/none", fails=True)
    assert "which runs" in launch("studies/compare.py", "--runs=", fails=True)
