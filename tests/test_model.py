import math

import pytest
import torch
import torch.nn.functional as F

from vae_ood.model import VAE, SubPixel, flops


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 1, 1), (3, 17, 30), (1, 64, 40)])
def test_reconstruction_has_the_shape_of_the_image(shape):
    model = VAE(shape, 0.1, 7)
    mu, log_sigma = model.encode(torch.rand(2, *shape))
    assert mu.shape == log_sigma.shape == (2, 7)
    assert model.decode(mu).shape == (2, *shape)


@pytest.mark.parametrize(("alpha", "widths"), [(1, [64, 128, 256]), (0.25, [16, 32, 64]), (4, [256, 512, 1024]),
                                               (0.001, [1, 1, 1]), (0.12, [8, 15, 31])])
def test_alpha_multiplies_the_channels_but_not_kappa(alpha, widths):
    model = VAE((3, 32, 32), alpha, 32)
    assert [conv.out_channels for conv in model.encoder] == widths
    assert [conv.in_channels for conv in model.decoder] == widths[::-1]
    assert model.mu.out_features == model.log_sigma.out_features == model.expand.in_features == 32
    assert model.mu.in_features == 4 * 4 * widths[2]


def test_number_of_parameters_of_the_papers_network():
    convolutions = 25 * (1 * 64 + 64 * 128 + 128 * 256) * 2
    biases = 64 + 128 + 256 + 128 + 64 + 1
    linear = 4096 * 32 * 3 + 32 * 2 + 4096
    assert sum(p.numel() for p in VAE((1, 28, 28), 1, 32).parameters()) == convolutions + biases + linear + 1


@pytest.mark.parametrize("layers", [{"kernel": 3}, {"kernel": 7}, {"slopes": (0.0, 0.0)}, {"slopes": (0.2, 0.2)},
                                    {"std": 0.02}, {"kernel": 5, "slopes": (0.2, 0.0)}])
def test_what_the_paper_leaves_open_can_be_varied(layers):
    """The layers are torch's own, in float64, with what is varied."""
    torch.manual_seed(0)
    model = VAE((3, 17, 30), 0.1, 4, **layers).double()
    kernel, (encoder, decoder) = layers.get("kernel", 5), layers.get("slopes", (0.2, 0.0))
    if "std" in layers:
        weights = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith("weight")])
        assert weights.std().item() == pytest.approx(0.02, rel=0.05) and not model.mu.bias.any()
        assert model.log_gamma.exp() == 1
    x = h = torch.rand(2, 3, 17, 30, dtype=torch.float64)
    for conv in model.encoder:
        h = F.leaky_relu(F.conv2d(h, conv.weight, conv.bias, 2, kernel // 2), encoder)
    mu, _ = model.encode(x)
    torch.testing.assert_close(mu, F.linear(h.flatten(1), model.mu.weight, model.mu.bias))
    h = F.leaky_relu(F.linear(mu, model.expand.weight, model.expand.bias), decoder).unflatten(1, model.code_shape)
    for i, conv in enumerate(model.decoder):
        h = F.conv_transpose2d(F.leaky_relu(h, decoder) if i else h, conv.weight, conv.bias, 2, kernel // 2,
                               conv.output_padding)
    torch.testing.assert_close(model.decode(mu), h)


def test_gamma_is_a_variance_and_trained_only_when_learned():
    assert VAE((1, 8, 8), 0.1, 2, 0.04).log_gamma.exp().item() == pytest.approx(0.04)
    assert not VAE((1, 8, 8), 0.1, 2).log_gamma.requires_grad
    assert VAE((1, 8, 8), 0.1, 2, learn_gamma=True).log_gamma.requires_grad


def test_pixels_are_divided_by_255():
    model, pixels = VAE((3, 8, 8), 0.1, 2), torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(model.encode(pixels), model.encode(pixels / 255), rtol=0, atol=0)


def test_a_step_that_overshoots_log_sigma_finds_back():
    """In training its value is bounded, its gradient is not lost; below the bound nothing changes."""
    model, x = VAE((1, 8, 8), 0.1, 3), torch.rand(2, 1, 8, 8)
    _, before = model.encode(x)
    torch.testing.assert_close(before, model.eval().encode(x)[1], rtol=0, atol=0)
    with torch.no_grad():
        model.log_sigma.bias.fill_(500)
    _, log_sigma = model.train().encode(x)
    assert (log_sigma == 2).all() and (model.eval().encode(x)[1] == 10).all()
    log_sigma.exp().square().sum().backward()
    torch.testing.assert_close(model.log_sigma.bias.grad, torch.full((3,), 4 * math.exp(4)))


def test_extreme_images_keep_finite_likelihoods():
    model = VAE((1, 8, 8), 0.1, 2).eval()
    with torch.no_grad():
        model.log_sigma.bias.fill_(500)
    mu, log_sigma = model.encode(torch.rand(1, 1, 8, 8))
    assert torch.isfinite(model.decode(mu + log_sigma.exp())).all()


@pytest.mark.parametrize(("channels", "size", "output_padding"), [
    (3, (4, 5), (1, 1)), (1, (3, 7), (0, 1)), (2, (1, 1), (0, 0)), (1, (6, 2), (1, 0))])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False)])
def test_sub_pixel_convolution_is_the_transposed_one(channels, size, output_padding, needs):
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 6, *size), (6, channels, 5, 5), (channels,))]
    leaves[0] = leaves[0].contiguous(memory_format=torch.channels_last)
    results = []
    for function in (lambda h, w, b: SubPixel.apply(h, w, b, output_padding),
                     lambda h, w, b: F.conv_transpose2d(h, w, b, 2, 2, output_padding)):
        inputs = [leaf.clone().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
        output = function(*inputs)
        wanted = [one for one in inputs if one.requires_grad]
        results.append((output, *torch.autograd.grad(output.sin().sum(), wanted)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_operations_are_twice_the_multiplications():
    encoding = 75 * 64 * 256 + 1600 * 128 * 64 + 3200 * 256 * 16 + 4096 * 64
    decoding = 32 * 4096 + 25 * 256 * 128 * 16 + 25 * 128 * 64 * 64 + 25 * 64 * 3 * 256
    assert flops((3, 32, 32), 1, 32) == (2 * encoding, 2 * decoding)
    # layers between two scaled widths grow 4-fold, the first and the last 2-fold
    assert 3 < sum(flops((3, 32, 32), 2, 32)) / sum(flops((3, 32, 32), 1, 32)) < 4
