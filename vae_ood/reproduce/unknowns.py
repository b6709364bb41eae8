"""What the paper does not say of its model and its training, varied one factor at a time."""

import json
import re
from argparse import Namespace
from pathlib import Path

from vae_ood import evaluation
from vae_ood.cli import Progress, make_folder, pick_device
from vae_ood.data import PAIRS, load
from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.compute import QUANTITIES, SVHN, shown
from vae_ood.reproduce.runs import BATCH, IMAGES, IW_SAMPLES
from vae_ood.reproduce.tables import judged
from vae_ood.step import Training
from vae_ood.training import CONFIG

ALPHA, KAPPA, ITERS = 0.25, 32, 20_000
VARIED = {  # {name: (the batch, what the VAE's layers are where not this repository's)}
    "as here": (BATCH, {}), "batch 32": (32, {}), "batch 128": (128, {}), "kernel 3": (BATCH, {"kernel": 3}),
    "ReLU throughout": (BATCH, {"slopes": (0.0, 0.0)}), "LeakyReLU throughout": (BATCH, {"slopes": (0.2, 0.2)}),
    "weights N(0, 0.02)": (BATCH, {"std": 0.02})}


def unknowns(args):
    """Batch, kernel, activation and initialisation: does one of them change the sign of SVHN minus test?"""
    every = {name: measured for name in VARIED if (measured := of_variant(name, args))}
    gamma = "in closed form; learned at that rate it would not have come down after these steps"
    pages.save(
        "unknowns", f"What the paper leaves open, varied: CIFAR-10, alpha = {ALPHA:g}, kappa = {KAPPA}",
        {"runs": every},
        [f"{args.iters or ITERS:,} steps of Adam at 1e-4, gamma {gamma}; one seed. As here: batches of {BATCH}, "
         "kernels of 5, LeakyReLU (0.2) in the encoder, ReLU in the decoder, torch's initial weights. Each other row "
         "changes one of these. bpd: of 8-bit data, from the negative ELBO. Outliers are the positive class.", "",
         *markdown(["varied", *QUANTITIES], [[name, *shown(m)] for name, m in every.items()])],
        checks(every), list(every.values()), args)
    if every:
        pages.figure("unknowns", args, 1, 2, lambda axes: draw(axes[0], every))


def checks(every):
    """The check that no variant {name: what it measured} has another sign than ours."""
    gaps = {name: QUANTITIES[SVHN](m) for name, m in every.items()}
    return [(f"{SVHN} is below 0 whichever is varied",
             judged(all(gap < 0 for gap in gaps.values()), len(gaps), len(VARIED)),
             ", ".join(f"{name}: {gap:+.3f}" for name, gap in gaps.items()))]


def draw(axes, every):
    """SVHN minus test, and the test bpd, a dot for each variant."""
    for one, name in zip(axes, (SVHN, "test bpd"), strict=True):
        one.plot([QUANTITIES[name](m) for m in every.values()], list(every), "o")
        one.set(xlabel=name)
    axes[0].axvline(0, color="gray", linestyle=":")


def of_variant(name, args):
    """What a variant measured, training it if need be; None where it is not to be trained."""
    iters, slug = args.iters or ITERS, re.sub("[^a-z0-9.]+", "_", name.lower()).strip("_")
    out = Path(args.runs, f"unknowns_{slug}_i{iters}")
    if not (out / "metrics.json").exists():
        if args.budget == 0:
            print(f"NOT RUN, the budget does not reach it: {name}")
            return None
        train(name, iters, out, args)
    metrics = json.loads((out / "metrics.json").read_text())
    return {"command": f"python -m vae_ood.reproduce unknowns --iters {iters}", "alpha": ALPHA, "kappa": KAPPA,
            "seed": 0, "iters": iters, **runs.figures(metrics)}


def train(name, iters, out, args):
    """Train a variant and write its evaluation to `out`."""
    batch, layers = VARIED[name]
    settings = Namespace(
        data="cifar10", sprite_factors=4, skip_bad=False, dequantize=False, alpha=ALPHA, kappa=KAPPA, gamma="optimal",
        schedule="constant", iters=iters, batch_size=batch, lr=1e-4, seed=0, precision="float32", compile=False,
        iw_samples=IW_SAMPLES, max_images=IMAGES, scores=["nll"])
    make_folder(out)
    sets = {part: load("cifar10", part, args.data_root) for part in ("train", "test")}
    sets |= {outlier: load(outlier, "test", args.data_root, (3, 32, 32)).first(IMAGES) for outlier in PAIRS["cifar10"]}
    run, bar = Training(settings, sets["train"].pixels, pick_device("auto"), **layers), Progress(iters, label=name)
    for step in range(iters):
        run.step(step)
        bar.update(step + 1)
    bar.close()
    run.settle_gamma()
    config = {key: getattr(settings, key) for key in CONFIG} | {"shape": [3, 32, 32], "layers": layers}
    evaluation.evaluate(run.model.eval().requires_grad_(False), config, sets, settings, out)
