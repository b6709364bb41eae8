"""results/README.md: which of the paper's claims reproduce, from the JSON files under results/ and nothing else.

    python -m vae_ood.claims

The verdict of a claim follows from the checks that its experiment's own code made: "reproduced" if all of them held,
"not reproduced" if none did, "not reached" if none could be judged, because the training that they need was not run,
and "in part" otherwise.
"""

import json
import statistics
from pathlib import Path

from vae_ood import checkpoint
from vae_ood.cli import Parser, one_line_errors
from vae_ood.reproduce import HELD, PAPER, STEPS, Run, gap, markdown, training_flops

RESULTS = Path(__file__).resolve().parent.parent / "results"


def verdict(checks):
    """The verdict of checks, each True (held), False or None (not reached)."""
    counts = {word: sum(check is value for check in checks) for value, word in HELD.items()}
    if not any(counts[HELD[value]] for value in (True, False)):
        return "not reached"
    if sum(counts.values()) == counts[HELD[True]]:
        return "reproduced"
    if sum(counts.values()) == counts[HELD[False]]:
        return "not reproduced"
    return "in part: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count) + " of its checks"


def span(values, form="+.3f"):
    """The range of some values."""
    low, high = (f"{value:{form}}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def seeds_of(groups):
    """How many seeds stand behind the figures."""
    low, high = min(map(len, groups)), max(map(len, groups))
    return f"{low if low == high else f'{low} to {high}'} seed(s)"


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


def p2(numbers):
    """(ours, the paper's) of CIFAR-10 against SVHN and CelebA."""
    runs, whole = numbers["runs"], training_flops(Run("cifar10", 4, 32, iters=STEPS["paper"]))
    parts, paper = [], []
    for name, alphas in (("alpha <= 1", (0.25, 0.5, 1)), ("alpha > 1", (2, 3, 4))):
        svhn = [gap(run, "svhn") for run in runs if run["alpha"] in alphas]
        parts.append(f"SVHN minus test at {name}: " + (f"{span(svhn)} bpd" if svhn else "not run"))
        columns = [PAPER["table2"][alpha] for alpha in alphas]
        paper.append(f"SVHN minus test at {name}: {span([c['svhn'] - c['test'] for c in columns])} bpd")
    most = max(run["flops"] for run in runs)
    return "; ".join([
        *parts, f"CelebA minus test: {span([gap(run, 'celeba') for run in runs])}",
        *(f"AUROC of {name} {span([run['detection'][name]['auroc'] for run in runs], '.3f')}"
          for name in ("svhn", "celeba")),
        f"{len(runs)} runs, the largest of {most:.1e} FLOPs, {most / whole:.1%} of the paper's at alpha = 4"]), (
            "; ".join(paper))


def p3(numbers):
    """(ours, the paper's) of the cut-off of the latent dimensions' KL."""
    groups = {}
    for column in numbers["columns"]:
        groups.setdefault(column["alpha"], []).extend(column["runs"])
    return "; ".join(
        f"alpha = {alpha:g}: {', '.join(str(run['active_dims']) for run in runs)} active of kappa = "
        f"{', '.join(str(run['kappa']) for run in runs)}" for alpha, runs in groups.items() if runs) + (
            f"; {seeds_of([c['runs'] for c in numbers['columns'] if c['runs']])}"), (
            "a figure, whose cut-off is sharper at alpha = 4 than at 1")


def p7(numbers):
    """(ours, the paper's) of learning gamma as a homotopy."""
    arms, mean = {name: runs for name, runs in numbers["arms"].items() if runs}, statistics.mean
    ours = [f"{name}: error {mean(run['error']['train'] for run in runs):.2f}, MMD "
            f"{1e3 * mean(run['mmd'] for run in runs):.2f}e-3, gradient "
            f"{mean(run['gradient']['first'] for run in runs):.0f} at first, "
            f"{mean(run['gradient']['last'] for run in runs):.0f} at last" for name, runs in arms.items()]
    paper = [f"{name}: error {row['error']}, MMD {row['mmd']}" for name, row in PAPER["homotopy"].items()]
    return "; ".join([*ours, numbers["data"], seeds_of(arms.values())]), "; ".join([*paper, "CelebA"])


def p8(numbers):
    """(ours, the paper's) of choosing alpha by the gap between training and test NLL."""
    chosen, at = numbers["chosen_alpha"], {row["alpha"]: row for row in numbers["rows"]}
    return f"of alpha = {', '.join(f'{alpha:g}' for alpha in at)}, chosen: " + (
        "none" if chosen is None else f"{chosen:g}, AUROC " + ", ".join(
            f"{name} {row['auroc']:.3f}" for name, row in at[chosen]["detection"].items())) + (
        "" if numbers["gap_found"] else " (no gap was significant)") + "; 1 seed", "proposed, without figures"


def theory(paper):
    """(ours, the paper's) of an experiment under theory/, whose JSON lists predictions."""
    return lambda numbers: (
        f"{sum(row['holds'] for row in numbers['rows'])} of {len(numbers['rows'])} predictions hold", paper)


CLAIMS = [  # (claim, experiment, the words that its checks begin with: none, all of them; the row's figures)
    ("P1: outliers have the higher NLL, FashionMNIST and MNIST", "reproduce/table1", ("mnist bpd",), p1),
    ("P2, the failure: CIFAR-10, at small alpha SVHN has the lower NLL", "reproduce/compute", ("svhn bpd below",), p2),
    ("P2, the repair: outliers have the higher NLL as alpha grows, and gamma falls", "reproduce/compute",
     ("svhn bpd above", "celeba bpd above", "SVHN minus test", "gamma falls"), p2),
    ("P3: superfluous latent dimensions are pruned, more sharply at larger alpha", "reproduce/fig4", (), p3),
    ("P4: six regimes of capacity and kappa", "theory/regimes", (), theory("hypothetical")),
    ("P5: a Gaussian on a circle prefers the empty centre", "theory/circle", (), theory("stated")),
    ("P6: Theorem 1", "theory/theorem1", (), theory("proved")),
    ("P7: learning gamma works as a homotopy", "reproduce/homotopy", (), p7),
    ("P8: alpha can be chosen without outliers", "reproduce/select", (), p8),
]


def page(folder):
    """The text of README.md from the JSON files under `folder`."""
    rows, sections, spent = [], {}, ""
    for claim, name, words, row in CLAIMS:
        path, (group, experiment) = Path(folder, f"{name}.json"), name.split("/")
        numbers = json.loads(path.read_text()) if path.exists() else {}
        claims = numbers.get("claims", [])
        checks = [check["held"] for check in claims if check["claim"].startswith(words or "")]
        if group == "theory":
            checks = [check["holds"] for check in numbers.get("rows", [])]
        elif all(check["held"] is None for check in claims):
            checks = []
        if not checks:
            rows.append([claim, verdict(checks), *[""] * 4])
            continue
        command = numbers.get("command", f"python -m theory.{experiment}")
        rows.append([claim, verdict(checks), *row(numbers), f"`{command}`", f"[{experiment}]({name}.png)"])
        if group == "reproduce":
            sections[name] = [
                f"## {claim[:2]}: {experiment}", "", f"`{command}`: [all figures]({name}.md), [JSON]({name}.json)", "",
                *markdown(["check", "verdict", "figures"],
                          [[check["claim"], HELD[check["held"]], check["figures"]] for check in claims]),
                "", f"![{experiment}]({name}.png)", ""]
        if experiment == "compute":
            runs = numbers["runs"]
            hours = sum(run["training_seconds"] for run in runs) / 3600
            spent = (f"P2 rests on {len(runs)} runs of {hours:.1f} hours of training in all, at their median speeds "
                     f"({sum(run['flops'] for run in runs):.1e} FLOPs). Their logs and figures, and small checkpoints, "
                     "are in [runs/](runs), which `--runs results/runs --budget 0` reads. ")
    return "\n".join([
        "# Results", "",
        "Written by `python -m vae_ood.claims` from the JSON files beside it; a test fails where the two disagree. bpd "
        "is bits per dimension of 8-bit data from the negative ELBO; the paper's, 4 bits lower, cancel in differences. "
        "AUROC: of the negative ELBO, outliers are the positive class. A command without `--recipe paper` (200,000 "
        "steps, gamma learned) took the fast recipe (gamma by homotopy, the learning rate by a cosine). Numbers and "
        "sources of the images are in the pages linked below. " + spent +
        "Where fewer than three seeds stand behind a figure, there is no interval over seeds.", "",
        *markdown(["claim", "verdict", "ours", "the paper", "command", "figure"], rows), "",
        *(line for section in sections.values() for line in section)])


def main():
    """The command."""
    Parser(description=__doc__.splitlines()[0]).parse_args()
    checkpoint.write_atomic(RESULTS / "README.md", page(RESULTS).encode())
    print(f"written to {RESULTS / 'README.md'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
