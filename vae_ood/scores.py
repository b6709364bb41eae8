"""Outlier scores: larger = more outlying. A score joins by one decorated function.

Each takes the model, the images and the likelihoods that `likelihood.evaluate` measured of them, and returns [N].
"""

SCORES = {}


def score(function):
    """Register an outlier score under its function's name."""
    SCORES[function.__name__] = function
    return function


@score
def nll(model, images, likelihoods):
    """The negative ELBO in nats (paper, section 4), averaged over the samples of z."""
    return likelihoods["nll"]


@score
def iw_nll(model, images, likelihoods):
    """The importance-weighted NLL in nats (arXiv 1509.00519), a tighter bound of -log p(x)."""
    return likelihoods["iw_nll"]
