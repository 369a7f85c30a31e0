"""The command line and config files, through a small script that prints its settings."""
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from configurator import RULE, check, read_defaults, script_settings
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
DEFAULTS = dict(steps=10, rate=0.5, name="x", fast=False, sides=(32,), words=(), few=0, kind="a")
SCRIPTS = ("train.py", "train_vae.py", "sample.py", "prepare_latents.py", "eval_fid.py", "eval_geneval.py",
           "studies/ablate.py", "studies/compare.py", "training/export.py")


def python(*args, cwd, path):
    """Run a Python file -> (what it printed, its error)"""
    p = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True,
                       env={"PYTHONPATH": str(path), "PATH": "", "HOME": "HOME"})
    assert "Traceback" not in p.stderr and (not p.returncode or len(p.stderr.strip().splitlines()) == 1), p.stderr
    assert bool(p.returncode) == bool(p.stderr)
    return p.stdout, p.stderr


@pytest.fixture
def run(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config").mkdir()
    (tmp_path / "torch").mkdir()  # found, and never imported

    def run(*args, config=None, fails=False):
        if config is not None:
            (tmp_path / "config/a.py").write_text(config)
            args = ("config/a.py", *args)
        printed, error = python("script.py", *args, cwd=tmp_path, path=f"{tmp_path}:{ROOT}")
        assert bool(error) == fails and not (error and printed)
        assert sorted(f.name for f in tmp_path.iterdir()) == ["config", "script.py", "torch"]
        return error or (printed if "--help" in args else eval(printed))

    return run


@pytest.mark.parametrize("args, config, expected", [
    ([], None, {}), ([], "steps = 20\nrate = 2", dict(steps=20, rate=2.0)),
    (["--steps=30"], "steps = 20\nrate = 2", dict(steps=30, rate=2.0)),
    ([], "import math\n_half = 4\nsteps = int(math.sqrt(16)) * _half", dict(steps=16)),
    (["--rate", "-0.6", "--name", "a b"], None, dict(rate=-0.6, name="a b")), (["--name="], None, dict(name="")),
    (["--name=--x=1", "--rate=-1e-3"], None, dict(name="--x=1", rate=-1e-3)), (["--fast"], None, dict(fast=True)),
    (["--fast=False"], "fast = True", {}), (["--fast", "1", "--steps", "2"], None, dict(fast=True, steps=2)),
    (["--sides", "16", "32"], None, dict(sides=(16, 32))), (["--kind", "b"], None, dict(kind="b")),
    (["--words", "a b", "c", "--steps=1"], None, dict(words=("a b", "c"), steps=1)),
    (["--words="], "words = 'a b'", {}), ([], "words = 'a b'", dict(words=("a b",))),
    (["--steps=1", "--steps=2"], None, dict(steps=2)), (["--name=~/x"], None, dict(name="HOME/x")),
    (["--words", "~/x", "a~/b"], None, dict(words=("HOME/x", "a~/b"))), ([], "name = '~/x'", dict(name="HOME/x"))])
def test_defaults_then_file_then_command_line(run, args, config, expected):
    assert run(*args, config=config) == DEFAULTS | expected


@pytest.mark.parametrize("args, config, words", [
    (["--setps=3"], None, ["'setps'", "'steps'"]), ([], "setps = 3", ["config/a.py", "'setps'", "'steps'"]),
    (["--steps=3.5"], None, ["--steps", "3.5", "whole number"]),
    ([], "steps = 'a'", ["config/a.py", "steps", "whole number"]), ([], "steps = True", ["steps", "True"]),
    (["--rate", "x"], None, ["--rate", "number"]), (["--fast=maybe"], None, ["--fast", "True or False"]),
    ([], "sides = 3", ["sides", "list"]), ([], "sides = (1, 'a')", ["sides", "'a'"]),
    (["--name"], None, ["--name needs a value"]), (["--steps=1", "stray"], None, ["stray"]),
    (["config/none.py"], None, ["config/none.py", "no config file"]), ([], "steps = = 3", ["config/a.py", "line 1"]),
    ([], "\nsteps = 1 / 0", ["config/a.py", "line 2", "ZeroDivisionError"]), (["--later=4"], None, ["'later'"]),
    ([], "exit()", ["config/a.py", "line 1", "SystemExit"]), ([], "few = 3", ["few is 3: it must be >= 0, < 3"]),
    (["--rate=nan"], None, ["rate is nan: it must be finite"]), (["--kind=c"], None, ["kind is 'c': it must be a | b"]),
    (["--sides", "8", "0"], None, ["sides is (8, 0): it must be >= 1"])])
def test_mistakes_are_one_clear_line(run, args, config, words):
    message = run(*args, config=config, fails=True)
    assert all(word in message for word in words), message


def test_help_shows_every_setting_with_default_and_comment(run):
    text = run("--help")
    for words in ("A script.", "--steps", "10", "how many", "'x'", "hurry, and say so", "(32,)"):
        assert words in text
    assert "later" not in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers_before_importing_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    name = ["-m", script.replace("/", ".")[:-3]] if "/" in script else [ROOT / script]
    for argument, words in (("--help", "Settings (--name=value"), ("--dvice=cpu", "the nearest is '")):
        assert words in "".join(python(*name, argument, cwd=ROOT, path=tmp_path))


def test_without_torch_or_with_a_stray_prompt_one_line_says_what_to_do(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)")
    _, error = python(ROOT / "train.py", "config/tiny.py", cwd=ROOT, path=tmp_path)
    assert "has no torch" in error and ".venv/bin/activate" in error
    assert 'Did you mean --prompt "a red circle"?' in python(ROOT / "sample.py", "a red circle", cwd=ROOT, path="")[1]


def test_the_networks_fields_are_settings_of_train():
    settings, decided_by_data = script_settings("train.py"), {"latent_channels", "caption_dim"}
    assert not settings.keys() & decided_by_data
    assert settings.items() >= {(f.name, f.default) for f in fields(MicroDiTConfig) if f.name not in decided_by_data}
    assert script_settings("train.py", "config/tiny.py")["dim"] == 128


FREE = {"p_mean", "guidance_scale", "guidance_scales", "sample_guidance"}  # any finite number will do


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_has_a_comment_and_every_number_a_rule(script):
    described = read_defaults(ROOT / script)
    check({name: default for name, (default, _) in described.items()}, described)
    for name, (default, comment) in described.items():
        example = (*default, "")[0] if isinstance(default, tuple) else default
        number = type(example) in (int, float) and name not in FREE
        assert RULE.search(comment) if number else comment, f"{script}: {name}"
