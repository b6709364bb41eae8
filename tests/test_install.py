"""`pip install .`: what is installed works from any folder, and leaves another package called `kernels` alone."""

import os
import subprocess
import sys
from importlib.metadata import distributions

import numpy as np
import pytest

from tests.conftest import ROOT
from vae_ood.detector import Detector

SOURCES = ".py", ".cu", ".cuh"
SCRIPT = """
import sys, vae_ood
assert "torch" not in sys.modules
from vae_ood import Detector
import kernels, numpy, vae_ood.kernels.iw_nll
numpy.save("scores.npy", Detector.load("detector.pt").decision_function(numpy.load("new.npy")))
print(vae_ood.__path__, vae_ood.kernels.iw_nll.__file__, kernels.THEIRS, sep="\\n")
"""


def test_an_installed_detector_works_anywhere_beside_another_package_called_kernels(tmp_path):
    installed = {one.name: one.version for one in distributions() if one.name in ("pip", "setuptools")}
    if len(installed) < 2 or int(installed["setuptools"].split(".")[0]) < 77:
        pytest.skip("needs pip and setuptools 77 or newer")
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's list of the repository's files")
    copy, site, elsewhere = (tmp_path / name for name in ("copy", "site", "elsewhere"))
    elsewhere.mkdir()
    wanted = ["pyproject.toml", "LICENSE", "requirements*.txt", "vae_ood", "kernels", "theory", "tests"]
    listed = subprocess.run(["git", "ls-files", "-z", *wanted], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = listed.stdout.split("\0")[:-1]
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "--isolated", "install", "-q", "--no-index", "--no-deps",
                    "--no-build-isolation", "--disable-pip-version-check", "--target", site, copy], check=True)
    ours = {name.removeprefix("vae_ood/") for name in tracked if name.endswith(SOURCES)
            and name.startswith(("vae_ood/", "kernels/"))}
    assert {path.relative_to(site / "vae_ood").as_posix() for path in site.rglob("*")
            if path.suffix in SOURCES} == ours

    (site / "kernels").mkdir()
    (site / "kernels/__init__.py").write_text("THEIRS = 'theirs'")
    images = np.random.default_rng(0).integers(256, size=(120, 8, 8), dtype=np.uint8)
    detector = Detector.fit(images, alpha=0.05, kappa=3, iters=2, groups=np.arange(120), device="cpu")
    detector.save(elsewhere / "detector.pt")
    np.save(elsewhere / "new.npy", images[:5])
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=elsewhere, capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(site)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:3] == [str([str(site / "vae_ood")]), str(site / "vae_ood/kernels/iw_nll.py"),
                                             "theirs"]
    np.testing.assert_allclose(np.load(elsewhere / "scores.npy"), detector.decision_function(images[:5]), rtol=1e-5)
