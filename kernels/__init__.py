"""Fused ops of the Gaussian VAE: Triton kernels for CUDA tensors, plain torch for the rest.

Nothing here knows of the rest of vae_ood; everything is in nats.
"""

import functools
import warnings

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


OVERRIDE = None  # True: always a kernel, False: never; for tests


def constant_to_compiler(function):
    """torch.compiler.assume_constant_result, which does this alone, but imports the compiler first, a second."""
    function._dynamo_marked_constant = True
    return function


@functools.cache
@constant_to_compiler  # below the cache, which torch.compile looks through
def driver_starts():
    """Whether Triton's driver starts, with a warning if not: it is built on the spot, by a C compiler."""
    try:
        from triton.runtime import driver
        driver.active.get_current_device()
    except Exception as error:
        warnings.warn(f"plain torch instead of the Triton kernels, whose driver does not start: {error}", stacklevel=1)
        return False
    return True


def use_kernel(tensor, needs_triton=True):
    """Whether an op on `tensor` runs as a kernel: on CUDA, unless it is float64, where torch is as exact as the caller
    asks for, or needs Triton, whose driver does not start. Elsewhere plain torch is as fast, and torch.compile fuses
    it."""
    if OVERRIDE is not None:
        return OVERRIDE
    return tensor.is_cuda and tensor.dtype != torch.float64 and (
        not needs_triton or (tl is not None and driver_starts()))


def accumulation_dtype(tensor):
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


__all__ = ["accumulation_dtype", "tl", "triton", "use_kernel"]
