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
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood import UserError, checkpoint, plots
from vae_ood.cli import RANK, Progress, duration, lock, make_folder, printable
from vae_ood.data.groups import smallest_rate, things_needed
from vae_ood.data.images import Images, at_most
from vae_ood.data.own import open_own
from vae_ood.data.tiles import at_once, picture_shape
from vae_ood.heat import MapFiles, scale_of
from vae_ood.member import COMPARED
from vae_ood.metrics import benjamini_hochberg, confident_rank, cross_bound, false_alarm_range
from vae_ood.parallel import agree, any_worker, from_first, spread

BLOCK = 4_000  # images at most that are read and scored at once
TABLE = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # to open one with names of any bytes
SHOWN, ALIKE = 256, 64  # pixels that are kept of a side of a picture in tiles, to show it and to tell what it shows
PRINTED, FIGURE, LISTED = 10, 18, 200  # the most outlying images that are listed, in outliers.png and in report.html


def folder_of_scores(out, source, named):
    """The folder `out` for the scores of the images in `source`, made; where it holds those of other images, the next
    with a number, or UserError if the user has `named` it."""
    number, folder = 1, out

    def of_others():
        record = folder / "score.json"
        return any((folder / name).exists() for name in ("scores.csv", "scores.part.csv")) and not (
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
                        f"{things:,}: give --fpr {smallest_rate(things):g} or more, or {more}")
    if k := confident_rank(things, args.fpr, args.confidence):
        return k
    possible = 1 - (1 - args.confidence) ** (1 / things)
    needed = math.ceil(math.log(1 - args.confidence) / math.log1p(-args.fpr))
    raise UserError(f"--fpr {args.fpr:g} with confidence {args.confidence:g} needs {needed:,} things to calibrate "
                    f"with, and there are {things:,}: give --fpr {math.ceil(1e4 * possible) / 1e4:g} or more, or "
                    f"{more}")


def blocks(source, config):
    """All images of what `open_own` gave, as a model of the config takes them, in blocks of `Images`; one is read while
    the last is scored."""
    size, shape, crop = min(BLOCK, at_once(config)), picture_shape(config), config.get("crop")
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(source.read, slice(0, size), shape, crop)
        for start in range(size, len(source) + size, size):
            images = coming.result()
            if start < len(source):
                coming = reader.submit(source.read, slice(start, start + size), shape, crop)
            if len(images.pixels):
                yield images


class Scored:
    """What is kept of the images that were scored: of all the p-values, of the most and the least outlying ones their
    rows, and of at most COMPARED, drawn from all, the `sample`."""

    def __init__(self, detector, score, limit):
        """limit: the p-value up to which an image is flagged, or None where all are needed to say."""
        self.detector, self.score, self.limit = detector, score, limit
        self.rng, self.sample = np.random.default_rng(0), None
        self.n = self.copies = 0
        self.p, self.known_p, self.most, self.least = [], [], [], []

    def add(self, images):
        """Score `Images`, the next ones: the columns of their rows in scores.csv."""
        seen = self.detector.look(images, self.n, self.score)
        names, value = images.files or range(self.n, self.n + len(images.pixels)), seen.scores[self.score]
        flagged = [""] * len(value) if self.limit is None else (seen.p_value <= self.limit).astype(int).tolist()
        self._keep(images, seen, names, value)
        self._draw(images, seen)
        self.p.append(seen.p_value)
        self.copies += int(seen.copies.sum())
        self.known_p.append(seen.p_value[seen.known])
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
        self.most = sorted(self.most + rows(order[:LISTED]), key=outlying)[:LISTED]
        self.least = sorted(self.least + rows(order[-FIGURE:]), key=outlying)[-FIGURE:]
        if self.detector.config.get("tile"):
            for row in (row for row in self.most + self.least if "reconstruction" not in row):
                self.detector.reconstructed([row])
                for what in ("image", "reconstruction"):
                    row[what] = at_most(torch.from_numpy(row[what]).permute(2, 0, 1)[None], SHOWN)[0].permute(
                        1, 2, 0).numpy()
                where = torch.from_numpy(row["map"])[None]
                row["map"] = F.adaptive_max_pool2d(where, row["image"].shape[:2])[0].numpy()

    def _draw(self, images, seen):
        """Add these to the sample: each image has a random key, and those of the smallest ones stay."""
        pixels = at_most(images.pixels, ALIKE) if self.detector.config.get("tile") else images.pixels
        new = {"key": self.rng.random(len(pixels)), "pixels": pixels.numpy(), "distance": seen.distance,
               "copies": seen.copies, "files": np.array(images.files or [""] * len(images.pixels), object),
               **{f"view {i}": view for i, view in enumerate(seen.views) if view is not None}}
        if self.sample:
            new = {name: np.concatenate([self.sample[name], values]) for name, values in new.items()}
        stay = np.sort(np.argsort(new["key"], kind="stable")[:COMPARED])
        self.sample = {name: values[stay] for name, values in new.items()}


def score_images(detector, args, out):
    """Flag the outliers among the images of --score at --fpr or --fdr; `out` is the folder's name, made here."""
    path, config = Path(args.score).resolve(), detector.config
    score = args.scores[0] if args.scores else detector.scores[0]
    if not path.exists():
        raise UserError(f"--score {args.score}: there is no such folder or file")
    source = open_own(path, config["skip_bad"] or args.skip_bad, config.get("range"))
    rank = None if args.fdr else largest_rank(args, detector.things, len(detector.members))
    rate = args.fpr if args.fdr or args.confidence is None else rank / (detector.things + 1)
    limit = None if args.fdr else rate + 1e-9
    if str(path) == config["data"]:
        print("note: the model was trained on these images; the false-alarm rate holds for new ones only")
    agree({}, [config["images_crc32"], score, args.fpr, args.fdr, args.confidence, len(source),
               zlib.crc32(repr(source.files).encode())])
    with ExitStack() as held:
        def claim():
            folder = folder_of_scores(out, str(path), args.out)
            try:
                held.enter_context(lock(folder, wait=False))
            except BlockingIOError:
                raise UserError(f"another scoring writes to {folder}: wait for it, or give another --out") from None
            return str(folder)
        folder, scale = Path(from_first(claim)), scale_of(detector.members[0], rate)
        files = args.maps and MapFiles(args.maps, args.maps_format, str(path), scale, config.get("crop"))
        if files:
            from_first(files.claim)
        scored = Scored(detector, score, limit)
        write_rows(source, scored, folder, files)
        for note in source.notes(picture_shape(config)):
            print(f"{source.name}: {note}")
        if not scored.n:
            raise UserError(f"not one of the {len(source):,} pictures in {path} can be decoded")
        if RANK == 0:
            finish(scored, rank, args, folder, path.name, scale)
            if files:
                print(*files.said(), sep="\n")


def next_block(images):
    """The next `Images` of an iterator or None; UserError on all workers where one of them cannot read them."""
    found, failed = None, None
    try:
        found = next(images, None)
    except UserError as error:
        failed = error
    if any_worker(failed is not None)[0]:
        raise failed or UserError("another worker cannot read the images: give all machines the same")
    return found


def write_maps(detector, images, first, files):
    """Write the maps of `Images`, the first of which has the number `first`, made by all workers, to `MapFiles`."""
    maps = spread(lambda part: {"map": detector.members[0].map(images.pixels[part]).numpy()}, len(images.pixels))["map"]
    if RANK == 0:
        files.add(images, maps, first)


def write_rows(source, scored, out, files=None):
    """Score all images of the source, `Scored`, into scores.part.csv, row by row, which is kept where that ends
    early, and their maps into `MapFiles` where there are some. Raises UserError."""
    part, begun, bar = out / "scores.part.csv", time.monotonic(), Progress(len(source), label="image")
    config, written, end = scored.detector.config, 0, 0  # images whose rows are whole, and where these end
    images = blocks(source, config)
    file = open(part if RANK == 0 else os.devnull, "w", **TABLE)  # noqa: SIM115, closed below
    try:
        writer = csv.writer(checkpoint.Lines(file))
        while block := next_block(images):
            agree({"score": block}, [])
            if files:
                write_maps(scored.detector, block, scored.n, files)
            columns = scored.add(block)
            if not written:
                writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
            end, written = file.tell(), scored.n
            seconds = time.monotonic() - begun
            left = duration(seconds / written * (len(source) - written))
            bar.update(written, f"{written / seconds:,.0f} images/s, {left} left")
        file.close()
    except (UserError, KeyboardInterrupt, OSError) as error:
        with suppress(OSError):  # a full disk: what is buffered cannot be written
            file.close()
        if RANK == 0:
            with suppress(OSError):
                os.truncate(part, end)
        kept = f"the rows of {written:,} of {len(source):,} images are in {part}" if written else ""
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        told = error if isinstance(error, UserError) else (
            f"cannot write {part} ({error.strerror}): free some space or choose another --out")
        raise UserError("; ".join(filter(None, (str(told), kept)))) from None
    finally:
        bar.close()


def finish(scored, rank, args, out, title, scale):
    """Write what a person decides with, maps by the `Scale`, and print the most outlying images and what the flags are
    worth."""
    p, detector = np.concatenate(scored.p), scored.detector
    if args.fdr:
        flagged = benjamini_hochberg(p, args.fdr)
        scored.limit = p[flagged].max() if flagged.any() else 0.0
        fill_outliers(out / "scores.part.csv", scored.limit)
    for name in ("outliers.png", "report.html"):  # of an earlier scoring
        (out / name).unlink(missing_ok=True)
    os.replace(out / "scores.part.csv", out / "scores.csv")
    most = [row | {"outlier": row["p_value"] <= scored.limit, "scale": scale} for row in scored.most]
    print(f"\n{'image':<40}{scored.score:>19}{'p-value':>10}")
    for row in most[:PRINTED]:
        print(f"{printable(row['name'])[-39:]:<40}{row['score']:>12.1f}{'':7}{row['p_value']:>10.4f}"
              f"{'  outlier' if row['outlier'] else '':9}  {row['speaks']}".rstrip())
    lines = [*said_of_the_set(scored, p), *said_of_the_flags(scored, p, rank, args), scale.meaning]
    print(*lines, sep="\n")
    detector.reconstructed([row for row in most if "reconstruction" not in row])
    shown = {row["index"] for row in most[:FIGURE]}
    title = f"{title}: {scored.score}, calibrated on {detector.things:,} things"
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
    with open(path, **TABLE) as old, open(filled, "w", **TABLE) as new:
        reader, writer = csv.reader(old), csv.writer(checkpoint.Lines(new))
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
    sample = scored.sample
    files = list(sample["files"]) if sample["files"][0] else None
    groups = detector.groups(Images("some", torch.from_numpy(sample["pixels"]), files=files))
    if detector.farther(groups, sample["distance"]) < 0.01:
        lines.append("these images lie farther from the training images than those that calibrate did: unless they are "
                     "outliers, they are of another kind, and the false-alarm rate is not assured for them")
    views, new = [values for name, values in sample.items() if name.startswith("view")], ~sample["copies"]
    if views and new.any():
        p_set, things = detector.p_of_set(groups[new], [view[new] for view in views], len(new) / len(p))
        lines.append(f"too few things to say whether they are like the training data as a set ({things:,})"
                     if p_set is None else f"as a set, these images {'do not ' * (p_set <= 0.05 + 1e-9)}look like the "
                     f"training data: p = {p_set:.3f} (a permutation test of {things:,} things)")
    return lines


def said_of_the_flags(scored, p, rank, args):
    """How many are flagged, and what that is worth, in lines."""
    things, folds, flagged = scored.detector.things, len(scored.detector.members), int((p <= scored.limit).sum())
    images = sum(len(member.groups) for member in scored.detector.members)
    if args.fdr:
        least = math.ceil(len(p) / (args.fdr * (things + 1)) - 1e-9)
        unproven = "" if folds == 1 and things == images else (
            "; usual, but not proven, for folds or several pictures of a thing")
        lines = [f"{flagged:,} of {len(p):,} images flagged, of which at most {args.fdr:.1%} are ordinary, on average "
                 f"(calibrated on {things:,} things{unproven})"]
        if not flagged and least > 1:
            lines.append(f"at this rate {least:,} images must score above all that calibrate before one is flagged: "
                         "give a larger --fdr, or calibrate on more things")
        return lines
    low, high = false_alarm_range(rank, things)
    sure = f" (the rate is at most {args.fpr:g} with confidence {args.confidence:g})" if args.confidence else ""
    lines = [f"{flagged:,} of {len(p):,} images flagged at p <= {scored.limit:.4g}{sure}",
             f"of new things like the training data, at most {scored.limit:.1%} would be on average, between {low:.1%} "
             f"and {high:.1%} for nine calibrations in ten (calibrated on {things:,} things, {images:,} images)"]
    if folds > 1:
        lines.append(f"of {folds} folds that rate is usual; proven, for things of one image, is at most "
                     f"{cross_bound(scored.limit, folds, things):.1%} (arXiv 1905.02928)")
    return lines
