"""Maps for people: their colours, pictures with what is odd marked, and the files of `eval.py --maps`."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood import UserError, checkpoint
from vae_ood.cli import make_folder
from vae_ood.data.decoding import SOFTWARE
from vae_ood.data.groups import things_needed
from vae_ood.data.images import placed_back
from vae_ood.maps import CALIBRATED

NOTHING = 255  # the colour's number where a map has no value
SHOWN = 192  # pixels: of the longer side of a marked picture, at least
WRITERS = 4  # files at once
COLOURS = np.concatenate([  # of 0 to the threshold, and of what lies above: told apart in gray too
    np.linspace((8, 10, 24), (96, 128, 180), 128), np.linspace((255, 96, 20), (255, 245, 170), 127), np.zeros((1, 3))
]).round().astype(np.uint8)


@dataclass
class Scale:
    """What maps are drawn by: the threshold, which a share `fpr` of ordinary pictures exceeds anywhere, at most, and
    the `top` of the colours; `meaning`: a line. The threshold is infinite where `meaning` says why."""

    threshold: float
    fpr: float
    top: float
    meaning: str


def scale_of(member, fpr):
    """The `Scale` of a member's maps at the false-alarm rate `fpr`."""
    threshold, things = member.map_threshold(fpr), len(np.unique(member.groups[:CALIBRATED]))
    if math.isfinite(threshold):
        return Scale(threshold, fpr, 2 * threshold, f"maps: marked is what at most {fpr:.1%} of ordinary pictures show "
                     f"anywhere, above {threshold:.2f} standard deviations ({things:,} things)")
    return Scale(threshold, fpr, float(member.peaks.max()), f"maps: nothing is marked, as {things_needed(fpr):,} "
                 f"things must calibrate them for a rate of {fpr:g}, and there are {things:,}")


def colours(values, scale):
    """The numbers of the COLOURS, uint8, of map values of any shape; from 128 on above the threshold."""
    threshold, top = min(scale.threshold, scale.top), scale.top
    below = np.clip(128 * values / threshold, 0, 127)
    above = np.clip(128 + 127 * (values - threshold) / max(top - threshold, 1e-9), 128, 254)
    return np.where(np.isnan(values), NOTHING, np.where(values > scale.threshold, above, below)).astype(np.uint8)


def marked(image, values, scale):
    """A picture uint8 [H, W, C] in gray, with what its map [H, W] has above the threshold in colour and outlined;
    uint8 [h, w, 3], larger where it is small."""
    times = max(1, -(-SHOWN // max(image.shape[:2])))
    large = image.repeat(times, 0).repeat(times, 1)
    gray = large @ np.array([0.299, 0.587, 0.114]) if large.shape[2] == 3 else large[..., 0].astype(float)
    values = F.interpolate(torch.from_numpy(values)[None, None], large.shape[:2], mode="bilinear")[0, 0].numpy()
    above = np.pad(values > scale.threshold, 2)
    inner = np.logical_and.reduce([np.roll(above, by, axis) for axis in (0, 1) for by in (-2, -1, 1, 2)])
    weight = np.where(above, np.where(inner, 0.35, 1), 0)[2:-2, 2:-2, None]
    return ((1 - weight) * gray[..., None] + weight * COLOURS[colours(values, scale)]).round().astype(np.uint8)


class MapFiles:
    """The files of `eval.py --maps`: the map of each picture, at the picture's own size, as a .png or a .npy (float16,
    NaN where the crop leaves the picture out) of its own name; maps.json says what they are."""

    def __init__(self, folder, kind, source, scale, crop):
        """source: the path of what is scored, whose images `convert` makes by `crop`."""
        self.folder, self.kind, self.source, self.scale, self.crop = Path(folder), kind, source, scale, crop
        self.cropped = 0

    def claim(self):
        """Make the folder. Raises UserError where it holds anything but maps of the same pictures."""
        if self.kind == "png":
            try:
                import PIL  # noqa: F401
            except ImportError:
                raise UserError("--maps writes pictures by Pillow: pip install Pillow, or give --maps-format npy"
                                ) from None
        make_folder(self.folder)
        record = self.folder / "maps.json"
        try:
            theirs = json.loads(record.read_text())
        except (OSError, ValueError):  # none, or somebody else's
            theirs = {}
        if any(self.folder.iterdir()) and theirs.get("score") != self.source:
            raise UserError(f"--maps {self.folder}: the folder is not empty: give a new one")
        found = {"score": self.source} | asdict(self.scale)
        if not math.isfinite(self.scale.threshold):
            found["threshold"] = None
        checkpoint.write_atomic(record, (json.dumps(found) + "\n").encode())

    def add(self, images, maps, first):
        """Write the maps float32 [N, H, W] of `Images`, the first of which has the number `first`. Raises UserError."""
        names = images.files or [str(first + i) for i in range(len(maps))]
        with ThreadPoolExecutor(WRITERS) as pool:
            self.cropped += sum(pool.map(self._write, names, maps, images.sizes.tolist()))

    def _write(self, name, values, size):
        """Write one; whether something is left out."""
        path = self.folder / f"{name}.{self.kind}"
        if ".." in path.parts[len(self.folder.parts):] or Path(name).is_absolute():
            raise UserError(f"--maps: the name {name} leads out of the folder: rename the picture")
        values = placed_back(torch.from_numpy(values), *size, self.crop).numpy()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                if self.kind == "npy":
                    np.save(file, values.astype(np.float16))
                else:
                    self._draw(file, values)
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): free some space or choose another --maps"
                            ) from None
        return bool(np.isnan(values).any())

    def _draw(self, file, values):
        from PIL import Image, PngImagePlugin
        picture, info = Image.fromarray(colours(values, self.scale)), PngImagePlugin.PngInfo()
        picture.putpalette(COLOURS.tobytes())
        info.add_text("Software", SOFTWARE)  # by which it is never read as data
        picture.save(file, "PNG", pnginfo=info, transparency=NOTHING)

    def said(self):
        """What there is to say of the files, in lines."""
        left = f"{self.cropped:,} of the maps have no value where --crop centre leaves the picture out"
        return [*([left] if self.cropped else []), f"maps written to {self.folder}"]
