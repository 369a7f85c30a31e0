"""Runs scripts in forks of a process that has imported torch already, as each would take seconds for that.

A line of JSON on standard input, {"argv", "env", "cwd", "out", "err", "processes"}, is answered by the script's exit
code. Several processes are what torchrun would start: their code is the first that is not 0.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback

import torch
import torch._dynamo  # the optimizers import it

torch.set_num_threads(1)


def run(job, env):
    """Be the script from here on."""
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.update(job["env"] | env)
    os.chdir(job["cwd"])
    module, sys.argv = job["argv"][0] == "-m", job["argv"][job["argv"][0] == "-m":]
    sys.path[0] = os.getcwd() if module else os.path.dirname(sys.argv[0])
    code = 0
    try:
        if module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def environments(n):
    """What torchrun tells each of n processes"""
    if n == 1:
        return [{}]
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        port = opened.getsockname()[1]
    each = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [{k: str(v) for k, v in (each | {"RANK": rank, "LOCAL_RANK": rank}).items()} for rank in range(n)]


for line in sys.stdin:
    job, pids = json.loads(line), []
    for env in environments(job["processes"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            run(job, env)
    failed = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if not failed and (failed := os.waitstatus_to_exitcode(status)):
            time.sleep(0.5 * bool(pids))  # the others may have something to say too; then they end, as under torchrun
            for other in pids:
                os.kill(other, signal.SIGKILL)
    print(failed, flush=True)
