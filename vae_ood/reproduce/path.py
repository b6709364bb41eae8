"""CIFAR-10 along a training: the weights that `run.py --keep-at` kept under --runs, evaluated, against the steps."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

from vae_ood.data import PAIRS
from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.compute import CELEBA, ORDERS, QUANTITIES, SVHN, THEIRS, frame, order, shown, signed
from vae_ood.reproduce.paper import ABOVE, ALPHAS, BELOW, PAPER
from vae_ood.reproduce.runs import IMAGES, IW_SAMPLES, STEPS
from vae_ood.reproduce.tables import gap, judged

DRAWN = {"train bpd": lambda m: m["sets"]["train"]["bpd"]} | QUANTITIES
PROTOCOL = {"data": "cifar10", "kappa": 32, "gamma": "learn", "schedule": "constant", "lr": 1e-4, "batch_size": 64,
            "iters": STEPS["paper"], "seed": 0}  # of the runs that are read
NO_GAP = 0.01  # bpd; the paper's test images take 0.002 to 0.005 less than its training images
ENOUGH = 50_000  # steps, before which gamma is on its way down and no order along the training is judged


def path(args):
    """The paper's own protocol, step by step: bpd, gamma and AUROC of CIFAR-10, SVHN and CelebA."""
    every = []
    for config in sorted(Path(args.runs).glob("*/config.json")):
        settings = json.loads(config.read_text())
        kept = {int(re.search(r"\d+", file.stem)[0]) for name in ("step-*.pt", "at-*") for file in config.parent.glob(
            name)}
        if all(settings.get(key) == value for key, value in PROTOCOL.items()) and settings["alpha"] in ALPHAS:
            every += [m for step in sorted(kept) if (m := at_step(config.parent, step, settings, args))]
    every.sort(key=lambda m: (m["alpha"], m["step"]))
    curves = {}
    for m in every:
        curves.setdefault(m["alpha"], []).append(m)
    rows = [[f"{m['alpha']:g}", f"{m['step']:,}", *shown(m, DRAWN), str(m["active_dims"]), m["precision"]]
            for m in every]
    pages.save(
        "path", "BPD, gamma and AUROC along the paper's training: CIFAR-10, kappa = 32", {"runs": every},
        ["gamma learned, Adam at 1e-4, batches of 64, up to 200,000 steps on all 50,000 training images, one seed; the "
         "layers are this repository's. bpd: of 8-bit data, from the negative ELBO. Outliers are the positive class. "
         "Trained in the precision that is named, at the commit that the run's folder names; the JSON has it.", "",
         *markdown(["alpha", "step", *DRAWN, "active", "trained in"], rows)], checks(curves), every, args)
    if every:
        pages.figure("path", args, 2, 3, lambda axes: draw(axes, curves))


def at_step(run, step, settings, args, outliers=PAIRS["cifar10"], data_root=None):
    """What the weights measure that a run kept at a step, evaluating them if need be; None where that is left out."""
    out = run / f"at-{step}"
    command = ["eval.py", "--ckpt", str(run / f"step-{step}.pt"), "--outliers", *outliers, "--iw-samples",
               str(IW_SAMPLES), "--max-images", str(IMAGES), "--scores", "nll", "--out", str(out)]
    if not (out / "metrics.json").exists():
        if args.budget == 0:
            return None
        runs.execute(command, data_root or args.data_root)
    metrics = json.loads((out / "metrics.json").read_text())
    commit = run / "commit"
    return {"command": f"python {shlex.join(command)}", "step": step, "precision": metrics["config"]["precision"],
            "commit": commit.read_text().strip() if commit.exists() else None,
            **{key: settings[key] for key in ("alpha", "kappa", "seed", "iters")}, **runs.figures(metrics)}


def checks(curves):
    """[(claim, whether it held, figures)] of {alpha: [what each kept step measured]}. One that fails at some alpha
    fails; one that holds is not reached until all of the alphas that it names are, or all of the paper's."""
    last = {alpha: curve[-1] for alpha, curve in curves.items() if curve[-1]["step"] == STEPS["paper"]}
    gaps = {alpha: QUANTITIES["test minus train (bpd)"](m) for alpha, m in sorted(last.items())}
    found = [signed(name, last, alphas, sign, "after 200,000 steps at") for name, alphas, sign in (
        (SVHN, BELOW, -1), (SVHN, ABOVE, 1), (CELEBA, ALPHAS, 1))]
    found.append((f"test bpd is within {NO_GAP} of the training bpd after 200,000 steps",
                  judged(all(abs(value) <= NO_GAP for value in gaps.values()), len(gaps), len(ALPHAS)),
                  ", ".join(f"{alpha:g}: {value:+.3f}" for alpha, value in gaps.items())))
    found += [order(name, {alpha: QUANTITIES[name](m) for alpha, m in sorted(last.items())}, "after 200,000 steps")
              for name in ORDERS]
    for name, sign, word in (("test bpd", -1, "falls"), (SVHN, 1, "rises")):
        values = {alpha: [QUANTITIES[name](m) for m in curve if m["step"] >= ENOUGH]
                  for alpha, curve in curves.items() if curve[-1]["step"] >= ENOUGH}
        pairs = [(a, b) for curve in values.values() for a, b in pairwise(curve)]
        found.append((f"{name} {word} with the steps at each alpha, from {ENOUGH:,} on",
                      judged(all(sign * (b - a) > 0 for a, b in pairs), len(last) if pairs else 0, len(ALPHAS)),
                      "; ".join(f"{alpha:g}: {', '.join(f'{v:.4g}' for v in curve)}"
                                for alpha, curve in values.items())))
    return found


def draw(axes, curves):
    """One line a run over the steps, dashed where training images stand for the test images, and the paper's figure as
    a cross at 200,000."""
    dashed = {"test bpd": DRAWN["train bpd"], SVHN: lambda m: gap(m, "svhn", "train"),
              CELEBA: lambda m: gap(m, "celeba", "train")}
    panels = [name for name in QUANTITIES if name != "test minus train (bpd)"]
    for one, name in zip(axes.flat, panels, strict=True):
        for i, (alpha, curve) in enumerate(curves.items()):
            steps = [m["step"] for m in curve]
            one.plot(steps, [QUANTITIES[name](m) for m in curve], "o-", color=f"C{i}", markersize=4,
                     label=f"$\\alpha$ = {alpha:g}")
            if name in dashed:
                one.plot(steps, [dashed[name](m) for m in curve], "--", color=f"C{i}")
            if name in THEIRS:
                one.plot(STEPS["paper"], THEIRS[name](PAPER["table2"][alpha]), "x", color=f"C{i}", markersize=9)
        frame(one, name, xlabel="training steps", ylabel=name, yscale="log" if name == "gamma" else "linear")
    first, finals = axes.flat[0], [m for curve in curves.values() for m in curve if m["step"] == STEPS["paper"]]
    if finals:  # else the first steps leave no room for what matters
        first.set(ylim=(None, max(m["sets"]["test"]["bpd"] for m in finals) + 0.4))
    first.plot([], [], "k--", label="train for test")
    first.plot([], [], "kx", label="the paper")
    first.legend(frameon=False)
