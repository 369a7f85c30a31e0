"""studies: what arms cost, a small study from the first run to the table, and curves of several runs."""

import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import ROOT, launch, log_of
from PIL import Image

from studies import ablate, tables


@pytest.fixture
def study(shapes32, tmp_path, monkeypatch):
    """studies.ablate with a small budget, in this process"""
    smaller = ("patch_size = 2", "head_dim = 8", "mlp_multiple = 8", "dim = 32", "mixer_dim = 24", "warmup_steps = 1",
               "eval_every = 2")
    (tmp_path / "config.py").write_text("\n".join([(ROOT / "config/masking.py").read_text(), *smaller]))
    given = {"config": str(tmp_path / "config.py"), "data": (str(shapes32),), "val_data": (str(shapes32),),
             "out": str(tmp_path / "study"), "budgets": (0.004, 0.008), "tail": 0.4, "widths": (32,), "count": 2,
             "seeds": (3,), "arms": ("naive",), "parallel": 1}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setattr(ablate, name, value)
    return ablate


def test_arms_cost_what_they_should(study, monkeypatch):
    for name, value in (("budgets", (10.0, 1.0)), ("tail", 0.1), ("widths", (32, 64)), ("arms", tuple(ablate.ARMS))):
        monkeypatch.setattr(study, name, value)
    arms = {(arm.name, arm.width): arm for arm in study.choose_arms([])}
    whole, naive, deferred = (arms[name, 64] for name in ("unmasked", "naive", "deferred"))
    assert deferred.step_flops < 0.45 * deferred.unmasked_flops == pytest.approx(0.9 * whole.step_flops)  # half a batch
    assert naive.step_flops < deferred.step_flops
    assert arms["muon", 64].step_flops > deferred.step_flops == arms["grouped", 64].step_flops
    assert arms["fused", 64].step_flops > arms["improved", 64].step_flops > deferred.step_flops
    for arm in arms.values():
        for budget, (steps, unmasked) in arm.plan.items():
            assert steps * arm.step_flops == pytest.approx(0.9e12 * budget, rel=0.01)
            assert unmasked * arm.unmasked_flops == pytest.approx(0.1e12 * budget, rel=0.1)
    small, base = arms["deferred", 32].settings, arms["deferred", 64].settings
    assert (small["dim"], small["mixer_dim"], base["dim"], base["mixer_dim"]) == (32, 24, 64, 48)
    assert small["learning_rate"] == 2 * base["learning_rate"]
    monkeypatch.setattr(study, "widths", (0,))
    assert {arm.width for arm in study.choose_arms([])} == {32}  # the config's
    monkeypatch.setattr(study, "widths", (32, 64))
    given = [["a", "depth=3"], ["b"]]
    monkeypatch.setattr(study, "vary", ("learning_rate=1e-3,2e-3", "mask=random,grouped"))
    varied = study.choose_arms(given)
    assert len(varied) == 16 and len({ablate.label(arm) for arm in varied}) == 16
    last = varied[7]
    assert ablate.label(last) == "a,learning_rate=2e-3,mask=grouped-64"
    assert (last.settings["depth"], last.settings["mask"], last.settings["learning_rate"]) == (3, "grouped", 1e-3)


def test_a_small_study_and_its_restart(study, tmp_path, monkeypatch):
    calls = []

    def start(command, **options):
        calls.append(command[1])
        if command[1] == "train.py":
            launch(*command[1:])  # faster than a process of its own
        else:
            assert " --captions shapes --count 2 " in " ".join(map(str, command))
            scores = Path(command[-1]) / "results.json"
            (scores.parent / "shapes/guidance_2.5").mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (8, 8)).save(scores.parent / f"shapes/guidance_2.5/{i:05d}.png")
            rights = {"background": [4, 4], "color": [1, 4], "size": [0, 4], "shape": [2, 4]}
            scores.write_text(json.dumps({"results": [{"attributes": rights}]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study.subprocess, "run", start)
    given = [["base", "mlp_ratio=0.5,1"], ["fused", "fused_blocks=0"]]
    monkeypatch.setattr(study, "base", "base")
    study.main(given)
    out = tmp_path / "study"
    result, arm = json.loads((out / "base-32/seed3.json").read_text()), study.choose_arms(given)[0]
    assert list(result["points"]) == ["0.004", "0.008"]
    for budget, p in result["points"].items():
        steps, tail_steps = p["steps"]
        assert (steps, tail_steps) == arm.plan[float(budget)]
        assert p["tflop"] == pytest.approx(float(budget), rel=0.15) and 0.1 < p["val_loss"] < 2
        branch = out / f"base-32/seed3-tail-{budget}"
        assert p["val_loss"] == log_of(branch)[-1]["val_loss"] and p["by_sigma"]
        tail = json.loads((branch / "run.json").read_text())["settings"]
        assert [tail[n] for n in ("init_from", "init_optimizer", "mask_ratio", "seed", "schedule", "warmup_steps")] == [
            str(out / f"base-32/seed3/step_{steps:08d}.safetensors"), True, 0.0, 1003, "cosine", 0]
        assert [steps, p["before"]] in [[e["step"], e["val_loss"]] for e in log_of(out / "base-32/seed3") if
                                        "val_loss" in e]
    assert p["scores"] and not result["points"]["0.004"]["scores"] and result["curve"][-1][1] == p["before"]
    text = (out / "table.md").read_text()
    assert re.match(r".*: \d+ pictures of \d+ px, autoencoder pixels\n", text)
    assert "With 0.004 training TFLOP" in text and "By noise level" in text
    assert "| color, % | size, % |" in text and "| 0.008 | 100 | 25 | 0 | 50 |  |" in text
    assert len(json.loads((out / "results.json").read_text())) == 2
    plots = {path.stem: Image.open(path) for path in out.glob("*.png")}
    assert plots.keys() == {"losses", "pictures", "sizes_0.004", "sizes_0.008", "worth"}
    assert all(plot.size[0] > 500 for plot in plots.values())
    assert sorted(calls) == sorted(["train.py"] * 8 + ["eval_fid.py"] * 2)  # a trunk to two steps, each with a tail
    (out / "base-32/seed3.json").unlink()  # as if it had been stopped before the last file
    study.main(given)
    assert len(calls) == 10 and (out / "table.md").read_text() == text
    monkeypatch.setattr(study, "budgets", (0.008, 0.012))  # a larger one is added to what is there
    study.main(given[:1])
    assert calls[10:] == ["train.py", "train.py", "eval_fid.py"] and "With 0.012" in (out / "table.md").read_text()
    more = json.loads((out / "base-32/seed3.json").read_text())
    assert list(more["points"]) == ["0.004", "0.008", "0.012"] and more["points"]["0.008"] == p
    monkeypatch.setattr(study, "budgets", (0.006,))
    with pytest.raises(ValueError, match="a smaller budget cannot be added to larger ones"):
        study.main(given[:1])
    with pytest.raises(ValueError, match="made with another arm base-32: give another --out"):
        study.main([["base", "depth=3"]])
    monkeypatch.setattr(study, "code_hash", lambda: "edited")
    with pytest.raises(ValueError, match="model.py was changed while the study ran"):
        study.call(["train.py"], {})
    for _ in range(2):
        with pytest.raises(ValueError, match="made with another model.py: give another --out, or restore it"):
            study.main(given)
        (out / "study.json").unlink(missing_ok=True)  # results of another version have none


def result(arm, width, seed, **losses):
    """A result with these losses at the budgets of 1, 10 and 100"""
    points = {budget[1:]: {"steps": [9, 1], "tflop": 1, "before": loss + 0.1, "val_loss": loss, "by_sigma": {"1": loss},
                           "scores": {}} for budget, loss in losses.items()}
    return {"arm": arm, "width": width, "seed": seed, "parameters": 1000 * width, "points": points, "curve": []}


def test_what_flops_are_worth():
    curve = [(1, 0.4), (10, 0.2), (100, 0.1)]
    for loss, flops in ((0.4, 1), (0.2, 10), (0.1, 100), (0.2 * 2 ** 0.5, 10 ** 0.5), (0.05, 1000), (0.8, 0.1)):
        assert tables.worth(loss, curve) == pytest.approx(flops)
    assert tables.worth(0.1, curve[:1]) is None and tables.worth(0.3, [(1, 0.2), (10, 0.4)]) is None


def test_arms_are_compared_at_their_best_width():
    results = [result("base", 32, 0, _1=0.4, _10=0.3), result("base", 64, 0, _1=0.5, _10=0.2),
               result("base", 64, 1, _1=0.5, _10=0.2), result("good", 32, 0, _1=0.2, _10=0.12),
               result("good", 32, 1, _1=0.2, _10=0.08), result("good", 64, 0, _1=0.9, _10=0.01)]
    best = {arm: [width for width, _ in tables.frontier(results, arm).values()] for arm in ("base", "good")}
    assert best == {"base": [32, 64], "good": [32, 64]}  # with 1 and with 10 TFLOP
    fair = [r for r in results if r["seed"] == 0 and (r["arm"], r["width"]) != ("good", 64)]
    gains = tables.multipliers(fair, "good", "base")
    assert gains == {"1": [pytest.approx(10)], "10": [pytest.approx(5.457, rel=1e-3)]}  # 0.2 at 1: base's at 10
    text = tables.table(results, "10", "base")
    assert "| base | 32 | 0.03 M | 1 | 9 + 1 | 0.4000 | 0.3000 |  |" in text and "| good | **64** |" in text
    assert "| good | 32 | 0.03 M | 2 | 9 + 1 | 0.2000 ± 0.0283 | 0.1000 ± 0.0283 | " in text
    assert tables.multipliers(fair, "base", "base")["10"] == [pytest.approx(1)]
    spread = [result("base", 32, seed, _1=loss, _10=0.1) for seed, loss in enumerate((0.4, 0.2))]
    against_both = tables.multipliers([*spread, result("good", 32, 0, _1=0.2, _10=0.1)], "good", "base")["1"]
    assert sorted(against_both) == [pytest.approx(1), pytest.approx(1), *[pytest.approx(10 ** 0.5)] * 2]


@pytest.mark.parametrize("given, changed, words", [
    ([["a", "dpeth=3"]], {}, "arm a: unknown setting 'dpeth': the nearest is 'depth'"),
    ([["a", "depth=three"]], {}, "arm a: --depth is 'three': it must be a whole number"),
    ([["a", "seed=3"]], {}, "unknown setting 'seed'"), ([["a"]], {"widths": (36,)}, "dim 36 is not a multiple"),
    ([["a", "attn_ratio=1"]], {}, "attn_ratio"), ([["a", "batch_size=0"]], {}, "batch_size is 0: it must be"),
    ([["a"]], {"tail": 1e-4}, "less than a step for a part"),
    ([["a"], ["a"]], {}, "a name of its own"), ([["depth=3"]], {}, "a name of its own"), ([[]], {}, "a name"),
    ([["a", "learning_rate=-1"]], {}, "arm a: learning_rate is -1.0: it must be above 0"),
    ([["a", "head_dim=7"]], {}, "head_dim"),
    ([], {"arms": ("deffered",)}, "no arm deffered: there are unmasked"), ([], {"data": ("nowhere",)}, "nowhere"),
    ([["a", "dim=96"]], {}, "dim is no setting of an arm: --widths"),
    ([], {"seeds": ()}, "at least one of each"), ([], {"config": "config/none.py"}, "no config file"),
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
    assert "nowhere" in launch("studies/ablate.py", "--arm", "a", "depth=9", "--widths", 32, 64, "--budgets", 1, 3,
                               "--vary", "learning_rate=1e-3,2e-3", "--data=nowhere", fails=True)


@pytest.mark.parametrize("visible, gpu", [("5,7", "7"), ("", "1")])
def test_every_run_has_a_gpu_of_those_that_are_given(study, monkeypatch, visible, gpu):
    seen = Mock(return_value=SimpleNamespace(returncode=0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(study.subprocess, "run", seen)
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(study, "parallel", 0)
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
