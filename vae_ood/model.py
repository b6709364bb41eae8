"""The Gaussian VAE of the paper (section 4; DCGAN-like layers after arXiv 1801.01401), for any image size.

q(z|x) = N(mu, diag sigma^2), p(x|z) = N(sigmoid(logits(z)), gamma I), p(z) = N(0, I) on R^kappa; x in [0, 1].
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vae_ood.data.images import to_unit


class SubPixel(torch.autograd.Function):
    """conv_transpose2d(h, weight, bias, stride=2, padding=2, output_padding) of a 5x5 kernel, as a 3x3 convolution to
    one channel for each of the four parities of a pixel's row and column, and a pixel shuffle.

    Few output channels waste a CPU's vector lanes; four times as many make the forward pass 2.2 to 2.8 times faster on
    the decoder's last layer. The backward pass is the transposed convolution's own, which is the faster one there.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, output_padding):
        """h [B, I, m, n], weight [I, O, 5, 5], bias [O] -> [B, O, 2m - 1 + output_padding[0], ...]."""
        ctx.save_for_backward(h, weight)
        ctx.output_padding = output_padding
        # Pixel 2m + r takes h[m + j - 1] by the kernel's tap 4 + r - 2j; a sixth one, of zeros, makes them even.
        taps = F.pad(weight, (0, 1, 0, 1)).flip(2, 3).unflatten(2, (3, 2)).unflatten(4, (3, 2)).flip(3, 5)
        kernel = taps.permute(1, 3, 5, 0, 2, 4).reshape(-1, len(weight), 3, 3)
        parities = F.conv2d(h, kernel.contiguous(memory_format=torch.channels_last), bias.repeat_interleave(4),
                            padding=1)
        rows, columns = (2 * n - 1 + extra for n, extra in zip(h.shape[2:], output_padding, strict=True))
        return F.pixel_shuffle(parities, 2)[:, :, :rows, :columns]

    @staticmethod
    def backward(ctx, gradient):
        """The gradients by h, weight and bias."""
        h, weight = ctx.saved_tensors
        return *torch.ops.aten.convolution_backward(
            gradient.contiguous(memory_format=torch.channels_last), h, weight, [weight.shape[1]], [2, 2], [2, 2],
            [1, 1], True, ctx.output_padding, 1, ctx.needs_input_grad[:3]), None


def rectified(h, slope):
    """h, in place, times `slope` where it is below 0."""
    return F.leaky_relu(h, slope, inplace=True) if slope else F.relu(h, inplace=True)


class VAE(nn.Module):
    """Encoder and decoder of three stride-2 convolutions each; `alpha` scales every channel count but kappa.

    shape: (C, H, W) of the images. gamma: the decoder variance's initial value (a variance, in squared units of
    [0, 1] pixels); it is a trained parameter when `learn_gamma`, else a constant that the training loop may set.
    The paper leaves open `kernel`, the odd side of every convolution; `slopes`, those of the encoder's and of the
    decoder's leaky ReLUs below 0 (0: a ReLU); and `std`, of normal initial weights with biases of 0 (None: torch's
    own). Checkpoints are of the defaults.
    """

    logits = True  # `decode` gives the mean's logits, and the likelihood takes their sigmoid as it reads them

    def __init__(self, shape, alpha, kappa, gamma=1.0, learn_gamma=False, kernel=5, slopes=(0.2, 0.0), std=None):
        super().__init__()
        self.shape, self.kappa, self.slopes = tuple(shape), kappa, slopes
        channels, *size = shape
        sizes = [size]  # each stage halves, rounding up: 32 -> 16 -> 8 -> 4, 28 -> 14 -> 7 -> 4
        for _ in range(3):
            sizes.append([math.ceil(s / 2) for s in sizes[-1]])
        widths = [channels] + [max(1, round(c * alpha)) for c in (64, 128, 256)]
        self.code_shape = (widths[3], *sizes[3])
        features = math.prod(self.code_shape)

        self.encoder = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], kernel, stride=2, padding=kernel // 2)
                                     for i in range(3))
        self.mu = nn.Linear(features, kappa)
        self.log_sigma = nn.Linear(features, kappa)
        self.expand = nn.Linear(kappa, features)
        self.decoder = nn.ModuleList(
            nn.ConvTranspose2d(widths[i + 1], widths[i], kernel, stride=2, padding=kernel // 2,
                               output_padding=[a - (2 * b - 1) for a, b in zip(sizes[i], sizes[i + 1], strict=True)])
            for i in (2, 1, 0)
        )
        if std is not None:
            for name, parameter in self.named_parameters():
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)
        self.log_gamma = nn.Parameter(torch.tensor(math.log(gamma)), requires_grad=learn_gamma)

    def encode(self, x):
        """x [B, C, H, W], uint8 or in [0, 1] -> mu [B, kappa], log_sigma [B, kappa] of q(z|x)."""
        h = to_unit(x) if x.dtype == torch.uint8 else x
        for conv in self.encoder:
            h = rectified(conv(h), self.slopes[0])
        h = h.flatten(1)
        mu, log_sigma = self.mu(h), self.log_sigma(h)
        if self.training:
            # The optimum never exceeds about 0. A step that overshoots must neither blow the KL up by e^(2 log sigma)
            # nor lose the gradient that leads back, or the run is dead from then on.
            return mu, log_sigma - (log_sigma - 2).clamp(min=0).detach()
        # Far from the data the linear head extrapolates: past e^10 sigma would soon overflow and an extreme outlier's
        # score be NaN.
        return mu, log_sigma.clamp(max=10)

    def decode(self, z):
        """z [B, kappa] -> the logits of the mean of p(x|z), [B, C, H, W]."""
        h = rectified(self.expand(z), self.slopes[1]).unflatten(1, self.code_shape)
        h = h.contiguous(memory_format=torch.channels_last)
        *inner, last = self.decoder
        for conv in inner:
            h = rectified(conv(h), self.slopes[1])
        if h.device.type == "cpu" and last.kernel_size == (5, 5) and not torch.is_autocast_enabled("cpu"):
            return SubPixel.apply(h, last.weight, last.bias, last.output_padding)
        return last(h)


@functools.cache
def flops(shape, alpha, kappa):
    """(floating-point operations of encoding an image (C, H, W), of decoding a code): twice the multiplications."""
    counts = []
    with torch.device("meta"):
        model = VAE(shape, alpha, kappa)
        for function, one in ((model.encode, torch.empty(1, *shape)), (model.decode, torch.empty(1, kappa))):
            with FlopCounterMode(display=False) as counter:
                function(one)
            counts.append(counter.get_total_flops())
    return tuple(counts)
