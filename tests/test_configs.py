"""Every file in config/ is a run that starts, and the README's two commands are what they should be."""
import re

import pytest
from conftest import ROOT, launch


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    launch("prepare_latents.py", "--out", folder, "--limit=24")
    return folder


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_config(data, tmp_path, config):
    printed = launch(
        "train.py", f"config/{config}", f"--data={data}", f"--out={tmp_path / 'run'}", "--batch_size=4",
        "--micro_batch_size=4", "--max_steps=2", "--unmasked_steps=1", "--sample_every=0")  # fmt: skip
    size = re.search(r"([\d.]+) M parameters", printed).group(1)
    assert f"{size} M parameters" in (ROOT / "config" / config).read_text()


def test_quick_start_is_two_blocks_of_one_line():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    bash = [text.strip() for kind, text in blocks if kind == "bash"]
    assert len(bash) == 2 and not any("\n" in text for text in bash)
    assert [kind for kind, _ in blocks[:2]] == ["bash", "bash"]
    for words in ("venv", "pip install -r requirements.txt", "prepare_latents.py", "config/tiny.py", "sample.py"):
        assert words in bash[0]
    assert "requirements-dev.txt" in bash[1] and "pytest" in bash[1]


def test_every_picture_of_the_readme_is_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).is_file(), name
