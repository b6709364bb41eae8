"""Which pictures show one thing, and the split into whole things.

A part that is photographed six times is one thing, not six. A picture of a new part has no sibling among the training
pictures, so the pictures that calibrate must not have one there either: whole groups are held out, and every group
counts the same (arXiv 1809.07441, 2306.06342).
"""

import csv
import hashlib
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood import UserError
from vae_ood.cli import Progress

PARTS = ("train", "validation", "test")  # of own images; the last one calibrates
TRAIN, VALIDATION, CALIBRATION = range(3)

SIDE = 24  # pixels to which a picture is scaled for its likeness to others
RANK, LISTED = 30, 100  # a picture's local scale is its distance to this neighbour; so many are found at most
SIBLING = 0.35  # of two pictures' local scales: what lies nearer shows the same thing
LARGE = 0.1  # of the pictures' median reach: what lies nearer than that does so whatever the local scales
LEAP = 2.5  # between the distances to two consecutive neighbours: the end of a thing of more than RANK pictures
STRANGERS = 0.05  # expected among a picture's siblings, were the pictures spread evenly
EXACT = 50_000  # pictures; of more, SKETCH numbers each decide which pairs are compared in full
SKETCH = 64


def digests(pixels):
    """The digest of each of uint8 images [N, C, H, W], bytes: equal for copies alone."""
    return [hashlib.blake2b(p.numpy().tobytes(), digest_size=8).digest() for p in pixels]


# ---- likeness ----------------------------------------------------------------------------------------------------

def likeness_vectors(pixels):
    """uint8 images [N, C, H, W] -> float32 [N, 2 SIDE^2] of length 1, whose inner product is a likeness in [-1, 1].

    It is the mean of two correlations of the gray pictures, scaled to SIDE x SIDE: as they are, and with the local mean
    and contrast taken out, so that another light changes little. Plain pictures give 0, and are like none.
    """
    def blur(x, sigma):
        steps = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
        weights = torch.exp(-0.5 * (steps / sigma) ** 2)
        weights, edge = weights / weights.sum(), len(steps) // 2
        x = F.conv2d(F.pad(x, (edge, edge, edge, edge), mode="replicate"), weights.view(1, 1, 1, -1))
        return F.conv2d(x, weights.view(1, 1, -1, 1))

    def unit(x):
        x = x.flatten(1) - x.mean((1, 2, 3))[:, None]
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-3 * x.shape[1])  # gray levels

    out = []
    for part in pixels.split(1024):
        x = F.interpolate(part.float().mean(1, keepdim=True), (SIDE, SIDE), mode="bilinear", antialias=True)
        x, plain = blur(x, 0.5), unit(x)
        detail = x - blur(x, 2.0)
        detail = detail / (blur(detail.square(), 2.0).sqrt() + 2)  # gray levels: less contrast is noise
        out.append(torch.cat([plain, unit(detail)], 1) / math.sqrt(2))
    return torch.cat(out)


def sketch_basis(vectors):
    """The SKETCH directions [2 SIDE^2, SKETCH] that carry most of (at most 4,096 of) the vectors."""
    some = vectors[torch.from_numpy(np.random.default_rng(0).permutation(len(vectors))[:4096])].float()
    return torch.linalg.eigh(some.T @ some)[1][:, -SKETCH:]


def shifted(vectors):
    """The likeness vectors [N, D] of the same pictures moved by -1, 0, 1 of SIDE pixels along both axes [N, 9, D]."""
    halves = F.pad(vectors.float().unflatten(1, (2, SIDE, SIDE)), (1, 1, 1, 1), mode="replicate")
    moved = torch.stack([halves[:, :, i:i + SIDE, j:j + SIDE] for i in range(3) for j in range(3)], 1).flatten(3)
    moved = moved - moved.mean(3, keepdim=True)
    return (moved / (moved.norm(dim=3, keepdim=True) * math.sqrt(2)).clamp(min=1e-6)).flatten(2)


def neighbours(vectors, bar=None):
    """The distances 1 - likeness [N, K], ascending, and the indices [N, K] of each picture's K = min(LISTED, N - 1)
    nearest ones, found as they lie, or of more than EXACT pictures by their sketches; their likeness is the largest
    over shifts."""
    n = len(vectors)
    k = min(LISTED, n - 1)
    compared = vectors if n <= EXACT else vectors.float() @ sketch_basis(vectors)
    distance, index = torch.empty(n, k), torch.empty(n, k, dtype=torch.int32)
    for start in range(0, n, 256):
        rows = torch.arange(start, min(start + 256, n))
        c = compared[rows] @ compared.T
        c[rows - start, rows] = -2
        at = c.topk(k, 1)[1]
        c = torch.einsum("nsd,nkd->nks", shifted(vectors[rows]), vectors[at].float()).amax(2)
        best, order = c.sort(1, True)
        distance[rows], index[rows] = 1 - best, at.gather(1, order).int()
        if bar:
            bar.update(int(rows[-1]) + 1)
    return distance.clamp(min=0).numpy(), index.numpy()


def local_scales(distance):
    """The distances [N] to which those of a picture's siblings compare, from the distances [N, K] to its neighbours:
    its RANK-th one's; or, where the distances leap beyond that rank, the one after the leap: the picture shows a thing
    of many pictures."""
    n, k = distance.shape
    rank = min(RANK, max(1, (n - 1) // 2), k)
    leap = np.full(n, rank - 1)
    if k > rank:
        ratio = distance[:, rank:] / np.maximum(distance[:, rank - 1:-1], 1e-9)
        leap = np.where(ratio.max(1) > LEAP, ratio.argmax(1) + rank, leap)
    return distance[np.arange(n), leap], rank


def dimension(distance):
    """The median intrinsic dimension at the pictures, from the distances [N, K] to their neighbours RANK to K (arXiv
    math/0410474, Levina and Bickel; these distances are squares of Euclidean ones); None where K is too small."""
    outer = distance[:, RANK - 1:]
    if outer.shape[1] < 10:
        return None
    outer = np.maximum(outer, 1e-9)
    return float(np.median(2 / np.maximum(np.log(outer[:, -1:] / outer[:, :-1]).mean(1), 1e-3)))


def reaches(distance):
    """How near a picture's siblings lie [N]: SIBLING of its local scale, or less where so few dimensions vary that more
    than STRANGERS unrelated pictures would lie within that. From the distances [N, K] to its neighbours."""
    scale, rank = local_scales(distance)
    m = dimension(distance)
    return scale * (SIBLING if m is None else min(SIBLING, (STRANGERS / rank) ** (2 / m)))


def connected(n, first, second):
    """The connected components of n things by the edges first[e] - second[e]: labels [n] 0, 1, ... in the order in
    which their first members stand."""
    label = np.arange(n)
    while True:
        low = np.minimum(label[first], label[second])
        new = label.copy()
        np.minimum.at(new, first, low)
        np.minimum.at(new, second, low)
        np.minimum.at(new, label[first], low)  # and of what they were joined to before
        np.minimum.at(new, label[second], low)
        new = new[new]
        if np.array_equal(new, label):
            return numbered(label)
        label = new


def numbered(names):
    """Labels 0, 1, ... [N] for N names, equal for equal ones, in the order in which they appear."""
    number = {}
    return np.array([number.setdefault(name, len(number)) for name in np.asarray(names).tolist()], np.int32)


def near(pixels):
    """Labels [N] of uint8 images [N, C, H, W], equal where pictures are so alike that they show one thing.

    Two are joined where their distance is below the geometric mean of their `reaches`: so alike as others are not. So
    are pictures that follow one another in a folder whose order predicts likeness, a video's say, and copies.
    """
    n = len(pixels)
    copies = numbered(digests(pixels))
    kept = np.unique(copies, return_index=True)[1]  # the first of each
    edges = [(np.arange(n), kept[copies])]
    if len(kept) > 2:
        bar = Progress(len(kept), label="compared")
        vectors = torch.cat([likeness_vectors(pixels[torch.from_numpy(part)]).to(
            torch.float32 if len(kept) <= EXACT else torch.float16)
            for part in np.array_split(kept, math.ceil(len(kept) / 8192))])
        edges += [(kept[i], kept[j]) for i, j in siblings(vectors, *neighbours(vectors, bar))]
        bar.close()
    return connected(n, *(np.concatenate(side) for side in zip(*edges, strict=True)))


def siblings(vectors, distance, index):
    """The edges (first, second) that `near` joins, as a list of pairs of arrays."""
    n, k = distance.shape
    reach = reaches(distance)
    joined = distance < np.maximum(np.sqrt(reach[:, None] * reach[index]), LARGE * np.median(reach))
    edges = [(np.nonzero(joined)[0], index[joined])]
    follows = (index[:-1, :max(2, min(k, n // 50))] == np.arange(1, n)[:, None]).any(1)
    if follows.mean() > 0.5:  # the next picture is among the nearest: the order tells
        scale = local_scales(distance)[0]
        step = 1 - torch.einsum("nd,nd->n", vectors[:-1].float(), vectors[1:].float()).numpy()
        first = np.flatnonzero(step < SIBLING * np.sqrt(scale[:-1] * scale[1:]))
        edges.append((first, first + 1))
    return edges


class Nearest:
    """Training pictures [N, C, H, W], uint8, as their digests and SKETCH numbers each, to look new ones up in.

    The numbers are a picture's coordinates along the directions that carry most of all likeness vectors, and the length
    of what is left: their inner product is never below the pictures' likeness, and 1 for a picture with itself.
    """

    def __init__(self, pixels):
        vectors = likeness_vectors(pixels)
        self.digests, self.basis = set(digests(pixels)), sketch_basis(vectors)[:, 1:]
        self.sketches = self._sketch(vectors).half()

    def _sketch(self, vectors):
        inside = vectors @ self.basis
        left = (vectors.square().sum(1, keepdim=True) - inside.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
        return torch.cat([inside, left], 1)

    def __call__(self, pixels):
        """Of new pictures [M, C, H, W]: the distance 1 - likeness [M] to the nearest training picture and its index
        [M]; whether each is a copy of one [M], or so near one as siblings are [M] (copies included)."""
        distance, index = [], []
        for part in likeness_vectors(pixels).split(512):
            likeness, at = (self._sketch(part) @ self.sketches.float().T).topk(min(LISTED, len(self.sketches)), 1)
            distance.append(1 - likeness)
            index.append(at[:, 0])
        distance = torch.cat(distance).clamp(min=0).numpy()
        copy = np.array([d in self.digests for d in digests(pixels)])
        return distance[:, 0], torch.cat(index).numpy(), copy, copy | (distance[:, 0] < reaches(distance))


def farther(new, new_groups, known, known_groups):
    """The one-sided p-value of the rank test (Mann and Whitney, normal approximation with ties) that the distances of
    new pictures [M] are larger than those of known ones [N], every group counting once, by its mean."""
    means = [np.bincount(groups, values) / np.bincount(groups) for values, groups in
             ((new, numbered(new_groups)), (known, numbered(known_groups)))]
    _, rank, count = np.unique(np.concatenate(means), return_inverse=True, return_counts=True)
    m, n = map(len, means)
    average = np.cumsum(count) - (count - 1) / 2
    u = average[rank[:m]].sum() - m * (m + 1) / 2
    variance = m * n / 12 * (m + n + 1 - (count**3 - count).sum() / ((m + n) * (m + n - 1)))
    return 0.5 * math.erfc((u - m * n / 2 - 0.5) / math.sqrt(2 * variance)) if variance > 0 else 1.0


# ---- groups by name, and the split -------------------------------------------------------------------------------

def group(images, how):
    """Labels [N] of `Images` by --group-by: near, folder, none (copies alone are one), a FILE.csv, or a regular
    expression. Raises UserError."""
    if how == "near":
        return near(images.pixels)
    if how == "none":
        return numbered(digests(images.pixels))
    if how.endswith(".csv"):
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
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
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


def split(labels, digests, fpr, folds=1, fold=0, given=None):
    """The part of each image, TRAIN, VALIDATION or CALIBRATION [N], uint8, from its group [N] and its digest [N].

    Whole groups, those with the smallest digests first: a tenth of them to calibrate, at least as many as a false-alarm
    rate of `fpr` needs and at most a third; of 30 groups or more, another tenth to validate. Of `folds` folds, every
    folds-th group calibrates, beginning at `fold`. Where the images are `given` to train by the first so many,
    the others calibrate. Raises UserError for fewer than three groups.
    """
    first = {}
    for label, digest in zip(labels.tolist(), digests, strict=True):
        first[label] = min(digest, first.get(label, digest))
    order, n = sorted(first, key=first.__getitem__), len(first)
    if n < 3 and given is None:
        raise UserError(f"the {len(labels):,} images show {n} thing{'s' * (n > 1)}, and three are needed, to train and "
                        "to calibrate with: add pictures of other things, or say with --group-by which picture shows "
                        "which (none: each one a thing of its own)")
    if folds > n:
        raise UserError(f"--folds {folds}: there are {n} things; give {n} or fewer")
    if given is not None:
        held_out = set(labels[given:].tolist())
    elif folds > 1:
        held_out = set(order[fold::folds])
    else:
        held_out = set(order[:min(max(round(n / 10), things_needed(fpr)), n // 3)])
    rest = [label for label in order if label not in held_out]
    validation = set(rest[:round(n / 10)]) if n >= 30 and len(rest) > round(n / 10) else set()
    part = np.array([CALIBRATION if label in held_out else VALIDATION if label in validation else TRAIN
                     for label in labels.tolist()], np.uint8)
    if given is not None:
        part[:given] = np.where(part[:given] == CALIBRATION, TRAIN, part[:given])
    return part


def parts(images, split=None):
    """The parts of own `Images` by name, train, validation (where there is one) and test, each in the order of its
    digests, which is random. `split` is a checkpoint's, {"group", "part"} [N]; those from before there were groups have
    None. Raises UserError where it is of other images."""
    names = digests(images.pixels)
    if split is None:
        part = np.array([CALIBRATION if name[-1] % 10 == 0 else TRAIN for name in names], np.uint8)
        if images.given is not None:
            part = np.where(np.arange(len(part)) < images.given, TRAIN, CALIBRATION)
    elif len(split["part"]) != len(names):
        raise UserError(f"{images.name} holds {len(names):,} images now, and held {len(split['part']):,} when the "
                        "model was trained: give it back what it had, or train anew")
    else:
        part, images = split["part"].numpy(), replace(images, groups=split["group"].numpy())
    order = np.array(sorted(range(len(names)), key=names.__getitem__))
    chosen = {name: order[part[order] == number] for number, name in enumerate(PARTS)}
    if not len(chosen["train"]) or not len(chosen["test"]):
        raise UserError(f"{images.name} holds {len(names)} images, too few different ones for a training and a test "
                        "part: add some")
    return {name: images.take(rows) for name, rows in chosen.items() if len(rows)}
