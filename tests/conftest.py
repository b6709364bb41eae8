import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def data_root():
    """The folder of real images; the test is skipped where there is none."""
    if not os.environ.get("VAE_OOD_DATA"):
        pytest.skip("needs real images: set VAE_OOD_DATA to a folder of official files")
    return Path(os.environ["VAE_OOD_DATA"])


@pytest.fixture(scope="session")
def command():
    """Run `python ARGUMENTS` as a user does, from the repository root."""

    def run(*arguments, check=True, **options):
        result = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                                timeout=500, **options)
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
