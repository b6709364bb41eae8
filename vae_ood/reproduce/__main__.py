"""The paper's tables and figures, ours beside theirs.

    python -m vae_ood.reproduce table1 --iters 2800 --data-root DIR   FashionMNIST in some 45 minutes on two cores
    python -m vae_ood.reproduce table2 --recipe paper                 the paper's protocol; its cost is printed first
    python -m vae_ood.reproduce path --runs results/paper             the paper's protocol along its steps
    python -m vae_ood.reproduce claims                                results/README.md, from the JSON files beside it

Every number but those of `unknowns` comes from run.py or eval.py, and the JSON file names a command that repeats it; a
run that is there already, under --runs, is used, and one that was interrupted goes on. --budget leaves out the runs
that it does not reach; the same command again spends as much on what is left.

Written to --out: NAME.md, NAME.json and NAME.png. bpd is that of 8-bit data, 3.9944 more than in the paper's
convention. Claims are judged by the code: held, not held, or not reached where the training that they need was not run.
"""

import argparse
import math
import signal
from pathlib import Path

from vae_ood import UserError
from vae_ood.cli import Parser, make_folder, one_line_errors, positive_int
from vae_ood.reproduce import claims
from vae_ood.reproduce.compute import compute, select
from vae_ood.reproduce.early import early
from vae_ood.reproduce.latents import fig4, homotopy
from vae_ood.reproduce.path import path
from vae_ood.reproduce.runs import STEPS
from vae_ood.reproduce.seen import seen
from vae_ood.reproduce.tables import table1, table2
from vae_ood.reproduce.unknowns import unknowns

TARGETS = {function.__name__: function for function in (
    table1, table2, fig4, homotopy, select, compute, path, early, seen, unknowns)}

ALONE = "path", "early", "seen", "unknowns"  # which train what they say, or nothing


def minutes(text):
    """argparse type: a finite number of minutes, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value


def refuse(args, parser):
    """UserError where a flag is given that the target does not take."""
    given = {"--seeds": args.seeds != 1, "--recipe": args.recipe != "fast", "--budget": args.budget,
             "--iters": args.iters and args.target != "unknowns"}
    if args.target in ALONE and (flags := [flag for flag, value in given.items() if value]):
        parser.error(f"{args.target} does not take {flags[0]}: of these flags --budget 0 alone, which trains nothing"
                     + (", and --iters" if args.target == "unknowns" else ""))


def main():
    """The command."""
    parser = Parser(prog="python -m vae_ood.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "claims"])
    parser.add_argument("--budget", type=minutes, metavar="MINUTES", help="leave out what cannot be trained and "
                        "evaluated in this time; 0: train nothing, only use the runs that are there")
    parser.add_argument("--iters", type=positive_int, metavar="N", help="training steps of every run (default: the "
                        "recipe's)")
    parser.add_argument("--recipe", choices=STEPS, default="fast", help="that of run.py (default fast)")
    parser.add_argument("--seeds", type=positive_int, default=1, metavar="N", help="seeds 0 to N - 1 (default 1)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are kept (default runs)")
    parser.add_argument("--out", default="runs/reproduce", metavar="DIR", help="default runs/reproduce")
    parser.add_argument("--data-root", metavar="DIR", help="that of run.py")
    args = parser.parse_args()
    if args.target == "claims":
        if args != parser.parse_args(["claims"]):
            parser.error("claims takes no flags: it writes results/README.md from the JSON files beside it")
        claims.write()
        return
    refuse(args, parser)
    args.failed = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run in progress saves its state
    for folder in (args.out, args.runs):
        make_folder(Path(folder))
    TARGETS[args.target](args)
    if args.failed:
        raise UserError(f"left out, their commands failed (see above): {', '.join(args.failed)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
