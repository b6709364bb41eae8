"""The figures, and the tables of the pages. matplotlib is optional: `available` says whether it is there."""

import numpy as np

from vae_ood.data.own import SOFTWARE
from vae_ood.metrics import ACTIVE_NATS, latent_spectrum

METADATA = {"Software": SOFTWARE}  # by which these figures are known, and never read as data


def available():
    """Whether figures can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def drawn(function, path, *arguments):
    """Draw a figure; where that fails, say so in a line."""
    try:
        function(path, *arguments)
    except Exception as error:  # whatever matplotlib raises: the results are written already
        print(f"no {path.name}: {type(error).__name__}: {' '.join(str(error).split())}")


def figure_and_axes(width=7.0, height=4.2):
    """A new figure with one pair of axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def nll_histogram(path, nll, unit, title):
    """Write `draw_histogram` to a file."""
    figure, axes = figure_and_axes()
    draw_histogram(axes, nll, unit, title)
    figure.savefig(path, metadata=METADATA)


def draw_histogram(axes, nll, unit, title):
    """The histograms of negative ELBOs per dimension in "bits" or "nats", {set: [N]} with 'train' and 'test' first, as
    Figs. 2 and 3. The axis is linear, or linear within a unit of the inliers' median and logarithmic beyond where
    outliers lie far out."""
    low, high = np.percentile(np.concatenate([np.percentile(v, (0.2, 99.5)) for v in nll.values()]), (0, 100))
    inliers = np.percentile(nll["test"], (0.2, 50, 99.5))
    label = f"negative ELBO ({unit} per dimension; outer bins: and beyond)"
    if far := high - low > 50 * max(inliers[2] - inliers[0], 0.1):
        origin, label = inliers[1], f"negative ELBO ({unit} per dimension) above the test median, {inliers[1]:.2f}"
        axes.set_xscale("asinh", linear_width=1.0)
        nll = {name: values - origin for name, values in nll.items()}
        edges = np.sinh(np.linspace(np.arcsinh(low - origin - 1), np.arcsinh(high - origin) * 1.02, 121))
    else:
        pad = 0.03 * max(high - low, 1e-3)
        edges = np.linspace(low - pad, high + pad, 121)
    for i, (name, values) in enumerate(nll.items()):
        style = {"histtype": "step", "color": "black", "linewidth": 1.2} if name == "train" else {
            "alpha": 0.55, "color": f"C{i - 1}"}
        axes.hist(np.clip(values, edges[0], edges[-1]), edges, weights=np.full(len(values), 1 / len(values)),
                  label=f"{name} (n = {len(values):,})", **style)
    axes.set(xlabel=label, ylabel="share of the set's images in a bin", title=title, xlim=(edges[0], edges[-1]))
    axes.legend(frameon=False, loc="upper center" if far else "best")


def outliers(path, images, p_values, scores, title):
    """Write the 16 most and the 16 least outlying of uint8 images [N, C, H, W] with their p-values [N]; scores [N] say
    which, as p-values tie."""
    from matplotlib.figure import Figure
    order = np.lexsort((-scores, p_values))
    figure = Figure(figsize=(10.0, 6.4), dpi=120, layout="constrained")
    figure.suptitle(title)
    for part, name, chosen in zip(figure.subfigures(2), ("most outlying", "least outlying, the least last"),
                                  (order[:16], order[max(16, len(order) - 16):]), strict=True):
        part.suptitle(name, fontsize="medium")
        for axes, i in zip(part.subplots(2, 8).flat, [*chosen, *[None] * (16 - len(chosen))], strict=True):
            axes.axis("off")
            if i is not None:
                shown = images[i].transpose(1, 2, 0) if len(images[i]) == 3 else images[i][0]
                axes.imshow(shown, cmap="gray", vmin=0, vmax=255)
                axes.set_title(f"p = {p_values[i]:.4f}", fontsize="small")
    figure.savefig(path, metadata=METADATA)


def mutual_information(path, kl_per_dim, title):
    """Write the sorted mean KL of each latent dimension (nats), as Fig. 4."""
    kl, active, cut, ratio = latent_spectrum(kl_per_dim)
    figure, axes = figure_and_axes()
    k = np.arange(1, len(kl) + 1)
    axes.semilogy(k, np.maximum(kl, 1e-6), "o-", markersize=4, linewidth=1)
    label = f"active above {ACTIVE_NATS} nats: {active} of {len(kl)}"
    axes.axhline(ACTIVE_NATS, color="gray", linestyle=":", label=label)
    if ratio is not None and ratio > 2:  # else there is no cut-off to speak of
        axes.axvline(cut + 0.5, color="C3", linestyle="--", label=f"largest drop: {ratio:.1f}-fold after {cut}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="latent dimension, sorted", ylabel="mean KL (nats)", title=title)
    axes.legend(frameon=False)
    figure.savefig(path, metadata=METADATA)


def markdown(head, rows):
    """The lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
