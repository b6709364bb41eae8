"""Which pictures are so alike that they show one thing, and how near new pictures lie to the training pictures."""

import hashlib
import math

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood.cli import Progress

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


def set_digest(pixels):
    """A number of uint8 images [N, C, H, W] in any order: the sum of their digests, modulo 2^63."""
    return sum(int.from_bytes(digest, "big") for digest in digests(pixels)) % 2**63


def blurring(sigma):
    """The matrix [SIDE, SIDE] that blurs SIDE pixels in a row by a Gaussian, the outermost ones repeated."""
    steps = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    taken = (torch.arange(SIDE)[:, None] + steps).clamp(0, SIDE - 1)
    return (F.one_hot(taken, SIDE) * (weights / weights.sum())[:, None]).sum(1)


def scaling(n):
    """The matrix [SIDE, n] that scales n pixels in a row to SIDE, antialiased."""
    return F.interpolate(torch.eye(n)[None, None], (SIDE, n), mode="bilinear", antialias=True)[0, 0]


def likeness_vectors(pixels):
    """uint8 images [N, C, H, W] -> float32 [N, 2 SIDE^2] of length 1, whose inner product is a likeness in [-1, 1].

    It is the mean of two correlations of the gray pictures, scaled to SIDE x SIDE: as they are, and with the local mean
    and contrast taken out, so that another light changes little. Plain pictures give 0, and are like none.
    """
    def unit(x):
        x = x.flatten(1) - x.mean((1, 2), keepdim=True).flatten(1)
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-3 * SIDE**2)  # gray levels

    rows, columns = (scaling(n) for n in pixels.shape[2:])
    fine, local, out = blurring(0.5), blurring(2.0), []
    for part in pixels.split(max(1, 2**24 // pixels[0].numel())):  # bounded float copies
        scaled = rows @ part.float().mean(1) @ columns.T
        x = fine @ scaled @ fine.T
        detail = x - local @ x @ local.T
        contrast = (local @ detail.square() @ local.T).clamp(min=0).sqrt()
        detail = detail / (contrast + 2)  # gray levels: less contrast is noise
        out.append(torch.cat([unit(scaled), unit(detail)], 1) / math.sqrt(2))
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
    """(the place [N], 0, 1, ... among a picture's neighbours, of the one whose distance is its local scale; RANK or
    fewer) from the distances [N, K] to its neighbours: its RANK-th one; or, where the distances leap beyond that rank,
    the one after the leap, as the picture shows a thing of many pictures."""
    n, k = distance.shape
    rank = min(RANK, max(1, (n - 1) // 2), k)
    if k == rank:
        return np.full(n, rank - 1), rank
    ratio = distance[:, rank:] / np.maximum(distance[:, rank - 1:-1], 1e-9)
    return np.where(ratio.max(1) > LEAP, ratio.argmax(1) + rank, rank - 1), rank


def dimension(distance, place):
    """The median intrinsic dimension at the pictures, from the distances [N, K] to their neighbours, those from the
    `place` [N] of their local scale on (arXiv math/0410474, Levina and Bickel; these distances are squares of Euclidean
    ones); None where there are too few."""
    k = distance.shape[1]
    some = distance[k - place >= 10], place[k - place >= 10]
    if k < RANK + 9 or not len(some[1]):
        return None
    logs = np.log(np.maximum(some[0], 1e-9))
    counted = np.arange(k) >= some[1][:, None]
    mean = ((logs[:, -1:] - logs) * counted).sum(1) / (counted.sum(1) - 1)
    return float(np.median(2 / np.maximum(mean, 1e-3)))


def share(rank, dimension):
    """SIBLING, or less where so few dimensions vary that more than STRANGERS unrelated pictures would lie within that
    share of the distance to a neighbour of this rank."""
    return SIBLING if dimension is None else min(SIBLING, (STRANGERS / rank) ** (2 / dimension))


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


def near(pixels, quiet=False):
    """Labels [N] of uint8 images [N, C, H, W], equal where pictures are so alike that they show one thing.

    Two are joined where their distance is below a `share` of the geometric mean of their `local_scales`: so alike as
    others are not. So are pictures that follow one another in a folder whose order predicts likeness, a video's say,
    and copies. Unless `quiet`, progress is shown, and a note of clusters that are taken apart.
    """
    n = len(pixels)
    copies = numbered(digests(pixels))
    kept = np.unique(copies, return_index=True)[1]  # the first of each
    edges = [(np.arange(n), kept[copies])]
    if len(kept) > 2:
        bar = None if quiet else Progress(len(kept), label="compared")
        vectors = torch.cat([likeness_vectors(pixels[torch.from_numpy(part)]).to(
            torch.float32 if len(kept) <= EXACT else torch.float16)
            for part in np.array_split(kept, math.ceil(len(kept) / 8192))])
        distance, index = neighbours(vectors, bar)
        if bar:
            bar.close()
        edges += [(kept[i], kept[j]) for i, j in siblings(vectors, distance, index)]
        if not quiet and clustered(vectors, distance) > 0.2:
            print(f"note: many pictures have over {LISTED} others that are far more alike than the rest: if each such "
                  "cluster shows one thing, say so with --group-by; by likeness it is taken apart")
    return connected(n, *(np.concatenate(side) for side in zip(*edges, strict=True)))


def siblings(vectors, distance, index):
    """The edges (first, second) that `near` joins, as a list of pairs of arrays."""
    n, k = distance.shape
    place, rank = local_scales(distance)
    scale = distance[np.arange(n), place]
    reach = share(rank, dimension(distance, place)) * scale
    joined = distance < np.maximum(np.sqrt(reach[:, None] * reach[index]), LARGE * np.median(reach))
    edges = [(np.nonzero(joined)[0], index[joined])]
    follows = (index[:-1, :max(2, min(k, n // 50))] == np.arange(1, n)[:, None]).any(1)
    if follows.mean() > 0.5:  # the next picture is among the nearest: the order tells
        step = 1 - torch.cat([(a.float() * b.float()).sum(1) for a, b in
                              zip(vectors[:-1].split(4096), vectors[1:].split(4096), strict=True)]).numpy()
        first = np.flatnonzero(step < SIBLING * np.sqrt(scale[:-1] * scale[1:]))
        edges.append((first, first + 1))
    return edges


def clustered(vectors, distance):
    """The share of pictures whose distances [N, K] leap beyond the last of their neighbours: the median distance to the
    others is LEAP times what the dimension at the picture makes of the distance to that neighbour."""
    n, k = distance.shape
    if n <= 2 * LISTED:
        return 0.0
    some = torch.from_numpy(np.random.default_rng(0).permutation(n)[:300])
    median = (1 - vectors.float() @ vectors[some].float().T).median(1)[0].numpy()
    logs = np.log(np.maximum(distance[:, RANK - 1:], 1e-9))
    growth = np.maximum((logs[:, -1:] - logs[:, :-1]).mean(1), 1e-3)  # 2 / dimension
    return float((median > LEAP * distance[:, -1] * (n / 2 / k) ** growth).mean())


def as_numbers(names):
    """Digests as int64 [N]."""
    return torch.from_numpy(np.frombuffer(b"".join(names), np.int64).copy())


def sketch(vectors, basis):
    """Likeness vectors' coordinates along the basis, and the length of what is left, [N, SKETCH]."""
    inside = vectors @ basis
    left = (vectors.square().sum(1, keepdim=True) - inside.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    return torch.cat([inside, left], 1)


class Nearest(torch.nn.Module):
    """Training pictures as their digests and SKETCH numbers each, to look new ones up in; the buffers are all it knows.

    The numbers are a picture's coordinates along the directions that carry most of all likeness vectors, and the length
    of what is left: their inner product is never below the pictures' likeness, and 1 for a picture with itself.
    """

    def __init__(self, basis, sketches, copies, share):
        """basis [2 SIDE^2, SKETCH - 1]; sketches [N, SKETCH], half; copies [N]: the digests as int64; share []: of the
        local scale, within which siblings lie."""
        super().__init__()
        for name, value in (("basis", basis), ("sketches", sketches), ("copies", copies), ("share", share)):
            self.register_buffer(name, value)
        self.rank = min(RANK, max(1, len(sketches) // 2))

    @classmethod
    def of(cls, pixels):
        """Of training pictures [N, C, H, W], uint8."""
        vectors, n = likeness_vectors(pixels), len(pixels)
        basis = sketch_basis(vectors)[:, 1:].contiguous()  # else the file would keep all directions
        found = cls(basis, sketch(vectors, basis).half(), as_numbers(digests(pixels)), torch.tensor(0.0).double())
        some = torch.from_numpy(np.random.default_rng(0).permutation(n)[:1000])
        distance = found._distances(found.sketches[some].float(), 1)  # without the picture itself
        found.share.fill_(share(found.rank, dimension(distance, np.full(len(some), found.rank - 1))))
        return found

    def _distances(self, sketches, skipped=0):
        trained, count = self.sketches.float().T, min(LISTED + skipped, len(self.sketches))
        likeness = torch.cat([(part @ trained).topk(count, 1)[0] for part in sketches.split(512)])
        return (1 - likeness[:, skipped:]).clamp(min=0).numpy()

    def _sketches(self, pixels):
        return torch.cat([sketch(likeness_vectors(part), self.basis) for part in pixels.split(512)])

    def distance(self, pixels):
        """1 - likeness [M] of pictures [M, C, H, W] to their nearest training picture, and their local scale [M]."""
        found = self._distances(self._sketches(pixels))
        return found[:, 0], found[:, self.rank - 1]

    def known(self, pixels, strangers):
        """Of pictures [M, C, H, W]: 1 - likeness [M] to the nearest training picture; whether each is a copy of one
        [M], or so near one as siblings are [M] (copies included), and as hardly one of the `strangers` is: the
        `distance` of pictures of things that did not train."""
        sketches, trained = self._sketches(pixels), self.sketches.float().split(2048)
        likest = torch.cat([torch.stack([(part @ some.T).amax(1) for some in trained]).amax(0)
                            for part in sketches.split(512)])
        nearest = (1 - likest).clamp(min=0).numpy()
        share = min(float(self.share), np.quantile(strangers[0] / np.maximum(strangers[1], 1e-9), 0.01))
        bound = 1 - (sketches @ trained[0].T).topk(self.rank, 1)[0][:, -1].numpy()
        sibling = nearest < share * np.maximum(bound, 0)  # else not within the local scale, which is at most `bound`
        if sibling.any():
            scale = self._distances(sketches[torch.from_numpy(sibling)])[:, self.rank - 1]
            sibling[sibling] = nearest[sibling] < share * scale
        copy = torch.isin(as_numbers(digests(pixels)), self.copies).numpy()
        return nearest, copy, copy | sibling


def farther(new, new_groups, known, known_groups):
    """The one-sided p-value of the rank test (Mann and Whitney, normal approximation with ties) that the distances of
    new pictures [M] are larger than those of known ones [N], by the first picture of every group."""
    new, known = (values[np.unique(groups, return_index=True)[1]] for values, groups in
                  ((new, new_groups), (known, known_groups)))
    m, n = len(new), len(known)
    _, rank, count = np.unique(np.concatenate([new, known]), return_inverse=True, return_counts=True)
    average = np.cumsum(count) - (count - 1) / 2
    u = average[rank[:m]].sum() - m * (m + 1) / 2
    variance = m * n / 12 * (m + n + 1 - (count**3 - count).sum() / ((m + n) * (m + n - 1)))
    return 0.5 * math.erfc((u - m * n / 2 - 0.5) / math.sqrt(2 * variance)) if variance > 0 else 1.0
