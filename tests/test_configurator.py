"""The command line and config files, through a small script that prints its settings."""

import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from configurator import allowed, check, read_defaults, script_settings
from model import MicroDiTConfig

SCRIPT = '''"""A script.

    python script.py"""
from configurator import configure

steps = 10          # how many
rate = 0.5          # how fast
name = "x"          # what it is called
fast = False        # hurry, and say
                    # so
sides = (32,)       # of the pictures (>= 1)
words = ()          # any
few = 0             # how few (>= 0, < 3)
kind = "a"          # which (a | b)

if __name__ == "__main__":
    configure(globals())

later = 3
print(dict(steps=steps, rate=rate, name=name, fast=fast, sides=sides, words=words, few=few, kind=kind))
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config").mkdir()
    (tmp_path / "torch").mkdir()  # found, and never imported

    def run(*args, config=None, fails=False):
        if config is not None:
            (tmp_path / "config/a.py").write_text(config)
            args = ("config/a.py", *args)
        p = subprocess.run([sys.executable, "script.py", *args], cwd=tmp_path, capture_output=True, text=True,
                           env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""})
        assert (p.returncode != 0) == fails, p.stderr
        assert "Traceback" not in p.stderr
        if fails:
            assert p.stdout == "" and len(p.stderr.strip().splitlines()) == 1
            assert sorted(f.name for f in tmp_path.iterdir()) == ["config", "script.py", "torch"]
            return p.stderr
        return p.stdout if "--help" in args else eval(p.stdout)

    return run


DEFAULTS = dict(steps=10, rate=0.5, name="x", fast=False, sides=(32,), words=(), few=0, kind="a")


def test_defaults_file_command_line(run):
    assert run() == DEFAULTS
    assert run(config="steps = 20\nrate = 2") == DEFAULTS | dict(steps=20, rate=2.0)
    assert run("--steps=30", config="steps = 20\nrate = 2") == DEFAULTS | dict(steps=30, rate=2.0)


@pytest.mark.parametrize("args, expected", [
    (["--steps", "3"], dict(steps=3)), (["--rate=-1e-3"], dict(rate=-1e-3)), (["--rate", "-0.6"], dict(rate=-0.6)),
    (["--name", "a b"], dict(name="a b")), (["--name="], dict(name="")), (["--name=--x=1"], dict(name="--x=1")),
    (["--fast"], dict(fast=True)), (["--fast=False"], dict(fast=False)),
    (["--fast", "1", "--steps", "2"], dict(fast=True, steps=2)), (["--sides", "16", "32"], dict(sides=(16, 32))),
    (["--sides=8"], dict(sides=(8,))), (["--words", "a b", "c", "--steps=1"], dict(words=("a b", "c"), steps=1)),
    (["--steps=1", "--steps=2"], dict(steps=2))])
def test_values(run, args, expected):
    assert run(*args) == DEFAULTS | expected


@pytest.mark.parametrize("args, config, words", [
    (["--setps=3"], None, ["'setps'", "'steps'"]), ([], "setps = 3", ["config/a.py", "'setps'", "'steps'"]),
    (["--steps=3.5"], None, ["--steps", "3.5", "whole number"]),
    ([], "steps = 'a'", ["config/a.py", "steps", "whole number"]), ([], "steps = 1.0", ["steps", "1.0"]),
    ([], "steps = True", ["steps", "True"]), (["--rate", "x"], None, ["--rate", "number"]),
    (["--fast=maybe"], None, ["--fast", "True or False"]), (["--sides", "a"], None, ["--sides", "whole number"]),
    ([], "sides = 3", ["sides", "list"]), ([], "sides = (1, 'a')", ["sides", "'a'"]),
    (["--name"], None, ["--name needs a value"]), (["stray", "more"], None, ["stray"]),
    (["config/none.py"], None, ["config/none.py", "no config file"]),
    ([], "steps = = 3", ["config/a.py", "line 1"]),
    ([], "\nsteps = 1 / 0", ["config/a.py", "line 2", "ZeroDivisionError"]), (["--later=4"], None, ["'later'"]),
    (["--steps=1", "stray"], None, ["stray"])])
def test_mistakes_are_one_clear_line(run, args, config, words):
    message = run(*args, config=config, fails=True)
    assert all(word in message for word in words), message


def test_a_config_file_may_compute_and_import(run):
    assert run(config="import math\n_half = 4\nsteps = int(math.sqrt(16)) * _half") == DEFAULTS | dict(steps=16)


def test_help_shows_every_setting_with_default_and_comment(run):
    text = run("--help")
    for words in ("A script.", "--steps", "10", "how many", "'x'", "hurry, and say so", "(32,)"):
        assert words in text
    assert "later" not in text


SCRIPTS = ("train.py", "sample.py", "prepare_latents.py", "eval_fid.py", "eval_geneval.py", "bench.py",
           "studies/ablate.py", "training/export.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers_before_importing_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    module = script.replace("/", ".")[:-3] if "/" in script else ""
    for args, words in ((["--help"], "Settings (--name=value"), (["--dvice=cpu"], "the nearest is '")):
        p = subprocess.run([sys.executable, *(["-m", module] if module else [script]), *args], cwd=ROOT, text=True,
                           capture_output=True, env={"PYTHONPATH": str(tmp_path), "PATH": ""})
        assert words in p.stdout + p.stderr and "Traceback" not in p.stderr, p.stderr
    found = read_defaults(ROOT / script)
    assert found and all(comment for _, comment in found.values()), [n for n, (_, c) in found.items() if not c]


def test_without_torch_or_with_a_stray_prompt_one_line_says_what_to_do(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)")
    for args, path, words in ((("train.py", "config/tiny.py"), tmp_path, ("has no torch", ".venv/bin/activate")),
                              (("sample.py", "a red circle"), "", ('Did you mean --prompt "a red circle"?',))):
        p = subprocess.run([sys.executable, *args], cwd=ROOT, text=True, capture_output=True,
                           env={"PYTHONPATH": str(path), "PATH": ""})
        assert p.returncode and all(word in p.stderr for word in words) and len(p.stderr.strip().splitlines()) == 1


def test_the_networks_fields_are_settings_of_train():
    settings, decided_by_data = script_settings("train.py"), {"latent_channels", "caption_dim"}
    assert not settings.keys() & decided_by_data
    assert settings.items() >= {(f.name, f.default) for f in fields(MicroDiTConfig) if f.name not in decided_by_data}
    assert script_settings("train.py", "config/tiny.py")["dim"] == 128


FREE = {"p_mean", "guidance_scale", "guidance_scales", "sample_guidance"}  # any finite number will do


@pytest.mark.parametrize("script", (*SCRIPTS, "train_vae.py", "studies/prepare_speed.py"))
def test_every_number_says_what_it_may_be_and_is_it(script):
    described = read_defaults(ROOT / script)
    check({name: default for name, (default, _) in described.items()}, described)
    for name, (default, comment) in described.items():
        example = (*default, "")[0] if isinstance(default, tuple) else default
        if type(example) in (int, float) and name not in FREE:
            assert any(allowed(comment)), f"{script}: {name} has no rule like (>= 1) in its comment"


@pytest.mark.parametrize("args, words", [
    (["--few=-1"], "few is -1: it must be at least 0 and below 3"), (["--few=3"], "few is 3"),
    (["--rate=nan"], "finite"),
    (["--rate=inf"], "rate is inf: it must be finite"), (["--kind=c"], "kind is 'c': it must be a or b"),
    (["--sides", "8", "0"], "sides is (8, 0): it must be at least 1")])
def test_values_out_of_range(run, args, words):
    assert run("--few=2", "--kind", "b", "--rate=-3")["few"] == 2
    assert words in run(*args, fails=True)
