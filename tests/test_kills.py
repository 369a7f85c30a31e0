"""Runs that are killed at random moments and started again end with the same bytes as one that was left alone.

A few kills here; KILLS=50 PICTURES=2000 python -m pytest -n 0 -s tests/test_kills.py for more.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

KILLS, PICTURES = int(os.environ.get("KILLS", 2)), int(os.environ.get("PICTURES", 300))
MODULE = "torch.distributed.run"
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
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def start(args, log):
    return subprocess.Popen(
        [sys.executable, "-m", MODULE, "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
         *map(str, args)],
        cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip


def processes(words):
    """The processes, oldest first, whose command line has these words in it"""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return sorted(found)


def survive(args, kills, within, finished, log, rng):
    """Start the command, kill it after a random time, start it again, until so many kills have hit it at work; then let
    it finish. finished() is asked before each start, and may clear away what a run has finished before it was hit.
    """
    hits = 0
    while hits < kills:
        finished()
        process = start(args, log)
        time.sleep(rng.uniform(*within))
        if process.poll() is None:
            # the launcher alone, whose processes must not live on; all at once; or one of its processes
            alive = processes(args[-1])
            hits += 1
            for pid in ([process.pid], alive, alive[-1:])[hits % 3 - 1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()
        deadline = time.time() + 5
        while processes(args[-1]):
            assert time.time() < deadline, "processes outlived their launcher"
            time.sleep(0.1)
    assert start(args, log).wait(300) == 0, log


def test_preparation_survives_kills(script, tmp_path):
    tars(tmp_path / "source", PICTURES)
    args = ["prepare_latents.py", "--source", tmp_path / "source", "--resolutions", "32", "64", "--shard_size=32",
            "--batch_size=8", "--caption_dtype=int8", "--workers=1"]  # fmt: skip
    began = time.time()
    script(*args, "--out", tmp_path / "whole")
    print(f"undisturbed, one process: {time.time() - began:.1f} s")
    with open(tmp_path / "log.txt", "w") as log:
        began = time.time()
        assert start([*args, f"--out={tmp_path}/two"], log).wait(300) == 0
        seconds = time.time() - began
        whole, killed, runs = contents(tmp_path / "whole"), tmp_path / "killed", 0

        def finished():
            nonlocal runs
            if killed.exists() and '"complete": true' in (killed / "dataset.json").read_text():
                assert {n: b for n, b in contents(killed).items() if not n.endswith(UNTIDY)} == whole
                shutil.rmtree(killed)
                runs += 1

        survive([*args, f"--out={killed}"], KILLS, (0.4 * seconds, seconds), finished, log, random.Random(7))
    print(f"undisturbed, two processes: {seconds:.1f} s; {KILLS} kills, {runs + 1} preparations finished, all the same")
    assert len([n for n in whole if n.endswith("captions.npy")]) == 2 * -(-PICTURES // 64)
    assert contents(tmp_path / "two") == whole and contents(killed) == whole


def test_training_survives_kills(script, tmp_path):
    """Two processes, a checkpoint every few steps, so that many kills come while one is written"""
    script("prepare_latents.py", f"--out={tmp_path / 'data'}", "--limit=60", "--resolutions=16")
    steps = 40 if KILLS < 20 else 400
    args = ["train.py", f"--data={tmp_path / 'data'}", "--latent_size=8", "--dim=64", "--depth=2", "--head_dim=16",
            "--mlp_multiple=16", "--mixer_depth=1", "--mixer_dim=32", "--num_experts=2", "--batch_size=8",
            "--micro_batch_size=2", "--warmup_steps=3", f"--max_steps={steps}", f"--unmasked_steps={steps // 4}",
            "--ema_decay=0.9", "--log_every=5", "--eval_every=0", "--sample_every=0",
            "--checkpoint_every=3", "--keep_checkpoints=2"]  # fmt: skip
    runs, unfinished = 0, 0
    with open(tmp_path / "log.txt", "w") as log:
        began = time.time()
        assert start([*args, f"--out={tmp_path}/whole"], log).wait(600) == 0
        seconds, killed = time.time() - began, tmp_path / "killed"
        last = f"step_{steps:08d}.safetensors"
        whole = (tmp_path / "whole" / last).read_bytes()

        def finished():
            nonlocal runs, unfinished
            unfinished += len(list(killed.glob("*.tmp"))) if killed.exists() else 0
            if (killed / last).exists():
                assert tensors(killed / last) == tensors(tmp_path / "whole" / last)
                shutil.rmtree(killed)
                runs += 1

        survive([*args, f"--out={killed}"], KILLS, (0.3 * seconds, seconds), finished, log, random.Random(8))
    print(f"undisturbed: {seconds:.1f} s; {KILLS} kills, {unfinished} of them while a checkpoint was being written, "
          f"{runs + 1} runs finished, all with the same weights")  # fmt: skip
    assert tensors(killed / last) == tensors(tmp_path / "whole" / last) and len(whole) > 100_000
    assert len(list(killed.glob("step_*"))) == 2


def tensors(path):
    """{name: bytes} of a checkpoint, whose metadata names the folder"""
    return {name: t.numpy().tobytes() for name, t in load_file(path).items()}
