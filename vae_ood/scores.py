"""Outlier scores: larger = more outlying. A score is a function of the training images' features that returns another,
from any images' features to their scores [N]; a new one joins by its entry in SCORES.

The scores that are fitted see inliers alone. What `default` combines, and how, was settled on the outlier sets that
results/detection.md marks as development; no other outlier has chosen a constant here.
"""

import io
import math
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from kernels.iw_nll import log_normal
from kernels.reparameterize import reparameterize
from vae_ood.data.images import DEQUANTISATION, REGRET, generator, to_unit
from vae_ood.likelihood import chunk_size, exact_convolutions
from vae_ood.parallel import spread

QUANTISATION = 1 / 255**2 / 12  # the variance of rounding to 8 bits: no energy is told apart below it
REGRET_STEPS, REGRET_LR, REGRET_SAMPLES = 50, 0.03, 8  # 76.8 nats gained by CIFAR-10's test images at alpha = 1/4;
# twice the steps gain 77.9 at best, half of them 73.1


class Features:
    """What the scores read of uint8 images [N, C, H, W] under a model, by name, each computed when first asked for, by
    all workers.

    `dequantized`: (seed, number of the first image) of the noise that a model trained with --dequantize sees, or None.
    groups [N]: equal for images of one thing, by default each is one.
    nll, iw_nll [N]: nats, of `likelihoods()`, which returns what `likelihood.evaluate` does, of training images perhaps
    for the first ones alone. mu, log_sigma [N, kappa].
    path [N, 3]: log norms of the residual x - mu_x(mu_z), of mu_z and of sigma_z. residual_spectrum, image_spectrum
    [N, bands x colours]: `band_log_energies`. residual_regions, image_regions, and residual_fine, of the high-passed
    residual [N, 7 x colours]: `region_log_energies`. pixels [N, 2]: mean, log variance. code_bits [N]. regret [N],
    nats.
    """

    def __init__(self, model, images, likelihoods, groups=None, dequantized=None):
        self.model, self.images, self.likelihoods, self.known = model, images, likelihoods, {}
        self.known["groups"], self.dequantized = np.arange(len(images)) if groups is None else groups, dequantized

    def __getitem__(self, name):
        if name in ("nll", "iw_nll"):
            return self.likelihoods()[name]
        if name not in self.known:
            produce = next(producer for names, producer in PRODUCERS.items() if name in names)
            self.known |= spread(lambda part: produce(self.model, self.images[part], self.dequantized and (
                self.dequantized[0], self.dequantized[1] + part.start)), len(self.images))
        return self.known[name]


class Part:
    """Some rows of Features."""

    def __init__(self, whole, rows):
        self.whole, self.rows = whole, rows

    def __getitem__(self, name):
        return self.whole[name][self.rows]


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


def _gather(parts):
    """Lists of tensors as float64 arrays."""
    return {name: torch.cat(list(values)).cpu().double().numpy() for name, values in parts.items()}


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
    return torch.einsum("oc,nchw->nohw", colours, x)


def band_log_energies(x):
    """x [N, C, H, W] -> the log of its mean squared DCT coefficient in nine radial bands of each colour [N, 9 C].

    The bands' edges are 1.6^-k, k = 0 to 7, of the frequency that a row or column can carry at most, so the last band
    is the corner beyond it, where natural images have the least energy; empty ones (of tiny images) are left out. The
    colours are `opponent`.
    """
    h, w = x.shape[2:]
    energy = (dct_matrix(h).to(x) @ opponent(x) @ dct_matrix(w).to(x).T).square().flatten(2)
    radius = (torch.arange(h)[:, None].div(h).square() + torch.arange(w).div(w).square()).sqrt().flatten()
    band = torch.bucketize(radius, torch.tensor([1.6**-k for k in range(7, -1, -1)]), right=True)
    member = F.one_hot(band, 9).float()
    member = member[:, member.any(0)]
    return (energy @ (member / member.sum(0)).to(x) + QUANTISATION).log().flatten(1)


def region_log_energies(x):
    """x [N, C, H, W] -> quantiles over the image of the log mean squares of its blocks of 4 x 4 pixels, in each
    `opponent` colour [N, 7 C]: how quiet its quietest and how busy its busiest regions are, wherever they lie."""
    h, w = x.shape[2:]
    energy = F.avg_pool2d(opponent(x).square(), (min(4, h), min(4, w)), ceil_mode=True)
    quantiles = torch.tensor([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1], device=x.device)
    return (energy.flatten(2) + QUANTISATION).log().quantile(quantiles, 2).movedim(0, 2).flatten(1)


def high_pass(x):
    """x [N, C, H, W] less what is smooth, by the difference of two Laplacians with which Immerkaer measures noise
    (doi 10.1006/cviu.1996.0060), scaled to leave white noise its variance; the outermost pixels are repeated."""
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], device=x.device) / 6
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


ENCODED = ("mu", "log_sigma", "path", "residual_spectrum", "residual_regions", "residual_fine")


@torch.inference_mode()
@exact_convolutions
def _encoded(model, images, dequantized):
    out = {name: [] for name in ENCODED}
    for x in _batches(model, images, dequantized):
        mu, log_sigma = model.encode(x)
        residual = x - _decode(model, mu)
        norms = (residual.flatten(1).norm(dim=1), mu.norm(dim=1), log_sigma.exp().norm(dim=1))
        for name, value in zip(ENCODED, (
                mu, log_sigma, torch.stack(norms, 1).clamp(min=1e-6).log(), band_log_energies(residual),
                region_log_energies(residual), region_log_energies(high_pass(residual))), strict=True):
            out[name].append(value)
    return _gather(out)


def _of_pixels(model, images, _):
    out = {"image_spectrum": [], "image_regions": [], "pixels": []}
    for x in _batches(model, images):
        out["image_spectrum"].append(band_log_energies(x))
        out["image_regions"].append(region_log_energies(x))
        variance, mean = torch.var_mean(x.flatten(1), 1)
        out["pixels"].append(torch.stack([mean, (variance + QUANTISATION).log()], 1))
    return _gather(out)


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


def _code_bits(model, images, _):
    with ThreadPoolExecutor() as pool:  # both codes let go of Python's lock
        return {"code_bits": np.array(list(pool.map(code(), images.numpy())), float)}


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


PRODUCERS = {ENCODED: _encoded, ("image_spectrum", "image_regions", "pixels"): _of_pixels,
             ("code_bits",): _code_bits, ("regret",): _regret}


# ---- what is fitted to the inliers -------------------------------------------------------------------------------

def stack(features, *names):
    """Some features side by side [N, D]."""
    return np.concatenate([features[name] for name in names], 1)


def shrunk_covariance(x):
    """The covariance [D, D] of x [N, D] around 0, shrunk towards a multiple of I by the oracle-approximating weight
    (arXiv 0907.4698, equation 23) and then, by a little, towards I, so that it can be inverted however few images there
    are, and however alike."""
    n, d = x.shape
    covariance = x.T @ x / n
    trace, squares = covariance.trace(), covariance.square().sum()
    spread = (n + 1 - 2 / d) * (squares - trace**2 / d)
    weight = min(1.0, float(((1 - 2 / d) * squares + trace**2) / spread)) if spread > 0 else 1.0
    return (1 - weight) * covariance + (weight * trace / d + 1e-9) * torch.eye(d, dtype=x.dtype)


def whitener(x):
    """The function that centres, scales and decorrelates rows as x [N, D] asks for, in float64 tensors."""
    x = torch.as_tensor(x)
    mean, scale = x.mean(0), x.std(0, correction=0) + 1e-6
    factor = _inverse_factor(shrunk_covariance((x - mean) / scale))
    return lambda y: (torch.as_tensor(y) - mean) / scale @ factor


def _inverse_factor(covariance):
    """T with T T' = the inverse of the covariance."""
    lower = torch.linalg.cholesky(covariance)
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False).T


def gaussian(x):
    """The squared Mahalanobis distance from x [N, D], as a function from [M, D] to [M]."""
    whiten = whitener(x)
    return lambda y: whiten(y).square().sum(1).numpy()


def mixture(x, components=10, steps=50, seed=0):
    """The negative log density [M] of y [M, D] under a mixture of Gaussians fitted to x [N, D] by expectation
    maximisation, up to a constant.

    It runs in whitened coordinates, from the clusters of k-means. Each covariance has the prior weight of D images of
    covariance I, the whole set's; there are fewer components where a component would have less than 4 D images.
    """
    whiten = whitener(x)
    z = whiten(x)
    n, d = z.shape
    k = max(1, min(components, n // (4 * d)))
    centres = z[torch.from_numpy(np.random.default_rng(seed).permutation(n)[:k])]
    for _ in range(10):
        nearest = torch.cdist(z, centres).argmin(1)
        centres = torch.stack([z[nearest == j].mean(0) if (nearest == j).any() else centres[j] for j in range(k)])
    share, eye, before = F.one_hot(nearest, k).double(), torch.eye(d, dtype=z.dtype), -math.inf

    def log_joint(z):
        return torch.stack([weight.log() + factor.diagonal().log().sum() - 0.5 * ((z - mean) @ factor).square().sum(1)
                            for weight, mean, factor in zip(weights, means, factors, strict=True)], 1)

    for _ in range(steps):
        count = share.sum(0)
        weights, means = (count + 1) / (n + k), share.T @ z / count.clamp(min=1e-9)[:, None]
        factors = []
        for j in range(k):
            centred = z - means[j]
            scatter = (centred * share[:, j:j + 1]).T @ centred
            factors.append(_inverse_factor((scatter + d * eye) / (count[j] + d)))
        joint = log_joint(z)
        log_density = joint.logsumexp(1, keepdim=True)
        share, mean = (joint - log_density).exp(), log_density.mean().item()
        if mean - before < 1e-3:  # nats an image
            break
        before = mean
    return lambda y: -log_joint(whiten(y)).logsumexp(1).numpy()


def surprise(inliers, tail=0.1):
    """-log p of a score as a function from [M] to [M], where p is the share of `inliers` [N] that score at least as
    high; beyond their largest tenth, a generalised Pareto tail (peaks over threshold), exponential or heavier, by the
    probability-weighted moments of Hosking and Wallis (doi 10.1080/00401706.1987.10488243)."""
    inliers = np.sort(inliers)
    threshold = np.quantile(inliers, 1 - tail)
    excess = inliers[inliers >= threshold] - threshold
    n, mean = len(excess), max(excess.mean(), 1e-12)
    weighted = (excess * (1 - (np.arange(n) + 0.65) / n)).mean()  # of the excess times the probability beyond it
    shape = np.clip(2 - mean / (mean - 2 * weighted), 1e-9, 0.99)
    scale = mean * (1 - shape)  # the mean of such a tail is scale / (1 - shape)

    def function(scores):
        p = (len(inliers) - np.searchsorted(inliers, scores) + 0.5) / (len(inliers) + 1)
        beyond = np.log1p(shape * np.maximum(scores - threshold, 0) / scale) / shape
        return np.where(scores <= threshold, np.minimum(-np.log(p), -math.log(tail)), -math.log(tail) + beyond)
    return function


# ---- the scores --------------------------------------------------------------------------------------------------

def nll(train):
    """The negative ELBO in nats (paper, section 4), averaged over the samples of z."""
    return lambda features: features["nll"]


def iw_nll(train):
    """The importance-weighted NLL in nats (arXiv 1509.00519), a tighter bound of -log p(x)."""
    return lambda features: features["iw_nll"]


def typicality(train):
    """How far the negative ELBO lies from the training images' mean, in nats, either side (arXiv 1906.02994, for one
    image at a time)."""
    mean = train["nll"].mean()
    return lambda features: abs(features["nll"] - mean)


def complexity(train):
    """The negative ELBO in bits less the length of a lossless code (arXiv 1909.11480)."""
    return lambda features: features["nll"] / math.log(2) - features["code_bits"]


def regret(train):
    """Likelihood regret (arXiv 2003.02977) in nats: what the ELBO gains when q(z|x)'s own mu and log sigma are
    optimised for each image, from the encoder's, the decoder fixed."""
    return lambda features: features["regret"]


def likelihood_path(train):
    """The statistics on the way to the likelihood, the log norms of x - mu_x, mu_z and sigma_z (arXiv 2401.04933), by
    ECOD's tail probabilities (arXiv 2201.00382): the largest of the sums of -log of the left, of the right and of the
    skewer tails' probabilities."""
    path = np.sort(train["path"], 0)
    skewed_left = ((path - path.mean(0)) ** 3).mean(0) < 0

    def function(features):
        left, right = (-np.log(np.stack([(1 + count(column, value)) / (len(path) + 1) for column, value in
                                         zip(path.T, features["path"].T, strict=True)], 1))
                       for count in (lambda c, v: np.searchsorted(c, v, "right"),
                                     lambda c, v: len(c) - np.searchsorted(c, v)))
        return np.max([tails.sum(1) for tails in (left, right, np.where(skewed_left, left, right))], 0)
    return function


def likelihood_path_gaussian(train):
    """The same statistics, by their squared Mahalanobis distance from the training images'."""
    distance = gaussian(train["path"])
    return lambda features: distance(features["path"])


def residual_spectrum(train):
    """The squared Mahalanobis distance of the residual's log energies in bands and colours, with the norms of
    `likelihood_path`. The decoder's noise model says that x - mu_x is white; the inliers' is not, but its energies are
    concentrated, and the distance is two-sided."""
    distance = gaussian(stack(train, "residual_spectrum", "path"))
    return lambda features: distance(stack(features, "residual_spectrum", "path"))


def residual_regions(train):
    """The squared Mahalanobis distance of the residual's log energies in the regions of an image, as it is and
    high-passed: the decoder's noise model says that they are gamma everywhere. Inliers' are not, but the quietest
    regions are about as quiet in all of them, which is where noise shows that a busy image's spectrum hides."""
    distance = gaussian(stack(train, "residual_regions", "residual_fine"))
    return lambda features: distance(stack(features, "residual_regions", "residual_fine"))


def latents(train):
    """The negative log density of (mu_z, log sigma_z) under a mixture of Gaussians: the aggregate posterior, which the
    prior in the ELBO describes badly (arXiv 1903.05789)."""
    density = mixture(stack(train, "mu", "log_sigma"))
    return lambda features: density(stack(features, "mu", "log_sigma"))


def joint(train):
    """The negative log density of spectra and regional energies of residual and image, norms, mu_z and log sigma_z
    under one mixture of Gaussians: it sees what is unlikely only together."""
    names = ("residual_spectrum", "residual_regions", "image_spectrum", "image_regions", "path", "mu", "log_sigma")
    density = mixture(stack(train, *names))
    return lambda features: density(stack(features, *names))


def every_fifth(train):
    """Which of the training images [N] belong to every fifth thing, or are every fifth where things are few."""
    things = np.unique(train["groups"], return_inverse=True)[1]
    return (things if things.max() > 8 else np.arange(len(things))) % 5 == 1


def default(train):
    """The score to use without thinking: the 4-norm of the surprises -log p of `residual_spectrum`, `residual_regions`,
    `likelihood_path`, `latents` and `joint`, fitted on four fifths of the training images, with p from the others.

    Fisher's sum of -log p is best where all see an outlier, the largest of them where one does; a norm between the two
    loses little to either, so that neither low-level statistics nor latent ones drown the other. It is not a p-value
    itself: eval.py calibrates it on the inliers' test images, which keeps the false-alarm rate.
    """
    kept = every_fifth(train)
    scorers = [component(Part(train, ~kept))
               for component in (residual_spectrum, residual_regions, likelihood_path, latents, joint)]
    surprises = [surprise(scorer(Part(train, kept))) for scorer in scorers]
    return lambda features: np.linalg.norm(
        [surprise(scorer(features)) for surprise, scorer in zip(surprises, scorers, strict=True)], 4, axis=0)


def image_spectrum(train):
    """Control, without a VAE: the image's own spectrum with the same fit as `residual_spectrum`."""
    distance = gaussian(train["image_spectrum"])
    return lambda features: distance(features["image_spectrum"])


def code_length(train):
    """Control, without a VAE: minus the bits of a lossless code, so that simple images score high."""
    return lambda features: -features["code_bits"]


def pixel_moments(train):
    """Control, without a VAE: the squared Mahalanobis distance of the pixels' mean and log variance."""
    distance = gaussian(train["pixels"])
    return lambda features: distance(features["pixels"])


DECODED_OFTEN = (nll, iw_nll, typicality, complexity, regret)  # once for each sample or step; the others once
CONTROLS = (image_spectrum, code_length, pixel_moments)
SCORES = {score.__name__: score for score in (
    default, nll, iw_nll, typicality, complexity, likelihood_path, likelihood_path_gaussian, residual_spectrum,
    residual_regions, latents, joint, regret, *CONTROLS)}
