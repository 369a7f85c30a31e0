"""Commands that are killed at random moments and started again end with the same bytes as one that was left alone.

One kill of each here; KILLS=20 PICTURES=2000 python -m pytest -n 0 -s tests/test_kills.py for more.
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
from conftest import ROOT, SMALL, WORK, launch, weights
from PIL import Image
from safetensors.torch import load_file

from common.files import read_json
from training import checkpoint
from training.state import OURS

KILLS, PICTURES = int(os.environ.get("KILLS", 1)), int(os.environ.get("PICTURES", 300))
SHARD = r"\d{5}(-\d{4})?\.(latents\d+|captions|scales|rows|skipped|done)\.(npy|jsonl?)|dataset\.json|skipped\.jsonl"


def tars(folder, n, each=32):
    """n pictures in tars of so many, every second one compressed, every 50th picture damaged"""
    folder.mkdir()
    for k in range(-(-n // each)):
        name = f"{k:03d}.{('tar', 'tgz')[k % 2]}"
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
            for i in range(k * each, min(n, (k + 1) * each)):
                out = io.BytesIO()
                low = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
                Image.fromarray(low).resize((80 + i % 50, 90)).save(out, "JPEG")
                data = out.getvalue() if i % 50 else out.getvalue()[:300]
                for member, content in ((f"{i}.jpg", data), (f"{i}.txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(args, log, n):
    """Start a script in n processes."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen([sys.executable, *(torchrun if n > 1 else []), str(ROOT / args[0]), *map(str, args[1:])],
                            cwd=WORK.name, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            start_new_session=True)


def processes(words):
    """The processes, oldest first, whose command line has these words in it"""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def survive(args, folder, finished, same, known, n=2, begun=None):
    """Start the command, and after a random time kill it and start it again, until KILLS have hit it at work; then let
    it finish. Return the folder of the undisturbed command.

    finished(folder), same(folder): whether a run is complete, and ended as the undisturbed one. A complete one is
    cleared away, for a new one. known: names that the documents name, as every one must be after a kill. begun: a kill
    comes only after this file is there.
    """
    began, whole, rng = time.time(), folder.with_name("whole"), random.Random(7)
    with open(folder.with_suffix(".log"), "w") as log:
        assert start([*args, f"--out={whole}"], log, n).wait(600) == 0, log.name
        seconds, hits, runs, unfinished = time.time() - began, 0, 1, 0
        command = [*args, f"--out={folder}"]
        while hits < KILLS:
            process, began = start(command, log, n), time.time()
            while begun and not (folder / begun).exists() and process.poll() is None:
                time.sleep(0.01)
            spent = time.time() - began
            time.sleep(rng.uniform(0, max(0.05, seconds - spent)) if begun else rng.uniform(0.4 * seconds, seconds))
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
            assert all(re.fullmatch(rf"({known})|\.({known})\.tmp", name) for name in names), names
            if finished(folder):
                assert same(folder, whole)
                shutil.rmtree(folder)
                runs += 1
        assert start(command, log, n).wait(300) == 0, log.name
    assert same(folder, whole)
    kinds = sorted({re.sub("[0-9]+", "N", path.name) for path in folder.iterdir()})
    assert not [name for name in kinds if name.endswith(".tmp")], kinds
    print(f"{args[0]}: undisturbed {seconds:.1f} s; {KILLS} kills, {unfinished} of them while a file was written; "
          f"{runs} runs finished, all the same; in the folder: {' '.join(kinds)}")
    return whole


def same_tensors(name):
    def same(folder, whole):
        a, b = (load_file(path / name) if name else weights(path) for path in (folder, whole))
        return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    return same


def test_preparation_survives_kills(tmp_path):
    tars(tmp_path / "source", PICTURES)
    args = ["prepare_latents.py", "--source", tmp_path / "source", "--resolutions", "32", "64", "--caption_dtype=int8",
            "--workers=1"]
    launch(*args, "--out", tmp_path / "alone")  # by one process
    alone = contents(tmp_path / "alone")
    assert len([n for n in alone if n.endswith("captions.npy")]) == -(-PICTURES // 32)

    def finished(folder):
        return (folder / "dataset.json").exists() and read_json(folder / "dataset.json")["complete"]

    def same(folder, whole):  # but for what a kill after the very end leaves until the next start
        return {n: b for n, b in contents(folder).items() if n in alone} == alone

    survive(args, tmp_path / "killed", finished, same, SHARD)
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed") == alone


def test_training_survives_kills(shapes16, tmp_path):
    """A checkpoint every few steps, so that many kills come while one is written"""
    steps = 40 if KILLS < 10 else 400
    args = ["train.py", f"--data={shapes16}", *SMALL, "--dim=64", "--batch_size=8", "--micro_batch_size=2",
            f"--max_steps={steps}", f"--unmasked_steps={steps // 4}", "--log_every=5", "--eval_every=0",
            "--checkpoint_every=3", "--keep_checkpoints=2"]
    survive(args, tmp_path / "killed", lambda folder: checkpoint.step_path(folder, steps).exists(), same_tensors(""),
            OURS)
    assert len(checkpoint.steps_of(tmp_path / "killed")) == 2


def test_an_autoencoder_survives_kills(tmp_path):
    args = ["train_vae.py", "--limit=40", "--width=48", "--resolution=32", "--max_steps=120", "--eval_every=10"]
    survive(args, tmp_path / "killed", lambda folder: (folder / "vae.safetensors").exists(),
            same_tensors("vae.safetensors"), r"(vae|state)\.safetensors|vae\.json|log\.jsonl|reconstructions\.png", n=1,
            begun="state.safetensors")


def test_an_evaluation_survives_kills(shapes16, tmp_path):
    launch("train.py", f"--data={shapes16}", f"--out={tmp_path / 'run'}", *SMALL, "--max_steps=1")
    args = ["eval_fid.py", f"--checkpoint={tmp_path / 'run'}", "--captions=shapes", "--count=64", "--steps=20",
            "--batch_size=4"]

    def same(folder, whole):
        a, b = (read_json(path / "results.json")["results"] for path in (folder, whole))
        return a == b and {n: c for n, c in contents(folder).items() if n.endswith("png")} == {
            n: c for n, c in contents(whole).items() if n.endswith("png")}
    survive(args, tmp_path / "killed", lambda folder: (folder / "results.json").exists(), same, r"[\w.]+",
            begun="scores.json")
