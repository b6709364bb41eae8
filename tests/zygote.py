"""Runs commands for the tests (conftest.py), each in a fork of this process, which has imported what they import: half
of a short command's time. A request is a line of JSON on stdin, {"arguments", "environment", "stdout",
"stderr"}: arguments of python, the files to write to. The answer is the exit code, a line on stdout. What vae_ood reads
of the environment when it is imported, as RANK, is the zygote's."""

import json
import os
import runpy
import signal
import sys

import numpy  # noqa: F401
import torch  # noqa: F401

sys.path.insert(0, os.getcwd())
import matplotlib.figure  # noqa: F401

import vae_ood.detector
import vae_ood.evaluation
import vae_ood.scoring
import vae_ood.training  # noqa: F401


def become(request):
    """Run the command that is asked for as this process, for 500 seconds at most."""
    signal.alarm(500)
    os.environ.clear()
    os.environ.update(request["environment"])
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(request[name], os.O_WRONLY)
        os.dup2(file, descriptor)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


for line in sys.stdin:
    if not (pid := os.fork()):
        become(json.loads(line))
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
