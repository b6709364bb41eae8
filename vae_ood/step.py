"""One training step: its images and noise, the loss, the gradients, the update. On CUDA, one graph of kernels."""

import math
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adam import adam

from vae_ood import UserError
from vae_ood.cli import WORLD, out_of_memory
from vae_ood.data.images import TRAINING, batch_indices, generator, to_unit
from vae_ood.data.tiles import of_step
from vae_ood.kernels.iw_nll import gaussian_log_likelihood, log_normal
from vae_ood.kernels.reparameterize import reparameterize
from vae_ood.likelihood import EXACT, evaluate
from vae_ood.model import VAE
from vae_ood.parallel import part, total

AHEAD = 50  # steps whose indices and noise are drawn at once, so that a GPU seldom waits for them
EAGER = 3  # steps before the one that is captured: kernels are compiled, and memory is allotted
GAMMA_IMAGES = 10_000  # training images whose MSE is the gamma of a finished `optimal` or `homotopy` run
MIN_GAMMA = 1e-10  # images that are reconstructed exactly have no finite log-likelihood
HOMOTOPY = (0, 5000 / 7, 2000), (0, -5, -7)  # steps, log of the floor: slower where weak factors of the data join in


def learning_rate(step, args):
    """Constant; or a linear warm-up over 2% of the steps, then a cosine to 0."""
    if args.schedule == "constant":
        return args.lr
    warm_up = max(1, args.iters // 50)
    return args.lr * min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / args.iters))


def gamma_floor(step, args):
    """Homotopy: gamma = max(MSE of the batch, floor), the floor falling log-linearly from 1 to e^-5 in 714 steps, then
    to e^-7 by step 2,000 (in proportion where there are fewer than 3,000 steps); `optimal` has no floor."""
    if args.gamma != "homotopy":
        return MIN_GAMMA
    return math.exp(np.interp(step * max(1, 3000 / args.iters), *HOMOTOPY))


class Batches:
    """The images and noise of each step. They are drawn for the whole batch and depend on (seed, step) alone, so a
    resumed run repeats them; each worker takes its slice. Those of AHEAD steps travel to the device at once."""

    def __init__(self, args, images, device):
        """images [N, C, H, W], uint8: a tensor, which goes to the device, or what gives tensors."""
        self.args, self.device, self.images = args, device, images.to(device)
        self.steps = range(0)

    def to_device(self, values):
        """A tensor on the device, maybe still on its way."""
        if self.device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)

    def draw(self, first):
        """The noise of the steps from `first`, and which images they take, if these lie on the device."""
        args, n, rows = self.args, self.args.batch_size, part(self.args.batch_size)
        self.steps = range(first, min(first + AHEAD, args.iters))
        self.eps = self.to_device(torch.from_numpy(np.stack([self.noise(step)[0] for step in self.steps])))
        if isinstance(self.images, torch.Tensor):
            self.chosen = self.to_device(torch.from_numpy(np.stack([
                batch_indices(args.seed, step, n, len(self.images))[rows] for step in self.steps])))

    def noise(self, step):
        """(eps [B, kappa], the generator that drew it) of a step, for this worker."""
        rng = generator(self.args.seed, TRAINING, step)
        return rng.standard_normal((self.args.batch_size, self.args.kappa), np.float32)[part(self.args.batch_size)], rng

    def __call__(self, step):
        """x [B, C, H, W], uint8 or dequantised, and eps [B, kappa] of a step."""
        args, rows = self.args, part(self.args.batch_size)
        if step not in self.steps:
            self.draw(step)
        i = step - self.steps.start
        if isinstance(self.images, torch.Tensor):
            x = self.images[self.chosen[i]]
        else:
            x = self.to_device(of_step(self.images, args.seed, step, args.batch_size, rows))
        if args.dequantize:
            uniform = self.noise(step)[1].random((args.batch_size, *x.shape[1:]), np.float32)[rows]
            x = to_unit(x, self.to_device(torch.from_numpy(uniform)))
        return x.contiguous(memory_format=torch.channels_last), self.eps[i]


class Terms(NamedTuple):
    """What a step gives: the loss, this worker's share of the batch's mean negative ELBO in nats; the MSE of the whole
    batch; gamma; the KL [B, kappa] of this worker's images; the probe, whose gradient is that of the loss by z.
    Where a graph gives them, all but the loss hold until the next step."""

    loss: torch.Tensor
    mse: torch.Tensor
    gamma: torch.Tensor
    kl: torch.Tensor
    probe: torch.Tensor


class Objective(nn.Module):
    """The loss, as a module, which DistributedDataParallel asks for."""

    def __init__(self, model, batch_size, profiled=False, precision="float32"):
        super().__init__()
        self.model, self.batch_size, self.profiled, self.precision = model, batch_size, profiled, precision

    def forward(self, x, eps, probe, floor):
        """x [B, C, H, W], uint8 or in [0, 1]; eps and probe, which is zero, [B, kappa]; the least gamma, a scalar.

        `profiled`: gamma is max(MSE, floor), a constant to the gradient: where MSE is the larger, that is the gradient
        of the loss with gamma profiled out, d/2 log(2 pi e MSE) + KL (arXiv 2006.13202), and its value.
        """
        model, d = self.model, x[0].numel()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            mu, log_sigma = (t.float() for t in model.encode(x))
            z, kl = reparameterize(mu, log_sigma, eps, per_dim=True)
            decoded = model.decode(z + probe)
        log_likelihood, squared_error = gaussian_log_likelihood(x, decoded, model.log_gamma, model.logits, True)
        mse, log_gamma = total(squared_error.detach().sum()) / (self.batch_size * d), model.log_gamma
        if self.profiled:
            log_gamma = mse.clamp(min=floor).log()
            log_likelihood = log_normal(squared_error, d, log_gamma)
        return (kl.sum(1) - log_likelihood).sum() / self.batch_size, mse, log_gamma.detach().exp(), kl.detach()


class Adam:
    """torch.optim.Adam (arXiv 1412.6980) by that module's own function. The class would import torch's compiler, for
    which every command would wait a second."""

    def __init__(self, params, lr, capturable=False):
        """lr: a number, or a tensor, which a captured step reads anew; `capturable`: on CUDA, to be captured."""
        self.params, self.lr, self.capturable = list(params), lr, capturable
        self.state = [{"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                       "exp_avg_sq": torch.zeros_like(p)} for p in self.params]

    def zero_grad(self):
        """Forget the gradients."""
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        """Update the parameters by their gradients."""
        steps, exp_avgs, exp_avg_sqs = ([state[name] for state in self.state] for name in (
            "step", "exp_avg", "exp_avg_sq"))
        adam(self.params, [p.grad for p in self.params], exp_avgs, exp_avg_sqs, [], steps, fused=True,
             capturable=self.capturable, amsgrad=False, beta1=0.9, beta2=0.999, lr=self.lr, weight_decay=0.0, eps=1e-8,
             maximize=False)

    def state_dict(self):
        """The tensors by the parameters' numbers."""
        return {"state": dict(enumerate(self.state))}

    def load_state_dict(self, saved):
        """Take over what `state_dict` gave, or that of torch.optim.Adam, which has no state before its first step."""
        states = saved["state"] or dict(enumerate(self.state))
        if states.keys() != set(range(len(self.state))):
            raise KeyError("parameters")
        for i, own in enumerate(self.state):
            for name, value in own.items():
                if states[i][name].shape != value.shape:
                    raise ValueError("shapes")
                value.copy_(states[i][name])


def default_precision(args, device):
    """bfloat16 for the fast recipe from alpha = 1 on, where layers are wide enough to gain, on a CPU that multiplies
    in it; else float32."""
    has = torch.cpu.get_capabilities()
    gains = args.recipe == "fast" and args.alpha >= 1 and (has.get("avx512_bf16") or has.get("amx_bf16"))
    return "bfloat16" if device.type == "cpu" and gains else "float32"


@contextmanager
def arithmetic(precision):
    """CUDA's convolutions and matrix products by TF32 or not, each sum always in the same order."""
    products = torch.backends.cuda.matmul
    before, tf32 = products.allow_tf32, precision == "tf32"
    with EXACT, torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32):
        products.allow_tf32 = tf32
        try:
            yield
        finally:
            products.allow_tf32 = before


class Training:
    """A model, its optimiser, and the images of which each step takes some. What `backward` gives are the worker's
    shares: their sums over the workers are those of the batch."""

    def __init__(self, args, images, device, **layers):
        """layers: of the VAE, where they are not its defaults."""
        self.args, self.device = args, device
        self.profiled = args.gamma in ("optimal", "homotopy")
        self.compiled = device.type == "cuda" if args.compile is None else args.compile
        self.graphed = device.type == "cuda" and WORLD == 1 and args.compile is not False
        self.graph, self.eager = None, 0
        torch.manual_seed(args.seed)
        gamma = 1.0 if self.profiled or args.gamma == "learn" else args.gamma
        self.model = VAE(images.shape[1:], args.alpha, args.kappa, gamma, args.gamma == "learn", **layers).to(
            device, memory_format=torch.channels_last)
        self.batches, self.floor = Batches(args, images, device), torch.tensor(1.0, device=device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.lr = torch.tensor(args.lr, device=device) if self.graphed else args.lr  # a graph reads what it finds there
        self.optimizer = Adam(self.trained, self.lr, self.graphed)
        objective = Objective(self.model, args.batch_size, self.profiled, args.precision)
        if WORLD > 1:  # it averages the gradients over the workers while the backward pass goes on
            objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
        options = {"deterministic": True} if device.type == "cuda" else None
        self.objective = torch.compile(objective, options=options) if self.compiled else objective

    def prepare(self, step):
        """Set what the schedules say of a step; its x and eps."""
        lr = learning_rate(step, self.args)
        if self.graphed:
            self.lr.fill_(lr)
        else:
            self.optimizer.lr = lr
        self.floor.fill_(gamma_floor(step, self.args))
        return self.batches(step)

    def backward(self, x, eps):
        """The gradients of a batch, and its `Terms`."""
        self.optimizer.zero_grad()
        probe = torch.zeros_like(eps, requires_grad=True)
        with arithmetic(self.args.precision) if self.device.type == "cuda" else nullcontext():
            loss, *terms = self.objective(x, eps, probe, self.floor)
            (loss * WORLD).backward()  # the mean over the workers is then the gradient of the batch's loss
        return Terms(loss.detach(), *terms, probe)

    def update(self, mse):
        """The optimiser's step."""
        self.optimizer.step()
        if self.profiled:  # what a checkpoint before the end is evaluated with: a running geometric mean
            with torch.no_grad():
                self.model.log_gamma.lerp_(mse.clamp(min=MIN_GAMMA).log(), 0.05)

    def backward_and_update(self, x, eps):
        """`backward` and `update`."""
        terms = self.backward(x, eps)
        self.update(terms.mse)
        return terms

    def step(self, step):
        """Train by a step; its `Terms`."""
        inputs = self.prepare(step)
        if self.graphed and not self.graph:
            if self.eager == EAGER:
                self.capture(inputs)
            else:
                self.eager += 1
        if not self.graph:
            with self.on_side_stream() if self.graphed else nullcontext():
                return self.backward_and_update(*inputs)
        for static, values in zip(self.inputs, inputs, strict=True):
            static.copy_(values)
        self.graph.replay()
        return self.terms._replace(loss=self.terms.loss.clone())

    @contextmanager
    def on_side_stream(self):
        """On a stream that is not the default one, as is asked of what comes before a capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, inputs):
        """Record the kernels of a step, which `step` then launches all at once."""
        self.inputs, graph = [values.clone() for values in inputs], torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a thread may write a checkpoint
                self.terms = self.backward_and_update(*self.inputs)
        except RuntimeError as error:
            if out_of_memory(error) or out_of_memory(error.__context__):
                raise
            raise UserError(f"a step could not be captured as a CUDA graph ({str(error).splitlines()[0]}): use "
                            "--no-compile") from error
        self.graph = graph

    def gradient_norm(self):
        """The norm of the last step's gradients."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.trained])

    def settle_gamma(self):
        """Where gamma is not trained, it becomes the MSE on (at most GAMMA_IMAGES) training images."""
        if self.profiled:
            images, args = self.batches.images[:GAMMA_IMAGES], self.args
            mse = evaluate(self.model, images, 1, args.seed, args.dequantize)["mse"]
            with torch.no_grad():
                self.model.log_gamma.fill_(math.log(max(mse.mean(), MIN_GAMMA)))

    def warm_up(self, step):
        """Two steps without an update, the first of which compiles; the seconds of the second."""
        inputs = self.prepare(step)
        try:
            self.backward(*inputs)
        except Exception as error:
            if not self.compiled or WORLD > 1 or out_of_memory(error):
                raise
            if self.args.compile:
                raise UserError(f"torch.compile failed ({type(error).__name__}): use --no-compile") from error
            print(f"training without torch.compile, which failed ({type(error).__name__}); see --no-compile")
            self.objective, self.compiled = self.objective._orig_mod, False
            self.backward(*inputs)
        started = time.perf_counter()
        self.backward(*self.prepare(step))[0].item()
        return time.perf_counter() - started
