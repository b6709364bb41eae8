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

from vae_ood.densities import ECOD, Gaussian, Halves, Mixture, Projected, Tail, Typicality, under
from vae_ood.features import Part, of_pictures
from vae_ood.parallel import from_first
from vae_ood.patches import LEAST, Patches
from vae_ood.pca import Mahalanobis, Neighbour, Principal, Residual

# The components of `default`, and their shares of the false alarms. What is shown is seldom told by one component
# alone: those that see it in part speak together, and have most. One that sees its outliers far beyond all inliers
# needs but a small share.
SHARES = {("layout", "joint", "image_cells"): 0.7, ("texture",): 0.1, ("noise",): 0.1, ("edges",): 0.05,
          ("contrast",): 0.05}
COMPONENTS = tuple(component for together in SHARES for component in together)
PATCHES, BESIDE = "image_patches", 0.02  # another component, where it holds, and what all others then share


def read(features, names):
    """Some features side by side, float64 [N, D]."""
    return torch.cat([torch.as_tensor(features[name]).double().reshape(len(features[name]), -1) for name in names], 1)


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
    """`default`, fitted: its components, the tails of what they say of inliers, and of the sums of those that speak
    together, and the patches."""

    def __init__(self, components, tails, patches):
        super().__init__()
        self.components, self.tails, self.patches = torch.nn.ModuleDict(components), torch.nn.ModuleDict(tails), patches

    @classmethod
    def fit(cls, train, unseen):
        """The components to features of `train`, the tails to those of `unseen`."""
        components = {name: SCORES[name].fit(train) for name in COMPONENTS}
        said = {name: torch.from_numpy(component(unseen)) for name, component in components.items()}
        tails = {name: Tail.fit(scores) for name, scores in said.items()}
        tails |= {"+".join(names): Tail.fit(sum(tails[name](said[name]) for name in names))
                  for names in SHARES if len(names) > 1}
        return cls(components, tails, Patches.fit(train, unseen))

    @classmethod
    def restore(cls, state):
        """What `fit` gave, from its state_dict."""
        return cls({name: SCORES[name].restore(under(state, f"components.{name}.")) for name in COMPONENTS},
                   {name: Tail(**under(state, f"tails.{name}."))
                    for name in dict.fromkeys((*COMPONENTS, *map("+".join, SHARES)))},
                   Patches.restore(under(state, "patches.")))

    def forward(self, features):
        return self.said("", features)[""]

    def whitened(self, features):
        """What `joint` reads, in its whitened coordinates [N, D], float32."""
        joint = self.components["joint"]
        return of_pictures(joint.density.whitened(read(features, joint.reads)).float().numpy(), features, np.mean)

    def said(self, name, features):
        """{name: scores [N]}: the score's own, and its components' as name.component."""
        parts = {component: fitted(features) for component, fitted in self.components.items()}
        surprises, scores = self.surprises(parts), []
        for names, share in SHARES.items():
            score = sum(surprises[component] for component in names)
            scores.append((self.tails["+".join(names)](score) if len(names) > 1 else score) + math.log(share))
        score = torch.stack(scores).amax(0)
        if self.patches.holds:
            parts[PATCHES] = self.patches(features)
            score = torch.maximum(score + math.log(BESIDE), torch.from_numpy(parts[PATCHES]) + math.log(1 - BESIDE))
        return {name: score.numpy()} | {f"{name}.{component}": part for component, part in parts.items()}

    def surprises(self, parts):
        """{component: -log p [N]} of the components' scores {component: [N]}; those of the patches are surprises."""
        return {component: torch.from_numpy(part) if component == PATCHES
                else self.tails[component](torch.from_numpy(part)) for component, part in parts.items()}


def every_fifth(groups):
    """Which of the training images [N] belong to every fifth thing; or every fifth image, whatever it shows, where
    there are few things, or these have far from a fifth of the images."""
    things = np.unique(groups, return_inverse=True)[1]
    kept = things % 5 == 1
    return kept if things.max() > 8 and 0.1 < kept.mean() < 0.4 else np.arange(len(things)) % 5 == 1


@dataclass(frozen=True)
class Score:
    """What a score is about, the features that it reads, and the density that is fitted to them, or the function of
    them, that gives it. A control sees no model."""

    about: str
    reads: tuple[str, ...]
    by: type | Callable
    control: bool = False

    def fit(self, train, unseen=None):
        """The function from images' features to their scores [N], float64, fitted to training images' features. What
        is judged by images that it was not fitted to takes those of `unseen`, to which the model was not fitted
        either; where these are too few, a fifth of the training images."""
        if isinstance(self.by, type) and issubclass(self.by, Principal):
            return self.by.fit(train)
        if self.by in (Combined, Patches):
            if unseen is None or len(unseen["groups"]) < LEAST:
                kept = every_fifth(train["groups"])
                train, unseen = Part(train, ~kept), Part(train, kept)
            return self.by.fit(train, unseen)
        if not isinstance(self.by, type):
            return Fitted(self.reads, self.by)
        x = read(train, self.reads)  # by all workers
        return Fitted(self.reads, self.by(**from_first(lambda: self.by.fit(x.to(train.device)).cpu().state_dict())))

    def restore(self, state):
        """What `fit` gave, from its state_dict."""
        if hasattr(self.by, "restore"):
            return self.by.restore(state)
        return Fitted(self.reads, self.by(**under(state, "density.")) if isinstance(self.by, type) else self.by)


def value(x):
    """The one feature that is read."""
    return x[:, 0]


JOINT = ("residual_spectrum", "residual_regions", "image_spectrum", "image_regions", "path", "mu", "log_sigma")
SCORES = {
    "default": Score(
        """The score to use without thinking: the largest of its COMPONENTS' surprises -log p, each plus the log of its
        share of the false alarms (SHARES): minus the log of the smallest weighted p (doi 10.1093/biomet/93.3.509).
        Those of one share are summed, and the sum's surprise counts. p comes from images that the components were not
        fitted to (`Score.fit`). Where the training images show the same place by place, as those of parts do
        (`Scale.holds`), the patches are heard too, and all others share BESIDE of the false alarms.

        Equal shares dilute what one component sees: each must stand out from the false alarms of all. It is not a
        p-value itself: eval.py calibrates it on inliers that it has not seen, which keeps the false-alarm rate.""",
        tuple(dict.fromkeys(("images", "layout", "cells", "edges", "contrast", "residual_fine", *JOINT))), Combined),
    "layout": Score(
        """What lies where: the negative log density under a mixture of Gaussians of the principal components of random
        filters' energies by place (`layout_log_energies`), of mu_z and log sigma_z.""",
        ("layout", "mu", "log_sigma"), Projected),
    "texture": Score(
        """The squared Mahalanobis distances of the log energies in bands and colours, of the residual and of the image,
        summed. The decoder's noise model says that x - mu_x is white; the inliers' is not, but its energies are
        concentrated, and the distance is two-sided.""", ("residual_spectrum", "image_spectrum"), Halves),
    "edges": Score(
        """Control, without a VAE: how far the straightest edges stand out (`edge_log_ratios`), by ECOD's tail
        probabilities: what is pasted in, cut off or out of focus.""", ("edges",), ECOD, control=True),
    "contrast": Score(
        """Control, without a VAE: the squared distance of the log of the brightest less the darkest value from its
        mean.""", ("contrast",), Gaussian, control=True),
    "noise": Score(
        """The squared Mahalanobis distance of the residual's log energies in the regions of an image, as it is and
        high-passed: the decoder's noise model says that they are gamma everywhere. Inliers' are not, but the quietest
        regions are about as quiet in all of them, which is where noise shows that a busy image's spectrum hides.""",
        ("residual_regions", "residual_fine"), Gaussian),
    "joint": Score(
        """The negative log density of spectra and regional energies of residual and image, norms, mu_z and log sigma_z
        under one mixture of Gaussians: it sees what is unlikely only together.""", JOINT, Mixture),
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
    "latents": Score(
        """The negative log density of (mu_z, log sigma_z) under a mixture of Gaussians: the aggregate posterior, which
        the prior in the ELBO describes badly (arXiv 1903.05789).""", ("mu", "log_sigma"), Mixture),
    "regret": Score(
        """Likelihood regret (arXiv 2003.02977) in nats: what the ELBO gains when q(z|x)'s own mu and log sigma are
        optimised for each image, from the encoder's, the decoder fixed.""", ("regret",), value),
    PATCHES: Score(
        """Control, without a VAE: how unusual the fine structure of each place is, given that of all others, by
        whitened patches at two sizes (vae_ood/patches.py); for pictures that show the same place by place.""",
        ("images",), Patches, control=True),
    "image_layout": Score(
        "Control, without a VAE: `layout` without the code.", ("layout",), Projected, control=True),
    "image_spectrum": Score(
        "Control, without a VAE: the squared Mahalanobis distance of the image's log energies in bands and colours.",
        ("image_spectrum",), Gaussian, control=True),
    "image_cells": Score(
        """Control, without a VAE: the squared Mahalanobis distance of the high-passed gray image's log energies in
        8 x 8 and 16 x 16 cells.""", ("cells",), Gaussian, control=True),
    "pca": Score(
        "Control, without a VAE: the squared Mahalanobis distance in 32 principal components of the pixels.",
        ("images",), Mahalanobis, control=True),
    "pca_residual": Score(
        "Control, without a VAE: the squared distance from what 100 principal components of the pixels can show.",
        ("images",), Residual, control=True),
    "knn": Score(
        """Control, without a VAE: the distance to the fifth nearest training image among 64 principal components of the
        pixels (arXiv 2204.06507, of pixels).""", ("images",), Neighbour, control=True),
    "code_length": Score(
        "Control, without a VAE: minus the bits of a lossless code, so that simple images score high.", ("code_bits",),
        lambda x: -x[:, 0], control=True),
    "pixel_moments": Score(
        "Control, without a VAE: the squared Mahalanobis distance of the pixels' mean and log variance.", ("pixels",),
        Gaussian, control=True)}
CONTROLS = tuple(name for name, score in SCORES.items() if score.control)
