"""
Files that are there whole or not at all, even after a loss of power.
"""
import errno
import json
import os
import sys
from pathlib import Path

import numpy as np

TEMPORARY = ".tmp"  # ends the name of a file that is not whole yet


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
    # names of files may hold what is no text; JSON's own escape keeps it readable
    lines = (json.dumps(v, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for v in values)
    write_atomic(path, lambda file: file.writelines(lines))


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
