"""results/detection.md: every score against every outlier set, over seeds, beside the controls, other tools, and
published figures.

    python -m vae_ood.detection --data-root DIR

What was measured is kept in results/detection/, one file a run (pairs.py). A file that is not there is made: by run.py,
where the checkpoint is not there either, and eval.py. With all of them there, the page and its pictures alone are
written, from them and nothing else. After a change of a score, delete those files and the folders detection* of the
runs. The files pyod_* need `pip install pyod`.
"""

import argparse
import json
from pathlib import Path

from vae_ood import checkpoint, plots
from vae_ood.cli import Parser, make_folder, one_line_errors
from vae_ood.detection import contenders, dots, frontier
from vae_ood.detection.pages import class_pairs, named_pairs, page, read
from vae_ood.detection.pairs import kept

RESULTS = Path(__file__).resolve().parents[2] / "results"


def main():
    """The command."""
    parser = Parser(prog="python -m vae_ood.detection", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where the runs are kept (default runs)")
    parser.add_argument("--data-root", metavar="DIR", help="that of run.py")
    args = parser.parse_args()
    make_folder(RESULTS / "detection")
    make_folder(Path(args.runs))
    missing = {path: measure for name, measure in kept().items()
               if not (path := RESULTS / "detection" / f"{name}.json").exists()}
    if any(path.name.startswith("pyod_") for path in missing):
        contenders.methods()  # to be told at once that PyOD is not there
    for path, measure in missing.items():
        checkpoint.write_atomic(path, (json.dumps(measure(args), indent=1) + "\n").encode())
    checkpoint.write_atomic(RESULTS / "detection.md", page(RESULTS).encode())
    if plots.available():
        found = read(RESULTS / "detection")
        dots.versus(RESULTS / "detection.png", [
            (pair.inliers, pair.outliers, pair.mean(pair.best(True)), pair.mean("default"), pair.development)
            for pair in named_pairs(found) + class_pairs(found)], "AUROC of the best control", "AUROC of default")
        if run := frontier.run_of(found["named"]):
            frontier.draw(RESULTS / "frontier.png", run["frontier"])
    print(f"written to {RESULTS / 'detection.md'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
