"""studies: what steps cost, a small study from the first run to the table, and curves of several runs."""

import json
import math
import queue
import re
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, forked, launch
from PIL import Image

from studies import ablate, compare

GELU = "F.gelu(torch.bmm(taken, self.w1))"


@pytest.fixture
def study(shapes16, tmp_path, monkeypatch):
    """study(*words) runs studies.ablate in this process, and its scripts as conftest does"""
    lines = [re.sub(r"--(\w+)=(.*)", r"\1 = \2", word) for word in SMALL]
    lines += ["micro_batch_size = 16", "depth = 1", "ema_decay = 0.0", f"data = '{shapes16}'"]
    (tmp_path / "config.py").write_text("\n".join(lines))

    def start(command, **options):
        run.calls.append(Path(command[1]).name)
        code, out, err = forked(command[1:], 1, tmp_path, {})
        assert "Traceback" not in err
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    def run(*words, arms=()):
        words = [f"--config={tmp_path}/config.py", f"--out={run.out}", "--parallel=1", *map(str, words)]
        defaults = ablate.script_settings("studies/ablate.py")
        for name, value in (defaults | ablate.parse_command_line(words, defaults)[1]).items():
            monkeypatch.setattr(ablate, name, value)
        ablate.main(arms)
    run.calls, run.out = [], tmp_path / "study"
    monkeypatch.setattr(ablate.subprocess, "run", start)
    monkeypatch.setattr(ablate, "GPUS", queue.SimpleQueue())
    return run


def test_a_study_goes_on_and_grows(study, tmp_path, monkeypatch):
    edited = (ROOT / "model.py").read_text().replace(GELU, "F.relu(torch.bmm(taken, self.w1)).square()")
    (tmp_path / "relu2.py").write_text(edited)
    arms = [["gelu"], ["relu2", f"model={tmp_path}/relu2.py", "mlp_ratio=1,1"]]
    monkeypatch.setattr(ablate, "DRAWING", {"steps": 1, "count": 9})
    study("--budgets", 0.0004, "--seeds", 3, "--scores=False", arms=arms[:1])
    assert study.calls == ["plan.py", "train.py", "train.py"]
    both = "--budgets", 0.0008, 0.0004, "--seeds", 3
    study(*both, arms=arms[::-1])
    assert sorted(study.calls[3:]) == ["eval_fid.py"] * 4 + ["plan.py"] * 2 + ["train.py"] * 6
    results = json.loads((study.out / "study.json").read_text())["results"]
    assert sorted((r["budget"], r["arm"]) for r in results) == [(b, a) for b in (4e-4, 8e-4) for a in ("gelu", "relu2")]
    for r in results:
        folder = study.out / f"{r['arm']}-32"
        trunk, end = (json.loads((folder / name / "run.json").read_text())["settings"]
                      for name in ("seed3", f"{r['budget']:g}-seed3"))
        assert trunk["schedule"] == "constant" and trunk["mask_ratio"] > 0 == end["mask_ratio"]
        assert end["max_steps"] == r["steps"][1] and end["init_optimizer"] and trunk["seed"] == end["seed"] == 3
        assert end["init_from"] == f"{folder}/seed3/step_{r['steps'][0]:08d}.safetensors"
        assert r["tflop"] == pytest.approx(r["budget"], rel=0.2) and 0.1 < r["val_loss"] < 3
        assert ("F.relu(" in (folder / "seed3/model.py").read_text()) == (r["arm"] == "relu2")
        assert trunk["mlp_ratio"] == end["mlp_ratio"] == ([1, 1] if r["arm"] == "relu2" else [0.5, 4.0])
        for kind in ("seen", "unseen"):
            scores = r["scores"][kind]
            assert scores["all"][1] == 9 and 0 <= scores["shape"][0] <= scores["shape"][1] > 8
    text = (study.out / "table.md").read_text()
    assert text.count("| gelu | 32 | 1 |") == text.count("| relu2 | 32 | 1 |") == 2 and text.count("| 1.00 |") == 2
    assert "FLOPs of gelu for the same loss" in text  # the first arm stays the first
    assert Image.open(study.out / "losses.png").size[0] > 500
    assert Image.open(study.out / "pictures.png").size[0] > 8 * 128

    shutil.rmtree(study.out / "relu2-32")  # its results are known
    (study.out / "table.md").unlink()
    del study.calls[:]
    study(*both, arms=arms)
    assert study.calls == ["plan.py"] * 2 and (study.out / "table.md").read_text() == text
    with pytest.raises(ValueError, match=r"past step \d+, where a budget would branch off: only larger ones"):
        study("--budgets", 0.0006, "--seeds", 3, arms=arms[:1])
    log = study.out / "gelu-32/0.0004-seed3/log.jsonl"
    log.write_text("\n".join(line for line in log.read_text().splitlines() if "val_loss" not in line))
    steps = next(r["steps"] for r in results if (r["arm"], r["budget"]) == ("gelu", 0.0004))
    gelu = SimpleNamespace(label="gelu-32", name="gelu", width=32, plans={0.0004: (*steps, 0.0)})
    with pytest.raises(ValueError, match=r"log.jsonl lacks the validation loss of step \d+, the last"):
        ablate.run({"results": []}, gelu, 3)
    del study.calls[:]
    (tmp_path / "relu2.py").write_text(f"{edited}# again")
    for words, now, differs in (([], arms, "model.py of relu2-32"), (["--tail", 0.3], arms, "tail: 0.2 there, 0.3"),
                                ([], [["gelu", "depth=5"]], "arm gelu-32"), ([], arms[:1], "train.py and training/")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=f"another command .*{differs}"):
            if "train.py" in differs:
                patch.setattr(ablate, "training_hash", lambda: "edited")
            study(*words, arms=now)
    (study.out / "study.json").write_text("[1]")
    with pytest.raises(ValueError, match="study.json cannot be used"):
        study()
    assert not study.calls


def test_the_arms_of_the_masking_study(tmp_path, monkeypatch):
    """Each is a network, and the merged one joins each 2 x 2 patches and parts them again where they were"""
    monkeypatch.setattr(ablate, "config", str(ROOT / "config/masking.py"))
    monkeypatch.setitem(sys.modules, "model", None)  # that each file is one by itself
    for name in ablate.ARMS:
        arm, net = ablate.read_arm(tmp_path, 0, name), types.ModuleType("model")
        sys.modules["model"] = net
        exec(compile((arm.code / "model.py").read_text(), name, "exec"), vars(net))
        settings = ablate.script_settings("train.py", ablate.config) | arm.changes
        sizes = {field: settings[field] for field in net.MicroDiTConfig.__dataclass_fields__ if field in settings}
        torch.manual_seed(0)
        network = net.MicroDiT(net.MicroDiTConfig(**sizes, caption_dim=128))
        x, captions, c_noise = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 128), torch.zeros(1)
        assert network(x, c_noise, captions).shape == x.shape
        assert network.config.tokens == (64 if name == "coarse" else 256)
    # with gates of zero nothing but the joined tokens carries one patch to another: those of its 2 x 2
    assert name == "merged"
    torch.nn.init.normal_(network.final.linear.weight)
    x.requires_grad_()
    network(x, c_noise, captions)[0, :, 3, 12].sum().backward()
    assert {(h, w) for _, h, w in x.grad[0].nonzero().tolist()} == {(2, 12), (2, 13), (3, 12), (3, 13)}
    with pytest.raises(ValueError, match="keeps all patches: mask_ratio must be 0"):
        network(x, c_noise, captions, ids_keep=torch.zeros(1, 1, dtype=torch.int64))


def costs(shapes16, *words, code):
    """What a masked and a whole step cost in TFLOP"""
    words = (*SMALL, f"--data={shapes16}", "--num_experts=0", "--ema_decay=0", "--micro_batch_size=16", *words)
    return json.loads(launch(code / "plan.py", *words, "--check=true").splitlines()[-1])


def test_real_steps_are_counted(shapes16, tmp_path, monkeypatch):
    """Steps of a mask, an optimizer with products, and a teacher without gradients"""
    teacher = "    with torch.no_grad():\n        net(latents, sigma, caption)\n    return loss"
    model = (ROOT / "model.py").read_text()
    for name, text in (("plain", model), ("taught", model.replace("    return loss", teacher))):
        ablate.copy_code(tmp_path / name, text.encode())
    step, whole = costs(shapes16, code=tmp_path / "plain")
    assert 0.2 * whole < step < 0.8 * whole
    assert costs(shapes16, "--optimizer=muon", code=tmp_path / "plain")[0] > 1.05 * step
    assert costs(shapes16, "--mask_ratio=0", code=tmp_path / "plain") == [whole, whole]
    taught, _ = costs(shapes16, code=tmp_path / "taught")
    assert step + 0.25 * whole < taught < step + 0.45 * whole  # a forward pass is a third of a whole step
    monkeypatch.setattr(ablate, "tail", 0.4)
    assert ablate.plan(10, 0.25, 0.5) == (24, 8, 10.0) and ablate.plan(1.2, 0.25, 0.5) == (2, 1, 1.0)


def test_what_the_table_and_the_curves_say():
    base = [(1, 0.4), (10, 0.2), (100, 0.1)]
    for loss, at in ((0.4, 1), (0.2, 10), (0.1, 100), (0.2 * 2 ** 0.5, 10 ** 0.5), (0.05, None), (0.8, None)):
        assert ablate.flops_at(loss, base) == (at and pytest.approx(at))
    numbers = [("a", 32, 0, 1, 0.3), ("a", 32, 0, 10, 0.1), ("a", 32, 1, 1, 0.5), ("a", 32, 1, 10, 0.2),
               ("b", 32, 0, 1, 0.2), ("b", 64, 0, 1, 0.4), ("b", 64, 1, 1, 0.1), ("b", 64, 0, 10, 0.1),
               ("c", 32, 1, 1, 0.4), ("c", 32, 1, 10, 0.1)]
    results = [dict(zip(("arm", "width", "seed", "budget", "val_loss"), r)) |
               {"tflop": r[3], "steps": [1000, 9], "val_loss_before": 0.7} for r in numbers]
    counts = {"all": [64, 256], "shape": [3, 4], "relation": [0, 0]}
    results[1]["scores"] = {"seen": counts, "unseen": counts | {"all": [0, 256]}}
    _, _, *rows = ablate.summarize(results, ("a", 32)).splitlines()
    b = 10 ** (math.log(0.3 / 0.2) / math.log(0.3 / 0.1))  # where a has the loss of b, each with the first seed
    c = 10 ** (math.log(0.5 / 0.4) / math.log(0.5 / 0.2))  # and of c, with the second
    ahead = 10 ** (1 - math.log(0.4 / 0.2) / math.log(0.4 / 0.1))  # a at its end: where c has that loss
    seen = "25.0, 0.0 | 75.0, 75.0 | 0.0, 0.0"
    assert rows == [f"| {row} |" for row in (  # of each budget the best comes last
        "1 | a | 32 | 2 | 1,000 + 9 | 0.7000 ± 0.0000 | 0.4000 ± 0.1414 |  |  |  | 1.00 ± 0.00",
        f"1 | c | 32 | 1 | 1,000 + 9 | 0.7000 | 0.4000 |  |  |  | {c:.2f}",
        "1 | b | 64 | 2 | 1,000 + 9 | 0.7000 ± 0.0000 | 0.2500 ± 0.2121 |  |  |  | ",
        f"1 | b | 32 | 1 | 1,000 + 9 | 0.7000 | 0.2000 |  |  |  | {b:.2f}",
        f"10 | a | 32 | 2 | 1,000 + 9 | 0.7000 ± 0.0000 | 0.1500 ± 0.0707 | {seen} | 1.00 ± 0.00",
        "10 | b | 64 | 1 | 1,000 + 9 | 0.7000 | 0.1000 |  |  |  | 1.00",
        f"10 | c | 32 | 1 | 1,000 + 9 | 0.7000 | 0.1000 |  |  |  | {ahead:.2f}")]


@pytest.mark.parametrize("words, arms, message", [
    ([], [["a", "dpeth=3"]], "unknown setting 'dpeth': the nearest is 'depth'"), ([], [["a", "seed=3"]], "'seed'"),
    ([], [["a", "depth=three"]], "--depth is 'three': it must be a whole number"), ([], [["../a"]], "needs a name"),
    ([], [["a", "model=none.py"]], "none.py: there is no such file"), ([], [["depth=3"]], "needs a name"),
    ([], [["a"], ["a"]], "two arms have one name"), (["--data", "nowhere"], [["a"]], "no prepared data in nowhere"),
    (["--seeds="], [["a"]], "at least one of each"), (["--config=none.py"], [["a"]], "no config file"),
    (["--budgets", 1e-9], [["a", "learning_rate=-1"]], "arm a-32: .*learning_rate is -1.0: it must be > 0"),
    (["--budgets", 1e-9], [["a"]], "arm a-32: .*a budget of 1e-09 TFLOP is too small: a step costs")])
def test_what_cannot_be_is_refused(study, words, arms, message):
    with pytest.raises(ValueError, match=message):
        study(*words, arms=arms)
    assert not (study.out / "study.json").exists()


def test_the_command_line_and_widths(tmp_path, monkeypatch):
    assert "needs a name" in launch("studies.ablate", "--out=o", "--arm", "a", "depth=9", "--arm", "../b", fails=True)
    monkeypatch.setattr(ablate, "config", str(ROOT / "config/masking.py"))
    wide = ablate.read_arm(tmp_path, 192, "deferred")
    assert wide.changes == {"dim": 192, "mixer_dim": 128, "learning_rate": 2.5e-3} and wide.label == "deferred-192"
    improved = ablate.read_arm(tmp_path, 0, "improved")
    assert improved.changes["mixer_conv"] and improved.width == 96


def test_runs_side_by_side_have_gpus_of_their_own(study, monkeypatch):
    seen = set()

    def start(command, **options):
        seen.add(command[command.index("--device") + 1])
        return SimpleNamespace(returncode=0, stdout="[0.1, 0.1]")
    monkeypatch.setattr(ablate.subprocess, "run", start)
    monkeypatch.setattr(ablate.torch, "cuda", SimpleNamespace(device_count=lambda: 2))
    with pytest.raises(ValueError, match="log.jsonl lacks"):
        study("--parallel=0", "--budgets", 1, arms=[["a"], ["b"]])
    assert seen == {"cuda:0", "cuda:1"}


def test_an_arm_that_fails_stops_the_others(study, monkeypatch):
    def start(command, **options):
        study.calls.append(Path(command[1]).name)
        return SimpleNamespace(returncode=study.calls[-1] == "train.py", stdout="[0.1, 0.1]", stderr="...\nno memory\n")
    monkeypatch.setattr(ablate.subprocess, "run", start)
    with pytest.raises(ValueError, match="arm a-32: no memory"):
        study("--budgets", 1, arms=[["a"], ["b"]])
    assert study.calls == ["plan.py", "plan.py", "train.py"]


def test_pictures_of_other_sets_are_not_scored(study, monkeypatch):
    monkeypatch.setattr(ablate, "read_info", lambda folder: {"settings": {"source": "photos"}})
    study("--budgets", 0.0004, arms=[["a"]])
    assert study.calls == ["plan.py", "train.py", "train.py"]


def test_compare(tmp_path, monkeypatch):
    runs = {"a": ([0.5, 0.1], 8, "x"), "b": ([0.4], 9, "x"), "c": ([0.6], 8, "y"), "d": ([0.5, 0.3, 0.2], 8, "x")}
    for seed, (name, (values, dim, code)) in enumerate(runs.items()):
        (tmp_path / name).mkdir()
        run = {"settings": {"seed": seed, "dim": dim, "out": name}, "model_sha256": "m", "training_sha256": code}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
        entries = [{"step": 1, "loss": 3.0}, *({"step": 100 * i, "val_loss": x} for i, x in enumerate(values, 1))]
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    a, b, c, d = (tmp_path / name for name in runs)
    printed = launch("studies.compare", a, b, c, d)
    assert f"| {a} and 1 more | 2 | 200 | 0.2000 ± 0.1414 |" in printed and f"| {d}" not in printed
    assert f"| {b} | 1 | 100 | 0.4000 |" in printed  # another setting
    assert f"| {c} | 1 | 100 | 0.6000 |" in printed  # another train.py
    assert Image.open(a / "compare.png").size[0] > 500
    assert "which runs" in launch("studies.compare", "--runs=", fails=True)
    monkeypatch.setattr(compare, "runs", (str(b),))
    for file, text in (("log.jsonl", '{"val_loss": 1}'), ("log.jsonl", '{"step": [], "val_loss": 1}'),
                       ("run.json", "[]"), ("run.json", "{")):
        (b / file).write_text(text)
        with pytest.raises(ValueError, match=str(b / file)):
            compare.main()
