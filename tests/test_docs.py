"""README.md and docs/: their size, their links, and their commands, which are run or at least still exist."""

import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, launch
from PIL import Image

from configurator import script_settings

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
COMMANDS = {  # which test runs the commands of the pages that have such parts ("here": below), or why none does
    "here": ("--source photos/ --out data/photos ", "--data data/photos ", "--checkpoint runs/photos",
             "training.export", "train_vae.py --source", "docs/real_pictures.py", "--source data/emoji",
             "--source data/clothing", "--data data/emoji64", "--data data/clothing64"),
    "a download": ("git clone", "-r requirements.txt", "-r requirements-dev.txt", "pip install", "img2dataset",
                   "geneval"),
    "a download; tests/test_published.py has small ones": ("data/photos512", "--checkpoint VSehwag24"),
    "tests/test_datasets.py": ("sed -i", "torchrun --nproc_per_node=8 prepare_latents.py"),
    "tests/test_eval_fid.py has smaller ones": ("--captions coco", "--checkpoint runs/tiny", "awk 1",
                                                "--checkpoint runs/clothing"),
    "days of eight GPUs; tests/test_chain.py scales it down": ("phase", "done", "train.py config/xl2_"),
    "minutes or hours; tests/test_train.py trains less": ("runs/gelu", "runs/relu2", "train.py config/small.py"),
    "minutes; tests/test_bench.py scales it down": ("bench.py",),
    "up to an hour; tests/test_studies.py scales it down": ("studies.ablate", "runs/masking_vae"),
    "minutes of models of the published sizes": ("prepare_speed",), "half an hour": ("tests/test_kills.py",),
    "a part of the suite, and what Slurm's lines need": ("tests/test_gpu.py", "export TORCH_")}
PARTS = [part for parts in COMMANDS.values() for part in parts]
OTHERS = {"nproc_per_node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "max-restarts",
          "help"}  # torchrun's and ours


def commands(text):
    """Return the commands in the shell blocks of a page, each one line."""
    lines = "".join(re.findall(r"^```(?:sh|bash)\n(.*?)^```$", text, re.M | re.S)).replace("\\\n", " ").splitlines()
    return [re.sub(" +", " ", line.strip()) for line in lines if line.strip() and not line.startswith("#")]


def invocations(text):
    """Yield (script of ours, its arguments) of every command in a page's blocks and its `inline code`."""
    prose = re.sub(r"\s+", " ", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    inline = [code for code in re.findall(r"`([^`]+)`", prose) if re.search(r"\.py |python -m ", code)]
    for line in commands(text) + inline:
        for words in map(shlex.split, re.split(r"&&|\|\||;", line)):
            module = [words[i + 1].replace(".", "/") + ".py" for i, word in enumerate(words) if word == "-m"]
            script = (module + [word for word in words if word.endswith(".py")] + [""])[0]
            if script not in ("", "venv.py", "pytest.py"):
                yield script, words


def test_size():
    lines = PAGES["README.md"].splitlines()
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGES["README.md"], re.M | re.S)
    assert len(lines) <= 160 and len(blocks) == 2 and all(len(block.splitlines()) == 1 for block in blocks)
    assert not [line for line in lines if len(line) > 110 and line not in "".join(blocks)]
    assert not [line for page in PAGES.values() for line in page.splitlines() if len(line) > 120 and line not in lines]


@pytest.mark.paper
def test_the_example_edits_a_line_of_the_network():
    (edited,) = re.findall(r"^```diff\n-(.*)$", PAGES["README.md"], re.M)
    assert edited in (ROOT / "model.py").read_text(encoding="utf-8")


def test_every_command_is_run_or_has_a_reason():
    lines = [line for page in PAGES.values() for line in commands(page)]
    assert not [line for line in lines if not any(part in line for part in PARTS)]
    assert not [part for part in PARTS if not any(part in line for line in lines)]
    assert all((ROOT / name).exists() for name in re.findall(r"tests/\w+\.py", " ".join(COMMANDS)))


@pytest.mark.parametrize("page", PAGES)
def test_scripts_settings_and_configs_exist(page):
    for script, words in invocations(PAGES[page]):
        assert not [word for word in words if re.fullmatch(r"config/\w+\.py", word) and not (ROOT / word).is_file()]
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")} - OTHERS
        literal = re.findall(r'"--(\w+)"', (ROOT / script).read_text(encoding="utf-8"))
        assert given <= {*script_settings(script), *literal} if given else (ROOT / script).is_file(), (script, given)
    known = {name for path in (*ROOT.glob("*.py"), *ROOT.glob("studies/*.py")) for name in script_settings(path)}
    assert set(re.findall(r"`--([a-z][\w-]+)", PAGES[page])) <= known | OTHERS


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)]*)\)", PAGES[page]):
        target = (ROOT if page == "README.md" else ROOT / "docs") / (path or page)
        headings = re.findall(r"^#+ (.*)$", PAGES.get(target.name, ""), re.M)
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert target.exists() and anchor in ("", *anchors), (path, anchor)


def test_photos_emoji_and_clothing(tmp_path):
    """The commands marked "here", with their files in a folder of the test and fewer steps"""
    def picture(name, color):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (72, 70), (color, 90, 120)).save(tmp_path / name)
    for i in range(8):
        picture(f"photos/{i}.jpg", 30 * i)
        (tmp_path / f"photos/{i}.txt").write_text("a photo of a cat")
        picture(f"data/noto-emoji/png/72/emoji_u1f34{i}.png", 30 * i)
        for part in ("train", "validation", "test"):
            picture(f"data/clothing-dataset-small/{part}/{('hat', 'longsleeve')[i % 2]}/{i}.jpg", 30 * i)
    picture("data/noto-emoji/png/72/emoji_u1f468_200d_1f33e.png", 0)  # of several code points, which have no name
    fewer = {"train.py": ("--max_steps=2", "--unmasked_steps=1", "--batch_size=4", "--micro_batch_size=4",
                          "--sample_every=0"), "sample.py": ("--steps=2", f"--out={tmp_path}/samples"),
             "train_vae.py": ("--max_steps=2", "--width=48")}
    for line in commands(PAGES["README.md"]) + commands(PAGES["measured.md"]):
        if any(part in line for part in COMMANDS["here"]):
            line = line.replace("runs/tiny", "runs/photos").replace("-m training.export", "training/export.py")
            _, *words = shlex.split(re.sub(r" (data/|runs/|photos/|tiny\.)", rf" {tmp_path}/\1", line))
            launch(*words, *fewer.get(words[0], ()))
    captions = {path.name: path.read_text() for path in (tmp_path / "data").glob("*/*/*.txt")}
    assert len([name for name in captions if name.startswith("72-")]) == 8
    assert captions["72-emoji_u1f347.txt"] == "grapes" and captions["hat-0.txt"] == "a photo of a hat"
    assert captions["longsleeve-1.txt"] == "a photo of a long-sleeved shirt"
    assert [len(list((tmp_path / f"data/clothing/{part}").glob("*.jpg"))) for part in ("train", "val")] == [8, 8]
    assert [len(list((tmp_path / f"data/emoji/{part}").glob("*.png"))) for part in ("train", "val")] == [4, 4]
    assert list((tmp_path / "samples").glob("*.png")) and (tmp_path / "tiny.safetensors").exists()


def test_the_figure_is_what_its_script_draws(tmp_path):
    launch(shutil.copy(ROOT / "docs/masking_figure.py", tmp_path))
    drawn, kept = (np.asarray(Image.open(f / "deferred_masking.png"), float) for f in (tmp_path, ROOT / "docs"))
    assert drawn.shape == kept.shape and np.abs(drawn - kept).mean() < 1
