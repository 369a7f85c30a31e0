"""Files that were made to do harm, or by accident: pictures, archives, captions, and with hypothesis what JSON and
tensors may hold. FUZZ=5000 python -m pytest -n 0 tests/test_hostile.py -k fuzz runs long."""
import copy
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import pytest
import torch
from conftest import ROOT, SMALL, launch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from common.images import open_image
from common.machine import pick_device
from common.schema import check
from configurator import check as check_settings
from configurator import read_config, read_defaults
from encoders.text import clean
from model import MicroDiTConfig
from pictures import captions, sources
from pictures.decode import Unusable, decode_ahead, load, start_workers
from training import checkpoint
from training.dataset import Dataset
from training.report import draw_progress
from training.state import find_resume

EXAMPLES = int(os.environ.get("FUZZ", 25))


def png(width=20, height=20, color="red"):
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


# --- pictures --------------------------------------------------------------------------------------------------------


def test_no_picture_starts_another_program(tmp_path):
    with pytest.raises(UnidentifiedImageError):
        open_image(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"))
    with pytest.raises(Unusable, match="UnidentifiedImageError"):
        load(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n", 1)
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    calls = [f"{path.relative_to(ROOT)}: {line}" for path in scripts for line in path.read_text().splitlines()
             if "Image.open(" in line]
    kept = ("tests/", "common/images.py", "training/report.py", "docs/masking_figure.py")  # of our own making
    assert not [line for line in calls if not line.startswith(kept)]


def test_a_picture_too_long_for_memory():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    long = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2_700_000, 32, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(Unusable, match="2700000 x 32, more than is harmless"):
        load(long, 16)


def die(picture, resolutions, shortest):
    if picture == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return picture.upper()


def test_a_picture_that_ends_its_process_costs_only_itself(monkeypatch):
    monkeypatch.setattr("pictures.decode.squares", die)
    names = ["a", "b", "deadly", "c", "d", "e"]
    with start_workers(2) as pool:
        found = [entry[1] for _, entry in decode_ahead((((0, 0, False), (n, n, "")) for n in names), pool, 2, (8,), 8)]
    assert [str(f).partition(":")[0] for f in found] == ["A", "B", "decoding it ends the process", "C", "D", "E"]


# --- archives --------------------------------------------------------------------------------------------------------


def names_of(parts):
    return {name: picture for part in parts for sample in part.samples(lambda p: True) for name, picture, _ in sample}


def test_what_is_too_large_in_an_archive_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(10_000))
        archive.writestr("1.png", png())
        archive.writestr("1.bin", bytes(10_000))
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        for name, data in (("0.png", bytes(10_000)), ("1.bin", bytes(10_000)), ("1.png", png()), ("1.txt", b"one")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    for name in ("a.zip", "b.tgz"):
        found = names_of(sources.find_parts(str(tmp_path / name), 10))
        assert "10,000 bytes, more than is harmless" in found[f"{name}/0.png"], found
        assert found[f"{name}/1.png"] == png() and len(found) == 2


def test_a_tar_whose_header_would_fill_the_memory(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2 ** 33
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    found = names_of(sources.find_parts(str(tmp_path / "a.tar"), 10))
    assert "a header of 8,589,934,592 bytes" in found["a.tar"]
    with pytest.raises(ValueError, match="a header of"):
        captions.read_captions(tmp_path / "a.tar")


def test_a_sparse_file_in_a_tar_is_as_large_as_it_says(tmp_path):
    with open(tmp_path / "0.png", "wb") as file:
        file.truncate(3 * 2 ** 30)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "a.tar", "-C", tmp_path, "0.png"], check=True)
    assert (tmp_path / "a.tar").stat().st_size < 20_000
    assert "more than is harmless" in names_of(sources.find_parts(str(tmp_path / "a.tar"), 10))["a.tar/0.png"]


def test_want_of_memory_for_one_file_does_not_end_an_archive():
    def fail():
        raise MemoryError
    assert "no memory" in sources.content(10, fail)


def test_a_table_of_captions_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "MOST_BYTES_OF_TABLE", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", json.dumps({f"{i}.png": "a" for i in range(500)}))
    with pytest.raises(ValueError, match="more than is harmless"):
        captions.read_captions(tmp_path / "a.zip")


def test_a_huge_limit_is_refused_before_lists_are_built(tmp_path):
    started = time.time()
    message = launch("prepare_latents.py", "--limit=300000000", f"--out={tmp_path / 'd'}", fails=True)
    assert "would need about" in message and time.time() - started < 15 and not (tmp_path / "d").exists()


# --- captions --------------------------------------------------------------------------------------------------------


def test_captions_are_decoded_by_their_mark(tmp_path):
    for i, data in enumerate(("naïve é".encode(), "naïve é".encode("utf-8-sig"), "naïve é".encode("utf-16"),
                              "naïve é".encode("utf-32"), "naïve é".encode("latin-1"))):
        (tmp_path / f"{i}.txt").write_bytes(data)
        (tmp_path / f"{i}.png").write_bytes(png())
    choose = captions.caption_chooser()
    (part,) = sources.find_parts(str(tmp_path), 10)
    chosen = [choose(*entry) for (entry,) in part.samples(lambda position: True)]
    assert [caption for _, _, caption in chosen[:4]] == ["naïve é"] * 4
    assert "its caption is neither UTF-8" in chosen[4][1]
    table = json.dumps({"a.png": "naïve"}, ensure_ascii=False).encode("utf-16")
    assert captions.captions_by_name("a.json", table) == {"a.png": "naïve"}


def test_control_characters_that_were_windows_1252():
    assert clean("it\x92s \x93quoted\x94 \x80 5 \x85") == "it's \"quoted\" € 5 …"
    assert clean("\x81") == "\x81"


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_config_that_exits_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("exit()")
    with pytest.raises(ValueError, match="a.py, line 1: SystemExit"):
        read_config(tmp_path / "a.py", {})


def test_ctrl_c_while_a_script_is_starting(tmp_path):
    (tmp_path / "torch.py").write_text(  # a shell's background jobs ignore SIGINT, and so does what they start
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)")
    for script in ("train.py", "sample.py", "prepare_latents.py", "eval_fid.py", "train_vae.py"):
        p = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert p.returncode and p.stderr == f"{script}: stopped\n", p.stderr


@pytest.mark.parametrize("name", ["cpu:zz", "cuda:zz", "cuda:99", "tpu"])
def test_a_device_that_is_none(name):
    with pytest.raises(ValueError, match=f"device is '{name}'"):
        pick_device(name)


# --- anything in a file ----------------------------------------------------------------------------------------------

ODD = st.one_of(st.none(), st.booleans(), st.integers(-10, 10), st.sampled_from([10 ** 9, 2 ** 70, -1.5, 1e308]),
                st.floats(), st.text(max_size=8), st.just([]), st.just({}), st.lists(st.integers(), max_size=3),
                st.just("../../etc/passwd"))


def places(value, path=()):
    """All places in a JSON value"""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(value, draw):
    """The value with one to three places replaced by something odd, or taken out"""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([p for p in places(value) if p]))
        inner = value
        for key in way:
            inner = inner[key]
        if draw(st.booleans()) and isinstance(inner, dict):
            del inner[last]
        else:
            inner[last] = draw(ODD)
    return value


@pytest.fixture(autouse=True)
def little_memory():
    """An error, not the end of the machine, where a test wants 2 GB more than it has"""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


fuzz = settings(max_examples=EXAMPLES, deadline=20_000, derandomize=EXAMPLES == 25, database=None,
                suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))


def named(action, name):
    """Do it; a ValueError must be of one line and name the file"""
    try:
        action()
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error), error


@fuzz
@given(data=st.data())
def test_fuzz_dataset_json(shapes16, tmp_path_factory, data):
    folder = shutil.copytree(shapes16, tmp_path_factory.mktemp("fuzz") / "d", copy_function=os.link)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").unlink()
    (folder / "dataset.json").write_text(json.dumps(changed(info, data.draw)))

    def use():
        dataset = Dataset(folder, 8)
        dataset.read([0, len(dataset) - 1])
        MicroDiTConfig(latent_channels=dataset.info["vae"]["latent_channels"])
    named(use, str(folder))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def run(shapes16, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    launch("train.py", f"--data={shapes16}", f"--out={out}", *SMALL, "--max_steps=1")
    return Run(checkpoint.read(checkpoint.steps_of(out)[0], ("",)))


class Run(tuple):
    """(what a checkpoint says of itself, its tensors), in a failure's report by its name alone"""
    def __repr__(self):
        return "run"


@fuzz
@given(data=st.data())
def test_fuzz_metadata_of_checkpoints(run, tmp_path_factory, data):
    about, tensors = run
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "step_00000001.safetensors"
    checkpoint.save(path, tensors, changed(about, data.draw))
    named(lambda: checkpoint.load_network(path), str(path))
    named(lambda: find_resume(folder, about), str(folder))
    shutil.rmtree(folder)


@fuzz
@given(data=st.data())
def test_fuzz_tensors_of_checkpoints(run, tmp_path_factory, data):
    about, tensors = run
    tensors = dict(tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.integers(0, 40), max_size=4))
    odd = torch.zeros(shape, dtype=data.draw(st.sampled_from(list(checkpoint.TYPES))))
    if data.draw(st.booleans()):
        del tensors[name]
    tensors[data.draw(st.sampled_from([name, f"{name}x", name.replace(".0.", ".99.")]))] = odd
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "step_00000001.safetensors"
    checkpoint.save(path, tensors, about)
    named(lambda: checkpoint.load_network(path, data.draw(st.booleans())), str(path))
    state = new_state(about)
    named(lambda: state.load(path), str(path))
    shutil.rmtree(folder)


def new_state(about):
    from training.optimizer import Average, Optimizer
    from training.state import State
    net = checkpoint.MicroDiT(MicroDiTConfig(**about["config"]))
    return State(net, Optimizer(net, "adamw", 1e-3, betas=(0.9, 0.99), weight_decay=0.0), Average(0.9, 0))


@fuzz
@given(lines=st.lists(st.one_of(
    st.binary(max_size=30), st.fixed_dictionaries({}, optional={"step": ODD, "loss": ODD, "val_loss": ODD}).map(
        lambda entry: json.dumps(entry).encode())), max_size=5))
def test_fuzz_log(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "log.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 1, "loss": 0.5}']))
    draw_progress(folder)
    assert (folder / "progress.png").exists()
    shutil.rmtree(folder)


@fuzz
@given(data=st.binary(max_size=200), kind=st.sampled_from([".txt", ".json", ".jsonl", ".tsv", ".csv"]))
def test_fuzz_captions(tmp_path_factory, data, kind):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / f"a{kind}").write_bytes(data)
    named(lambda: captions.read_captions(folder / f"a{kind}")("a.png"), "a" + kind)
    shutil.rmtree(folder)


@fuzz
@given(data=st.data())
def test_fuzz_settings_of_the_network(data):
    described = read_defaults(ROOT / "train.py")
    fields = {name: described[name][0] for name in MicroDiTConfig.__dataclass_fields__ if name in described}
    name = data.draw(st.sampled_from(sorted(fields)))
    value = {int: st.integers(-2, 70), float: st.floats(), bool: st.booleans(), tuple: st.tuples(
        st.floats(-1, 4), st.floats(-1, 4))}[type(fields[name])]
    value = data.draw(value)
    try:
        check_settings(fields | {name: value}, described)
        config = MicroDiTConfig(**{"dim": 32, "head_dim": 8, "mixer_dim": 16, "depth": 2} | {name: value})
        with torch.device("meta"):
            checkpoint.MicroDiT(config)
    except ValueError as error:
        assert "\n" not in str(error)


def test_a_schema_names_the_place():
    with pytest.raises(ValueError, match=r"a.json: b\[1\].c is \"x\": it must be a finite number"):
        check({"b": [{"c": 1}, {"c": "x"}]}, {"b": [{"c": (lambda v: type(v) is int, "a finite number")}]}, "a.json")
