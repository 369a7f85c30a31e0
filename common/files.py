"""Reading files that anybody may have edited, and writing files that are there whole or not at all."""
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
HELD = {}  # {folder that folders.lock() keeps for this process: (what holds the lock, identity of the folder)}


class DiskFull(OSError):
    pass


# --- Reading ---


@contextlib.contextmanager
def reading(path, advice=""):
    """Turn whatever a damaged or hand-edited file provokes within into one ValueError that names it."""
    try:
        yield
    except MemoryError:
        raise ValueError(f"{path} is larger than the memory") from None
    except Exception as error:  # zipfile, zlib, csv and tarfile have errors of their own
        if isinstance(error, ValueError) and str(error).startswith(str(path)):  # it was said further inside
            raise
        missing = f"{error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be used ({' '.join(missing.split())[:300]}){advice}") from None


def read_bytes(path):
    """Return the content of an ordinary file; ValueError for what is none, as a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    return Path(path).read_bytes()


def read_json(path, advice=""):
    """Return what a JSON file holds; ValueError, in one line that names it, if it cannot be read."""
    with reading(path, advice):
        return json.loads(read_bytes(path).decode("utf-8-sig"))


def read_jsonl(path):
    """Return the objects of a file of JSON lines, [] if there is none. Damaged lines are left out with a warning."""
    return list(json_lines(path, read_bytes(path).split(b"\n") if os.path.exists(path) else []))


def json_lines(path, lines):
    """Yield the objects in these lines of a file."""
    bad = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            bad.append(number)
    if bad:
        print(f"warning: {path}: {len(bad)} damaged lines were left out, the first is line {bad[0]}", file=sys.stderr)


# --- Writing ---


@contextlib.contextmanager
def whole(path):
    """Yield a path to write a file to, which takes the place of `path` when the block ends without an error.

    It lies in a temporary folder. What a killed process left there is removed when the file is written again, or by
    folders.remove_leftovers().
    """
    path = Path(path)
    check_still_there(path)
    temporary = temporary_of(path)
    shutil.rmtree(temporary, ignore_errors=True)  # which follows no link
    temporary.mkdir()  # which fails for whatever else is there
    try:
        yield temporary / path.name
        os.chmod(temporary / path.name, 0o666 & ~UMASK)
        with open(temporary / path.name, "rb+") as file:
            os.fsync(file.fileno())
        check_still_there(path)
        os.replace(temporary / path.name, path)
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskFull(f"disk full while writing {path}: the same command goes on when there is space") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_of(path):
    """Return the folder in which a file is written before it takes its place."""
    return Path(path).with_name(f".{Path(path).name}.tmp")


def is_there(path):
    """Return whether a file is there, and remove what a process that was killed while writing it has left."""
    shutil.rmtree(temporary_of(path), ignore_errors=True)
    return Path(path).exists()


def identity(folder):
    """Return what tells a folder from another one that was made in its place."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def check_still_there(path):
    """Raise ValueError if a folder that this process keeps, and `path` lies in, was removed or made anew meanwhile."""
    for folder, (_, before) in HELD.items():
        if folder in Path(path).resolve().parents and (not folder.is_dir() or identity(folder) != before):
            raise ValueError(f"{folder} was removed or made anew while this process worked in it")


def write_bytes(path, content):
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_json(path, value):
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def write_array(path, array):
    """Write an .npy file. np.save would not say what is wrong on a full disk."""
    array = np.ascontiguousarray(array)
    with whole(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def write_lines(path, values):
    """Write one JSON value a line."""
    with whole(path) as temporary, open(temporary, "wb") as file:
        file.writelines(map(line_of, values))


def append_lines(path, values):
    """Append one JSON value a line, all of them or none."""
    check_still_there(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            text = b"".join(map(line_of, values))
            if file.write(text) < len(text):
                raise DiskFull(errno.ENOSPC, "disk full")
        except OSError:
            file.truncate(size)
            raise


def hash_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def line_of(value):
    # file names may contain bytes that are not valid text: escape them
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


@contextlib.contextmanager
def not_worth_a_run(what, failing=set()):  # noqa: B006 (what was said)
    """Go on even if the block fails. One warning says so, and no other comes until the block has worked again."""
    try:
        yield
        failing.discard(what)
    except Exception as error:  # a full disk, data that are gone, another's library, the memory of the GPU
        if what not in failing:
            print(f"warning: {what} failed ({' '.join(repr(error).split()):.300}). Training goes on", file=sys.stderr)
        failing.add(what)
