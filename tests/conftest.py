import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network
torch.set_num_threads(1)  # small tensors, and the suite runs as two processes


def launch(name, *args, fails=False, processes=1):
    """Run a script -> what it printed, or the last line of an expected failure, which must have no traceback"""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    p = subprocess.run(
        [*command, name, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (p.returncode != 0) == fails, p.stdout + p.stderr
    if fails:
        assert "Traceback" not in p.stderr, p.stderr
        return p.stderr.strip().splitlines()[-1]
    return p.stdout + p.stderr


@pytest.fixture
def script():
    return launch


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(megabytes) -> a folder on a file system of that size"""
    mounted = []

    def make(megabytes):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
