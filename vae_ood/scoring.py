"""Score own images with a detector, however many: rows as they come, then what a person decides with.

Writes scores.csv, outliers.png and report.html. Only what these show of single images is kept in memory.
"""

import csv
import json
import math
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import RANK, Progress, duration, make_folder, printable
from vae_ood.data.groups import things_needed
from vae_ood.data.images import Images
from vae_ood.data.own import open_own
from vae_ood.detector import COMPARED
from vae_ood.metrics import benjamini_hochberg, confident_rank, cross_bound, false_alarm_range
from vae_ood.parallel import agree, from_first

BLOCK, BLOCK_BYTES = 4_000, 2**27  # images, and bytes of pixels at most, that are read and scored at once
SET = 5  # things at least, of which is said whether as a set they look like the training data
PRINTED, FIGURE, PAGE = 10, 16, 200  # the most outlying images that are listed, in outliers.png and in report.html


def folder_of_scores(out, source, named):
    """The folder `out` for the scores of the images in `source`, made; where it holds those of other images, the next
    with a number, or UserError if the user has `named` it."""
    number, folder = 1, out

    def of_others():
        record = folder / "score.json"
        return (folder / "scores.csv").exists() and not (
            record.exists() and json.loads(record.read_text()).get("score") == source)
    while of_others():
        if named:
            raise UserError(f"{out} holds the results of other images: give another --out")
        number += 1
        folder = out.with_name(f"{out.name}-{number}")
    make_folder(folder)
    checkpoint.write_atomic(folder / "score.json", (json.dumps({"score": source}) + "\n").encode())
    return folder


def largest_rank(args, things, folds):
    """k, so that the false-alarm rate that is asked for is kept where p <= k / (things + 1); UserError where there is
    none."""
    more = "a larger --max-images" if args.max_images else "a run with a smaller --fpr" + (
        "" if folds > 1 else ", or one with --folds, by which all things calibrate")
    if args.confidence is None:
        if k := int(args.fpr * (things + 1) + 1e-9):
            return k
        raise UserError(f"--fpr {args.fpr:g} needs {things_needed(args.fpr):,} things to calibrate with, and there are "
                        f"{things:,}: give --fpr {math.ceil(1e4 / (things + 1)) / 1e4:g} or more, or {more}")
    if k := confident_rank(things, args.fpr, args.confidence):
        return k
    possible = 1 - (1 - args.confidence) ** (1 / things)
    needed = math.ceil(math.log(1 - args.confidence) / math.log1p(-args.fpr))
    raise UserError(f"--fpr {args.fpr:g} with confidence {args.confidence:g} needs {needed:,} things to calibrate "
                    f"with, and there are {things:,}: give --fpr {math.ceil(1e4 * possible) / 1e4:g} or more, or "
                    f"{more}")


def blocks(source, shape, crop=None):
    """All images of what `open_own` gave, by `convert`, in blocks of `Images`; one is read while the last is scored."""
    size = max(1, min(BLOCK, BLOCK_BYTES // math.prod(shape)))
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(source.read, slice(0, size), shape, crop)
        for start in range(size, len(source) + size, size):
            images = coming.result()
            if start < len(source):
                coming = reader.submit(source.read, slice(start, start + size), shape, crop)
            if len(images.pixels):
                yield images


class Scored:
    """What is kept of the images that were scored: of all the p-values and scores, of the most and the least outlying
    ones their rows, of at most COMPARED, drawn from all, their pixels, their distance to the training images and
    what sets are compared by."""

    def __init__(self, detector, score, limit, number):
        """limit: the p-value up to which an image is flagged, or None where all are needed to say; `number` of images
        that will be scored."""
        self.detector, self.score, self.limit = detector, score, limit
        self.chosen = np.sort(np.random.default_rng(0).permutation(number)[:COMPARED])
        self.p, self.distance, self.views, self.pixels, self.files = [], [], [], [], []
        self.n = self.copies = self.known = 0
        self.known_p, self.most, self.least = [], [], []

    def add(self, images):
        """Score `Images`, the next ones: the columns of their rows in scores.csv."""
        seen = self.detector.look(images, self.n, self.score)
        names, value = images.files or range(self.n, self.n + len(images.pixels)), seen.scores[self.score]
        flagged = [""] * len(value) if self.limit is None else (seen.p_value <= self.limit).astype(int).tolist()
        self._keep(images, seen, names, value)
        self.p.append(seen.p_value)
        self.copies, self.known = self.copies + int(seen.copies.sum()), self.known + int(seen.known.sum())
        self.known_p.append(seen.p_value[seen.known])
        some = self.chosen[(self.chosen >= self.n) & (self.chosen < self.n + len(value))] - self.n
        self.distance.append(seen.distance[some])
        self.views.append([None if view is None else view[some] for view in seen.views])
        self.pixels.append(images.pixels[torch.from_numpy(some)])
        self.files += [names[i] for i in some] if images.files else []
        self.n += len(value)
        return {"file" if images.files else "index": names} | {
            name: values.tolist() for name, values in seen.scores.items()} | {
            "p_value": seen.p_value.tolist(), "outlier": flagged, "likeness": (1 - seen.distance).tolist(),
            "known": seen.known.astype(int).tolist()} | {
            f"p_{name}": values.tolist() for name, values in seen.components.items()}

    def _keep(self, images, seen, names, value):
        order = np.lexsort((-value, seen.p_value))

        def rows(which):
            return [row | {"name": str(names[i]), "index": self.n + i} for i, row in zip(
                which, self.detector.rows(images, seen, which, self.score), strict=True)]

        def outlying(row):
            return row["p_value"], -row["score"]
        self.most = sorted(self.most + rows(order[:PAGE]), key=outlying)[:PAGE]
        self.least = sorted(self.least + rows(order[-FIGURE:]), key=outlying)[-FIGURE:]

    def sample(self):
        """(`Images`, distance [N], views [N, D] of each member or []) of those whose pixels are kept."""
        views = [] if self.views[0][0] is None else [np.concatenate(parts) for parts in zip(*self.views, strict=True)]
        return Images("some", torch.cat(self.pixels), files=self.files or None), np.concatenate(self.distance), views


def score_images(detector, args, out):
    """Flag the outliers among the images of --score at --fpr or --fdr; `out` is the folder's name, made here."""
    path, config = Path(args.score).resolve(), detector.config
    score = args.scores[0] if args.scores else detector.scores[0]
    if not path.exists():
        raise UserError(f"--score {args.score}: there is no such folder or file")
    source = open_own(path, config["skip_bad"] or args.skip_bad, config.get("range"))
    rank = None if args.fdr else largest_rank(args, detector.things, len(detector.members))
    limit = None if args.fdr else (args.fpr if args.confidence is None else rank / (detector.things + 1)) + 1e-9
    out = Path(from_first(lambda: str(folder_of_scores(out, str(path), args.out))))
    if str(path) == config["data"]:
        print("note: the model was trained on these images; the false-alarm rate holds for new ones only")
    agree({}, [config["images_crc32"], score, args.fpr, args.fdr, args.confidence, len(source),
               zlib.crc32(repr(source.files).encode())])
    scored = write_rows(source, Scored(detector, score, limit, len(source)), out)
    for note in source.notes(config["shape"]):
        print(f"{source.name}: {note}")
    if not scored.n:
        raise UserError(f"not one of the {len(source):,} pictures in {path} can be decoded")
    if RANK == 0:
        finish(scored, rank, args, out, path.name)


def write_rows(source, scored, out):
    """Score all images of the source, `Scored`, and write scores.csv, at first as scores.part.csv row by row, which is
    kept where that ends early."""
    part, begun, bar = out / "scores.part.csv", time.monotonic(), Progress(len(source), label="image")
    config, written, end = scored.detector.config, 0, 0  # images whose rows are whole, and where these end

    def kept():
        return f"the rows of {written:,} of {len(source):,} images are in {part}"
    try:
        with open(part if RANK == 0 else os.devnull, "w", newline="", encoding="utf-8",
                  errors="surrogateescape") as file:  # names of any bytes
            writer = csv.writer(file, lineterminator="\n")
            try:
                for images in blocks(source, config["shape"], config.get("crop")):
                    agree({"score": images}, [])
                    columns = scored.add(images)
                    if not written:
                        writer.writerow(columns)
                    writer.writerows(zip(*columns.values(), strict=True))
                    end, written = file.tell(), scored.n
                    seconds = time.monotonic() - begun
                    left = duration(seconds / written * (len(source) - written))
                    bar.update(written, f"{written / seconds:,.0f} images/s, {left} left")
            finally:
                if RANK == 0:
                    file.truncate(end)
    except UserError as error:
        raise UserError(f"{error}; {kept()}" if written else str(error)) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept()) from None
    finally:
        bar.close()
    return scored


def finish(scored, rank, args, out, name):
    """Write what a person decides with, and print the most outlying images and what the flags are worth."""
    p, detector = np.concatenate(scored.p), scored.detector
    if args.fdr:
        flagged = benjamini_hochberg(p, args.fdr)
        scored.limit = p[flagged].max() if flagged.any() else 0.0
        fill_outliers(out / "scores.part.csv", scored.limit)
    os.replace(out / "scores.part.csv", out / "scores.csv")
    most = [row | {"outlier": row["p_value"] <= scored.limit} for row in scored.most]
    print(f"\n{'image':<40}{scored.score:>19}{'p-value':>10}")
    for row in most[:PRINTED]:
        print(f"{printable(row['name'])[-39:]:<40}{row['score']:>12.1f}{'':7}{row['p_value']:>10.4f}"
              f"{'  outlier' if row['outlier'] else '':9}  {row['speaks']}".rstrip())
    lines = [*said_of_the_set(scored, p), *said_of_the_flags(scored, p, rank, args)]
    print(*lines, sep="\n")
    detector.reconstructed(most)
    shown = {row["index"] for row in most[:FIGURE]}
    title = f"{name}: {scored.score}, calibrated on {detector.things:,} things"
    written = ["scores.csv"]
    if plots.available():
        least = [row for row in scored.least if row["index"] not in shown]
        plots.drawn(plots.outliers, out / "outliers.png", most[:FIGURE], least, title)
        written.append("outliers.png")
    else:
        print("no figure: pip install matplotlib")
    try:
        plots.report(out / "report.html", most, title, lines)
        written.append("report.html")
    except UserError as error:
        print(error)
    print(f"written to {out}: {', '.join(written)}")


def fill_outliers(path, limit):
    """Write the column `outlier` of a table of scores: whether the p-value is up to the limit."""
    filled = path.with_suffix(".filled")
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with open(path, **options) as old, open(filled, "w", **options) as new:
        reader, writer = csv.reader(old), csv.writer(new, lineterminator="\n")
        writer.writerow(head := next(reader))
        for row in reader:
            row[head.index("outlier")] = int(float(row[head.index("p_value")]) <= limit)
            writer.writerow(row)
    os.replace(filled, path)


def said_of_the_set(scored, p):
    """What there is to say of all the images together, in lines."""
    lines, detector, known = [], scored.detector, np.concatenate(scored.known_p)
    if len(known):
        lines.append(f"{len(known):,} of {len(p):,} images show what training images show ({scored.copies:,} are "
                     f"copies), {(known <= scored.limit).sum():,} of them flagged: the rate is that of new things")
    images, distance, views = scored.sample()
    groups = detector.groups(images)
    if detector.farther(groups, distance) < 0.01:
        lines.append("these images lie farther from the training images than those that calibrate did: unless they are "
                     "outliers, they are of another kind, and the false-alarm rate is not assured for them")
    if views and len(np.unique(groups)) >= SET:
        p_set = detector.p_of_set(groups, views)
        lines.append(f"as a set, these {len(p):,} images {'do not ' * (p_set < 0.05)}look like the training data: p = "
                     f"{p_set:.3f} (a permutation test of {len(groups):,} of them)")
    return lines


def said_of_the_flags(scored, p, rank, args):
    """How many are flagged, and what that is worth, in lines."""
    things, folds, flagged = scored.detector.things, len(scored.detector.members), int((p <= scored.limit).sum())
    if args.fdr:
        least = math.ceil(len(p) / (args.fdr * (things + 1)) - 1e-9)
        lines = [f"{flagged:,} of {len(p):,} images flagged, of which at most {args.fdr:.1%} are ordinary, on average "
                 f"(calibrated on {things:,} things)"]
        if not flagged and least > 1:
            lines.append(f"at this rate {least:,} images must score above all that calibrate before one is flagged: "
                         "give a larger --fdr, or calibrate on more things")
        return lines
    low, high = false_alarm_range(rank, things)
    sure = f" (the rate is at most {args.fpr:g} with confidence {args.confidence:g})" if args.confidence else ""
    images = sum(len(member.groups) for member in scored.detector.members)
    lines = [f"{flagged:,} of {len(p):,} images flagged at p <= {scored.limit:.4g}{sure}",
             f"of new things like the training data, at most {scored.limit:.1%} would be on average, between {low:.1%} "
             f"and {high:.1%} for nine calibrations in ten (calibrated on {things:,} things, {images:,} images)"]
    if folds > 1:
        lines.append(f"of {folds} folds that rate is usual; proven, for things of one image, is at most "
                     f"{cross_bound(scored.limit, folds, things):.1%} (arXiv 1905.02928)")
    return lines
