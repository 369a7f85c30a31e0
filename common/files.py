"""
Files that are there whole or not at all, even after a loss of power.
"""
import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np

TEMPORARY = ".tmp"  # ends the name of a file that is not whole yet
HELD = {}  # {folder: its open lock file}


class DiskFull(OSError):
    pass


def write_atomic(path, write):
    """Call write(file) on a temporary file beside `path`, sync it to the disk, then rename it."""
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"disk full while writing {path}: nothing that was there before is lost. Free some space "
                           "and run the same command again, it goes on from there") from None
        raise


def lock(folder, create=True, patience=5.0):
    """Keep a folder for this process until it ends, however it ends; ValueError if another one has it.

    The lock is the operating system's, on FOLDER/.lock, which stays. It waits `patience` seconds for one that is just
    ending. Where there are no locks, as on some network disks and on Windows, it says so and goes on. A folder that is
    not there yet is created, or without `create` left to a later call.
    """
    folder = Path(folder).absolute()
    if folder in HELD or not (create or folder.exists()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    file, deadline = open(folder / ".lock", "a+"), time.monotonic() + patience
    try:
        import fcntl
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise ValueError(f"{folder} is in use by {file.read() or 'another process'}: wait until it has "
                                     "ended, or give another --out") from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    except (ImportError, OSError) as error:
        print(f"warning: {folder} cannot be locked ({error}), so start nothing else there", file=sys.stderr)
    HELD[folder] = file


@contextlib.contextmanager
def not_worth_a_run(what):
    """Say so where `what` cannot be written, as on a full disk, and go on."""
    try:
        yield
    except OSError as error:
        print(f"warning: {what} could not be written ({error}). Training goes on", file=sys.stderr)


def remove_leftovers(folder, *patterns):
    """Delete the temporary files that a kill left in a folder, and those of further patterns."""
    for pattern in (f"*{TEMPORARY}", *patterns):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def write_json(path, value):
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=1, ensure_ascii=False).encode()))


def write_array(path, array):
    array = np.ascontiguousarray(array)

    def write(file):  # not np.save: its error on a full disk does not say so
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    write_atomic(path, write)


def write_lines(path, values):
    """Write one JSON value a line."""
    write_atomic(path, lambda file: file.writelines(map(line_of, values)))


def append_lines(path, values):
    """Append one JSON value a line, all of them or none."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            text = b"".join(map(line_of, values))
            if file.write(text) < len(text):
                raise DiskFull(errno.ENOSPC, "disk full")
        except OSError:
            file.truncate(size)
            raise


def line_of(value):
    # file names may contain bytes that are not valid text: escape them
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_jsonl(path):
    """Return the objects of a file of JSON lines, [] if there is none. Damaged lines are left out with a warning."""
    values, bad = [], []
    lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                values.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            bad.append(number)
    if bad:
        print(f"warning: {path}: {len(bad)} damaged lines were left out, the first is line {bad[0]}", file=sys.stderr)
    return values
