"""Own images: folders of pictures, single pictures, arrays, and the size that they are brought to."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from vae_ood import UserError
from vae_ood.data.arrays import Arrays, laid_out, to_uint8
from vae_ood.data.decoding import SMALL, Undecodable, decode, formats, header
from vae_ood.data.images import Images, convert

NOBODYS = {".ds_store", "thumbs.db", "desktop.ini"}  # the operating system's
AUTO, WHOLE = "auto", "whole"  # the sizes of the default rules: for pictures, and for pictures in tiles
DONE = {"centre": "scaled and cropped", "pad": "scaled and padded", "stretch": "stretched"}  # by each --crop


def rule_of(sizes, size=AUTO, crop=None):
    """(size, [H, W], or None where pictures are taken as they are; crop, None then; the line that says what AUTO does,
    or "") for pictures of `sizes` {(h, w): how many}. AUTO takes pictures of one size of at most SMALL on both sides as
    they are, and scales others to SMALL x SMALL; WHOLE takes those of one size as they are. Raises UserError."""
    if size == WHOLE and len(sizes) > 1:
        h, w = (int(np.median(np.repeat(side, list(sizes.values())))) for side in zip(*sizes, strict=True))
        raise UserError(f"the pictures are of {_span(sizes)}, and --tile needs one: give --size {h}x{w}, the median")
    if size == AUTO and len(sizes) == 1:
        (h, w), = sizes
        size = None if max(h, w) <= SMALL else AUTO
    size = None if size == WHOLE else size
    if size is None and len(sizes) > 1:
        raise UserError(f"the pictures are of {_span(sizes)}, and those that the model was trained on had one size: "
                        "give these back, or train anew")
    if size is None:
        return None, None, ""
    crop = crop or "centre"
    if size != AUTO:
        return list(size), crop, ""
    return [SMALL, SMALL], crop, (f"{sum(sizes.values()):,} pictures of {_span(sizes)}{',' * (len(sizes) > 1)} are "
                                  f"{DONE[crop]} to {SMALL}x{SMALL}: --size and --crop say otherwise")


def _span(sizes):
    """The sizes {(h, w): ...} in words."""
    ordered = [f"{h}x{w}" for h, w in sorted(sizes, key=lambda size: (size[0] * size[1], size))]
    return " ".join(ordered) if len(ordered) < 2 else f"{len(ordered):,} sizes, {ordered[0]} to {ordered[-1]}"


def _walk(folder):
    """(the pictures below a folder, as relative paths, {kind: count} of the other files). Links are followed once.
    UserError for a folder that cannot be read."""
    def refuse(error):
        raise UserError(f"the folder {error.filename} cannot be read ({error.strerror}): allow it, or move it away")
    known, pictures, others, seen = formats(), [], {}, {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = {os.path.realpath(os.path.join(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for path, name in real.items() if path not in seen)
        seen.update(real)
        for name in files:
            kind = os.path.splitext(name)[1].lower()
            if name.startswith("._") or name.lower() in NOBODYS:
                continue
            if kind in known and os.path.isfile(os.path.join(place, name)):
                pictures.append(os.path.relpath(os.path.join(place, name), folder))
            else:
                others[kind or "without extension"] = others.get(kind or "without extension", 0) + 1
    return sorted(pictures, key=lambda name: name.split(os.sep)), others


class Pictures:
    """A folder of pictures with all that lies below it, or one picture, to `read` in parts. `name`; `files`: the names
    of what is read. Raises UserError."""

    given = None

    def __init__(self, path, skip_bad=False, levels=None):
        self.name, self.skip_bad, self.levels = str(path), skip_bad, levels
        self.root = path if path.is_dir() else path.parent
        self.files, self.others = _walk(path) if path.is_dir() else ([path.name], {})
        if not self.files:
            raise UserError(f"the folder {path} holds no pictures that Pillow decodes"
                            + (f", only {_listed(self.others)}" if self.others else ""))
        self.forget()

    def forget(self):
        """Begin anew to note what is read."""
        self.left_out, self.sizes, self.many, self.transparent, self.highest = dict(self.others), set(), [], 0, None

    def __len__(self):
        return len(self.files)

    def paths(self):
        """Where the files are."""
        return [self.root / name for name in self.files]

    def headers(self, bar=None):
        """({(h, w): how many}, the channels, 1 or 3) by the headers of all files, without decoding them."""
        paths, sizes, channels = self.paths(), Counter(), 1
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), 1000):
                found = [one for one in pool.map(header, paths[start:start + 1000]) if one]
                sizes.update((h, w) for _, h, w in found)
                channels = max([channels] + [c for c, _, _ in found])
                if bar:
                    bar.update(min(start + 1000, len(paths)))
        return sizes, channels

    def _decode(self, name, shape, crop):
        try:
            return decode(self.root / name, os.path.join(self.root, name), self.levels, shape, crop)
        except Undecodable as error:
            if self.skip_bad:
                return None
            raise UserError(f"{error}, or leave out all that cannot be decoded with --skip-bad") from None

    def read(self, rows, shape, crop=None):
        """`Images` of the slice `rows` of the files, less those that are left out, converted to `shape`, (C, H, W), or
        (None, H, W) for colour where one of these is in colour. Raises UserError."""
        names = self.files[rows]
        with ThreadPoolExecutor() as pool:
            decoded = list(pool.map(lambda name: self._decode(name, shape, crop), names))
        good = [(name, one) for name, one in zip(names, decoded, strict=True) if one and one.pixels is not None]
        for kind, n in (("undecodable", decoded.count(None)), ("figures of vae-ood", len(names) - len(good)
                                                               - decoded.count(None))):
            if n:
                self.left_out[kind] = self.left_out.get(kind, 0) + n
        self.sizes |= {one.size for _, one in good}
        self.many += [one.frames for _, one in good if one.frames > 1]
        self.transparent += sum(one.transparent for _, one in good)
        self.highest = max((highest for highest in (self.highest, *(one.highest for _, one in good))
                            if highest is not None), default=None)
        return Images(self.name, stacked([one.pixels for _, one in good], shape), [], [name for name, _ in good],
                      sizes=np.array([one.size[1:] for _, one in good]).reshape(-1, 2))

    def notes(self, shape=None):
        """What a reader would not expect of what was read so far, in lines."""
        notes = [f"{sum(self.left_out.values()):,} files left out: {_listed(self.left_out)}"] if self.left_out else []
        if self.many:
            notes.append(f"first frame of {self.many[0] if len(self.many) == 1 else 'several'} in {len(self.many):,} "
                         "files")
        if self.transparent:
            notes.append(f"{self.transparent:,} pictures are transparent in places: shown on mid gray")
        if self.highest is not None and self.highest < 4096:
            notes.append(f"16-bit pictures that use the levels up to {self.highest:,} of 65,535 alone: nearly black; "
                         f"--range 0 {self.highest} makes that white")
        if shape and self.sizes and self.sizes != {tuple(shape)}:
            notes.append("converted from " + ("x".join(map(str, *self.sizes)) if len(self.sizes) == 1 else
                                              "various sizes"))
        return notes


def _listed(counts):
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def stacked(pictures, shape):
    """uint8 [N, *shape] of a list of [1 or 3, H, W], in colour where shape begins with None and one of them is."""
    channels = shape[0] or max(map(len, pictures), default=1)
    return torch.stack([one.expand(channels, -1, -1) for one in pictures]) if pictures else torch.empty(
        0, channels, *shape[1:], dtype=torch.uint8)


def to_pixels(images, shape=None, levels=None, crop=None):
    """uint8 [N, *shape] of images in a program's memory: uint8 or float [0, 1] arrays or tensors, [N, H, W, C],
    [N, C, H, W] or [N, H, W], or a list of paths or of Pillow's pictures, by `convert`. Raises UserError."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    if isinstance(images, np.ndarray):
        pixels = to_uint8(laid_out(images, "the array"), "the array", levels)
        return convert(pixels, shape or pixels.shape[1:], crop)
    if isinstance(images, (str, Path)):
        raise UserError("give a list of paths, or an array of images")
    decoded = []
    for one in images:
        decoded.append(decode(one, str(one), levels, shape, crop).pixels)
        if decoded[-1] is None:
            raise UserError(f"{one} is a figure of vae-ood, not a picture to score: leave it out")
    if not decoded:
        raise UserError("there are no images in the list")
    return stacked(decoded, shape)


def sized(images, size=AUTO, crop=None):
    """(pixels [N, C, H, W] by `to_pixels`, size, crop) by `rule_of`; arrays stay as they are unless a size is given."""
    images = images if hasattr(images, "shape") or isinstance(images, (str, Path)) else list(images)
    if hasattr(images, "shape"):
        size, crop, _ = rule_of({}, None if size in (AUTO, WHOLE) else size, crop)
        shape = size
    else:
        sizes = Counter(one[1:] for one in map(header, images) if one)
        size, crop, _ = rule_of(sizes, size, crop)
        shape = size or next(iter(sizes), (1, 1))
    return to_pixels(images, shape and (None, *shape), crop=crop), size, crop


def open_own(path, skip_bad=False, levels=None):
    """A folder of pictures (recursively), a picture, a .npy or a .npz, to read in parts: `Pictures` or `Arrays`.
    `levels` (low, high) are mapped to 0 and 255, in pictures and arrays of every kind. Raises UserError."""
    if path.suffix.lower() in (".npy", ".npz") and not path.is_dir():
        return Arrays(path, levels)
    if path.is_dir() or path.suffix.lower() in formats():
        return Pictures(path, skip_bad, levels)
    raise UserError(f"{path} is neither a folder of pictures, nor a picture, a .npy or a .npz file")
