"""The CUDA C++ kernels of `iw_nll` (iw_nll.cuh), where VAE_OOD_KERNELS=cuda asks for them: torch builds them on first
use, by ninja and nvcc, for the card at hand, and keeps them in its folder of extensions."""

import functools
import math
import os
import re
from pathlib import Path

import torch

IMPLEMENTATION = os.environ.get("VAE_OOD_KERNELS") or "triton"  # of iw_nll on CUDA tensors
MEAN_TYPES = torch.float32, torch.bfloat16, torch.float16
FLAGS = ["-ftz=true"]  # no more instructions for denormal numbers than for others
BLOCKS = 1024  # among which few images are shared: some 8 for each multiprocessor of a large GPU


class Unavailable(RuntimeError):
    """VAE_OOD_KERNELS names no kernels, or some that cannot be built: one line says what is wrong and what to do."""


def chosen():
    """Whether iw_nll is CUDA C++ on CUDA tensors; Unavailable if VAE_OOD_KERNELS is neither triton nor cuda."""
    if IMPLEMENTATION not in ("triton", "cuda"):
        raise Unavailable(f"VAE_OOD_KERNELS={IMPLEMENTATION}: there are no such kernels; set it to triton or cuda")
    return IMPLEMENTATION == "cuda"


def readable(x):
    """x, or a copy as float32 where the kernels are CUDA C++ and read no such pixels."""
    return x.float() if chosen() and x.dtype != torch.uint8 else x


def prepare(device):
    """Build what VAE_OOD_KERNELS asks for, before there is work for it; Unavailable if that cannot be had."""
    if chosen() and device.type == "cuda":
        extension(device)


@functools.cache
def extension(device):
    """The module of iw_nll.cu for a CUDA device; Unavailable if it cannot be built."""
    major, minor = torch.cuda.get_device_capability(device)
    try:
        from torch.utils.cpp_extension import load
        return load(f"vae_ood_iw_nll_sm{major}{minor}", [str(Path(__file__).with_name("iw_nll.cu"))],
                    extra_cuda_cflags=[*FLAGS, f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"])
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if re.search(r"\berror\b|not found|cannot find", line)), lines[0])
        raise Unavailable(
            f"VAE_OOD_KERNELS=cuda: the kernels cannot be built ({reason.strip()}); have ninja and a C++ compiler on "
            f"the PATH and set CUDA_HOME to the folder of CUDA {torch.version.cuda}, or unset VAE_OOD_KERNELS for "
            "Triton's kernels") from error


def _call(x, mean, logits):
    """The fields of a Call in iw_nll.cu. x [B, *S] is uint8 or float32; its samples lie in memory as the mean's
    [B, K, *S], whose samples are one run each."""
    b, k, *shape = mean.shape
    of_x, of_b, of_k = (stride if size > 1 else 0 for size, stride in (  # which says nothing of a single one
        (b, x.stride(0)), (b, mean.stride(0)), (k, mean.stride(1))))
    return (x.data_ptr(), mean.data_ptr(), x.dtype == torch.uint8, MEAN_TYPES.index(mean.dtype), of_x, of_b, of_k,
            b, k, math.prod(shape), logits, torch.cuda.current_stream(mean.device).cuda_stream)


def forward(x, mean, log_ratio, log_gamma, logits):
    """`vae_ood::iw_nll` for dense means, and x and log_ratio in their order."""
    log_gamma, log_ratio = log_gamma.float(), None if log_ratio is None else log_ratio.float()
    b, k = mean.shape[:2]
    blocks = max(1, min(-(-k // 4), BLOCKS // max(b, 1)))
    squared_error, of_blocks = (x.new_empty((b, n), dtype=torch.float32) for n in (k, blocks))
    nll = of_blocks if blocks == 1 else torch.empty_like(of_blocks[:, :1])
    with torch.cuda.device_of(mean):
        extension(mean.device).forward(
            _call(x, mean, logits), 0 if log_ratio is None else log_ratio.data_ptr(), log_gamma.data_ptr(),
            squared_error.data_ptr(), of_blocks.data_ptr(), nll.data_ptr(), blocks)
    return nll.squeeze(1), squared_error


def backward(x, mean, grad_squared_error, grad_mean, logits):
    """Fill grad_mean, contiguous in the order of the dense mean, from grad_squared_error [B, K], float32."""
    with torch.cuda.device_of(mean):
        extension(mean.device).backward(_call(x, mean, logits), grad_squared_error.data_ptr(), grad_mean.data_ptr())
