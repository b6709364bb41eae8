import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.halves import pytest_runtestloop  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # of each of the two processes (tests/halves.py)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands that they run


@pytest.fixture(scope="session")
def data_root():
    """The folder of real images; the test is skipped where there is none."""
    if not os.environ.get("VAE_OOD_DATA"):
        pytest.skip("needs real images: set VAE_OOD_DATA to a folder of official files")
    return Path(os.environ["VAE_OOD_DATA"])


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Run `python ARGUMENTS` in a fork of tests/zygote.py, from the repository root."""
    files = {name: tmp_path_factory.mktemp("forks") / name for name in ("stdout", "stderr")}
    zygote = subprocess.Popen([sys.executable, ROOT / "tests/zygote.py"], cwd=ROOT, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)

    def run(arguments):
        for file in files.values():
            file.write_bytes(b"")
        print(json.dumps({"arguments": arguments, "environment": dict(os.environ)} | {
            name: str(file) for name, file in files.items()}), file=zygote.stdin, flush=True)
        code = zygote.stdout.readline()
        assert code, "tests/zygote.py ended"
        return subprocess.CompletedProcess(arguments, int(code), *(file.read_text() for file in files.values()))

    yield run
    zygote.stdin.close()
    zygote.wait()


@pytest.fixture(scope="session")
def command(forks):
    """Run `python ARGUMENTS` as a user does, from the repository root; in a process of its own where it is given
    options, such as an environment, and on a GPU, which bears no forks."""

    def run(*arguments, check=True, **options):
        arguments = [*map(str, arguments)]
        result = forks(arguments) if not options and not torch.cuda.is_available() else subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500, **options)
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def tiny_run(command, tmp_path_factory):
    """A short run on the sprites and what it printed: (folder, stdout)."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    result = command("run.py", "--iters", 200, "--no-compile", "--iw-samples", 2, "--max-images", 300, "--out", out)
    return out, result.stdout
