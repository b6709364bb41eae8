"""What the scores read of images: norms, spectra, regions, layout, edges, codes, and what a model says of them.

The first part are pure functions of tensors; `Features` computes them and the model's statistics by name.
"""

import functools
import io
import math
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from vae_ood.data.images import DEQUANTISATION, FILTERING, REGRET, generator, share, to_unit
from vae_ood.kernels.iw_nll import log_normal
from vae_ood.kernels.reparameterize import reparameterize
from vae_ood.likelihood import chunk_size, exact_convolutions
from vae_ood.parallel import spread

QUANTISATION = 1 / 255**2 / 12  # the variance of rounding to 8 bits: no energy is told apart below it
REGRET_STEPS, REGRET_LR, REGRET_SAMPLES = 50, 0.03, 8  # 76.8 nats gained by CIFAR-10's test images at alpha = 1/4;
# twice the steps gain 77.9 at best, half of them 73.1
SIDE = 32  # pixels: where things lie is read of a picture scaled down to it
FILTERS, CELLS = 64, 4  # random filters, whose energies are read in CELLS x CELLS cells
LAYOUT = FILTERS * CELLS**2


def dct_matrix(n):
    """The orthonormal DCT-II [n, n]."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (i + 0.5) * k / n) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def opponent(x):
    """RGB [N, 3, H, W] in opponent colours: gray, red - green, yellow - blue, orthonormal; others as they are."""
    if x.shape[1] != 3:
        return x
    colours = F.normalize(torch.tensor([[1.0, 1, 1], [1, -1, 0], [0.5, 0.5, -1]], device=x.device))
    return (colours @ x.flatten(2)).unflatten(2, x.shape[2:])


def band_log_energies(x):
    """x [N, C, H, W], in `opponent` colours -> the log of its mean squared DCT coefficient in nine radial bands of each
    [N, 9 C].

    The bands' edges are 1.6^-k, k = 0 to 7, of the frequency that a row or column can carry at most, so the last band
    is the corner beyond it, where natural images have the least energy; empty ones (of tiny images) are left out.
    """
    h, w = x.shape[2:]
    energy = (dct_matrix(h).to(x) @ x @ dct_matrix(w).to(x).T).square().flatten(2)
    radius = (torch.arange(h)[:, None].div(h).square() + torch.arange(w).div(w).square()).sqrt().flatten()
    band = torch.bucketize(radius, torch.tensor([1.6**-k for k in range(7, -1, -1)]), right=True)
    member = F.one_hot(band, 9).float()
    member = member[:, member.any(0)]
    return (energy @ (member / member.sum(0)).to(x) + QUANTISATION).log().flatten(1)


def region_log_energies(x):
    """x [N, C, H, W], in `opponent` colours -> quantiles over the image of the log mean squares of its blocks of 4 x 4
    pixels, in each [N, 7 C]: how quiet its quietest and how busy its busiest regions are, wherever they lie."""
    h, w = x.shape[2:]
    energy = F.avg_pool2d(x.square(), (min(4, h), min(4, w)), ceil_mode=True).flatten(2)
    # numpy sorts short rows ten times as fast as torch, which keeps indices; on a GPU torch does
    ordered = energy.sort(2)[0] if energy.is_cuda else torch.from_numpy(np.sort(energy.numpy(), 2))
    place = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], device=x.device) * (ordered.shape[2] - 1)
    below, above = ((ordered[:, :, i.long()] + QUANTISATION).log() for i in (place.floor(), place.ceil()))
    return torch.lerp(below, above, place.frac()).flatten(1)


def high_pass(x):
    """x [N, C, H, W] less what is smooth, by the difference of two Laplacians with which Immerkaer measures noise
    (doi 10.1006/cviu.1996.0060), scaled to leave white noise its variance; the outermost pixels are repeated."""
    return F.pad(x, (1, 1, 1, 1), mode="replicate").diff(2, dim=2).diff(2, dim=3) / 6


def cell_log_energies(x):
    """x [N, C, H, W] -> the log mean squares of the gray image, high-passed, in 8 x 8 and in 16 x 16 cells [N, 320]."""
    energy = high_pass(x.mean(1, keepdim=True)).square()
    return torch.cat([(F.adaptive_avg_pool2d(energy, k) + QUANTISATION).log().flatten(1) for k in (8, 16)], 1)


def scaled_down(x):
    """x [N, C, H, W], the larger side at most SIDE."""
    shrink = SIDE / max(x.shape[2:])
    if shrink >= 1:
        return x
    size = [max(1, round(side * shrink)) for side in x.shape[2:]]
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


@functools.cache
def random_filters(channels):
    """FILTERS filters [FILTERS, C, 5, 5] of normal weights, always the same."""
    weights = generator(0, FILTERING).standard_normal((FILTERS, channels, 5, 5), np.float32)
    return torch.from_numpy(weights / math.sqrt(25 * channels))


def layout_log_energies(x):
    """x [N, C, H, W] in [0, 1] -> the log mean squares of FILTERS random filters in CELLS x CELLS cells of each, less
    their mean [N, LAYOUT]: what lies where, however strong the contrast. A random filter's energy is a random quadratic
    form of a cell's colours and edges, of which so many leave little out."""
    response = F.conv2d(scaled_down(x), random_filters(x.shape[1]).to(x.device), stride=2, padding=2)
    energy = (F.adaptive_avg_pool2d(response.square(), CELLS) + 1e-6).log().flatten(1)
    return energy - energy.mean(1, keepdim=True)


def edge_log_ratios(x):
    """x [N, C, H, W], in `opponent` colours -> how far the straightest edge stands out [N, 4]: the log of the largest
    ratio of a line's mean step to that of the lines beside it, of lines down and across, half and a quarter as long as
    the picture. A ratio does not see contrast; a blurred edge is one of many like it."""
    found = []
    for turned in (x, x.transpose(2, 3)):
        steps = turned.diff(dim=3).abs().mean(1) if turned.shape[3] > 1 else torch.zeros_like(turned[:, 0])
        for part in (2, 4):
            length = max(1, steps.shape[1] // part)
            sums = F.pad(steps.cumsum(1), (0, 0, 1, 0))
            line = (sums[:, length:] - sums[:, :-length]) / length + 0.01  # the steps of rounding do not count
            beside = F.pad(line, (1, 1), mode="replicate")
            found.append((line / torch.maximum(beside[..., :-2], beside[..., 2:])).flatten(1).amax(1))
    return torch.stack(found, 1).log()


def zlib_bits(image):
    """The bits of a uint8 image [C, H, W] as PNG would code it: red and blue less green, each pixel less Paeth's
    prediction from its neighbours, deflate."""
    image = image.astype(np.int16)
    if len(image) == 3:
        image = np.stack([image[0] - image[1], image[1], image[2] - image[1]])
    padded = np.pad(image, ((0, 0), (1, 0), (1, 0)))
    left, up, corner = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]
    of_left, of_up, of_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    guess = np.where((of_left <= of_up) & (of_left <= of_corner), left, np.where(of_up <= of_corner, up, corner))
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED)
    return 8 * (len(deflate.compress((image - guess).astype(np.uint8).tobytes())) + len(deflate.flush()))


def webp_bits(image):
    """The bits of a uint8 image [C, H, W] as lossless WebP, by Pillow."""
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0) if len(image) == 3 else image[0]).save(
        file, "WEBP", lossless=True, quality=50, method=4)
    return 8 * len(file.getvalue())


def code():
    """The lossless code there is: `webp_bits` where Pillow with WebP is installed, else `zlib_bits`."""
    try:
        from PIL import features
    except ImportError:
        return zlib_bits
    return webp_bits if features.check("webp") else zlib_bits


# ---- by name -----------------------------------------------------------------------------------------------------

class Features:
    """What the scores read of uint8 images [N, C, H, W] under a model, by name, each computed when first asked for, by
    all workers.

    `dequantized`: (seed, number of the first image) of the noise that a model trained with --dequantize sees, or None.
    groups [N]: equal for images of one thing, by default each is one. `tiles`: of so many images in a row each picture
    consists (data/tiles.py), whose scores are one.
    images: themselves. nll, iw_nll [N]: nats, of `likelihoods()`, which returns what `likelihood.evaluate` does, of
    training images perhaps for the first ones alone. mu, log_sigma [N, kappa].
    path [N, 3]: log norms of the residual x - mu_x(mu_z), of mu_z and of sigma_z. residual_spectrum, image_spectrum
    [N, bands x colours]: `band_log_energies`. residual_regions, image_regions, and residual_fine, of the high-passed
    residual [N, 7 x colours]: `region_log_energies`. layout [N, LAYOUT]: `layout_log_energies`. edges [N, 4]:
    `edge_log_ratios`. cells [N, 320]: `cell_log_energies`. pixels [N, 2]: mean, log variance. contrast [N]: the log of
    the largest less the smallest value. code_bits [N]. regret [N], nats.
    """

    def __init__(self, model, images, likelihoods, groups=None, dequantized=None, tiles=1):
        self.model, self.images, self.likelihoods, self.known, self.tiles = model, images, likelihoods, {}, tiles
        self.device = model.log_gamma.device
        self.known["groups"], self.dequantized = np.arange(len(images)) if groups is None else groups, dequantized

    def __getitem__(self, name):
        if name == "images":
            return self.images
        if name in LIKELIHOODS:
            return self.likelihoods()[name]
        if name not in self.known:
            produce = next(producer for names, producer in PRODUCERS.items() if name in names)
            self.known |= spread(lambda part: produce(self.model, share(self.images, part), self.dequantized and (
                self.dequantized[0], self.dequantized[1] + part.start)), len(self.images))
        return self.known[name]


class Part:
    """Some rows of features."""

    tiles = 1

    def __init__(self, whole, rows):
        self.whole, self.rows, self.device = whole, rows, whole.device

    def __getitem__(self, name):
        values = self.whole[name]
        if name != "images":
            return values[self.rows]
        rows = np.arange(len(values))[self.rows]
        return values[torch.from_numpy(rows)] if isinstance(values, torch.Tensor) else values.take(rows)


def of_pictures(values, features, by=np.max):
    """The values of pictures [N, ...] from those of their tiles [N x tiles, ...], by default the largest."""
    return values if features.tiles == 1 else by(values.reshape(-1, features.tiles, *values.shape[1:]), 1)


def _batches(model, images, dequantized=None):
    """The images in batches that the decoder can take at once, in [0, 1], on the model's device."""
    first = 0
    for part in images.split(min(500, chunk_size(model))):
        x = part.to(model.log_gamma.device).contiguous(memory_format=torch.channels_last)
        uniform = None
        if dequantized:
            seed, number = dequantized
            rows = range(number + first, number + first + len(x))
            uniform = torch.from_numpy(np.stack([generator(seed, DEQUANTISATION, i).random(x.shape[1:], np.float32)
                                                 for i in rows])).to(x.device)
        yield to_unit(x, uniform)
        first += len(x)


def _decode(model, z):
    """The mean of p(x|z)."""
    return model.decode(z).sigmoid() if model.logits else model.decode(z)


@torch.inference_mode()
@exact_convolutions
def decoded_means(model, images):
    """The reconstructions mu_x(mu_z) of uint8 images [N, C, H, W], uint8 [N, H, W, C]."""
    means = [_decode(model, model.encode(x)[0]) for x in _batches(model, images)]
    return (255 * torch.cat(means)).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
@exact_convolutions
def residuals(model, images):
    """x - mu_x(mu_z) of uint8 images [N, C, H, W], float32, on the model's device."""
    return torch.cat([x - _decode(model, model.encode(x)[0]) for x in _batches(model, images)])


def _gather(parts):
    """Lists of tensors as arrays: float32, as `layout` of many tiles takes gigabytes."""
    return {name: torch.cat(list(values)).cpu().numpy() for name, values in parts.items()}


ENCODED = ("mu", "log_sigma", "path", "residual_spectrum", "residual_regions", "residual_fine")


@torch.inference_mode()
@exact_convolutions
def _encoded(model, images, dequantized):
    out = {name: [] for name in ENCODED}
    for x in _batches(model, images, dequantized):
        mu, log_sigma = model.encode(x)
        residual = x - _decode(model, mu)
        colours = opponent(residual)
        norms = (colours.flatten(1).norm(dim=1), mu.norm(dim=1), log_sigma.exp().norm(dim=1))
        for name, value in zip(ENCODED, (
                mu, log_sigma, torch.stack(norms, 1).clamp(min=1e-6).log(), band_log_energies(colours),
                region_log_energies(colours), region_log_energies(high_pass(colours))), strict=True):
            out[name].append(value)
    return _gather(out)


OF_PIXELS = ("image_spectrum", "image_regions", "layout", "edges", "pixels", "contrast")


@torch.inference_mode()
@exact_convolutions
def _of_pixels(model, images, _):
    out = {name: [] for name in OF_PIXELS}
    for x in _batches(model, images):
        colours, flat = opponent(x), x.contiguous().flatten(1)
        mean = flat.mean(1)
        # torch's own variance takes three times as long
        variance = (flat - mean[:, None]).square().sum(1) / max(1, flat.shape[1] - 1)
        for name, value in zip(OF_PIXELS, (
                band_log_energies(colours), region_log_energies(colours), layout_log_energies(x),
                edge_log_ratios(colours), torch.stack([mean, (variance + QUANTISATION).log()], 1),
                (flat.amax(1) - flat.amin(1)).clamp(min=1 / 255).log()), strict=True):
            out[name].append(value)
    return _gather(out)


@torch.inference_mode()
def _cells(model, images, _):
    return _gather({"cells": map(cell_log_energies, _batches(model, images))})


def _code_bits(model, images, _):
    with ThreadPoolExecutor() as pool:  # both codes let go of Python's lock
        return {"code_bits": np.array([bits for part in images.split(500)
                                       for bits in pool.map(code(), part.numpy())], float)}


@exact_convolutions
def _regret(model, images, dequantized):
    """All images of a batch at once: their losses share nothing but the noise of a step."""
    d, out = math.prod(model.shape), []
    noise = generator(0, REGRET).standard_normal((REGRET_STEPS + REGRET_SAMPLES, model.kappa), np.float32)
    noise = torch.from_numpy(noise).to(model.log_gamma.device)
    log_gamma = model.log_gamma.detach()

    def nelbo(x, mu, log_sigma, eps):
        z, kl = reparameterize(mu, log_sigma, eps.expand_as(mu).contiguous())
        error = (x - _decode(model, z)).square().flatten(1).sum(1)
        return kl - log_normal(error, d, log_gamma)

    for x in _batches(model, images, dequantized):
        with torch.no_grad():
            start = model.encode(x)
        posterior = [t.clone().requires_grad_() for t in start]
        optimizer = torch.optim.Adam(posterior, lr=REGRET_LR)
        for eps in noise[:REGRET_STEPS]:
            loss = nelbo(x, *posterior, eps).sum()
            for parameter, gradient in zip(posterior, torch.autograd.grad(loss, posterior), strict=True):
                parameter.grad = gradient  # and none of the model's own parameters'
            optimizer.step()
        with torch.no_grad():
            out.append(sum(nelbo(x, *start, eps) - nelbo(x, *posterior, eps) for eps in noise[REGRET_STEPS:])
                       / REGRET_SAMPLES)
    return _gather({"regret": out})


LIKELIHOODS = "nll", "iw_nll"
DECODED_OFTEN = *LIKELIHOODS, "regret"  # once for each sample or step; the others once
PRODUCERS = {ENCODED: _encoded, OF_PIXELS: _of_pixels, ("cells",): _cells, ("code_bits",): _code_bits,
             ("regret",): _regret}
