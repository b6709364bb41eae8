"""Which pictures show one thing, and the split into whole things.

A part that is photographed six times is one thing, not six. A picture of a new part has no sibling among the training
pictures, so the pictures that calibrate must not have one there either: whole groups are held out, and every group
counts the same (arXiv 1809.07441, 2306.06342).
"""

import csv
import hashlib
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.data.likeness import digests, near, numbered

PARTS = ("train", "validation", "test")  # of own images; the last one calibrates
TRAIN, VALIDATION, CALIBRATION = range(3)

def group(images, how, quiet=False):
    """Labels [N] of `Images` by --group-by: near (which tells its progress unless `quiet`), folder, none (copies alone
    are one), a FILE.csv, or a regular expression. Raises UserError."""
    if how == "near":
        return near(images.pixels, quiet)
    if how == "none":
        return numbered(digests(images.pixels))
    if how.lower().endswith(".csv"):
        return _listed(images, how)
    if images.files is None:
        raise UserError(f"--group-by {how}: {images.name} has no file names; use near, none or a FILE.csv with the "
                        "columns index and group")
    if how == "folder":
        return numbered([str(Path(file).parent) for file in images.files])
    try:
        found = [re.search(how, file) for file in images.files]
    except re.error as error:
        raise UserError(f"--group-by {how} is no regular expression ({error}): use near, folder, none, a FILE.csv or "
                        "one") from None
    for file, match in zip(images.files, found, strict=True):
        if not match:
            raise UserError(f"--group-by {how}: the expression is not found in {file}; make it match every picture")
    return numbered([match[1] if match.re.groups and match[1] is not None else match[0] for match in found])


def _listed(images, path):
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"--group-by {path}: there is no such file") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"--group-by {path} cannot be read ({error}): give a table with the columns file (or index) "
                        "and group") from None
    key = "file" if images.files else "index"
    names = images.files or [str(i) for i in range(len(images.pixels))]
    if not rows or not {key, "group"} <= set(rows[0]):
        raise UserError(f"--group-by {path} has no columns {key} and group: add a first line that names them")
    named = {row[key]: row["group"] for row in rows}
    if len(named) < len(rows):
        raise UserError(f"--group-by {path} names a picture twice: keep one line of each")
    for name in names:
        if not named.get(name):
            raise UserError(f"--group-by {path} gives no group to {name}: add its line")
    if extra := len(named) - len(set(names)):
        images.notes.append(f"{extra:,} lines of {path} name no picture of {images.name}")
    return numbered([named[name] for name in names])


def things_needed(fpr):
    """How many groups must calibrate for a p-value of `fpr` to be possible."""
    return math.ceil(1 / fpr - 1e-9) - 1


def smallest_rate(things):
    """The smallest false-alarm rate that so many calibrating groups can promise, rounded up to 0.0001."""
    return math.ceil(1e4 / (things + 1)) / 1e4


def ordered(labels, digests):
    """The groups in an order that their pictures' digests decide, whatever the order of the files and the sizes of the
    groups: by a digest of the smallest digest. (By the smallest one itself, large groups would come first: those that
    calibrate would not be like new ones.)"""
    first = {}
    for label, digest in zip(labels.tolist(), digests, strict=True):
        first[label] = min(digest, first.get(label, digest))
    return sorted(first, key=lambda label: hashlib.blake2b(first[label], digest_size=8).digest())


def split(labels, digests, fpr, folds=1, fold=0, given=None):
    """The part of each image, TRAIN, VALIDATION or CALIBRATION [N], uint8, from its group [N] and its digest [N].

    Whole groups in the random order of `ordered`: a tenth of them to calibrate, at least as many as a false-alarm rate
    of `fpr` needs and at most a third; of 30 groups or more, another tenth to validate. Of `folds` folds, every
    folds-th group calibrates, beginning at `fold`. Where the images are `given` to train by the first so many,
    the others calibrate. Raises UserError for fewer than three groups.
    """
    order = ordered(labels, digests)
    n = len(order)
    if n < 3 and given is None:
        raise UserError(f"the {len(labels):,} images show {n} thing{'s' * (n > 1)}, and three are needed, to train and "
                        "to calibrate with: add pictures of other things, or say with --group-by which picture shows "
                        "which (none: each one a thing of its own)")
    if folds > n:
        raise UserError(f"--folds {folds}: there are {n} things; give {n} or fewer")
    if folds > 1 and given is not None:
        raise UserError("--folds: train_images and test_images say what calibrates; save all of them as one array")
    if given is not None:
        held_out = set(labels[given:].tolist())
    elif folds > 1:
        held_out = set(order[fold::folds])
    else:
        held_out = set(order[:min(max(round(n / 10), things_needed(fpr)), n // 3)])
    rest = [label for label in order if label not in held_out]
    tenth = round((n if given is None else len(rest)) / 10)
    validation = set(rest[:tenth]) if n >= 30 and len(rest) > tenth else set()
    part = np.array([CALIBRATION if label in held_out else VALIDATION if label in validation else TRAIN
                     for label in labels.tolist()], np.uint8)
    if given is not None:
        part[:given] = np.where(part[:given] == CALIBRATION, TRAIN, part[:given])
    return part


def split_of(images, names, labels, fpr, folds=1, fold=0):
    """The `split` of own `Images`, whose digests are `names` [N] and whose groups are `labels` [N], as checkpoints keep
    it: {"group", "part"} [N] and a checksum of all images."""
    part = split(labels, names, fpr, folds, fold, images.given)
    return {"group": torch.from_numpy(labels), "part": torch.from_numpy(part), "crc32": checksum(names)}


def parts(images, split=None):
    """The parts of own `Images` by name, train, validation (where there is one) and test, each in a random order that
    its digests decide, of which the first things or images are a fair sample. `split` is a checkpoint's: {"group",
    "part"} [N] and a checksum of all images; those from before there were groups have None. Raises UserError where it
    is of other images."""
    names = digests(images.pixels)
    if split is None:
        part = np.array([CALIBRATION if name[-1] % 10 == 0 else TRAIN for name in names], np.uint8)
        if images.given is not None:
            part = np.where(np.arange(len(part)) < images.given, TRAIN, CALIBRATION)
        order = np.array(sorted(range(len(names)), key=names.__getitem__))
    elif len(split["part"]) != len(names) or split["crc32"] != checksum(names):
        raise UserError(f"the {len(names):,} images in {images.name} are not the {len(split['part']):,} that the model "
                        "was trained and calibrated on: give them back, or train anew")
    else:
        part, images = split["part"].numpy(), replace(images, groups=split["group"].numpy())
        place = {label: i for i, label in enumerate(ordered(images.groups, names))}
        whole = np.array([place[label] for label in images.groups.tolist()])
        by_digest = np.argsort(np.argsort(np.array(names)))  # training images singly, those held out thing by thing
        order = np.lexsort((by_digest, np.where(part == CALIBRATION, whole, 0)))
    chosen = {name: order[part[order] == number] for number, name in enumerate(PARTS)}
    if not len(chosen["train"]) or not len(chosen["test"]):
        raise UserError(f"{images.name} holds {len(names)} images, too few different ones for a training and a test "
                        "part: add some")
    return {name: images.take(rows) for name, rows in chosen.items() if len(rows)}


def checksum(digests):
    """A number that changes where one of the images does, from their digests."""
    return zlib.crc32(b"".join(digests))
