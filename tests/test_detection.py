"""The page of detection results against the JSON files that it is written from, and how these come about."""

import builtins
import gzip
import json
import math
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.conftest import ROOT
from tests.test_reproduce import write_run
from vae_ood import UserError, plots
from vae_ood.detection import __main__ as command
from vae_ood.detection import contenders, dots, frontier, pages, pairs
from vae_ood.scores import COMPONENTS, CONTROLS, SCORES, SHARES

RESULTS = ROOT / "results"
HEADLINE = r"^\| {} \| {}(?: \(development\))? \| .*$"


def headline(text, inliers, outliers):
    """The cells of a pair's row of the table at a glance."""
    return [cell.strip() for cell in re.search(HEADLINE.format(inliers, outliers), text, re.MULTILINE)[0].split("|")]


def test_the_page_says_what_the_json_files_say():
    assert (RESULTS / "detection.md").read_text() == pages.page(RESULTS), "run python -m vae_ood.detection"
    kept = {path.stem for path in (RESULTS / "detection").glob("*.json")}
    assert kept == set(pairs.kept()) and (RESULTS / "detection.png").exists()


def test_the_readme_quotes_the_page():
    """Every row of its table of results: AUROC, FPR95, the best control and the best other score."""
    text = pages.page(RESULTS)
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d[^|]* ± [^|]*) \| ([\d.]+) \| `(.*?)` ([\d.]+) \| `(.*?)` ([\d.]+) \|",
                      (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 9
    for inliers, outliers, auroc, fpr95, control, of_control, best, of_best in rows:
        cells = headline(text, inliers, outliers)
        assert [*cells[3:4], *cells[5:7], cells[8]] == [auroc, f"{control} {of_control}", f"{best} {of_best}", fpr95]


def made_up(data, outliers, seed=0, **more):
    """What a run measured, in made-up numbers: `default` 0.97, the first control 0.99, all others 0.6."""
    def row(score):
        auroc = {"default": 0.97, CONTROLS[0]: 0.99}.get(score, 0.6)
        return {"auroc": auroc, "fpr95": 0.25}
    return {"data": data, "alpha": 0.25, "kappa": 32, "seed": seed, "iters": 10, "commands": ["python run.py"],
            "minutes": 1.5, "train_images": 50, "sets": {one: {"n": 40, "notes": []} for one in outliers},
            "scores": {score: {one: row(score) for one in outliers} for score in SCORES},
            "flagged": {one: [0.043, 0.876] for one in outliers}} | more


def written(folder, *runs):
    (folder / "detection").mkdir()
    for i, run in enumerate(runs):
        (folder / "detection" / f"{i}.json").write_text(json.dumps(run))
    return pages.page(folder)


def test_a_changed_number_changes_the_page_and_its_verdicts(tmp_path):
    shutil.copytree(RESULTS / "detection", tmp_path / "detection")
    for path in (tmp_path / "detection").glob("cifar10_a*.json"):
        numbers = json.loads(path.read_text())
        numbers["scores"]["default"]["svhn"]["auroc"] = 0.1234
        numbers["scores"][CONTROLS[0]]["svhn"]["auroc"] = 0.9999
        path.write_text(json.dumps(numbers))
    text = pages.page(tmp_path)
    cells = headline(text, "cifar10", "svhn")
    assert cells[3].startswith("0.1234 ±") and cells[4] == "0.99: NOT reached"
    assert cells[5] == f"{CONTROLS[0]} 0.9999" and cells[7] == "BEHIND by 0.8765"
    assert "svhn of cifar10 (by 0.8765)" in text
    assert re.search(r"\| default, ours \| 0\.99\d\d \| 0\.1234 \|", text)


def test_a_page_of_every_kind_of_pair(tmp_path):
    """Tiles, classes and PyOD, each with its table; the goal counts each class; means of the two halves."""
    tiles = [made_up(pairs.TILES, pairs.TILE_OUTLIERS, seed) for seed in range(3)]
    classes = [made_up("cifar10", (pairs.CLASS_OUTLIERS,), without=one) for one in (0, 1, 6)]
    classes[1]["scores"]["default"][pairs.CLASS_OUTLIERS]["auroc"] = 0.99
    pyod = {"data": pairs.TILES, "pyod": "9.8.7", "fit_images": 7,
            "scores": {"kNN": {one: {"auroc": 0.7654, "fpr95": 0.5} for one in pairs.TILE_OUTLIERS}}}
    text = written(tmp_path, *tiles, *classes, pyod)
    best = next(score for score in SCORES if score != "default" and score not in CONTROLS)
    first, control = pairs.TILE_OUTLIERS[0], CONTROLS[0]
    assert f"| magnetic_tile | {first} (development) | 0.9700 ± 0.0000 |  | {control} 0.9900 | {best} 0.6000 | " in text
    assert headline(text, "magnetic_tile", "other_defects")[7:10] == ["BEHIND by 0.0200", "0.250", "87.6 (4.3)"]
    assert "Of 5 pairs of inliers and outliers (3 of them a class that was left out) this concerns 5. " in text
    assert "keeps to it on 1, and is behind on 4: " in text
    mean = next(line for line in text.splitlines() if "mean of 0, 1 (development)" in line)
    assert "| 0.9800 |" in mean and "±" not in mean and any("mean of 6 |" in line for line in text.splitlines())
    row = next(line for line in text.splitlines() if line.startswith("| automobile (development) | 0.9900 |"))
    assert row.count("|") == len(CONTROLS) + 7 and "| level | 0.250 | 87.6 (4.3) |" in row
    assert next(line for line in text.splitlines() if line.startswith("| frog |"))
    assert "| kNN | 0.7654, 0.500 | 0.7654, 0.500 |" in text and "PyOD 9.8.7, " in text
    assert set(SCORES) <= set(re.findall(r"^\| (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("default, control, single, verdict", [
    (0.95, 0.96, 0.5, "BEHIND by 0.0100"), (0.95, 0.5, 0.96, "BEHIND by 0.0100"), (0.95, 0.955, 0.9, "level"),
    (0.96, 0.95, 0.9, "ahead"), (0.7, 0.85, 0.6, "behind by 0.1500"), (0.85, 0.9, 0.6, "BEHIND by 0.0500")])
def test_the_verdict_is_about_the_best_of_controls_and_scores(default, control, single, verdict):
    pair = pages.Pair("a", "b", False, {"default": [default], CONTROLS[0]: [control], "nll": [single]}, [0.1], [])
    assert pair.verdict() == verdict and bool(pair.behind()) == verdict.startswith("BEHIND")


def test_the_picture_of_the_pairs(tmp_path):
    pytest.importorskip("matplotlib")
    some = [("a", "here", 0.5, 0.7, True), ("b", "there", 0.9, 0.6, False), *[("b", "x", 0.999, 1.0, False)] * 3]
    dots.versus(tmp_path / "one.png", some, "x", "y")
    dots.versus(tmp_path / "two.png", [("a", "here", 0.5, 0.8, True), *some[1:]], "x", "y")
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()


def test_combinations_are_those_of_their_definition():
    """Against p by counting and another AUROC, on scores of few values, so that many tie."""
    rng, control = np.random.default_rng(0), next(name for name in CONTROLS if name not in COMPONENTS)
    scores = ["default", control, *COMPONENTS]

    def made(n, shift):
        return {name: rng.integers(0, 12, n) + shift * (i % 3) for i, name in enumerate(scores)}
    calibrate, count = made(15, 0), {"test": made(14, 0), "svhn": made(9, 1), "celeba": made(8, 2), "mnist": made(5, 3)}
    numbers = frontier.measured(calibrate, count)

    def aurocs(of):
        return [roc_auc_score([0] * 14 + [1] * len(of[one]), [*of["test"], *of[one]]) for one in ("svhn", "celeba")]

    def alone(name):
        return pytest.approx(aurocs({one: scores[name] for one, scores in count.items()}), abs=6e-5)

    def p(inliers, one):
        return (1 + sum(inliers >= one - 1e-12)) / 16

    def product(scores, i, names):
        return math.prod(p(calibrate[name], scores[name][i]) for name in names)

    def combined(scores, shares):
        weighted = [min(
            (p(-np.array([product(calibrate, j, names) for j in range(15)]), -product(scores, i, names))
             if len(names) > 1 else product(scores, i, names)) / share
            for names, share in zip(frontier.DIVIDED, shares, strict=True) if share)
            for i in range(len(scores["default"]))]
        return [-round(one, 12) for one in weighted]
    assert numbers["outliers"] == ["svhn", "celeba"] and numbers["default"] == alone("default")
    assert set(numbers["controls"]) == {control} and numbers["controls"][control] == alone(control)
    assert set(numbers["alone"]) == set(COMPONENTS)
    assert all(pair == alone(name) for name, pair in numbers["alone"].items())
    rows = list(zip(frontier.some_shares(), numbers["combined"], strict=True))
    assert all(pair == pytest.approx(aurocs({one: combined(scores, shares) for one, scores in count.items()}), abs=6e-5)
               for shares, pair in rows[::4])


def test_shares_are_those_of_default_of_every_two_or_more_and_many_others():
    shares, n = frontier.some_shares(), len(frontier.DIVIDED)
    assert shares.shape[1] == n and len(shares) <= 600 and shares.sum(1) == pytest.approx(1) and shares.min() >= 0
    equal = {tuple(row > 0) for row in shares if len(set(row[row > 0].round(12))) == 1}
    assert len(equal) == 2 ** n - 1 - n and (*SHARES.values(), 0, 0, 0) in map(tuple, shares)
    of_two = np.sort(shares, axis=1)[:, -2:].sum(1)
    assert (of_two > 0.9).sum() > 100 and (of_two < 0.7).sum() > 100


def test_the_envelope_is_what_nothing_beats():
    points = [tuple(point) for point in np.random.default_rng(0).integers(0, 30, (99, 2)) if sum(point) < 33]
    kept = [a for a in set(points) if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in points)]
    assert frontier.envelope(points) == sorted(kept) and len(kept) > 2 and frontier.envelope([]) == []


FRONTIER = {"outliers": ["svhn", "celeba"], "default": [0.9, 0.7], "combined": [[0.8, 0.75], [0.95, 0.6], [0.9, 0.7]],
            "alone": {"joint": [0.99, 0.65], "layout": [0.4, 0.8]}, "controls": {CONTROLS[0]: [1.0, 0.0]}}


def test_the_page_says_where_default_lies_where_that_was_measured(tmp_path):
    run = made_up("cifar10", ("svhn", "celeba"))
    run["sets"] = {"test": {"n": 30, "notes": []}, "svhn": {"n": 2000, "notes": []}, "celeba": {"n": 17, "notes": []}}
    known, fewer = run | {"frontier": FRONTIER}, run | {"frontier": FRONTIER | {"default": [0.995, 0.7]}}
    said = {}
    for name, runs in {"without": [run, run], "with": [run, known], "fewer": [fewer]}.items():
        (tmp_path / name).mkdir()
        said[name] = written(tmp_path / name, *runs)
    assert "frontier" not in said["without"] and "(frontier.png)" in said["with"]
    for sentence in ("the 2,000 images of svhn, up, on the 17 of celeba, both development, against every other test "
                     "image (15). Gray are 3 combinations ",
                     "`default` lies at 0.9000 and 0.7000: 1 of the 5 combinations and single components is as good on "
                     "both, the best of those that are as good on svhn has 0.7000 on celeba, and the best of those "
                     "that are as good on celeba has 0.9000 on svhn."):
        assert sentence in said["with"]
    assert ": none of the 5 " in said["fewer"] and " as good on svhn has none on celeba, " in said["fewer"]


def test_the_picture_of_the_frontier(tmp_path):
    pytest.importorskip("matplotlib")
    for name, more in {"one": {}, "two": {"default": [0.9, 0.6]}, "three": {"combined": [[0.5, 0.5]]}}.items():
        frontier.draw(tmp_path / f"{name}.png", FRONTIER | more)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 10_000


def test_a_label_lies_on_no_other_and_on_no_dot():
    pytest.importorskip("matplotlib")
    figure, axes = plots.figure_and_axes(4.0, 4.0)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    places = [(0.5, 0.5), (0.6, 0.5), (0.99, 0.2), *[(0.2, 0.8)] * 9]
    dots.label(figure, axes, [(f"label {i}", xy, "black", i) for i, xy in enumerate(places[:3])] + [
        ("same place", places[3], "black", None)] * 2, places)
    figure.draw_without_rendering()  # as it is saved
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["label 0", "label 1", "label 2", "same place", "same place"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*place) for box in boxes for place in axes.transData.transform(places))
    assert max(box.x1 for box in boxes) < figure.bbox.x1


def test_what_is_measured_and_that_it_is_not_measured_twice(tmp_path, monkeypatch):
    run, ran = pairs.RUNS["cifar10"], []
    args = Namespace(runs=str(tmp_path), data_root=None)
    write_run(tmp_path / run.folder, outliers=("svhn", "celeba"))

    def execute(arguments, data_root):
        ran.append(arguments)
        out = Path(arguments[arguments.index("--out") + 1])
        first = arguments.index("--outliers") + 1
        outliers = arguments[first:arguments.index("--iw-samples")]
        assert str(tmp_path / "celeba_lanczos.npy") in outliers
        write_run(out, outliers=outliers)
        metrics = json.loads((out / "metrics.json").read_text())
        metrics["scores"] = {"regret" if "regret" in arguments else "default": metrics["scores"]["nll"]}
        (out / "metrics.json").write_text(json.dumps(metrics))
        rows = [("test", i, i) for i in range(40)] + [(name, i, 30 + i) for name in outliers for i in range(20)]
        columns = ["default", *COMPONENTS]
        (out / "scores.csv").write_text(",".join(["set", "index", *columns]) + "\n" + "".join(
            ",".join(map(str, [one, i, *[score] * len(columns)])) + "\n" for one, i, score in rows))

    monkeypatch.setattr(pairs, "execute", execute)
    monkeypatch.setattr(pairs, "faces", lambda args: None)
    numbers = pairs.named(run, args)
    assert [arguments[0] for arguments in ran] == ["eval.py", "eval.py"]
    assert list(numbers["scores"]["default"]) == list(pairs.OUTLIERS["cifar10"]) == list(numbers["flagged"])
    assert list(numbers["scores"]["regret"]) == ["svhn", "celeba", "celeba_lanczos"]
    assert [command.split()[1] for command in numbers["commands"]] == ["run.py", "eval.py", "eval.py"]
    assert "runs/celeba_lanczos.npy" in numbers["commands"][1] and "celeba_lanczos" in numbers["sets"]
    assert numbers["fit_images"] == 500
    # 0, 2, ... 38 calibrate: p of 39 is 1/21, of 37 2/21
    assert numbers["flagged"]["svhn"] == [1 / 20, 11 / 20]
    assert numbers["test_bpd"] == pytest.approx(6.5) and numbers["minutes"] == pytest.approx(10_000 * 0.1 / 60)
    assert str(tmp_path) not in json.dumps(numbers)
    # the outliers 30 to 49 against the inliers 1, 3, ... 39: (15 + 15.5 + 16 + ... + 19.5 + 10 * 20) / 400
    assert numbers["frontier"]["default"] == pytest.approx([0.93125] * 2, abs=6e-5)
    assert pairs.named(run, args) == numbers and len(ran) == 2
    other = replace(run, seed=1)
    write_run(tmp_path / other.folder, outliers=("svhn", "celeba"))
    assert "frontier" not in pairs.named(other, args)


def test_faces_are_cropped_and_scaled_by_lanczos(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "data/celeba/img_align_celeba"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, value in (("182638.jpg", 200), ("000001.jpg", 0)):  # the second one is of the training part
        pixels = np.full((218, 178, 3), 7, np.uint8)
        pixels[35:183, 15:163] = value + rng.integers(0, 40, (148, 148, 1))
        image.fromarray(pixels).save(folder / name, quality=100, subsampling=0)
    pairs.faces(Namespace(runs=str(tmp_path), data_root=str(tmp_path / "data")))
    made = np.load(tmp_path / "celeba_lanczos.npy")
    assert made.shape == (1, 32, 32, 3) and made.min() > 190
    far = {name: np.abs(made[0].astype(int) - np.asarray(image.open(folder / "182638.jpg").resize(
        (32, 32), image.Resampling[name], (15, 35, 163, 183))))[4:-4, 4:-4].max() for name in ("LANCZOS", "BILINEAR")}
    assert far["LANCZOS"] == 0 < far["BILINEAR"]  # within the edge, to which the box mixes what lies outside of it


def idx(path, array):
    """Write an IDX file."""
    head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_a_class_is_left_out(tmp_path, monkeypatch):
    """Of made-up images, black squares whose place is their class: which go where, what is run, what is measured."""
    place, ran, rng = tmp_path / "data/fashionmnist", [], np.random.default_rng(0)
    place.mkdir(parents=True)
    for name, n in (("train", 300), ("t10k", 60)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = rng.integers(100, 120, (n, 28, 28), np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label:2 * label + 9, 4:20] = 0 if label != 3 else 255
        idx(place / f"{name}-images-idx3-ubyte.gz", images)
        idx(place / f"{name}-labels-idx1-ubyte.gz", labels)
    args = Namespace(runs=str(tmp_path / "runs"), data_root=str(tmp_path / "data"))
    execute = pairs.execute

    def quickly(arguments, data_root):
        ran.append(arguments)
        execute([*arguments, *(["--iters", "30"] if arguments[0] == "run.py" else ["--scores", "default", "nll"])],
                data_root)
    monkeypatch.setattr(pairs, "execute", quickly)
    numbers = pairs.without("fashionmnist", 3, args)
    folder = tmp_path / "runs/classes/fashionmnist-3"
    sets = {name: np.load(folder / f"{name}.npy") for name in ("train", "test", "out")}
    assert [len(one) for one in sets.values()] == [270, 54, 6]
    assert sets["out"].max((1, 2, 3)).min() == 255 and max(sets["train"].max(), sets["test"].max()) < 255
    assert [arguments[0] for arguments in ran] == ["run.py", "eval.py"]
    assert set(ran[1][ran[1].index("--scores") + 1:]) == {"all"}
    row = numbers["scores"]["default"]["left_out"]
    assert (row["n_in"], row["n_out"]) == (54, 6) and row["auroc"] > 0.9
    assert (numbers["data"], numbers["without"], [*numbers["scores"]]) == ("fashionmnist", 3, ["default", "nll"])
    assert 0 <= numbers["flagged"]["left_out"][0] < 0.5 < numbers["flagged"]["left_out"][1] <= 1
    assert str(tmp_path) not in json.dumps(numbers) and 150 < numbers["train_images"] < 270
    (place / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"put its train-labels-idx1-ubyte\.gz in "):
        pairs.without("fashionmnist", 3, args)


def test_classes_of_cifar10_are_those_of_its_records(tmp_path):
    records = np.zeros((7, 3073), np.uint8)
    records[:, 0] = [3, 1, 4, 1, 5, 9, 2]
    (tmp_path / "test_batch.bin").write_bytes(records.tobytes())
    assert pairs.labels("cifar10", "test", tmp_path).tolist() == [3, 1, 4, 1, 5, 9, 2]


def test_tiles_are_judged_in_two_parts(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    for name in ("good/train/t000/a.jpg", "good/held_out/t002/b.jpg", "good/held_out/t003/c.jpg",
                 "good/held_out/t004/d.jpg", "defect/exp_Break_1.jpg", "defect/exp_Crack_1.jpg"):
        path = tmp_path / "magnetic_tile" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("L", (70, 60), 90).save(path)
    parts = pairs.tile_parts(Namespace(data_root=str(tmp_path)))
    names = {name: [[path.name for path in of] for of in both] for name, both in parts.items()}
    assert names == {"blowholes_breaks": [["b.jpg", "d.jpg"], ["exp_Break_1.jpg"]],
                     "other_defects": [["c.jpg"], ["exp_Crack_1.jpg"]]}
    seen = []
    monkeypatch.setattr(pairs, "version", lambda name: "9.8.7")
    monkeypatch.setattr(contenders, "compare", lambda train, against: seen.append((train, against)) or {})
    numbers = pairs.pyod(pairs.TILES, Namespace(data_root=str(tmp_path), runs=str(tmp_path)))
    assert numbers["fit_images"] == 1 and seen[0][0].shape == (1, 1, 64, 64)
    assert [len(part) for part in seen[0][1]["blowholes_breaks"]] == [2, 1]


def test_the_commands_of_tiles_name_no_folder_of_this_machine(tmp_path, monkeypatch):
    """Nor with the default --runs, which the page's commands name too."""
    ran, run = [], Path("runs/magnetic_tile_s1")
    monkeypatch.chdir(tmp_path)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"alpha": 0.25, "kappa": 32, "iters": 3000, "seed": 1}))
    (run / "log.jsonl").write_text('{"images_per_second": 640}\n')
    (run / "groups.csv").write_text("file,group,part\na,0,train\nb,1,test\n")
    monkeypatch.setattr(pairs, "execute", lambda arguments, data_root: ran.append(arguments))
    monkeypatch.setattr(pairs, "judged", lambda path, against: {"judged": str(path)})
    monkeypatch.setattr(pairs, "tile_parts", lambda args: {})
    numbers = pairs.tiles(1, Namespace(runs="runs", data_root="data"))
    assert [arguments[0] for arguments in ran] == ["run.py", "eval.py"]
    assert ran[0][2] == str(tmp_path / "data/magnetic_tile/good/train")
    assert numbers["commands"][0].startswith("python run.py --data magnetic_tile/good/train --group-by folder ")
    assert str(tmp_path) not in json.dumps(numbers) and numbers["judged"] == str(run / "detector.pt")
    assert (numbers["data"], numbers["train_images"], numbers["minutes"]) == ("magnetic_tile", 1, 5)


def test_the_command_measures_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    measured, arguments = [], ["detection", "--runs", str(tmp_path / "runs")]

    def measure(name, args):
        measured.append(name)
        return made_up(pairs.TILES, pairs.TILE_OUTLIERS)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "kept", lambda: {name: partial(measure, name) for name in ("a", "b")})
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    (tmp_path / "detection/b.json").unlink()
    command.main()
    assert measured == ["a", "b", "b"] and (tmp_path / "detection.md").read_text() == pages.page(tmp_path)
    assert (tmp_path / "detection.png").exists() == plots.available() and not (tmp_path / "frontier.png").exists()
    known = made_up("cifar10", ("svhn", "celeba"), frontier=FRONTIER)
    known["sets"]["test"] = {"n": 30, "notes": []}
    (tmp_path / "detection/b.json").write_text(json.dumps(known))
    command.main()
    assert (tmp_path / "frontier.png").exists() == plots.available()

    def missing():
        raise UserError("pip install pyod")
    monkeypatch.setattr(contenders, "methods", missing)
    monkeypatch.setattr(command, "kept", lambda: {name: partial(measure, name) for name in ("c", "pyod_d")})
    with pytest.raises(UserError, match="pip install pyod"):
        command.main()
    assert measured == ["a", "b", "b"]  # it is told before anything else takes its time


class Distance:
    """A detector as PyOD's: how far pixels are from the mean of those that it was fitted to."""

    def fit(self, x):
        self.mean = x.mean(0)

    def decision_function(self, x):
        return np.linalg.norm(x - self.mean, axis=1)


def test_others_see_the_same_pixels(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(contenders, "methods", lambda: {"distance": Distance()})
    monkeypatch.setattr(contenders, "FIT", 30)
    monkeypatch.setattr(contenders, "SCORED", 20)
    rng = np.random.default_rng(0)
    train, inliers = (torch.from_numpy(rng.integers(90, 110, (40, 1, 4, 4), np.uint8)) for _ in range(2))
    outliers = torch.from_numpy(rng.integers(80, 120, (30, 1, 4, 4), np.uint8))
    row = contenders.compare(train, {"wide": (inliers, outliers)})["distance"]["wide"]
    x, a, b = (part[:n].flatten(1).numpy() for part, n in ((train, 30), (inliers, 20), (outliers, 20)))
    scores = np.linalg.norm(np.concatenate([a, b]) - x.mean(0), axis=1)
    assert row["auroc"] == pytest.approx(roc_auc_score([0] * 20 + [1] * 20, scores)) and row["n_out"] == 20


def test_without_pyod_one_line_says_how_to_get_it(monkeypatch):
    whole = builtins.__import__

    def absent(name, *arguments):
        if name.startswith("pyod"):
            raise ImportError(f"No module named '{name}'")
        return whole(name, *arguments)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install pyod"):
        contenders.methods()
