"""README.md and docs/: their size, their links, and their commands, which are run or at least still exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from configurator import script_settings

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
# What happens to the commands of the pages: every one has a part that is listed here
COMMANDS = {
    "-r requirements.txt": "not run: installs from the network and takes ten minutes",
    "-r requirements-dev.txt": "not run: installs from the network, and is the suite itself",
    "--source photos/ --out data/photos ": "here", "--data data/photos ": "here", "--checkpoint runs/photos": "here",
    "training.export": "here", "docs/cifar.py": "here", "--source data/cifar10-": "here", "--out runs/cifar": "here",
    "curl": "not run: a download", "pip install": "not run: a download", "img2dataset": "not run: a download",
    "sed -i": "tests/test_datasets.py", "prepare_latents.py --source": "tests/test_datasets.py",
    "--source photos/ --out data/photos512": "not run: a download; tests/test_published.py has small models",
    "--checkpoint VSehwag24": "not run: a download; tests/test_published.py has small files",
    "phase": "not run: days of eight GPUs; tests/test_chain.py scales it down", "done": "the end of that loop",
    "train.py config/xl2_": "not run: days of eight GPUs; tests/test_chain.py scales it down",
    "bench.py": "not run: minutes; tests/test_bench.py scales it down",
    "runs/gelu": "not run: two minutes; tests/test_train.py trains less", "runs/relu2": "not run: as runs/gelu",
    "train.py config/small.py": "not run: hours; tests/test_train.py trains less with several processes",
    "--checkpoint runs/tiny": "not run: needs that run; tests/test_eval_fid.py has smaller ones",
    "--captions coco": "tests/test_eval_fid.py", "geneval": "not run: a download; tests/test_geneval.py",
    "studies.ablate": "not run: up to an hour; tests/test_ablate.py scales it down",
    "prepare_speed": "not run: minutes of models of the published sizes", "tests/test_kills.py": "not run: half an hour",
}
OF_TORCHRUN = {"nproc_per_node", "nnodes", "rdzv-backend", "rdzv-endpoint", "max-restarts"}


def commands(text):
    """Return the commands in the shell blocks of a page, each one line."""
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(" +", " ", line.strip()) for line in lines if line.strip() and not line.startswith("#")]


def invocations(text):
    """Yield (script of ours, its arguments) of every command in a page's blocks and its `inline code`."""
    for line in commands(text) + re.findall(r"`([^`]*\.py [^`]*|python -m [^`]*)`", re.sub(r"\s+", " ", text)):
        for command in re.split(r"&&|\|\||;", line):
            words = shlex.split(command)
            if "-m" in words and "pytest" not in command and "venv" not in words:
                at = words.index("-m") + 1
                yield words[at].replace(".", "/") + ".py", words[at + 1:]
            elif scripts := [i for i, word in enumerate(words) if word.endswith(".py") and "pytest" not in command]:
                yield words[scripts[0]], words[scripts[0] + 1:]


def test_size_of_the_readme():
    lines = PAGES["README.md"].splitlines()
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGES["README.md"], re.M | re.S)
    assert len(lines) <= 160 and len(blocks) == 2 and all(len(block.splitlines()) == 1 for block in blocks)
    assert not [line for line in lines if len(line) > 110 and line not in "".join(blocks)]
    assert not [line for page in PAGES.values() for line in page.splitlines() if len(line) > 120 and line not in lines]


def test_every_command_is_run_or_has_a_reason():
    lines = [line for page in PAGES.values() for line in commands(page)]
    assert not [line for line in lines if not any(part in line for part in COMMANDS)]
    assert not [part for part in COMMANDS if not any(part in line for line in lines)]
    assert not [name for reason in COMMANDS.values() for name in re.findall(r"tests/\w+\.py", reason)
                if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_scripts_settings_and_configs_exist(page):
    for script, arguments in invocations(PAGES[page]):
        assert (ROOT / script).is_file(), script
        assert not [a for a in arguments if re.fullmatch(r"config/\w+\.py", a) and not (ROOT / a).is_file()]
        names = {a[2:].partition("=")[0] for a in arguments if a.startswith("--")}
        literal = re.findall(r'"--(\w+)"', (ROOT / script).read_text(encoding="utf-8"))
        assert not names or names <= {*script_settings(script), *literal}, (script, names)
    known = {name for path in ROOT.glob("*.py") for name in script_settings(path.name)} | OF_TORCHRUN
    assert {name for name in re.findall(r"`--([\w-]+)", PAGES[page])} <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)]*)\)", PAGES[page]):
        target = ((ROOT if page == "README.md" else ROOT / "docs") / path) if path else ROOT / "docs" / page
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", PAGES.get(target.name, ""), re.M)
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, anchor


def test_the_example_of_an_edit_is_a_line_of_the_model():
    (line,) = re.findall(r"^-( .*)$", PAGES["README.md"], re.M)
    assert line in (ROOT / "model.py").read_text(encoding="utf-8")


def test_photos_and_cifar(tmp_path):
    """The commands marked "here", with fewer steps and another folder for data"""
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (40, 36), (30 * i, 90, 120)).save(tmp_path / f"photos/{i}.jpg")
        (tmp_path / f"photos/{i}.txt").write_text("a photo of a cat")
    (tmp_path / "data").mkdir()
    records = np.random.default_rng(0).integers(0, 10, (9, 3073), dtype=np.uint8)
    with tarfile.open(tmp_path / "data/cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in ("data_batch_1", "test_batch"):
            records.tofile(tmp_path / name)
            tar.add(tmp_path / name, f"cifar-10-batches-bin/{name}.bin")
    for line in commands(PAGES["README.md"]) + commands(PAGES["measured.md"]):
        if any(part in line for part, how in COMMANDS.items() if how == "here"):
            words = shlex.split(line.replace("runs/tiny", "runs/photos"))[1:]
            few = ("--max_steps=2", "--unmasked_steps=1", "--batch_size=4", "--micro_batch_size=4", "--sample_every=0")
            words += few if words[0] == "train.py" else ("--steps=2",) if words[0] == "sample.py" else ()
            words[0] = words[0] if words[0] == "-m" else ROOT / words[0]
            done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                                  env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
            assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "data/cifar10-val.tar") as tar:
        assert tar.getnames()[:2] == ["00000.png", "00000.txt"] and len(tar.getnames()) == 18
        pixels = np.asarray(Image.open(tar.extractfile("00003.png")))
    assert np.array_equal(pixels[..., 1].ravel(), records[3, 1025:2049])
    assert (tmp_path / "samples").exists() and (tmp_path / "tiny.safetensors").exists()


def test_the_figure_is_what_its_script_draws(tmp_path):
    script = shutil.copy(ROOT / "docs/masking_figure.py", tmp_path)
    subprocess.run([sys.executable, script], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    drawn, kept = (np.asarray(Image.open(f / "deferred_masking.png"), float) for f in (tmp_path, ROOT / "docs"))
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 1
