"""What the scripts need to know about the machine."""
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path


def pick_device(name):
    """Return the torch.device of a setting; of several GPUs each process of torchrun has its own."""
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


def compute_dtype(name, device):
    """Return the torch.dtype of matrix products for a setting dtype.

    auto is bfloat16 on a CUDA device that computes in it, float16 on an older one (T4, V100, RTX 20), else float32.
    """
    import torch
    if name == "auto" and device.type == "cuda":
        # older ones have no units for bfloat16, and torch emulates it: is_bf16_supported() says yes to that
        name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return getattr(torch, name if name != "auto" else "float32")


def without_float16(dtype):
    """Return a torch.dtype for networks that overflow in float16, as SDXL's autoencoder and T5 do: float32 then."""
    import torch
    return torch.float32 if dtype == torch.float16 else dtype


def autocast(device, dtype):
    """Compute matrix products in a dtype of less than 32 bits. Weights stay as they are."""
    import torch
    return torch.autocast(device.type, dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)


def keep_compiled():
    """Have torch.compile keep its work where a restart of the machine finds it, unless the environment says where.

    Call it before torch is imported: its optimizers import the compiler, which then chooses a folder in /tmp.
    """
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none to write to: then it stays in /tmp
        folder = Path.home() / ".cache/nanomicrodit"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


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

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # on which a run saves its last step
        time.sleep(60)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def exit_with_launcher():
    """End a process of torchrun or studies/ablate.py with its launcher, which may be killed."""
    if {"TORCHELASTIC_RUN_ID", "EXIT_WITH_PARENT"} & os.environ.keys():
        exit_with_parent()


def shared_store():
    """Return the store of torchrun's processes. On one node the attempt's number tells its keys from old ones."""
    import torch.distributed as dist
    env = os.environ.get
    one_node = env("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if env("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and not one_node and (
            env("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1"):
        raise ValueError("several nodes with --max-restarts need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the "
                         "environment of every torchrun")
    store = next(dist.rendezvous("env://"))[0]
    return dist.PrefixStore(f"attempt {env('TORCHELASTIC_RESTART_COUNT', '0')}", store) if one_node else store
