"""results/README.md: which of the paper's claims reproduce, from the JSON files under results/ and nothing else.

The verdict of a claim follows from the checks that its experiment's own code made: "reproduced" if all of them held,
"not reached" if none could be judged, because the training that they need was not run, "not reproduced" if none of
those that could be did, and "in part" otherwise.
"""

import json
import statistics
from pathlib import Path

from vae_ood import checkpoint
from vae_ood.reproduce.compute import QUANTITIES, THEIRS
from vae_ood.reproduce.pages import HELD, markdown
from vae_ood.reproduce.paper import ALPHAS, PAPER
from vae_ood.reproduce.tables import gap

RESULTS = Path(__file__).resolve().parents[2] / "results"


def verdict(checks):
    """The verdict of checks, each True (held), False or None (not reached)."""
    for one, word in ((None, "not reached"), (True, "reproduced"), (False, "not reproduced")):
        if checks.count(one) == len(checks):
            return word
    return ("in part: " if True in checks else "not reproduced: ") + ", ".join(
        f"{checks.count(one)} {word}" for one, word in HELD.items() if one in checks) + " of its checks"


def span(values, form="+.3f"):
    """The range of some values."""
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def seeds_of(groups):
    """How many seeds stand behind the figures."""
    low, high = min(map(len, groups)), max(map(len, groups))
    return f"{low if low == high else f'{low} to {high}'} seed{'s' * (high > 1)}"


def p1(numbers):
    """(ours, the paper's) of FashionMNIST against MNIST."""
    columns = [column["runs"] for column in numbers["columns"] if column["runs"]]
    runs = [run for column in columns for run in column]
    auroc, fpr95 = ([run["detection"]["mnist"][key] for run in runs] for key in ("auroc", "fpr95"))
    paper = PAPER["table1"].values()
    return (f"MNIST minus test: {span([gap(run, 'mnist') for run in runs])} bpd over {len(columns)} kappa; gamma "
            f"{span([run['gamma'] for run in runs], '.5f')}; AUROC {span(auroc, '.4f')}, FPR95 {span(fpr95, '.3f')}; "
            f"{runs[0]['iters']:,} steps, {seeds_of(columns)}",
            f"{span([c['mnist'] - c['test'] for c in paper])} bpd; gamma {span([c['gamma'] for c in paper], '.4f')}")


def p2(name, alphas, longest):
    """(ours, the paper's) of one of the QUANTITIES by alpha: of each alpha's longest runs, or of those of the number of
    steps that the most alphas were trained for."""
    digits = ".5f" if name == "gamma" else "+.3f" if "minus" in name else ".3f"

    def row(numbers):
        ours, theirs, seeds, there = [], [], [], numbers["runs"]
        if not longest:
            alphas_of = {n: len({run["alpha"] for run in there if run["iters"] == n}) for n in {
                run["iters"] for run in there}}
            common = max(alphas_of, key=lambda n: (alphas_of[n], n))
            there = [run for run in there if run["iters"] == common]
        for alpha in alphas:
            runs = [run for run in there if run["alpha"] == alpha]
            runs = [run for run in runs if run["iters"] == runs[-1]["iters"]]  # sorted by their steps
            theirs.append(f"{alpha:g}: {THEIRS[name](PAPER['table2'][alpha]):{digits}}")
            ours.append(f"{alpha:g}: not run")
            if runs:
                seeds.append(runs)
                ours[-1] = f"{alpha:g}: {statistics.mean(map(QUANTITIES[name], runs)):{digits}}"
                if auroc := QUANTITIES.get(f"{name.split()[0]} AUROC"):  # of an outlier set
                    ours[-1] += f" (AUROC {statistics.mean(map(auroc, runs)):.3f})"
                ours[-1] += f" at {runs[0]['iters']:,} steps"
        what = f"{name} by alpha: "
        return what + "; ".join([*ours, *([seeds_of(seeds)] if seeds else [])]), what + "; ".join(theirs)
    return row


def p2_crossing(numbers):
    """(ours, the paper's) of SVHN minus test by training steps."""
    check, = (check for check in numbers["claims"] if check["claim"].startswith("the crossing"))
    return f"SVHN minus test (bpd) by alpha, the fewest steps first: {check['figures']}", "after 200,000 steps alone"


def p3(numbers):
    """(ours, the paper's) of the cut-off of the latent dimensions' KL."""
    groups = {}
    for column in numbers["columns"]:
        groups.setdefault(column["alpha"], []).extend(column["runs"])
    return "; ".join(
        f"alpha = {alpha:g}: {', '.join(str(run['active_dims']) for run in runs)} active of kappa = "
        f"{', '.join(str(run['kappa']) for run in runs)}" for alpha, runs in groups.items() if runs) + (
            f"; {max(run['iters'] for runs in groups.values() for run in runs):,} steps, "
            f"{seeds_of([c['runs'] for c in numbers['columns'] if c['runs']])}"), (
            "a figure, whose cut-off is sharper at alpha = 4 than at 1")


def p7(numbers):
    """(ours, the paper's) of learning gamma as a homotopy."""
    arms, mean = {name: runs for name, runs in numbers["arms"].items() if runs}, statistics.mean
    ours = [f"{name}{' (learned, in the checks)' * (name == numbers['learned'])}: error "
            f"{mean(run['error']['train'] for run in runs):.2f}, MMD {1e3 * mean(run['mmd'] for run in runs):.2f}e-3, "
            f"gradient {mean(run['gradient']['first'] for run in runs):.0f} at first, "
            f"{mean(run['gradient']['last'] for run in runs):.0f} at last" for name, runs in arms.items()]
    paper = [f"{name}: error {row['error']}, MMD {row['mmd']}" for name, row in PAPER["homotopy"].items()]
    runs = list(arms.values())
    return "; ".join([*ours, f"{runs[0][0]['iters']:,} steps of {numbers['data']}", seeds_of(runs)]), (
        "; ".join([*paper, "CelebA"]))


def p8(numbers):
    """(ours, the paper's) of choosing alpha by the gap between training and test NLL."""
    parts = []
    for iters, chosen in numbers["chosen_alpha"].items():
        parts.append(f"{int(iters):,} steps: chosen {'none' if chosen is None else f'{chosen:g}'}, gaps " + ", ".join(
            f"{row['gap_bpd']:+.3f} bpd (z = {row['z']:.1f}) at {row['alpha']:g}" for row in numbers["rows"][iters]))
    return "; ".join(parts) + "; 1 seed", "proposed, without figures"


def theory(paper, found=""):
    """(ours, the paper's) of an experiment under theory/, whose JSON lists predictions; `found` is added to ours."""
    return lambda numbers: (
        f"{sum(row['holds'] for row in numbers['rows'])} of {len(numbers['rows'])} predictions hold{found}", paper)


CLAIMS = [  # (claim, experiment, the word that its checks begin with: "", all of them; the row's figures)
    ("P1: outliers have the higher NLL, FashionMNIST and MNIST", "reproduce/table1", "mnist bpd", p1),
    ("P2, the failure: CIFAR-10, SVHN has the lower NLL at small alpha", "reproduce/compute", "svhn bpd below",
     p2("SVHN minus test (bpd)", (0.25, 0.5, 1), True)),
    ("P2, the repair: SVHN has the higher NLL at large alpha", "reproduce/compute", "svhn bpd above",
     p2("SVHN minus test (bpd)", (2, 3, 4), True)),
    ("P2, its trend: SVHN minus test rises with alpha", "reproduce/compute", "SVHN minus test",
     p2("SVHN minus test (bpd)", ALPHAS, False)),
    ("P2, with training: SVHN minus test rises with the steps", "reproduce/compute", "the crossing", p2_crossing),
    ("P2, CelebA has the higher NLL at every alpha", "reproduce/compute", "celeba bpd above",
     p2("CelebA minus test (bpd)", ALPHAS, True)),
    ("P2, gamma falls as alpha grows", "reproduce/compute", "gamma falls", p2("gamma", ALPHAS, False)),
    ("P2, test bpd falls as alpha grows", "reproduce/compute", "test bpd falls", p2("test bpd", ALPHAS, False)),
    ("P3: superfluous latent dimensions are pruned, more sharply at larger alpha", "reproduce/fig4", "", p3),
    ("P4: six regimes of capacity and kappa", "theory/regimes", "",
     theory("hypothetical", "; each seed takes the best of several starts")),
    ("P5: a Gaussian on a circle prefers the empty centre", "theory/circle", "",
     theory("stated, with covariance I", "; the maximum-likelihood covariance is I/2")),
    ("P6: Theorem 1: an unbounded slope is necessary", "theory/theorem1", "",
     theory("proved", "; it is not sufficient")),
    ("P7: learning gamma works as a homotopy", "reproduce/homotopy", "", p7),
    ("P8: alpha can be chosen without outliers", "reproduce/select", "", p8),
]


def page(folder):
    """The text of README.md from the JSON files under `folder`."""
    rows, sections, spent = [], {}, ""
    for claim, name, word, row in CLAIMS:
        path, (group, experiment) = Path(folder, f"{name}.json"), name.split("/")
        numbers = json.loads(path.read_text()) if path.exists() else {}
        checks = checks_of(numbers, word)
        if not checks:
            rows.append([claim, verdict(checks), *[""] * 4])
            continue
        command = numbers.get("command", f"python -m theory.{experiment}")
        rows.append([claim, verdict(checks), *row(numbers), f"`{command}`", f"[{experiment}]({name}.png)"])
        if group == "reproduce":
            sections[name] = section(f"{claim[:2]}: {experiment}", name, numbers)
        if experiment == "compute":
            spent = training_of(numbers["runs"])
    return "\n".join([
        "# Results", "",
        "Written by `python -m vae_ood.reproduce claims` from the JSON files beside it; a test fails where the two "
        "disagree. bpd: bits per dimension of 8-bit data from the negative ELBO, the mean over images (the paper's, "
        "3.9944 bits lower, cancel in differences). AUROC: of the negative ELBO, outliers are the positive class. "
        "FPR95: the share of outliers accepted at the threshold that accepts 95% of the inliers. Brackets after a "
        "number of images tell of the whole set: for `train`, the one that was trained on. A command without `--recipe "
        "paper` (200,000 steps, gamma learned) took the fast recipe (gamma by homotopy, the learning rate by a cosine, "
        "its peak divided by alpha above 1: there, alpha and the learning rate change together). An older version set "
        "the steps by `--budget`; `--iters` with the steps that are stated repeats it. A command draws the runs that "
        "are there with `--budget 0`, and trains them without it. All ran on two cores of an AMD EPYC (Zen 4), in "
        f"float32. {spent}Where fewer than three seeds stand behind a figure, there is no interval over seeds.", "",
        *markdown(["claim", "verdict", "ours", "the paper", "command", "figure"], rows), "",
        *(line for lines in sections.values() for line in lines)])


def checks_of(numbers, word):
    """Whether each check held that begins with a word, or each of theory's predictions; [] where none was judged."""
    if "claims" not in numbers:
        return [row["holds"] for row in numbers.get("rows", [])]
    judged = any(check["held"] is not None for check in numbers["claims"])
    return [check["held"] for check in numbers["claims"] if judged and check["claim"].startswith(word)]


def section(head, name, numbers):
    """The lines about one experiment: its command and every check."""
    return [f"## {head}", "", f"`{numbers['command']}`: [all figures]({name}.md), [JSON]({name}.json)", "",
            numbers["images"], "",
            *markdown(["check", "verdict", "figures"],
                      [[check["claim"], HELD[check["held"]], check["figures"]] for check in numbers["claims"]]),
            "", f"![{Path(name).name}]({name}.png)", ""]


def training_of(runs):
    """The sentences about the time that `compute`'s runs took, and where they are."""
    hours = sum(run["seconds_at_median_speed"] for run in runs) / 3600
    return (f"P2 and P8 rest on {len(runs)} runs, {hours:.1f} hours of training in all at their median speeds "
            f"({sum(run['flops'] for run in runs):.1e} FLOPs). Their logs and metrics, from which `--runs "
            "results/runs --budget 0` draws, and two checkpoints, their weights in float16, are in [runs/](runs). ")


def write():
    """Write results/README.md."""
    checkpoint.write_atomic(RESULTS / "README.md", page(RESULTS).encode())
    print(f"written to {RESULTS / 'README.md'}")
