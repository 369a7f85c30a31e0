"""Runs scripts in forks of a process that has imported torch already, as each would take seconds for that.

A line of JSON on standard input, {"argv", "env", "out", "err"}, is answered by the script's exit code.
"""

import json
import os
import runpy
import sys
import traceback

import torch
import torch._dynamo  # the optimizers import it

torch.set_num_threads(1)


def run(job):
    """Be the script from here on."""
    for number, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), number)
    os.environ.update(job["env"])
    sys.argv = job["argv"]
    sys.path[0] = os.getcwd()
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
