"""The page of detection results against the JSON files that it is written from, and how these come about."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_reproduce import write_run
from vae_ood import detection
from vae_ood.scores import SCORES

RESULTS = ROOT / "results"


def test_the_page_says_what_the_json_files_say():
    assert (RESULTS / "detection.md").read_text() == detection.page(RESULTS), "run python -m vae_ood.detection"
    kept = {path.stem for path in (RESULTS / "detection").glob("*.json")}
    assert kept == {f"{run.folder[:-1]}{seed}" for run in detection.RUNS.values() for seed in range(detection.SEEDS)}


def test_the_readme_quotes_the_page():
    """Every row of its table of results: AUROC, FPR95, the best control and the best other score."""
    sections = dict(re.findall(r"^## Inliers: (\w+)\n(.*?)(?=^## )", detection.page(RESULTS), re.DOTALL | re.MULTILINE))
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\d[^|]* ± [^|]*) \| ([\d.]+) \| `(.*?)` ([\d.]+) \| `(.*?)` ([\d.]+) \|",
                      (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 9
    for inliers, outliers, auroc, fpr95, control, of_control, best, of_best in rows:
        summary, scores = (re.search(rf"^\| {start}.*", sections[inliers], re.MULTILINE)[0]
                           for start in (rf"{outliers}[ (]", "default"))
        assert f"| {auroc}, {fpr95} |" in scores
        assert f"| {control} {of_control}: " in summary and f"| {best} {of_best} |" in summary


def test_a_changed_number_changes_the_page_and_its_verdicts(tmp_path):
    shutil.copytree(RESULTS / "detection", tmp_path / "detection")
    for path in (tmp_path / "detection").glob("cifar10*.json"):
        numbers = json.loads(path.read_text())
        numbers["scores"]["default"]["svhn"]["auroc"] = 0.1234
        numbers["scores"]["code_length"]["svhn"]["auroc"] = 0.9991
        path.write_text(json.dumps(numbers))
    text = detection.page(tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| svhn | 0.1234"))
    assert "| 0.99: NOT reached | code_length 0.9991: NOT beaten |" in row
    assert re.search(r"\| default, ours \| 0\.99\d\d \| 0\.1234 \|", text)
    assert set(SCORES) <= set(re.findall(r"^\| (\w+)", text, re.MULTILINE))


def test_what_is_measured_and_that_it_is_not_measured_twice(tmp_path, monkeypatch):
    run, ran = detection.RUNS["cifar10"], []
    args = Namespace(runs=str(tmp_path), data_root=None)
    write_run(tmp_path / run.folder, outliers=("svhn", "celeba"))

    def execute(arguments, data_root):
        ran.append(arguments)
        out = Path(arguments[arguments.index("--out") + 1])
        first = arguments.index("--outliers") + 1
        outliers = arguments[first:arguments.index("--iw-samples")]
        write_run(out, outliers=outliers)
        metrics = json.loads((out / "metrics.json").read_text())
        metrics["scores"] = {"regret" if "--scores" in arguments else "default": metrics["scores"]["nll"]}
        (out / "metrics.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(detection, "execute", execute)
    numbers = detection.measure(run, args)
    assert [arguments[0] for arguments in ran] == ["eval.py", "eval.py"]
    assert list(numbers["scores"]["default"]) == list(detection.OUTLIERS["cifar10"])
    assert list(numbers["scores"]["regret"]) == ["svhn", "celeba"]
    assert [command.split()[1] for command in numbers["commands"]] == ["run.py", "eval.py", "eval.py"]
    assert numbers["fit_images"] == 500
    assert numbers["test_bpd"] == pytest.approx(6.5) and numbers["minutes"] == pytest.approx(10_000 * 0.1 / 60)
    assert str(tmp_path) not in json.dumps(numbers)
    assert detection.measure(run, args) == numbers and len(ran) == 2
