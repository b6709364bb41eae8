import math

import pytest
import torch

from theory.vae import VAE

torch.manual_seed(0)


def affine(d, kappa, gamma=0.05, seeds=2):
    """A VAE with an affine decoder, and its marginals N(b, W W^T + gamma I), one a seed."""
    model = VAE(d, kappa, (), seeds)
    with torch.no_grad():
        model.log_gamma.fill_(math.log(gamma))
    marginals = [torch.distributions.MultivariateNormal(b[0], w.T @ w + gamma * torch.eye(d).double())
                 for w, b in zip(model.decoder.weights[0].detach(), model.decoder.biases[0].detach(), strict=True)]
    return model, marginals


@pytest.mark.parametrize(("d", "kappa"), [(2, 1), (2, 2), (3, 2)])
def test_integral_importance_weights_and_elbo_against_the_closed_form(d, kappa):
    model, marginals = affine(d, kappa)
    g = torch.Generator().manual_seed(0)
    x = 0.4 * torch.randn(50, d, generator=g, dtype=torch.float64)  # farther out, the posterior leaves the grid
    exact = torch.stack([-marginal.log_prob(x) for marginal in marginals])
    torch.testing.assert_close(model.nll(x), exact, rtol=1e-7, atol=1e-7)
    assert float((model.iw_nll(x, 20_000) - exact).abs().median()) < 0.05
    eps = torch.randn(2, 50, 2000, kappa, generator=g, dtype=torch.float64)
    loss = model.loss(x.repeat_interleave(2000, 0).expand(2, -1, -1), eps.flatten(1, 2))
    assert (loss.unflatten(1, (50, 2000)).mean(2) > exact - 0.01).all()  # a bound, in expectation


def test_elbo_and_kl_per_dimension_against_torch_distributions():
    model, _ = affine(3, 2)
    x, eps = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 7, 2, dtype=torch.float64)
    mu, log_sigma = model.encoder(x).chunk(2, -1)
    q = torch.distributions.Normal(mu, log_sigma.exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros_like(mu), 1))
    z = mu + log_sigma.exp() * eps
    mean = z @ model.decoder.weights[0] + model.decoder.biases[0]
    p = torch.distributions.Normal(mean, model.log_gamma.exp().sqrt()[:, :, None].expand_as(mean))
    torch.testing.assert_close(model.loss(x, eps), kl.sum(2) - p.log_prob(x).sum(2))
    torch.testing.assert_close(model.kl_per_dim(x[0])[0], kl[0].mean(0))


@pytest.mark.parametrize(("d", "kappa"), [(2, 1), (3, 2)])
def test_density_map_is_the_marginal_of_the_first_two_coordinates(d, kappa):
    model, (marginal, _) = affine(d, kappa)
    image = torch.from_numpy(model.density_map(4, pixels=400).copy())
    assert float(image.sum()) * 0.02**2 == pytest.approx(1, abs=1e-3)
    axis = torch.linspace(-3.99, 3.99, 400, dtype=torch.float64)
    plane = torch.distributions.MultivariateNormal(marginal.mean[:2], marginal.covariance_matrix[:2, :2])
    exact = plane.log_prob(torch.cartesian_prod(axis, axis)).exp().view(400, 400).T.flip(0)
    assert float((image - exact).abs().max()) < 0.03 * float(exact.max())


def test_fit_of_an_affine_decoder_finds_probabilistic_pca():
    scale = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    x = scale * torch.randn(2000, 3, dtype=torch.float64)
    model = VAE(3, 1, (), seeds=2).fit(x, steps=1500)
    variances = x.var(0, correction=0)
    expected = float(variances[1:].mean())  # Tipping and Bishop: the mean of the discarded eigenvalues
    assert model.gammas() == pytest.approx([expected] * 2, rel=0.1)
    optimum = 0.5 * (3 * math.log(2 * math.pi) + math.log(float(variances[0])) + 2 * math.log(expected) + 3)
    assert model.nll(x).mean(1).tolist() == pytest.approx([optimum] * 2, abs=0.02)
