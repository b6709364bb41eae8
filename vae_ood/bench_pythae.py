"""pythae's VAE of the layers of model.py, timed by its own trainer and `get_nll`; bench.py runs this with the Python of
--pythae, as pythae's requirements are not ours. It takes what to time, kappa, the batch, the codes of an image,
channels, height, width and alpha; then, from stdin, numbers of steps, and answers each with the seconds of a step."""

import contextlib
import logging
import os
import sys
import tempfile
import time

import torch
import torch.nn.functional as F

from vae_ood.model import VAE


def theirs(shape, alpha, kappa):
    """pythae's VAE of our layers."""
    from pythae.models import VAE as Pythae
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self, layers):
            super().__init__()
            self.convolutions, self.mu, self.log_sigma = layers.encoder, layers.mu, layers.log_sigma

        def forward(self, x):
            for conv in self.convolutions:
                x = F.leaky_relu(conv(x), 0.2)
            return ModelOutput(embedding=self.mu(x.flatten(1)), log_covariance=2 * self.log_sigma(x.flatten(1)))

    class Decoder(BaseDecoder):
        def __init__(self, layers):
            super().__init__()
            self.expand, self.convolutions, self.shape = layers.expand, layers.decoder, layers.code_shape

        def forward(self, z):
            h = F.relu(self.expand(z)).unflatten(1, self.shape)
            *inner, last = self.convolutions
            for conv in inner:
                h = F.relu(conv(h))
            return ModelOutput(reconstruction=last(h).sigmoid())

    layers = VAE(shape, alpha, kappa)
    return Pythae(VAEConfig(input_dim=shape, latent_dim=kappa), Encoder(layers), Decoder(layers))


def seconds(what, batch, samples, shape, model, steps):
    """Of a step: of training on a batch, or of decoding so many samples of an image."""
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    if what == "likelihood":
        x = torch.rand(steps, *shape)
        started = time.perf_counter()
        with torch.no_grad():
            model.get_nll(x, samples, samples)
        return (time.perf_counter() - started) / steps
    x = torch.rand(steps * batch, *shape)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(model, BaseDataset(x, torch.zeros(len(x))), training_config=BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=batch, no_cuda=True))
        trainer.prepare_training()
        started = time.perf_counter()
        trainer.train_step(1)
        return (time.perf_counter() - started) / steps


def main(what, *numbers):
    """Answer on stdout until stdin ends."""
    kappa, batch, samples, *shape = map(int, numbers[:-1])
    shape, answers = tuple(shape), sys.stdout
    logging.disable()
    model = theirs(shape, float(numbers[-1]), kappa)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        for line in sys.stdin:
            print(seconds(what, batch, samples, shape, model, int(line)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
