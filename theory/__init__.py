"""Numerical verification of the paper's theory. Each module is a command that exits 0 when every prediction holds, 1
when one fails, 2 on a user's mistake."""

import json
import sys
from pathlib import Path

from vae_ood import plots
from vae_ood.cli import Parser, make_folder


class Report:
    """A table of prediction, measurement and verdict; with a folder, also NAME.json and NAME.png there."""

    def __init__(self, name):
        self.name, self.rows = name, []

    def check(self, prediction, measurement, holds):
        """Add a row; `holds` is whether the measurement bears the prediction out."""
        self.rows.append({"prediction": prediction, "measurement": measurement, "holds": bool(holds)})
        print(f"{'holds ' if holds else 'FAILS '} {prediction}\n       measured: {measurement}", flush=True)

    def finish(self, out, numbers, draw):
        """Write the table, `numbers` (plain values) and the figure that `draw` returns, unless out is None; exit."""
        held = sum(row["holds"] for row in self.rows)
        print(f"{held} of {len(self.rows)} predictions hold")
        if out:
            path = Path(out) / f"{self.name}.json"
            path.write_text(json.dumps({"rows": self.rows, **numbers}, indent=1) + "\n")
            if plots.available():
                draw().savefig(path.with_suffix(".png"), dpi=120)
            else:
                print("no figure: pip install matplotlib")
            print(f"written to {out}")
        sys.exit(0 if held == len(self.rows) else 1)


def parse(description, quick):
    """The arguments of a theory command: --out, a folder that is made at once, and --quick, which `quick` describes."""
    parser = Parser(description=description)
    parser.add_argument("--out", metavar="DIR", help="write the figures and numbers there")
    parser.add_argument("--quick", action="store_true", help=quick)
    args = parser.parse_args()
    if args.out:
        make_folder(Path(args.out))
    return args
