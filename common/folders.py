"""
Whose a folder is. Two rules hold for runs, autoencoders, prepared folders, generated pictures, scores and studies:

    A folder belongs to one command: the same command goes on, another is refused with what differs, and to begin again
    one deletes the folder or names another.
    Nothing is deleted or replaced but files that this very run wrote.
"""
import atexit
import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from common.files import HELD, identity, read_json, reading, temporary_of, write_json

# The file in a folder that says which command it belongs to, and the script that writes it
DESCRIPTIONS = {"run.json": "train.py", "vae.json": "train_vae.py", "dataset.json": "prepare_latents.py",
                "generated.json": "sample.py", "scores.json": "eval_fid.py", "detections.json": "eval_geneval.py",
                "study.json": "studies.ablate"}
# What may differ when a command goes on, because the result is the same but for the order of sums. Data are compared by
# their content, and max_steps by the scripts themselves.
FREE = frozenset("""data val_data out max_steps micro_batch_size device compile offload activation_checkpointing workers
    log_every eval_every sample_every sample_guidance checkpoint_every keep_checkpoints price wandb check parallel
    """.split())


def lock(folder):
    """Keep a folder for this process until it ends, however it ends; ValueError at once if another process has it.

    The folder is created if it is missing, and removed at the end if nothing was written into it. The operating system
    keeps the lock, on the folder itself.
    """
    folder = Path(folder).resolve()
    while folder not in HELD:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            atexit.register(remove_if_empty, folder)
        before = identity(folder)
        try:
            holder = take_lock(folder)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process: wait for it, or give another --out") from None
        if folder.is_dir() and identity(folder) == before:
            HELD[folder] = holder, before
        else:  # it was removed before the lock was there
            os.close(holder)


def remove_if_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def take_lock(folder):
    """Return the number of an open file that holds the lock of a folder; BlockingIOError if another process has it."""
    if os.name == "nt":  # Windows locks files alone
        import msvcrt
        holder = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        with contextlib.suppress(OSError):
            msvcrt.locking(holder, msvcrt.LK_NBLCK, 1)
            return holder
        raise BlockingIOError
    import fcntl
    try:
        fcntl.flock(holder := os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network disks lock nothing but files that are open for writing
        fcntl.flock(holder := os.open(folder / ".lock", os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
    return holder


def described(folder, name, ours):
    """Return what FOLDER/name says of the command that the folder belongs to, None if no command has begun there.

    ours: a regular expression of the names that the script writes. ValueError if the folder belongs to another script,
    or holds such files and nothing that says whose.
    """
    folder = Path(folder)
    for other, script in DESCRIPTIONS.items():
        if other != name and (folder / other).exists():
            raise ValueError(f"{folder} belongs to {script}, as {other} is there: give another --out")
    there = os.listdir(folder) if folder.is_dir() else []
    own = [entry for entry in there if re.fullmatch(ours, entry)]
    if name in there:
        remove_leftovers(folder, f"{ours}|{re.escape(name)}")
        with reading(folder / name, f". To begin again, delete {folder} or give another --out"):
            return dict(read_json(folder / name))
    if own:
        raise ValueError(f"{folder} holds {min(own)} and no {name} that says what made it: give another --out")
    return None


def remove_leftovers(folder, ours):
    """Remove temporary folders that killed processes left, where the file that they were for matches `ours`."""
    for entry in os.listdir(folder):
        target = re.fullmatch(r"\.(.+)\.tmp", entry)
        if target and re.fullmatch(ours, target[1]):
            shutil.rmtree(temporary_of(folder / target[1]), ignore_errors=True)


def differences(old, new, free=FREE):
    """Describe, as a list of texts, each entry of `new` that differs from the one in `old` and changes the result."""
    new = json.loads(json.dumps(new))  # with lists for tuples, as in what was read from a file
    return [f"{name}: another one now" if re.fullmatch("[0-9a-f]{16,}", str(value)) else
            f"{name}: {old[name]!r:.100} there, {value!r:.100} now" for name, value in new.items()
            if name not in free and name in old and old[name] != value]


def same_command(folder, old, new, more=()):
    """Raise ValueError if what a result depends on differs from an earlier start. more: differences as texts."""
    if differ := [*differences(old, new), *more]:
        raise ValueError(f"{folder} belongs to another command ({'; '.join(differ)}): give another --out, or delete it "
                         "to begin again")


def claim(folder, name, ours, description):
    """Lock a folder and make it this command's by its description in FOLDER/name; ValueError if it is another's."""
    lock(folder)
    old = described(folder, name, ours)
    if old is None:
        write_json(Path(folder) / name, description)
    else:
        same_command(folder, dict.fromkeys(description) | old, description)
