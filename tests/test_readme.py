"""The pages that are written by hand, the commands and the results must not drift apart."""

import json
import math
import re
from itertools import groupby

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import ROOT
from vae_ood.bench import KAPPA, SHAPES, plain_loss, step_flops
from vae_ood.data.groups import things_needed
from vae_ood.likelihood import bits_per_dim
from vae_ood.metrics import confident_rank, false_alarm_range
from vae_ood.model import VAE

PAGES = ["README.md", "vae_ood/README.md", "kernels/README.md", "theory/README.md"]


def read(page):
    return (ROOT / page).read_text()


def cells(line):
    """The cells of a table's line."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def flags_in(text):
    return set(re.findall(r"--[a-z][a-z-]+", text))


@pytest.fixture(scope="module")
def flags(command):
    """The flags of both commands."""
    help_of = {script: command(script, "--help").stdout for script in ("run.py", "eval.py")}
    return {script: flags_in(" ".join(re.findall(r"^  (--.*?)(?:  |$)", text, re.MULTILINE)))
            for script, text in help_of.items()}


@pytest.mark.parametrize("script", ["run.py", "eval.py"])
def test_the_tables_of_flags_have_every_flag_and_no_other(flags, script):
    section = read("vae_ood/README.md").split("\n## The flags\n")[1]
    tables = dict(re.findall(r"^(`run.py`|`eval.py`|Both):\n\n(.*?\n)(?=\n|\Z)", section, re.MULTILINE | re.DOTALL))
    rows = [cells(line)[0] for table in (f"`{script}`", "Both") for line in tables[table].splitlines()]
    assert len(flags[script]) > 8
    assert flags_in(" ".join(rows)) == flags[script]


def test_the_flags_of_the_front_page_exist(flags):
    section = read("README.md").split("\n## The flags that people use\n")[1].split("\n## ")[0]
    rows = [cells(line) for line in section.splitlines() if line.startswith("| `--")]
    assert len(rows) == 10
    for flag, script, _ in rows:
        for one in ("run.py", "eval.py") if script == "both" else (script.strip("`"),):
            assert flag.strip("`") in flags[one]


def anchors(page):
    """The names of a page's headings in links, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, "results/README.md"])
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_the_front_page_is_short():
    assert len(read("README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_no_cell_of_a_table_is_long(page):
    for line in read(page).splitlines():
        if line.startswith("|"):
            for cell in cells(line):
                assert len(re.sub(r"\]\([^)]*\)", "]", cell)) <= 100, cell


def test_the_commands_that_ci_takes_from_the_front_page_are_there():
    starts = re.findall(r'^readme "(.*)"', (ROOT / ".ci/run").read_text(), re.MULTILINE)
    found = [next(line for line in read("README.md").splitlines() if line.startswith(start)) for start in starts]
    assert len(found) == 3 and found[1].endswith("&& python run.py") and found[2].endswith("&& pytest")


def test_the_front_page_quotes_the_verdicts():
    def verdicts(page):
        """[(claim, verdict)] of a page's tables, in their order; of equal neighbours one."""
        rows = [(line[2:4], cell) for line in read(page).splitlines() if re.match(r"\| P\d", line)
                for cell in cells(line)[1:]]
        found = [(claim, verdict[0]) for claim, cell in rows
                 if (verdict := re.match("not reproduced|reproduced|not reached|in part", cell))]
        return [one for one, _ in groupby(found)]
    assert len({claim for claim, _ in verdicts("README.md")}) == 8
    assert verdicts("README.md") == verdicts("results/README.md")


def test_the_front_page_quotes_the_measured_results():
    readme = read("README.md")
    metrics = json.loads(read("results/fashionmnist/metrics.json"))
    for row in metrics["sets"].values():
        assert f"| {row['n']:,} | {row['bpd']:.3f} | {row['bpd_iw']:.3f} | {row['nll']:.1f} | " in readme
    for name, row in ((name, rows["mnist"]) for name, rows in metrics["scores"].items()):
        low, high = row["auroc_ci95"]
        quoted = f"| `{name}` | MNIST | {row['auroc']:.4f} [{low:.4f}, {high:.4f}] | {row['aupr']:.4f} | "
        quoted += f"{row['fpr95']:.4f} |"
        assert quoted in readme


def test_the_library_page_quotes_the_sprites():
    runs = json.loads(read("results/sprites.json"))
    for gamma in ("learn", "optimal", "homotopy"):
        words = "--sprite-factors 4 --seed {} " + f"--gamma {gamma}" * (gamma != "homotopy")  # the recipe's own
        of_gamma = [run for seed in range(3) for run in runs if words.format(seed) in run["command"]
                    and run["command"].count("--gamma") == words.count("--gamma")]
        drops = [f"{run['spectrum_ratio']:.{1 if gamma == 'optimal' else 0}f}" for run in of_gamma]
        columns = [", ".join(f"{run['test_nll']:,.0f}" for run in of_gamma),
                   ", ".join(f"{run['test_mse']:.1e}".replace("e-0", "e-") for run in of_gamma),
                   ", ".join(str(run["active_dims"]) for run in of_gamma), "-, ".join(drops) + "-fold"]
        assert f"| `{gamma}` | {' | '.join(columns)} |" in read("vae_ood/README.md")


def test_the_pages_say_how_many_things_a_rate_takes():
    front, library = (" ".join(read(page).split()) for page in ("README.md", "vae_ood/README.md"))
    assert f"0.05 needs {things_needed(0.05)} different things, a rate of 0.01 needs {things_needed(0.01)}" in front
    low, high = false_alarm_range(1, 19)
    assert f"With 19 things and `--fpr 0.05` it lies between {low:.1%} and {high:.1%}" in library
    assert confident_rank(59, 0.05, 0.95) and not confident_rank(58, 0.05, 0.95) and things_needed(0.0167) == 59
    assert "it takes 59 things; `run.py --fpr 0.0167` holds out as many" in library


def test_the_kernels_page_quotes_the_bytes():
    rows = [line for line in read("kernels/README.md").splitlines() if re.search(r"\| (for|back)ward \|", line)]
    measured = [cells(line) for line in read("results/kernels.md").splitlines() if "| float32 |" in line]
    assert len(rows) > 5
    for row in rows:
        assert cells(row) in [[*line[:5], *line[6:]] for line in measured]


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
        run = path.parents[1] if path.parent.name.startswith("at-") else path.parent  # one of the steps that it kept
        if run.name.startswith("unknowns_"):
            continue  # trained by that target itself, without a log
        for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
            assert line["bpd"] == of(line["loss"], d, line["gamma"]), path
    d = {"sprites": 1024, "fashionmnist": 784, "cifar10": 3072}
    for path in ROOT.glob("results/detection/*.json"):
        run = json.loads(path.read_text())
        if "test_nll" not in run:  # own pictures, or PyOD
            continue
        bpd = bits_per_dim(run["test_nll"], d[run["data"]], 1.0)
        assert run["test_bpd"] == (None if run["data"] == "sprites" else pytest.approx(bpd, abs=1e-9))


def test_the_library_page_quotes_the_measured_throughput():
    lines = re.findall(r"^\| (?:fashionmnist|cifar10) .*", read("results/bench.md"), re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == 6
    for row in rows:
        quoted = [row[i] for i in (0, 1, 3, 5, 7, 9)]
        quoted += [f"{row[i]}\N{MULTIPLICATION SIGN}" for i in (15, 16, 18, 20, 22)]
        assert f"| {' | '.join(quoted)} |" in read("vae_ood/README.md")


@pytest.mark.parametrize("shape", SHAPES.values())
def test_a_training_step_takes_the_operations_that_torch_counts(shape):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        plain_loss(VAE(shape, 0.5, KAPPA), torch.empty(1, *shape), torch.empty(1, KAPPA)).backward()
    assert step_flops(shape, 0.5) == counter.get_total_flops()


@pytest.mark.parametrize("alpha", [4, 8])
def test_the_library_page_counts_what_the_papers_protocol_takes(alpha):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VAE((3, 32, 32), alpha, 32).parameters())
    step, travelling = 64 * step_flops((3, 32, 32), alpha), 2 * 7 / 8 * 4 * parameters  # a ring of 8, float32
    minutes = [200_000 * seconds / 60 for seconds in (step / 495e12 / 0.3, step / 8 / 495e12 / 0.1, travelling / 300e9)]
    row = (f"| {alpha} | {parameters:,} | {step / 1e9:,.1f} | {200_000 * step / 1e15:.1f} | {minutes[0]:.0f} min | "
           f"{minutes[1]:.0f} min | {travelling / 1e6:.0f} MB | {minutes[2]:.0f} min |")
    assert row in read("vae_ood/README.md")
