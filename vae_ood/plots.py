"""The figures, the report on scored pictures, and the tables of the pages. matplotlib is optional: `available` says
whether it is there."""

import base64
import hashlib
import html
import io

import numpy as np

from vae_ood import UserError, checkpoint
from vae_ood.cli import printable
from vae_ood.data.decoding import SOFTWARE
from vae_ood.heat import marked
from vae_ood.metrics import ACTIVE_NATS, latent_spectrum

METADATA = {"Software": SOFTWARE}  # by which these figures are known, and never read as data
PAGE, PANEL, DPI = 1200, 124, 120  # pixels: the width of outliers.png, that of each picture in it; and a figure's inch
THUMBNAIL = 96  # pixels: the longer side of a picture in report.html


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


def shortened(text, most):
    """At most so many characters of a text, its middle left out: the end of a file's name says more than the start."""
    return text if len(text) <= most else f"{text[:most // 3]}…{text[len(text) - most + most // 3 + 1:]}"


def drawable(text, family):
    """A text with a question mark for each character that is not printable or that the font family lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    font = get_font(findfont(FontProperties(family=[family])))
    return "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in text)


def p_text(p):
    """A p-value as people read it."""
    return f"{p:.4f}" if p >= 0.001 else np.format_float_positional(p, 2, fractional=False, trim="-")


WHERE = "where it is odd"


def panels(row):
    """{what: uint8 [H, W, C]} to show of a row, beside each other."""
    return {"picture": row["image"], "reconstruction": row["reconstruction"],
            WHERE: marked(row["image"], row["map"], row["scale"])}


def outliers(path, most, least, title):
    """Write what a person decides with: of the rows `most`, the most outlying, the picture, its reconstruction, where
    it is odd, and why; of the rows `least` the picture alone. Rows are those of `Detector.explain`, with a name,
    outlier and the `Scale` of the maps."""
    from matplotlib.figure import Figure
    height, width = most[0]["image"].shape[:2]
    tall = round(min(max(PANEL * height / width, 0.25 * PANEL), 1.5 * PANEL))  # whatever shape the pictures have
    line, below = 17, 4 * 17 + 14
    end = 96 + -(-len(most) // 3) * (tall + below)  # of the upper part
    total = end + (34 if least else 0) + -(-len(least) // 9) * (tall + 30) + 6
    figure = Figure(figsize=(PAGE / DPI, total / DPI), dpi=DPI)

    def write(x, y, text, size, family="sans-serif", **style):
        figure.text(x / PAGE, 1 - y / total, drawable(text, family), fontsize=size, family=family, parse_math=False,
                    **style)

    def show(x, y, image):
        axes = figure.add_axes((x / PAGE, 1 - (y + tall) / total, PANEL / PAGE, tall / total), anchor="W")
        axes.axis("off")
        axes.imshow(image[..., 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)

    write(12, 30, shortened(title, 95), 12, weight="bold")
    write(12, 60, "most outlying: what the model saw, its reconstruction, where it is odd, and why", 10)
    write(12, 80, most[0]["scale"].meaning, 8, color="0.35")
    for i, row in enumerate(most):
        x, y = 12 + i % 3 * 397, 96 + i // 3 * (tall + below)
        for j, image in enumerate(panels(row).values()):
            show(x + j * (PANEL + 6), y, image)
        y += tall + line
        mark, weight = ("   outlier", "bold") if row["outlier"] else ("", "normal")
        write(x, y, f"p = {p_text(row['p_value'])}{mark}", 8, weight=weight)
        write(x, y + line, shortened(row["name"], 35), 7.5, "monospace")
        if row["components"]:
            write(x, y + 2 * line, shortened(row["speaks"], 42), 7.5)
            write(x, y + 3 * line, shortened(row["component"], 42), 6.5, color="0.35")
    if least:
        write(12, end + 14, "least outlying", 10)
    for i, row in enumerate(least):
        x, y = 12 + i % 9 * 131, end + 32 + i // 9 * (tall + 30)
        show(x, y, row["image"])
        write(x, y + tall + line, f"p = {p_text(row['p_value'])}", 8)
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


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --quiet: #555; --line: #ccc; --flag: #fdecc8;
  --edge: #b45309; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e8e8e8; --quiet: #a8adb3;
  --line: #43474d; --flag: #3b2c10; --edge: #f0a63a; } }
body { margin: 1rem; background: var(--page); color: var(--ink); font: 0.9375rem/1.4 system-ui, sans-serif; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
p { margin: 0.2rem 0; max-width: 75ch; overflow-wrap: anywhere; }
.legend { margin: 0.8rem 0; color: var(--quiet); font-size: 0.8125rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.4rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: middle; }
thead th { background: var(--page); vertical-align: bottom; font-size: 0.8125rem; }
.text { text-align: left; }
tbody .text { min-width: 9rem; max-width: 20rem; overflow-wrap: anywhere; font-weight: normal; }
.pictures { white-space: nowrap; text-align: left; border-left: 5px solid transparent; }
.outlier { background: var(--flag); }
.outlier .pictures { border-left-color: var(--edge); }
.outlier strong { display: block; }
small { display: block; color: var(--quiet); }
img { image-rendering: pixelated; vertical-align: middle; margin-right: 4px; }
button { font: inherit; font-weight: bold; color: inherit; text-align: inherit; white-space: nowrap; cursor: pointer;
  background: none; margin: -0.2rem -0.3rem; padding: 0.2rem; border: 1px solid transparent; border-radius: 4px; }
button:hover { border-color: var(--quiet); }
button:focus-visible, .table:focus-visible { outline: 2px solid var(--edge); }
button::after { content: "\\00a0\\2195"; color: var(--quiet); }
[aria-sort=ascending] button::after { content: "\\00a0\\25b2"; color: inherit; }
[aria-sort=descending] button::after { content: "\\00a0\\25bc"; color: inherit; }
@media screen and (min-width: 95rem) { .table { overflow: visible; } thead th { position: sticky; top: 0; } }
@media print { @page { size: landscape; margin: 1cm; } body, .legend, thead th { font-size: 8pt; }
  tr { break-inside: avoid; } .table { overflow: visible; } button { display: contents; }
  button::after { display: none; } * { print-color-adjust: exact; } }
"""
SCRIPT = """
"use strict";
const body = document.querySelector("tbody"), rows = [...body.rows];
const heads = [...document.querySelectorAll("th[data-key]")];
function sort(key, down) {
  const head = heads.find(one => one.dataset.key === key);
  if (!head) return;
  const value = row => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
  const compare = key === "name" ? new Intl.Collator(undefined, {numeric: true}).compare : (a, b) => a - b;
  const sorted = [...rows].sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
  body.append(...sorted);
  heads.forEach(one => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
}
function sortAsLinked() {
  const linked = new URLSearchParams(location.hash.slice(1)).get("sort");
  if (linked) sort(linked.replace(/^-/, ""), linked.startsWith("-"));
}
for (const head of heads) head.firstElementChild.onclick = () => {
  const key = head.dataset.key, now = head.getAttribute("aria-sort");
  const down = now ? now === "ascending" : key === "score";
  sort(key, down);
  history.replaceState(null, "", "#sort=" + (down ? "-" : "") + encodeURIComponent(key));
};
addEventListener("hashchange", sortAsLinked);
sortAsLinked();
"""
LEGEND = ("p: of new ordinary pictures at most a share p score as high. A component's p (p_…): the same of one part of "
          "the score; the part with the smallest, in bold, speaks. Score: larger is more outlying. Likeness: to the "
          "nearest training picture, at most 1; known: it shows what a training picture shows. Pictures: what the "
          "model saw, its reconstruction, and where it is odd, if anywhere, in colour.")


def report(path, rows, title, lines):
    """Write a page of its own, with what the command printed and the rows that `outliers` takes, the most outlying
    first, to sort by any column; `#sort=likeness` or `#sort=-score` in its address sorts it when it opens. Raises
    UserError without Pillow."""
    parts = list(rows[0]["components"])
    heads = [f'<th scope="col" class="{kind}" data-key="{escaped(key)}"><button type="button">'
             f'{label}</button></th>' for key, label, kind in (
                 ("name", "name", "text"), ("p_value", "p-value", "number"), ("score", "score", "number"),
                 *((f"p_{name}", f"p_{escaped(name)}".replace("_", "_<br>"), "number") for name in parts),
                 ("likeness", "likeness", "number"))]
    heads[1] = heads[1].replace(" data-key", ' aria-sort="ascending" data-key')  # as they come
    if parts:
        heads.insert(2, '<th scope="col" class="text">what speaks</th>')
    allowed = "; ".join(f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                        for kind, text in (("style", STYLE), ("script", SCRIPT)))  # so that no other script ever runs
    said = "\n".join(f"<p>{escaped(line)}</p>" for line in "\n".join(lines).splitlines())
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; {allowed}; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
{said}
<p class="legend">{LEGEND}</p>
<div class="table" role="region" aria-label="the pictures" tabindex="0">
<table>
<thead><tr><th scope="col" class="text">picture</th>{"".join(heads)}</tr></thead>
<tbody>
{"".join(map(table_row, rows))}</tbody>
</table>
</div>
<script>{SCRIPT}</script>
</body>
</html>
"""
    checkpoint.write_atomic(path, page.encode())


def escaped(text):
    """A text as one line of HTML, also within quotes."""
    return html.escape(printable(text))


def table_row(row):
    """A row of the report's table."""
    def number(value, text, more=""):
        return f'<td data-value="{float(value)!r}">{text}{more}</td>'

    pictures = "".join(thumbnail(what, image) for what, image in panels(row).items())
    cells = [f'<td class="pictures">{pictures}</td>', f'<th scope="row" class="text">{escaped(row["name"])}</th>',
             number(row["p_value"], p_text(row["p_value"]), "<strong>outlier</strong>" if row["outlier"] else "")]
    if row["components"]:
        cells.append(f'<td class="text">{escaped(row["speaks"])}<small>{escaped(row["component"])}</small></td>')
    cells.append(number(row["score"], f"{row['score']:,.2f}"))
    for name, p in row["components"].items():
        cells.append(number(p, f"<b>{p_text(p)}</b>" if name == row["component"] else p_text(p)))
    cells.append(number(row["likeness"], f"{row['likeness']:.3f}", "<small>known</small>" if row["known"] else ""))
    return f'<tr class="{"outlier" if row["outlier"] else "ordinary"}">{"".join(cells)}</tr>\n'


def thumbnail(what, image):
    """uint8 [H, W, C] as an <img> that holds it; one larger than it is shown is scaled down."""
    try:
        from PIL import Image
    except ImportError:
        raise UserError("report.html needs Pillow: pip install Pillow") from None
    picture, buffer = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), io.BytesIO()
    width, height = (max(1, round(side * THUMBNAIL / max(picture.size))) for side in picture.size)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "JPEG" if what == WHERE else "PNG"  # for the eye alone: a fifth of the size
    picture.save(buffer, kind, optimize=True, quality=50)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{what}" width="{width}" height="{height}" src="data:image/{kind.lower()};base64,{content}">'
