"""What the scripts need to know about the machine."""
import contextlib
import ctypes
import sys

import torch


def pick_device(name):
    """torch.device of "cuda", "mps", "cpu" or "auto" (or None), the best there is; ValueError if it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name in (None, "auto"):
        return torch.device(there[0])
    if str(name).partition(":")[0] not in there:
        raise ValueError(f"device is '{name}': this machine has {', '.join(there)}")
    return torch.device(name)


def keep_freed_memory():
    """Have glibc keep freed memory: fresh pages for every activation cost a part of each CPU step (docs/log.md)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)            # M_MMAP_MAX: take large blocks from the heap too
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: and leave it as large as it got
