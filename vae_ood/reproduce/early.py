"""CIFAR-10 stopped early: trained on 45,000 images, and evaluated at the step of the best bpd of the 5,000 others."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vae_ood import UserError
from vae_ood.data import PAIRS, default_root
from vae_ood.data.official import cifar10_records
from vae_ood.plots import markdown
from vae_ood.reproduce import pages, runs
from vae_ood.reproduce.compute import CELEBA, ORDERS, QUANTITIES, SVHN, frame, order, shown, signed
from vae_ood.reproduce.paper import BELOW
from vae_ood.reproduce.path import DRAWN, at_step
from vae_ood.reproduce.runs import SHAPES

ITERS = {0.25: 40_000, 0.5: 40_000, 1: 40_000, 2: 10_000}  # by alpha
KEPT = 2_500, 5_000, 7_500, 10_000, 12_500, 15_000, 20_000, 25_000, 30_000, 40_000  # steps that may be chosen
VALIDATION = 5_000  # of the training images, the last ones


def early(args):
    """Does P2's order appear where each alpha's training is stopped when validation says so?"""
    kept = {alpha: [step for step in KEPT if step <= iters] for alpha, iters in ITERS.items()}
    places = {alpha: Path(args.runs, f"early_cifar10_a{alpha:g}_k32_s0") for alpha in ITERS}
    left = [alpha for alpha, run in places.items() if args.budget != 0 and not fully(run, kept[alpha])]
    curves = {}
    with cut(args, -VALIDATION, left) as root:
        for alpha, run in places.items():
            settings = {"alpha": alpha, "kappa": 32, "seed": 0, "iters": ITERS[alpha]}
            if alpha in left:
                runs.execute(command(settings, kept[alpha], run), root)
            outliers = [*PAIRS["cifar10"], str(Path(root, "validation.npy"))] if root else ()
            if curve := measured_at("early", run, kept[alpha], settings, args, root, outliers):
                curves[alpha] = curve
    chosen = {alpha: min(curve, key=validation_bpd) for alpha, curve in curves.items()
              if len(curve) == len(kept[alpha])}
    rows = [[f"{alpha:g}", f"{m['step']:,} of {ITERS[alpha]:,}", f"{validation_bpd(m):.3f}",
             *shown(m, DRAWN), m["precision"]] for alpha, m in chosen.items()]
    every = [m for curve in curves.values() for m in curve]
    pages.save(
        "early", "Stopped early: CIFAR-10, kappa = 32, each alpha at its step of the best validation bpd",
        {"chosen": {f"{alpha:g}": m["step"] for alpha, m in chosen.items()}, "runs": every},
        ["gamma in closed form, Adam at 1e-4, batches of 64, trained on the first 45,000 training images; the last "
         f"5,000, the validation images, choose among the steps {', '.join(f'{step:,}' for step in KEPT)}. One seed. "
         "Learned at that rate, gamma would take some 45,000 steps to come down. bpd: of 8-bit data, from the negative "
         "ELBO. Outliers are the positive class. Trained in the precision that is named.", "",
         *markdown(["alpha", "step", "validation bpd", *DRAWN, "trained in"], rows)], checks(chosen), every, args)
    if curves:
        pages.figure("early", args, 1, 3, lambda axes: draw(axes[0], curves, chosen))


def checks(chosen):
    """[(claim, whether it held, figures)] of {alpha: what its chosen step measured}."""
    when = "where validation is best, at"
    return [*(order(name, {alpha: QUANTITIES[name](m) for alpha, m in chosen.items()}, "where validation is best",
                    ITERS) for name in ORDERS),
            signed(SVHN, chosen, BELOW, -1, when), signed(CELEBA, chosen, tuple(ITERS), 1, when)]


def draw(axes, curves, chosen):
    """Test and train bpd, and the outliers' less the test images', over the steps: a line an alpha, with a star at the
    chosen step."""
    titles = {"test and train bpd": "test bpd", SVHN: None, CELEBA: None}
    for one, (title, name) in zip(axes, titles.items(), strict=True):
        for i, (alpha, curve) in enumerate(curves.items()):
            value, steps = QUANTITIES[name or title], [m["step"] for m in curve]
            one.plot(steps, list(map(value, curve)), "o-", color=f"C{i}", markersize=4, label=f"$\\alpha$ = {alpha:g}")
            if alpha in chosen:
                one.plot(chosen[alpha]["step"], value(chosen[alpha]), "*", color=f"C{i}", markersize=14,
                         markeredgecolor="black")
            if name:
                one.plot(steps, [DRAWN["train bpd"](m) for m in curve], "--", color=f"C{i}")
        frame(one, title, xlabel="training steps", ylabel=title)
        one.set_xticks(KEPT, [f"{step:,}" if step in (2_500, 5_000, 10_000, 20_000, 40_000) else "" for step in KEPT])
        one.minorticks_off()
    axes[0].plot([], [], "k--", label="train")
    axes[0].plot([], [], "k*", markersize=10, label="best validation bpd")
    axes[0].legend(frameon=False)


@contextmanager
def cut(args, end, wanted):
    """A data root for the time being, where it is `wanted`, else None: with CIFAR-10's training images up to `end`
    alone, the others being its validation.npy. Raises UserError unless all 50,000 are there."""
    if not wanted:
        yield None
        return
    whole = Path(args.data_root or default_root()).absolute()
    train, test = (cifar10_records(whole / "cifar10", part)[0] for part in ("train", "test"))
    if len(train) != 50_000:
        raise UserError(f"{whole / 'cifar10'} holds {len(train):,} of the 50,000 training images: add the others")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "cifar10").mkdir()
        for name in PAIRS["cifar10"]:
            (root / name).symlink_to(whole / name)
        np.save(root / "validation.npy", train[end:, 1:].reshape(-1, *SHAPES["cifar10"]))
        files = {f"data_batch_{i + 1}": train[:end][10_000 * i:][:10_000] for i in range(5)} | {"test_batch": test}
        for name, records in files.items():
            if len(records):
                (root / "cifar10" / f"{name}.bin").write_bytes(records.tobytes())
        yield folder


def fully(run, kept):
    """Whether each step that a run was to keep has been evaluated."""
    return all((run / f"at-{step}" / "metrics.json").exists() for step in kept)


def measured_at(target, run, kept, settings, args, root, outliers=PAIRS["cifar10"]):
    """What a target's run measured at the steps that it kept, evaluating them where need be and a data root is given.
    What is named by the path of its file is named by the file."""
    found = []
    for step in kept:
        if (run / f"at-{step}" / "metrics.json").exists() or (root and (run / f"step-{step}.pt").exists()):
            m = at_step(run, step, settings, args, outliers, root)
            for key in ("sets", "detection"):
                m[key] = {Path(name).stem: row for name, row in m[key].items()}
            found.append(m | {"command": f"python -m vae_ood.reproduce {target}"})  # that of eval.py has a passing path
    return found


def command(settings, kept, run):
    """The arguments of python, without --data-root."""
    return ["run.py", "--data", "cifar10", "--alpha", f"{settings['alpha']:g}", "--kappa", "32", "--recipe", "paper",
            "--gamma", "optimal", "--iters", str(settings["iters"]), "--precision",
            "float32" if settings["alpha"] < 0.5 else "bfloat16", "--keep-at", *map(str, kept), "--no-eval", "--resume",
            "--out", str(run)]


def validation_bpd(m):
    """By which a step is chosen."""
    return m["sets"]["validation"]["bpd"]
