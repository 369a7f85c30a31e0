"""What the scripts need to know about the machine."""
import contextlib
import ctypes
import os
import sys
import threading
import time
from pathlib import Path


def pick_device(name):
    """Return the torch.device of "cuda", "mps", "cpu" or "auto"; ValueError if this machine lacks it.

    Of several GPUs each process of torchrun has its own, which becomes the current one.
    """
    import torch  # not above: what else is here is wanted before torch, or without it
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = there[0] if name in (None, "auto") else str(name)
    if name.partition(":")[0] not in there:
        raise ValueError(f"device is '{name}': this machine has {', '.join(there)}")
    try:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where compiled kernels run
    except RuntimeError as error:
        raise ValueError(f"device is '{name}': {str(error).splitlines()[0]}") from None
    return device


def keep_freed_memory():
    """Have glibc keep freed memory: fresh pages for every activation cost a part of each CPU step (docs/log.md)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)            # M_MMAP_MAX: take large blocks from the heap too
            libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: and leave it as large as it got


def exit_with_parent():
    """End this process when its parent is gone, even after a SIGKILL of the parent."""
    parent = os.getppid()
    with contextlib.suppress(OSError):  # it may be gone already, and this process with init; not everywhere is a /proc
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        if not any(word in command for word in (b"python", b"torch")):
            os.write(2, b"the launcher of this process is gone, so it ends: start it with torchrun or python itself\n")
            os._exit(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def exit_with_launcher():
    """End a process of torchrun or studies/ablate.py with its launcher.

    If the launcher is killed, its processes would otherwise go on writing into the next run's folder.
    """
    if {"TORCHELASTIC_RUN_ID", "EXIT_WITH_PARENT"} & os.environ.keys():
        exit_with_parent()


def shared_store():
    """Return the key-value store that the processes of torchrun share.

    torchrun keeps it when it starts crashed processes again, and with it what the last attempt wrote. On one machine
    the attempt's number tells them apart; several nodes count their own, so there each attempt needs a new store.
    """
    import torch.distributed as dist
    attempt, one_node = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), "LOCAL_WORLD_SIZE" in os.environ
    one_node = one_node and os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"]
    again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if again and not one_node and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        raise ValueError("several nodes with --max-restarts need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                         "environment of every torchrun: without it a restart waits for ever")
    store = next(dist.rendezvous("env://"))[0]
    return dist.PrefixStore(f"attempt {attempt}", store) if one_node else store
