"""The laboratory's pictures of AUROCs: one dot each, most of them labelled."""

from vae_ood.plots import METADATA, figure_and_axes

OFFSETS = ((7, -3, "left"), (-7, -3, "right"), (0, 8, "center"), (0, -14, "center"))  # of a label from its dot, points


def label(figure, axes, labels, dots, size=7):
    """Write labels (text, xy, color, which of the dots is its own or None) beside their `dots`, (x, y) each. One that
    would lie on another one, or on a dot, is left out."""
    from matplotlib.patheffects import withStroke
    figure.draw_without_rendering()  # from here on the axes stay where they are
    places, taken = axes.transData.transform(dots), []
    for label, xy, color, own in labels:
        for dx, dy, side in OFFSETS:
            text = axes.annotate(label, xy, (dx, dy), textcoords="offset points", fontsize=size, ha=side, color=color,
                                 annotation_clip=False, in_layout=False,
                                 path_effects=[withStroke(linewidth=4, foreground="white")])
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and not any(
                    box.contains(*place) for i, place in enumerate(places) if i != own) and box.x1 < figure.bbox.x1:
                taken.append(box)
                break
            text.remove()


def versus(path, dots, x_label, y_label):
    """Write one dot for each of `dots` (group, label, x, y, hollow), x and y at most 1, and the diagonal. Those close
    to (1, 1) have one label, their number."""
    figure, axes = figure_and_axes(8.0, 7.5)
    low, groups = min(min(dot[2:4]) for dot in dots), list(dict.fromkeys(dot[0] for dot in dots))
    low -= 0.05 * (1 - low)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal")
    axes.plot([low, 1], [low, 1], color="gray", linewidth=0.8)
    for i, group in enumerate(groups):
        for k, (_, _, x, y, hollow) in enumerate(dot for dot in dots if dot[0] == group):
            axes.plot(x, y, "o^sDvP"[i % 6], color=f"C{i}", markersize=6, fillstyle="none" if hollow else "full",
                      label=None if k else group)
    axes.legend(frameon=False, loc="lower right")
    corner = [min(dot[2:4]) > 1 - 0.02 * (1 - low) for dot in dots]
    label(figure, axes, [(f"{sum(corner)} pairs", (1, 1), "black", None)] * any(corner) + [
        (dot[1], dot[2:4], f"C{groups.index(dot[0])}", i)
        for i, dot in enumerate(dots) if not corner[i]], [dot[2:4] for dot in dots])
    figure.savefig(path, metadata=METADATA)
