"""Fused ops of the Gaussian VAE, one a file: Triton kernels for CUDA tensors, plain torch for the rest.

Nothing here knows of vae_ood; everything is in nats.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # there are wheels for Linux only; elsewhere every op takes its torch path
    tl = None

    class triton:
        @staticmethod
        def jit(function=None, **options):
            return function or triton.jit


OVERRIDE = None  # True: always Triton, False: never; for tests


def use_triton(tensor):
    """Whether an op on `tensor` runs as a Triton kernel: on CUDA, unless it is float64, where torch is as exact as the
    caller asks for. Elsewhere plain torch is as fast, and torch.compile fuses it."""
    if OVERRIDE is not None:
        return OVERRIDE
    return tl is not None and tensor.is_cuda and tensor.dtype != torch.float64


def accumulation_dtype(tensor):
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


__all__ = ["accumulation_dtype", "tl", "triton", "use_triton"]
