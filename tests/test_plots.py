"""What a person decides with after `eval.py --score`: a figure of pictures, and a page for a browser."""

import base64
import io
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vae_ood import UserError, plots
from vae_ood.heat import Scale

NAMES = ["part_2.png", "part_10.png", "<script>alert(1)</script> & \"q' <b>.png", "new\nline\x07\udcff\u202e.png",
         "price $5 and $x_1^2$ \\frac{.png", "漢字😀.png", "far/" * 60 + "end.jpeg"]
VOID = {"meta", "img", "br", "wbr"}
SCALE = Scale(3.0, 0.05, 6.0, "maps: marked is what 5% show")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
drawn = pytest.mark.skipif(not plots.available(), reason="needs matplotlib")


def rows_of(n, shape=(16, 12, 3), parts=("texture", "layout")):
    """Rows as the command makes them, the most outlying first; their likeness is in no order."""
    rng, found = np.random.default_rng(0), []
    for i in range(n):
        components = {name: float(p) for name, p in zip(parts, rng.random(len(parts)), strict=True)}
        least = min(components, key=components.get) if parts else "nll"
        found.append({"name": NAMES[i % len(NAMES)], "image": rng.integers(0, 256, shape, np.uint8),
                      "reconstruction": rng.integers(90, 110, shape, np.uint8),
                      "map": rng.uniform(0, 4, shape[:2]).astype(np.float32), "scale": SCALE, "score": -9.5 - 0.5 * i,
                      "p_value": (i + 1) / (n + 1), "components": components, "component": least,
                      "speaks": "fine texture", "outlier": i < 2, "likeness": 1 - (i * 7 % n) / n, "known": i == 1})
    return found


@drawn
@pytest.mark.parametrize(("n", "shape", "parts"), [
    (40, (64, 48, 3), ("joint", "layout")), (19, (32, 32, 1), ()), (3, (28, 28, 1), ("joint",)), (1, (1, 9, 3), ())])
def test_the_figure_shows_pictures_of_any_shape_and_name(tmp_path, n, shape, parts):
    rows = rows_of(n, shape, parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a glyph that the font lacks, say
        plots.outliers(tmp_path / "outliers.png", rows[:18], rows[18:][-18:], "$x_1$ 漢 " + "long " * 50)
    with Image.open(tmp_path / "outliers.png") as figure:
        assert figure.info["Software"] == plots.METADATA["Software"]
        assert figure.width == plots.PAGE and 150 < figure.height < 2100 and np.asarray(figure).std() > 5


@drawn
def test_all_pictures_of_the_figure_have_one_scale_of_gray(tmp_path):
    rows = rows_of(2, (8, 8, 1), ())
    for row, level in zip(rows, (100, 140), strict=True):  # else each would be stretched to black and white
        row["image"][:], row["reconstruction"][:], row["map"][:] = level, level + 20, 0
    plots.outliers(tmp_path / "outliers.png", rows, [], "t")
    levels, counts = np.unique(np.asarray(Image.open(tmp_path / "outliers.png").convert("L")), return_counts=True)
    assert set(levels[counts > 0.9 * plots.PANEL**2]) == {100, 120, 140, 160, 255}


def test_long_names_keep_their_end():
    assert plots.shortened("part.png", 8) == "part.png"
    short = plots.shortened("a/" * 200 + "part_0012.png", 30)
    assert len(short) == 30 and short.startswith("a/a/") and short.endswith("part_0012.png")


class Page(HTMLParser):
    """The elements of a page, each with its attributes and text; it must be well-formed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        assert len(dict(attributes)) == len(attributes)
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def all(self, tag, **attributes):
        """[(attributes, text)] of such elements."""
        return [(found, "".join(text)) for name, found, text in self.elements
                if name == tag and attributes.items() <= found.items()]


def names_of(page):
    return [text for _, text in page.all("th", scope="row")]


def test_the_report_is_one_well_formed_page_that_escapes_all_it_is_told(tmp_path):
    rows, path = rows_of(30), tmp_path / "report.html"
    plots.report(path, rows, "<new> & 'old'",
                 ["2 of 30 images flagged at p <= 0.05\nwritten to a", "<script>x</script>"])
    page = Page(path.read_text("utf-8"))
    assert page.all("title")[0][1] == page.all("h1")[0][1] == "<new> & 'old'"
    assert [text for _, text in page.all("p")][:3] == ["2 of 30 images flagged at p <= 0.05", "written to a",
                                                       "<script>x</script>"]
    shown = [name.replace("\n", "�").replace("\x07", "�").replace("\udcff", "�").replace("\u202e", "�")
             for name in NAMES]
    assert names_of(page) == [shown[i % len(NAMES)] for i in range(30)]
    assert len(page.all("script")) == len(page.all("style")) == 1 and len(page.all("tr", **{"class": "outlier"})) == 2
    assert [text for _, text in page.all("strong")] == ["outlier"] * 2  # in words, not by colour alone
    assert not [found for _, found, _ in page.elements if {"href", "onclick", "style"} & set(found)]
    assert [found["data-key"] for found, _ in page.all("th") if "data-key" in found] == [
        "name", "p_value", "score", "p_texture", "p_layout", "likeness"]
    assert len(page.all("button", type="button")) == 6
    policy, = (found["content"] for found, _ in page.all("meta") if "http-equiv" in found)
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy


def test_the_report_holds_the_pictures_themselves(tmp_path):
    for shape, size in (((16, 12, 3), ("72", "96")), ((5, 7, 1), ("96", "69")), ((200, 100, 3), ("48", "96"))):
        rows, path = rows_of(2, shape, ()), tmp_path / "report.html"
        plots.report(path, rows, "t", [])
        pictures = [found for found, _ in Page(path.read_text("utf-8")).all("img")]
        assert [found["alt"] for found in pictures] == ["picture", "reconstruction", "where it is odd"] * 2
        del pictures[2::3]
        for found, expected in zip(pictures, [row[key] for row in rows for key in ("image", "reconstruction")],
                                   strict=True):
            head, content = found["src"].split(",")
            decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))
            assert head == "data:image/png;base64" and (found["width"], found["height"]) == size
            if max(shape) <= plots.THUMBNAIL:
                np.testing.assert_array_equal(decoded.reshape(shape), expected)
            else:
                assert decoded.shape == (96, 48, 3)


def test_a_report_of_200_noisy_pictures_is_at_most_5_5_megabytes(tmp_path):
    rows = rows_of(200, (64, 64, 3))  # of noise, which PNG cannot shrink; a reconstruction is smooth
    for row in rows:
        row["reconstruction"] = row["reconstruction"] // 8
    plots.report(tmp_path / "report.html", rows, "t", [])
    assert (tmp_path / "report.html").stat().st_size < 5.5e6


def test_a_report_without_pillow_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"report\.html needs Pillow: pip install Pillow"):
        plots.report(tmp_path / "report.html", rows_of(1), "t", [])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def browse(tmp_path):
    """Open a page in headless Chromium: the `Page` that its script has made of it."""
    if not BROWSER:
        pytest.skip("needs Chromium: chromium, chromium-browser or google-chrome")

    def opened(path, fragment=""):
        result = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                                 f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"{path.as_uri()}{fragment}"],
                                capture_output=True, timeout=120)
        return Page(result.stdout.decode())

    return opened


def keys_of(page, key):
    """What the rows hold, as they are ordered now, and {head: its order} of the heads that say they are sorted by."""
    at = [found.get("data-key") for found, _ in page.all("th", scope="col")].index(key)
    width = len(page.all("th", scope="col"))
    cells = [found.get("data-value") for name, found, _ in page.elements
             if name == "td" or (name == "th" and found.get("scope") == "row")]
    return [float(value) for value in cells[at::width]], {
        found["data-key"]: found["aria-sort"] for found, _ in page.all("th") if "aria-sort" in found}


def test_the_address_sorts_the_report_under_its_own_policy(tmp_path, browse):
    rows, path = rows_of(12), tmp_path / "report.html"
    plots.report(path, rows, "t", [])
    likeness, layout = [row["likeness"] for row in rows], [row["components"]["layout"] for row in rows]
    assert keys_of(browse(path), "p_value") == ([row["p_value"] for row in rows], {"p_value": "ascending"})
    assert keys_of(browse(path, "#sort=likeness"), "likeness") == (sorted(likeness), {"likeness": "ascending"})
    assert keys_of(browse(path, "#sort=-p_layout"), "p_layout") == (
        sorted(layout)[::-1], {"p_layout": "descending"})
    assert keys_of(browse(path, "#sort=nothing"), "score")[0] == [row["score"] for row in rows]
    names = names_of(browse(path, "#sort=name"))
    assert names.index("part_2.png") < names.index("part_10.png") and len(names) == 12  # numbers count as numbers


def test_clicks_sort_the_report_and_turn_it_round(tmp_path, browse):
    rows, path = rows_of(12), tmp_path / "report.html"
    plots.report(path, rows, "t", [])
    text = re.sub(r"<meta http-equiv[^>]*>", "", path.read_text("utf-8"))  # which would forbid the visitor's script
    clicked = tmp_path / "clicked.html"
    for key, times, order, fragment in (("likeness", 1, "ascending", "#sort=likeness"),
                                        ("likeness", 2, "descending", "#sort=-likeness"),
                                        ("score", 1, "descending", "#sort=-score"),
                                        ("p_value", 1, "descending", "#sort=-p_value")):
        visit = f"for (let i = 0; i < {times}; i++) document.querySelector('[data-key={key}] button').click();"
        clicked.write_text(text.replace("</body>", f"<script>{visit} document.title = location.hash;</script></body>"),
                           "utf-8")
        page, expected = browse(clicked), sorted((row[key] for row in rows), reverse=order == "descending")
        assert keys_of(page, key) == (expected, {key: order}) and page.all("title")[0][1] == fragment


def test_the_policy_stops_every_other_script(tmp_path, browse):
    path = tmp_path / "report.html"
    plots.report(path, rows_of(2), "t", [])
    text = path.read_text("utf-8").replace("</body>", "<script>document.title = 'ran'</script></body>")
    for held, title in ((text, "t"), (re.sub(r"<meta http-equiv[^>]*>", "", text), "ran")):
        path.write_text(held, "utf-8")
        assert browse(path).all("title")[0][1] == title
