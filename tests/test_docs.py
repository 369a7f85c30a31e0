"""README.md and docs/: their blocks, their links, and their commands, which are run or at least still exist."""

import re
import shlex

import pytest
from conftest import ROOT, launch
from PIL import Image

from configurator import script_settings

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
COMMANDS = {  # which test runs the commands of the pages that have such parts ("here": below), or why none does
    "here": ("--source photos/ --out data/photos ", "--data data/photos ", "--checkpoint runs/photos",
             "training.export", "train_vae.py --source photos"),
    "a download": ("-r requirements.txt", "-r requirements-dev.txt", "pip install", "img2dataset",
                   "geneval"),
    "a download; tests/test_published.py has small ones": ("data/photos512", "--checkpoint VSehwag24", "FILE.pt"),
    "tests/test_datasets.py": ("sed -i", "torchrun --nproc_per_node=8 prepare_latents.py", "--source textcaps"),
    "tests/test_eval_fid.py has smaller ones": ("--captions coco", "--checkpoint runs/tiny", "--metrics nearest"),
    "tests/test_emoji.py has smaller ones": ("--source emoji", "runs/emoji", "config/emoji.py"),
    "days of eight GPUs; tests/test_chain.py scales it down": (
        "phase", "done", "train.py config/xl2_", "rehearsal", "cd ..", "../prepare_latents.py", "host="),
    "minutes or hours; tests/test_train.py trains less": ("runs/gelu", "runs/relu2", "train.py config/small.py",
                                                         "runs/speed_", "for seed in", "--out data/shapes64"),
    "an edit of the repository, or what the quick start made": ("cp model.py", "a large pink ring"),
    "tests/test_tiny.py trains a smaller one": ("python train_vae.py\n",),
    "hours; tests/test_studies.py scales it down": ("studies.ablate", "runs/masking_vae"),
    "half an hour": ("tests/test_kills.py", "PAIRS=20"),
    "a part of the suite, and what Slurm's lines need": ("tests/test_gpu.py", "export TORCH_")}
PARTS = [part for parts in COMMANDS.values() for part in parts]
OTHERS = {"nproc_per_node", "nnodes", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "max-restarts",
          "standalone", "help"}  # torchrun's and ours


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
            script = (module + [word for word in words if word.endswith(".py")] + [""])[0].removeprefix("../")
            if script not in ("", "venv.py", "pytest.py"):
                yield script, words


def test_the_readme_has_two_blocks_to_paste():
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGES["README.md"], re.M | re.S)
    assert len(blocks) == 2 and all(len(block.splitlines()) == 1 for block in blocks)


@pytest.mark.paper
def test_the_example_edits_a_line_of_the_network():
    (edited,) = re.findall(r"^```diff\n-(.*)$", PAGES["README.md"], re.M)
    assert edited in (ROOT / "model.py").read_text(encoding="utf-8")


def test_every_command_is_run_or_has_a_reason():
    lines = [line for page in PAGES.values() for line in commands(page)]
    assert not [line for line in lines if not any(part in line + "\n" for part in PARTS)]
    assert not [part for part in PARTS if not any(part in line + "\n" for line in lines)]
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


def test_pictures_of_ones_own(tmp_path):
    """The commands marked "here", with their files in a folder of the test and fewer steps"""
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (72, 70), (30 * i, 90, 120)).save(tmp_path / f"photos/{i}.jpg")
        (tmp_path / f"photos/{i}.txt").write_text("a photo of a cat")
    fewer = {"train.py": ("--max_steps=2", "--unmasked_steps=1", "--batch_size=4", "--sample_every=0"),
             "sample.py": ("--steps=2", "--out=samples"), "train_vae.py": ("--max_steps=2", "--width=32"),
             "eval_fid.py": ("--steps=2", "--metrics=fid", "--inception=random")}  # without the download
    for line in sorted(commands(PAGES["README.md"]), key=lambda line: "training.export" in line):
        if any(part in line for part in COMMANDS["here"]):
            _, *words = shlex.split(line.replace("runs/tiny", "runs/photos").replace("-m training", "training"))
            launch(*words, *fewer.get(words[0], ()), cwd=tmp_path)
    assert list((tmp_path / "samples").glob("*.png")) and (tmp_path / "tiny.safetensors").exists()
