"""
Files that are there whole or not at all.
"""
import errno
import json
import os
from pathlib import Path

import numpy as np


def write_atomic(path, write):
    """write(file) into a temporary file beside `path`, then rename it: the file is there whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # safetensors has an error of its own, which has no errno
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise DiskFull(f"disk full while writing {path}: nothing that was there before is lost. Free some space "
                           "and run the same command again, it goes on from there") from None
        raise


class DiskFull(OSError):
    pass


def write_json(path, value):
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=1, ensure_ascii=False).encode()))


def write_array(path, array):
    array = np.ascontiguousarray(array)

    def write(file):  # not np.save: its error on a full disk does not say so
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
    write_atomic(path, write)


def write_lines(path, values):
    # names of files may hold what is no text; JSON's own escape keeps it readable
    lines = (json.dumps(v, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n" for v in values)
    write_atomic(path, lambda file: file.writelines(lines))
