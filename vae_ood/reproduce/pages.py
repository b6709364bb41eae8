"""How a target writes what it found: NAME.md, NAME.json and NAME.png."""

import json
import math
import shlex
import statistics
from pathlib import Path

import torch

from vae_ood import checkpoint, plots

INTERVAL = "95% interval by Student's t, over seeds, where there are at least three; else the mean"
STUDENT_T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by the number of seeds
HELD = {True: "held", False: "NOT held", None: "not reached"}


def cell(values, digits):
    """The mean; with three seeds or more, plus or minus a 95% confidence interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 3:
        return f"{mean:.{digits}f}"
    freedom = len(values) - 1
    t = STUDENT_T.get(len(values), 1.96 + 2.372 / freedom + 2.82 / freedom**2)
    return f"{mean:.{digits}f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def images_line(measurements):
    """How many images of each set were evaluated, and what there is to say of the whole sets."""
    sets = {}
    for name, row in (pair for m in measurements for pair in m["sets"].items()):
        sets.setdefault(name, []).append(f"{row['n']:,}" + "".join(f" ({note})" for note in row["notes"]))
    return "Images evaluated: " + (", ".join(
        f"{name} {' or '.join(dict.fromkeys(values))}" for name, values in sets.items()) or "none") + "."


def listed(claims):
    """The lines of a list of checks, as a JSON file has them."""
    return [f"- {HELD[check['held']]}: {check['claim']} ({check['figures']})" for check in claims]


def save(name, head, numbers, lines, claims, measurements, args):
    """NAME.json, and NAME.md, which is printed; NAME.png is removed. Claims: [(claim, whether it held, figures)], where
    None is "not reached"; they and the numbers follow from the `measurements`."""
    words = ["python", "-m", "vae_ood.reproduce", name]
    for flag, default in (("budget", None), ("iters", None), ("seeds", 1), ("recipe", "fast"), ("runs", "runs")):
        if (value := getattr(args, flag)) != default:
            words += [f"--{flag}", f"{value:g}" if flag == "budget" else str(value)]
    command = shlex.join(words)
    images = images_line(measurements)
    numbers = {"command": command, "images": images} | numbers | {"claims": [
        dict(zip(("claim", "held", "figures"), claim, strict=True)) for claim in claims]}
    lines = [f"# {head}", "", images, "", *lines, "", *listed(numbers["claims"]), "",
             f"`{command}`; torch {torch.__version__}.", ""]
    Path(args.out, f"{name}.png").unlink(missing_ok=True)
    checkpoint.write_atomic(Path(args.out, f"{name}.json"), (json.dumps(numbers, indent=1) + "\n").encode())
    checkpoint.write_atomic(Path(args.out, f"{name}.md"), "\n".join(lines).encode())
    print("\n".join(lines))


def figure(name, args, rows, columns, draw):
    """NAME.png in --out, with rows x columns axes that `draw` fills."""
    if not plots.available():
        print("no figure: pip install matplotlib")
        return
    from matplotlib.figure import Figure
    sheet = Figure(figsize=(5.5 * columns, 4 * rows), dpi=110, layout="constrained")
    draw(sheet.subplots(rows, columns, squeeze=False))
    sheet.savefig(Path(args.out, f"{name}.png"))
    print(f"written to {Path(args.out, name)}.png")


def name_axis(axes, label, values):
    """A logarithmic x axis that names these values alone, and the legend."""
    axes.set(xscale="log", xlabel=label)
    axes.set_xticks(list(values), [f"{value:g}" for value in values], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, ncols=1 + (len(axes.get_lines()) > 4))
