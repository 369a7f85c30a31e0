"""Runs that are killed at random moments and started again end with the same bytes as one that was left alone.

One kill of each here; KILLS=50 PICTURES=2000 python -m pytest -n 0 -s tests/test_kills.py for more.
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, SMALL, launch, weights
from PIL import Image

from training import checkpoint
from training.state import OURS

KILLS, PICTURES = int(os.environ.get("KILLS", 1)), int(os.environ.get("PICTURES", 300))
UNTIDY = (".done.json", ".skipped.jsonl", ".tmp")  # may be left by a kill after the very end; the next start tidies up


def tars(folder, n):
    """n pictures in two tars, one of them compressed, every 50th picture damaged"""
    folder.mkdir()
    for k, name in enumerate(("a.tar", "b.tgz")):
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
            for i in range(k * n // 2, (k + 1) * n // 2):
                out = io.BytesIO()
                low = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(low).resize((80 + i % 50, 90)).save(out, "JPEG")
                data = out.getvalue() if i % 50 else out.getvalue()[:300]
                for member, content in ((f"{i}.jpg", data), (f"{i}.txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


def start(args, log):
    """Start a script in two processes."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen([sys.executable, *torchrun, *map(str, args)], cwd=ROOT, stdout=log, stderr=log,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def processes(words):
    """The processes, oldest first, whose command line has these words in it"""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def survive(args, log, finished, same, known):
    """Start the command, and after a random time kill it and start it again, until KILLS have hit it at work; then let
    it finish.

    finished(folder), same(folder): whether a run is complete, and ended as the undisturbed one. A complete one is
    cleared away, for a new one. known(name): whether the documents name such a file, as every one must be after a kill.
    -> the folders of the undisturbed run and of the last one
    """
    began, folder, rng = time.time(), Path(f"{log.name}.killed"), random.Random(7)
    assert start([*args, f"--out={log.name}.whole"], log).wait(600) == 0
    seconds, hits, runs, unfinished = time.time() - began, 0, 1, 0
    command = [*args, f"--out={folder}"]
    while hits < KILLS:
        process = start(command, log)
        time.sleep(rng.uniform(0.4 * seconds, seconds))
        if process.poll() is None:
            # the launcher alone, whose processes must not live on; all at once; or one of its processes
            alive = processes(command[-1])
            hits += 1
            for pid in ([process.pid], alive, alive[-1:])[hits % 3 - 1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        deadline = time.time() + 5
        while processes(command[-1]):
            assert time.time() < deadline, "processes outlived their launcher"
            time.sleep(0.1)
        names = [path.name for path in folder.glob("*")]
        unfinished += sum(name.endswith(".tmp") for name in names)
        assert all(name == ".lock" or known(name) for name in names), names
        if finished(folder):
            assert same(folder)
            shutil.rmtree(folder)
            runs += 1
    assert start(command, log).wait(300) == 0, log
    assert same(folder)
    kinds = sorted({re.sub("[0-9]+", "N", path.name) for path in folder.iterdir()})
    print(f"undisturbed: {seconds:.1f} s; {KILLS} kills, {unfinished} of them while a file was being written, {runs} "
          f"runs finished, all the same; in the folder: {' '.join(kinds)}")
    return Path(f"{log.name}.whole"), folder


def test_preparation_survives_kills(tmp_path):
    tars(tmp_path / "source", PICTURES)
    args = ["prepare_latents.py", "--source", tmp_path / "source", "--resolutions", "32", "64", "--shard_size=32",
            "--batch_size=8", "--caption_dtype=int8", "--workers=1"]
    launch(*args, "--out", tmp_path / "whole")  # by one process
    whole = contents(tmp_path / "whole")
    assert len([n for n in whole if n.endswith("captions.npy")]) == 2 * -(-PICTURES // 64)

    def finished(folder):
        about = folder / "dataset.json"
        return about.exists() and '"complete": true' in about.read_text()

    def same(folder):
        return {n: b for n, b in contents(folder).items() if not n.endswith(UNTIDY)} == whole

    with open(tmp_path / "log", "w") as log:
        two, killed = survive(args, log, finished, same, lambda name: name in whole or name.endswith(UNTIDY))
    assert contents(two) == contents(killed) == whole


def test_training_survives_kills(shapes16, tmp_path):
    """A checkpoint every few steps, so that many kills come while one is written"""
    steps = 40 if KILLS < 20 else 400
    args = ["train.py", f"--data={shapes16}", *SMALL, "--dim=64", "--batch_size=8", "--micro_batch_size=2",
            f"--max_steps={steps}", f"--unmasked_steps={steps // 4}", "--log_every=5", "--eval_every=0",
            "--checkpoint_every=3", "--keep_checkpoints=2"]

    def finished(folder):
        return checkpoint.step_path(folder, steps).exists()

    def same(folder):
        a, b = weights(folder), weights(tmp_path / "log.whole")
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    with open(tmp_path / "log", "w") as log:
        _, killed = survive(args, log, finished, same, lambda name: OURS.fullmatch(name) or name.endswith(".tmp"))
    assert len(checkpoint.steps_of(killed)) == 2
