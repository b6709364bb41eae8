"""Penalties h of the autoencoder objective (paper, equation 4): concave, non-decreasing, h(0) = 0, on u >= 0.

log(u + delta) of the paper's discussion is log(1 + u / delta) up to a constant that no minimiser feels: `logarithm`, of
slope 1 / delta at zero. It is unbounded only in the limit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Penalty:
    """h, its derivative on u > 0 (float64 tensors to tensors) and its slope at zero, which may be infinite."""

    name: str
    h: Callable
    derivative: Callable
    slope: float


identity = Penalty("u", lambda u: u, torch.ones_like, 1.0)
indicator = Penalty("1[u > 0]", lambda u: (u > 0).to(u.dtype), torch.zeros_like, math.inf)


def ratio(tau):
    """u / (u + tau), tau > 0."""
    return Penalty(f"u / (u + {tau:g})", lambda u: u / (u + tau), lambda u: tau / (u + tau).square(), 1 / tau)


def exponential(tau):
    """1 - exp(-u / tau), tau > 0."""
    return Penalty(f"1 - exp(-u / {tau:g})", lambda u: -(-u / tau).expm1(), lambda u: (-u / tau).exp() / tau, 1 / tau)


def logarithm(tau):
    """log(1 + u / tau), tau > 0."""
    return Penalty(f"log(1 + u / {tau:g})", lambda u: torch.log1p(u / tau), lambda u: 1 / (u + tau), 1 / tau)


def power(p):
    """u^p, 0 < p < 1."""
    return Penalty(f"u^{p:g}", lambda u: u.pow(p), lambda u: p * u.pow(p - 1), math.inf)

