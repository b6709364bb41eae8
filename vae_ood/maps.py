"""Where a picture is odd: a map of it, in standard deviations of the training images' maps at that place.

A map reads, by place, the log energies of whitened patches of the picture, at three scales, and that of the residual.
What counts, and how, was settled on two kinds of defects of magnetic tiles (Blowhole, Break). Without the statistics of
each place the order of the pixels is a little better there (AUROC 0.90 for 0.87), but the highest values are then those
of places that are always busy, and a threshold that ordinary pictures seldom exceed finds a quarter as many defects.
"""

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood.features import QUANTISATION, residuals
from vae_ood.likelihood import exact_convolutions
from vae_ood.metrics import conformal_p_values
from vae_ood.patches import energy, log_picture, whitening

FITTED = 1_000  # training images that maps are fitted to, the first ones
CALIBRATED = 2_000  # images, the first of those that calibrate, whose maps say how high ordinary ones go
LONGEST, WINDOW = 64, 5  # pixels: of a picture's longer side, at most; in whose square a residual's energy is averaged
PATCHES = (1, 9), (1, 5), (2, 9)  # the picture's size over that of the one whose patches are whitened; their size
LEAST = 1e-3  # is added to whitened energy, which is 1 on average, before its log
BLUR, PRIOR = 2, 100  # pixels by which a place's statistics are blurred; pictures that the whole map's count as
LOW = 0.5  # what a deviation below the mean counts


def covered(x, p):
    """x [N, 1, h, w] of the patches of p x p pixels: at each pixel the mean over those that cover it
    [N, 1, h + p - 1, w + p - 1]."""
    for pad, window in (((0, 0, p - 1, p - 1), (p, 1)), ((p - 1, p - 1, 0, 0), (1, p))):
        sums, counts = (F.avg_pool2d(F.pad(part, pad), window, 1) for part in (x, torch.ones_like(x[:1])))
        x = sums / counts
    return x


def log_energy(y, filters):
    """The log of the mean square of the whitened patch about each place of log pictures y [N, 1, h, w], `covered`
    [N, 1, h, w]."""
    return covered((energy(y, filters) + LEAST).log(), filters.shape[2])


def blurred(x):
    """x [F, H, W], blurred by a Gaussian of BLUR pixels; the outermost pixels are repeated."""
    reach = 3 * BLUR
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1.0, dtype=x.dtype, device=x.device) / BLUR).square())
    kernel, x = kernel / kernel.sum(), F.pad(x[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, kernel[None, None, :, None]), kernel[None, None, None])[:, 0]


def sizes(shape):
    """[(size of the picture, size of its patches)] by which pictures [C, H, W] are read: PATCHES, which fit in; none is
    smaller than 3 x 3."""
    longer, found = max(shape[1:]), []
    for part, patch in PATCHES:
        side = min(longer, LONGEST) // part
        size = tuple(max(1, round(n * side / longer)) for n in shape[1:])
        found.append((size, min(patch, (min(size) - 1) // 2 * 2 + 1)))
    return [one for one in dict.fromkeys(found) if one[1] >= 3]


class Maps(torch.nn.Module):
    """Maps of pictures. Buffers: filters0, filters1… (as many as there are `sizes`), mean and deviation [F, H, W] of
    the fields of the training images; `Maps(**maps.state_dict())` is it again."""

    def __init__(self, **buffers):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32))

    @classmethod
    def fit(cls, model, images):
        """To training images, uint8 [N, C, H, W], of which the first FITTED count."""
        images = images[:FITTED]
        filters = {f"filters{i}": whitening(log_picture(images, size), p)
                   for i, (size, p) in enumerate(sizes(images.shape[1:]))}
        device = model.log_gamma.device
        new, total, squares = cls(**filters).to(device), 0, 0
        for part in images.split(100):
            fields = new.fields(model, part).double()
            total, squares = total + fields.sum(0), squares + fields.square().sum(0)
        n = len(images)
        mean = blurred(total / n)
        variance = (blurred(squares / n) - mean.square()).clamp(min=0)  # also that of neighbouring places
        whole = mean.mean((1, 2), keepdim=True)
        spread = (variance + (mean - whole).square()).mean((1, 2), keepdim=True)
        return cls(**filters, mean=(n * mean + PRIOR * whole) / (n + PRIOR),
                   deviation=((n * variance + PRIOR * spread) / (n + PRIOR)).sqrt() + 1e-3).to(device)

    @torch.inference_mode()
    @exact_convolutions
    def fields(self, model, images):
        """The log energies of uint8 images [N, C, H, W], by place [N, F, H, W]."""
        shape = images.shape[2:]
        residual = residuals(model, images).square().mean(1, keepdim=True)
        near = F.avg_pool2d(residual, WINDOW, 1, WINDOW // 2, count_include_pad=False)
        found, images = [(near + QUANTISATION).log()], images.to(near.device)
        for i, (size, _) in enumerate(sizes(images.shape[1:])):
            field = log_energy(log_picture(images, size), getattr(self, f"filters{i}"))
            found.append(field if size == shape else F.interpolate(field, shape, mode="bilinear"))
        return torch.cat(found, 1)

    @torch.inference_mode()
    def forward(self, model, images):
        """The maps of uint8 images [N, C, H, W], float32 [N, H, W], on the CPU: the 4-norm over the fields of how many
        standard deviations they lie above the mean, or half of how many below."""
        out = []
        for part in images.split(100):
            z = (self.fields(model, part) - self.mean) / self.deviation
            out.append(torch.where(z > 0, z, LOW * z).norm(4, dim=1).cpu())
        return torch.cat(out)


def threshold(peaks, groups, fpr):
    """What the maps of at most a share `fpr` of ordinary pictures exceed anywhere, from the largest values [n] of the
    maps of pictures that calibrate, of `groups` [n]: that of the conformal p-value. Infinite where these show too few
    things for so small a rate."""
    values = np.unique(peaks)
    p = conformal_p_values((peaks, groups, np.nextafter(values, np.inf)))
    return float(values[p <= fpr + 1e-9].min(initial=np.inf))
