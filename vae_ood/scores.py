"""Outlier scores: larger = more outlying. SCORES says by name what each reads of an image's `Features`, and what turns
that into a number; a new one joins by its entry there.

The scores that are fitted see inliers alone. What `default` combines, and how, was settled on the outlier sets that
results/detection.md marks as development; no other outlier has chosen a constant here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vae_ood.densities import ECOD, Gaussian, Mixture, Tail, Typicality
from vae_ood.features import Part
from vae_ood.parallel import from_first

COMPONENTS = "residual_spectrum", "residual_regions", "likelihood_path", "latents", "joint"  # of `default`


def read(features, names):
    """Some features side by side, float64 [N, D]."""
    return torch.cat([torch.as_tensor(features[name]).double().reshape(len(features[name]), -1) for name in names], 1)


def of_pictures(values, features, by=np.max):
    """The values of pictures [N, ...] from those of their tiles [N x tiles, ...], by default the largest."""
    return values if features.tiles == 1 else by(values.reshape(-1, features.tiles, *values.shape[1:]), 1)


class Fitted(torch.nn.Module):
    """A score, fitted: features -> scores [N], by a density or a function of what it reads."""

    def __init__(self, reads, density):
        super().__init__()
        self.reads, self.density = reads, density

    def forward(self, features):
        return of_pictures(self.density(read(features, self.reads)).numpy(), features)

    def said(self, name, features):
        """{name: scores [N]}: the score's own, and its components' as name.component."""
        return {name: self(features)}


class Combined(torch.nn.Module):
    """`default`, fitted: its components, and the tails of what they say of inliers."""

    def __init__(self, components, tails):
        super().__init__()
        self.components, self.tails = torch.nn.ModuleList(components), torch.nn.ModuleList(tails)

    @classmethod
    def fit(cls, train):
        kept = every_fifth(train["groups"])
        components = [SCORES[name].fit(Part(train, ~kept)) for name in COMPONENTS]
        return cls(components, [Tail.fit(torch.from_numpy(component(Part(train, kept)))) for component in components])

    def forward(self, features):
        return self.said("", features)[""]

    def whitened(self, features):
        """What `joint` reads, in its whitened coordinates [N, D], float32."""
        joint = self.components[COMPONENTS.index("joint")]
        return of_pictures(joint.density.whitened(read(features, joint.reads)).float().numpy(), features, np.mean)

    def said(self, name, features):
        """{name: scores [N]}: the score's own, and its components' as name.component."""
        parts = [component(features) for component in self.components]
        return {name: self.surprises(parts).norm(4, dim=0).numpy()} | {
            f"{name}.{component}": part for component, part in zip(COMPONENTS, parts, strict=True)}

    def surprises(self, parts):
        """-log p [C, N] of the components' scores [C][N]."""
        return torch.stack([tail(torch.from_numpy(part)) for part, tail in zip(parts, self.tails, strict=True)])


def every_fifth(groups):
    """Which of the training images [N] belong to every fifth thing, or are every fifth where things are few."""
    things = np.unique(groups, return_inverse=True)[1]
    return (things if things.max() > 8 else np.arange(len(things))) % 5 == 1


@dataclass(frozen=True)
class Score:
    """What a score is about, the features that it reads, and the density that is fitted to them, or the function of
    them, that gives it. A control sees no model."""

    about: str
    reads: tuple[str, ...]
    by: type | Callable
    control: bool = False

    def fit(self, train):
        """The function from images' features to their scores [N], float64, fitted to training images' features."""
        if self.by is Combined:
            return Combined.fit(train)
        if not isinstance(self.by, type):
            return Fitted(self.reads, self.by)
        x = read(train, self.reads)  # by all workers
        return Fitted(self.reads, self.by(**from_first(lambda: self.by.fit(x.to(train.device)).cpu().state_dict())))

    def restore(self, state):
        """What `fit` gave, from its state_dict."""
        if self.by is Combined:
            return Combined([SCORES[name].restore(under(state, f"components.{i}."))
                             for i, name in enumerate(COMPONENTS)],
                            [Tail(**under(state, f"tails.{i}.")) for i in range(len(COMPONENTS))])
        return Fitted(self.reads, self.by(**under(state, "density.")) if isinstance(self.by, type) else self.by)


def under(state, prefix):
    """The entries of a state_dict below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def value(x):
    """The one feature that is read."""
    return x[:, 0]


SPECTRUM, REGIONS = ("residual_spectrum", "path"), ("residual_regions", "residual_fine")
LATENTS, JOINT = ("mu", "log_sigma"), ("residual_spectrum", "residual_regions", "image_spectrum", "image_regions",
                                       "path", "mu", "log_sigma")
SCORES = {
    "default": Score(
        """The score to use without thinking: the 4-norm of the surprises -log p of COMPONENTS, fitted on four fifths of
        the training images, with p from the others.

        Fisher's sum of -log p is best where all see an outlier, the largest of them where one does; a norm between the
        two loses little to either, so that neither low-level statistics nor latent ones drown the other. It is not a
        p-value itself: eval.py calibrates it on inliers that it has not seen, which keeps the false-alarm rate.""",
        tuple(dict.fromkeys((*SPECTRUM, *REGIONS, *JOINT))), Combined),
    "nll": Score("The negative ELBO in nats (paper, section 4), averaged over the samples of z.", ("nll",), value),
    "iw_nll": Score(
        "The importance-weighted NLL in nats (arXiv 1509.00519), a tighter bound of -log p(x).", ("iw_nll",), value),
    "typicality": Score(
        """How far the negative ELBO lies from the training images' mean, in nats, either side (arXiv 1906.02994, for
        one image at a time).""", ("nll",), Typicality),
    "complexity": Score(
        "The negative ELBO in bits less the length of a lossless code (arXiv 1909.11480).", ("nll", "code_bits"),
        lambda x: x[:, 0] / math.log(2) - x[:, 1]),
    "likelihood_path": Score(
        """The statistics on the way to the likelihood, the log norms of x - mu_x, mu_z and sigma_z (arXiv 2401.04933),
        by ECOD's tail probabilities (arXiv 2201.00382).""", ("path",), ECOD),
    "likelihood_path_gaussian": Score(
        "The same statistics, by their squared Mahalanobis distance from the training images'.", ("path",), Gaussian),
    "residual_spectrum": Score(
        """The squared Mahalanobis distance of the residual's log energies in bands and colours, with the norms of
        `likelihood_path`. The decoder's noise model says that x - mu_x is white; the inliers' is not, but its energies
        are concentrated, and the distance is two-sided.""", SPECTRUM, Gaussian),
    "residual_regions": Score(
        """The squared Mahalanobis distance of the residual's log energies in the regions of an image, as it is and
        high-passed: the decoder's noise model says that they are gamma everywhere. Inliers' are not, but the quietest
        regions are about as quiet in all of them, which is where noise shows that a busy image's spectrum hides.""",
        REGIONS, Gaussian),
    "latents": Score(
        """The negative log density of (mu_z, log sigma_z) under a mixture of Gaussians: the aggregate posterior, which
        the prior in the ELBO describes badly (arXiv 1903.05789).""", LATENTS, Mixture),
    "joint": Score(
        """The negative log density of spectra and regional energies of residual and image, norms, mu_z and log sigma_z
        under one mixture of Gaussians: it sees what is unlikely only together.""", JOINT, Mixture),
    "regret": Score(
        """Likelihood regret (arXiv 2003.02977) in nats: what the ELBO gains when q(z|x)'s own mu and log sigma are
        optimised for each image, from the encoder's, the decoder fixed.""", ("regret",), value),
    "image_spectrum": Score(
        "Control, without a VAE: the image's own spectrum with the same fit as `residual_spectrum`.",
        ("image_spectrum",), Gaussian, control=True),
    "code_length": Score(
        "Control, without a VAE: minus the bits of a lossless code, so that simple images score high.", ("code_bits",),
        lambda x: -x[:, 0], control=True),
    "pixel_moments": Score(
        "Control, without a VAE: the squared Mahalanobis distance of the pixels' mean and log variance.", ("pixels",),
        Gaussian, control=True)}
CONTROLS = tuple(name for name, score in SCORES.items() if score.control)
