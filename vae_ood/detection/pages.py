"""The page results/detection.md, from the JSON files in results/detection/."""

import json
import statistics
from dataclasses import dataclass

from vae_ood.data.synthetic import CORRUPTIONS
from vae_ood.detection import contenders, frontier
from vae_ood.detection.pairs import (
    CLASS_OUTLIERS,
    CLASSES,
    LANCZOS,
    OUTLIERS,
    RATE,
    REGRET_IMAGES,
    TILE_OUTLIERS,
    TILES,
)
from vae_ood.member import FIT_IMAGES
from vae_ood.plots import markdown
from vae_ood.reproduce.pages import INTERVAL, cell
from vae_ood.scores import CONTROLS, SCORES

DEVELOPMENT = {  # what `default` was settled on, or what was in view while it was
    "sprites": OUTLIERS["sprites"], "fashionmnist": ("mnist", *CORRUPTIONS),
    "cifar10": ("svhn", "celeba", LANCZOS, *CORRUPTIONS), TILES: TILE_OUTLIERS[:1]}
DEVELOPMENT_CLASSES = range(5)
MADE_UP = {"noise": 0.999, "constant": 0.999, "blurred": 0.98, "noisy": 0.98}
AIMS = {"fashionmnist": {"mnist": 0.999} | MADE_UP,
        "cifar10": {"svhn": 0.99, "celeba": 0.75, LANCZOS: 0.75, "mnist": 0.999, "fashionmnist": 0.999, "faded": 0.9,
                    "patched": 0.7} | MADE_UP}
GOAL, WITHIN = 0.9, 0.005  # where a control or a single score has so much, `default` is to be within so much of it
PUBLISHED = [("likelihood regret (arXiv 2003.02977)", 0.99, 0.88),
             ("BIVA, hierarchical (arXiv 2102.08248)", 0.98, 0.89),
             ("DoSE (arXiv 2006.09273)", 1.00, 0.97), ("likelihood path (arXiv 2401.04933)", 1.00, 0.99)]


@dataclass
class Pair:
    """Inliers and outliers, and the figures of every run on them: {score: [AUROC of each run]}, FPR95 of `default`, and
    what it flags of inliers and of outliers, in each run. `seeds`: whether the runs differ by their seeds alone."""

    inliers: str
    outliers: str
    development: bool
    aurocs: dict
    fpr95: list
    flagged: list
    seeds: bool = True

    @classmethod
    def of(cls, runs, inliers, outliers, development, label=None, seeds=True):
        """The pair of `runs` and the set that they call `outliers`, which is to be called `label`."""
        rows = {score: [run["scores"][score][outliers] for run in runs if outliers in run["scores"].get(score, {})]
                for score in SCORES}
        return cls(inliers, label or outliers, development,
                   {score: [row["auroc"] for row in of] for score, of in rows.items() if of},
                   [row["fpr95"] for row in rows["default"]],
                   [run["flagged"][outliers] for run in runs if "flagged" in run], seeds)

    @property
    def name(self):
        """The outliers, marked where they are development."""
        return self.outliers + " (development)" * self.development

    def mean(self, score):
        """A score's AUROC, over the runs."""
        return statistics.mean(self.aurocs[score])

    def best(self, control):
        """The control, or the score that is none and not `default`, with the largest AUROC on these outliers."""
        return max((score for score in self.aurocs if score != "default" and (score in CONTROLS) == control),
                   key=self.mean)

    def bar(self):
        """The largest AUROC of all but `default`."""
        return max(self.mean(self.best(control)) for control in (True, False))

    def behind(self):
        """By how much `default` is below the bar where that matters, else 0."""
        behind = round(self.bar() - self.mean("default"), 4)
        return behind if behind > WITHIN and self.bar() >= GOAL else 0

    def verdict(self):
        """How `default` compares with the bar, in a word or two."""
        ahead = round(self.mean("default") - self.bar(), 4)
        if abs(ahead) <= WITHIN:
            return "level"
        return "ahead" if ahead > 0 else f"{'BEHIND' if self.behind() else 'behind'} by {-ahead:.4f}"

    def aimed(self):
        """The aim of `default`, and whether it is reached."""
        aim = AIMS.get(self.inliers, {}).get(self.outliers)
        return "" if aim is None else f"{aim:g}: {'reached' if self.mean('default') >= aim else 'NOT reached'}"

    def named(self, control):
        """The best control, or other score, and its AUROC."""
        return f"{self.best(control)} {self.mean(self.best(control)):.4f}"

    def rates(self):
        """The cells of FPR95 and of what is flagged."""
        flagged = [f"{100 * statistics.mean(values):.1f}" for values in zip(*self.flagged, strict=True)]
        return [f"{statistics.mean(self.fpr95):.3f}", f"{flagged[1]} ({flagged[0]})" if flagged else ""]


def read(folder):
    """{kind: {data: [what each run measured]}} of the JSON files in a folder; kinds: named, without, pyod."""
    found = {"named": {}, "without": {}, "pyod": {}}
    for path in sorted(folder.glob("*.json")):
        numbers = json.loads(path.read_text())
        kind = next((kind for kind in ("without", "pyod") if kind in numbers), "named")
        found[kind].setdefault(numbers["data"], []).append(numbers)
    return found


def named_pairs(found):
    """[Pair] of the named sets and the magnetic tiles, over seeds."""
    return [Pair.of(found["named"][data], data, one, one in DEVELOPMENT[data])
            for data in (*OUTLIERS, TILES) if data in found["named"]
            for one in found["named"][data][0]["scores"]["default"]]


def class_pairs(found):
    """[Pair] of each class that was left out."""
    return [Pair.of([run], f"{data} without a class", CLASS_OUTLIERS, run["without"] in DEVELOPMENT_CLASSES,
                    CLASSES[data][run["without"]])
            for data in CLASSES for run in found["without"].get(data, [])]


def mean_pairs(found):
    """[Pair] of the classes that were left out, the mean of those of development and of the others."""
    parts = [(data, development, [run for run in found["without"].get(data, [])
                                  if (run["without"] in DEVELOPMENT_CLASSES) == development])
             for data in CLASSES for development in (True, False)]
    return [Pair.of(runs, f"{data} without a class", CLASS_OUTLIERS, development,
                    "that class, mean of " + ", ".join(str(run["without"]) for run in runs), seeds=False)
            for data, development, runs in parts if runs]


# ---- the parts of the page

def at_a_glance(found):
    """The lines of the summary: in words, in one table, and in a picture."""
    pairs = named_pairs(found) + class_pairs(found)
    counted = [pair for pair in pairs if pair.bar() >= GOAL]
    behind = sorted((pair for pair in counted if pair.behind()), key=Pair.behind, reverse=True)
    classes = f" ({len(class_pairs(found))} of them a class that was left out)" * bool(class_pairs(found))
    rows = [[pair.inliers, pair.name, cell(pair.aurocs["default"], 4) if pair.seeds else f"{pair.mean('default'):.4f}",
             pair.aimed(), pair.named(True), pair.named(False), pair.verdict(), *pair.rates()]
            for pair in named_pairs(found) + mean_pairs(found)]
    return [
        f"**The goal**: where a control or a single score has an AUROC of {GOAL} or more, `default` is at most "
        f"{WITHIN} below it. Of {len(pairs)} pairs of inliers and outliers{classes} this concerns {len(counted)}. "
        f"`default` keeps to it on {len(counted) - len(behind)}, and is behind on {len(behind)}"
        + "".join(f"{', ' if i else ': '}{pair.outliers} of {pair.inliers} (by {pair.behind():.4f})"
                  for i, pair in enumerate(behind)) + ".", "",
        "AUROC is the chance that an outlier, of the positive class, scores above an inlier. FPR95 is the share of "
        "outliers accepted where 95% of the inliers are. The last column is what % of the outliers (inliers) is "
        "flagged. [What the columns mean exactly](#how-to-read-it).", "",
        *markdown(["inliers", "outliers", "`default`, AUROC", "aim", "best control", "best other score", "verdict",
                   "FPR95", f"flagged at {100 * RATE:g}%"], rows), "",
        "![`default` against the best control, a dot a pair](detection.png)", "",
        "A dot above the line: `default` is better than the best control. Hollow: development.", "",
        *frontier.lines(found["named"]),
        "## How to read it", "", *map("- {}".format, GLOSSARY), ""]


GLOSSARY = (
    "**default** is what eval.py flags by; it and the others are described [here](../vae_ood/README.md#the-scores).",
    "**AUROC**: 0.5 is a coin's, 1 is perfect; ties count half. Inliers are test images, which nothing was trained on "
    f"or fitted to. A larger score is more outlying. ±: {INTERVAL}; the intervals over images are in the files.",
    "**aim**: what is wanted of `default`, whatever the others reach; set with earlier figures in view.",
    "**control**: it sees the image and no model. The best control and the best other score are chosen on these very "
    "outliers, as nobody can beforehand.",
    f"**verdict**: `default` against the better of these two; level: within {WITHIN}; BEHIND in capitals: where the "
    "goal says that it should not be.",
    "**FPR95**: the mean over the seeds. One less that is the share of outliers above the 95th percentile of the "
    "inliers.",
    f"**flagged at {100 * RATE:g}%**: those with a conformal p-value of at most {RATE}. Of named sets every other test "
    "image calibrates, and the others are counted; of left-out classes and magnetic tiles, those calibrate that run.py "
    "held out.",
    "**development**: what `default` combines was settled on these sets, or, CIFAR-10's SVHN and CelebA, with their "
    "two figures in view. The others chose nothing, but all named ones have been looked at, so they are no blind test. "
    f"Of the classes, those from {DEVELOPMENT_CLASSES.stop} on were looked at once, at the end.",
    "**celeba**: faces cropped to their middle 148x148 pixels and scaled to 32x32 by an antialiased bilinear filter, "
    f"as other sets are; **{LANCZOS}**: the same crop, scaled by Pillow's Lanczos filter.",
    f"**{TILES}**: pictures of other tiles than those trained on; {TILE_OUTLIERS[0]} against tiles of even number, "
    f"{TILE_OUTLIERS[1]} against the others ([more of them](pictures.md)).")


def table(runs, names, outliers):
    """The lines of a table of AUROC and FPR95 over `runs`: a row for each of the scores `names`."""
    def cells(score):
        for one in outliers:
            rows = [run["scores"][score][one] for run in runs if one in run["scores"][score]]
            fpr95 = rows and statistics.mean(row["fpr95"] for row in rows)
            yield f"{cell([row['auroc'] for row in rows], 4)}, {fpr95:.3f}" if rows else ""
    return markdown(["AUROC, FPR95", *outliers],
                    [[name + " (control)" * (name in CONTROLS), *cells(name)] for name in names])


def section(data, runs):
    """The lines about the checkpoints of one data set, from what each measured."""
    one, outliers = runs[0], list(runs[0]["scores"]["default"])
    sets = ", ".join(f"{name} {row['n']:,}" + "".join(f" ({note})" for note in row["notes"])
                     for name, row in one["sets"].items())
    fitted, likelihood = one.get("fit_images"), ""
    if "test_nll" in one:
        bpd, nll = ([run[key] for run in runs] for key in ("test_bpd", "test_nll"))
        likelihood = f"test NLL {cell(nll, 0)} nats; " if None in bpd else f"test bpd {cell(bpd, 3)}; "
    return [
        f"## Inliers: {data}", "",
        f"alpha = {one['alpha']:g}, kappa = {one['kappa']}, {one['iters']:,} steps "
        f"({statistics.median(run['minutes'] for run in runs):.1f} minutes on two CPU cores, the median over the seeds "
        "of each one's median speed: the cores were not always free); "
        f"{likelihood}{len(runs)} seed{'s' * (len(runs) > 1)}. Images: {sets}; "
        + (f"scores fitted to {fitted:,} training images; `regret`: the first {REGRET_IMAGES:,} of each set."
           if fitted else f"trained on {one['train_images']:,}, to which the scores are fitted."), "",
        *table(runs, [score for score in SCORES if score in one["scores"]], outliers), ""]


def left_out(found):
    """The lines about the classes that were left out."""
    pairs, some = class_pairs(found), [run for runs in found["without"].values() for run in runs]
    if not some:
        return []
    lines = ["## One class left out", "",
             f"Trained on nine of ten classes: alpha = {some[0]['alpha']:g}, kappa = {some[0]['kappa']}, "
             f"{some[0]['iters']:,} steps ({statistics.median(run['minutes'] for run in some):.1f} minutes on two CPU "
             f"cores, the median), one seed; scores fitted to {FIT_IMAGES:,} training images. Inliers: the nine "
             "classes' 9,000 official test images; outliers: the tenth's 1,000. The columns of scores are AUROCs.", ""]
    for data in (data for data in CLASSES if data in found["without"]):
        rows = [pair for pair in pairs if pair.inliers.startswith(data)]
        controls = [score for score in rows[0].aurocs if score in CONTROLS]
        lines += [f"### {data}", "", *markdown(
            ["left out", "`default`", *(f"{name} (control)" for name in controls), "best other score", "verdict",
             "FPR95", f"flagged at {100 * RATE:g}%"],
            [*([pair.name, *(f"{pair.mean(score):.4f}" for score in ("default", *controls)), pair.named(False),
                pair.verdict(), *pair.rates()] for pair in rows),
             ["their mean", *(f"{statistics.mean(pair.mean(score) for pair in rows):.4f}"
                              for score in ("default", *controls)), "", "", "", ""]]), ""]
    return lines


def others(found):
    """The lines about PyOD's detectors."""
    if not found["pyod"]:
        return []
    lines = ["## PyOD on the same pixels", "",
             f"PyOD {' or '.join(sorted({run['pyod'] for (run,) in found['pyod'].values()}))}, its detectors as their "
             f"constructors have them, fitted to the pixels of the first {contenders.FIT:,} training images at most, "
             f"one seed; on the first {contenders.SCORED:,} images of each set. `default`: as above, on all images, "
             "over the seeds.", ""]
    for data in (data for data in (*OUTLIERS, TILES) if data in found["pyod"]):
        run, = found["pyod"][data]
        outliers = list(next(iter(run["scores"].values())))
        ours = [{"scores": {"default": of["scores"]["default"]}} for of in found["named"].get(data, [])]
        lines += [f"### Inliers: {data}, {run['fit_images']:,} to fit to", "",
                  *table([run], run["scores"], outliers), *(table(ours, ["default"], outliers)[2:] if ours else []), ""]
    return lines


def published(found):
    """The lines about published figures, where both pairs are there."""
    named = found["named"]
    if not {"fashionmnist", "cifar10"} <= set(named):
        return []
    ours = [[f"{score}, ours", *(f"{statistics.mean(run['scores'][score][one]['auroc'] for run in named[data]):.4f}"
                                 for data, one in (("fashionmnist", "mnist"), ("cifar10", "svhn")))]
            for score in ("default", "likelihood_path", "regret", "nll") if score in SCORES]
    return [
        "## Published figures", "",
        "AUROC; those of others as tabulated in arXiv 2401.04933, not run again here. The protocols differ: ours is a "
        "plain Gaussian VAE, trained for minutes on two CPU cores, with one `default` for both pairs, the mean over "
        "seeds; theirs are the models, decoders, training sets and constants of each paper, up to hierarchical VAEs "
        "and flows.", "",
        *markdown(["method", "FashionMNIST, MNIST", "CIFAR-10, SVHN"],
                  [*([name, f"{a:.2f}", f"{b:.2f}"] for name, a, b in PUBLISHED), *ours]), ""]


def page(folder):
    """The text of detection.md from the JSON files under `folder`/detection; parts without files are left out."""
    found = read(folder / "detection")
    firsts = [runs[0] for kind in ("named", "without") for runs in found[kind].values()]
    return "\n".join([
        "# Detecting outliers: every score, every set", "",
        "Written by `python -m vae_ood.detection` from the files in [detection/](detection); a test fails where they "
        "disagree.", "", *at_a_glance(found),
        *(line for data in (*OUTLIERS, TILES) if data in found["named"]
          for line in section(data, found["named"][data])),
        *left_out(found), *others(found), *published(found),
        "## Commands", "", "Those of the first run of each kind; paths are relative to `--data-root`, and `runs` is "
        "`--runs`.", "", "```", *(command for run in firsts for command in run["commands"]), "```", ""])
