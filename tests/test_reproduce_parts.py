"""The parts of the reproduction: its checks and figures of numbers that are made up, and the commands that it runs."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.conftest import ROOT
from vae_ood import UserError
from vae_ood.model import flops
from vae_ood.reproduce.latents import cut_off
from vae_ood.reproduce.pages import cell
from vae_ood.reproduce.paper import PAPER
from vae_ood.reproduce.runs import Run, execute, training_flops
from vae_ood.reproduce.tables import above, capacity, falls


def test_claims_are_judged_by_their_figures():
    def table(tests, outliers, gammas):
        return [(Run("fashionmnist", 1, kappa), [{"sets": {"test": {"bpd": t}, "mnist": {"bpd": o}}, "gamma": g}
                                                 for t, o, g in zip(*column, strict=True)])
                for kappa, column in zip((16, 32, 64), zip(tests, outliers, gammas, strict=True), strict=True)]

    def mnist_above(table):
        return above({run.kappa: results for run, results in table}, "mnist")[1]

    good = table([[6.0], [6.0], [6.0]], [[7.0], [7.0], [7.0]], [[0.3], [0.2], [0.2]])
    assert mnist_above(good) and falls(good)[1]
    bad = table([[6.0], [6.0], [6.0]], [[7.0], [5.9], [7.0]], [[0.2], [0.21], [0.1]])
    assert mnist_above(bad) is falls(bad)[1] is False
    noisy = table([[6.0, 6.0]] * 3, [[7.0, 7.0]] * 3, [[0.19, 0.21], [0.2, 0.22], [0.1, 0.1]])
    assert falls(noisy)[1]
    worst = table([[6.0, 6.0]] * 3, [[7.0, 5.9], [7.0, 7.0], [7.0, 7.0]], [[0.2, 0.2]] * 3)
    assert mnist_above(worst) is False
    assert falls([*good, (Run("fashionmnist", 1, 128), [])])[1] is None
    assert mnist_above([*good, (Run("fashionmnist", 1, 128), [])]) is None
    assert mnist_above([]) is falls(good[:1])[1] is None
    paper = [(None, [column]) for column in PAPER["table1"].values()]  # its gamma rises by the last printed digit
    assert falls(paper)[1] and falls([*paper, (None, [{"gamma": 0.00251}])])[1] is False


def test_capacity_is_judged_by_the_worst_seed_and_not_before_the_paper_s_steps():
    def m(svhn, iters=10_000, celeba=0.5):
        bpd = {"test": 6.0, "svhn": 6 + svhn, "celeba": 6 + celeba}
        return {"iters": iters, "sets": {name: {"bpd": value} for name, value in bpd.items()}}

    held = lambda columns: [claim[1] for claim in capacity(columns)]  # noqa: E731
    paper = {alpha: [m(column["svhn"] - column["test"], 200_000, column["celeba"] - column["test"])]
             for alpha, column in PAPER["table2"].items()}
    assert held(paper) == [True, True, True]
    assert held({0.25: [m(-0.4), m(0.1)], 1: [m(-0.4, celeba=-0.1)]}) == [False, None, False]
    assert held({0.25: [m(-0.4)], 0.5: [m(-0.4)], 2: [m(-0.1)], 4: [m(0.1)]}) == [None, None, None]
    assert held({0.25: [m(-0.4)], 0.5: [m(-0.4)], 1: [m(-0.3)]}) == [True, None, None]
    assert held({2: [m(-0.1, 200_000)], 4: [m(0.1)]}) == [None, False, None]
    assert held({}) == [None] * 3


def test_the_cut_off_lies_between_the_active_and_the_inactive_dimensions():
    m = {"active_dims": 2, "kappa": 4, "kl_per_dim": [3.0, 0.5, 0.01, 1e-6]}
    assert cut_off(m) == pytest.approx(50)
    assert cut_off(m | {"active_dims": 4}) is cut_off(m | {"active_dims": 0}) is None


def test_cells_carry_student_s_interval_from_three_seeds_on():
    assert cell([1.0, 2.0], 2) == "1.50"
    for n in range(3, 15):
        values = np.random.default_rng(n).standard_normal(n).tolist()
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        mean, interval = map(float, cell(values, 6).split(" ± "))
        assert (mean, interval) == (pytest.approx(np.mean(values), abs=1e-6), pytest.approx(half, rel=2e-3))


def test_training_takes_three_forward_passes_a_step():
    assert training_flops(Run("cifar10", 1, 32, iters=10)) == 3 * 64 * 10 * sum(flops((3, 32, 32), 1, 32))


def test_a_failing_command_is_named(capsys):
    with pytest.raises(UserError, match="exit code 2"):
        execute(["-c", "raise SystemExit(2)"], None)
    assert "$ python -c 'raise SystemExit(2)'" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt, match="goes on where"):
        execute(["-c", "raise SystemExit(130)"], None)


def test_an_interruption_is_one_however_the_command_ends(tmp_path):
    script = ("import signal, sys; from vae_ood.reproduce.runs import execute\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job of a shell ignores it
              "try: execute(['-c', 'import time; print(1, flush=True); time.sleep(60)'], None)\n"
              "except KeyboardInterrupt as stop: sys.exit(f'stopped: {stop}')")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while process.stdout.readline().strip() != "1":
        pass
    process.send_signal(signal.SIGINT)  # the child dies of it: it saves nothing and exits with -2
    assert "stopped: the same command goes on" in process.communicate(timeout=60)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_killed_reproduction_leaves_no_orphan():
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    script = f"from vae_ood.reproduce.runs import execute; execute(['-c', {child!r}], None)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (line := process.stdout.readline()).strip().isdigit():
        pass
    process.kill()
    process.communicate()
    for _ in range(100):
        try:
            state = Path(f"/proc/{int(line)}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":  # ended, and not yet collected
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")
