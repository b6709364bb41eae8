"""The README and the commands must not drift apart."""

import json
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT
from vae_ood.bench import KAPPA, SHAPES, plain_loss, step_flops
from vae_ood.likelihood import bits_per_dim
from vae_ood.model import VAE


@pytest.mark.parametrize("script", ["run.py", "eval.py"])
def test_every_flag_is_in_the_readme(command, script):
    flags = set(re.findall(r"--[a-z][a-z-]+", command(script, "--help").stdout.split("options:")[1])) - {"--help"}
    assert len(flags) > 8
    readme = (ROOT / "README.md").read_text()
    assert not [flag for flag in flags if not re.search(flag + r"(?![a-z-])", readme)]


def test_every_file_that_the_readme_links_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_readme_quotes_the_measured_results():
    readme = (ROOT / "README.md").read_text()
    metrics = json.loads((ROOT / "results/fashionmnist/metrics.json").read_text())
    for row in metrics["sets"].values():
        assert f"| {row['n']:,} | {row['bpd']:.3f} | {row['bpd_iw']:.3f} | {row['nll']:.1f} | " in readme
    for name, row in ((name, rows["mnist"]) for name, rows in metrics["scores"].items()):
        low, high = row["auroc_ci95"]
        quoted = f"| `{name}` | MNIST | {row['auroc']:.4f} [{low:.4f}, {high:.4f}] | {row['aupr']:.4f} | "
        quoted += f"{row['fpr95']:.4f} |"
        assert quoted in readme


def test_kept_bits_per_dimension_are_those_of_the_kept_nlls():
    def of(nll, d, gamma):
        bpd = bits_per_dim(nll, d, gamma)
        return bpd if bpd is None else pytest.approx(bpd, abs=1e-9)

    paths = [*ROOT.glob("results/**/metrics.json")]
    assert len(paths) > 10
    for path in paths:
        metrics = json.loads(path.read_text())
        d, gamma = math.prod(metrics["config"]["shape"]), metrics["gamma"]
        for row in metrics["sets"].values():
            assert row["bpd"] == of(row["nll"], d, gamma) and row["bpd_iw"] == of(row["nll_iw"], d, gamma), path
        for line in map(json.loads, path.with_name("log.jsonl").read_text().splitlines()):
            assert line["bpd"] == of(line["loss"], d, line["gamma"]), path
    d = {"sprites": 1024, "fashionmnist": 784, "cifar10": 3072}
    for path in ROOT.glob("results/detection/*.json"):
        run = json.loads(path.read_text())
        bpd = bits_per_dim(run["test_nll"], d[run["data"]], 1.0)
        assert run["test_bpd"] == (None if run["data"] == "sprites" else pytest.approx(bpd, abs=1e-9))


def test_the_readme_quotes_the_measured_throughput():
    lines = re.findall(r"^\| (?:fashionmnist|cifar10) .*", (ROOT / "results/bench.md").read_text(), re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == 6
    for row in rows:
        quoted = [row[i] for i in (0, 1, 3, 5, 6, 7, 9, 14)] + [f"{row[i]}\N{MULTIPLICATION SIGN}" for i in (15, 16)]
        assert f"| {' | '.join(quoted)} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("shape", SHAPES.values())
def test_a_training_step_takes_the_operations_that_torch_counts(shape):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        plain_loss(VAE(shape, 0.5, KAPPA), torch.empty(1, *shape), torch.empty(1, KAPPA)).backward()
    assert step_flops(shape, 0.5) == counter.get_total_flops()


@pytest.mark.parametrize("alpha", [4, 8])
def test_the_readme_counts_what_the_papers_protocol_takes(alpha):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VAE((3, 32, 32), alpha, 32).parameters())
    step, travelling = 64 * step_flops((3, 32, 32), alpha), 2 * 7 / 8 * 4 * parameters  # a ring of 8, float32
    minutes = [200_000 * seconds / 60 for seconds in (step / 495e12 / 0.3, step / 8 / 495e12 / 0.1, travelling / 300e9)]
    row = (f"| {alpha} | {parameters:,} | {step / 1e9:,.1f} | {200_000 * step / 1e15:.1f} | {minutes[0]:.0f} min | "
           f"{minutes[1]:.0f} min | {travelling / 1e6:.0f} MB | {minutes[2]:.0f} min |")
    assert row in (ROOT / "README.md").read_text()
