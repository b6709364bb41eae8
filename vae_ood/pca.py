"""Controls without a VAE that people try first: principal components of the pixels."""

import math

import numpy as np
import torch

from vae_ood.data.images import share
from vae_ood.features import of_pictures, scaled_down
from vae_ood.likelihood import exact_convolutions
from vae_ood.parallel import from_first, spread

AT_ONCE, PIXELS = 500, 2**26  # pictures that are read at once, and bytes of them, at most
NEIGHBOUR = 5  # of the training pictures, the distance to which counts


def in_parts(images):
    """The images, a tensor or what gives tensors, in tensors of as many as are read at once."""
    return images.split(max(1, min(AT_ONCE, PIXELS // math.prod(images.shape[1:]))))


@exact_convolutions
def pixels(images, device):
    """uint8 [N, C, H, W], a tensor or what gives tensors -> rows in [0, 1], float32, of pictures of SIDE at most."""
    return torch.cat([scaled_down(part.to(device).float() / 255).flatten(1) for part in in_parts(images)])


class Principal(torch.nn.Module):
    """Scores by the principal components of the training pictures. Buffers: mean [D], directions [D, K], known [M, K]:
    the training pictures in them."""

    MOST = 100

    def __init__(self, mean, directions, known):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions)
        self.register_buffer("known", known)

    @classmethod
    def fit(cls, train):
        """To features of training images."""
        def fitted():
            x = pixels(train["images"], train.device)
            mean = x.mean(0)
            with torch.random.fork_rng(range(torch.cuda.device_count())):  # named, or several make it warn
                torch.manual_seed(0)  # of the random projection
                k = min(cls.MOST, max(1, len(x) - 1), x.shape[1])  # centred, they span one less than there are
                _, _, directions = torch.pca_lowrank(x, min(k + 10, *x.shape), niter=4)
            directions = directions[:, :k].contiguous()
            known = cls.kept((x - mean) @ directions)
            return {"mean": mean.cpu(), "directions": directions.cpu(), "known": known.cpu()}
        return cls(**from_first(fitted))

    @classmethod
    def restore(cls, state):
        """What `fit` gave, from its state_dict."""
        return cls(**state)

    @staticmethod
    def kept(projected):
        """What is kept of the training pictures in the components [N, K]: nothing."""
        return projected[:0].clone()  # a view would be saved with all that it is a part of

    def forward(self, features):
        """float64 [N]; a picture in tiles is as far out as the farthest."""
        found = spread(lambda part: {"distance": self.distances(share(features["images"], part), features.device)},
                       len(features["images"]))
        return of_pictures(found["distance"], features)

    def distances(self, images, device):
        """[N] of images, a tensor or what gives tensors."""
        mean, directions, known = (values.to(device) for values in (self.mean, self.directions, self.known))
        found = []
        for part in in_parts(images):
            x = pixels(part, device) - mean
            found.append(self.distance(x, directions, known).double().cpu().numpy())
        return np.concatenate(found or [np.zeros(0)])

    def said(self, name, features):
        """{name: scores [N]}."""
        return {name: self(features)}


class Mahalanobis(Principal):
    """The squared Mahalanobis distance in the first 32 components."""

    MOST = 32

    @staticmethod
    def kept(projected):
        """Their standard deviations [1, K]."""
        return projected.square().mean(0, keepdim=True).sqrt() + 1e-6

    @staticmethod
    def distance(x, directions, known):
        """Of centred rows."""
        return (x @ directions / known).square().sum(1)


class Residual(Principal):
    """The squared distance from what the first 100 components can show."""

    @staticmethod
    def distance(x, directions, known):
        """Of centred rows."""
        return (x - x @ directions @ directions.T).square().sum(1)


class Neighbour(Principal):
    """The distance to the NEIGHBOUR-th nearest training picture among the first 64 components."""

    MOST = 64

    @staticmethod
    def kept(projected):
        """All of them."""
        return projected

    @staticmethod
    def distance(x, directions, known):
        """Of centred rows."""
        return torch.cdist(x @ directions, known).topk(min(NEIGHBOUR, len(known)), largest=False).values[:, -1]
