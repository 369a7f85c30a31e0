"""Whose a folder is: a folder belongs to one command, and nothing is deleted or replaced but what this very run wrote.

PAIRS=20 python -m pytest -n 0 -s tests/test_folders.py -k together starts every script so many times together.
"""
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, WORK, launch

from common import files
from common.files import HELD, DiskFull, read_json, temporary_of, whole, write_bytes, write_json
from common.folders import DESCRIPTIONS, described, differences, lock, same_command

PAIRS = int(os.environ.get("PAIRS", 1))
ODD = {"a link to a file": lambda p, target: p.symlink_to(target), "a folder": lambda p, target: p.mkdir(),
       "a file": lambda p, target: p.write_text("mine")}


@pytest.fixture(autouse=True)
def nothing_is_held():
    yield
    for number, _ in HELD.values():
        os.close(number)
    HELD.clear()


@pytest.fixture(scope="module")
def run(shapes16, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    launch("train.py", f"--data={shapes16}", f"--out={out}", *SMALL, "--max_steps=8")
    return out


def holder(folder):
    """A process that has the lock of a folder until it is killed"""
    code = "import sys; from common.folders import lock; lock(sys.argv[1]); print('held', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "held\n"
    return process


# --- locks ---


def test_a_folder_is_one_processs_until_it_ends(tmp_path):
    other = holder(tmp_path / "new")
    began = time.monotonic()
    with pytest.raises(ValueError, match="is in use by another process"):
        lock(tmp_path / "new")
    assert time.monotonic() - began < 1 and not os.listdir(tmp_path / "new")  # it needs no file
    other.kill()
    other.wait()
    lock(tmp_path / "new")
    lock(tmp_path / "new")  # again is no matter


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_folder_that_was_taken_away_is_not_written_into(tmp_path, made_anew):
    folder = tmp_path / "run"
    lock(folder)
    write_json(folder / "a.json", 1)
    shutil.rmtree(folder)
    if made_anew:
        folder.mkdir()
    for name, write in (("b.json", write_json), ("b.jsonl", files.append_lines), ("deep/b.json", write_json)):
        with pytest.raises(ValueError, match="removed or made anew while this process worked in it"):
            write(folder / name, [1])
    assert not folder.exists() or not os.listdir(folder)


TOGETHER = {  # the arguments of each script, and what its folder holds in the end
    "train.py": (lambda data, run: [f"--data={data}", *SMALL, "--max_steps=60"], "step_00000060.safetensors"),
    "train_vae.py": (lambda data, run: ["--limit=40", "--width=48", "--max_steps=30", "--resolution=32"],
                     "vae.safetensors"),
    "prepare_latents.py": (lambda data, run: ["--limit=400", "--resolutions=16", "--workers=0"], "dataset.json"),
    "sample.py": (lambda data, run: [f"--checkpoint={run}", "--prompt", *["a red circle"] * 12, "--steps=40"], None),
    "eval_fid.py": (lambda data, run: [f"--checkpoint={run}", "--captions=shapes", "--count=24", "--steps=10"],
                    "results.json")}


@pytest.mark.parametrize("script", TOGETHER)
@pytest.mark.parametrize("pair", range(PAIRS))
def test_of_two_that_are_started_together_one_works(script, pair, shapes16, run, tmp_path):
    arguments, result = TOGETHER[script]
    command = [sys.executable, str(ROOT / script), *arguments(shapes16, run), f"--out={tmp_path / 'new'}"]
    both = []
    for _ in range(2):
        both.append(subprocess.Popen(command, cwd=WORK.name, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                                     stderr=subprocess.PIPE, stdout=subprocess.PIPE))
        time.sleep(0.2 * pair / PAIRS)
    output = [p.communicate(timeout=120) for p in both]
    assert sorted(p.returncode for p in both) == [0, 1], output
    assert sum("is in use by another process" in err and len(err.splitlines()) == 1 for _, err in output) == 1, output
    assert result is None or (tmp_path / "new" / result).exists()
    assert not [name for name in os.listdir(tmp_path / "new") if name.endswith(".tmp")]


def test_an_error_of_two_processes_is_one_line_of_ours(shapes16, tmp_path):
    other = holder(tmp_path / "run")
    refused = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                              ROOT / "train.py", f"--data={shapes16}", *SMALL, f"--out={tmp_path / 'run'}"], text=True,
                             capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    other.kill()
    assert refused.returncode and refused.stderr.count("is in use by another process") == 1, refused.stderr
    assert refused.stderr.count("train.py: ") == 1 and "train.py\", line" not in refused.stderr, refused.stderr


# --- whose a folder is ---


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_folder_of_another_script_is_refused(name, tmp_path, shapes16):
    write_json(tmp_path / name, {"settings": {}})
    for other in DESCRIPTIONS.keys() - {name}:
        with pytest.raises(ValueError, match=f"belongs to {DESCRIPTIONS[name]}, as {name} is there"):
            described(tmp_path, other, "a")
    assert described(tmp_path, name, "a") == {"settings": {}}


@pytest.mark.parametrize("script, name", [
    ("train.py", "log.jsonl"), ("train.py", "model.py"), ("train.py", "samples"),
    ("train_vae.py", "reconstructions.png"), ("prepare_latents.py", "skipped.jsonl"),
    ("prepare_latents.py", "00000.captions.npy")])
@pytest.mark.parametrize("kind", ODD)
def test_files_that_no_command_of_ours_wrote_stay(script, name, kind, shapes16, tmp_path):
    (tmp_path / "thesis.md").write_text("mine")
    ODD[kind](tmp_path / name, tmp_path / "thesis.md")
    arguments, _ = TOGETHER[script]
    before = {p: os.lstat(p).st_mtime_ns for p in tmp_path.rglob("*")}
    message = launch(script, *arguments(shapes16, None), f"--out={tmp_path}", fails=True)
    assert name in message and "give another --out" in message
    assert before == {p: os.lstat(p).st_mtime_ns for p in tmp_path.rglob("*")}


def test_what_a_kill_has_left_goes_by_its_exact_name_and_a_lost_run_json_is_made_again(run, shapes16, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "run.json").unlink()
    (folder / "step_00000008.safetensors").unlink()
    ours = [temporary_of(folder / name) for name in ("step_00000006.safetensors", "log.jsonl")]
    others = [temporary_of(folder / name) for name in ("thesis.md", "step_best.safetensors")]
    for leftover in ours + others:
        leftover.mkdir()
        (leftover / "part").write_text("part")
    printed = launch("train.py", f"--data={shapes16}", f"--out={folder}", *SMALL, "--max_steps=8")
    assert not any(p.exists() for p in ours) and all(p.exists() for p in others)
    assert "going on from step 4" in printed and read_json(folder / "run.json")["id"]


def test_what_differs_is_said_and_what_does_not_matter_is_not():
    old, new = {"seed": 1, "device": "cpu", "betas": [1, 2], "gone": 3}, {"seed": 2, "device": "cuda", "betas": (1, 2)}
    assert differences(old, new) == ["seed: 1 there, 2 now"]
    with pytest.raises(ValueError, match=r"x belongs to another command \(seed: 1 there, 2 now; more\): give another"):
        same_command("x", old, new, ["more"])
    same_command("x", old, new | {"seed": 1})


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"settings": 5}'])
@pytest.mark.parametrize("script, name", [("train.py", "run.json"), ("train_vae.py", "vae.json"),
                                          ("prepare_latents.py", "dataset.json")])
def test_a_damaged_description_ends_in_one_line(script, name, content, shapes16, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = launch(script, *TOGETHER[script][0](shapes16, None), f"--out={tmp_path}", fails=True)
    assert str(tmp_path) in message and (tmp_path / name).read_bytes() == content


# --- files ---


def test_a_file_is_there_whole_or_not_at_all(tmp_path, small_disk):
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"
    for kind, make in ODD.items():  # of the temporary folder's own name
        if kind != "a folder":
            make(temporary_of(tmp_path / kind), tmp_path / "a")
            with pytest.raises(OSError):
                write_bytes(tmp_path / kind, b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    os.umask(before := os.umask(0))
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~before
    with pytest.raises(DiskFull, match="disk full while writing"):
        write_bytes(small_disk(1) / "a", bytes(2 ** 21))


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    files.append_lines(tmp_path / "a", [{"a": 1}])
    with pytest.raises(OSError):
        files.append_lines("/dev/full", [{"b": 2}])
    assert files.read_jsonl(tmp_path / "a") == [{"a": 1}]
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError):
        files.append_lines(tmp_path / "b", [{"b": 2}])


def test_pictures_are_opened_by_one_function():
    opening = {p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py"))
               if p.parent.name != "tests" and "Image.open(" in p.read_text(encoding="utf-8")}
    assert opening == {"common/images.py"}
