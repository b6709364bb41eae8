"""results/detection.md: every score against every outlier set, over seeds, beside the controls and published figures.

    python -m vae_ood.detection --data-root DIR

What a checkpoint's scores measured is kept in results/detection/; a file that is not there is made by run.py, where the
checkpoint is not there either, and eval.py. With all of them there, the page alone is written, from them and nothing
else. After a change of a score, delete those files and the folders detection* of the runs.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

from vae_ood import checkpoint
from vae_ood.cli import Parser, make_folder, one_line_errors
from vae_ood.data import PAIRS
from vae_ood.data.synthetic import CORRUPTIONS
from vae_ood.plots import markdown
from vae_ood.reproduce.pages import INTERVAL, cell
from vae_ood.reproduce.runs import IW_SAMPLES, Run, execute, measured
from vae_ood.scores import CONTROLS, SCORES

RESULTS = Path(__file__).resolve().parent.parent / "results"
SEEDS = 3
RUNS = {"sprites": Run("sprites", 0.25, 16, iters=3_000), "fashionmnist": Run("fashionmnist", 1, 32, iters=5_000),
        "cifar10": Run("cifar10", 1, 32, iters=10_000)}
OUTLIERS = {"sprites": (*PAIRS["sprites"], *CORRUPTIONS),
            "fashionmnist": ("mnist", "cifar10", "svhn", "noise", "constant", *CORRUPTIONS),
            "cifar10": ("svhn", "celeba", "mnist", "fashionmnist", "noise", "constant", *CORRUPTIONS)}
DEVELOPMENT = {  # what `default` was settled on
    "sprites": OUTLIERS["sprites"], "fashionmnist": ("mnist", *CORRUPTIONS), "cifar10": CORRUPTIONS}
REGRET_OUTLIERS = {"sprites": PAIRS["sprites"][:3], "fashionmnist": ("mnist",), "cifar10": ("svhn", "celeba")}
REGRET_IMAGES = 1_000
MADE_UP = {"noise": 0.999, "constant": 0.999, "blurred": 0.98, "noisy": 0.98}
AIMS = {"sprites": {}, "fashionmnist": {"mnist": 0.999} | MADE_UP,
        "cifar10": {"svhn": 0.99, "celeba": 0.85, "mnist": 0.999, "fashionmnist": 0.999} | MADE_UP}
PUBLISHED = [("likelihood regret (arXiv 2003.02977)", 0.99, 0.88),
             ("BIVA, hierarchical (arXiv 2102.08248)", 0.98, 0.89),
             ("DoSE (arXiv 2006.09273)", 1.00, 0.97), ("likelihood path (arXiv 2401.04933)", 1.00, 0.99)]


def evaluation(run, runs, outliers, *scores):
    """(the folder of an evaluation, the arguments of python that write it there)."""
    folder = Path(runs, run.folder)
    out = folder / "-".join(["detection", *scores])
    return out, ["eval.py", "--ckpt", str(folder / "ckpt.pt"), "--outliers", *outliers, "--iw-samples", str(IW_SAMPLES),
                 *(["--max-images", str(REGRET_IMAGES), "--scores", *scores] if scores else []), "--out", str(out)]


def measure(run, args):
    """What the scores measure on a run's checkpoint, training it if need be."""
    training = measured(run, args)
    numbers = {"data": run.data, "alpha": run.alpha, "kappa": run.kappa, "seed": run.seed, "iters": run.iters,
               "commands": [training["command"]], "minutes": training["seconds_at_median_speed"] / 60,
               "test_bpd": training["sets"]["test"]["bpd"], "test_nll": training["sets"]["test"]["nll"], "sets": {},
               "scores": {}}
    for parts in ((OUTLIERS[run.data],), (REGRET_OUTLIERS[run.data], "regret")):
        out, arguments = evaluation(run, args.runs, *parts)
        if not (out / "metrics.json").exists():
            execute(arguments, args.data_root)
        metrics = json.loads((out / "metrics.json").read_text())
        numbers["commands"].append(f"python {' '.join(evaluation(run, 'runs', *parts)[1])}")
        numbers["sets"] |= {name: {key: row[key] for key in ("n", "notes")} for name, row in metrics["sets"].items()
                            if name not in numbers["sets"]}
        numbers["scores"] |= metrics["scores"]
        numbers.setdefault("fit_images", metrics["fit_images"])
    return numbers


def section(data, runs):
    """The lines about the checkpoints of one data set, from what each measured."""
    def values(score, outlier, key="auroc"):
        return [run["scores"][score][outlier][key] for run in runs if outlier in run["scores"].get(score, {})]

    def both(score, one):
        return f"{cell(values(score, one), 4)}, {statistics.mean(values(score, one, 'fpr95')):.3f}"

    outliers, summary = list(runs[0]["scores"]["default"]), []
    rows = [[score + " (control)" * (score in CONTROLS),
             *(both(score, one) if values(score, one) else "" for one in outliers)]
            for score in SCORES if score in runs[0]["scores"]]
    for one in outliers:
        mean = {score: statistics.mean(values(score, one)) for score in SCORES if values(score, one)}
        control = max((score for score in mean if score in CONTROLS), key=mean.get)
        best = max((score for score in mean if score not in CONTROLS and score != "default"), key=mean.get)
        aim, ahead = AIMS[data].get(one), round(mean["default"] - mean[control], 4)
        summary.append([
            one + " (development)" * (one in DEVELOPMENT[data]), f"{mean['default']:.4f}",
            "" if aim is None else f"{aim:g}: {'reached' if mean['default'] >= aim else 'NOT reached'}",
            f"{control} {mean[control]:.4f}: "
            f"{'beaten' if ahead > 0 else 'NOT beaten' if ahead else 'level'}",
            f"{best} {mean[best]:.4f}"])
    one = runs[0]
    sets = ", ".join(f"{name} {row['n']:,}" + "".join(f" ({note})" for note in row["notes"])
                     for name, row in one["sets"].items())
    bpd, nll = ([run[key] for run in runs] for key in ("test_bpd", "test_nll"))
    likelihood = f"NLL {cell(nll, 0)} nats" if None in bpd else f"bpd {cell(bpd, 3)}"
    return [
        f"## Inliers: {data}", "",
        f"alpha = {one['alpha']:g}, kappa = {one['kappa']}, {one['iters']:,} steps "
        f"({statistics.median(run['minutes'] for run in runs):.1f} minutes on two CPU cores, the median over the seeds "
        "of each one's median speed: the cores were not always free); test "
        f"{likelihood}; {len(runs)} seeds. Images: {sets}; scores fitted to "
        f"{one['fit_images']:,} training images; `regret`: the first {REGRET_IMAGES:,} of each set.", "",
        *markdown(["outliers", "`default`", "aim", "best control", "best other score"], summary), "",
        "Each cell: AUROC, FPR95.", "", *markdown(["score", *outliers], rows), "",
        "Commands of seed 0:", "", "```", *one["commands"], "```", ""]


def page(folder):
    """The text of detection.md from the JSON files under `folder`/detection."""
    found = {}
    for path in sorted(Path(folder, "detection").glob("*.json")):
        numbers = json.loads(path.read_text())
        found.setdefault(numbers["data"], []).append(numbers)
    ours = [[f"{score}, ours", *(f"{statistics.mean(run['scores'][score][one]['auroc'] for run in found[data]):.4f}"
                                 for data, one in (("fashionmnist", "mnist"), ("cifar10", "svhn")))]
            for score in ("default", "likelihood_path", "regret", "nll")]
    return "\n".join([
        "# Detecting outliers: every score, every set", "",
        "Written by `python -m vae_ood.detection` from the files in [detection/](detection); a test fails where they "
        "disagree. AUROC: outliers are the positive class, inliers are the test images, a larger score is more "
        "outlying. FPR95: the share of outliers accepted at the threshold that accepts 95% of the inliers, the mean "
        f"over the seeds. ±: {INTERVAL}; the intervals over images are in the files. Scores are fitted on training "
        "images alone. Controls see the image and no model. What `default` combines was settled on the sets marked "
        "development; the others' figures chose nothing, but were in view, so they are no blind test.", "",
        *(line for data in OUTLIERS if data in found for line in section(data, found[data])),
        "## Published figures", "",
        "AUROC; those of others as tabulated in arXiv 2401.04933, not run again here. The protocols differ: ours is a "
        "plain Gaussian VAE, trained for minutes on two CPU cores, CIFAR-10's on 30,000 of its 50,000 training images, "
        "with one `default` for both pairs, over three seeds; theirs are the models, decoders, training sets and "
        "constants of each paper, up to hierarchical VAEs and flows.", "",
        *markdown(["method", "FashionMNIST, MNIST", "CIFAR-10, SVHN"],
                  [*([name, f"{a:.2f}", f"{b:.2f}"] for name, a, b in PUBLISHED), *ours]), ""])


def main():
    """The command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are kept (default runs)")
    parser.add_argument("--data-root", metavar="DIR", help="that of run.py")
    args = parser.parse_args()
    make_folder(RESULTS / "detection")
    for column in RUNS.values():
        for seed in range(SEEDS):
            run = replace(column, seed=seed)
            path = RESULTS / "detection" / f"{run.folder}.json"
            if not path.exists():
                checkpoint.write_atomic(path, (json.dumps(measure(run, args), indent=1) + "\n").encode())
    checkpoint.write_atomic(RESULTS / "detection.md", page(RESULTS).encode())
    print(f"written to {RESULTS / 'detection.md'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
